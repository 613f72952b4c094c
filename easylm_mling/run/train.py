"""The training loop, in order: restore, next batch, step, log, evaluate, save, stop."""

import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import closing
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, PartitionSpec
from rich.console import Console

from easylm_mling.checkpoint.checkpoint import Checkpoints
from easylm_mling.config import RunConfig, to_tree
from easylm_mling.data.loader import Loader, to_device
from easylm_mling.data.mixture import DataState
from easylm_mling.data.tokenization.tokenizer import Tokenizer
from easylm_mling.distributed.processes import is_multiprocess, is_primary, primary_first
from easylm_mling.distributed.watchdog import Watchdog
from easylm_mling.errors import DONE, PREEMPTED, ConfigError, TrainingStopped
from easylm_mling.model.sharding import BATCH_AXES
from easylm_mling.monitoring.console import make_console, say
from easylm_mling.monitoring.trackers import check_trackers
from easylm_mling.run.data import RunData
from easylm_mling.run.directory import RunDirectory
from easylm_mling.run.host_sync import Agreement, HostSync, own_lanes, own_quarantine
from easylm_mling.run.monitor import Monitor
from easylm_mling.run.preemption import CONTINUE, OUT_OF_TIME, SIGNALLED, StopSignal
from easylm_mling.run.replay_check import ReplayCheck
from easylm_mling.run.rewind import count_rewinds, rewind
from easylm_mling.run.setup import open_run, restore_or_init, select_devices
from easylm_mling.run.summary import summary_table
from easylm_mling.run.validation import Validation
from easylm_mling.training.compilation import compile_ahead, enable_compilation_cache
from easylm_mling.training.spike_guard import NOT_FINITE, SPIKE
from easylm_mling.training.step import TrainState


class Run(NamedTuple):
    """What the loop works with, besides the states."""

    config: RunConfig
    mesh: Mesh
    program: Future  # of train_step
    data: RunData
    loader: Loader
    checkpoints: Checkpoints
    evaluate: Validation
    gathering: HostSync
    monitor: Monitor
    console: Console
    stop: StopSignal
    watchdog: Watchdog
    rewinds: int
    replay: ReplayCheck
    saving: dict[int, tuple[float, int]]  # by step: how long the loop stood still for the save under way, and its bytes


def train(
    config: RunConfig,
    console: Console | None = None,
    accept_data_change: bool = False,
    max_hours: float | None = None,
) -> int:
    """Train to the token budget (or `train.stop_at_step`), resuming from the newest checkpoint in `run_dir`.

    `accept_data_change`: go on with other files, sources or another tokenizer than before, as data/migration.py says.
    `max_hours`: save and end at the first step after so long. Of several processes (distributed/processes.py) each calls this.
    Returns the exit code (errors.py). Raises ConfigError for anything wrong with the config or the data before a device
    is used.
    """
    begun = time.monotonic()
    tokenizer = Tokenizer(config.data.tokenizer)
    tokenizer.check_model(config.model)
    check_trackers(config.log)
    select_devices(config)
    enable_compilation_cache()
    console = console or make_console(quiet=not is_primary())
    with primary_first(config):
        config, mesh, data = open_run(config, tokenizer, console, accept_data_change)
    run = data.run
    steps = f"{config.total_steps} steps of {config.tokens_per_step} tokens"
    say(console, f"run {run.name}: {steps} on mesh {dict(mesh.shape)}")

    with closing(run), jax.set_mesh(mesh), Monitor.open(config, run, mesh, console, begun) as monitor:
        step, data_state, stop_request, data_ended = run_process(config, mesh, data, tokenizer, monitor, max_hours)
        event, why, code = why_over(config, step, stop_request, data_ended)
        monitor.ended(event, step, why)
        if is_primary() and data_state is not None:
            console.print(summary_table(config, run.metrics_file, data.ledger.sources(data_state)))
    if why:
        say(console, why)
    return code


