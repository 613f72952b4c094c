"""Log-probabilities of tokens by the training forward pass, several short sequences to a row.

Axis letters: B rows, T positions, Q queries of a row, C queries at a time, D embed, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from easylm_mling.config import LoraConfig, ModelConfig
from easylm_mling.evaluation.scoring.packing import Batch, Row, arrays
from easylm_mling.evaluation.scoring.tree_attention import branches, tree_attention
from easylm_mling.model.decoder import ForwardOptions, logits
from easylm_mling.model.lora import Adapters
from easylm_mling.model.params import ADAPTERS, looked_up_only, parameter_count
from easylm_mling.model.precision import products_in
from easylm_mling.model.remat import Remat
from easylm_mling.model.sharding import batch_sharding, constrain
from easylm_mling.model.splash_attention import runs_on, splash_attention

_QUERIES_AT_ONCE = 256  # of a device: their float32 logits are 268 MB for Gemma's vocabulary
_SPLASH_BLOCK = 512
_PAIR = 1000  # parameters whose products take as long as one query and key of one head: by measurement


@dataclass(frozen=True)
class Scorer:
    """A model that scores batches. `params`, sharded over `mesh`, are float32, or those of a run with adapters (`lora`)."""

    graph: nnx.GraphDef
    params: dict
    model: ModelConfig
    mesh: Mesh
    dtype: str = "bfloat16"
    lora: LoraConfig | None = None

    @property
    def knee(self) -> float:
        """The width of a row, in tokens, at which attention costs as much as all other products."""
        m = self.model
        products = parameter_count(m) - looked_up_only(m) - m.vocab_size * m.hidden_size  # without the head
        return products / (m.num_hidden_layers * m.num_attention_heads * _PAIR)

    @property
    def shards(self) -> int:
        """The number of rows of a batch must be a multiple of this."""
        return self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    def score(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """Return for each query its log-probability, float32 [B, Q], and whether its token is the likeliest, bool [B, Q].

        Collective: every process gives the same batch, and has the whole result.
        """
        B, T = batch.tokens.shape
        chunk = max(1, _QUERIES_AT_ONCE * self.shards // B)
        with jax.set_mesh(self.mesh), products_in(self.dtype):
            placed = [_placed(x, batch_sharding(self.mesh)) for x in batch[:5]]
            scores = _score(
                self.params,
                *placed,
                graph=self.graph,
                dtype=jnp.dtype(self.dtype),
                lora=self.lora,
                attend=_attention_for(self.model, self.mesh, T, branches(batch.ends)),
                chunk=1 << (chunk.bit_length() - 1),
            )
        return np.asarray(scores[0]), np.asarray(scores[1])

    def answers(self, rows: Sequence[Row]) -> dict[int, tuple[float, bool]]:
        """Return (log-likelihood in nats, whether greedy decoding would write it) by the number of each window in `rows`.

        All rows have one width. Collective.
        """
        batch = arrays(rows)
        likelihood, likeliest = self.score(batch)
        sums: dict[int, tuple[float, bool]] = {}
        for b, owners in enumerate(batch.owners):
            for q, window in enumerate(owners):
                before, greedy = sums.get(window, (0.0, True))
                sums[window] = before + float(likelihood[b, q]), greedy and bool(likeliest[b, q])
        return sums


def _placed(x: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """Lay an array that every process has whole out over the devices of all."""
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def _attention_for(model: ModelConfig, mesh: Mesh, positions: int, branching: bool) -> Callable:
    on_tpu = mesh.devices.flat[0].platform == "tpu"
    if on_tpu and not branching and runs_on(positions, model.head_dim):
        return _splash
    return tree_attention


def _splash(q, k, v, ends, positions, window, soft_cap):
    # Where nothing branches all tokens of a sequence end at one place, which no other sequence does.
    return splash_attention(q, k, v, ends, window, soft_cap, block=_SPLASH_BLOCK)


@partial(jax.jit, static_argnames=("graph", "dtype", "lora", "attend", "chunk"))
def _score(params, tokens, positions, ends, places, targets, *, graph, dtype, lora, attend, chunk: int):
    """Return (log-probability [B, Q] float32, likeliest [B, Q] bool) of `targets` [B, Q] after `places` [B, Q]."""
    model = nnx.merge(graph, {name: tree for name, tree in params.items() if name != ADAPTERS})
    adapters = Adapters(lora, params[ADAPTERS]) if lora else None
    cap = model.config.attn_logit_softcapping

    def reach(q, k, v, window, cache):
        return attend(q, k, v, ends, positions, window, cap), cache, (k, v)

    hidden, _ = model.run(tokens, positions, reach, None, ForwardOptions(dtype, Remat("none")), adapters)
    hidden = jnp.take_along_axis(hidden, places[..., None], axis=1)
    # Gathered once, and not for every chunk.
    head = constrain(model.head.astype(dtype), "vocab", "activation_embed")
    B, Q, D = hidden.shape
    size = min(chunk, Q)

    def part(args):
        h, wanted = args  # [B, C, D], [B, C]
        scores = constrain(logits(h, head, model.config.final_logit_softcapping), "batch", "position", "vocab")
        hit = jnp.arange(scores.shape[-1]) == wanted[..., None]
        of_target = jnp.sum(jnp.where(hit, scores, 0.0), axis=-1)
        return of_target - jax.nn.logsumexp(scores, axis=-1), jnp.argmax(scores, axis=-1) == wanted

    # Q is a power of two, and so is the size.
    parts = (
        jnp.moveaxis(hidden.reshape(B, Q // size, size, D), 1, 0),
        jnp.moveaxis(targets.reshape(B, Q // size, size), 1, 0),
    )
    likelihood, likeliest = jax.lax.map(part, parts)
    whole = [jnp.moveaxis(x, 0, 1).reshape(B, Q) for x in (likelihood, likeliest)]
    # Every process reads all of it.
    return jax.lax.with_sharding_constraint(whole, PartitionSpec())
