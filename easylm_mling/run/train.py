"""The training loop, in order: restore, next batch, step, log, evaluate, save, stop."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass
from typing import NamedTuple

import jax
from jax.sharding import Mesh
from rich.console import Console

from easylm_mling.config import RunConfig, to_yaml
from easylm_mling.data.loader import Loader
from easylm_mling.data.mixture import DataState
from easylm_mling.data.quarantine import check_bad_records
from easylm_mling.data.tokenization.tokenizer import Tokenizer
from easylm_mling.distributed.agreement import is_primary, primary_first
from easylm_mling.distributed.watchdog import Watchdog
from easylm_mling.errors import DONE, PREEMPTED, ConfigError, TrainingStopped, crash_file
from easylm_mling.model.sharding import axis_sizes
from easylm_mling.monitoring.console import make_console, say
from easylm_mling.monitoring.trackers import check_trackers
from easylm_mling.run.changes import change_text, past_changes
from easylm_mling.run.data import RunData
from easylm_mling.run.evaluations import Evaluations
from easylm_mling.run.host_sync import Agreement, HostSync, next_on_all_hosts, own_lanes, own_quarantine, place_batch
from easylm_mling.run.monitor import Monitor, skip_news
from easylm_mling.run.preemption import CONTINUE, OUT_OF_TIME, SIGNALLED, StopSignal
from easylm_mling.run.replay_check import ReplayCheck
from easylm_mling.run.rewind import count_rewinds, rewind
from easylm_mling.run.saving import Saver, open_checkpoints
from easylm_mling.run.setup import OtherPast, open_run, record_other_past, restore_or_init, select_devices
from easylm_mling.run.starting_model import override_names
from easylm_mling.run.summary import summary_table
from easylm_mling.run.task_scores import TaskScores, open_task_scores
from easylm_mling.run.turn_tokens import warn_of_turn_tokens
from easylm_mling.run.validation import Validation
from easylm_mling.training.compilation import compile_ahead, enable_compilation_cache
from easylm_mling.training.spike_guard import SPIKE
from easylm_mling.training.state import TrainState


class Outcome(NamedTuple):
    """How a process of a run ended: at which step, with what consumed, and why."""

    step: int
    data_state: DataState | None  # the whole run's; None if nothing was consumed
    stop_request: int  # as run/preemption.py's
    data_ended: str = ""  # why there is no next batch
    begin_again: bool = False  # with the config that is in the run's directory now


class InFlight(NamedTuple):
    """A launched step. Its metrics are read while the next one runs, so that the device never waits for the host."""

    step: int
    metrics: dict  # arrays on the device
    agreement: Callable[[], Agreement]  # waits for what all processes said at it


@dataclass(frozen=True)
class Loop:
    """The parts that the loop works with, besides the states."""

    config: RunConfig
    mesh: Mesh
    data: RunData
    loader: Loader
    saver: Saver
    evaluations: Evaluations
    sync: HostSync
    monitor: Monitor
    stop: StopSignal
    watchdog: Watchdog
    replay: ReplayCheck


def train(
    config: RunConfig,
    console: Console | None = None,
    accept_data_change: bool = False,
    max_hours: float | None = None,
    override_model: Sequence[str] = (),
    change: Sequence[str] = (),
) -> int:
    """Train to the token budget (or `train.stop_at_step`), resuming from the newest checkpoint in `run_dir`.

    `accept_data_change`: go on with other files, sources or another tokenizer than before, as data/migration.py says.
    `change`: keys of the config that may differ from the run's, and are recorded then (run/changes.py).
    `override_model`: keys of `model`, or `tokenizer`, that may differ from those of the checkpoint in `init_from`.
    `max_hours`: save and end at the first step after so long. Returns the exit code (errors.py). Raises ConfigError for
    anything wrong with the config or the data, before a device is used. Collective.
    """
    begun = time.monotonic()
    tokenizer = Tokenizer(config.data.tokenizer)
    tokenizer.check_model(config.model)
    check_trackers(config.log)
    select_devices(config)
    enable_compilation_cache()
    console = console or make_console(quiet=not is_primary())
    with primary_first(to_yaml(config)):
        tasks = open_task_scores(config, tokenizer, console)
        config, mesh, data = open_run(
            config, tokenizer, console, accept_data_change, override_names(override_model), change
        )
    run = data.run
    size = f"{config.total_steps} steps of {config.tokens_per_step} tokens on mesh {axis_sizes(mesh, config.mesh.sequence)}"
    say(console, f"run {run.name}: {size}")

    with (
        closing(run),
        crash_file(run.path),
        jax.set_mesh(mesh),
        Monitor.open(config, run, mesh, console, begun) as monitor,
    ):
        outcome = run_process(config, mesh, data, tokenizer, monitor, tasks, max_hours)
        event, message, code = closing_event(config, outcome)
        monitor.ended(event, outcome.step, message)
        if is_primary() and outcome.data_state is not None:
            console.print(summary_table(config, run.metrics_file, data.ledger.sources(outcome.data_state)))
    if message:
        say(console, message)
    if outcome.begin_again:
        return train(config, console, accept_data_change, max_hours, override_model)
    return code


def run_process(
    config: RunConfig,
    mesh: Mesh,
    data: RunData,
    tokenizer: Tokenizer,
    monitor: Monitor,
    tasks: TaskScores | None,
    max_hours: float | None,
) -> Outcome:
    """From the newest checkpoint, or a fresh state, to the end of this process."""
    run, console, lanes = data.run, monitor.console, own_lanes(config, mesh)
    no_step = f"no step was finished in {config.train.stuck_minutes:g} minutes (train.stuck_minutes)"
    with (
        Watchdog(config.train.stuck_minutes * 60, no_step, record=monitor.stuck) as watchdog,
        open_checkpoints(config, run, monitor) as checkpoints,
        StopSignal(console, max_hours) as stop,
    ):
        program = compile_ahead(config, mesh)
        rewind(config.train, checkpoints, run, monitor.events, console)
        begun = time.monotonic()
        start = restore_or_init(config, mesh, checkpoints, data, console)
        if isinstance(start, OtherPast):
            record_other_past(run, start)
            return Outcome(start.step, None, CONTINUE, begin_again=True)
        state, data_state, skip, base = start
        if data_state is not None:
            monitor.restored(int(state.step), time.monotonic() - begun)
            changed = [change_text(c) for c in past_changes(run.history_file) if c["step"] == int(state.step)]
            monitor.news(int(state.step), changed)
        quarantine = own_quarantine(run.quarantine_file, list(config.data.sources), data_state)
        with Loader(config.mixer, data.catalog, tokenizer, data_state, lanes, quarantine, data.plan) as loader:
            loop = Loop(
                config=config,
                mesh=mesh,
                data=data,
                loader=loader,
                saver=Saver(config, checkpoints, data, loader, monitor, count_rewinds(run), base),
                evaluations=Evaluations(
                    config, mesh, Validation(config, data.catalog, tokenizer, mesh), tasks, monitor
                ),
                sync=HostSync(lanes),
                monitor=monitor,
                stop=stop,
                watchdog=watchdog,
                replay=ReplayCheck(config, mesh, data, monitor.log),
            )
            monitor.begin(int(state.step))
            if int(state.step) == 0:
                warn_of_turn_tokens(console, state.frozen, config.model, data.catalog, tokenizer)
                loop.evaluations(state)
            if skip:
                data_state = skip_batches(loop, int(state.step), skip)
            state, outcome = run_steps(loop, program, state, data_state)
        if outcome.data_state is not None:
            spikes = int(state.spikes)
            skipped = {"spikes": spikes, "not_finite": int(state.skipped) - spikes}
            data.write_ledger(outcome.step, outcome.data_state, skipped)
    return outcome


def run_steps(
    loop: Loop, program: Future, state: TrainState, data_state: DataState | None
) -> tuple[TrainState, Outcome]:
    """Next batch, step, log, evaluate, save: until the budget, stop_at_step, the end of the data or a request to stop."""
    config, monitor, start = loop.config, loop.monitor, int(state.step)
    with monitor.compiling(start + 1):
        train_step = program.result()
    end = min(config.total_steps, config.train.stop_at_step or config.total_steps)
    agreed, in_flight = Agreement(CONTINUE, data_state), deque[InFlight]()
    done, data_ended = start, ""
    while done < end and agreed.stop_request == CONTINUE and not data_ended:
        with monitor.throughput.waiting():
            item = next_on_all_hosts(loop.loader)
        if item is None:
            data_ended = loop.loader.ended or "another host's lanes have none left"
            if done == 0:
                raise ConfigError(
                    f"the data ends before the first step: {data_ended}; name more data, raise max_epochs, or lower "
                    "train.batch_size or data.sequence_length"
                )
            continue
        batch, consumed = item
        done += 1
        monitor.launching(done)
        state, metrics = train_step(state, place_batch(batch, loop.mesh, config.mesh.sequence))
        metrics |= monitor.norms(done, state.params)
        agreement = loop.sync.start(loop.stop.request(), consumed, (state, metrics))
        in_flight.append(InFlight(done, metrics, agreement))
        evaluating = loop.evaluations.due(done)
        saving = done % config.checkpoint.every_steps == 0
        agreed = report_steps(loop, agreed, in_flight, left=0 if evaluating or saving else 1)
        loop.replay.check(done, state)
        loop.saver.report_committed()
        if evaluating:
            loop.evaluations(state, evaluating)
        if saving and done < end and agreed.stop_request == CONTINUE:
            assert agreed.state is not None
            loop.saver.save(state, agreed.state)
        loop.watchdog.beat()
    agreed = report_steps(loop, agreed, in_flight, left=0)
    if done > start and agreed.state is not None:
        if done == config.total_steps or data_ended:
            loop.evaluations(state)
        loop.saver.save(state, agreed.state, last=True)
    return state, Outcome(done, agreed.state, agreed.stop_request, data_ended)


def closing_event(config: RunConfig, outcome: Outcome) -> tuple[str, str, int]:
    """Exit event (monitoring/events.py), message and exit code."""
    step, total = outcome.step, config.total_steps
    if outcome.begin_again:
        return "stopped", f"goes on from step {step} by a checkpoint of another batch size", DONE
    if step == total:
        return "done", "", DONE
    if outcome.stop_request == SIGNALLED:
        return "preempted", f"stopped by a signal at step {step}, saved; the same command goes on from here", PREEMPTED
    if outcome.data_ended:
        return "done", f"the data ended at step {step} of {total}: {outcome.data_ended}", DONE
    reason = "after --max-hours" if outcome.stop_request == OUT_OF_TIME else "as train.stop_at_step says"
    return "stopped", f"stopped at step {step} of {total}, {reason}", DONE


def skip_batches(loop: Loop, step: int, count: int) -> DataState:
    """Pass over `count` batches after the checkpoint of `step`; returns the whole run's data state behind them. Collective."""
    own = None
    for _ in range(count):
        if (item := next_on_all_hosts(loop.loader)) is None:
            break
        own = item[1]
    if own is None:
        raise ConfigError(
            f"train.skip_batches={count}: the data has ended at step {step}, and there is none to leave out; rewind further"
        )
    state = loop.sync.start(CONTINUE, own)().state
    assert state is not None
    # Audits of later steps draw them from here.
    loop.data.keep(step, state)
    return state


