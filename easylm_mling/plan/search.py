"""Search for the fastest mesh, micro-batch and remat on a slice, within the config's global batch.

First every mesh with full remat and one sequence a chip at a time, which needs the least memory. Then more sequences for
the fastest that fit, and then every remat policy and mixture for the fastest of these (plan/remat.py). Measurements stay
in the search's directory, so the same search continues where it was stopped.
"""

import dataclasses
from pathlib import Path

from rich.console import Console

from easylm_mling.config import RunConfig
from easylm_mling.errors import ConfigError
from easylm_mling.plan.measurements import MeasurementCache, fastest
from easylm_mling.plan.remat import fill_memory, with_remat
from easylm_mling.plan.slices import slice_of

FINALISTS, FILLED = 3, 2
MESHES = ((1, 1), (2, 1), (4, 1), (1, 2), (1, 4))  # data and tensor shards of a slice


def search(config: RunConfig, folder: str | Path, console: Console) -> list[tuple[RunConfig, dict]]:
    """Return every config tried with its measurement (plan/measure.py). Raises ConfigError where none can be tried."""
    cache, target = MeasurementCache(Path(folder)), slice_of(config)
    tried = [c for c in (laid_out(config, data, tensor, 1) for data, tensor in MESHES) if c]
    if not tried:
        raise ConfigError(
            f"train.batch_size={config.train.batch_size} cannot be cut over the {target.devices} devices of "
            f"mesh.slice={config.mesh.slice}; use a multiple of {target.devices}"
        )
    cache.measure(tried, console)
    more = [
        laid_out(c, c.mesh.data // target.count, c.mesh.tensor, n)
        for c in fastest(tried, cache)[:FINALISTS]
        for n in (2, 4)
    ]
    tried += [c for c in more if c]
    cache.measure(tried, console)
    for finalist in fastest(tried, cache)[:FILLED]:
        tried += [c for c in fill_memory(finalist, cache, console) if c not in tried]
    return [(c, cache.get(c)) for c in tried]


def laid_out(config: RunConfig, data: int, tensor: int, sequences: int) -> RunConfig | None:
    """Return the config with full remat and `sequences` a chip at a time; None where something does not divide.

    `data` and `tensor` are the shards in each slice, and fsdp takes the rest. Where `mesh.sequence`, which stays, divides
    rows, `sequences` are those of the devices that share one.
    """
    target, m = slice_of(config), config.model
    fsdp, remainder = divmod(target.devices // target.count, data * tensor * config.mesh.sequence)
    if (
        remainder
        or m.hidden_size % (fsdp * config.mesh.sequence)
        or any(n % tensor for n in (m.num_attention_heads, m.intermediate_size))
    ):
        return None
    mesh = dataclasses.replace(config.mesh, data=data * target.count, fsdp=fsdp, tensor=tensor)
    accumulation, remainder = divmod(config.train.batch_size, mesh.data * mesh.fsdp * sequences)
    if remainder:
        return None
    return dataclasses.replace(with_remat(with_train(config, accumulation_steps=accumulation), "full"), mesh=mesh)


def with_train(config: RunConfig, **changes) -> RunConfig:
    """Return the config with some settings of `train` changed."""
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **changes))
