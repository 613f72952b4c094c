"""Look up tokens in an embedding that is sharded along both of its axes.

Axis letters: B rows, T positions, V vocabulary, D embed.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from easylm_mling.model.sharding import BATCH_AXES


def lookup(table: Float[Array, "V D"], tokens: Int32[Array, "B T"], dtype: DTypeLike) -> Float[Array, "B T D"]:
    """Look up the rows of `table` for `tokens`, in `dtype`.

    Left to XLA, every device would gather the whole table and sum its whole gradient with all others: 1.6 GB each way
    for Gemma 7B, in bfloat16. Here each device looks up the tokens of its whole fsdp group in its own columns, and the
    group exchanges the results (50 MB). The gradient is summed in the table's dtype where the columns lie.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return table[tokens].astype(dtype)

    def on_each_device(table, tokens):
        tokens = jax.lax.all_gather(tokens, "fsdp", axis=0, tiled=True)
        if mesh.shape["tensor"] > 1:
            tokens = tokens - table.shape[0] * jax.lax.axis_index("tensor")
            inside = (tokens >= 0) & (tokens < table.shape[0])
            rows = jnp.where(inside[..., None], table[jnp.where(inside, tokens, 0)], 0).astype(dtype)
            rows = jax.lax.psum(rows, "tensor")
        else:
            rows = table[tokens].astype(dtype)
        return jax.lax.all_to_all(rows, "fsdp", split_axis=0, concat_axis=2, tiled=True)

    specs = (PartitionSpec("tensor", "fsdp"), PartitionSpec(BATCH_AXES, None))
    out = PartitionSpec(BATCH_AXES, None, None)
    return jax.shard_map(on_each_device, in_specs=specs, out_specs=out, check_vma=False)(table, tokens)
