"""The rotary settings of `config.json`: `rope_theta` and `rope_scaling` of transformers 4, `rope_parameters` of 5.

Source: transformers 5.23 and 4.57 `modeling_rope_utils.py`.
"""

import dataclasses
import logging
import math
from pathlib import Path

from easylm_mling.config import ModelConfig
from easylm_mling.errors import ConfigError

SLIDING, FULL = "sliding_attention", "full_attention"
# What a kind of scaling reads beside its name. transformers has no default for those of the first tuple.
_READS = {
    "linear": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), ("original_max_position_embeddings",)),
    "yarn": (
        ("factor",),
        ("original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor", "truncate"),
    ),
    "proportional": ((), ("factor", "partial_rotary_factor")),
}
_log = logging.getLogger(__name__)


def read_rope(file: dict, tree: dict, path: Path) -> dict:
    """Return the rotary settings, from `rope_theta` and its like (4.x) or `rope_parameters` (5.x); both must agree.

    `tree` holds what transformers assumes for keys that the file leaves out. Raises ConfigError.
    """
    _check_objects(file, path)
    new = file.get("rope_parameters") or {}
    by_layer = FULL in new or SLIDING in new
    far, near = (new.get(FULL) or {}, new.get(SLIDING) or {}) if by_layer else (new, {})
    if _scaling(near, file, tree, path):
        raise ConfigError(f"{path}: rope_parameters of {SLIDING} are scaled, which is not supported")
    scalings = [_scaling(rope, file, tree, path) for rope in (file.get("rope_scaling") or {}, far)]
    out = {}
    for key, old, value in (
        ("rope_theta", file.get("rope_theta"), far.get("rope_theta")),
        ("rope_local_base_freq", file.get("rope_local_base_freq"), near.get("rope_theta")),
        ("rope_scaling", *scalings),
    ):
        written_twice = old is not None and (value is not None or (key == "rope_scaling" and far))
        if written_twice and old != value:
            raise ConfigError(f"{path}: {key}={old!r}, but rope_parameters has {value!r}; make them equal")
        chosen = old if old is not None else value
        said = chosen is not None or (key == "rope_scaling" and far)
        out[key] = chosen if said else tree.get(key, getattr(ModelConfig, key))
    return out


def written_rope(model: ModelConfig) -> dict:
    """Return the rotary settings of `model` in both dialects."""
    scaling = None
    if model.rope_scaling is not None:
        needed, optional = _READS[model.rope_scaling.rope_type]
        always = ("rope_type", *needed, "original_max_position_embeddings")
        scaling = {
            f.name: value
            for f in dataclasses.fields(model.rope_scaling)
            if f.name in ("rope_type", *needed, *optional)
            and ((value := getattr(model.rope_scaling, f.name)) != f.default or f.name in always)
        }
        if model.family.gemma4 and model.rope_scaling.factor == 1:
            scaling.pop("factor")
    far = {"rope_theta": model.rope_theta, **(scaling or {"rope_type": "default"})}
    old = {"rope_theta": model.rope_theta, "rope_scaling": scaling}
    if "rope_local_base_freq" not in model.family.may_set:
        return old | {"rope_parameters": far}
    local = model.rope_local_base_freq or model.rope_theta
    near = {"rope_theta": local, "rope_type": "default"}
    if model.family.gemma4:
        return {"rope_parameters": {FULL: far, SLIDING: near}}  # it is younger than the old dialect
    return old | {"rope_local_base_freq": local, "rope_parameters": {FULL: far, SLIDING: near}}


def _check_objects(file: dict, path: Path):
    for key in ("rope_parameters", "rope_scaling"):
        for rope in (file.get(key) or {}, *(file.get(key) or {}).values()) if isinstance(file.get(key), dict) else ():
            proportional = isinstance(rope, dict) and rope.get("rope_type") == "proportional"
            if isinstance(rope, dict) and not proportional and rope.get("partial_rotary_factor") not in (None, 1):
                raise ConfigError(
                    f"{path}: {key}: partial_rotary_factor is not supported; here all of a head is rotated"
                )
        if not isinstance(file.get(key), (dict, type(None))):
            raise ConfigError(f"{path}: {key}={file[key]!r} must be an object; download the file again")


def _scaling(rope: dict, file: dict, tree: dict, path: Path) -> dict | None:
    """Return RopeScaling's fields of a `rope_scaling` or one entry of `rope_parameters`; None when nothing is scaled."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    rest = {k: v for k, v in rope.items() if k not in ("rope_type", "type", "rope_theta") and v is not None}
    if kind == "default":
        return None
    if not isinstance(kind, str) or kind not in _READS:
        raise ConfigError(
            f"{path}: rope_type={kind!r} must be one of {', '.join(map(repr, _READS))}; no other scaling is supported"
        )
    needed, optional = _READS[kind]
    for key in needed:
        if key not in rest:
            raise ConfigError(
                f"{path}: {key} is missing in the rotary scaling {kind!r}; use the model's own config.json"
            )
    if kind == "proportional":
        rest = {"factor": 1.0, **rest}
    if "original_max_position_embeddings" in optional:
        rest["original_max_position_embeddings"] = _original_length(rest, file, tree, path)
    return {"rope_type": kind, **(_yarn(rest, tree, path) if kind == "yarn" else rest)}


def _original_length(rest: dict, file: dict, tree: dict, path: Path):
    """Return the length of the first training. Where no key says it, transformers takes max_position_embeddings."""
    key = "original_max_position_embeddings"
    outer, inner = file.get(key), rest.get(key)
    if outer is not None and inner is not None and outer != inner:
        raise ConfigError(f"{path}: {key}={outer!r}, but the rotary scaling has {inner!r}; make them equal")
    known = inner if inner is not None else outer
    return known if known is not None else tree.get("max_position_embeddings", ModelConfig.max_position_embeddings)


def _yarn(rest: dict, tree: dict, path: Path) -> dict:
    """Return the settings of yarn with `mscale` and `mscale_all_dim` as the attention factor that they stand for."""
    rest = dict(rest)
    one, all_dims = rest.pop("mscale", None), rest.pop("mscale_all_dim", None)
    numbers = [rest["factor"], one, all_dims, rest["original_max_position_embeddings"]]
    if not all(v is None or (isinstance(v, (int, float)) and not isinstance(v, bool)) for v in numbers):
        raise ConfigError(f"{path}: the numbers of the rotary scaling 'yarn' must be numbers; download the file again")
    if one and all_dims and "attention_factor" not in rest:
        log = math.log(max(1.0, rest["factor"]))
        rest["attention_factor"] = (0.1 * one * log + 1.0) / (0.1 * all_dims * log + 1.0)
    reach = tree.get("max_position_embeddings", ModelConfig.max_position_embeddings)
    if isinstance(reach, int) and reach != rest["factor"] * rest["original_max_position_embeddings"]:
        _log.warning(
            "%s: max_position_embeddings=%s is not factor=%s times the %s positions of the first training; factor is taken, as "
            "transformers 5 does, but transformers 4 divides the two lengths instead",
            *(path, reach, rest["factor"], rest["original_max_position_embeddings"]),
        )
    return rest
