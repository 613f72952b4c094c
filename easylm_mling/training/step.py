"""The training step and the evaluation step: pure functions of (state, batch).

Axis letters: A accumulation steps, B rows of a batch, T positions, S sources.

A batch holds `tokens, targets, segment_ids, positions` [B, T] int32, `loss_mask` [B, T] float32 and `source` [B] int32.
Its rows are shares of rows where `mesh.sequence` divides them (model/sequence_shares.py).
Every sum travels with its count and is divided once, globally, so a step's result does not depend on how rows are
spread over devices, microbatches or sources.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float32

from easylm_mling.config import LoraConfig, RunConfig, TrainConfig
from easylm_mling.errors import check
from easylm_mling.model.attention import attention as plain_attention
from easylm_mling.model.attention import cudnn_attention, cudnn_widest_head
from easylm_mling.model.decoder import ForwardOptions
from easylm_mling.model.layer_kinds import layer_kinds
from easylm_mling.model.lora import Adapters, dropout_key
from easylm_mling.model.params import ADAPTERS, parameter_table, to_flat, to_nested
from easylm_mling.model.precision import products_in
from easylm_mling.model.remat import Remat
from easylm_mling.model.sequence_shares import attention_over_shares, share_attention
from easylm_mling.model.sharding import batch_sharding, replicated
from easylm_mling.model.splash_attention import runs_on, splash_attention, splash_from
from easylm_mling.training.ema import averaged
from easylm_mling.training.loss import cross_entropy, entropy_and_chance
from easylm_mling.training.optimizer import clip_by_global_norm, make_optimizer, make_schedule
from easylm_mling.training.spike_guard import ACCEPTED, SPIKE, judge
from easylm_mling.training.state import (
    TrainState,
    model_graph,
    state_shardings,
    trained_shardings,
    weights_shardings,
)
from easylm_mling.training.xla_flags import compiler_flags

SourceSums = tuple[Float32[Array, " S"], ...]


@dataclass(frozen=True)
class StepConfig:
    """The static part of a step: what its program is compiled for."""

    graph: nnx.GraphDef
    train: TrainConfig
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    clip_norm: float
    sources: int  # how many losses are summed apart: `source` in a batch counts up to it
    attention: Callable  # as model/attention.py's
    frozen: frozenset[str]  # paths of parameters that are not trained
    lora: LoraConfig | None = None

    @property
    def forward(self) -> ForwardOptions:
        t = self.train
        remat = Remat(t.remat, t.remat_first, t.remat_first_layers, t.offload)
        return ForwardOptions(jnp.dtype(t.compute_dtype), remat, self.attention, t.float32_reduction, t.products)


def step_config(config: RunConfig, mesh: Mesh) -> StepConfig:
    """The static part of this run's steps on `mesh`. Raises ConfigError if its attention cannot run there."""
    return StepConfig(
        graph=model_graph(config.model),
        train=config.train,
        optimizer=make_optimizer(config.optimizer, config.model, config.lora),
        schedule=make_schedule(config.optimizer, config.total_steps, config.step_tokens),
        clip_norm=config.optimizer.clip_norm,
        sources=len(config.data.sources),
        attention=attention_on(config, mesh),
        frozen=frozen(config),
        lora=config.lora,
    )


def frozen(config: RunConfig) -> frozenset[str]:
    """The paths of parameters that are not trained: the layers' scalars, unless `train.layer_scalars` is set."""
    scalars = {p.path for p in parameter_table(config.model) if p.kind == "scalar"}
    return frozenset() if config.train.layer_scalars else frozenset(scalars)


def batch_loss(
    weights: dict, batch: dict, c: StepConfig, dropout: jax.Array | None = None
) -> tuple[Float32[Array, ""], SourceSums]:
    """The sum to differentiate, and (cross entropy, target count) summed for each source.

    `weights` are TrainState's, and `dropout` is the key of the adapters' dropout: None for none.
    """
    model, hidden = _forward(weights, batch, c, dropout)
    cap, frozen_head = model.config.final_logit_softcapping, c.lora is not None
    total, entropy, _ = cross_entropy(  # pyright: ignore[reportGeneralTypeIssues]
        hidden, model.head, batch["targets"], batch["loss_mask"], c.train.loss_chunk, c.train.z_loss, cap, frozen_head
    )
    return total, _by_source(batch, c, entropy, jnp.sum(batch["loss_mask"], axis=-1))


