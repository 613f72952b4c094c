"""Every setting of a run as frozen dataclasses, and the one function that fills them: `load`.

YAML files merge left to right, then `key.path=value` arguments. Units are in the names
(`budget_tokens`, `every_steps`). An unknown key is an error that names the nearest known one. This file
knows no jax: a config must load in milliseconds on a laptop.
"""

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

Schema = typing.TypeVar("Schema")

# What a layer keeps for its backward pass; model.py says what each name means.
REMAT_NAMES = ("full", "save_attention", "save_qkv", "save_dots", "none")


class ConfigError(ValueError):
    """A setting is wrong. The message is one line that names the key and the way out."""


def _check(ok: bool, message: str):
    if not ok:
        raise ConfigError(message)


@dataclass(frozen=True)
class Duration:
    """A length of training: written `2000 steps`, `1.5B tokens` or `500M tokens`."""

    amount: int
    unit: str

    def to_steps(self, tokens_per_step: int) -> int:
        """Whole steps that cover this duration (rounded up)."""
        return self.amount if self.unit == "steps" else -(-self.amount // tokens_per_step)

    def __str__(self) -> str:
        return f"{self.amount} {self.unit}"


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a Gemma decoder, in the names of Hugging Face's `config.json`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    model_type: str = "gemma"
    max_position_embeddings: int = 8192
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    initializer_range: float = 0.02
    pad_token_id: int = 0
    eos_token_id: int = 1
    bos_token_id: int = 2

    def __post_init__(self):
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"):
            _check(getattr(self, name) > 0, f"model.{name}={getattr(self, name)} must be positive")
        _check(self.model_type == "gemma", f"model.model_type={self.model_type!r} is not supported; use 'gemma'")
        _check(self.head_dim % 2 == 0, f"model.head_dim={self.head_dim} must be even for rotary embeddings")
        _check(
            self.num_key_value_heads > 0 and self.num_attention_heads % self.num_key_value_heads == 0,
            f"model.num_attention_heads={self.num_attention_heads} must be a multiple of "
            f"model.num_key_value_heads={self.num_key_value_heads}",
        )


@dataclass(frozen=True)
class SourceConfig:
    """One corpus of the mixture.

    A path may hold globs, and `{language}` in place of one whole folder or file name: every match is then a
    language of this source (`data/glot500/{language}/train/data-*.arrow`).
    """

    paths: tuple[str, ...]
    weight: float
    text_column: str = "text"
    # "document": a row is a document. "line": a row is a line, and a blank row ends a document.
    row: str = "document"
    holdout_fraction: float = 0.001
    # A language's share of an epoch is its bytes to this power: 1 keeps natural shares, 0 makes all equal.
    language_temperature: float = 1.0
    # No language is repeated more often than this inside one epoch, whatever the temperature says.
    language_max_repeats: int = 4

    def check(self, name: str):
        key = f"data.sources.{name}"
        _check(bool(self.paths), f"{key}.paths is empty; name at least one file or glob")
        _check(
            math.isfinite(self.weight) and self.weight >= 0,
            f"{key}.weight={self.weight} must be a finite number, zero or more",
        )
        _check(self.row in ("document", "line"), f"{key}.row={self.row!r} must be 'document' or 'line'")
        _check(0 <= self.holdout_fraction < 1, f"{key}.holdout_fraction={self.holdout_fraction} must be in [0, 1)")
        _check(
            0 <= self.language_temperature <= 1,
            f"{key}.language_temperature={self.language_temperature} must be between 0 and 1",
        )
        _check(self.language_max_repeats >= 1, f"{key}.language_max_repeats must be at least 1")


@dataclass(frozen=True)
class DataConfig:
    """What is read, and in which order."""

    tokenizer: str
    sources: dict[str, SourceConfig]
    sequence_length: int = 8192
    # Text is read, shuffled and tokenised in pieces of about this size; it bounds memory and the cost of a resume.
    block_bytes: int = 4_000_000
    seed: int = 0
    # Rows are dealt to this many independent streams. 0: as many as `train.batch_size`. Fixed for a run's life.
    lanes: int = 0
    # More bad records than this share of those read (after the first 1000) stop the run.
    max_bad_fraction: float = 0.01

    def __post_init__(self):
        _check(self.sequence_length >= 8, f"data.sequence_length={self.sequence_length} must be at least 8")
        _check(self.block_bytes >= 1000, f"data.block_bytes={self.block_bytes} must be at least 1000")
        _check(bool(self.sources), "data.sources is empty; name at least one source")
        _check(self.lanes >= 0, f"data.lanes={self.lanes} must be zero or more")
        _check(0 <= self.max_bad_fraction <= 1, f"data.max_bad_fraction={self.max_bad_fraction} must be in [0, 1]")
        for name, source in self.sources.items():
            _check(
                re.fullmatch(r"[\w.-]+", name) is not None,
                f"data.sources: the name {name!r} may only hold letters, digits, '_', '-' and '.'",
            )
            source.check(name)
        _check(
            sum(s.weight for s in self.sources.values()) > 0,
            "data.sources: every weight is 0; give one a positive weight",
        )


@dataclass(frozen=True)
class TrainConfig:
    """How much is trained, and in which portions."""

    budget_tokens: int
    # Sequences a step, over all devices and accumulation steps.
    batch_size: int = 64
    accumulation_steps: int = 1
    seed: int = 0
    compute_dtype: str = "bfloat16"
    # Which values of a layer are kept for the backward pass; the rest is computed again. See REMAT_NAMES.
    remat: str = "full"
    # The vocabulary's logits are computed for this many positions of each sequence at a time.
    loss_chunk: int = 512
    z_loss: float = 0.0
    # Write a line of metrics.jsonl for every step that is a multiple of this.
    log_every_steps: int = 1
    # End this process (with a checkpoint) once the run has reached this step. 0: go on to the budget.
    stop_at_step: int = 0
    # A step whose loss or gradient is not finite changes nothing; this many in a row stop the run.
    max_skipped_in_a_row: int = 5

    def __post_init__(self):
        for name in ("budget_tokens", "batch_size", "accumulation_steps", "loss_chunk", "log_every_steps"):
            _check(getattr(self, name) > 0, f"train.{name}={getattr(self, name)} must be positive")
        _check(
            self.batch_size % self.accumulation_steps == 0,
            f"train.batch_size={self.batch_size} must be a multiple of train.accumulation_steps={self.accumulation_steps}",
        )
        _check(
            self.compute_dtype in ("bfloat16", "float32"),
            f"train.compute_dtype={self.compute_dtype!r} must be 'bfloat16' or 'float32'",
        )
        _check(self.remat in REMAT_NAMES, f"train.remat={self.remat!r} must be one of {', '.join(REMAT_NAMES)}")
        _check(self.z_loss >= 0, f"train.z_loss={self.z_loss} must be zero or more")
        _check(self.stop_at_step >= 0, f"train.stop_at_step={self.stop_at_step} must be zero or more")
        _check(self.max_skipped_in_a_row > 0, "train.max_skipped_in_a_row must be positive")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its learning-rate schedule.

    cosine: linear warm-up, then a half cosine down to `final_fraction` of the peak at the end of the budget.
    wsd: linear warm-up, then constant, then a linear decay over the last `decay`.
    """

    learning_rate: float = 1e-4
    schedule: str = "cosine"
    warmup: Duration = Duration(0, "steps")
    decay: Duration = Duration(0, "steps")
    final_fraction: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    decay_embedding: bool = False
    clip_norm: float = 1.0

    def __post_init__(self):
        _check(self.schedule in ("cosine", "wsd"), f"optimizer.schedule={self.schedule!r} must be 'cosine' or 'wsd'")
        _check(
            math.isfinite(self.learning_rate) and self.learning_rate > 0,
            f"optimizer.learning_rate={self.learning_rate} must be positive and finite",
        )
        _check(0 <= self.final_fraction <= 1, f"optimizer.final_fraction={self.final_fraction} must be in [0, 1]")
        _check(0 <= self.beta1 < 1 and 0 <= self.beta2 < 1, "optimizer.beta1 and beta2 must be in [0, 1)")
        _check(self.epsilon > 0, f"optimizer.epsilon={self.epsilon} must be positive")
        _check(self.weight_decay >= 0, f"optimizer.weight_decay={self.weight_decay} must be zero or more")
        _check(self.clip_norm > 0, f"optimizer.clip_norm={self.clip_norm} must be positive")


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; one of them may be -1, 'all that are left'."""

    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    # Run on the CPU and simulate this many devices (0: use the accelerators that are there).
    cpu_devices: int = 0

    def __post_init__(self):
        sizes = (self.data, self.fsdp, self.tensor)
        _check(all(s == -1 or s > 0 for s in sizes), "mesh: every axis must be positive, or -1 for all that are left")
        _check(sizes.count(-1) <= 1, "mesh: only one axis may be -1")
        _check(self.cpu_devices >= 0, f"mesh.cpu_devices={self.cpu_devices} must be zero or more")


@dataclass(frozen=True)
class CheckpointConfig:
    """When a checkpoint is written, and which are kept (the newest `keep_last`, and every multiple of `keep_every_steps`)."""

    every_steps: int = 1000
    keep_last: int = 2
    keep_every_steps: int = 0

    def __post_init__(self):
        _check(self.every_steps > 0, f"checkpoint.every_steps={self.every_steps} must be positive")
        _check(self.keep_last > 0, f"checkpoint.keep_last={self.keep_last} must be positive")
        _check(self.keep_every_steps >= 0, f"checkpoint.keep_every_steps={self.keep_every_steps} must be zero or more")


@dataclass(frozen=True)
class EvalConfig:
    """Validation on held-out documents: up to `rows_per_source` sequences of each source, every `every_steps` (0: only at the end)."""

    every_steps: int = 0
    rows_per_source: int = 64

    def __post_init__(self):
        _check(self.every_steps >= 0, f"eval.every_steps={self.every_steps} must be zero or more")
        _check(self.rows_per_source >= 0, f"eval.rows_per_source={self.rows_per_source} must be zero or more")


@dataclass(frozen=True)
class RunConfig:
    """A whole run."""

    run_dir: str
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    # A checkpoint directory (from `import-hf`, or another run) whose parameters this run starts from.
    init_from: str | None = None

    def __post_init__(self):
        _check(
            self.data.sequence_length <= self.model.max_position_embeddings,
            f"data.sequence_length={self.data.sequence_length} is longer than "
            f"model.max_position_embeddings={self.model.max_position_embeddings}",
        )
        _check(
            self.train.batch_size % self.lanes == 0,
            f"train.batch_size={self.train.batch_size} must be a multiple of data.lanes={self.lanes}",
        )
        if self.optimizer.schedule == "wsd":
            _check(
                self.optimizer.decay.to_steps(self.tokens_per_step) <= self.total_steps,
                f"optimizer.decay={self.optimizer.decay} is longer than the run ({self.total_steps} steps)",
            )

    @property
    def lanes(self) -> int:
        return self.data.lanes or self.train.batch_size

    @property
    def tokens_per_step(self) -> int:
        return self.train.batch_size * self.data.sequence_length

    @property
    def total_steps(self) -> int:
        """Steps to the token budget: every row is full, so the last step passes it by less than one batch."""
        return -(-self.train.budget_tokens // self.tokens_per_step)


def load(files: list[str], overrides: Sequence[str] = ()) -> RunConfig:
    """Merge YAML `files` left to right, then `key.path=value` overrides.

    Raises ConfigError (one line) for a missing file, bad YAML, an unknown key or a value of the wrong type.
    """
    merged = OmegaConf.create({})
    try:
        for name in files:
            if not Path(name).is_file():
                raise ConfigError(f"{name}: no such config file")
            part = OmegaConf.load(name)
            if not OmegaConf.is_dict(part):
                raise ConfigError(f"{name}: expected `key: value` lines at the top level")
            merged = OmegaConf.merge(merged, part)
        for item in overrides:
            if not re.match(r"[\w.-]+=", item):
                raise ConfigError(f"{item!r} is not an override; write key.path=value")
        merged = OmegaConf.merge(merged, OmegaConf.from_dotlist(list(overrides)))
        # Not resolved: `${oc.env:...}` in somebody's config would put a secret into the config that a run keeps.
        tree = OmegaConf.to_container(merged, resolve=False)
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError) as error:
        where = getattr(error, "problem_mark", None)
        detail = " ".join(str(error).split())
        raise ConfigError(f"{name if where else 'config'}: cannot be read as YAML: {detail}") from error
    return _build(RunConfig, tree, "")


def to_tree(value):
    """A config as plain dicts, lists and scalars, such that `from_tree(type(c), to_tree(c)) == c`."""
    if isinstance(value, Duration):
        return str(value)
    if dataclasses.is_dataclass(value):
        return {f.name: to_tree(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {k: to_tree(v) for k, v in value.items()}
    if isinstance(value, tuple):
        return [to_tree(v) for v in value]
    return value


def from_tree(schema: type[Schema], tree: dict) -> Schema:
    """The dataclass `schema` from plain dicts; raises ConfigError as `load` does."""
    return _build(schema, tree, "")


def to_yaml(config) -> str:
    return OmegaConf.to_yaml(OmegaConf.create(to_tree(config)))


def differences(old, new) -> dict[str, tuple]:
    """Every `key.path` whose value differs between two configs, with both values."""
    a, b = _flatten(to_tree(old)), _flatten(to_tree(new))
    return {k: (a.get(k), b.get(k)) for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)}


def _flatten(tree, prefix="") -> dict:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        k: v for name, sub in tree.items() for k, v in _flatten(sub, f"{prefix}.{name}" if prefix else name).items()
    }


def _build(kind, value, path) -> typing.Any:
    """`value` (plain YAML) as an instance of the annotated type `kind`, or a ConfigError that names `path`."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _build(next(a for a in args if a is not type(None)), value, path)
    if kind is Duration:
        return _duration(value, path)
    if dataclasses.is_dataclass(kind):
        return _build_dataclass(kind, value, path)
    if origin is dict:
        _check(isinstance(value, dict), f"{path}: expected `name: ...` entries, found {value!r}")
        return {str(k): _build(args[1], v, f"{path}.{k}") for k, v in value.items()}
    if origin is tuple:
        items = value if isinstance(value, list) else [value]
        return tuple(_build(args[0], v, f"{path}[{i}]") for i, v in enumerate(items))
    if kind is bool:
        _check(isinstance(value, bool), f"{path}={value!r} must be true or false")
        return value
    if kind is int:
        return _integer(value, path)
    if kind is float:
        return _number(value, path)
    _check(kind is str, f"{path}: no rule for {kind}")
    _check(isinstance(value, (str, int, float)) and not isinstance(value, bool), f"{path}={value!r} must be text")
    _check("${" not in str(value), f"{path}={value!r}: ${{...}} is not filled in here; write the value itself")
    return str(value)


def _build_dataclass(kind, value, path):
    _check(isinstance(value, dict), f"{path or 'config'}: expected `key: value` lines, found {value!r}")
    hints, fields = typing.get_type_hints(kind), {f.name: f for f in dataclasses.fields(kind)}
    for key in value:
        if key not in fields:
            close = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(fields)}"
            raise ConfigError(f"unknown key {_join(path, key)!r}; {hint}")
    for name, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        _check(name in value or not required, f"{_join(path, name)} is missing; add it to the config")
    return kind(**{k: _build(hints[k], v, _join(path, k)) for k, v in value.items()})


def _join(path, key):
    return f"{path}.{key}" if path else str(key)


def _number(value, path) -> float:
    try:
        return float("not a number" if isinstance(value, bool) else value)
    except (TypeError, ValueError):
        raise ConfigError(f"{path}={value!r} must be a number") from None


_SCALE = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def _integer(value, path) -> int:
    """An int from `4096`, `1_000_000`, `100e9` or `100B`."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    match = re.fullmatch(r"(-?[\d_]*\.?\d+(?:[eE]\+?\d+)?)\s*([KMBT]?)", str(value).strip())
    number = float(match[1].replace("_", "")) * _SCALE[match[2]] if match else math.nan
    _check(
        math.isfinite(number) and number == int(number) and not isinstance(value, bool),
        f"{path}={value!r} must be a whole number such as 4096, 1_000_000 or 100B",
    )
    return int(number)


def _duration(value, path) -> Duration:
    match = re.fullmatch(r"(\S+)\s+(steps?|tokens?)", str(value).strip())
    if match is None:
        raise ConfigError(f"{path}={value!r} must be a length such as '2000 steps' or '1B tokens'")
    amount = _integer(match[1], path)
    _check(amount >= 0, f"{path}={value!r} must not be negative")
    return Duration(amount, match[2].rstrip("s") + "s")
