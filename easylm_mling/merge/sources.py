"""The models that are merged: each is read once, tensor by tensor, as float32 pieces, and its digest is taken on the way."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from easylm_mling.checkpoint.layout import step_directory
from easylm_mling.checkpoint.reading import load_info, stored_model
from easylm_mling.config import ModelConfig
from easylm_mling.data.tokenization.files import check_inside
from easylm_mling.data.tokenization.tokenizer import shipped_fingerprints
from easylm_mling.errors import ConfigError
from easylm_mling.hf.config import model_config_from_hf
from easylm_mling.hf.exporting import Tensor, open_parameters, plan_shards
from easylm_mling.hf.hub import local_directory
from easylm_mling.hf.importing import open_weights, tensor_pieces
from easylm_mling.hf.tokenizer import own_tokenizer
from easylm_mling.merge.recipe import ModelRef
from easylm_mling.storage.object_store import is_bucket, small_files


@dataclass
class Source:
    """An opened model. Every tensor is read once, in whole; then `digest` says what was read."""

    ref: ModelRef
    model: ModelConfig
    tokenizer: Path  # the folder of its tokenizer's files, which may be empty
    on_hub: bool
    info: dict  # of a checkpoint; {} for a Hugging Face directory
    step: int | None  # of a checkpoint
    pieces: Callable[[Tensor], Iterator[np.ndarray]]
    tensors: dict[str, Tensor] = field(init=False)
    _digests: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        (group,) = plan_shards(self.model, 4, math.inf).values()
        self.tensors = {t.name: t for t in group}

    @property
    def shown(self) -> str:
        """Its name in a card, where the folders of this machine stay out."""
        name = self.ref.model if self.on_hub else Path(self.ref.model).name
        if self.step is not None and "source" not in self.info:
            return f"{name}, step {self.step:,}"
        return f"{name} at {self.ref.revision}" if self.ref.revision else name

    @property
    def digest(self) -> str:
        """BLAKE2b of the float32 values of all tensors by name: an import's is that of the model it was made from."""
        assert self._digests.keys() == self.tensors.keys(), "not everything has been read"
        text = "".join(f"{name} {self._digests[name]}\n" for name in sorted(self._digests))
        return blake2b(text.encode(), digest_size=16).hexdigest()

    def read(self, name: str) -> Iterator[np.ndarray]:
        """Yield a tensor's values as flat float32 pieces in order. Raises ConfigError for NaN or infinity."""
        digest = blake2b(digest_size=16)
        for values in self.pieces(self.tensors[name]):
            if not np.isfinite(values).all():
                raise ConfigError(f"{self.ref.text}: tensor {name} holds NaN or infinity; merge whole weights")
            digest.update(values.view(np.uint8).data)
            yield values
        self._digests[name] = digest.hexdigest()


def open_source(ref: ModelRef) -> Source:
    """Open a model; its names, shapes and dtypes are checked, and no weight is read.

    Raises ConfigError for what is no model here, a step that is missing, and files that are not those of their config.
    """
    local = Path(ref.model)
    if is_bucket(ref.model) or (local / "checkpoints").is_dir():
        return _open_checkpoint(ref)
    if ref.step is not None:
        raise ConfigError(f"{ref.text}: a step belongs to a run, and {ref.model} holds no checkpoints")
    if local.is_dir() and not (local / "config.json").is_file():
        kind = (
            "a PEFT adapter; import it with `import-hf ADAPTER DIR --base`, and name DIR"
            if (local / "adapter_config.json").is_file()
            else ""
        )
        raise ConfigError(f"{ref.model}: {kind or 'holds neither checkpoints nor a config.json, so it is no model'}")
    directory = local_directory(ref.model, ref.revision)
    model = model_config_from_hf(directory)
    pieces = _hf_pieces(open_weights(directory, model))
    return Source(ref, model, directory, directory != local, {}, None, pieces)


def _open_checkpoint(ref: ModelRef) -> Source:
    if ref.revision is not None:
        raise ConfigError(f"{ref.text}: a run has steps and no revision; write {ref.model}@STEP")
    where = step_directory(ref.model, ref.step)
    step = int(where.name)
    info, model = load_info(ref.model, step), stored_model(ref.model, step)
    tokenizer = own_tokenizer(small_files(ref.model), shipped_fingerprints(info))
    check_inside(tokenizer)
    pieces = open_parameters(where, model, np.dtype(np.float32))
    return Source(ref, model, tokenizer, False, info, step, pieces)


def _hf_pieces(weights: dict[str, Any]) -> Callable[[Tensor], Iterator[np.ndarray]]:
    return lambda tensor: tensor_pieces(weights[tensor.name], tensor.parameter.hf_shape)
