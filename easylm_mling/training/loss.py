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


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def cross_entropy(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "V D"],
    targets: Int32[Array, "B T"],
    mask: Float32[Array, "B T"],
    chunk: int,
    z_loss: float = 0.0,
    soft_cap: float | None = None,
) -> tuple[Float32[Array, ""], Float32[Array, " B"], Float32[Array, " B"]]:
    """Returns (total, cross entropy, z-loss): sums over positions, which the caller divides by counts.

    Logits are float32, soft-capped as the model's, and computed for `chunk` positions of each row at a time. `z_loss` times the squared log-normaliser (PaLM, section 5) keeps logits from drifting; the two losses stay apart so that
    cross entropies can be compared.

    Only the total can be differentiated, with respect to `hidden` and `head`. The forward pass computes the gradient up to
    the cotangent while it holds a chunk's logits, so no logits are computed twice (as in Liger Kernel, Hsu 2024).
    """
    return _on_mesh(hidden, head, targets, mask, chunk, z_loss, soft_cap, False)[0]


def _forward(hidden, head, targets, mask, chunk, z_loss, soft_cap):
    return _on_mesh(hidden, head, targets, mask, chunk, z_loss, soft_cap, True)


def _backward(chunk, z_loss, soft_cap, gradients, cotangents):
    grad_hidden, grad_head = gradients
    factor = cotangents[0]
    return factor.astype(grad_hidden.dtype) * grad_hidden, factor * grad_head, None, None


cross_entropy.defvjp(_forward, _backward)


def _on_mesh(hidden, head, targets, mask, chunk, z_loss, soft_cap, differentiate: bool):
    """((total, cross entropy, z-loss), (gradient of hidden, of head) if `differentiate`)."""
    assert targets.shape == mask.shape == hidden.shape[:2], (hidden.shape, targets.shape, mask.shape)
    chunk = min(chunk, hidden.shape[1])
    run: Any = partial(_chunks, chunk=chunk, z_loss=z_loss, soft_cap=soft_cap, differentiate=differentiate)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        (entropy, z), gradients = run(hidden, head.astype(hidden.dtype).T, targets, mask, None)
        gradients = gradients and (gradients[0], gradients[1].T.astype(head.dtype))
        return (jnp.sum(entropy) + jnp.sum(z), entropy, z), gradients
    vocabulary = "tensor" if mesh.shape["tensor"] > 1 else None

    def on_each_device(hidden, head, targets, mask):
        # Whole along D before the loop, so that it is gathered once and not once a chunk; its gradient goes the way back.
        whole = jax.lax.all_gather(head.astype(hidden.dtype).T, "fsdp", axis=0, tiled=True)
        sums, gradients = run(hidden, whole, targets, mask, vocabulary)
        if not differentiate:
            return sums, None
        grad_hidden, grad_head = gradients
        grad_head = jax.lax.psum_scatter(grad_head, "fsdp", scatter_dimension=0, tiled=True)
        grad_head = jax.lax.psum(grad_head.T.astype(head.dtype), "data")
        # The layers' backward pass comes after this, so that it does not find the whole head's gradient in memory.
        return sums, jax.lax.optimization_barrier((grad_hidden, grad_head))

    rows, columns = PartitionSpec(BATCH_AXES), PartitionSpec("tensor", "fsdp")
    specs = ((rows, columns, rows, rows), ((rows, rows), (rows, columns) if differentiate else None))
    (entropy, z), gradients = jax.shard_map(on_each_device, in_specs=specs[0], out_specs=specs[1], check_vma=False)(
        hidden, head, targets, mask
    )
    return (jnp.sum(entropy) + jnp.sum(z), entropy, z), gradients


def _chunks(hidden, head, targets, mask, vocabulary: str | None, *, chunk, z_loss, soft_cap, differentiate):
    """Per-row sums, and gradients, on one device. `vocabulary`: the mesh axis that the vocabulary lies along, if any.

    The head is [D, V] here, and so is its gradient: pieces of D, as they come from the devices and go to them, then lie
    one after another in memory. As [V, D] the gradient was copied once more, 1.6 GB for Gemma 7B.
    """
    B, T, D = hidden.shape
    padding = -T % chunk
    hidden, targets, mask = (
        jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2)) for x in (hidden, targets, mask)
    )
    across = (lambda f, x: f(x, vocabulary)) if vocabulary else (lambda f, x: x)
    first = head.shape[1] * jax.lax.axis_index(vocabulary) if vocabulary else 0

    def body(carry, part):
        (entropy, z), grad_head = carry
        h, t, m = part
        scores = jnp.einsum("bcd,dv->bcv", h, head, preferred_element_type=jnp.float32)
        scores = capped(scores, soft_cap)
        top = across(jax.lax.pmax, jnp.max(scores, axis=-1))
        total = across(jax.lax.psum, jnp.sum(jnp.exp(scores - top[..., None]), axis=-1))
        log_normaliser = top + jnp.log(total)
        # By comparison and not by index: a gather in float32 would keep a chunk's logits from being fused away.
        hit = jnp.arange(head.shape[1]) + first == t[..., None]
        score = across(jax.lax.psum, jnp.sum(jnp.where(hit, scores, 0.0), axis=-1))
        entropy += jnp.sum((log_normaliser - score) * m, axis=-1)
        z += z_loss * jnp.sum(jnp.square(log_normaliser) * m, axis=-1)
        if not differentiate:
            return ((entropy, z), grad_head), None
        likely = jnp.exp(scores - log_normaliser[..., None])
        slope = (m * (1.0 + 2.0 * z_loss * log_normaliser))[..., None] * likely - jnp.where(hit, m[..., None], 0.0)
        if soft_cap is not None:
            slope *= 1.0 - jnp.square(scores / soft_cap)
        # Once, and not in the input of each of the two products that follow.
        slope = jax.lax.optimization_barrier(slope.astype(h.dtype))
        grad_head += jnp.einsum("bcd,bcv->dv", h, slope)
        return ((entropy, z), grad_head), across(jax.lax.psum, jnp.einsum("bcv,dv->bcd", slope, head))

    def split(x):
        return jnp.moveaxis(x.reshape(B, (T + padding) // chunk, chunk, *x.shape[2:]), 1, 0)

    zero = jnp.zeros((B,), jnp.float32)
    start = (zero, zero), jnp.zeros_like(head) if differentiate else None
    (sums, grad_head), grad_hidden = jax.lax.scan(body, start, (split(hidden), split(targets), split(mask)))
    if not differentiate:
        return sums, None
    assert grad_hidden is not None
    return sums, (jnp.moveaxis(grad_hidden, 0, 1).reshape(B, T + padding, D)[:, :T], grad_head)
