"""The small files of a step that Orbax reads beside the arrays, as Orbax 0.12 writes them for the same step.

`tests/test_checkpoint_writing.py` compares them with Orbax's own.
"""

import json
import time
from collections.abc import Sequence

from easylm_mling.checkpoint.layout import COMMITTED
from easylm_mling.model.params import Parameter

_HANDLER = "orbax.checkpoint.experimental.v1._src.handlers.pytree_handler.PyTreeHandler"
_KEY_OF_A_DICT = 2  # Orbax's number for it


def params_files(table: Sequence[Parameter], chunks: dict[str, tuple[int, ...]]) -> dict[str, str]:
    """Return the files below `params/`, by name; `chunks` has the shape that is read at least of each parameter, by path."""
    leaves = {
        tuple(p.path.split(".")): {"value_type": "jax.Array", "skip_deserialize": False, "write_shape": [*p.shape]}
        for p in table
    }
    arrays = [
        {
            "array_metadata": {
                "param_name": p.path,
                "write_shape": [*p.shape],
                "chunk_shape": [*chunks[p.path]],
                "ext_metadata": None,
            }
        }
        for p in _sorted(table)
    ]
    return {
        "_METADATA": json.dumps(_tree(leaves)),
        "array_metadatas/process_0": json.dumps({"array_metadatas": arrays}),
    }


def info_files(strings: dict[str, str]) -> dict[str, str]:
    """Return the files below `info/`, by name."""
    leaves = {(key,): {"value_type": "string", "skip_deserialize": False} for key in strings}
    return {"_METADATA": json.dumps(_tree(leaves)), "_strings.json": json.dumps(strings, sort_keys=True)}


def step_files(began: float) -> dict[str, str]:
    """Return the files of the step itself, by name, what commits it last. `began`: seconds since 1970."""
    metadata = {
        "item_handlers": {"info": _HANDLER, "params": _HANDLER},
        "metrics": {},
        "performance_metrics": {},
        "init_timestamp_nsecs": int(began * 1e9),
        "commit_timestamp_nsecs": time.time_ns(),
        "custom_metadata": {},
    }
    return {"_CHECKPOINT_METADATA": json.dumps(metadata), COMMITTED: "Checkpoint commit was successful"}


def _tree(leaves: dict[tuple[str, ...], dict]) -> dict:
    entries = {
        str(keys): {
            "key_metadata": [{"key": key, "key_type": _KEY_OF_A_DICT} for key in keys],
            "value_metadata": leaves[keys],
        }
        for keys in sorted(leaves)
    }
    return {
        "tree_metadata": entries,
        "use_ocdbt": True,
        "use_zarr3": True,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }


def _sorted(table: Sequence[Parameter]) -> list[Parameter]:
    """In the order of a tree's leaves."""
    return sorted(table, key=lambda p: p.path.split("."))
