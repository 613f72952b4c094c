"""What a step holds, array by array, with what it may cost to read bounded by its shape: a stranger may have made it."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from easylm_mling.bucket import store_spec
from easylm_mling.config import ConfigError

# Bytes of an array of what was consumed: over a hundred sources in 65,536 lanes.
_MOST_DATA = 1 << 30
_KINDS = {"params": "parameter", "training": "array", "data": "array"}


def open_store(
    where: Path, name: str, shape: tuple[int, ...], dtype: str = "float32", part: str = "params"
) -> ts.TensorStore:
    """The array `name` (`a.b`) of a part of the step in `where`, through tensorstore and not Orbax, which would restore
    whole stacks.

    Raises ConfigError unless it has this `shape` and `dtype`, and is stored as `save` does it: reading an array takes no
    more memory than it has, whoever made the files. (A chunk may claim any size, and what is packed may unpack to any.)
    """
    store = _open(where, name, part)
    found, wanted = (store.shape, store.dtype.name), (tuple(shape), dtype)
    if found != wanted:
        raise ConfigError(f"{where}: {_KINDS[part]} {name} is {found}, not {wanted}; use another step")
    _check_chunks(where, name, part, store)
    return store


def read_data(where: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """The arrays of what was consumed, int64; raises ConfigError for what `open_store` refuses, and for over a GiB."""
    found = {}
    for name in names:
        store = _open(where, name, "data")
        if store.dtype.name != "int64" or store.size * 8 > _MOST_DATA:
            raise ConfigError(f"{where}: {name} is {(store.shape, store.dtype.name)}, not counters; use another step")
        _check_chunks(where, name, "data", store)
        found[name] = np.asarray(store.read().result())
    return found


def read_strings(where: Path) -> dict:
    """The strings of the step's `info`; raises ValueError if there are none."""
    found = json.loads(ts.KvStore.open(store_spec(f"{where}/info")).result().read("_strings.json").result().value)
    if not isinstance(found, dict) or not isinstance(found.get("json"), str):
        raise ValueError("it holds no text")
    return found


def _open(where: Path, name: str, part: str) -> ts.TensorStore:
    try:
        base = {"driver": "ocdbt", "base": store_spec(f"{where}/{part}")}
        spec = {"driver": "zarr3", "kvstore": base | {"path": f"{name}/"}}
        return ts.open(spec, open=True, read=True).result()
    except ValueError as error:
        # Without the specification that tensorstore adds to its reasons.
        why = " ".join(re.split(r" \[[a-z_ ]+=", str(error))[0].split())[-300:]
        raise ConfigError(f"{where}: {_KINDS[part]} {name} cannot be read ({why}); use another step") from None


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
