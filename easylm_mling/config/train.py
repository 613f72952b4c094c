"""Training: how much, in which portions, and by which optimizer."""

import math
from dataclasses import dataclass
from itertools import pairwise

from easylm_mling.config.basics import Duration, setting
from easylm_mling.errors import check

# What a layer keeps for its backward pass; model/decoder.py says what each name means.
REMAT_NAMES = ("full", "save_attention", "save_out", "save_qkv", "save_dots", "none")
OFFLOAD_NAMES = ("attention", "o", "q", "k", "v", "gate", "up")
EIGHT_BITS = ("int8", "fp8")


@dataclass(frozen=True)
class EarlierBatchSize:
    """The batch size of a run up to a step at which it was changed."""

    until_step: int = setting(help="last step of this size")
    batch_size: int = setting(help="sequences a step")


@dataclass(frozen=True)
class EmaConfig:
    """A running average of the parameters beside them, after every step."""

    decay: float | None = setting(
        None, "share of the average that a step keeps, such as 0.999: an exponential average. null: the plain mean"
    )
    from_step: int = setting(
        0, "the average begins with the parameters after this step, and is equal to them before", unit="steps"
    )

    def __post_init__(self):
        check(
            self.decay is not None or self.from_step > 0,
            "train.ema: give decay, such as 0.999, or from_step, such as 2000, for the plain mean from there on",
        )
        check(self.decay is None or 0 < self.decay < 1, f"train.ema.decay={self.decay} must be above 0 and below 1")
        check(self.from_step >= 0, f"train.ema.from_step={self.from_step} must be zero or more")


