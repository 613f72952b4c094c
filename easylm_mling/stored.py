"""Stored parameters one by one, with what they may cost to read bounded by their shape."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorstore as ts

from easylm_mling.bucket import store_spec
from easylm_mling.config import ConfigError


def open_store(where: Path, name: str, shape: tuple[int, ...]) -> ts.TensorStore:
    """The parameter `name` (`a.b`) of the step in `where`, through tensorstore and not Orbax, which would restore whole stacks.

    Raises ConfigError unless it is float32 of this `shape`, and stored as `save` does it: reading an array takes no more
    memory than it has, whoever made the files. (A chunk may claim any size, and what is packed may unpack to any.)
    """
    try:
        base = {"driver": "ocdbt", "base": store_spec(f"{where}/params")}
        spec = {"driver": "zarr3", "kvstore": base | {"path": f"{name}/"}}
        store = ts.open(spec, open=True, read=True).result()
    except ValueError as error:
        # Without the specification that tensorstore adds to its reasons.
        why = " ".join(re.split(r" \[[a-z_ ]+=", str(error))[0].split())[-300:]
        raise ConfigError(f"{where}: parameter {name} cannot be read ({why}); use another step") from None
    found, wanted = (store.shape, store.dtype.name), (tuple(shape), "float32")
    if found != wanted:
        raise ConfigError(f"{where}: parameter {name} is {found}, not {wanted}; use another step")
    layout: Any = store.chunk_layout
    codec: Any = store.codec
    chunks = [*zip(layout.read_chunk.shape, shape, strict=True), *zip(layout.write_chunk.shape, shape, strict=True)]
    plain = {"bytes", "sharding_indexed", "crc32c"}
    if any(chunk > size for chunk, size in chunks) or not set(_codecs(codec.to_json())) <= plain:
        raise ConfigError(
            f"{where}: parameter {name} is packed, or cut in other chunks than are ever saved; do not trust it"
        )
    return store


def _codecs(tree) -> Iterator[str]:
    """The names in a zarr codec's JSON."""
    for item in tree.values() if isinstance(tree, dict) else tree:
        if isinstance(item, (dict, list)):
            yield from _codecs(item)
    if isinstance(tree, dict) and isinstance(tree.get("name"), str):
        yield tree["name"]
