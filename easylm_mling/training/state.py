"""The training state: its arrays, how a run's first one is made, and its shapes and shardings without memory for it."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from easylm_mling.config import LoraConfig, ModelConfig, RunConfig
from easylm_mling.model.decoder import Gemma
from easylm_mling.model.lora import init_adapters
from easylm_mling.model.params import parameter_table, to_flat, to_nested
from easylm_mling.model.sharding import adapter_shardings, batch_sharding, parameter_shardings, replicated
from easylm_mling.training.optimizer import make_optimizer
from easylm_mling.training.spike_guard import Recent, nothing_recent


class TrainState(NamedTuple):
    """Arrays; or, in the same places, their shapes or their shardings."""

    step: Any  # int32: batches consumed
    params: dict  # what is trained, float32: as in the parameter table, or the adapters
    optimizer: Any  # optax state; moments are float32
    skipped: Any  # int32: steps that changed nothing (training/spike_guard.py)
    skipped_in_a_row: Any  # int32
    spikes: Any  # int32: those of them that were finite
    recent: Recent
    frozen: dict = {}  # the parameters beside adapters, in the compute dtype; no checkpoint holds them
    average: dict = {}  # as params, float32: their running average (training/ema.py); {} without `train.ema`

    @property
    def weights(self) -> dict:
        """All parameters, trained and frozen: what a forward pass takes."""
        return {**self.frozen, **self.params}

    @property
    def averaged_weights(self) -> dict:
        """As `weights`, with the average in the place of what is trained. Only with `train.ema`."""
        assert self.average, "there is no average"
        return {**self.frozen, **self.average}

    @property
    def parts(self) -> dict:
        """The state as the parts that a checkpoint stores. What is frozen lies in another checkpoint."""
        apart = ("params", "average", "frozen")
        training = {name: value for name, value in self._asdict().items() if name not in apart}
        average = {"average": self.average} if self.average else {}
        return {"params": self.params, **average, "training": training}


def model_graph(m: ModelConfig) -> nnx.GraphDef:
    """The model without its parameters: `nnx.merge(model_graph(m), params)` is the model."""
    return nnx.graphdef(jax.eval_shape(partial(Gemma, m), jax.random.key(0)))


def init_params(m: ModelConfig, seed: int) -> dict:
    """Fresh float32 parameters as a nested dict; the same bits on any mesh when jitted with shardings."""
    return nnx.to_pure_dict(nnx.state(Gemma(m, jax.random.key(seed))))


def init_trained(config: RunConfig) -> dict:
    """Fresh float32 parameters that the run trains: the adapters, or without them all parameters."""
    if config.lora:
        return init_adapters(config.model, config.lora, config.train.seed)
    return init_params(config.model, config.train.seed)


def init_state(params: dict, config: RunConfig, frozen: dict | None = None) -> TrainState:
    """The state of a run that begins with `params`, which it trains: zero moments and counters."""
    tx = make_optimizer(config.optimizer, config.model, config.lora)
    zero = jnp.zeros((), jnp.int32)
    # A copy: a step is given both, and gives both memory back.
    average = jax.tree.map(jnp.copy, params) if config.train.ema else {}
    return TrainState(zero, params, tx.init(params), zero, zero, zero, nothing_recent(), frozen or {}, average)


def freeze(params: dict, m: ModelConfig, dtype: DTypeLike) -> dict:
    """The base's float32 parameters as a step keeps them beside adapters: kernels and embeddings in `dtype`.

    The rest stays float32. A forward pass rounds the same values to the same dtype, so its bits are those of before.
    """
    wide = {p.path for p in parameter_table(m) if p.kind in ("kernel", "embedding")}
    return to_nested({path: a.astype(dtype) if path in wide else a for path, a in to_flat(params).items()})


def trained_shardings(config: RunConfig, mesh: Mesh) -> dict:
    """The NamedSharding of each array that is trained, as a nested dict."""
    if config.lora:
        return adapter_shardings(config.model, config.lora, mesh)
    return parameter_shardings(config.model, mesh)


def weights_shardings(config: RunConfig, mesh: Mesh) -> dict:
    """The shardings of `TrainState.weights`."""
    return {**parameter_shardings(config.model, mesh), **trained_shardings(config, mesh)}


def state_shardings(config: RunConfig, mesh: Mesh) -> TrainState:
    """A TrainState of NamedSharding: moments and average lie with their parameter, scalars on every device."""
    params = trained_shardings(config, mesh)
    frozen = parameter_shardings(config.model, mesh) if config.lora else {}
    abstract = jax.eval_shape(partial(init_state, config=config), abstract_trained(config, mesh))
    whole = replicated(mesh)
    optimizer = optax.tree.map_params(
        make_optimizer(config.optimizer, config.model, config.lora),
        lambda _, s: s,
        abstract.optimizer,
        params,
        transform_non_params=lambda _: whole,
    )
    average = params if config.train.ema else {}
    return TrainState(whole, params, optimizer, whole, whole, whole, Recent(whole, whole, whole), frozen, average)


def abstract_params(m: ModelConfig, mesh: Mesh) -> dict:
    """Shapes, dtypes and shardings of the model's parameters, without memory for them."""
    return _placed(jax.eval_shape(partial(init_params, m, 0)), parameter_shardings(m, mesh))


def abstract_adapters(m: ModelConfig, lora: LoraConfig, mesh: Mesh) -> dict:
    """Shapes, dtypes and shardings of adapters, without memory for them."""
    return _placed(jax.eval_shape(partial(init_adapters, m, lora, 0)), adapter_shardings(m, lora, mesh))


def abstract_trained(config: RunConfig, mesh: Mesh) -> dict:
    """Shapes, dtypes and shardings of what the run trains, without memory for it."""
    if config.lora:
        return abstract_adapters(config.model, config.lora, mesh)
    return abstract_params(config.model, mesh)


def abstract_state(config: RunConfig, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the training state, without memory for it."""
    frozen: dict = {}
    if config.lora:
        keep = partial(freeze, m=config.model, dtype=jnp.dtype(config.train.compute_dtype))
        frozen = jax.eval_shape(keep, abstract_params(config.model, mesh))
    trained = abstract_trained(config, mesh)
    shapes = jax.eval_shape(lambda t, f: init_state(t, config, f), trained, frozen)
    return _placed(shapes, state_shardings(config, mesh))


def _placed(shapes, shardings):
    return jax.tree.map(lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), shapes, shardings)


def abstract_batch(config: RunConfig, mesh: Mesh) -> dict:
    """Shapes, dtypes and shardings of a batch, whose rows are shares where `mesh.sequence` divides them."""
    shares = config.mesh.sequence
    B, T = config.train.batch_size * shares, config.data.sequence_length // shares
    place = partial(jax.ShapeDtypeStruct, sharding=batch_sharding(mesh))
    batch = {name: place((B, T), jnp.int32) for name in ("tokens", "targets", "segment_ids", "positions")}
    return {**batch, "loss_mask": place((B, T), jnp.float32), "source": place((B,), jnp.int32)}
