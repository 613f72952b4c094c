"""Reading a checkpoint without Orbax, at a cost that its shapes bound: a stranger may have made it."""

import json
import re
import time
from collections.abc import Callable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore as ts

from easylm_mling.checkpoint.layout import step_directory
from easylm_mling.config import ModelConfig, from_tree
from easylm_mling.data.mixture import DataState
from easylm_mling.errors import ConfigError, DamagedCheckpoint, check_format
from easylm_mling.storage.object_store import is_bucket, store_spec
from easylm_mling.training.digests import leaf_name

# Bytes of an array of what was consumed: over a hundred sources in 65,536 lanes.
_MOST_DATA = 1 << 30
# Of what a step holds, and of the keys in its `info`.
FORMAT = 2
# Seconds before each further try to read a part of a step in a bucket.
_BUCKET_WAITS = (0.1, 0.2, 0.5, 1.0, 2.0)
_KINDS = {"params": "parameter", "average": "averaged parameter", "training": "array", "data": "array"}


def open_store(
    where: Path, name: str, shape: tuple[int, ...], dtype: str = "float32", part: str = "params"
) -> ts.TensorStore:
    """Open the array `name` (`a.b`) of a part of the step in `where`. (Orbax would restore whole stacks of layers.)

    Raises ConfigError unless the array has this `shape` and `dtype` and is stored as `save` stores it. So reading it takes no
    more memory than its size, whoever made the files: a chunk may claim any size, and packed data may unpack to any.
    """
    store = _open(where, name, part)
    stored, wanted = (store.shape, store.dtype.name), (tuple(shape), dtype)
    if stored != wanted:
        raise ConfigError(f"{where}: {_KINDS[part]} {name} is {stored}, not {wanted}; use another step")
    _check_chunks(where, name, part, store)
    return store


def check_part(where: Path, part: str):
    """Raise ConfigError where the step in `where` has no such part: params, or the average of those."""
    if part == "average" and not any(name.startswith(leaf_name(part)) for name in _digests(where)):
        raise ConfigError(f"{where}: holds no average; train with train.ema, or leave out --ema")


def _digests(where: Path) -> dict:
    return load_info(where.parent.parent, int(where.name)).get("digests", {})


def read_data(where: Path) -> dict[str, np.ndarray]:
    """The arrays of a DataState; raises ConfigError for what `open_store` refuses, and for over a GiB."""
    arrays = {}
    for name in DataState._fields:
        store = _open(where, name, "data")
        if store.dtype.name != "int64" or store.size * 8 > _MOST_DATA:
            raise ConfigError(f"{where}: {name} is {(store.shape, store.dtype.name)}, not counters; use another step")
        _check_chunks(where, name, "data", store)
        arrays[name] = np.asarray(_patiently(where, lambda store=store: store.read().result()))
    return arrays


def read_strings(where: Path) -> dict:
    """The strings of the step's `info`; raises ValueError if there are none."""
    store = ts.KvStore.open(store_spec(f"{where}/info")).result()
    strings = _patiently(where, lambda: json.loads(store.read("_strings.json").result().value))
    if not isinstance(strings, dict) or not isinstance(strings.get("json"), str):
        raise ValueError("it holds no text")
    return strings


def load_info(directory: str | Path, step: int | None = None) -> dict:
    """The JSON part of a checkpoint: `config` or `model`, `tokens`, `tokenizer` ... Raises ConfigError if it cannot be read."""
    where = step_directory(directory, step)
    try:
        stored = read_strings(where)
    except (KeyError, ValueError, FileNotFoundError) as error:
        why = " ".join(str(error).split())[:200]
        raise ConfigError(f"{where}: no info of a checkpoint can be read ({why}); use another step") from None
    return unpacked(stored, where)


