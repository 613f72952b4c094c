"""The parameters of a checkpoint without the rest of its state, and how arrays are laid out in storage."""

import math
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from easylm_mling.checkpoint.base import open_base, stored_base, stored_lora
from easylm_mling.checkpoint.layout import step_directory
from easylm_mling.checkpoint.reading import check_stored, load_info, stored_model
from easylm_mling.errors import ConfigError
from easylm_mling.model.lora import merged
from easylm_mling.model.params import Parameter
from easylm_mling.training.digests import differing, leaf_name
from easylm_mling.training.state import abstract_adapters

# Bytes that are written as one. Over 32 MiB, up to which malloc may keep what is freed.
_CHUNK = 64_000_000
# Bytes that are read at least, where a parameter is written layer by layer: a host that holds a part of its columns passes
# over the others.
_READ = 8_000_000


def storage_context(wait_seconds: float = 0.0) -> ocp.Context:
    """Return how Orbax reads and writes arrays here; `wait_seconds`: how long it waits for other processes (0: Orbax's own)."""
    context = ocp.Context()
    if wait_seconds:
        # For the other processes, one of which may have failed.
        context.async_options.timeout_secs = max(1, int(wait_seconds))
    saving: Any = context.array.saving
    # Float noise does not compress: 7.5 % smaller files would cost more than half of the write speed.
    saving.use_compression = False
    saving.ocdbt_target_data_file_size = 400_000_000
    # To cut what is smaller for each of its replicas to write takes longer than the writing.
    saving.min_slice_bytes_for_replica_parallel = 16_000_000
    saving.scoped_storage_options_creator = _chunks
    return context


def _chunks(path, value):
    """How an array is cut in storage, so that an exporter reads a layer without its neighbours, and little at a time.

    A stacked parameter is cut into layers, and then, as any other array, into chunks of at most _CHUNK bytes.
    """
    stacked = "layers" in jax.tree_util.keystr(path) and getattr(value, "ndim", 0) > 1
    return ocp.options.ArrayOptions.Saving.StorageOptions(chunk_byte_size=_CHUNK, shard_axes=(0,) if stacked else None)


def chunk_shapes(p: Parameter) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return in which shape a parameter of float32 is written piece by piece, and into which its pieces are cut for readers.

    A piece is rows of one layer, so that it comes and goes in the order of Hugging Face's files. It is cut along the axis
    that training cuts over hosts.
    """
    first = 1 if p.stacked and len(p.shape) > 1 else 0
    row = 4 * math.prod(p.shape[first + 1 :])
    written = (*(1,) * first, _rows(p.shape[first], max(1, _CHUNK // row)), *p.shape[first + 1 :])
    if "embed" not in p.axes:
        return written, written
    axis = p.axes.index("embed")
    most = max(1, _READ * written[axis] // (4 * math.prod(written)))
    cut = max(d for d in range(1, min(most, written[axis]) + 1) if written[axis] % d == 0)
    return written, (*written[:axis], cut, *written[axis + 1 :])


def _rows(count: int, most: int) -> int:
    """Return the largest divisor of `count` up to `most`; where that is small, parts that differ by their last."""
    divisor = max(d for d in range(1, min(count, most) + 1) if count % d == 0)
    return divisor if 4 * divisor > min(count, most) else -(-count // -(-count // most))


def load_params(directory: str | Path, abstract: dict, step: int | None = None) -> dict:
    """Only the parameters of a checkpoint, placed as the abstract tree (shapes, dtypes, shardings) says.

    Adapters are added to the parameters of their base, in float32. Raises ConfigError if they cannot be read, or are not what
    was saved: it names the first one.
    """
    where = step_directory(directory, step)
    info = load_info(directory, int(where.name))
    base, lora = stored_base(info), stored_lora(info)
    if base is None or lora is None:
        return _load(where, info, abstract)
    base = open_base(base, str(directory))
    mesh = next(iter(jax.tree.leaves(abstract))).sharding.mesh
    model = stored_model(directory, int(where.name))
    adapters = _load(where, info, abstract_adapters(model, lora, mesh))
    return merged(load_params(base.init_from, abstract, base.step), adapters, model, lora, in_place=True)


def load_adapters(directory: str | Path, abstract: dict, step: int | None = None) -> dict:
    """Only the adapters of a checkpoint, without their base; arguments and errors as of `load_params`."""
    where = step_directory(directory, step)
    return _load(where, load_info(directory, int(where.name)), abstract)


def _load(where: Path, info: dict, abstract: dict) -> dict:
    check_stored(where, {"params": abstract})
    try:
        with storage_context():
            params = ocp.load_checkpointables(str(where), {"params": abstract})["params"]
    except (KeyError, ValueError, FileNotFoundError) as error:
        why = " ".join(str(error).split())[-200:]
        raise ConfigError(f"{where}: the parameters cannot be read ({why}); use another step, or a copy") from None
    saved = {path: digest for path, digest in info.get("digests", {}).items() if path.startswith(leaf_name("params"))}
    if leaf := differing(saved, {"params": params}):
        raise ConfigError(f"{where}: {leaf} is not what was saved; use another step, or a copy")
    return params


def check_same_shapes(directory: str | Path, abstract: dict, step: int | None = None):
    """Raise ConfigError that names the first parameter whose shape is not the model's. Of adapters, their base is meant."""
    where = step_directory(directory, step)
    if base := stored_base(load_info(directory, int(where.name))):
        base = open_base(base, str(directory))
        return check_same_shapes(base.init_from, abstract, base.step)
    stored = ocp.checkpointables_metadata(str(where)).metadata["params"]
    expected = jax.tree_util.tree_leaves_with_path(abstract)
    shapes = {jax.tree_util.keystr(p): tuple(v.shape) for p, v in jax.tree_util.tree_leaves_with_path(stored)}
    for path, leaf in expected:
        name = jax.tree_util.keystr(path)
        if shapes.get(name) != tuple(leaf.shape):
            raise ConfigError(
                f"{where}: parameter {name} has shape {shapes.get(name)}, the model needs {tuple(leaf.shape)}; "
                "use the model config that the checkpoint was made with"
            )
