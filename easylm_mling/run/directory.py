"""The directory of a run: its files, and the check that this config may continue it.

RUN/config.yaml      the resolved config, written once
   /format.json      which format all of this has
   /catalog.json     the files of every source and how they are cut
   /estimates.json   tokens per byte of every language, by a sample
   /tokenizer/       the tokenizer's files, to be exported with the model
   /metrics.jsonl    one line a logged step and one an evaluation, appended; after a resume the last line of a step counts
   /events.jsonl     what happened to the run and when, appended; see monitoring/events.py
   /tensorboard/, /wandb/, /profile/, /report.html   if asked for; see monitoring/trackers.py, monitoring/profiler.py and report/
   /quarantine.jsonl bad records; quarantine-of-process-N.jsonl those met by process N of several
   /plan.json        what `plan --keep` said of this run before it began; calibration.json: how it compared (plan/calibrate.py)
   /ledger.json      what was consumed of every source and language, written when a process ends
   /data_states/     the mixer's state at every checkpoint, for `data audit`; see data/state_archive.py
   /checkpoints/     see checkpoint/checkpoint.py; set-aside/ those that were damaged or rewound
   /rewinds.jsonl    see run/rewind.py
   /history.jsonl    see run/changes.py
   /launch/, logs/   of tpu_scripts: its state, and what every worker printed
   /lease            which process trains the run, locked while it does

After `--accept-data-change`, NAME-to-step-N is what config.yaml, catalog.json and tokenizer/ were up to step N.

Of a run in a bucket (`run_dir=gs://BUCKET/PATH`) all this lies in the bucket; storage/object_store.py says how it comes there.
"""

import fcntl
import os
import shutil
import socket
import sys
from collections.abc import Collection
from pathlib import Path
from typing import TextIO

from easylm_mling.checkpoint.layout import ASIDE, checkpoints_folder
from easylm_mling.config import Change, RunConfig, differences, load_kept, to_yaml
from easylm_mling.data.tokenization.files import TOKENIZER_FOLDER, copy_tokenizer
from easylm_mling.errors import ConfigError, one_line
from easylm_mling.monitoring.events import read_event_log
from easylm_mling.run.batch_size import with_past
from easylm_mling.storage.atomic import atomic_directory, write_atomically
from easylm_mling.storage.jsonl import read_jsonl
from easylm_mling.storage.lease import LOCK, Lease, file_store
from easylm_mling.storage.object_store import (
    CONFIG,
    Bucket,
    Mirror,
    check_run_format,
    is_bucket,
    local_folder,
    write_run_format,
)

# What may lie in a directory that no run has begun in.
NOT_OF_A_RUN = {"plan.json", "lease", f"lease{LOCK}", "launch", "logs"}
# Events that are written only once a step is done.
_AFTER_A_STEP = {"first_step", "progress", "saved", "restored", "rewound", "skipped"}


