"""The frozen base of a run with `lora`: found, compared with the one that the run began with, and loaded."""

from contextlib import suppress
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from easylm_mling.checkpoint.base import Base, find_base, open_base, stored_base, stored_lora
from easylm_mling.checkpoint.layout import newest_step
from easylm_mling.checkpoint.parameters import load_adapters, load_params
from easylm_mling.checkpoint.reading import load_info
from easylm_mling.config import LoraConfig, RunConfig
from easylm_mling.errors import ConfigError, DamagedCheckpoint, check
from easylm_mling.training.state import abstract_adapters, abstract_params, freeze, init_adapters, trained_shardings


def check_base(config: RunConfig, run_dir: str):
    """Raise ConfigError where the base of adapters is missing or is not what it was, or adapters to begin with do not fit.

    Before anything is computed: a run without `lora` has nothing to check.
    """
    if config.lora is None:
        return
    info: dict = {}
    if begun := newest_step(run_dir):
        with suppress(DamagedCheckpoint, ConfigError):  # the restore will say so, or use an older one
            info = load_info(run_dir, begun)
    base = base_of_run(config, info)
    if config.lora.init_from and not begun and base:
        check_start(config.lora, base)


def base_of_run(config: RunConfig, info: dict) -> Base | None:
    """Return the base of a run: of its checkpoint with this `info`, or the newest in `init_from` where it has none yet.

    None for a run without `lora`. Raises ConfigError where it is missing or is not what it was.
    """
    if config.lora is None:
        return None
    if config.init_from is None:
        raise ConfigError(
            "lora needs init_from, a checkpoint whose parameters stay as they are: adapters beside random ones learn nothing. Name "
            "one, or leave `lora` out to train everything"
        )
    recorded = stored_base(info)
    return open_base(recorded, config.run_dir, config.init_from) if recorded else find_base(config.init_from)


def check_start(lora: LoraConfig, base: Base):
    """Raise ConfigError unless the adapters in `lora.init_from` are such as `lora` says, and of this base."""
    start = str(lora.init_from)
    info = load_info(start)
    theirs, their_base = stored_lora(info), stored_base(info)
    if theirs is None or their_base is None:
        raise ConfigError(
            f"lora.init_from={start}: holds no adapters; name a run with `lora`, or import some with "
            f"`easylm-mling import-hf ADAPTER DIR --base {base.init_from}`"
        )
    for name in ("rank", "alpha", "rslora", "projections"):
        ours, stored = getattr(lora, name), getattr(theirs, name)
        same = set(ours) == set(stored) if name == "projections" else ours == stored
        shown = list(stored) if name == "projections" else stored
        check(
            same, f"lora.init_from={start}: was made with lora.{name}={shown}; set that, or begin with fresh adapters"
        )
    check(
        their_base.digest == base.digest,
        f"lora.init_from={start}: its adapters belong to another base, {their_base.init_from}, than init_from={base.init_from}; "
        "name that one, or leave lora.init_from out",
    )


def load_frozen(config: RunConfig, mesh: Mesh, base: Base) -> dict:
    """Return the parameters of the base in the dtypes in which a step keeps them."""
    params = load_params(base.init_from, abstract_params(config.model, mesh), base.step)
    keep = partial(freeze, m=config.model, dtype=jnp.dtype(config.train.compute_dtype))
    shardings = jax.tree.map(lambda a: a.sharding, params)
    return jax.jit(keep, out_shardings=shardings, donate_argnums=0)(params)


def start_adapters(config: RunConfig, mesh: Mesh) -> dict:
    """Return the adapters that a run begins with: those in `lora.init_from`, or fresh ones."""
    assert config.lora
    if config.lora.init_from:
        return load_adapters(config.lora.init_from, abstract_adapters(config.model, config.lora, mesh))
    fresh = partial(init_adapters, config.model, config.lora, config.train.seed)
    return jax.jit(fresh, out_shardings=trained_shardings(config, mesh))()
