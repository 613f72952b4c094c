"""Search for the fastest mesh, micro-batch and remat on a slice, within the config's global batch.

First every mesh with full remat and one sequence a chip at a time, which needs the least memory; then, for the fastest
that fit, more sequences; then, for the fastest of these, everything that remat can do (see plan/remat.py). Measurements are kept
in the search's directory: the same search again goes on where it was stopped.
"""

import dataclasses
from pathlib import Path

from rich.console import Console

from easylm_mling.config import RunConfig
from easylm_mling.errors import ConfigError
from easylm_mling.plan.measurements import MeasurementCache, fastest
from easylm_mling.plan.remat import fill_memory, with_remat
from easylm_mling.plan.slices import find_slice

FINALISTS, FILLED = 3, 2
MESHES = ((1, 1), (2, 1), (4, 1), (1, 2), (1, 4))  # data and tensor shards of a slice


def search(config: RunConfig, folder: str, console: Console) -> list[tuple[RunConfig, dict]]:
    """Every config tried with its measurement (see plan/measure.py), in no order. Raises ConfigError where none can be tried."""
    book = MeasurementCache(Path(folder))
    tried = [c for c in (laid_out(config, data, tensor, 1) for data, tensor in MESHES) if c]
    if not tried:
        chips = find_slice(config.mesh.slice or "").chips
        raise ConfigError(
            f"train.batch_size={config.train.batch_size} cannot be cut over the {chips} chips of mesh.slice={config.mesh.slice}; "
            f"use a multiple of {chips}"
        )
    book.measure(tried, console)
    count = find_slice(config.mesh.slice or "").count
    more = [
        laid_out(c, c.mesh.data // count, c.mesh.tensor, n) for c in fastest(tried, book)[:FINALISTS] for n in (2, 4)
    ]
    tried += [c for c in more if c]
    book.measure(tried, console)
    for finalist in fastest(tried, book)[:FILLED]:
        tried += [c for c in fill_memory(finalist, book, console) if c not in tried]
    return [(c, book.get(c)) for c in tried]


def laid_out(config: RunConfig, data: int, tensor: int, sequences: int) -> RunConfig | None:
    """The config with full remat, so many data and tensor shards in each slice (fsdp takes the rest) and `sequences` a chip
    at a time; None where something does not divide."""
    where, m = find_slice(config.mesh.slice or ""), config.model
    fsdp, left = divmod(where.chips // where.count, data * tensor)
    if left or m.hidden_size % fsdp or any(n % tensor for n in (m.num_attention_heads, m.intermediate_size)):
        return None
    mesh = dataclasses.replace(config.mesh, data=data * where.count, fsdp=fsdp, tensor=tensor)
    at_once = mesh.data * mesh.fsdp * sequences
    if config.train.batch_size % at_once:
        return None
    return dataclasses.replace(
        with_remat(with_train(config, accumulation_steps=config.train.batch_size // at_once), "full"), mesh=mesh
    )


def with_train(config: RunConfig, **changes) -> RunConfig:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **changes))
