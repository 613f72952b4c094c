"""The stream of merged tensors: pieces of all models side by side, so that few of them are in memory."""

import math
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from easylm_mling.config import ModelConfig
from easylm_mling.errors import ConfigError
from easylm_mling.hf.exporting import Tensor
from easylm_mling.merge.arithmetic import slerp_factors, weighted_sum, with_deltas
from easylm_mling.merge.recipe import MergeRecipe, parameter_kind
from easylm_mling.merge.sources import Source
from easylm_mling.storage.ahead import ahead

# Values of a block: its float64 copies stay in a core's cache.
_BLOCK = 1 << 16
_WRITTEN = 1 << 20  # values that are yielded at a time


class Merging:
    """A recipe over its opened sources. `model` is the merged model's config, and `first` the source that gives it."""

    def __init__(self, recipe: MergeRecipe, sources: Mapping[tuple, Source], model: ModelConfig):
        self.recipe, self.sources, self.model = recipe, sources, model
        self.first = sources[recipe.sources[0].key]

    def read(self, tensor: Tensor) -> Iterator[np.ndarray]:
        """Yield a merged tensor as flat float32 pieces in order. Every source's tensor is read to its end.

        Raises ConfigError for NaN or infinity, in a source or in the result.
        """
        size = min(_WRITTEN, math.prod(tensor.parameter.hf_shape))
        out, filled = np.empty(size, np.float32), 0
        for block in self._blocks(tensor):
            if not np.isfinite(block).all():
                raise ConfigError(f"the merged tensor {tensor.name} is not finite in float32; use smaller weights")
            if filled + block.size > out.size:
                yield out[:filled]
                out, filled = np.empty(size, np.float32), 0
            out[filled : filled + block.size] = block
            filled += block.size
        yield out[:filled]

    def rounded(self, dtype: np.dtype) -> Callable[[Tensor], Iterator[np.ndarray]]:
        """Return a function that yields as `read` does, rounded to `dtype`: to the nearest, ties to even."""

        def read(tensor: Tensor) -> Iterator[np.ndarray]:
            for values in self.read(tensor):
                with np.errstate(over="ignore"):
                    out = values.astype(dtype)
                if not np.isfinite(out).all():
                    raise ConfigError(f"the merged tensor {tensor.name} is not finite in {dtype.name}; use float32")
                yield out

        return read

    def _blocks(self, tensor: Tensor) -> Iterator[np.ndarray]:
        name, kind = tensor.name, parameter_kind(tensor.parameter)
        streams = {key: _Stream(ahead(source.read(name))) for key, source in self.sources.items()}
        first = streams[self.first.ref.key]
        whole = math.prod(tensor.parameter.hf_shape)
        # Flat, the first rows are the first values.
        common = min(math.prod(s.tensors[name].parameter.hf_shape) for s in self.sources.values())
        if kind == "embedding" and self.recipe.vocabulary == "leave_embedding":
            common = 0
        if self.recipe.kind == "slerp" and common:
            yield from self._slerp(streams, common, self.recipe.models[1].weight_of(kind))
        else:
            weights = self.recipe.coefficients(kind)
            for start in range(0, common, _BLOCK):
                block = {key: s.take(min(_BLOCK, common - start)) for key, s in streams.items()}
                yield self._merged(block, weights)
        for start in range(common, whole, _BLOCK):
            yield first.take(min(_BLOCK, whole - start))
        for stream in streams.values():
            stream.drain()

    def _merged(self, block: dict, weights: list[float]) -> np.ndarray:
        r = self.recipe
        arrays = [block[m.key] for m in r.models]
        if r.base is None:
            return weighted_sum(weights, arrays)
        return with_deltas(block[(r.start or r.base).key], block[r.base.key], weights, arrays)

    def _slerp(self, streams: dict, size: int, t: float) -> Iterator[np.ndarray]:
        """Its factors need the whole tensors, so both are in memory."""
        arrays = {key: stream.take(size) for key, stream in streams.items()}
        a, b = (arrays[m.key] for m in self.recipe.models)
        factors = slerp_factors(t, a, b)
        for start in range(0, size, _BLOCK):
            yield weighted_sum(factors, [a[start : start + _BLOCK], b[start : start + _BLOCK]])


class _Stream:
    """Pieces of any size, taken in other sizes."""

    def __init__(self, pieces: Iterator[np.ndarray]):
        self._pieces, self._piece, self._at = pieces, np.empty(0, np.float32), 0

    def take(self, size: int) -> np.ndarray:
        """Return the next `size` values, flat: a view where one piece has them all."""
        if self._piece.size - self._at >= size:
            self._at += size
            return self._piece[self._at - size : self._at]
        out, filled = np.empty(size, np.float32), 0
        while filled < size:
            if self._at == self._piece.size:
                self._piece, self._at = next(self._pieces), 0
            count = min(size - filled, self._piece.size - self._at)
            out[filled : filled + count] = self._piece[self._at : self._at + count]
            filled, self._at = filled + count, self._at + count
        return out

    def drain(self):
        """Read what is left, for the digest."""
        for _ in self._pieces:
            pass
