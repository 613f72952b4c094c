"""FLOPs that training needs by the model's shape alone, the basis of MFU."""

from easylm_mling.config import ModelConfig
from easylm_mling.model.params import parameter_count


def model_flops(m: ModelConfig, positions: int) -> float:
    """Count the FLOPs of forward and backward pass for one sequence of `positions` tokens.

    Six for each parameter and token, and attention over the pairs that the mask shows. Recomputation does not count, nor
    does an embedding that is only looked up.
    """
    looked_up = 0 if m.tie_word_embeddings else m.vocab_size * m.hidden_size
    width = m.num_attention_heads * m.head_dim
    attention = sum(4 * width * _pairs(positions, m.sliding_window if local else None) for local in m.local_layers)
    return 6.0 * (parameter_count(m) - looked_up) * positions + 3.0 * attention


def _pairs(positions: int, window: int | None) -> float:
    """Count the pairs of a query and a key that it sees; those on the diagonal count half."""
    reach = min(window or positions, positions)
    return positions * reach - reach**2 / 2
