"""The setup of a run: devices, directory, data, what is fixed for its life, and the state to go on with."""

from collections.abc import Collection
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
from jax.sharding import Mesh
from rich.console import Console

from easylm_mling.checkpoint.base import Base
from easylm_mling.checkpoint.checkpoint import Checkpoints
from easylm_mling.checkpoint.layout import checkpoints_folder, newest_step
from easylm_mling.checkpoint.parameters import check_same_shapes, load_params
from easylm_mling.config import RunConfig, differences, from_tree, load_kept
from easylm_mling.data.mixture import DataState
from easylm_mling.data.state_archive import kept_steps
from easylm_mling.data.tokenization.tokenizer import Tokenizer
from easylm_mling.distributed.agreement import broadcast, is_primary, process_index
from easylm_mling.errors import NoUsableCheckpoint
from easylm_mling.model.quantized import check_products
from easylm_mling.model.sharding import check_run, make_mesh
from easylm_mling.monitoring.console import say, warn
from easylm_mling.monitoring.events import read_event_log
from easylm_mling.plan.measurements import MeasurementCache
from easylm_mling.plan.remat import choose_remat, with_remat
from easylm_mling.run.batch_size import after
from easylm_mling.run.changes import BATCH_SIZE, change_text, check_changes, past_changes, record_changes
from easylm_mling.run.data import RunData, is_of_other_data, open_catalog
from easylm_mling.run.directory import RunDirectory
from easylm_mling.run.epochs import with_counted_epochs
from easylm_mling.run.frozen import base_of_run, check_base, load_frozen, start_adapters
from easylm_mling.run.host_sync import own_lanes
from easylm_mling.run.rewind import batches_to_skip
from easylm_mling.run.starting_model import check_start
from easylm_mling.training.state import (
    TrainState,
    abstract_params,
    abstract_state,
    init_params,
    init_state,
    state_shardings,
)


def select_devices(config: RunConfig):
    """Simulate CPU devices when the config asks for them; must run before jax first looks for devices."""
    if config.mesh.cpu_devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", config.mesh.cpu_devices)


def open_run(
    config: RunConfig,
    tokenizer: Tokenizer,
    console: Console,
    accept_data_change: bool,
    override_model: Collection[str] = (),
    change: Collection[str] = (),
) -> tuple[RunConfig, Mesh, RunData]:
    """Check everything that can be checked, then take the run's directory and open its data.

    Returns the config with the remat policy that `auto` stands for, the mesh and the data.
    """
    check_changes(config, change)
    run = RunDirectory(config, accept_data_change, process_index(), change)
    config = run.config
    catalog = open_catalog(run, config, accept_data_change)
    for remark in catalog.remarks():
        warn(console, remark)
    config = with_counted_epochs(config, run, catalog, tokenizer, accept_data_change)
    mesh = make_mesh(config.mesh)
    check_run(config, mesh)
    check_products(config.train.products, mesh.devices.flat[0])
    own_lanes(config, mesh)
    config = with_chosen_remat(config, run, console)
    check_base(config, run.name)
    if config.init_from and not newest_step(run.name):
        check_same_shapes(config.init_from, abstract_params(config.model, mesh))
        check_start(config, tokenizer.fingerprint, override_model)
    run.take_lease()
    if accept_data_change and is_of_other_data(run, tokenizer, catalog):
        run.set_aside(newest_step(run.name))
        run.replace_config(config)
    elif run.changes and not run.begins_anew:
        record_changes(run.history_file, newest_step(run.name) or 0, run.changes)
        run.replace_config(config)
    run.write_start(config)
    data = RunData.open(run, config, catalog, tokenizer, accept_data_change)
    run.begun()
    return config, mesh, data


class OtherPast(NamedTuple):
    """The checkpoint is older than the one that the config was made for, by a change of the batch size."""

    step: int
    config: RunConfig  # what goes on from that step


class Start(NamedTuple):
    """What a process of a run goes on with."""

    state: TrainState
    data_state: DataState | None  # None: the run begins
    skip: int  # batches to leave out now, after a rewind to this very checkpoint
    base: Base | None  # of adapters


