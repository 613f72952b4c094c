"""LoRA: small trained adapters beside frozen parameters (Hu et al. 2021, arXiv:2106.09685)."""

import difflib
import math
from dataclasses import dataclass

from easylm_mling.config.basics import setting
from easylm_mling.config.model import ModelConfig
from easylm_mling.errors import check

# The matrices of a layer that may have an adapter, by their names in Hugging Face's files.
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class LoraConfig:
    """Adapters beside the frozen parameters of `init_from`: W x becomes W x + scale B A x, and only A and B are trained."""

    rank: int = setting(16, "rows of A and columns of B")
    alpha: float = setting(32.0, "the scale of an adapter is alpha / rank")
    rslora: bool = setting(False, "scale by alpha / sqrt(rank) instead (rsLoRA, arXiv:2312.03732)")
    dropout: float = setting(
        0.0, "share of an adapter's inputs that training sets to zero; validation and text are without"
    )
    projections: tuple[str, ...] = setting(
        PROJECTIONS, f"which matrices of every layer have an adapter: {', '.join(PROJECTIONS)}"
    )
    init_from: str | None = setting(
        None,
        "adapters that this run's begin with: a run with `lora`, or what `import-hf ADAPTER DIR --base` made; of the same "
        "base, rank, alpha and projections",
        free=True,
        path=True,
    )

    def __post_init__(self):
        check(0 < self.rank <= 1 << 16, f"lora.rank={self.rank} must be positive, and at most {1 << 16}")
        check(
            math.isfinite(self.alpha) and self.alpha > 0, f"lora.alpha={self.alpha} must be a positive, finite number"
        )
        check(
            0 <= self.dropout < 1,
            f"lora.dropout={self.dropout} must be zero or more, and below 1: 1 would train nothing",
        )
        check(bool(self.projections), "lora.projections is empty; name some, or leave `lora` out to train everything")
        for name in self.projections:
            close = difflib.get_close_matches(name, PROJECTIONS, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(PROJECTIONS)}"
            check(name in PROJECTIONS, f"lora.projections: no projection {name!r}; {hint}")
        check(
            len(set(self.projections)) == len(self.projections),
            f"lora.projections={list(self.projections)} repeats one",
        )

    @property
    def scale(self) -> float:
        """Factor of an adapter's output."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def check_model(self, m: ModelConfig):
        """Raise ConfigError where the rank is larger than the smaller side of a matrix: the adapter would be no smaller."""
        for name in self.projections:
            side = _smaller_side(m, name)
            check(
                self.rank <= side, f"lora.rank={self.rank} is larger than a side of {name}, which has {side}; lower it"
            )


def _smaller_side(m: ModelConfig, name: str) -> int:
    """Return the smallest side that this projection has in any layer."""
    head_dim = min(m.head_dim, m.global_head_dim or m.head_dim)
    kv_heads = min(m.num_key_value_heads, m.num_global_key_value_heads or m.num_key_value_heads)
    other = {"q_proj": m.num_attention_heads * head_dim, "o_proj": m.num_attention_heads * head_dim}
    other |= dict.fromkeys(("k_proj", "v_proj"), kv_heads * head_dim)
    return min(m.hidden_size, other.get(name, m.intermediate_size))
