"""The training step and the evaluation step: pure functions of (state, batch).

Axis letters: A accumulation steps, B rows of a batch, T positions, S sources.

A batch holds `tokens, targets, segment_ids, positions` [B, T] int32, `loss_mask` [B, T] float32 and `source` [B] int32.
Every sum travels with its count and is divided once, globally, so a step's result does not depend on how rows are
spread over devices, microbatches or sources.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from easylm_mling.config import ModelConfig, RunConfig, TrainConfig
from easylm_mling.errors import check
from easylm_mling.model.attention import attention as plain_attention
from easylm_mling.model.attention import cudnn_attention
from easylm_mling.model.decoder import Gemma, Remat
from easylm_mling.model.sharding import batch_sharding, parameter_shardings, replicated
from easylm_mling.model.splash_attention import runs_on, splash_attention
from easylm_mling.training.loss import cross_entropy
from easylm_mling.training.optimizer import clip_by_global_norm, decay_mask, make_optimizer, make_schedule
from easylm_mling.training.spike_guard import ACCEPTED, SPIKE, Recent, judge, nothing_recent
from easylm_mling.training.xla_flags import compiler_flags


class TrainState(NamedTuple):
    """Arrays; or, in the same places, their shapes or their shardings."""

    step: Any  # int32: batches consumed
    params: dict  # float32, as in the parameter table
    optimizer: Any  # optax state; moments are float32
    skipped: Any  # int32: steps that changed nothing, as training/spike_guard.py says
    skipped_in_a_row: Any  # int32
    spikes: Any  # int32: those of them that were finite
    recent: Recent


def model_graph(m: ModelConfig) -> nnx.GraphDef:
    """The model without its parameters: `nnx.merge(model_graph(m), params)` is the model."""
    return nnx.graphdef(jax.eval_shape(partial(Gemma, m), jax.random.key(0)))


def init_params(m: ModelConfig, seed: int) -> dict:
    """Fresh float32 parameters as a nested dict; the same bits on any mesh when jitted with shardings."""
    return nnx.to_pure_dict(nnx.state(Gemma(m, jax.random.key(seed))))


def init_state(params: dict, config: RunConfig) -> TrainState:
    tx = make_optimizer(config.optimizer, decay_mask(config))
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, params, tx.init(params), zero, zero, zero, nothing_recent())


def state_shardings(config: RunConfig, mesh: Mesh) -> TrainState:
    """A TrainState of NamedSharding: moments lie where their parameter lies, scalars on every device."""
    params = parameter_shardings(config.model, mesh)
    abstract = jax.eval_shape(partial(init_state, config=config), abstract_params(config.model, mesh))
    whole = replicated(mesh)
    optimizer = optax.tree.map_params(
        make_optimizer(config.optimizer, decay_mask(config)),
        lambda _, s: s,
        abstract.optimizer,
        params,
        transform_non_params=lambda _: whole,
    )
    return TrainState(whole, params, optimizer, whole, whole, whole, Recent(whole, whole))


def abstract_params(m: ModelConfig, mesh: Mesh) -> dict:
    """Shapes, dtypes and shardings of the parameters, without memory for them."""
    return _placed(jax.eval_shape(partial(init_params, m, 0)), parameter_shardings(m, mesh))


def abstract_state(config: RunConfig, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the training state, without memory for it."""
    shapes = jax.eval_shape(partial(init_state, config=config), abstract_params(config.model, mesh))
    return _placed(shapes, state_shardings(config, mesh))


def _placed(shapes, shardings):
    return jax.tree.map(lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), shapes, shardings)


def abstract_batch(config: RunConfig, mesh: Mesh) -> dict:
    """Shapes, dtypes and shardings of a batch."""
    B, T = config.train.batch_size, config.data.sequence_length
    place = partial(jax.ShapeDtypeStruct, sharding=batch_sharding(mesh))
    batch = {name: place((B, T), jnp.int32) for name in ("tokens", "targets", "segment_ids", "positions")}
    return {**batch, "loss_mask": place((B, T), jnp.float32), "source": place((B,), jnp.int32)}


def batch_loss(params, batch, graph, train: TrainConfig, sources: int, attention: Callable):
    """The sum to differentiate, and (cross entropy, target count) summed for each source, [S] float32 each."""
    model = nnx.merge(graph, params)
    dtype = jnp.dtype(train.compute_dtype)
    remat = Remat(train.remat, train.remat_first, train.remat_first_layers, train.offload)
    hidden = model(batch["tokens"], batch["positions"], batch["segment_ids"], dtype, remat, attention)
    cap = model.config.final_logit_softcapping
    total, entropy, _ = cross_entropy(  # pyright: ignore[reportGeneralTypeIssues]
        hidden, model.head, batch["targets"], batch["loss_mask"], train.loss_chunk, train.z_loss, cap
    )
    by_source = partial(jax.ops.segment_sum, segment_ids=batch["source"], num_segments=sources)
    return total, (by_source(entropy), by_source(jnp.sum(batch["loss_mask"], axis=-1)))


