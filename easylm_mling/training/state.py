"""The training state: its arrays, how a run's first one is made, and its shapes and shardings without memory for it."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from easylm_mling.config import ModelConfig, RunConfig
from easylm_mling.model.decoder import Gemma
from easylm_mling.model.sharding import batch_sharding, parameter_shardings, replicated
from easylm_mling.training.optimizer import make_optimizer
from easylm_mling.training.spike_guard import Recent, nothing_recent


class TrainState(NamedTuple):
    """Arrays; or, in the same places, their shapes or their shardings."""

    step: Any  # int32: batches consumed
    params: dict  # float32, as in the parameter table
    optimizer: Any  # optax state; moments are float32
    skipped: Any  # int32: steps that changed nothing (training/spike_guard.py)
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
    """The state of a run that begins with `params`: zero moments and counters."""
    tx = make_optimizer(config.optimizer, config.model)
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, params, tx.init(params), zero, zero, zero, nothing_recent())


def state_shardings(config: RunConfig, mesh: Mesh) -> TrainState:
    """A TrainState of NamedSharding: moments lie with their parameter, scalars on every device."""
    params = parameter_shardings(config.model, mesh)
    abstract = jax.eval_shape(partial(init_state, config=config), abstract_params(config.model, mesh))
    whole = replicated(mesh)
    optimizer = optax.tree.map_params(
        make_optimizer(config.optimizer, config.model),
        lambda _, s: s,
        abstract.optimizer,
        params,
        transform_non_params=lambda _: whole,
    )
    return TrainState(whole, params, optimizer, whole, whole, whole, Recent(whole, whole, whole))


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