def _forward(weights: dict, batch: dict, c: StepConfig, dropout: jax.Array | None):
    """The model, and its last hidden states [B, T, D]."""
    base = {name: tree for name, tree in weights.items() if name != ADAPTERS}
    held = {path: jax.lax.stop_gradient(a) if path in c.frozen else a for path, a in to_flat(base).items()}
    model = nnx.merge(c.graph, to_nested(held))
    adapters = Adapters(c.lora, weights[ADAPTERS], dropout) if c.lora else None
    return model, model(batch["tokens"], batch["positions"], batch["segment_ids"], c.forward, adapters)


def _by_source(batch: dict, c: StepConfig, *of_rows: Float32[Array, " B"]) -> tuple[Float32[Array, " S"], ...]:
    by_source = partial(jax.ops.segment_sum, segment_ids=batch["source"], num_segments=c.sources)
    return tuple(map(by_source, of_rows))


def train_step(state: TrainState, batch: dict, *, c: StepConfig) -> tuple[TrainState, dict]:
    """One update. Returns the new state and metrics: `loss_sum` and `loss_count` [S], the guard's `limits` [2], and scalars.

    The batch is cut into `accumulation_steps` microbatches. A step that the guard rejects leaves parameters and moments
    untouched (chosen by `where`: a product with zero would keep the NaN) and is counted.
    """
    A = c.train.accumulation_steps
    # Microbatch a takes every A-th row, so that each device works on the rows it already holds.
    microbatches = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(x.shape[0] // A, A, *x.shape[1:]), 1, 0), batch)

    def accumulate(carry, numbered):
        number, microbatch = numbered
        key = dropout_key(c.train.seed, state.step, number) if c.lora and c.lora.dropout else None
        loss = lambda params: batch_loss({**state.frozen, **params}, microbatch, c, key)  # noqa: E731
        (_, sums), gradient = jax.value_and_grad(loss, has_aux=True)(state.params)
        return jax.tree.map(jnp.add, carry, (gradient, sums)), None

    nothing = (jax.tree.map(jnp.zeros_like, state.params), (jnp.zeros((c.sources,)), jnp.zeros((c.sources,))))
    with products_in(c.train.compute_dtype):
        (gradient, (loss_sum, loss_count)), _ = jax.lax.scan(accumulate, nothing, (jnp.arange(A), microbatches))

    total = jnp.maximum(jnp.sum(loss_count), 1.0)
    gradient, norm = clip_by_global_norm(jax.tree.map(lambda g: g / total, gradient), c.clip_norm)
    rate = c.schedule(state.step)
    direction, optimizer = c.optimizer.update(gradient, state.optimizer, state.params)
    params = jax.tree.map(lambda p, d: p - rate * d, state.params, direction)

    verdict, limits, recent = judge(state.recent, jnp.sum(loss_sum) / total, norm, c.train.spike_sigmas)
    accepted = verdict == ACCEPTED
    keep = lambda new, old: jnp.where(accepted, new, old)  # noqa: E731
    params = jax.tree.map(keep, params, state.params)
    new_state = TrainState(
        step=state.step + 1,
        params=params,
        optimizer=jax.tree.map(keep, optimizer, state.optimizer),
        skipped=state.skipped + jnp.where(accepted, 0, 1),
        skipped_in_a_row=jnp.where(accepted, 0, state.skipped_in_a_row + 1),
        spikes=state.spikes + (verdict == SPIKE),
        recent=recent,
        frozen=state.frozen,
        average=averaged(state.average, params, state.step + 1, c.train.ema) if c.train.ema else {},
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


def eval_step(weights: dict, batch: dict, *, c: StepConfig) -> SourceSums:
    """(cross entropy, target count) summed for each source.

    With `ends`, float32 [B, T], in the batch also (probability of the targets there, their count).
    """
    with products_in(c.train.compute_dtype):
        if "ends" not in batch:
            return batch_loss(weights, batch, c)[1]
        model, hidden = _forward(weights, batch, c, None)
        mask, ends, cap = batch["loss_mask"], batch["ends"], model.config.final_logit_softcapping
        entropy, chance = entropy_and_chance(hidden, model.head, batch["targets"], mask, ends, c.train.loss_chunk, cap)
        return _by_source(batch, c, entropy, jnp.sum(mask, axis=-1), chance, jnp.sum(ends, axis=-1))


def attention_on(config: RunConfig, mesh: Mesh) -> Callable:
    """The attention function that `train.attention` means on `mesh`. Raises ConfigError if it cannot run there."""
    m, train, T, shares = config.model, config.train, config.data.sequence_length, config.mesh.sequence
    platform, wanted = mesh.devices.flat[0].platform, train.attention
    widths = {kind.head_dim for kind in layer_kinds(m)}
    here = f"here are {platform} devices, data.sequence_length={T}, heads {' and '.join(map(str, sorted(widths)))} wide"
    if wanted == "cudnn":
        check(
            shares == 1,
            f"train.attention=cudnn takes whole rows, which mesh.sequence={shares} divides; use auto or xla",
        )
        check(
            platform == "gpu" and m.attn_logit_softcapping is None and train.compute_dtype == "bfloat16",
            f"train.attention=cudnn runs on GPUs, in bfloat16 and without a soft cap of scores; {here} and "
            f"train.compute_dtype={train.compute_dtype}; use auto or xla",
        )
        capability = mesh.devices.flat[0].compute_capability
        widest = cudnn_widest_head(capability)
        check(
            max(widths) <= widest and not any(width % 8 for width in widths),
            f"train.attention=cudnn takes heads of a multiple of 8, at most {widest} wide at compute capability {capability}; "
            f"{here}; use auto or xla",
        )
        return cudnn_attention
    unit = T // (2 * shares) if shares > 1 else T  # positions that follow one another on a device
    possible = platform == "tpu" and all(runs_on(unit, width) for width in widths)
    in_chunks = f", in chunks of {unit} by mesh.sequence={shares}" if shares > 1 else ""
    check(
        possible or wanted != "splash",
        f"train.attention=splash runs on TPUs, with sequences and heads of a multiple of 128; {here}{in_chunks}; use auto or "
        "xla",
    )
    splash = possible and wanted != "xla"
    if shares > 1:
        attend, tile = partial(share_attention, count=shares), 1
        if splash:
            attend, tile = (
                partial(splash_from, count=shares, block=train.attention_block),
                min(train.attention_block, unit),
            )
        return partial(attention_over_shares, count=shares, attend=attend, tile=tile)
    return partial(splash_attention, block=train.attention_block) if splash else plain_attention


def jit_train_step(config: RunConfig, mesh: Mesh):
    """`train_step` compiled for `mesh`; the state is donated and stays sharded as it came."""
    shardings, whole = state_shardings(config, mesh), replicated(mesh)
    step = partial(train_step, c=step_config(config, mesh))
    return jax.jit(
        step,
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(shardings, whole),
        donate_argnums=0,
        compiler_options=compiler_flags(mesh.devices.flat[0].device_kind, config.train.compiler_flags),
    )


def jit_eval_step(config: RunConfig, mesh: Mesh, groups: int = 0):
    """`eval_step` compiled for `mesh`; with `groups`, `source` in its batches says which of so many a row belongs to."""
    # As what is exported will be used: without products of 8 bits.
    c = step_config(replace(config, train=replace(config.train, products=None)), mesh)
    step = partial(eval_step, c=replace(c, sources=groups) if groups else c)
    where = (weights_shardings(config, mesh), batch_sharding(mesh))
    return jax.jit(step, in_shardings=where, out_shardings=replicated(mesh))


def jit_parameter_norm(config: RunConfig, mesh: Mesh):
    """The global norm of what is trained, float32: apart from the step, as it is wanted of logged steps only."""
    return jax.jit(optax.tree.norm, in_shardings=(trained_shardings(config, mesh),), out_shardings=replicated(mesh))
