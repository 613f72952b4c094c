"""The training loop, in order: restore, next batch, step, log, evaluate, save, stop."""

import signal
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import PartitionSpec
from rich.console import Console

from easylm_mling.checkpoint import Checkpoints, check_same_shapes, load_params, newest_step
from easylm_mling.config import RunConfig, load, to_tree
from easylm_mling.data.loader import Loader, to_device
from easylm_mling.data.mixture import DataState
from easylm_mling.data.tokenizer import Tokenizer
from easylm_mling.metrics import MetricsLog, ProgressLine, make_console, step_metrics
from easylm_mling.plan.book import Book
from easylm_mling.plan.calibrate import beside
from easylm_mling.plan.remat import choose_remat, with_remat
from easylm_mling.run_data import RunData
from easylm_mling.run_dir import RunDirectory
from easylm_mling.sharding import BATCH_AXES, check_run, make_mesh
from easylm_mling.step import (
    TrainState,
    abstract_params,
    abstract_state,
    init_params,
    init_state,
    jit_train_step,
    state_shardings,
)
from easylm_mling.summary import summary_table
from easylm_mling.validation import Validation

EXIT_DONE, EXIT_PREEMPTED = 0, 42
SETTLED_STEPS = 20


class Books(NamedTuple):
    """The loader, and where what it gave is written down."""

    data: RunData
    loader: Loader
    log: MetricsLog
    console: Console

    def write_languages(self, step: int, state: DataState):
        self.log.write("languages", step, languages=self.data.ledger.languages(state))

    def tell_news(self, step: int, before: DataState | None, after: DataState):
        ends = [order.epochs for order in self.loader.orders]
        news = self.data.ledger.news(before, after, ends, self.loader.holders)
        if news:
            self.log.write("news", step, news=news)
        for line in news:
            self.console.print(f"step {step}: {line}", highlight=False, soft_wrap=True)


class TrainingStopped(RuntimeError):
    """Training cannot go on; the message says why and what to do."""


def train(config: RunConfig, console: Console | None = None, accept_data_change: bool = False) -> int:
    """Train to the token budget (or `train.stop_at_step`), resuming from the newest checkpoint in `run_dir`.

    `accept_data_change`: go on with other files, sources or another tokenizer than before, as data/changes.py says.
    Returns the exit code: 0 when the budget, stop_at_step or the end of the data is reached, 42 when a signal asked to
    stop and the state is saved. Raises ConfigError for anything wrong with the config or the data before a device is
    used.
    """
    console = console or make_console()
    tokenizer = Tokenizer(config.data.tokenizer)
    tokenizer.check_model(config.model)
    run = RunDirectory(config, accept_data_change)
    data = RunData(run, config, tokenizer, accept_data_change)
    select_devices(config)
    mesh = make_mesh(config.mesh)
    check_run(config, mesh)
    config = with_chosen_remat(config, run, console)
    if config.init_from:
        check_same_shapes(config.init_from, abstract_params(config.model, mesh))
    if data.changed:
        run.set_aside(newest_step(run.path))
        run.replace_config(config)
    run.write_start(config)
    data.write_start()
    steps = f"{config.total_steps} steps of {config.tokens_per_step} tokens"
    console.print(f"run {run.path}: {steps} on mesh {dict(mesh.shape)}", highlight=False, soft_wrap=True)

    with (
        jax.set_mesh(mesh),
        Checkpoints(run.path, config.checkpoint.keep_last, config.checkpoint.keep_every_steps) as checkpoints,
        MetricsLog(run.metrics_file) as log,
        StopSignal(console) as stop,
    ):
        state, data_state = restore_or_init(config, mesh, checkpoints, data, console)
        evaluate = Validation(config, data.catalog, tokenizer, mesh)
        if int(state.step) == 0:
            log.write("eval", 0, **evaluate(state.params))
        with (
            Loader(config, data.catalog, tokenizer, data_state, None, run.quarantine_file, data.plan) as loader,
            ProgressLine(console, config.total_steps, config.tokens_per_step, int(state.step)) as progress,
        ):
            books = Books(data, loader, log, console)
            save = partial(save_checkpoint, config, checkpoints, data)
            state, data_state, ended = run_steps(config, mesh, state, data_state, books, save, evaluate, progress, stop)

    done = int(state.step)
    tell_speed(config, run.path, mesh, console)
    if data_state is not None:
        data.write_ledger(done, data_state)
        console.print(summary_table(config, run.metrics_file, data.ledger.sources(data_state)))
    if stop.requested:
        console.print(f"stopped by a signal at step {done}, saved; the same command goes on from here", soft_wrap=True)
        return EXIT_PREEMPTED
    if ended:
        why = loader.ended or "another host's lanes have none left"
        console.print(f"the data ended at step {done} of {config.total_steps}: {why}", soft_wrap=True)
    elif done < config.total_steps:
        console.print(f"stopped at step {done} of {config.total_steps}, as train.stop_at_step says", soft_wrap=True)
    return EXIT_DONE


