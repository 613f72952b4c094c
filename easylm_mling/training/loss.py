"""Cross entropy through the output head in chunks of positions: no [B, T, V] array exists, forward or backward.

Axis letters: B batch, T positions, C chunk of positions, D embed, V vocabulary.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Float32, Int32

from easylm_mling.model.attention import capped
from easylm_mling.model.sharding import BATCH_AXES
from easylm_mling.training.head_shards import ALONE, HeadShards

# What is differentiated: a head that is not trained needs no gradient, and so none is computed.
NOTHING, HIDDEN, BOTH = range(3)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7))
def cross_entropy(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "V D"],
    targets: Int32[Array, "B T"],
    mask: Float32[Array, "B T"],
    chunk: int,
    z_loss: float = 0.0,
    soft_cap: float | None = None,
    frozen_head: bool = False,
) -> tuple[Float32[Array, ""], Float32[Array, " B"], Float32[Array, " B"]]:
    """Returns (total, cross entropy, z-loss): sums over positions, which the caller divides by counts.

    Logits are float32, soft-capped as the model's, and computed for `chunk` positions of each row at a time. `z_loss`
    times the squared log-normaliser (PaLM, section 5) keeps logits from drifting; the two losses stay apart so that cross
    entropies can be compared.

    Only the total can be differentiated, with respect to `hidden` and, unless `frozen_head`, `head`. The forward pass computes the gradient up to
    the cotangent while it holds a chunk's logits, so no logits are computed twice (as in Liger Kernel, Hsu 2024). All sums
    over chunks and devices are float32, whatever the dtype of `hidden`.
    """
    return _on_mesh(hidden, head, targets, mask, chunk, z_loss, soft_cap, NOTHING)[0]


def entropy_and_chance(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "V D"],
    targets: Int32[Array, "B T"],
    mask: Float32[Array, "B T"],
    chosen: Float32[Array, "B T"],
    chunk: int,
    soft_cap: float | None = None,
) -> tuple[Float32[Array, " B"], Float32[Array, " B"]]:
    """Returns the cross entropy as `cross_entropy` does, and the probabilities of the targets, summed where `chosen` is 1.

    From the same logits. Neither can be differentiated.
    """
    (_, entropy, _, chance), _ = _on_mesh(hidden, head, targets, mask, chunk, 0.0, soft_cap, NOTHING, chosen)
    return entropy, chance


def _forward(hidden, head, targets, mask, chunk, z_loss, soft_cap, frozen_head):
    return _on_mesh(hidden, head, targets, mask, chunk, z_loss, soft_cap, HIDDEN if frozen_head else BOTH)


def _backward(chunk, z_loss, soft_cap, frozen_head, gradients, cotangents):
    grad_hidden, grad_head = gradients
    factor = cotangents[0]
    return factor.astype(grad_hidden.dtype) * grad_hidden, None if frozen_head else factor * grad_head, None, None


cross_entropy.defvjp(_forward, _backward)


def _on_mesh(hidden, head, targets, mask, chunk, z_loss, soft_cap, differentiate: int, chosen=None):
    """((total, cross entropy, z-loss), (gradient of hidden, of head) as far as `differentiate` says, else None).

    With `chosen` the sums end with the chance of the targets there.
    """
    assert targets.shape == mask.shape == hidden.shape[:2], (hidden.shape, targets.shape, mask.shape)
    B, T, _ = hidden.shape
    run: Any = partial(_chunks, chunk=min(chunk, T), z_loss=z_loss, soft_cap=soft_cap, differentiate=differentiate)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        (entropy, z, *chance), gradients = run(hidden, head.astype(hidden.dtype).T, targets, mask, chosen, ALONE)
        if differentiate == BOTH:
            gradients = gradients[0], gradients[1].T.astype(head.dtype)
        return (jnp.sum(entropy) + jnp.sum(z), entropy, z, *chance), gradients
    rows_here = B // (mesh.shape["data"] * mesh.shape["fsdp"])
    shards = HeadShards.on(mesh, rows_here * T, head.shape[0])

    def on_each_device(hidden, head, targets, mask, chosen):
        # Before the loop, so that the head is gathered once and not once a chunk; its gradient goes the way back.
        part = shards.gather_head(head.astype(hidden.dtype).T)
        sums, gradients = run(hidden, part, targets, mask, chosen, shards)
        if not differentiate:
            return sums, None
        if differentiate == HIDDEN:
            return sums, gradients
        grad_hidden, grad_head = gradients
        grad_head = jax.lax.psum(shards.scatter_head_gradient(grad_head).T.astype(head.dtype), "data")
        # The layers' backward pass comes after this, so that it does not find the head's gradient in memory.
        return sums, jax.lax.optimization_barrier((grad_hidden, grad_head))

    rows, columns = PartitionSpec(BATCH_AXES), PartitionSpec("tensor", "fsdp")
    of_gradients = {NOTHING: None, HIDDEN: (rows, None), BOTH: (rows, columns)}[differentiate]
    specs = ((rows, columns, rows, rows, rows), (rows, of_gradients))
    (entropy, z, *chance), gradients = jax.shard_map(
        on_each_device, in_specs=specs[0], out_specs=specs[1], check_vma=False
    )(hidden, head, targets, mask, chosen)
    return (jnp.sum(entropy) + jnp.sum(z), entropy, z, *chance), gradients


def _chunks(hidden, head, targets, mask, chosen, shards: HeadShards, *, chunk, z_loss, soft_cap, differentiate):
    """Sums [B], and gradients, of a device's rows; `head` is this device's part of the vocabulary.

    The head is [D, V] here, and so is its gradient: pieces of D, as they come from the devices and go to them, then lie
    one after another in memory. The gradient is added up over the chunks in float32: in bfloat16 its error was 0.5 % after
    64 of them, and 2.5 % after 256 (tests/test_head_shards.py measures it).
    """
    B, T, D = hidden.shape
    padding = -T % chunk
    hidden, targets, mask, chosen = jax.tree.map(
        lambda x: jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2)), (hidden, targets, mask, chosen)
    )
    targets, mask, chosen = jax.tree.map(shards.gather_rows, (targets, mask, chosen))
    tokens = jnp.arange(head.shape[1]) + shards.first_token(head.shape[1])

    def body(carry, part):
        (entropy, z, *chance), grad_head = carry
        h, t, m, e = part
        h = shards.gather_rows(h)
        scores = jnp.einsum("bcd,dv->bcv", h, head, preferred_element_type=jnp.float32)
        scores = capped(scores, soft_cap)
        # By comparison and not by index: a gather in float32 would keep a chunk's logits from being fused away.
        hit = tokens == t[..., None]
        parts = jnp.stack([jax.nn.logsumexp(scores, axis=-1), jnp.sum(jnp.where(hit, scores, 0.0), axis=-1)], axis=-1)
        parts = shards.gather_parts(parts)
        log_normaliser, score = jax.nn.logsumexp(parts[..., 0], axis=0), jnp.sum(parts[..., 1], axis=0)
        entropy += jnp.sum((log_normaliser - score) * m, axis=-1)
        z += z_loss * jnp.sum(jnp.square(log_normaliser) * m, axis=-1)
        chance = [c + jnp.sum(jnp.exp(score - log_normaliser) * e, axis=-1) for c in chance]
        if not differentiate:
            return ((entropy, z, *chance), grad_head), None
        likely = jnp.exp(scores - log_normaliser[..., None])
        slope = (m * (1.0 + 2.0 * z_loss * log_normaliser))[..., None] * likely - jnp.where(hit, m[..., None], 0.0)
        if soft_cap is not None:
            slope *= 1.0 - jnp.square(scores / soft_cap)
        # Once, and not in the input of each of the two products that follow.
        slope = jax.lax.optimization_barrier(slope.astype(h.dtype))
        if differentiate == BOTH:
            grad_head += jnp.einsum("bcd,bcv->dv", h, slope, preferred_element_type=jnp.float32)
        grad_hidden = jnp.einsum("bcv,dv->bcd", slope, head, preferred_element_type=jnp.float32)
        return ((entropy, z, *chance), grad_head), shards.sum_own_rows(grad_hidden).astype(h.dtype)

    def split(x):
        return jnp.moveaxis(x.reshape(x.shape[0], (T + padding) // chunk, chunk, *x.shape[2:]), 1, 0)

    zero = jnp.zeros((targets.shape[0],), jnp.float32)
    nothing = (zero, zero) if chosen is None else (zero, zero, zero)
    start = nothing, jnp.zeros(head.shape, jnp.float32) if differentiate == BOTH else None
    (sums, grad_head), grad_hidden = jax.lax.scan(body, start, jax.tree.map(split, (hidden, targets, mask, chosen)))
    sums = tuple(shards.own_rows(s) for s in sums)
    if not differentiate:
        return sums, None
    assert grad_hidden is not None
    if grad_head is not None:
        # XLA for CPUs would put the transposition that follows into the product of a single chunk, and then has no code for it.
        grad_head = jax.lax.optimization_barrier(grad_head)
    return sums, (jnp.moveaxis(grad_hidden, 0, 1).reshape(B, T + padding, D)[:, :T], grad_head)
