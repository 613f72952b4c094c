"""The model of a run that starts from a checkpoint (`init_from`): it is the checkpoint's, whatever the config leaves out."""

import dataclasses
import logging
from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

from easylm_mling.config import ModelConfig, RunConfig, build_key, load, load_kept, to_tree
from easylm_mling.errors import ConfigError, check

_log = logging.getLogger(__name__)
_FIELDS = {f.name: f for f in dataclasses.fields(ModelConfig)}
_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")
TOKENIZER = "tokenizer"


def load_config(files: list[str], overrides: Sequence[str] = (), override_model: Sequence[str] = ()) -> RunConfig:
    """Load a config as `config.load` does, and take from the checkpoint in `init_from` what `model` leaves out.

    What `model` gives is compared with the checkpoint's, name by name. Raises ConfigError for a difference that
    `override_model` does not name. A run that has checkpoints of its own keeps its model.
    """
    return load(files, overrides, partial(_complete, override_model=override_names(override_model)))


def override_names(given: Sequence[str]) -> frozenset[str]:
    """Return the keys that `--override-model` names, without `model.`; raises ConfigError for one that is no key."""
    names = frozenset(key.strip().removeprefix("model.") for text in given for key in text.split(","))
    for name in sorted(names - {*_FIELDS, TOKENIZER}):
        raise ConfigError(
            f"--override-model {name}: no such key of `model`; name one of {', '.join(_FIELDS)} or tokenizer"
        )
    return names


def check_start(config: RunConfig, fingerprint: str, override_model: Collection[str] = ()):
    """Raise ConfigError unless the model and tokenizer of `config` are those of the checkpoint in `init_from`.

    `fingerprint` is the tokenizer's. What `override_model` names may differ.
    """
    start = str(config.init_from)
    values = {name: getattr(config.model, name) for name in _FIELDS}
    _refuse(start, _differences(_stored_model(start), values), override_model)
    stored = _stored_tokenizers(start)
    if stored and fingerprint not in stored and TOKENIZER not in override_model:
        raise ConfigError(
            f"init_from={start}: its model was trained with another tokenizer than data.tokenizer={config.data.tokenizer}; "
            "use the one in the checkpoint's folder `tokenizer`, or insist with --override-model tokenizer"
        )


def _complete(tree: dict, override_model: Collection[str]) -> dict:
    """Return the plain tree of a config with the settings that `model` leaves out."""
    start, run_dir, given = tree.get("init_from"), tree.get("run_dir"), tree.get("model")
    given = {} if given is None else given
    if not (isinstance(start, str) and isinstance(run_dir, str) and isinstance(given, dict)):
        return tree  # `load` says what is wrong, if anything is
    model = _model_of_run(run_dir)
    if model is None:
        model = _stored_model(start)
        values = {k: build_key(ModelConfig, k, v, "model") for k, v in given.items() if k in _FIELDS}
        _refuse(start, _differences(model, values), override_model)
        left_out = {k: getattr(model, k) for k in _FIELDS if k not in given}
        told = [f"model.{k}={v!r}" for k, v in left_out.items() if not given or v != _FIELDS[k].default]
        if told:
            _log.warning("init_from=%s: taken from it are %s", start, ", ".join(told))
    return {**tree, "model": to_tree(model) | given}


def _refuse(start: str, differences: dict[str, tuple[Any, Any]], override_model: Collection[str]):
    wrong = {name: pair for name, pair in differences.items() if name not in override_model}
    listed = [f"model.{name}={given!r} (the checkpoint has {stored!r})" for name, (stored, given) in wrong.items()]
    more = f" and {len(listed) - 5} more" if len(listed) > 5 else ""
    check(
        not wrong,
        f"init_from={start} holds another model than the config: {', '.join(listed[:5])}{more}; leave these out to train the "
        f"checkpoint's model, or insist with --override-model {','.join(wrong)}",
    )


def _differences(stored: ModelConfig, values: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return key -> (stored value, given value) for each of `values` that means another model than `stored`."""
    theirs = {name: getattr(stored, name) for name in _FIELDS}
    ours = theirs | values
    out = {}
    for name in values:
        pair = _meaning(theirs, name), _meaning(ours, name)
        # A checkpoint without a token for padding, or for the ends of a document, leaves the choice to the tokenizer.
        if pair[0] != pair[1] and not (name in _IDS and theirs[name] < 0):
            out[name] = theirs[name], ours[name]
    return out


def _meaning(values: dict[str, Any], name: str) -> Any:
    """Return a setting's value, and where it is null what null stands for."""
    stands_for = {
        "query_pre_attn_scalar": "head_dim",
        "rope_local_base_freq": "rope_theta",
        "global_head_dim": "head_dim",
        "num_global_key_value_heads": "num_key_value_heads",
    }
    return values[stands_for[name]] if values[name] is None and name in stands_for else values[name]


def _stored_model(start: str) -> ModelConfig:
    from easylm_mling.checkpoint.reading import stored_model  # loads JAX, which a wrong config must not wait for

    return stored_model(start)


def _model_of_run(run_dir: str) -> ModelConfig | None:
    """Return the model of a run that has checkpoints; None before its first."""
    from easylm_mling.checkpoint.layout import newest_step
    from easylm_mling.storage.object_store import CONFIG, small_files

    if not newest_step(run_dir):
        return None
    file = small_files(run_dir) / CONFIG
    return load_kept(file).model if file.is_file() else None


def _stored_tokenizers(start: str) -> frozenset[str]:
    """Return the fingerprints of the tokenizers that belong to a checkpoint; empty if it has none."""
    from easylm_mling.checkpoint.reading import load_info
    from easylm_mling.data.tokenization.tokenizer import fingerprints, stored_fingerprints
    from easylm_mling.storage.object_store import small_files

    return stored_fingerprints(load_info(start)) or frozenset(fingerprints(small_files(start) / TOKENIZER).values())