class RunDirectory:
    """Opens or makes `config.run_dir`; raises ConfigError when it holds something else than this run.

    With `accept_data_change`, other sources or another tokenizer are not something else; neither are other values of the
    keys `change`, and `changes` says which differ. Of several processes only the first, number 0, `writes`. `config` has
    what the run's past adds to it (run/batch_size.py). `name` is what the config calls the directory, where the checkpoints
    lie; all other files are below `path`.
    """

    def __init__(
        self, config: RunConfig, accept_data_change: bool = False, process: int = 0, change: Collection[str] = ()
    ):
        self.name, self.writes, self._stuck_seconds = config.run_dir, process == 0, config.checkpoint.stuck_minutes * 60
        self._lock: TextIO | None = None
        self._lease: Lease | None = None
        self.mirror: Mirror | None = None
        in_bucket = is_bucket(config.run_dir)
        self.path = local_folder(config.run_dir.rstrip("/"), process) if in_bucket else Path(config.run_dir)
        self.config_file = self.path / CONFIG
        self.catalog_file = self.path / "catalog.json"
        self.estimates_file = self.path / "estimates.json"
        self.ledger_file = self.path / "ledger.json"
        self.states_dir = self.path / "data_states"
        self.metrics_file = self.path / "metrics.jsonl"
        self.events_file = self.path / "events.jsonl"
        self.rewinds_file = self.path / "rewinds.jsonl"
        self.history_file = self.path / "history.jsonl"
        self.quarantine_file = self.path / "quarantine.jsonl"
        self.tokenizer_dir = self.path / TOKENIZER_FOLDER
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"run_dir={self.path} is a file; name a directory")
        if strange := sorted(set(config.run_dir) & set("[]*?")):
            raise ConfigError(
                f"run_dir={config.run_dir}: {' '.join(strange)} in its name would be read as a pattern, and its checkpoints "
                "not be seen again; choose a name without []*?"
            )
        self.data_settings_changed = self.begins_anew = False
        self.changes: list[Change] = []
        self.config = config
        if in_bucket:
            # This machine's own copy of the small files: no other process here may have it at the same time.
            self.path.parent.mkdir(parents=True, exist_ok=True)
            bucket = Bucket(config.run_dir)
            self._take_lock(open(self.path.with_name(f"{self.path.name}.lock"), "a+"))
            self.mirror = Mirror(bucket, self.path)
        try:
            self._check_directory(config, accept_data_change, change)
        except ConfigError:
            self._unlock()
            raise

    def _check_directory(self, config: RunConfig, accept_data_change: bool, change: Collection[str]):
        if self.mirror:
            there = _pulled(self.mirror)
        else:
            there = [p.name for p in self.path.iterdir()] if self.path.is_dir() else []
        if self.config_file.is_file():
            check_run_format(self.path, self.name)
            self._check_same_run(config, accept_data_change, change)
        # In a bucket, a first push that was killed leaves files, and the lease.
        elif {n.split("/")[0] for n in there} - NOT_OF_A_RUN and not (self.mirror and "lease" in there):
            raise ConfigError(f"run_dir={self.name} is not empty and holds no run; name a new directory")

    def take_lease(self):
        """Make the directory, and keep every other trainer out of it until this object or its process is gone.

        Raises ConfigError if another has it: by a lock of the file system, or where there is none by a lease (storage/lease.py).
        """
        if self.writes and self.mirror:
            self._take_lease(self.mirror.bucket.store)
        elif self.writes:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                file = open(self.path / "lease", "a+")
            except OSError as error:
                raise ConfigError(
                    f"run_dir={self.name}: cannot be written to ({one_line(error)}); name a directory that can"
                ) from error
            try:
                self._take_lock(file)
            except OSError:  # a file system without locks
                self._take_lease(file_store(self.path))

    def push(self):
        """Of a run in a bucket: bring there what was written so far."""
        if self.mirror:
            self.mirror.push()

    def begun(self):
        """All that others need of a run that begins is written: from now on it is also pushed by and by."""
        if self.mirror:
            self.mirror.push()
            self.mirror.start()

    def close(self):
        """Push what is left, and give the lease back."""
        if self.mirror:
            try:
                self.mirror.close()
            except OSError as error:
                print(f"warning: the end of the record is not in the bucket ({error})", file=sys.stderr)
        if self._lease:
            self._lease.release()
        self._unlock()

    def _unlock(self):
        if self._lock:
            self._lock.close()

    def _take_lock(self, file: TextIO):
        self._lock = file
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.seek(0)
            owner = self._lock.read(200).strip()
            self._lock.close()
            raise ConfigError(
                f"run_dir={self.name} is being trained by {owner}; wait for it, stop it, or choose another run_dir"
            ) from None
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._lock.flush()

    def _take_lease(self, store):
        self._lease = Lease(store, self.name, self._stuck_seconds)
        self._lease.take()

    def write_start(self, config: RunConfig):
        """Make the directory and put the config and the tokenizer's files into it (a second time: nothing to do)."""
        if not self.writes:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        if self.begins_anew:
            self._begin_anew()
        # The config comes before all that needs it: it is what makes the directory this run's, should anything be killed in between.
        if not self.config_file.exists():
            write_run_format(self.path)
            write_atomically(self.config_file, to_yaml(config).encode())
        if not self.tokenizer_dir.exists():
            with atomic_directory(self.tokenizer_dir) as partial:
                copy_tokenizer(Path(config.data.tokenizer), partial)

    def set_aside_path(self, path: Path, step: int) -> Path:
        """Where what `path` was up to the checkpoint of `step` lies now."""
        aside = path.with_name(f"{path.stem}-to-step-{step}{path.suffix}")
        return aside if aside.exists() else path

    def set_aside(self, step: int):
        """Copy what other data than before will replace. What a killed process set aside at this step stays."""
        for path in (self.config_file, self.catalog_file):
            if path.exists() and self.set_aside_path(path, step) == path:
                write_atomically(path.with_name(f"{path.stem}-to-step-{step}{path.suffix}"), path.read_bytes())
        if self.tokenizer_dir.exists() and self.set_aside_path(self.tokenizer_dir, step) == self.tokenizer_dir:
            self.tokenizer_dir.rename(self.tokenizer_dir.with_name(f"{self.tokenizer_dir.name}-to-step-{step}"))
        elif self.tokenizer_dir.exists():
            shutil.rmtree(self.tokenizer_dir)

    def _has_begun(self) -> bool:
        """Whether any step may have been done: if one of the files that tell of steps is there and not empty."""
        logs = (self.metrics_file, self.rewinds_file)
        kept = (self.states_dir, checkpoints_folder(self.name), checkpoints_folder(self.name).parent / ASIDE)
        if any(_tells_of_steps(file) for file in logs):
            return True
        if any(event["event"] in _AFTER_A_STEP for event in read_event_log(self.events_file)):
            return True
        return any(folder.exists() and any(folder.iterdir()) for folder in kept)

    def _begin_anew(self):
        """Leave out what a start without a step wrote by its config; it is made again from the new one."""
        if self._has_begun():
            raise ConfigError(f"run_dir={self.name} has just been begun by another process; choose another run_dir")
        for file in (self.config_file, self.catalog_file, self.estimates_file):
            file.unlink(missing_ok=True)
        shutil.rmtree(self.tokenizer_dir, ignore_errors=True)

    def replace_config(self, config: RunConfig):
        write_atomically(self.config_file, to_yaml(config).encode())

    def _check_same_run(self, config: RunConfig, accept_data_change: bool, change: Collection[str]):
        kept = load_kept(self.config_file)
        config = self.config = with_past(config, kept)
        changes = [change for change in differences(kept, config) if not change.setting.free]
        # 0 stands for a number of lanes.
        changes = [c for c in changes if c.key != "data.lanes" or kept.lanes != config.lanes]
        if accept_data_change:
            self.data_settings_changed = any(change.setting.data for change in changes)
            changes = [change for change in changes if not change.setting.data]
        self.changes = [c for c in changes if c.key in change]
        changes = [c for c in changes if c.key not in change]
        if changes:
            reasons = [f" ({c.setting.reason})" if c.setting.reason else "" for c in changes]
            listed = [f"{c.key} was {c.old}, now {c.new}{why}" for c, why in zip(changes, reasons, strict=True)]
            more = f"; and {len(changes) - 5} more" if len(changes) > 5 else ""
            if not self._has_begun():
                # A first start that failed, or was stopped before a step: nothing was made with the old config.
                self.begins_anew = True
                return
            way = ", or go on with --accept-data-change" if all(c.setting.data for c in changes) else ""
            if all(c.setting.change for c in changes):
                way = ", or go on with " + " ".join(f"--change {c.key}={c.new}" for c in changes)
            raise ConfigError(
                f"run_dir={self.name} belongs to a run with another config: {'; '.join(listed[:5])}{more}. "
                f"Choose another run_dir (with init_from to start from this run's parameters), or restore the old values{way}"
            )


def _tells_of_steps(file: Path) -> bool:
    """Whether a line of the log is about a step that was done."""
    steps = (line.get("step") for line in read_jsonl(file)) if file.exists() else ()
    return any(isinstance(step, int) and step > 0 for step in steps)


def _pulled(mirror: Mirror) -> list[str]:
    try:
        return mirror.pull(to_train=True)
    except OSError as error:
        raise ConfigError(
            f"run_dir={mirror.bucket.url}: cannot be read ({error}); see that the bucket exists, and that your credentials allow "
            "to read and write there"
        ) from error
