"""Generation for evaluation: texts that end at stop strings, batches of prompts of about one length."""

from collections.abc import Sequence
from dataclasses import dataclass

from flax import nnx

from easylm_mling.config import ModelConfig
from easylm_mling.data.tokenization.tokenizer import Tokenizer
from easylm_mling.inference.decoder import Draw
from easylm_mling.inference.texts import Prompt, write_texts


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
        """What its text depends on beside its prompt and stops."""
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
        """Return the text of each task, without what is at or after its first stop string."""
        prompts = [
            Prompt(t.prompt, t.max_new_tokens, Draw(t.temperature, t.top_p, t.top_k or 0, t.seed), t.stops)
            for t in tasks
        ]
        written = write_texts(self.graph, self.params, self.model, self.tokenizer, prompts, len(prompts), self.dtype)
        texts = dict(written)
        return [texts[n].text for n in range(len(tasks))]


def batches_of_tasks(tasks: Sequence[Task], most: int) -> list[list[int]]:
    """Return the numbers of tasks in batches of at most `most`, of about one length, longest first."""
    order = sorted(range(len(tasks)), key=lambda n: (-len(tasks[n].prompt) - tasks[n].max_new_tokens, n))
    return [order[start : start + most] for start in range(0, len(order), most)]
