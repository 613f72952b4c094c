"""Generation for evaluation: texts that end at stop strings, batches of prompts of about one length."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from flax import nnx

from easylm_mling.config import ModelConfig
from easylm_mling.data.tokenization.tokenizer import Tokenizer
from easylm_mling.inference.generate import generate

_FIRST = 64  # new tokens before texts are first searched for a stop string; then twice as many, and so on


@dataclass(frozen=True)
class Task:
    """One text to write: its prompt's ids, where it must end, and how it is drawn."""

    prompt: tuple[int, ...]
    stops: tuple[str, ...]
    max_new_tokens: int
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0

    @property
    def settings(self) -> dict:
        """The settings that tasks of one batch share."""
        names = ("max_new_tokens", "temperature", "top_k", "top_p", "seed")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Writer:
    """A model that writes texts. `params` are float32."""

    graph: nnx.GraphDef
    params: dict
    model: ModelConfig
    tokenizer: Tokenizer
    dtype: str = "bfloat16"

    def write(self, tasks: Sequence[Task]) -> list[str]:
        """Return the text of each task, without what is at or after its first stop string. All share their settings.

        The texts grow in stages, so that short answers do not wait for the limit. Drawn texts are written in one stage, as
        the n-th token of a stage is drawn with the n-th key.
        """
        first, done = tasks[0], [[] for _ in tasks]
        settings = {k: v for k, v in first.settings.items() if k != "max_new_tokens"}
        stage = first.max_new_tokens if first.temperature else min(_FIRST, first.max_new_tokens)
        left, rest = list(range(len(tasks))), first.max_new_tokens
        while left and rest:
            prompts = [[*tasks[i].prompt, *done[i]] for i in left]
            # Always as many rows, so that the next stage is not compiled again.
            filled = prompts + [prompts[-1]] * (len(tasks) - len(prompts))
            new = generate(self.graph, self.params, self.model, filled, stage, dtype=self.dtype, **settings)
            for i, ids in zip(left, new, strict=False):
                done[i] += ids
            rest -= stage
            left = [
                i for i, ids in zip(left, new, strict=False) if len(ids) == stage and not self._ended(tasks[i], done[i])
            ]
            stage = min(2 * stage, rest)
        return [cut(self._text(ids), task.stops) for task, ids in zip(tasks, done, strict=True)]

    def _ended(self, task: Task, ids: list[int]) -> bool:
        text = self._text(ids)
        return ids[-1] in self._ends or any(stop in text for stop in task.stops)

    @property
    def _ends(self) -> set[int]:
        return {self.model.eos_token_id, *self.model.stop_token_ids}

    def _text(self, ids: list[int]) -> str:
        return self.tokenizer.decode([i for i in ids if i not in self._ends and i < self.tokenizer.vocab_size])


def batches_of_tasks(tasks: Sequence[Task], most: int) -> Iterator[list[int]]:
    """Yield the numbers of at most `most` tasks of the same settings and of about one length, longest first."""
    by_settings: dict[tuple, list[int]] = {}
    for number, task in enumerate(tasks):
        by_settings.setdefault(tuple(task.settings.values()), []).append(number)
    for numbers in by_settings.values():
        numbers.sort(key=lambda n: (-len(tasks[n].prompt), n))
        for start in range(0, len(numbers), most):
            yield numbers[start : start + most]


def cut(text: str, stops: Sequence[str]) -> str:
    """Return `text` up to the first stop string in it."""
    for stop in filter(None, stops):
        text = text.partition(stop)[0]
    return text
