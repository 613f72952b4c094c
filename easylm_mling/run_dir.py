"""The directory of a run: what lies in it, and whether this config may continue it.

RUN/config.yaml      the resolved config, written once
   /catalog.json     the files of every source and how they are cut
   /tokenizer/       the tokenizer's files, to be exported with the model
   /metrics.jsonl    one line a logged step and one an evaluation, appended; after a resume the last line of a step counts
   /quarantine.jsonl bad records
   /checkpoints/     see checkpoint.py
"""

from pathlib import Path

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
    "data.max_bad_fraction",
    "train.stop_at_step",
    "train.log_every_steps",
    "train.max_skipped_in_a_row",
    "train.remat",
    "train.accumulation_steps",
    "train.loss_chunk",
)


class RunDirectory:
    """Opens or makes `config.run_dir`; raises ConfigError when it holds something else than this run."""

    def __init__(self, config: RunConfig):
        self.path = Path(config.run_dir)
        self.config_file = self.path / "config.yaml"
        self.catalog_file = self.path / "catalog.json"
        self.metrics_file = self.path / "metrics.jsonl"
        self.quarantine_file = self.path / "quarantine.jsonl"
        self.tokenizer_dir = self.path / TOKENIZER_FOLDER
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"run_dir={self.path} is a file; name a directory")
        if self.config_file.is_file():
            self._check_same_run(config)
        elif self.path.is_dir() and any(self.path.iterdir()):
            raise ConfigError(f"run_dir={self.path} is not empty and holds no run; name a new directory")

    def write_start(self, config: RunConfig):
        """Make the directory and put the config and the tokenizer's files into it (a second time: nothing to do)."""
        self.path.mkdir(parents=True, exist_ok=True)
        # The config comes first: it is what makes the directory this run's, should anything be killed in between.
        if not self.config_file.exists():
            write_whole(self.config_file, to_yaml(config).encode())
        if not self.tokenizer_dir.exists():
            with appears_whole(self.tokenizer_dir) as partial:
                copy_tokenizer(Path(config.data.tokenizer), partial)

    def _check_same_run(self, config: RunConfig):
        changed = {
            k: v for k, v in differences(load([str(self.config_file)]), config).items() if not k.startswith(FREE_KEYS)
        }
        if changed:
            shown = "; ".join(f"{key} was {old}, now {new}" for key, (old, new) in list(changed.items())[:5])
            more = f"; and {len(changed) - 5} more" if len(changed) > 5 else ""
            raise ConfigError(
                f"run_dir={self.path} belongs to a run with another config: {shown}{more}. "
                "Choose another run_dir (with init_from to start from this run's parameters), or restore the old values"
            )
