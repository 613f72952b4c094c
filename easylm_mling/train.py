"""The training loop, in order: restore, next batch, step, log, evaluate, save, stop."""

import signal
from functools import partial

import jax
import numpy as np
from jax.sharding import PartitionSpec
from rich.console import Console

from easylm_mling.checkpoint import Checkpoints, check_same_shapes, load_params
from easylm_mling.config import ConfigError, RunConfig, to_tree
from easylm_mling.data.catalog import Catalog, build_catalog
from easylm_mling.data.loader import Loader, to_device
from easylm_mling.data.tokenizer import Tokenizer
from easylm_mling.metrics import MetricsLog, ProgressLine, step_metrics
from easylm_mling.run_dir import RunDirectory
from easylm_mling.sharding import BATCH_AXES, check_run, make_mesh
from easylm_mling.step import (
    TrainState,
    abstract_params,
    init_params,
    init_state,
    jit_train_step,
    state_shardings,
)
from easylm_mling.summary import summary_table
from easylm_mling.validation import Validation

EXIT_DONE, EXIT_PREEMPTED = 0, 42


class TrainingStopped(RuntimeError):
    """Training cannot go on; the message says why and what to do."""


def train(config: RunConfig, console: Console | None = None) -> int:
    """Train to the token budget (or `train.stop_at_step`), resuming from the newest checkpoint in `run_dir`.

    Returns the exit code: 0 when the budget or stop_at_step is reached, 42 when a signal asked to stop and the state is
    saved. Raises ConfigError for anything wrong with the config or the data before a device is used.
    """
    console = console or Console()
    tokenizer = Tokenizer(config.data.tokenizer)
    tokenizer.check_model(config.model)
    run = RunDirectory(config)
    catalog = open_catalog(run, config)
    select_devices(config)
    mesh = make_mesh(config.mesh)
    check_run(config, mesh)
    if config.init_from:
        check_same_shapes(config.init_from, abstract_params(config.model, mesh))
    run.write_start(config)
    catalog.save(run.catalog_file)
    fingerprints = {"tokenizer": tokenizer.fingerprint, "data": catalog.fingerprint}
    steps = f"{config.total_steps} steps of {config.tokens_per_step} tokens"
    console.print(f"run {run.path}: {steps} on mesh {dict(mesh.shape)}", highlight=False, soft_wrap=True)

    with (
        jax.set_mesh(mesh),
        Checkpoints(run.path, config.checkpoint.keep_last, config.checkpoint.keep_every_steps) as checkpoints,
        MetricsLog(run.metrics_file) as log,
        StopSignal(console) as stop,
    ):
        state, data_state = restore_or_init(config, mesh, checkpoints, fingerprints, console)
        evaluate = Validation(config, catalog, tokenizer, mesh)
        if int(state.step) == 0:
            log.write("eval", 0, **evaluate(state.params))
        with (
            Loader(config, catalog, tokenizer, state=data_state, quarantine=run.quarantine_file) as loader,
            ProgressLine(console, config.total_steps, config.tokens_per_step, int(state.step)) as progress,
        ):
            save = partial(save_checkpoint, config, checkpoints, fingerprints)
            state, data_state = run_steps(config, mesh, state, data_state, loader, save, evaluate, log, progress, stop)

    done = int(state.step)
    if data_state is not None:
        console.print(summary_table(config, run.metrics_file, data_state))
    if stop.requested:
        console.print(f"stopped by a signal at step {done}, saved; the same command goes on from here", soft_wrap=True)
        return EXIT_PREEMPTED
    if done < config.total_steps:
        console.print(f"stopped at step {done} of {config.total_steps}, as train.stop_at_step says", soft_wrap=True)
    return EXIT_DONE


def run_steps(config: RunConfig, mesh, state, data_state, loader, save, evaluate, log, progress, stop):
    """Next batch, step, log, evaluate, save, stop: until the budget, stop_at_step or a signal. Returns the last states."""
    train_step = jit_train_step(config, mesh)
    end = min(config.total_steps, config.train.stop_at_step or config.total_steps)
    waiting = None  # a step's metrics are read while the next one runs, so that the device never waits for the host
    for step in range(int(state.step) + 1, end + 1):
        batch, data_state = next(loader)
        state, metrics = train_step(state, to_device(batch, mesh, PartitionSpec(BATCH_AXES)))
        if waiting:
            report(config, log, progress, *waiting)
        waiting = step, metrics
        if step == config.total_steps or (config.eval.every_steps and step % config.eval.every_steps == 0):
            log.write("eval", step, **evaluate(state.params))
        if step == end or step % config.checkpoint.every_steps == 0 or stop.requested:
            save(state, data_state)
        if stop.requested:
            break
    if waiting:
        report(config, log, progress, *waiting)
    return state, data_state


def save_checkpoint(config: RunConfig, checkpoints: Checkpoints, fingerprints: dict, state: TrainState, data_state):
    tokens = int(state.step) * config.tokens_per_step
    checkpoints.save(state, data_state, {"config": to_tree(config), "tokens": tokens, **fingerprints})


def select_devices(config: RunConfig):
    """Simulate CPU devices when the config asks for them; must run before jax first looks for devices."""
    if config.mesh.cpu_devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", config.mesh.cpu_devices)


def open_catalog(run: RunDirectory, config: RunConfig) -> Catalog:
    """The catalog of the sources as they are now; refused when the run began with other files."""
    fresh = build_catalog(config.data)
    if run.catalog_file.exists():
        Catalog.load(run.catalog_file).check(fresh)
    return fresh


def restore_or_init(
    config, mesh, checkpoints: Checkpoints, fingerprints, console
) -> tuple[TrainState, np.ndarray | None]:
    """The newest checkpoint's state on this mesh, or a fresh one (from `init_from` where given) and no data state."""
    shardings = state_shardings(config, mesh)
    step = checkpoints.latest_step()
    if step is not None:
        shapes = jax.eval_shape(lambda p: init_state(p, config), abstract_params(config.model, mesh))
        abstract = jax.tree.map(
            lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), shapes, shardings
        )
        state, data_state, info = checkpoints.restore(step, abstract)
        for what, value in fingerprints.items():
            if info[what] != value:
                raise ConfigError(
                    f"{config.run_dir}: the {what} is not the one that the checkpoint of step {step} was made with"
                )
        console.print(f"resumed from the checkpoint of step {step}", highlight=False)
        return state, data_state
    if config.init_from:
        abstract = abstract_params(config.model, mesh)
        params = load_params(config.init_from, abstract)
        console.print(f"parameters taken from {config.init_from}")
        return jax.jit(partial(init_state, config=config), out_shardings=shardings, donate_argnums=0)(params), None
    fresh = jax.jit(lambda: init_state(init_params(config.model, config.train.seed), config), out_shardings=shardings)
    return fresh(), None


def report(config: RunConfig, log: MetricsLog, progress: ProgressLine, step: int, metrics):
    """Log one finished step; stop the run when too many in a row changed nothing."""
    values = step_metrics(metrics, list(config.data.sources))
    rate = progress.update(step, values["loss"])
    if step % config.train.log_every_steps == 0:
        log.write(
            "train", step, tokens=step * config.tokens_per_step, tokens_per_second=rate and round(rate, 1), **values
        )
    if int(metrics["skipped_in_a_row"]) >= config.train.max_skipped_in_a_row:
        raise TrainingStopped(
            f"the loss or gradient was not finite in {config.train.max_skipped_in_a_row} steps in a row, up to step {step}; "
            "parameters are unchanged since. Lower optimizer.learning_rate or look at the data, then run again: it resumes "
            "from the newest checkpoint"
        )


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
