"""A whole run: its sections, and the small ones among them: mesh, checkpoints, evaluation, log, profile."""

import math
import re
from dataclasses import dataclass

from easylm_mling.config.basics import setting
from easylm_mling.config.data import DataConfig
from easylm_mling.config.lora import LoraConfig
from easylm_mling.config.model import ModelConfig
from easylm_mling.config.step_tokens import StepTokens
from easylm_mling.config.train import OptimizerConfig, TrainConfig
from easylm_mling.errors import check


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; one of them may be -1, 'all that are left'."""

    data: int = setting(1, "copies of the parameters")
    fsdp: int = setting(-1, "devices that parameters are sharded over, each gathered when it is used")
    tensor: int = setting(1, "devices that heads, MLP and vocabulary are sharded over")
    sequence: int = setting(
        1,
        "devices that the positions of each row are divided over, for long texts (docs/run.md); parameters are sharded over "
        "fsdp x sequence",
    )
    cpu_devices: int = setting(
        0, "run on the CPU and simulate so many devices; 0: use the accelerators of this machine"
    )
    slice: str | None = setting(
        None,
        "TPU slice that the run is meant for: v4-64, or 2xv4-64 for two of them (plan/slices.py); `plan` and "
        "`remat: auto` read it",
    )

    def __post_init__(self):
        sizes = (self.data, self.fsdp, self.tensor)
        check(all(s == -1 or s > 0 for s in sizes), "mesh: every axis must be positive, or -1 for all that are left")
        check(sizes.count(-1) <= 1, "mesh: only one axis may be -1")
        check(self.sequence > 0, f"mesh.sequence={self.sequence} must be positive; 1: every device has whole rows")
        check(0 <= self.cpu_devices <= 1024, f"mesh.cpu_devices={self.cpu_devices} must be between 0 and 1024")


@dataclass(frozen=True)
class CheckpointConfig:
    """When a checkpoint is written, and which are kept."""

    every_steps: int = setting(1000, "write a checkpoint at every multiple of this", unit="steps")
    keep_last: int = setting(2, "newest checkpoints to keep")
    keep_every_steps: int = setting(0, "keep the checkpoints of every multiple of this, too; 0: none", unit="steps")
    keep_best: bool = setting(
        True, "keep the checkpoints that `eval RUN --all` chose as the best, too; not of a run in a bucket"
    )
    max_failed: int = setting(3, "failed saves in a row (a full disk, say) that end the training; fewer are reported")
    stuck_minutes: float = setting(
        15.0,
        "a save that has not ended in this time, or a bucket out of reach for so long, ends the process with exit code "
        "85; 0: never",
        unit="minutes",
    )

    def __post_init__(self):
        check(0 <= self.stuck_minutes < math.inf, f"checkpoint.stuck_minutes={self.stuck_minutes} must be zero or more")
        check(self.every_steps > 0, f"checkpoint.every_steps={self.every_steps} must be positive")
        check(self.keep_last > 0, f"checkpoint.keep_last={self.keep_last} must be positive")
        check(self.max_failed > 0, f"checkpoint.max_failed={self.max_failed} must be positive")
        check(self.keep_every_steps >= 0, f"checkpoint.keep_every_steps={self.keep_every_steps} must be zero or more")


@dataclass(frozen=True)
class EvalConfig:
    """Validation on held-out documents, and scores on tasks, while a run trains."""

    every_steps: int = setting(
        0, "validate at every multiple of this; 0: only at the beginning and the end", unit="steps"
    )
    rows_per_source: int = setting(64, "most held-out sequences of each source")
    suite: str = setting(
        "",
        "suite of tasks (a YAML file, or its name in configs/eval) of which a small fixed part is scored while the run trains; "
        "empty: none",
    )
    suite_data: str | None = setting(
        None, "folder with the suite's data, made by `fetch-eval`; default: the hub or its cache", path=True
    )
    suite_every_steps: int = setting(
        0, "score the suite at every multiple of this; 0: only at the beginning and the end", unit="steps"
    )
    suite_items: int = setting(64, "most items of each row of the suite, evenly spread and always the same")

    def __post_init__(self):
        check(self.every_steps >= 0, f"eval.every_steps={self.every_steps} must be zero or more")
        check(self.rows_per_source >= 0, f"eval.rows_per_source={self.rows_per_source} must be zero or more")
        check(self.suite_every_steps >= 0, f"eval.suite_every_steps={self.suite_every_steps} must be zero or more")
        check(self.suite_items > 0, f"eval.suite_items={self.suite_items} must be positive")
        check(
            bool(self.suite) or not self.suite_every_steps,
            f"eval.suite_every_steps={self.suite_every_steps} needs eval.suite, such as quick",
        )


@dataclass(frozen=True)
class LogConfig:
    """Where the lines of metrics.jsonl go besides (monitoring/trackers.py)."""

    tensorboard: bool = setting(False, "write RUN/tensorboard")
    wandb: str = setting("", "name of a Weights & Biases project; its owner is WANDB_ENTITY")

    def __post_init__(self):
        check("/" not in self.wandb, f"log.wandb={self.wandb!r} must be a project's name; its owner is WANDB_ENTITY")


@dataclass(frozen=True)
class ProfileConfig:
    """A trace of some steps, as seen by the first process, in RUN/profile (for XProf)."""

    steps: str = setting("", "steps to trace, as FIRST:LAST, such as 100:105; empty: none")

    def __post_init__(self):
        wrong = f"profile.steps={self.steps} must be FIRST:LAST, such as 100:105"
        check(not self.steps or re.fullmatch(r"\d{1,9}:\d{1,9}", self.steps) is not None, wrong)
        check(not self.steps or 0 < self.window[0] <= self.window[1], wrong)

    @property
    def window(self) -> tuple[int, int]:
        """The first and the last step; (0, 0) if there are none."""
        first, _, last = self.steps.partition(":")
        return int(first or 0), int(last or 0)


@dataclass(frozen=True)
class MixerConfig:
    """The mixer's part of a run."""

    data: DataConfig
    batch_size: int  # rows a step
    budget_tokens: int  # 0: not known (load_mixer)
    budget_epochs: int = 0  # the data ends after so many, and rows that it does not fill are padding

    def __post_init__(self):
        self.data.check_epochs(self.budget_epochs)
        check(
            self.batch_size % self.lanes == 0,
            f"train.batch_size={self.batch_size} must be a multiple of data.lanes={self.lanes}",
        )

    @property
    def lanes(self) -> int:
        """Independent streams of rows."""
        return self.data.lanes or self.batch_size

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a global batch."""
        return self.batch_size * self.data.sequence_length

    @property
    def total_steps(self) -> int:
        """Steps to the token budget: every row is full, so the last step passes it by less than one batch."""
        return -(-self.budget_tokens // self.tokens_per_step)


@dataclass(frozen=True)
class RunConfig:
    """A whole run."""

    run_dir: str = setting(help="directory of the run, local or gs://BUCKET/PATH", free=True, path=True)
    model: ModelConfig = setting(help="shape of the model")
    data: DataConfig = setting(help="what is read, and in which order")
    train: TrainConfig = setting(help="how much is trained, and in which portions")
    optimizer: OptimizerConfig = setting(OptimizerConfig(), "AdamW and its learning-rate schedule")
    lora: LoraConfig | None = setting(
        None, "adapters beside frozen parameters (docs/tuning.md); null: every parameter is trained"
    )
    mesh: MeshConfig = setting(MeshConfig(), "devices along each mesh axis", free=True)
    checkpoint: CheckpointConfig = setting(
        CheckpointConfig(), "when a checkpoint is written, and which are kept", free=True
    )
    eval: EvalConfig = setting(EvalConfig(), "validation on held-out documents", free=True)
    log: LogConfig = setting(LogConfig(), "where the lines of metrics.jsonl go besides", free=True)
    profile: ProfileConfig = setting(ProfileConfig(), "trace of some steps", free=True)
    init_from: str | None = setting(
        None,
        "checkpoint directory (from `import-hf`, or another run) whose parameters this run starts from; what `model` leaves out "
        "is the checkpoint's, and what it gives must be",
        free=True,
        path=True,
    )

    def __post_init__(self):
        check(
            self.data.sequence_length <= self.model.max_position_embeddings,
            f"data.sequence_length={self.data.sequence_length} is longer than "
            f"model.max_position_embeddings={self.model.max_position_embeddings}",
        )
        for name in ("bos_token_id", "eos_token_id"):
            check(
                getattr(self.model, name) >= 0,
                f"model.{name}={getattr(self.model, name)}: every document has this token; set it to the tokenizer's id",
            )
        self.data.check_epochs(self.train.budget_epochs)
        check(
            not self.budget_tokens or self.profile.window[1] <= self.total_steps,
            f"profile.steps={self.profile.steps} goes beyond the run ({self.total_steps} steps)",
        )
        if self.train.ema and self.budget_tokens:
            check(
                self.train.ema.from_step < self.total_steps,
                f"train.ema.from_step={self.train.ema.from_step} leaves nothing to average: the run has {self.total_steps} steps",
            )
        if self.lora:
            self.lora.check_model(self.model)
            check(
                not self.train.layer_scalars,
                "train.layer_scalars trains numbers of the base, which lora leaves as they are; leave one of them out",
            )
        if self.optimizer.schedule == "wsd" and self.budget_tokens:
            check(
                self.optimizer.decay.to_steps(self.tokens_per_step) <= self.total_steps,
                f"optimizer.decay={self.optimizer.decay} is longer than the run ({self.total_steps} steps)",
            )

    @property
    def mixer(self) -> MixerConfig:
        """The mixer's part of this run."""
        return MixerConfig(self.data, self.train.batch_size, self.budget_tokens, self.train.budget_epochs)

    # A whole run's config may stand where the mixer's part is asked for.

    @property
    def batch_size(self) -> int:
        """As MixerConfig's."""
        return self.train.batch_size

    @property
    def budget_tokens(self) -> int:
        """As MixerConfig's; 0 where those of `train.budget_epochs` are not counted yet."""
        return self.train.budget_tokens or self.train.counted_tokens

    @property
    def lanes(self) -> int:
        """As MixerConfig's."""
        return self.mixer.lanes

    @property
    def tokens_per_step(self) -> int:
        """As MixerConfig's."""
        return self.mixer.tokens_per_step

    @property
    def total_steps(self) -> int:
        """As MixerConfig's, also where the batch size has changed."""
        return self.step_tokens.step_of(self.budget_tokens)

    @property
    def step_tokens(self) -> StepTokens:
        """Tokens after any step: wherever steps become tokens, by this."""
        length = self.data.sequence_length
        earlier = tuple((e.until_step, e.batch_size * length) for e in self.train.earlier_batch_sizes)
        return StepTokens(self.tokens_per_step, earlier)

    def batch_size_at(self, step: int) -> int:
        """Return the rows of the batch of `step`, counted from 1."""
        sizes = (e.batch_size for e in self.train.earlier_batch_sizes if step <= e.until_step)
        return next(sizes, self.train.batch_size)
