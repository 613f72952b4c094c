"""The sliding window of `config.json`, in the ways in which each family says which layers have it.

Source: transformers 5.23 and 4.57 `configuration_gemma2.py`, `configuration_gemma3.py`, `configuration_mistral.py`,
`configuration_qwen2.py` and `configuration_qwen3.py`.
"""

from pathlib import Path

from easylm_mling.config import FAMILIES, ModelConfig
from easylm_mling.errors import ConfigError
from easylm_mling.hf.rotary import FULL, SLIDING

# These have a key that switches the window off, and one for the number of layers that stay without it.
_SWITCHED = ("qwen2", "qwen3")


def read_window(file: dict, tree: dict, path: Path) -> dict:
    """Return the sliding window and its pattern, from `layer_types` if the file has them.

    `tree` holds what transformers assumes for keys that the file leaves out. Raises ConfigError for layers of a mixture
    that no setting here means.
    """
    family, kind = FAMILIES[tree["model_type"]], tree["model_type"]
    kinds = file.get("layer_types")
    if kind not in _SWITCHED and file.get("use_sliding_window") is not None:
        window = tree.get("sliding_window") if "sliding_window" in family.may_set else None
        if bool(file["use_sliding_window"]) != (window is not None):
            raise ConfigError(
                f"{path}: use_sliding_window={file['use_sliding_window']!r} does not exist in model_type={kind!r}; leave it "
                "out, and write sliding_window: null for a model without a window"
            )
    if "sliding_window" not in family.may_set:
        if kinds is not None and (not isinstance(kinds, list) or any(layer != FULL for layer in kinds)):
            raise ConfigError(
                f"{path}: layer_types={kinds!r} is not supported; every layer of a {kind} model here is {FULL!r}"
            )
        return {}
    if family.one_window:
        return {"sliding_window": _one_window(file, tree, path)}
    pattern = tree.get("sliding_window_pattern", 1)
    if kinds is not None:
        layers = len(kinds) if isinstance(kinds, list) else 0
        pattern = next((n for n in range(1, layers + 2) if kinds == _layer_types(layers, n)), None)
        if pattern is None or layers != tree["num_hidden_layers"]:
            raise ConfigError(
                f"{path}: layer_types is not, for each layer, {FULL!r} in every n-th and {SLIDING!r} in all others; "
                "no other pattern is supported"
            )
    window = tree["sliding_window"] if pattern != 1 else None
    return {"sliding_window": window, "sliding_window_pattern": pattern if window is not None else 1}


def _one_window(file: dict, tree: dict, path: Path) -> int | None:
    """Return the window that all layers have, or None if none has one."""
    layers, window, kind = tree["num_hidden_layers"], tree.get("sliding_window"), tree["model_type"]
    if not isinstance(layers, int):
        return window  # ModelConfig says so
    first = 0
    if kind in _SWITCHED:
        switch, first = file.get("use_sliding_window"), file.get("max_window_layers", 28)
        if not isinstance(switch, (bool, type(None))) or isinstance(first, bool) or not isinstance(first, int):
            raise ConfigError(
                f"{path}: use_sliding_window={switch!r} must be true or false, and max_window_layers={first!r} a number of "
                "layers; download the file again"
            )
        window = window if switch else None
    local = [window is not None and i >= first for i in range(layers)]
    kinds = file.get("layer_types")
    if kinds is not None:
        if not isinstance(kinds, list) or len(kinds) != layers or any(k not in (SLIDING, FULL) for k in kinds):
            raise ConfigError(f"{path}: layer_types must be {FULL!r} or {SLIDING!r} for each of the {layers} layers")
        given = [k == SLIDING for k in kinds]
        # Mistral's code has no layer_types, and a Qwen's window may be off.
        if any(given) and window is None or kind not in _SWITCHED and given != local:
            raise ConfigError(
                f"{path}: layer_types={sorted(set(kinds))} and sliding_window={window!r} contradict each other in a "
                f"{kind} model; correct one of them"
            )
        local = given
    if any(local) and not all(local):
        raise ConfigError(
            f"{path}: {sum(local)} of {layers} layers have a sliding window (max_window_layers or layer_types); in a {kind} "
            "model here all have it or none, so train another model"
        )
    return window if all(local) else None


def _layer_types(layers: int, pattern: int) -> list[str]:
    return [SLIDING if (i + 1) % pattern else FULL for i in range(layers)]


def written_window(model: ModelConfig) -> dict:
    """Return the keys of the sliding window, as old and new transformers read them."""
    window, kind = model.sliding_window, model.model_type
    if "sliding_window" not in model.family.may_set:
        return {}
    types = {"layer_types": [SLIDING if local else FULL for local in model.local_layers]}
    if kind in _SWITCHED:
        switch = {"use_sliding_window": window is not None, "sliding_window": window}
        return switch | types | ({"max_window_layers": 0} if window is not None else {})
    if model.family.one_window:
        return {"sliding_window": window}
    # Older transformers 4 have no layer_types: they read this for Gemma 3, and know only every second layer for Gemma 2.
    pattern = {"sliding_window_pattern": model.sliding_window_pattern} if kind == "gemma3_text" else {}
    return {"sliding_window": window} | types | pattern
