"""Settings of a model's shape, in the names of Hugging Face's `config.json`."""

import math
from dataclasses import dataclass, fields, replace

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
    # Queries, keys and values have biases.
    qkv_bias: bool = False
    # Attention scores are not divided, as the norms of queries and keys carry the scale; values are normed, without a weight;
    # and a layer's output is multiplied by a number of its own.
    gemma4: bool = False
    may_set: tuple[str, ...] = ()

    @property
    def one_window(self) -> bool:
        """True where all layers share one sliding window, if there is one."""
        return "sliding_window" in self.may_set and "sliding_window_pattern" not in self.may_set


_LOCAL = ("query_pre_attn_scalar", "sliding_window", "sliding_window_pattern", "final_logit_softcapping")
_SCALED = ("rope_scaling", "tie_word_embeddings")
_LLAMA = Family(norm_offset=0.0, scaled_embedding=False, activation="silu", may_set=_SCALED)
_WINDOWED = replace(_LLAMA, may_set=(*_SCALED, "sliding_window"))
_GEMMA_4 = Family(
    post_norms=True,
    qk_norm=True,
    norm_offset=0.0,
    gemma4=True,
    may_set=(
        *(
            "sliding_window",
            "sliding_window_pattern",
            "final_logit_softcapping",
            "rope_local_base_freq",
            "rope_scaling",
        ),
        *("global_head_dim", "num_global_key_value_heads", "attention_k_eq_v"),
        *("num_kv_shared_layers", "use_double_wide_mlp", "hidden_size_per_layer_input"),
    ),
)
FAMILIES = {
    "gemma": Family(),
    "gemma2": Family(post_norms=True, may_set=(*_LOCAL, "attn_logit_softcapping")),
    "gemma3_text": Family(post_norms=True, qk_norm=True, may_set=(*_LOCAL, "rope_local_base_freq", "rope_scaling")),
    "gemma4_text": _GEMMA_4,
    "gemma4_unified_text": _GEMMA_4,
    "llama": _LLAMA,
    "mistral": _WINDOWED,
    "qwen2": replace(_WINDOWED, qkv_bias=True),
    "qwen3": replace(_WINDOWED, qk_norm=True),
}
_ROPE_TYPES = ("linear", "llama3", "yarn", "proportional")


