"""The shape of a model, in the names of Hugging Face's `config.json`."""

import math
from dataclasses import dataclass, fields

from easylm_mling.config.basics import setting
from easylm_mling.errors import check


@dataclass(frozen=True)
class Family:
    """What every model of one `model_type` has, and which optional fields of ModelConfig it may set."""

    # A norm behind attention and behind the MLP too, each before its sum with the residual stream.
    post_norms: bool = False
    # Queries and keys are normed over head_dim before the rotary embedding.
    qk_norm: bool = False
    # A norm multiplies by this plus its weight.
    norm_offset: float = 1.0
    # Embeddings are multiplied by sqrt(hidden_size).
    scaled_embedding: bool = True
    activation: str = "gelu_pytorch_tanh"
    may_set: tuple[str, ...] = ()


_LOCAL = ("query_pre_attn_scalar", "sliding_window", "sliding_window_pattern", "final_logit_softcapping")
FAMILIES = {
    "gemma": Family(),
    "gemma2": Family(post_norms=True, may_set=(*_LOCAL, "attn_logit_softcapping")),
    "gemma3_text": Family(post_norms=True, qk_norm=True, may_set=(*_LOCAL, "rope_local_base_freq", "rope_scaling")),
    "llama": Family(
        norm_offset=0.0, scaled_embedding=False, activation="silu", may_set=("rope_scaling", "tie_word_embeddings")
    ),
}


@dataclass(frozen=True)
class RopeScaling:
    """Rotary frequencies for texts longer than those of the first training.

    linear: all are divided by `factor`. llama3: those of long waves are divided, those of short waves stay, and between the
    two (set by `low_freq_factor` and `high_freq_factor`) the change is smooth.
    """

    rope_type: str = setting(help="linear or llama3")
    factor: float = setting(help="what frequencies are divided by")
    low_freq_factor: float = setting(1.0, "llama3: waves that are divided whole", unit="waves in the original length")
    high_freq_factor: float = setting(4.0, "llama3: waves that stay", unit="waves in the original length")
    original_max_position_embeddings: int = setting(8192, "llama3: the length of the first training", unit="tokens")

    def __post_init__(self):
        key = "model.rope_scaling"
        check(
            self.rope_type in ("linear", "llama3"), f"{key}.rope_type={self.rope_type!r} must be 'linear' or 'llama3'"
        )
        check(math.isfinite(self.factor) and self.factor >= 1, f"{key}.factor={self.factor} must be at least 1")
        check(
            0 < self.low_freq_factor < self.high_freq_factor and self.original_max_position_embeddings > 0,
            f"{key}: low_freq_factor must be positive and less than high_freq_factor",
        )


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a Gemma 1, 2 or 3 (text) or Llama decoder, in the names of Hugging Face's `config.json`."""

    vocab_size: int = setting(help="rows of the embedding")
    hidden_size: int = setting(help="width of the residual stream")
    intermediate_size: int = setting(help="width of the MLP")
    num_hidden_layers: int = setting(help="layers")
    num_attention_heads: int = setting(help="query heads of a layer")
    num_key_value_heads: int = setting(help="key and value heads of a layer; they divide the query heads")
    head_dim: int = setting(help="width of a head, even")
    model_type: str = setting("gemma", "the family: gemma, gemma2, gemma3_text or llama")
    max_position_embeddings: int = setting(8192, "the longest sequence", unit="tokens")
    rms_norm_eps: float = setting(1e-6, "added to the mean square in a norm")
    rope_theta: float = setting(10_000.0, "the rotary base")
    initializer_range: float = setting(0.02, "standard deviation of fresh parameters")
    pad_token_id: int = setting(0, "-1: none")
    eos_token_id: int = setting(1, "ends every document")
    bos_token_id: int = setting(2, "begins every document")
    query_pre_attn_scalar: int | None = setting(
        None, "attention scores are divided by its square root; null: by that of head_dim"
    )
    sliding_window: int | None = setting(
        None, "in a local layer a position sees itself and the sliding_window - 1 before it", unit="tokens"
    )
    sliding_window_pattern: int = setting(1, "every so many-th layer is global")
    attn_logit_softcapping: float | None = setting(None, "attention scores x become cap * tanh(x / cap)")
    final_logit_softcapping: float | None = setting(None, "logits x become cap * tanh(x / cap)")
    rope_local_base_freq: float | None = setting(None, "the rotary base of local layers; null: rope_theta")
    rope_scaling: RopeScaling | None = setting(None, "of global layers only")
    tie_word_embeddings: bool = setting(True, "the output head is the embedding")

    def __post_init__(self):
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"):
            check(getattr(self, name) > 0, f"model.{name}={getattr(self, name)} must be positive")
        # Far beyond every model there is: what a stranger's file asks for must not be what fills the memory.
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "head_dim"):
            check(getattr(self, name) <= 1 << 24, f"model.{name}={getattr(self, name)} must be at most {1 << 24}")
        check(self.num_hidden_layers <= 4096, f"model.num_hidden_layers={self.num_hidden_layers} must be at most 4096")
        check(
            self.model_type in FAMILIES,
            f"model.model_type={self.model_type!r} is not supported; use one of {', '.join(FAMILIES)}",
        )
        check(self.head_dim % 2 == 0, f"model.head_dim={self.head_dim} must be even for rotary embeddings")
        check(
            self.num_key_value_heads > 0 and self.num_attention_heads % self.num_key_value_heads == 0,
            f"model.num_attention_heads={self.num_attention_heads} must be a multiple of "
            f"model.num_key_value_heads={self.num_key_value_heads}",
        )
        self._check_family()

    def _check_family(self):
        may_set = {name for family in FAMILIES.values() for name in family.may_set}
        defaults = {f.name: f.default for f in fields(self)}
        for name in sorted(may_set - set(self.family.may_set)):
            check(
                getattr(self, name) == defaults[name],
                f"model.{name}={getattr(self, name)} does not exist in model_type={self.model_type!r}; leave it out",
            )
        for name in ("query_pre_attn_scalar", "sliding_window", "attn_logit_softcapping", "final_logit_softcapping"):
            value = getattr(self, name)
            check(value is None or value > 0, f"model.{name}={value} must be positive, or null for none")
        check(
            self.sliding_window_pattern > 0 and (self.sliding_window is None) == (self.sliding_window_pattern == 1),
            f"model.sliding_window={self.sliding_window} and model.sliding_window_pattern={self.sliding_window_pattern} "
            "belong together: give a window and a pattern of at least 2, or neither",
        )
        check(
            self.rope_scaling is None or self.model_type != "gemma3_text" or self.rope_scaling.rope_type == "linear",
            "model.rope_scaling.rope_type must be 'linear' in model_type='gemma3_text'",
        )

    @property
    def family(self) -> Family:
        return FAMILIES[self.model_type]

    @property
    def query_scale(self) -> float:
        return (self.query_pre_attn_scalar or self.head_dim) ** -0.5

    @property
    def local_layers(self) -> tuple[bool, ...]:
        """For each layer, whether it sees only the sliding window."""
        return tuple((i + 1) % self.sliding_window_pattern != 0 for i in range(self.num_hidden_layers))