def restore_or_init(config, mesh, checkpoints: Checkpoints, data: RunData, console) -> Start | OtherPast:
    """The newest checkpoint's state on this mesh, or a fresh state (from `init_from` if given). Collective."""
    shardings = state_shardings(config, mesh)
    if restored := checkpoints.restore_newest(abstract_state(config, mesh)):
        for step, wrong in restored.damaged:
            warn(console, f"the checkpoint of step {step} is damaged and set aside: {wrong}")
        now = after(config, from_tree(RunConfig, restored.info["config"]), restored.step)
        if now != config:
            return OtherPast(restored.step, now)
        data_state, news = data.resume(restored.step, DataState(**restored.data), restored.info)
        news += [change_text(c) for c in past_changes(data.run.history_file) if c["step"] == restored.step]
        for line in (f"resumed from the checkpoint of step {restored.step}", *news):
            say(console, line)
        base = base_of_run(config, restored.info)
        frozen = load_frozen(config, mesh, base) if base else {}
        skip = batches_to_skip(data.run, restored.step, restored.info)
        return Start(restored.state._replace(frozen=frozen), data_state, skip, base)
    _check_none_is_missing(data.run)
    if base := base_of_run(config, {}):
        begin = jax.jit(
            partial(init_state, config=config), out_shardings=shardings._replace(frozen={}), donate_argnums=0
        )
        state = begin(start_adapters(config, mesh))._replace(frozen=load_frozen(config, mesh, base))
        adapters = f"adapters of {config.lora.init_from}" if config.lora.init_from else "fresh adapters"
        say(
            console, f"{adapters} beside the parameters of step {base.step} in {base.init_from}, which stay as they are"
        )
        return Start(state, None, 0, base)
    if config.init_from:
        abstract = abstract_params(config.model, mesh)
        params = load_params(config.init_from, abstract)
        say(console, f"parameters taken from {config.init_from}")
        begin = jax.jit(partial(init_state, config=config), out_shardings=shardings, donate_argnums=0)
        return Start(begin(params), None, 0, None)
    fresh = jax.jit(lambda: init_state(init_params(config.model, config.train.seed), config), out_shardings=shardings)
    return Start(fresh(), None, 0, None)


def record_other_past(run: RunDirectory, past: OtherPast):
    """Keep the config that goes on from an older checkpoint than was thought, and when its batch size begins to hold."""
    if run.writes:
        before = past.config.batch_size_at(past.step)
        if before != past.config.train.batch_size:
            change = differences(replace(past.config.train, batch_size=before), past.config.train)
            changes = [replace(c, key=BATCH_SIZE) for c in change if c.key == "batch_size"]
            record_changes(run.history_file, past.step, changes)
        run.replace_config(past.config)


def _check_none_is_missing(run: RunDirectory):
    """Raise NoUsableCheckpoint if there were checkpoints of this run, by its events, and none is left. Collective.

    Where the events are gone, too, the data states tell: one is kept just before each checkpoint, so of two the first was
    followed by a checkpoint, unless an event says that it failed.
    """
    events = list(read_event_log(run.events_file))
    saved = [e["step"] for e in events if e["event"] in ("saved", "restored")]
    if not any(e["event"] == "save_failed" for e in events):
        saved += kept_steps(run.states_dir)[:-1]
    if step := broadcast(max(saved, default=0) if is_primary() else 0):
        raise NoUsableCheckpoint(
            f"{checkpoints_folder(run.name)}: holds no checkpoint, but this run saved one at step {step}; mount or restore the "
            "folder, or start a new run_dir"
        )


def with_chosen_remat(config: RunConfig, run: RunDirectory, console: Console) -> RunConfig:
    """The config with `train.remat: auto` resolved: as chosen when the run began, or chosen now. A run keeps its choice."""
    if config.train.remat == "auto" and run.config_file.is_file() and not run.begins_anew:
        chosen = load_kept(run.config_file).train
        return with_remat(config, chosen.remat, chosen.remat_first, chosen.remat_first_layers)
    return choose_remat(config, MeasurementCache(), console) if config.train.remat == "auto" else config