@dataclass(frozen=True)
class ProductsConfig:
    """Products of 8 bits, of the layers' projections with their inputs."""

    forward: str = setting("int8", "operands of the forward pass: int8 or fp8, whichever the chip multiplies faster")
    backward: str | None = setting(
        None, "operands of the gradients of the projections' inputs: int8 or fp8; null: train.compute_dtype"
    )

    def __post_init__(self):
        for name, kind in (("forward", self.forward), ("backward", self.backward)):
            check(
                kind in EIGHT_BITS or (name == "backward" and kind is None),
                f"train.products.{name}={kind!r} must be {' or '.join(map(repr, EIGHT_BITS))}"
                + (", or null" if name == "backward" else "; leave train.products out for neither"),
            )

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of operands, each once."""
        return tuple(dict.fromkeys(kind for kind in (self.forward, self.backward) if kind))

    @property
    def text(self) -> str:
        """What a person reads of them: `int8 products forward`."""
        backward = f", {self.backward} backward" if self.backward else ""
        return f"{self.forward} products forward{backward}"


@dataclass(frozen=True)
class TrainConfig:
    """How much is trained, and in which portions."""

    budget_tokens: int = setting(
        0, "tokens to train on in the whole run; or give budget_epochs", unit="tokens", change=True
    )
    budget_epochs: int = setting(
        0,
        "instead of budget_tokens: how often every document of every source is trained on. Goes with data.weighting.by tokens "
        "or bytes, and is each source's max_epochs. The data is packed once before the run begins, to count its steps",
    )
    counted_tokens: int = setting(
        0, "written by the run itself, when it begins: what budget_epochs comes to, in full rows", free=True
    )
    batch_size: int = setting(
        64,
        "sequences a step, over all devices and accumulation steps. May change to another multiple of data.lanes, which "
        "is the first size if it was not set",
        change=True,
    )
    earlier_batch_sizes: tuple[EarlierBatchSize, ...] = setting(
        (), "written by the run itself, from its checkpoint: the sizes before --change train.batch_size", free=True
    )
    accumulation_steps: int = setting(1, "microbatches of a batch, one after another", free=True)
    seed: int = setting(0, "seed of freshly initialised parameters, and of the dropout of adapters")
    compute_dtype: str = setting(
        "bfloat16",
        "dtype of activations and matrix products: bfloat16 or float32. Products in float32 keep every bit on TPUs and "
        "GPUs, too, and take about six times as long on a TPU",
    )
    products: ProductsConfig | None = setting(
        None,
        "multiply in 8 bits what the layers' attention and MLP project, by Qwix (docs/plan.md): {forward: int8}, and "
        "{forward: int8, backward: int8} for gradients, too. Embedding, head, norms, scores of attention and adapters are "
        "left out, and so are validation and all that is not training; null: all products are in train.compute_dtype",
    )
    float32_reduction: bool = setting(
        False,
        "sum the gradients of the layers' kernels over devices in float32. Those of embedding, head and norms always "
        "are; in bfloat16 a sum over 32 devices has an error of up to 0.65 %",
    )
    remat: str = setting(
        "full",
        "which values of a layer are kept for the backward pass (the rest is computed again): full, save_attention, "
        "save_out, save_qkv, save_dots or none (model/decoder.py). auto: the fastest that fits mesh.slice, by the "
        "compiler; the run keeps it",
        free=True,
    )
    remat_first: str = setting(
        "none",
        "another policy for the first remat_first_layers layers, which keep more: idle memory, spent on speed",
        free=True,
    )
    remat_first_layers: int = setting(0, "number of layers with the policy remat_first", free=True)
    offload: tuple[str, ...] = setting(
        (),
        "values of a layer that wait for the backward pass in the host's memory: any of attention, o, q, k, v, gate and "
        "up. More is kept than fits the device, for transfers that a TPU makes while it computes",
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
    z_loss: float = setting(0.0, "weight of the squared log-normaliser in the loss")
    ema: EmaConfig | None = setting(
        None,
        "a running average of what is trained, in float32 beside it (docs/merge.md): saved, validated, and exported by "
        "`export-hf --ema`; null: none",
    )
    layer_scalars: bool = setting(False, "train the number that multiplies a layer's output, too (Gemma 4)")
    log_every_steps: int = setting(
        1, "write a line of metrics.jsonl at every multiple of this", unit="steps", free=True, outside_step=True
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
        5,
        "skipped steps in a row that stop the run; a step is skipped that is not finite, or a spike",
        free=True,
        outside_step=True,
    )
    digest_every_steps: int = setting(
        0,
        "record digests of the state at every multiple of this, and stop if a step done again gives other ones "
        "(run/replay_check.py): it finds memory and chips that err; 0: never. Costs one read of the state",
        unit="steps",
        free=True,
        outside_step=True,
    )
    stuck_minutes: float = setting(
        30.0,
        "a process that finishes no step (nor the first compilation, nor a save) in this time ends with exit code 85; "
        "0: never",
        unit="minutes",
        free=True,
        outside_step=True,
    )
    rewind: int = setting(0, "go back to the checkpoint of this step, once; 0: do not", free=True, outside_step=True)
    skip_batches: int = setting(
        0, "batches to leave out after the rewind (those of a spike, say)", free=True, outside_step=True
    )
    compiler_flags: dict[str, str] = setting(
        help="XLA flags for the step (`xla_name: 'value'`), over those in training/xla_flags.py",
        free=True,
        factory=dict,
    )
    remat_memory: float = setting(
        0.92,
        "share of a chip's memory that `remat: auto` and `plan --search` may fill",
        free=True,
        outside_step=True,
    )

    def __post_init__(self):
        ends = [0, *(e.until_step for e in self.earlier_batch_sizes)]
        check(
            all(a < b for a, b in pairwise(ends)) and all(e.batch_size > 0 for e in self.earlier_batch_sizes),
            "train.earlier_batch_sizes: is written by the run itself; leave it out",
        )
        for name in ("budget_tokens", "budget_epochs", "counted_tokens"):
            check(getattr(self, name) >= 0, f"train.{name}={getattr(self, name)} must not be negative")
        check(
            (self.budget_tokens > 0) != (self.budget_epochs > 0),
            "train: give one of budget_tokens, such as 1B, and budget_epochs, such as 3",
        )
        for name in ("batch_size", "accumulation_steps", "loss_chunk", "log_every_steps"):
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
    """AdamW and its learning-rate schedule."""

    learning_rate: float = setting(1e-4, "learning rate at the peak", change=True)
    schedule: str = setting(
        "cosine",
        "cosine: linear warm-up, then a half cosine down to the end of the budget. wsd: linear warm-up, then constant, "
        "then a linear decay",
        change=True,
    )
    warmup: Duration = setting(Duration(0, "steps"), "length of the linear warm-up", change=True)
    decay: Duration = setting(
        Duration(0, "steps"), "wsd: length of the linear decay, at the end of the budget", change=True
    )
    final_fraction: float = setting(
        0.1, "learning rate at the end of the budget, as a fraction of the peak", change=True
    )
    beta1: float = setting(0.9, "decay of the first moment")
    beta2: float = setting(0.95, "decay of the second moment")
    epsilon: float = setting(1e-8, "added to the square root of the second moment")
    weight_decay: float = setting(0.1, "decoupled weight decay of kernels; norms have none")
    decay_embedding: bool = setting(False, "decay the embedding, too")
    clip_norm: float = setting(1.0, "largest global norm of a gradient; a larger one is scaled down to it")

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