def run_steps(config: RunConfig, mesh, state, data_state, books: Books, save, evaluate, progress, stop):
    """Next batch, step, log, evaluate, save, stop: until the budget, stop_at_step, the end of the data or a signal.

    Returns the last states, and whether the data ended.
    """
    train_step = jit_train_step(config, mesh)
    start = saved = int(state.step)
    end = min(config.total_steps, config.train.stop_at_step or config.total_steps)
    item = ()
    waiting = None  # a step's metrics are read while the next one runs, so that the device never waits for the host
    for step in range(start + 1, end + 1):
        item = next_everywhere(books.loader)
        if item is None:
            break
        before, (batch, data_state) = data_state, item
        state, metrics = train_step(state, to_device(batch, mesh, PartitionSpec(BATCH_AXES)))
        if waiting:
            report(config, books, progress, *waiting)
        if step == start + SETTLED_STEPS:
            tell_speed(config, books.data.run.path, mesh, books.console)
        waiting = step, metrics, before, data_state
        if step == config.total_steps or (config.eval.every_steps and step % config.eval.every_steps == 0):
            books.log.write("eval", step, **evaluate(state.params))
        stopping = stop.requested
        if step == end or step % config.checkpoint.every_steps == 0 or stopping:
            save(state, data_state)
            books.write_languages(step, data_state)
            saved = step
        if stopping:
            break
    if waiting:
        report(config, books, progress, *waiting)
    if item is None and (done := int(state.step)) > start:
        books.log.write("eval", done, **evaluate(state.params))
        if done > saved:
            save(state, data_state)
            books.write_languages(done, data_state)
    return state, data_state, item is None


def next_everywhere(loader: Loader):
    """The loader's next (batch, state), or None if it has ended on any host: then all hosts end at the same step."""
    item = next(loader, None)
    if jax.process_count() > 1 and any(order.epochs is not None for order in loader.orders):
        # A step's worth of waiting for one bit, only in runs whose sources can be used up.
        if bool(np.any(multihost_utils.process_allgather(np.array(item is None)))):
            return None
    return item


def save_checkpoint(config: RunConfig, checkpoints: Checkpoints, data: RunData, state: TrainState, data_state):
    tokens = int(state.step) * config.tokens_per_step
    info = {"config": to_tree(config), "tokens": tokens, **data.fingerprints}
    checkpoints.save(state, data_state._asdict(), info)
    data.keep(int(state.step), data_state)


def select_devices(config: RunConfig):
    """Simulate CPU devices when the config asks for them; must run before jax first looks for devices."""
    if config.mesh.cpu_devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", config.mesh.cpu_devices)


def with_chosen_remat(config: RunConfig, run: RunDirectory, console: Console) -> RunConfig:
    """`train.remat: auto` as it was chosen when the run began, or chosen now: a run keeps it whatever compiler comes next."""
    if config.train.remat == "auto" and run.config_file.is_file():
        chosen = load([str(run.config_file)]).train
        return with_remat(config, chosen.remat, chosen.remat_first, chosen.remat_first_layers)
    return choose_remat(config, Book(), console) if config.train.remat == "auto" else config


def restore_or_init(
    config, mesh, checkpoints: Checkpoints, data: RunData, console
) -> tuple[TrainState, DataState | None]:
    """The newest checkpoint's state on this mesh, or a fresh one (from `init_from` where given) and no data state."""
    shardings = state_shardings(config, mesh)
    step = checkpoints.latest_step()
    if step is not None:
        state, stored, info = checkpoints.restore(step, abstract_state(config, mesh))
        data_state, news = data.resume(step, DataState(**stored), info)
        for line in (f"resumed from the checkpoint of step {step}", *news):
            console.print(line, highlight=False, soft_wrap=True)
        return state, data_state
    if config.init_from:
        abstract = abstract_params(config.model, mesh)
        params = load_params(config.init_from, abstract)
        console.print(f"parameters taken from {config.init_from}")
        return jax.jit(partial(init_state, config=config), out_shardings=shardings, donate_argnums=0)(params), None
    fresh = jax.jit(lambda: init_state(init_params(config.model, config.train.seed), config), out_shardings=shardings)
    return fresh(), None


def report(config: RunConfig, books: Books, progress: ProgressLine, step: int, metrics, before, data_state):
    """Log one finished step; stop the run when too many in a row changed nothing."""
    values = step_metrics(metrics, list(config.data.sources))
    rate = progress.update(step, values["loss"])
    if step % config.train.log_every_steps == 0:
        values["ledger"] = books.data.ledger.sources(data_state)
        tokens = step * config.tokens_per_step
        books.log.write("train", step, tokens=tokens, tokens_per_second=rate and round(rate, 1), **values)
    books.tell_news(step, before, data_state)
    if int(metrics["skipped_in_a_row"]) >= config.train.max_skipped_in_a_row:
        raise TrainingStopped(
            f"the loss or gradient was not finite in {config.train.max_skipped_in_a_row} steps in a row, up to step {step}; "
            "parameters are unchanged since. Lower optimizer.learning_rate or look at the data, then run again: it resumes "
            "from the newest checkpoint"
        )


def tell_speed(config: RunConfig, run: Path, mesh, console: Console):
    """Step time, MFU and peak memory beside what `plan --keep` said of this run, where something is there to compare."""
    device = mesh.local_devices[0]
    memory = (device.memory_stats() or {}).get("peak_bytes_in_use")
    if line := beside(run, config, device.device_kind, mesh.size, memory):
        console.print(line, highlight=False, soft_wrap=True)


class StopSignal:
    """Within it, the first SIGTERM or Ctrl-C asks the loop to save and stop after the step under way; the second stops at once."""

    def __init__(self, console: Console):
        self.console, self.requested = console, False

    def __enter__(self):
        self._old = {s: signal.signal(s, self._ask) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _ask(self, number, _frame):
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        self.console.print(f"{signal.Signals(number).name}: saving after this step; once more stops at once")
