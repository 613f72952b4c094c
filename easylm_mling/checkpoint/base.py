"""The base of adapters: which checkpoint it is, and whether it still holds the parameters that they were trained on.

A checkpoint of a run with `lora` holds adapters only. Its `info` names the base as `{"init_from", "step", "digest"}`.
"""

from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

from easylm_mling.checkpoint.layout import committed_steps, step_directory
from easylm_mling.checkpoint.reading import load_info
from easylm_mling.config import LoraConfig, from_tree
from easylm_mling.errors import ConfigError, check
from easylm_mling.training.digests import leaf_name


class Base(NamedTuple):
    """A step of a run or of an imported checkpoint, and the digest of all its parameters."""

    init_from: str
    step: int
    digest: str


def find_base(path: str | Path, step: int | None = None) -> Base:
    """Return the base at `step` (default: the newest) of a checkpoint. Raises ConfigError where there is none."""
    number = int(step_directory(path, step).name)
    info = load_info(path, number)
    digests = {name: d for name, d in info.get("digests", {}).items() if name.startswith(leaf_name("params"))}
    check(bool(digests), f"{path}: the checkpoint of step {number} has no digests of its parameters; save it again")
    # Where it has adapters itself, what they stand beside counts, too.
    below, lora = info.get("base") or {}, stored_lora(info)
    parts = [*(f"{name} {digests[name]}" for name in sorted(digests)), str(below.get("digest")), str(lora)]
    return Base(str(path), number, blake2b("\n".join(parts).encode(), digest_size=16).hexdigest())


def stored_base(info: dict) -> Base | None:
    """Return the base that the `info` of a checkpoint names; None where the checkpoint holds all parameters."""
    base = info.get("base")
    if base is None:
        return None
    wanted = {"init_from": str, "step": int, "digest": str}
    whole = isinstance(base, dict) and all(isinstance(base.get(name), kind) for name, kind in wanted.items())
    check(whole, "the info of this checkpoint of adapters does not say what their base is; use another step")
    return Base(base["init_from"], base["step"], base["digest"])


def stored_lora(info: dict) -> LoraConfig | None:
    """Return the settings of the adapters in a checkpoint with this `info`; None where it has none."""
    tree = info.get("lora") or info.get("config", {}).get("lora")
    return from_tree(LoraConfig, tree) if isinstance(tree, dict) else None


def open_base(base: Base, whose: str, path: str | None = None) -> Base:
    """Return `base` where it lies now: at `path` (default: where it lay). Raises ConfigError unless it is what it was.

    `whose` begins the message: the run or checkpoint with the adapters.
    """
    where = path or base.init_from
    way = "restore it, or name where it lies now with init_from"
    if base.step not in committed_steps(where):
        raise ConfigError(
            f"{whose}: its adapters belong to the checkpoint of step {base.step} in init_from={where}, which is not there; {way}"
        )
    now = find_base(where, base.step)
    if now.digest != base.digest:
        raise ConfigError(
            f"{whose}: its adapters belong to other parameters than those of step {base.step} in init_from={where} now; {way}"
        )
    return now
