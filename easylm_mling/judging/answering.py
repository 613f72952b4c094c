"""The answers that are judged: a model's own, written once and kept, or those of a file."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import orjson

from easylm_mling.config import ModelConfig
from easylm_mling.data.tokenization.tokenizer import Tokenizer
from easylm_mling.errors import ConfigError, check
from easylm_mling.evaluation.request_cache import RequestCache, request_key
from easylm_mling.inference.dialogue import Dialogue
from easylm_mling.inference.generate import generate
from easylm_mling.judging.questions import Question, without_end_marks
from easylm_mling.judging.settings import AnswerSettings
from easylm_mling.storage.jsonl import read_jsonl
from easylm_mling.training.state import model_graph


@dataclass(frozen=True)
class Answer:
    """An answer, and whether the model ended it by itself (None: not known)."""

    text: str
    ended: bool | None


def read_answers(path: str, questions: list[Question]) -> dict[str, Answer]:
    """Return the answers of a .jsonl file with `id` and `answer`. Raises ConfigError if one is missing or doubled."""
    answers: dict[str, Answer] = {}
    try:
        for row in read_jsonl(Path(path)):
            name, text = row.get("id"), row.get("answer")
            check(isinstance(name, str) and isinstance(text, str), f"{path}: a row needs the texts `id` and `answer`")
            assert isinstance(name, str) and isinstance(text, str)
            check(name not in answers, f"{path}: answers {name!r} twice")
            answers[name] = Answer(without_end_marks(text), None)
    except OSError as error:
        raise ConfigError(f"{path}: the answers cannot be read ({error})") from None
    missing = [q.id for q in questions if q.id not in answers]
    check(not missing, f"{path}: has no answer to {', '.join(missing[:5])}{' and more' if len(missing) > 5 else ''}")
    return {q.id: answers[q.id] for q in questions}


class Answerer:
    """A model that answers questions by its chat template."""

    def __init__(
        self,
        dialogue: Dialogue,
        model: ModelConfig,
        tokenizer: Tokenizer,
        settings: AnswerSettings,
        dtype: str,
        length: int,
    ):
        """Raises ConfigError for answers that leave no room for a question in a window of `length` tokens."""
        check(
            settings.max_new_tokens < length,
            f"answers.max_new_tokens={settings.max_new_tokens} leaves no room for a question: the model reads {length} tokens",
        )
        self._dialogue, self._tokenizer, self._settings = dialogue, tokenizer, settings
        self._dtype, self._length = dtype, length
        # The template's own end of a turn ends an answer, whatever the checkpoint names.
        self.model = replace(model, stop_token_ids=tuple(dict.fromkeys((*model.stop_token_ids, dialogue.end))))
        self._graph = model_graph(self.model)

    def write(self, params: dict, questions: list[Question], cache: RequestCache, progress: Any) -> dict[str, Answer]:
        """Return the answer to each question by its id. `cache` has those of earlier calls, and gets each batch."""
        s = self._settings
        drawn = [s.temperature, s.top_k, s.top_p, s.max_new_tokens]
        prompts = {q.id: self._prompt(q) for q in questions}
        # Each question is drawn with a seed of its own, so that no answer depends on what else is asked.
        keys = {q.id: request_key("answer", prompts[q.id], orjson.dumps([*drawn, s.seed])) for q in questions}
        todo = [q for q in questions if keys[q.id] not in cache]
        todo.sort(key=lambda q: len(prompts[q.id]))
        rows = s.rows if not s.temperature else 1
        for start in range(0, len(todo), rows):
            batch = todo[start : start + rows]
            # Always as many rows, so that the last batch is not compiled again.
            asked = [prompts[q.id] for q in batch] + [prompts[batch[-1].id]] * (rows - len(batch))
            new = generate(
                self._graph,
                params,
                self.model,
                asked,
                s.max_new_tokens,
                s.temperature,
                s.top_k,
                s.top_p,
                s.seed,
                self._dtype,
            )
            cache.add({keys[q.id]: self._answer(ids) for q, ids in zip(batch, new, strict=False)})
            progress("answers", start + len(batch), len(todo))
        return {q.id: Answer(*cache[keys[q.id]]) for q in questions}

    def _prompt(self, question: Question) -> list[int]:
        system = [{"role": "system", "content": self._settings.system}] if self._settings.system else []
        ids = self._dialogue.prompt([*system, {"role": "user", "content": question.question}])
        room = self._length - self._settings.max_new_tokens
        check(
            len(ids) <= room,
            f"question {question.id}: has {len(ids)} tokens, and {room} fit beside answers.max_new_tokens; lower that, or "
            "shorten the question",
        )
        return ids

    def _answer(self, ids: list[int]) -> tuple[str, bool]:
        ends = {self.model.eos_token_id, *self.model.stop_token_ids}
        kept = [i for i in ids if i not in ends and i < self._tokenizer.vocab_size]
        return self._tokenizer.decode(kept).strip(), bool(ids) and ids[-1] in ends