@dataclass(frozen=True)
class RopeScaling:
    """Rotary frequencies for texts longer than those of the first training.

    linear: all are divided by `factor`. llama3: low ones are divided, high ones stay, and between `low_freq_factor` and
    `high_freq_factor` the change is smooth. yarn: as llama3 by other bounds, and queries and keys grow too (Peng 2023).
    proportional: all are divided by `factor`, and those behind the first `partial_rotary_factor` of them are 0.
    """

    rope_type: str = setting(help="linear, llama3, yarn or proportional")
    factor: float = setting(help="divisor of the frequencies")
    low_freq_factor: float = setting(
        1.0, "llama3: frequencies below this are divided by the whole factor", unit="waves in the original length"
    )
    high_freq_factor: float = setting(
        4.0, "llama3: frequencies above this stay as they are", unit="waves in the original length"
    )
    original_max_position_embeddings: int = setting(
        8192, "llama3, yarn: sequence length of the first training", unit="tokens"
    )
    beta_fast: float = setting(
        32.0, "yarn: frequencies above this stay as they are", unit="waves in the original length"
    )
    beta_slow: float = setting(
        1.0, "yarn: frequencies below this are divided by the whole factor", unit="waves in the original length"
    )
    attention_factor: float | None = setting(
        None, "yarn: queries and keys are multiplied by this; null: by 0.1 * ln(factor) + 1"
    )
    truncate: bool = setting(True, "yarn: round the bounds outwards to whole dimensions of a head")
    partial_rotary_factor: float = setting(1.0, "proportional: share of the frequencies that are not 0")

    def __post_init__(self):
        key = "model.rope_scaling"
        check(
            self.rope_type in _ROPE_TYPES,
            f"{key}.rope_type={self.rope_type!r} must be one of {', '.join(map(repr, _ROPE_TYPES))}",
        )
        check(math.isfinite(self.factor) and self.factor >= 1, f"{key}.factor={self.factor} must be at least 1")
        check(
            0 < self.low_freq_factor < self.high_freq_factor and self.original_max_position_embeddings > 0,
            f"{key}: low_freq_factor must be positive and less than high_freq_factor",
        )
        check(0 < self.beta_slow < self.beta_fast, f"{key}: beta_slow must be positive and less than beta_fast")
        check(
            self.attention_factor is None or 0 < self.attention_factor < math.inf,
            f"{key}.attention_factor={self.attention_factor} must be positive, or null",
        )
        check(
            0 < self.partial_rotary_factor <= 1
            and (self.partial_rotary_factor == 1 or self.rope_type == "proportional"),
            f"{key}.partial_rotary_factor={self.partial_rotary_factor} must be above 0 and at most 1, and 1 unless "
            "rope_type is 'proportional'",
        )

    @property
    def magnitude(self) -> float:
        """Factor of rotated queries and of rotated keys."""
        if self.rope_type != "yarn":
            return 1.0
        return 0.1 * math.log(self.factor) + 1.0 if self.attention_factor is None else self.attention_factor


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder of one of the families, in the names of Hugging Face's `config.json`."""

    vocab_size: int = setting(help="rows of the embedding")
    hidden_size: int = setting(help="width of the residual stream")
    intermediate_size: int = setting(help="width of the MLP")
    num_hidden_layers: int = setting(help="number of layers")
    num_attention_heads: int = setting(help="query heads of a layer")
    num_key_value_heads: int = setting(help="key and value heads of a layer; must divide the query heads")
    head_dim: int = setting(help="width of a head; must be even")
    model_type: str = setting("gemma", f"family of the model: {', '.join(FAMILIES)}")
    max_position_embeddings: int = setting(8192, "longest sequence", unit="tokens")
    rms_norm_eps: float = setting(1e-6, "added to the mean square in a norm")
    rope_theta: float = setting(10_000.0, "base of the rotary frequencies")
    initializer_range: float = setting(0.02, "standard deviation of freshly initialised parameters")
    pad_token_id: int = setting(0, "token of padding; -1: none")
    eos_token_id: int = setting(1, "token that ends every document; -1: none, and the model cannot be trained")
    bos_token_id: int = setting(
        2, "token that begins every document; -1: none, so the tokenizer's separator does (docs/hf.md)"
    )
    stop_token_ids: tuple[int, ...] = setting(
        (), "tokens that end a generated text besides eos_token_id, such as <end_of_turn>; not used in training"
    )
    query_pre_attn_scalar: int | None = setting(
        None, "attention scores are divided by the square root of this; null: of head_dim"
    )
    sliding_window: int | None = setting(
        None, "in a local layer a position sees itself and the sliding_window - 1 before it", unit="tokens"
    )
    sliding_window_pattern: int = setting(
        1,
        "every layer whose number is a multiple of this is global; in families without it a sliding_window is every layer's",
    )
    attn_logit_softcapping: float | None = setting(None, "cap of attention scores: x becomes cap * tanh(x / cap)")
    final_logit_softcapping: float | None = setting(None, "cap of logits: x becomes cap * tanh(x / cap)")
    rope_local_base_freq: float | None = setting(None, "base of local layers' rotary frequencies; null: rope_theta")
    rope_scaling: RopeScaling | None = setting(None, "rotary frequencies of global layers, for longer texts")
    tie_word_embeddings: bool = setting(True, "use the embedding as the output head")
    global_head_dim: int | None = setting(None, "width of a head in global layers; null: head_dim")
    num_global_key_value_heads: int | None = setting(
        None, "key and value heads of a global layer, with attention_k_eq_v; null: num_key_value_heads"
    )
    attention_k_eq_v: bool = setting(
        False, "global layers have no projection of values: these are the projected keys, normed without a weight"
    )
    num_kv_shared_layers: int = setting(
        0, "so many last layers attend to the keys and values of the last layer of their kind before them"
    )
    use_double_wide_mlp: bool = setting(False, "the MLP of those layers has twice the width")
    hidden_size_per_layer_input: int = setting(0, "width of each layer's own embedding of the token; 0: there is none")

    def __post_init__(self):
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))  # hashable, also from a plain tree
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"):
            check(getattr(self, name) > 0, f"model.{name}={getattr(self, name)} must be positive")
        # Far above every known model: a stranger's file must not fill the memory.
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
        if self.family.gemma4:
            self._check_gemma4()

    def _check_gemma4(self):
        check(
            self.sliding_window is not None and self.num_hidden_layers % self.sliding_window_pattern == 0,
            f"model.num_hidden_layers={self.num_hidden_layers} must be a multiple of model.sliding_window_pattern="
            f"{self.sliding_window_pattern}, and model.sliding_window set: the last layer of a {self.model_type} is global",
        )
        shared, pattern = self.num_kv_shared_layers, self.sliding_window_pattern
        check(
            0 <= shared <= self.num_hidden_layers - pattern and not (shared and self.attention_k_eq_v),
            f"model.num_kv_shared_layers={shared} must leave a whole period of {pattern} layers of model.num_hidden_layers="
            f"{self.num_hidden_layers}, and does not go with attention_k_eq_v",
        )
        own = self.hidden_size_per_layer_input
        check(0 <= own <= 1 << 24, f"model.hidden_size_per_layer_input={own} must be zero or more")
        width, heads = self.global_head_dim, self.num_global_key_value_heads
        check(
            width is None or (0 < width <= 1 << 24 and width % 2 == 0),
            f"model.global_head_dim={width} must be even and positive",
        )
        check(
            heads is None or (self.attention_k_eq_v and heads > 0 and self.num_attention_heads % heads == 0),
            f"model.num_global_key_value_heads={heads} must divide model.num_attention_heads={self.num_attention_heads}, and "
            "needs attention_k_eq_v",
        )

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
            self.family.one_window
            or (
                self.sliding_window_pattern > 0 and (self.sliding_window is None) == (self.sliding_window_pattern == 1)
            ),
            f"model.sliding_window={self.sliding_window} and model.sliding_window_pattern={self.sliding_window_pattern} "
            "belong together: give a window and a pattern of at least 2, or neither",
        )
        check(self.rope_theta > 1, f"model.rope_theta={self.rope_theta} must be more than 1")
        check(
            self.rope_scaling is None or self.model_type != "gemma3_text" or self.rope_scaling.rope_type == "linear",
            "model.rope_scaling.rope_type must be 'linear' in model_type='gemma3_text'",
        )
        check(
            self.rope_scaling is None or (self.rope_scaling.rope_type == "proportional") == self.family.gemma4,
            "model.rope_scaling.rope_type is 'proportional' in Gemma 4, and in no other family",
        )

    @property
    def family(self) -> Family:
        """What every model of its `model_type` has."""
        return FAMILIES[self.model_type]

    @property
    def query_scale(self) -> float:
        """Factor of attention scores."""
        if self.family.gemma4:
            return 1.0
        return (self.query_pre_attn_scalar or self.head_dim) ** -0.5

    @property
    def local_layers(self) -> tuple[bool, ...]:
        """For each layer, True if it sees only the sliding window."""
        if self.family.one_window:
            return (self.sliding_window is not None,) * self.num_hidden_layers
        return tuple((i + 1) % self.sliding_window_pattern != 0 for i in range(self.num_hidden_layers))
