"""A whole run: model, data, training, optimizer, mesh, checkpoints, evaluation, what is told of it."""

import math
import re
from dataclasses import dataclass

from easylm_mling.config.basics import Duration, setting
from easylm_mling.config.data import DataConfig
from easylm_mling.config.model import ModelConfig
from easylm_mling.errors import check

# What a layer keeps for its backward pass; model/decoder.py says what each name means.
REMAT_NAMES = ("full", "save_attention", "save_out", "save_qkv", "save_dots", "none")
OFFLOAD_NAMES = ("attention", "o", "q", "k", "v", "gate", "up")


@dataclass(frozen=True)
class TrainConfig:
    """How much is trained, and in which portions."""

    budget_tokens: int = setting(help="to train on, in all", unit="tokens")
    batch_size: int = setting(
        64,
        "sequences a step, over all devices and accumulation steps",
        reason="the learning-rate schedule and the budget count steps of the old size",
    )
    accumulation_steps: int = setting(1, "a batch is cut into so many microbatches, one after another", free=True)
    seed: int = setting(0, "of fresh parameters")
    compute_dtype: str = setting("bfloat16", "of activations and products: bfloat16 or float32")
    remat: str = setting(
        "full",
        "which values of a layer are kept for the backward pass, the rest being computed again: full, save_attention, "
        "save_out, save_qkv, save_dots or none (model/decoder.py); auto takes the fastest that fits mesh.slice, by the "
        "compiler, and the run keeps it",
        free=True,
    )
    remat_first: str = setting(
        "none", "another policy for the first layers, which keep more: idle memory, spent on speed", free=True
    )
    remat_first_layers: int = setting(0, "how many layers have the policy remat_first", free=True)
    offload: tuple[str, ...] = setting(
        (),
        "values of a layer that wait for the backward pass in the host's memory, on top of what remat keeps: among "
        "attention, o, q, k, v, gate and up",
        free=True,
    )
    attention: str = setting(
        "auto",
        "auto: JAX's splash kernel on a TPU, chunked attention by XLA elsewhere. Or splash, xla, or cudnn (on a GPU)",
        free=True,
    )
    attention_block: int = setting(1024, "positions in a tile of the splash kernel", free=True)
    loss_chunk: int = setting(
        512, "positions of each sequence whose logits are computed at a time", unit="tokens", free=True
    )
    z_loss: float = setting(0.0, "times the squared log-normaliser is added to the loss")
    log_every_steps: int = setting(
        1, "every multiple of it writes a line of metrics.jsonl", unit="steps", free=True, outside_step=True
    )
    stop_at_step: int = setting(
        0, "end this process, with a checkpoint, at this step; 0: go on to the budget", free=True, outside_step=True
    )
    spike_sigmas: float = setting(
        0.0,
        "a step whose loss or gradient norm is over so many standard deviations above the mean of the last 128 steps "
        "changes nothing (training/spike_guard.py); 0: never. 6 is what others use; what is skipped is not learnt",
        free=True,  # a remedy, as a rewind is; every checkpoint keeps the config that it was made with
    )
    max_skipped_in_a_row: int = setting(
        5, "so many steps in a row that spike or are not finite stop the run", free=True, outside_step=True
    )
    digest_every_steps: int = setting(
        0,
        "every so many steps, digests of the state go to metrics.jsonl, and a step that is done again must give the same: "
        "it finds memory and chips that err; 0: never. Costs one reading of the state",
        unit="steps",
        free=True,
        outside_step=True,
    )
    stuck_minutes: float = setting(
        30.0,
        "a process that finishes no step (nor the first one's compilation, nor a save) in so long ends with exit code 85; "
        "0: never",
        unit="minutes",
        free=True,
        outside_step=True,
    )
    rewind: int = setting(0, "go back to the checkpoint of this step, once", free=True, outside_step=True)
    skip_batches: int = setting(
        0, "leave out so many batches after a rewind (those of a spike, say)", free=True, outside_step=True
    )
    compiler_flags: dict[str, str] = setting(
        help="XLA's own flags for the step (`xla_name: 'value'`), over those in training/xla_flags.py",
        free=True,
        factory=dict,
    )
    remat_memory: float = setting(
        0.92,
        "the share of a chip's memory that `remat: auto` and `plan --search` may fill",
        free=True,
        outside_step=True,
    )

    def __post_init__(self):
        for name in ("budget_tokens", "batch_size", "accumulation_steps", "loss_chunk", "log_every_steps"):
            check(getattr(self, name) > 0, f"train.{name}={getattr(self, name)} must be positive")
        check(self.batch_size <= 1 << 20, f"train.batch_size={self.batch_size} must be at most {1 << 20}")
        check(
            self.batch_size % self.accumulation_steps == 0,
            f"train.batch_size={self.batch_size} must be a multiple of train.accumulation_steps={self.accumulation_steps}",
        )
        check(
            self.compute_dtype in ("bfloat16", "float32"),
            f"train.compute_dtype={self.compute_dtype!r} must be 'bfloat16' or 'float32'",
        )
        for name in ("remat", "remat_first"):
            policy = getattr(self, name)
            allowed = (*REMAT_NAMES, "auto") if name == "remat" else REMAT_NAMES
            check(policy in allowed, f"train.{name}={policy!r} must be one of {', '.join(allowed)}")
        wrong = [name for name in self.offload if name not in OFFLOAD_NAMES]
        check(not wrong, f"train.offload={list(self.offload)}: {wrong} must be among {', '.join(OFFLOAD_NAMES)}")
        check(
            not self.offload or "none" not in (self.remat, *[self.remat_first] * (self.remat_first_layers > 0)),
            "train.offload needs layers that do not keep everything; change train.remat or train.remat_first from none",
        )
        check(self.remat_first_layers >= 0, f"train.remat_first_layers={self.remat_first_layers} must be zero or more")
        check(0 < self.remat_memory <= 1, f"train.remat_memory={self.remat_memory} must be above 0 and at most 1")
        check(
            self.attention in ("auto", "xla", "splash", "cudnn"),
            f"train.attention={self.attention!r} must be 'auto', 'xla', 'splash' or 'cudnn'",
        )
        check(
            self.attention_block >= 128 and self.attention_block.bit_count() == 1,
            f"train.attention_block={self.attention_block} must be a power of two from 128 on",
        )
        check(self.z_loss >= 0, f"train.z_loss={self.z_loss} must be zero or more")
        check(self.stop_at_step >= 0, f"train.stop_at_step={self.stop_at_step} must be zero or more")
        check(
            self.spike_sigmas == 0 or 2 <= self.spike_sigmas < math.inf,
            f"train.spike_sigmas={self.spike_sigmas} must be 0 (no guard) or at least 2; 6 is usual",
        )
        check(self.digest_every_steps >= 0, "train.digest_every_steps must be zero or more")
        check(self.max_skipped_in_a_row > 0, "train.max_skipped_in_a_row must be positive")
        check(self.rewind >= 0, f"train.rewind={self.rewind} must be zero or more")
        check(
            self.skip_batches == 0 or (self.skip_batches > 0 and self.rewind > 0),
            f"train.skip_batches={self.skip_batches} must be zero or more, and needs train.rewind=STEP",
        )
        check(0 <= self.stuck_minutes < math.inf, f"train.stuck_minutes={self.stuck_minutes} must be zero or more")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its learning-rate schedule.

    cosine: linear warm-up, then a half cosine down to `final_fraction` of the peak at the end of the budget.
    wsd: linear warm-up, then constant, then a linear decay over the last `decay`.
    """

    learning_rate: float = setting(1e-4, "at the peak")
    schedule: str = setting("cosine", "cosine or wsd")
    warmup: Duration = setting(Duration(0, "steps"), "linear from zero to the peak")
    decay: Duration = setting(Duration(0, "steps"), "wsd: linear, at the end of the budget")
    final_fraction: float = setting(0.1, "of the peak, at the end of the budget")
    beta1: float = setting(0.9, "of the first moment")
    beta2: float = setting(0.95, "of the second moment")
    epsilon: float = setting(1e-8, "added to the root of the second moment")
    weight_decay: float = setting(0.1, "decoupled; of kernels, and never of norms")
    decay_embedding: bool = setting(False, "also decay the embedding")
    clip_norm: float = setting(1.0, "the largest global norm of a gradient")

    def __post_init__(self):
        check(self.schedule in ("cosine", "wsd"), f"optimizer.schedule={self.schedule!r} must be 'cosine' or 'wsd'")
        check(
            math.isfinite(self.learning_rate) and self.learning_rate > 0,
            f"optimizer.learning_rate={self.learning_rate} must be positive and finite",
        )
        check(0 <= self.final_fraction <= 1, f"optimizer.final_fraction={self.final_fraction} must be in [0, 1]")
        check(0 <= self.beta1 < 1 and 0 <= self.beta2 < 1, "optimizer.beta1 and beta2 must be in [0, 1)")
        check(self.epsilon > 0, f"optimizer.epsilon={self.epsilon} must be positive")
        check(self.weight_decay >= 0, f"optimizer.weight_decay={self.weight_decay} must be zero or more")
        check(self.clip_norm > 0, f"optimizer.clip_norm={self.clip_norm} must be positive")


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; one of them may be -1, 'all that are left'."""

    data: int = setting(1, "copies of the parameters")
    fsdp: int = setting(-1, "devices that each parameter is cut over, to be gathered when it is used")
    tensor: int = setting(1, "devices that heads, MLP and vocabulary are cut over")
    cpu_devices: int = setting(
        0, "run on the CPU and simulate this many devices; 0: use the accelerators that are there"
    )
    slice: str | None = setting(
        None,
        "the TPU slice that the run is meant for: v4-64, or 2xv4-64 for two of them; `plan` and `remat: auto` read it",
    )

    def __post_init__(self):
        sizes = (self.data, self.fsdp, self.tensor)
        check(all(s == -1 or s > 0 for s in sizes), "mesh: every axis must be positive, or -1 for all that are left")
        check(sizes.count(-1) <= 1, "mesh: only one axis may be -1")
        check(0 <= self.cpu_devices <= 1024, f"mesh.cpu_devices={self.cpu_devices} must be between 0 and 1024")


