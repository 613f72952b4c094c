"""The public API: a handful of functions, each the same as a command of `easylm-mling`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flax import nnx

from easylm_mling.config import ModelConfig, RunConfig
from easylm_mling.data.tokenization.tokenizer import Tokenizer
from easylm_mling.hf.exporting import export_hf as export
from easylm_mling.inference import generate as inference
from easylm_mling.run.starting_model import load_config
from easylm_mling.run.train import train

__all__ = ["Model", "RunConfig", "export", "generate", "load_config", "load_model", "train"]


@dataclass(frozen=True)
class Model:
    """A loaded model: `nnx.merge(graph, params)` is the module; `params` is a nested dict of float32 arrays."""

    graph: nnx.GraphDef
    params: dict
    config: ModelConfig
    tokenizer: Tokenizer


def load_model(path: str | Path, step: int | None = None, tokenizer: str | Path | None = None) -> Model:
    """Load a Hugging Face directory, a run (its newest step, or `step`) or an imported checkpoint.

    For example `load_model("runs/demo", step=110)`. The tokenizer is the one that lies with the model, unless another file
    is named. Raises ConfigError if one of them is missing or they do not belong together.
    """
    graph, params, config = inference.load_model(path, step=step)
    own = Tokenizer(str(tokenizer or inference.find_tokenizer(path, step)))
    own.check_model(config)
    return Model(graph, params, config, own)


def generate(model: Model, prompts: Sequence[str], max_new_tokens: int = 64, **settings) -> list[str]:
    """Continue each prompt and return the new text only, as in `generate(model, ["In the morning"], temperature=0.7)`.

    `settings` are those of inference.generate.generate: temperature, top_k, top_p, seed, dtype. Raises ConfigError for
    settings out of range.
    """
    return inference.continue_texts(
        model.graph, model.params, model.config, model.tokenizer, prompts, max_new_tokens, **settings
    )
