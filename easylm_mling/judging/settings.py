"""What is judged, by whom and how: a YAML file, as configs/judge/sixty.yaml."""

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import yaml

from easylm_mling.config import from_tree
from easylm_mling.config.basics import setting
from easylm_mling.config.yaml12 import read_yaml
from easylm_mling.errors import ConfigError, check


@dataclass(frozen=True)
class AnswerSettings:
    """How the model is asked, and how its answers are drawn."""

    template: str | None = setting(
        None, "as in data.sources.NAME.conversations; null: that of the run's conversations, else the tokenizer's own"
    )
    system: str | None = setting(None, "a system line before every question")
    temperature: float = setting(0.0, "0 is greedy")
    top_k: int | None = setting(None, "of the most probable tokens, so many are drawn from")
    top_p: float = setting(1.0, "of those, the smallest set with so much probability")
    max_new_tokens: int = setting(512, "longest answer, in tokens")
    seed: int = setting(0, "of drawn answers")
    rows: int = setting(16, "questions answered side by side")


@dataclass(frozen=True)
class JudgeSettings:
    """One judge, its questions, and what it is asked of them."""

    endpoint: str = setting("", "an OpenAI-compatible endpoint, up to /v1")
    model: str = setting("", "the judge's name there")
    questions: str = setting("", "a .jsonl with id, language and question, and perhaps category and reference")
    key_variable: str = setting("OPENAI_API_KEY", "the environment variable that holds the endpoint's key")
    pairwise: bool = setting(False, "with --baseline: the judge also compares both answers, in both orders")
    repeats: int = setting(1, "how often each judgement is asked for, to see whether the judge agrees with itself")
    temperature: float | None = setting(0.0, "of the judge; null is not sent, for judges that refuse it")
    top_p: float | None = setting(None, "of the judge; null is not sent")
    seed: int | None = setting(0, "of the judge, and one more for each repeat; null is not sent")
    max_tokens: int = setting(1024, "longest reply of the judge, in tokens")
    length_key: str = setting("max_tokens", "what the endpoint calls that: max_tokens or max_completion_tokens")
    parallel: int = setting(8, "judgements asked for at a time")
    attempts: int = setting(6, "how often one is asked for when the endpoint errs")
    timeout_seconds: float = setting(120.0, "of one request")
    input_price: float | None = setting(None, "dollars for a million tokens read, to foretell the cost")
    output_price: float | None = setting(None, "dollars for a million tokens written")
    answers: AnswerSettings = setting(factory=AnswerSettings, help="how the judged model answers")


def load_settings(path: str) -> JudgeSettings:
    """Read the settings in a YAML file. A relative `questions` is meant from the file's folder.

    Raises ConfigError that names the first thing wrong.
    """
    file = Path(path)
    try:
        tree = read_yaml(file.read_bytes())
    except (OSError, yaml.YAMLError) as error:
        why = " ".join(str(error).split())[:150]
        raise ConfigError(
            f"--judge {path}: cannot be read ({why}); name a file such as configs/judge/sixty.yaml"
        ) from None
    check(isinstance(tree, dict), f"{path}: holds no settings of a judge; see configs/judge/sixty.yaml")
    try:
        settings = from_tree(JudgeSettings, tree)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    _check(settings, path)
    questions = file.parent / Path(settings.questions).expanduser()
    return from_tree(JudgeSettings, tree | {"questions": str(questions)})


def _check(s: JudgeSettings, path: str):
    url, a = urlsplit(s.endpoint), s.answers
    for wrong, text in (
        (url.scheme not in ("http", "https") or not url.netloc, f"endpoint={s.endpoint!r} must be a URL such as https://api.openai.com/v1"),
        (url.username is not None, "endpoint holds a name or a key; put the key into the environment (key_variable)"),
        (not s.model, "model is empty; name the judge"),
        (not s.questions, "questions is empty; name a .jsonl file"),
        (not s.key_variable, "key_variable is empty; name an environment variable"),
        (s.repeats < 1, f"repeats={s.repeats} must be 1 or more"),
        (not 0 <= (s.temperature or 0) <= 2, f"temperature={s.temperature} must be between 0 and 2"),
        (s.top_p is not None and not 0 < s.top_p <= 1, f"top_p={s.top_p} must be above 0 and at most 1"),
        (s.length_key not in ("max_tokens", "max_completion_tokens"), f"length_key={s.length_key!r} must be max_tokens or max_completion_tokens"),
        (s.max_tokens < 1, f"max_tokens={s.max_tokens} must be positive"),
        (s.parallel < 1, f"parallel={s.parallel} must be 1 or more"),
        (s.attempts < 1, f"attempts={s.attempts} must be 1 or more"),
        (not s.timeout_seconds > 0, f"timeout_seconds={s.timeout_seconds} must be positive"),
        (any(p is not None and p < 0 for p in (s.input_price, s.output_price)), "input_price and output_price must be zero or more"),
        (a.max_new_tokens < 1, f"answers.max_new_tokens={a.max_new_tokens} must be positive"),
        (a.rows < 1, f"answers.rows={a.rows} must be 1 or more"),
        (not 0 <= a.temperature < float("inf"), f"answers.temperature={a.temperature} must be zero or more"),
        (a.top_k is not None and a.top_k < 1, f"answers.top_k={a.top_k} must be positive"),
        (not 0 < a.top_p <= 1, f"answers.top_p={a.top_p} must be above 0 and at most 1"),
    ):  # fmt: skip
        check(not wrong, f"{path}: {text}")
