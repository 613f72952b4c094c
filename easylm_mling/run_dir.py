"""The directory of a run: what lies in it, and whether this config may continue it.

RUN/config.yaml      the resolved config, written once
   /catalog.json     the files of every source and how they are cut
   /estimates.json   tokens per byte of every language, by a sample
   /tokenizer/       the tokenizer's files, to be exported with the model
   /metrics.jsonl    one line a logged step and one an evaluation, appended; after a resume the last line of a step counts
   /quarantine.jsonl bad records; quarantine-of-process-N.jsonl those met by process N of several
   /plan.json        what `plan --keep` said of this run before it began; calibration.json: how it compared (plan/calibrate.py)
   /ledger.json      what was consumed of every source and language, written when a process ends
   /data_states/     the mixer's state at every checkpoint, for `data audit`; see data/states.py
   /checkpoints/     see checkpoint.py; set-aside/ those that were damaged or rewound
   /rewinds.jsonl    see rewind.py
   /lease            which process trains the run, locked while it does

After `--accept-data-change`, NAME-to-step-N is what config.yaml, catalog.json and tokenizer/ were up to step N.
"""

import fcntl
import os
import socket
from pathlib import Path
from typing import TextIO

from easylm_mling.atomic import appears_whole, write_whole
from easylm_mling.config import ConfigError, RunConfig, differences, load, to_yaml
from easylm_mling.hf.files import TOKENIZER_FOLDER, copy_tokenizer

# Settings that change how a run is carried out but not what it computes; all others are fixed for a run's life.
FREE_KEYS = (
    "run_dir",
    "init_from",
    "mesh.",
    "checkpoint.",
    "eval.",
    # Only those that have not begun; run_data.py sees to it.
    "data.stages",
    "data.max_bad_fraction",
    "data.token_cache",
    "data.retries",
    "data.retry_seconds",
    "train.stop_at_step",
    "train.log_every_steps",
    "train.max_skipped_in_a_row",
    # What is skipped from here on: a remedy, as a rewind is. Every checkpoint keeps the config that it was made with.
    "train.spike_sigmas",
    "train.stuck_minutes",
    "train.digest_every_steps",
    "train.rewind",
    "train.skip_batches",
    "train.remat",
    "train.remat_first",
    "train.remat_first_layers",
    "train.attention",
    "train.attention_block",
    "train.accumulation_steps",
    "train.loss_chunk",
    "train.compiler_flags",
)

# What --accept-data-change lets change besides.
DATA_KEYS = ("data.sources.", "data.weighting.", "data.tokenizer")
REASONS = {
    "train.batch_size": "the learning-rate schedule and the budget count steps of the old size",
    "data.lanes": "every lane reads its own blocks",
}


class RunDirectory:
    """Opens or makes `config.run_dir`; raises ConfigError when it holds something else than this run.

    With `accept_data_change`, other sources or another tokenizer are not something else. Of several processes only one
    `writes`.
    """

    def __init__(self, config: RunConfig, accept_data_change: bool = False, writes: bool = True):
        self.path, self.writes = Path(config.run_dir), writes
        self._lease: TextIO | None = None
        self.config_file = self.path / "config.yaml"
        self.catalog_file = self.path / "catalog.json"
        self.estimates_file = self.path / "estimates.json"
        self.ledger_file = self.path / "ledger.json"
        self.states_dir = self.path / "data_states"
        self.metrics_file = self.path / "metrics.jsonl"
        self.rewinds_file = self.path / "rewinds.jsonl"
        self.quarantine_file = self.path / "quarantine.jsonl"
        self.tokenizer_dir = self.path / TOKENIZER_FOLDER
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"run_dir={self.path} is a file; name a directory")
        self.data_settings_changed = False
        if self.config_file.is_file():
            self._check_same_run(config, accept_data_change)
        elif self.path.is_dir() and any(p.name not in ("plan.json", "lease") for p in self.path.iterdir()):
            raise ConfigError(f"run_dir={self.path} is not empty and holds no run; name a new directory")

    def take_lease(self):
        """Make the directory, and keep every other trainer out of it until this object or its process is gone.

        Raises ConfigError if another has it. On a file system without locks nothing is kept out.
        """
        if not self.writes:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        self._lease = open(self.path / "lease", "a+")
        try:
            fcntl.flock(self._lease, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lease.seek(0)
            owner = self._lease.read(200).strip()
            self._lease.close()
            raise ConfigError(
                f"run_dir={self.path} is being trained by {owner}; wait for it, stop it, or choose another run_dir"
            ) from None
        except OSError:
            return
        self._lease.truncate(0)
        self._lease.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._lease.flush()

    def close(self):
        """Give the lease back."""
        if self._lease:
            self._lease.close()

    def write_start(self, config: RunConfig):
        """Make the directory and put the config and the tokenizer's files into it (a second time: nothing to do)."""
        if not self.writes:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        # The config comes first: it is what makes the directory this run's, should anything be killed in between.
        if not self.config_file.exists():
            write_whole(self.config_file, to_yaml(config).encode())
        if not self.tokenizer_dir.exists():
            with appears_whole(self.tokenizer_dir) as partial:
                copy_tokenizer(Path(config.data.tokenizer), partial)

    def set_aside_path(self, path: Path, step: int) -> Path:
        """Where what `path` was up to the checkpoint of `step` lies now."""
        aside = path.with_name(f"{path.stem}-to-step-{step}{path.suffix}")
        return aside if aside.exists() else path

    def set_aside(self, step: int):
        """Copy what other data than before will replace. What a killed process set aside at this step stays."""
        for path in (self.config_file, self.catalog_file):
            if path.exists() and self.set_aside_path(path, step) == path:
                write_whole(path.with_name(f"{path.stem}-to-step-{step}{path.suffix}"), path.read_bytes())
        if self.tokenizer_dir.exists() and self.set_aside_path(self.tokenizer_dir, step) == self.tokenizer_dir:
            self.tokenizer_dir.rename(self.tokenizer_dir.with_name(f"{self.tokenizer_dir.name}-to-step-{step}"))

    def replace_config(self, config: RunConfig):
        write_whole(self.config_file, to_yaml(config).encode())

    def _check_same_run(self, config: RunConfig, accept_data_change: bool):
        changed = {
            k: v for k, v in differences(load([str(self.config_file)]), config).items() if not k.startswith(FREE_KEYS)
        }
        if accept_data_change:
            self.data_settings_changed = any(k.startswith(DATA_KEYS) for k in changed)
            changed = {k: v for k, v in changed.items() if not k.startswith(DATA_KEYS)}
        if changed:
            listed = [
                f"{key} was {old}, now {new}" + (f" ({REASONS[key]})" if key in REASONS else "")
                for key, (old, new) in changed.items()
            ]
            more = f"; and {len(changed) - 5} more" if len(changed) > 5 else ""
            way = ", or go on with --accept-data-change" if all(k.startswith(DATA_KEYS) for k in changed) else ""
            raise ConfigError(
                f"run_dir={self.path} belongs to a run with another config: {'; '.join(listed[:5])}{more}. "
                f"Choose another run_dir (with init_from to start from this run's parameters), or restore the old values{way}"
            )
