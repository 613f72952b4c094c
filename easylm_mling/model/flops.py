"""FLOPs that training needs by the model's shape alone, the basis of MFU."""

from easylm_mling.config import LoraConfig, ModelConfig
from easylm_mling.model.layer_kinds import layer_kinds
from easylm_mling.model.params import looked_up_only, parameter_count, trained_count


def model_flops(m: ModelConfig, positions: int, lora: LoraConfig | None = None) -> float:
    """Count the FLOPs of forward and backward pass for one sequence of `positions` tokens.

    Six for each parameter and token, and attention over the pairs that the mask shows. Recomputation does not count, nor
    does an embedding that is only looked up. Frozen parameters, beside the adapters of `lora`, need no gradient of their own:
    four for each.
    """
    heads = m.num_attention_heads
    attention = sum(4 * heads * kind.head_dim * _pairs(positions, kind.window) for kind in layer_kinds(m))
    in_products = parameter_count(m) - looked_up_only(m)
    whole = 4.0 * in_products + 6.0 * trained_count(m, lora) if lora else 6.0 * in_products
    return whole * positions + 3.0 * attention


def _pairs(positions: int, window: int | None) -> float:
    """Count the pairs of a query and a key that it sees; those on the diagonal count half."""
    reach = min(window or positions, positions)
    return positions * reach - reach**2 / 2