def run_process(
    config: RunConfig, mesh: Mesh, data: RunData, tokenizer: Tokenizer, monitor: Monitor, max_hours: float | None
) -> tuple[int, DataState | None, int, str]:
    """From the newest checkpoint, or a fresh state, to the end of this process.

    Returns the last step and data state, the wish that ended it, and if the data ended, why.
    """
    run, console = data.run, monitor.console
    with (
        Watchdog(config.train.stuck_minutes * 60, no_step(config), record=monitor.stuck) as watchdog,
        open_checkpoints(config, run, monitor) as checkpoints,
        StopSignal(console, max_hours) as stop,
    ):
        program = compile_ahead(config, mesh)
        rewind(config.train, checkpoints, run, monitor.events, console)
        begun = time.monotonic()
        state, data_state, skip = restore_or_init(config, mesh, checkpoints, data, console)
        if data_state is not None:
            monitor.events.write("restored", int(state.step), seconds=round(time.monotonic() - begun, 3))
        evaluate = Validation(config, data.catalog, tokenizer, mesh)
        quarantine = own_quarantine(run.quarantine_file, list(config.data.sources), data_state)
        with Loader(
            config, data.catalog, tokenizer, data_state, own_lanes(config, mesh), quarantine, data.plan
        ) as loader:
            together = HostSync(own_lanes(config, mesh))
            parts = Run(
                config, mesh, program, data, loader, checkpoints, evaluate, together, monitor, console, stop, watchdog,
                count_rewinds(run), ReplayCheck(config, mesh, data, monitor.log), {},
            )  # fmt: skip
            monitor.begin(int(state.step))
            if int(state.step) == 0:
                evaluate_and_tell(parts, state)
            if skip:
                data_state = skip_batches(parts, int(state.step), skip)
            state, data_state, stop_request, ended = run_steps(parts, state, data_state)
            if data_state is not None:
                spikes = int(state.spikes)
                skipped = {"spikes": spikes, "not_finite": int(state.skipped) - spikes}
                data.write_ledger(int(state.step), data_state, skipped)
    report_saves(parts)
    why_ended = (loader.ended or "another host's lanes have none left") if ended else ""
    return int(state.step), data_state, stop_request, why_ended


def open_checkpoints(config: RunConfig, run: RunDirectory, monitor: Monitor) -> Checkpoints:
    """Those of the run. In a bucket, what is known of a step is there before the step is."""
    settings = config.checkpoint
    keep = {"keep_last": settings.keep_last, "keep_every_steps": settings.keep_every_steps}
    first = run.push if run.mirror else None
    stuck = settings.stuck_minutes * 60
    return Checkpoints(run.name, **keep, stuck_seconds=stuck, before_commit=first, record_stuck=monitor.stuck)


def no_step(config: RunConfig) -> str:
    """What the watchdog says."""
    return f"no step was finished in {config.train.stuck_minutes:g} minutes (train.stuck_minutes)"


def why_over(config: RunConfig, done: int, stop_request: int, data_ended: str) -> tuple[str, str, int]:
    """The event that the end of a process is (monitoring/events.py), what to say of it, and the exit code."""
    if done == config.total_steps:
        return "done", "", DONE
    if stop_request == SIGNALLED:
        return "preempted", f"stopped by a signal at step {done}, saved; the same command goes on from here", PREEMPTED
    if data_ended:
        return "done", f"the data ended at step {done} of {config.total_steps}: {data_ended}", DONE
    reason = "after --max-hours" if stop_request == OUT_OF_TIME else "as train.stop_at_step says"
    return "stopped", f"stopped at step {done} of {config.total_steps}, {reason}", DONE


def run_steps(
    run: Run, state: TrainState, data_state: DataState | None
) -> tuple[TrainState, DataState | None, int, bool]:
    """Next batch, step, log, evaluate, save, stop: until the budget, stop_at_step, the end of the data or a wish to stop.

    Returns the last states, the wish, and whether the data ended.
    """
    config = run.config
    start = saved = int(state.step)
    with run.monitor.compiling(start + 1):
        train_step = run.program.result()
    end = min(config.total_steps, config.train.stop_at_step or config.total_steps)
    item = ()
    stop_request = CONTINUE
    waiting = None  # a step's metrics are read while the next one runs, so that the device never waits for the host
    for step in range(start + 1, end + 1):
        with run.monitor.throughput.waiting():
            item = next_everywhere(run.loader)
        if item is None:
            break
        batch, consumed = item
        run.monitor.launching(step)
        state, metrics = train_step(state, to_device(batch, run.mesh, PartitionSpec(BATCH_AXES)))
        metrics |= run.monitor.norms(step, state.params)
        answer = run.gathering.start(run.stop.stop_request(), consumed, (state, metrics))
        if waiting:
            stop_request, data_state = report(run, data_state, *waiting)
        waiting = step, metrics, answer
        run.replay.check(step, state)
        if step == config.total_steps or (config.eval.every_steps and step % config.eval.every_steps == 0):
            evaluate_and_tell(run, state)
        if step == end or step % config.checkpoint.every_steps == 0 or stop_request:
            # The record of a step comes before its checkpoint, should anything be killed in between.
            stop_request, data_state = report(run, data_state, *waiting)
            waiting = None
            save(run, state, data_state, last=step == end or stop_request != CONTINUE)
            saved = step
        run.watchdog.beat()
        if stop_request:
            break
    if waiting:
        stop_request, data_state = report(run, data_state, *waiting)
    if item is None and (done := int(state.step)) > start:
        evaluate_and_tell(run, state)
        if done > saved and data_state is not None:
            save(run, state, data_state, last=True)
    return state, data_state, stop_request, item is None


def next_everywhere(loader: Loader):
    """The loader's next (batch, state), or None if it has ended on any host: then all hosts end at the same step."""
    item = next(loader, None)
    if is_multiprocess() and any(order.epochs is not None for order in loader.orders):
        # A step's worth of waiting for one bit, only in runs whose sources can be used up.
        if bool(np.any(multihost_utils.process_allgather(np.array(item is None)))):
            return None
    return item


