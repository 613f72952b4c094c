"""FLOPs that training needs by the model's shape alone, the basis of MFU."""

from easylm_mling.config import ModelConfig
from easylm_mling.model.params import parameter_count


def model_flops(m: ModelConfig, positions: int) -> float:
    """FLOPs of forward and backward for one sequence of `positions` tokens: six for each parameter and token, and
    attention over the positions that the mask shows (causal, at most the window back). Nothing is counted twice that is
    computed again, and an embedding that is only looked up is not counted."""
    looked_up = 0 if m.tie_word_embeddings else m.vocab_size * m.hidden_size
    width = m.num_attention_heads * m.head_dim
    attention = sum(4 * width * _pairs(positions, m.sliding_window if local else None) for local in m.local_layers)
    return 6.0 * (parameter_count(m) - looked_up) * positions + 3.0 * attention


def _pairs(positions: int, window: int | None) -> float:
    """Pairs of a query and a key that it sees, the diagonal counted half."""
    reach = min(window or positions, positions)
    return positions * reach - reach**2 / 2