def train_step(
    state: TrainState,
    batch: dict,
    *,
    graph,
    tx,
    schedule,
    train: TrainConfig,
    clip_norm: float,
    sources: int,
    attention: Callable,
):
    """One update. Returns the new state and metrics: `loss_sum` and `loss_count` [S], the guard's `limits` [2], and scalars.

    The batch is cut into `accumulation_steps` microbatches. A step that a guard rejects leaves parameters and moments
    untouched (chosen by `where`: a product with zero would keep the NaN) and is counted.
    """
    A = train.accumulation_steps
    # Microbatch a takes every A-th row, so that each device works on the rows it already holds.
    microbatches = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(x.shape[0] // A, A, *x.shape[1:]), 1, 0), batch)

    def accumulate(carry, microbatch):
        (_, sums), gradient = jax.value_and_grad(batch_loss, has_aux=True)(
            state.params, microbatch, graph, train, sources, attention
        )
        return jax.tree.map(jnp.add, carry, (gradient, sums)), None

    nothing = (jax.tree.map(jnp.zeros_like, state.params), (jnp.zeros((sources,)), jnp.zeros((sources,))))
    (gradient, (loss_sum, loss_count)), _ = jax.lax.scan(accumulate, nothing, microbatches)

    total = jnp.maximum(jnp.sum(loss_count), 1.0)
    gradient, norm = clip_by_global_norm(jax.tree.map(lambda g: g / total, gradient), clip_norm)
    rate = schedule(state.step)
    direction, optimizer = tx.update(gradient, state.optimizer, state.params)
    params = jax.tree.map(lambda p, d: p - rate * d, state.params, direction)

    verdict, limits, recent = judge(state.recent, jnp.sum(loss_sum) / total, norm, train.spike_sigmas)
    accepted = verdict == ACCEPTED
    keep = lambda new, old: jnp.where(accepted, new, old)  # noqa: E731
    new_state = TrainState(
        step=state.step + 1,
        params=jax.tree.map(keep, params, state.params),
        optimizer=jax.tree.map(keep, optimizer, state.optimizer),
        skipped=state.skipped + jnp.where(accepted, 0, 1),
        skipped_in_a_row=jnp.where(accepted, 0, state.skipped_in_a_row + 1),
        spikes=state.spikes + (verdict == SPIKE),
        recent=recent,
    )
    return new_state, {
        "loss_sum": loss_sum,
        "loss_count": loss_count,
        "gradient_norm": norm,
        "learning_rate": rate,
        "skipped": new_state.skipped,
        "skipped_in_a_row": new_state.skipped_in_a_row,
        "spikes": new_state.spikes,
        "verdict": verdict,
        "limits": limits,
    }


def eval_step(params: dict, batch: dict, *, graph, train: TrainConfig, sources: int, attention: Callable):
    """(cross entropy, target count) summed for each source, [S] float32 each."""
    return batch_loss(params, batch, graph, train, sources, attention)[1]


def attention_on(config: RunConfig, mesh: Mesh) -> Callable:
    """What computes attention on `mesh`, as train.attention says. Raises ConfigError if it cannot run there."""
    m, train, T = config.model, config.train, config.data.sequence_length
    platform, wanted = mesh.devices.flat[0].platform, train.attention
    here = f"here are {platform} devices, data.sequence_length={T}, model.head_dim={m.head_dim}"
    if wanted == "cudnn":
        check(
            platform == "gpu" and m.attn_logit_softcapping is None and train.compute_dtype == "bfloat16",
            f"train.attention=cudnn runs on GPUs, in bfloat16 and without a soft cap of scores; {here} and "
            f"train.compute_dtype={train.compute_dtype}; use auto or xla",
        )
        return cudnn_attention
    possible = platform == "tpu" and runs_on(T, m.head_dim)
    check(
        possible or wanted != "splash",
        f"train.attention=splash runs on TPUs, with sequences and heads of a multiple of 128; {here}; use auto or xla",
    )
    if possible and wanted != "xla":
        return partial(splash_attention, local_window=m.sliding_window, block=train.attention_block)
    return plain_attention


def jit_train_step(config: RunConfig, mesh: Mesh):
    """`train_step` compiled for `mesh`; the state is donated and stays sharded as it came."""
    shardings, whole = state_shardings(config, mesh), replicated(mesh)
    step = partial(
        train_step,
        graph=model_graph(config.model),
        tx=make_optimizer(config.optimizer, decay_mask(config)),
        schedule=make_schedule(config),
        train=config.train,
        clip_norm=config.optimizer.clip_norm,
        sources=len(config.data.sources),
        attention=attention_on(config, mesh),
    )
    return jax.jit(
        step,
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(shardings, whole),
        donate_argnums=0,
        compiler_options=compiler_flags(mesh.devices.flat[0].device_kind, config.train.compiler_flags),
    )


def jit_eval_step(config: RunConfig, mesh: Mesh, groups: int = 0):
    """`eval_step` compiled for `mesh`; with `groups`, `source` in its batches says which of so many a row belongs to."""
    step = partial(
        eval_step,
        graph=model_graph(config.model),
        train=config.train,
        sources=groups or len(config.data.sources),
        attention=attention_on(config, mesh),
    )
    where = (parameter_shardings(config.model, mesh), batch_sharding(mesh))
    return jax.jit(step, in_shardings=where, out_shardings=replicated(mesh))


def jit_parameter_norm(config: RunConfig, mesh: Mesh):
    """The global norm of the parameters, float32: apart from the step, as it is wanted of logged steps only."""
    return jax.jit(
        optax.tree.norm, in_shardings=(parameter_shardings(config.model, mesh),), out_shardings=replicated(mesh)
    )
