"""Per-layer embeddings: a small vector for each layer and position, of the token and of its embedding.

Axis letters: B batch, T positions, D embed, V vocabulary, L layers, P width of a layer's own input.
Source: transformers `modeling_gemma4.py`, `get_per_layer_inputs` and `project_per_layer_inputs`.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from easylm_mling.config import ModelConfig
from easylm_mling.model.embedding import lookup
from easylm_mling.model.layer import Hidden, Ids, kernel, norm, norm_weight
from easylm_mling.model.projection import project


class PerLayerInputs(nnx.Module):
    """The table of all layers, and the projection of the scaled embeddings."""

    def __init__(self, m: ModelConfig, key: jax.Array):
        table_key, projection_key = jax.random.split(key)
        self.width = nnx.static(m.hidden_size_per_layer_input)
        columns = m.num_hidden_layers * self.width
        self.embed_tokens = kernel(table_key, (m.vocab_size, columns), m)
        self.model_projection = kernel(projection_key, (columns, m.hidden_size), m)
        self.projection_norm = norm_weight(self.width, m)
        self.config = nnx.static(m)

    def __call__(self, tokens: Ids, x: Hidden) -> Float[Array, "L B T P"]:
        """Compute each layer's input from the tokens and their scaled embeddings `x`, in x's dtype."""
        m = self.config
        rows = lookup(self.embed_tokens[...], tokens, x.dtype) * jnp.asarray(self.width**0.5, x.dtype)
        projected = project("btd,ed->bte", x, self.model_projection[...].astype(x.dtype))
        projected = _times(projected, m.hidden_size**-0.5)
        rows, projected = (a.reshape(*a.shape[:2], m.num_hidden_layers, self.width) for a in (rows, projected))
        both = _times(norm(projected, self.projection_norm, m) + rows, 2.0**-0.5)
        return jnp.moveaxis(both, 2, 0)


def _times(x: Float[Array, "*shape"], factor: float) -> Float[Array, "*shape"]:
    """Multiply by a number that is not rounded to x's dtype first, as PyTorch does."""
    return (x.astype(jnp.float32) * factor).astype(x.dtype)