def stored_model(checkpoint_dir: str | Path, step: int | None = None) -> ModelConfig:
    """Return the shape of the model in a checkpoint of a run or an import. Raises ConfigError where it is missing."""
    info = load_info(checkpoint_dir, step)
    model = info.get("model") or info.get("config", {}).get("model")
    if not isinstance(model, dict):
        raise ConfigError(f"{checkpoint_dir}: its info names no model; use another checkpoint")
    return from_tree(ModelConfig, model)


def load_data_state(directory: str | Path, step: int | None = None) -> dict[str, np.ndarray]:
    """The arrays of the checkpoint's DataState, by name. Raises ConfigError for an imported checkpoint, which has none."""
    where = step_directory(directory, step)
    if not (where / "data").is_dir():
        raise ConfigError(f"{directory}: an imported checkpoint, not a run: nothing has been consumed")
    return read_data(where)


def check_stored(where: Path, abstract: dict):
    """Raise ConfigError unless every array of these parts is stored as open_store demands; Orbax would not check."""
    for part, tree in abstract.items():
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            open_store(where, name, leaf.shape, leaf.dtype.name, part)


def packed(info: dict) -> dict:
    """As one string: Orbax sorts the keys of JSON, and the order of the sources means something."""
    text = json.dumps({"format": FORMAT, **info})
    return {"json": text, "digest": _digest(text)}


def unpacked(stored: dict, where: Path) -> dict:
    """The `info` of the step in `where`, packed before.

    Raises DamagedCheckpoint if it is not what was packed, and UnknownFormat for a format that another version wrote.
    """
    text = stored["json"]
    if stored.get("digest") != _digest(text):
        raise DamagedCheckpoint("its info is not what was saved")
    try:
        info = json.loads(text)
    except (ValueError, RecursionError):
        info = None
    if not isinstance(info, dict):
        raise DamagedCheckpoint("its info cannot be read")
    check_format(where, "checkpoint", info.get("format"), FORMAT)
    return info


def _open(where: Path, name: str, part: str) -> ts.TensorStore:
    try:
        base = {"driver": "ocdbt", "base": store_spec(f"{where}/{part}")}
        spec = {"driver": "zarr3", "kvstore": base | {"path": f"{name}/"}}
        return _patiently(where, lambda: ts.open(spec, open=True, read=True).result())
    except ValueError as error:
        # Without the specification that tensorstore adds to its reasons.
        why = " ".join(re.split(r" \[[a-z_ ]+=", str(error))[0].split())[-300:]
        raise ConfigError(f"{where}: {_KINDS[part]} {name} cannot be read ({why}); use another step") from None


def _patiently(where: Path, call: Callable[[], Any]) -> Any:
    """Return `call()`; where the step is in a bucket it is tried again for a while: an answer may have been cut short."""
    for seconds in _BUCKET_WAITS if is_bucket(str(where)) else ():
        try:
            return call()
        except ValueError:
            time.sleep(seconds)
    return call()


def _check_chunks(where: Path, name: str, part: str, store: ts.TensorStore):
    layout: Any = store.chunk_layout
    codec: Any = store.codec
    shape = store.shape
    chunks = [
        *zip(layout.read_chunk.shape or (), shape, strict=True),
        *zip(layout.write_chunk.shape or (), shape, strict=True),
    ]
    plain = {"bytes", "sharding_indexed", "crc32c"}
    if any(chunk > size for chunk, size in chunks) or not set(_codecs(codec.to_json())) <= plain:
        raise ConfigError(
            f"{where}: {_KINDS[part]} {name} is packed, or cut in other chunks than are ever saved; do not trust it"
        )


def _codecs(tree) -> Iterator[str]:
    """The names in a zarr codec's JSON."""
    for item in tree.values() if isinstance(tree, dict) else tree:
        if isinstance(item, (dict, list)):
            yield from _codecs(item)
    if isinstance(tree, dict) and isinstance(tree.get("name"), str):
        yield tree["name"]


def _digest(text: str) -> str:
    return blake2b(text.encode(), digest_size=8).hexdigest()
