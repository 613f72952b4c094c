"""What `eval` is asked for: a model, a suite and a form of prompts; where results go, and what answers depend on."""

from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import orjson

from easylm_mling.checkpoint.layout import step_directory
from easylm_mling.checkpoint.reading import load_info, stored_model
from easylm_mling.config import ModelConfig, to_tree
from easylm_mling.data.tokenization.tokenizer import Tokenizer
from easylm_mling.errors import check
from easylm_mling.evaluation.scoring.suites import Suite
from easylm_mling.inference.generate import find_tokenizer
from easylm_mling.storage.object_store import is_bucket

_LONGEST = 8192  # tokens of a window, unless --max-length says more
_SAMPLED = 1 << 16  # bytes of a file of weights, at each of 16 places, that go into its digest


@dataclass(frozen=True)
class EvalOptions:
    """What is evaluated, on what, and where the results go."""

    model: str  # a run, an imported checkpoint or a Hugging Face directory
    suite: Suite
    step: int | None = None
    tokenizer: str | None = None
    output: str | None = None
    baseline: str | None = None
    dtype: str = "bfloat16"
    max_length: int | None = None
    limit: int | None = None  # items of each task
    form: str = "plain"  # of the prompts: plain or chat
    template: str = "tokenizer"  # of the chat form, as data/conversations/templates.py reads it

    @property
    def asked(self) -> list:
        """What decides the scores beside the model: rows and window, and the template of the chat form."""
        rows = [[r.name, r.task, r.shots, r.measure] for r in self.suite.rows]
        return [rows, self.max_length, *([self.template] if self.form == "chat" else [])]

    @property
    def name(self) -> str:
        """The suite in the names of files: those of the chat form have their own."""
        return self.suite.name if self.form == "plain" else f"{self.suite.name}-{self.form}"

    def window(self, model: ModelConfig) -> int:
        """Return the longest text that is read, in tokens. Raises ConfigError for one that the model does not have."""
        most = model.max_position_embeddings
        length = min(most, _LONGEST) if self.max_length is None else self.max_length
        check(0 < length <= most, f"--max-length {length}: the model reads 1 to {most} tokens")
        return length


def place(options: EvalOptions) -> tuple[int | None, Path]:
    """Return the step, and the folder of the results: RUN/evaluations/STEP, where the model card looks for them."""
    is_hf = (Path(options.model) / "config.json").is_file()
    step = None if is_hf else int(step_directory(options.model, options.step).name)
    if options.output:
        return step, Path(options.output)
    if is_hf or is_bucket(options.model):
        name = Path(options.model.rstrip("/")).name
        return step, Path("evaluations") / name / ("" if step is None else str(step))
    return step, Path(options.model) / "evaluations" / str(step)


def identity(options: EvalOptions, step: int | None, model: ModelConfig, tokenizer: Tokenizer) -> str:
    """Return a digest of all that answers depend on: weights, model, tokenizer, dtype and window."""
    digest = blake2b(digest_size=6)
    if step is None:
        for file in sorted(Path(options.model).glob("*.safetensors")):
            size = file.stat().st_size
            digest.update(f"{file.name} {size}".encode())
            with open(file, "rb") as content:
                for n in range(16):
                    content.seek(max(0, size - _SAMPLED) * n // 15)
                    digest.update(content.read(_SAMPLED))
    else:
        info = load_info(options.model, step)
        digest.update(orjson.dumps([step, info.get("digests", {})], option=orjson.OPT_SORT_KEYS))
    rest = [to_tree(model), tokenizer.fingerprint, options.dtype, options.window(model)]
    digest.update(orjson.dumps(rest, option=orjson.OPT_SORT_KEYS, default=str))
    return digest.hexdigest()


def identity_of_checkpoint(options: EvalOptions) -> str:
    """Return `identity` of a checkpoint, without loading its parameters."""
    step = int(step_directory(options.model, options.step).name)
    tokenizer = Tokenizer(str(options.tokenizer or find_tokenizer(options.model, step)), "--tokenizer ")
    return identity(options, step, stored_model(options.model, step), tokenizer)