def report_steps(loop: Loop, agreed: Agreement, in_flight: deque[InFlight], left: int) -> Agreement:
    """Wait for and report the steps in flight but for the newest `left`; returns what all processes said at the last one."""
    while len(in_flight) > left:
        agreed = report_step(loop, agreed.state, in_flight.popleft())
    return agreed


def report_step(loop: Loop, before: DataState | None, launched: InFlight) -> Agreement:
    """Report one finished step; raises TrainingStopped when too many in a row changed nothing, DataError for bad data."""
    step, metrics, config = launched.step, launched.metrics, loop.config
    agreed, ledger = launched.agreement(), loop.data.ledger
    consumed = agreed.state
    assert consumed is not None
    values = loop.monitor.step(step, metrics, lambda: ledger.sources(consumed))
    sources, limit = list(config.data.sources), config.data.max_bad_fraction
    check_bad_records(consumed.lanes, sources, limit, loop.data.run.quarantine_file)
    ends = [order.epochs for order in loop.loader.orders]
    news = ledger.news(before, consumed, ends, loop.loader.lanes_with_data)
    if skipped := skip_news(metrics, values, config.train.spike_sigmas):
        news.append(skipped)
    loop.monitor.news(step, news)
    if int(metrics["skipped_in_a_row"]) >= config.train.max_skipped_in_a_row:
        what, way = "was not finite", "lower optimizer.learning_rate"
        if int(metrics["verdict"]) == SPIKE:
            what = "spiked"
            way = "raise train.spike_sigmas, go back behind them with train.rewind=STEP train.skip_batches=N"
        raise TrainingStopped(
            f"the loss or gradient {what} in step {step}, the last of {config.train.max_skipped_in_a_row} in a row that were "
            f"skipped; parameters are unchanged since. Look at the data, {way}, then run again: it resumes from the newest "
            "checkpoint"
        )
    return agreed