@dataclass(frozen=True)
class CheckpointConfig:
    """When a checkpoint is written, and which are kept (the newest `keep_last`, and every multiple of `keep_every_steps`)."""

    every_steps: int = setting(1000, "a checkpoint is written", unit="steps")
    keep_last: int = setting(2, "the newest so many are kept")
    keep_every_steps: int = setting(0, "and every multiple of this step; 0: none", unit="steps")
    max_failed: int = setting(3, "so many saves in a row that fail (a full disk, say) end the training")
    stuck_minutes: float = setting(
        15.0,
        "a save that has not ended in so long, or a bucket that was out of reach for so long, ends the process with exit "
        "code 85; 0: never",
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
    """Validation on held-out documents: up to `rows_per_source` sequences of each source, every `every_steps` (0: only at the end)."""

    every_steps: int = setting(0, "measure the held-out loss; 0: at the beginning and the end only", unit="steps")
    rows_per_source: int = setting(64, "at most so many held-out sequences of each source")

    def __post_init__(self):
        check(self.every_steps >= 0, f"eval.every_steps={self.every_steps} must be zero or more")
        check(self.rows_per_source >= 0, f"eval.rows_per_source={self.rows_per_source} must be zero or more")


@dataclass(frozen=True)
class LogConfig:
    """Where the lines of metrics.jsonl go besides (monitoring/trackers.py): into RUN/tensorboard; to a project of Weights & Biases."""

    tensorboard: bool = setting(False, "write RUN/tensorboard")
    wandb: str = setting("", "a project's name; its owner is WANDB_ENTITY")

    def __post_init__(self):
        check("/" not in self.wandb, f"log.wandb={self.wandb!r} must be a project's name; its owner is WANDB_ENTITY")


@dataclass(frozen=True)
class ProfileConfig:
    """`steps: 100:105` leaves a trace of these steps, as seen by the first process, in RUN/profile (for XProf)."""

    steps: str = setting("", "FIRST:LAST, such as 100:105")

    def __post_init__(self):
        wrong = f"profile.steps={self.steps} must be FIRST:LAST, such as 100:105; in a file in quotes: YAML takes 1:40 for 100"
        check(not self.steps or re.fullmatch(r"\d{1,9}:\d{1,9}", self.steps) is not None, wrong)
        check(not self.steps or 0 < self.window[0] <= self.window[1], wrong)

    @property
    def window(self) -> tuple[int, int]:
        """The first and the last step, (0, 0) if there are none."""
        first, _, last = self.steps.partition(":")
        return int(first or 0), int(last or 0)


@dataclass(frozen=True)
class MixerConfig:
    """What the mixer needs to know of a run."""

    data: DataConfig
    batch_size: int  # rows a step
    budget_tokens: int

    def __post_init__(self):
        check(
            self.batch_size % self.lanes == 0,
            f"train.batch_size={self.batch_size} must be a multiple of data.lanes={self.lanes}",
        )

    @property
    def lanes(self) -> int:
        return self.data.lanes or self.batch_size

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.data.sequence_length

    @property
    def total_steps(self) -> int:
        """Steps to the token budget: every row is full, so the last step passes it by less than one batch."""
        return -(-self.budget_tokens // self.tokens_per_step)


@dataclass(frozen=True)
class RunConfig:
    """A whole run."""

    run_dir: str = setting(help="the directory of the run, local or gs://BUCKET/PATH", free=True)
    model: ModelConfig = setting(help="the shape of the model")
    data: DataConfig = setting(help="what is read, and in which order")
    train: TrainConfig = setting(help="how much is trained, and in which portions")
    optimizer: OptimizerConfig = setting(OptimizerConfig(), "AdamW and its learning-rate schedule")
    mesh: MeshConfig = setting(MeshConfig(), "devices along each mesh axis", free=True)
    checkpoint: CheckpointConfig = setting(CheckpointConfig(), "when one is written, and which are kept", free=True)
    eval: EvalConfig = setting(EvalConfig(), "validation on held-out documents", free=True)
    log: LogConfig = setting(LogConfig(), "where the lines of metrics.jsonl go besides", free=True)
    profile: ProfileConfig = setting(ProfileConfig(), "a trace of some steps", free=True)
    init_from: str | None = setting(
        None,
        "a checkpoint's directory (from `import-hf`, or another run) whose parameters this run starts from",
        free=True,
    )

    def __post_init__(self):
        check(
            self.data.sequence_length <= self.model.max_position_embeddings,
            f"data.sequence_length={self.data.sequence_length} is longer than "
            f"model.max_position_embeddings={self.model.max_position_embeddings}",
        )
        check(
            self.profile.window[1] <= self.total_steps,
            f"profile.steps={self.profile.steps} goes beyond the run ({self.total_steps} steps)",
        )
        if self.optimizer.schedule == "wsd":
            check(
                self.optimizer.decay.to_steps(self.tokens_per_step) <= self.total_steps,
                f"optimizer.decay={self.optimizer.decay} is longer than the run ({self.total_steps} steps)",
            )

    @property
    def mixer(self) -> MixerConfig:
        return MixerConfig(self.data, self.train.batch_size, self.train.budget_tokens)

    @property
    def lanes(self) -> int:
        return self.mixer.lanes

    @property
    def tokens_per_step(self) -> int:
        return self.mixer.tokens_per_step

    @property
    def total_steps(self) -> int:
        return self.mixer.total_steps