def evaluate_and_tell(run: Run, state: TrainState):
    step = int(state.step)  # waits until it is done
    with run.monitor.throughput.pausing() as pause:
        found = run.evaluate(state.params)
    run.monitor.evaluated(step, found, pause.seconds)


def save(run: Run, state: TrainState, data_state: DataState, last: bool):
    """Start to save the step, with the whole run's data state.

    A save that fails is told, and too many in a row end the run. The `last` one is waited for, and tried again.
    """
    step, checkpoints = int(state.step), run.checkpoints
    info = {"config": to_tree(run.config), "tokens": step * run.config.tokens_per_step, **run.data.fingerprints}
    info |= {"rewinds": run.rewinds}
    run.monitor.log.write("languages", step, languages=run.data.ledger.languages(data_state))
    begun = False
    while last or not begun:
        with run.monitor.throughput.pausing() as pause:
            before, lost = checkpoints.newest_begun, checkpoints.finish()
            report_saves(run, lost)
            if begun and not lost:
                return
            unsaved = checkpoints.save(state, data_state._asdict(), info, partial(write_before, run, step, data_state))
        for of, problem in ((before, lost), (step, unsaved)):
            if problem:
                run.monitor.save_failed(of, problem, checkpoints.failed_in_a_row)
        if not unsaved:
            run.saving[step] = pause.seconds, sum(leaf.nbytes for leaf in jax.tree.leaves((state, data_state)))
        if (last and unsaved) or checkpoints.failed_in_a_row >= run.config.checkpoint.max_failed:
            raise TrainingStopped(
                f"{checkpoints.failed_in_a_row} checkpoints in a row could not be saved ({unsaved or lost}); make room or repair "
                "the disk, then run again: it resumes from the newest checkpoint"
            )
        begun = True


def report_saves(run: Run, lost: str = ""):
    """The save under way has ended, and nothing was `lost`."""
    for step, (seconds, size) in run.saving.items() if not lost else ():
        run.monitor.saved(step, seconds, size)
    run.saving.clear()


def write_before(run: Run, step: int, data_state: DataState):
    """What must be on disk before the checkpoint of the step: whoever resumes from it does not read those records again."""
    run.loader.flush()
    run.data.keep(step, data_state)


def skip_batches(run: Run, step: int, count: int) -> DataState:
    """Pass over `count` batches after the checkpoint of `step`; returns the whole run's data state behind them."""
    own = None
    for _ in range(count):
        if (item := next_everywhere(run.loader)) is None:
            break
        own = item[1]
    if own is None:
        raise ConfigError(
            f"train.skip_batches={count}: the data has ended at step {step}, and there is none to leave out; rewind further"
        )
    state = run.gathering.start(CONTINUE, own)().state
    # Audits of later steps draw them from here.
    run.data.keep(step, state)
    return state


def report(run: Run, before: DataState | None, step: int, metrics: dict, answer: Callable[[], Agreement]) -> Agreement:
    """Log one finished step and return what was said at it; stop the run when too many in a row changed nothing."""
    config, said = run.config, answer()
    values = run.monitor.step(step, metrics, lambda: run.data.ledger.sources(said.state))
    ends = [order.epochs for order in run.loader.orders]
    news = run.data.ledger.news(before, said.state, ends, run.loader.lanes_with_data)
    if skipped := skip_news(metrics, values, config.train.spike_sigmas):
        news.append(skipped)
    run.monitor.news(step, news)
    if int(metrics["skipped_in_a_row"]) >= config.train.max_skipped_in_a_row:
        spiked = int(metrics["verdict"]) == SPIKE
        what = "spiked" if spiked else "was not finite"
        way = (
            "raise train.spike_sigmas, go back behind them with train.rewind=STEP train.skip_batches=N"
            if spiked
            else ("lower optimizer.learning_rate")
        )
        raise TrainingStopped(
            f"the loss or gradient {what} in step {step}, the last of {config.train.max_skipped_in_a_row} in a row that were "
            f"skipped; parameters are unchanged since. Look at the data, {way}, then run again: it resumes from the newest "
            "checkpoint"
        )
    return said


def skip_news(metrics: dict, values: dict, sigmas: float) -> str:
    """Why the step changed nothing, "" if it did."""
    verdict = int(metrics["verdict"])
    if verdict == SPIKE:
        found = zip(("loss", "gradient_norm"), map(float, metrics["limits"]), strict=True)
        over = [f"{name} {values[name]:.4g} is over {limit:.4g}" for name, limit in found if values[name] > limit]
        return f"skipped, a spike: {' and '.join(over)}, {sigmas:g} deviations above the mean of the last steps"
    return "skipped: the loss or gradient is not finite" if verdict == NOT_FINITE else ""
