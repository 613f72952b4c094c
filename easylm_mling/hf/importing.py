"""Import Hugging Face weights as sharded arrays into a checkpoint that training starts from.

Every name, shape and dtype is checked from the files' headers before the first byte of a weight is read.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Mesh
from safetensors import SafetensorError, safe_open

from easylm_mling.checkpoint.checkpoint import Checkpoints
from easylm_mling.config import MeshConfig, ModelConfig, to_tree
from easylm_mling.data.tokenization.files import TOKENIZER_FOLDER, copy_tokenizer
from easylm_mling.errors import ConfigError
from easylm_mling.hf.config import model_config_from_hf, read_json
from easylm_mling.hf.hub import local_directory
from easylm_mling.hf.vocabulary import grow, spelled
from easylm_mling.model.params import Parameter, parameter_table, to_flat, to_nested
from easylm_mling.model.sharding import make_mesh, parameter_shardings
from easylm_mling.storage.atomic import atomic_directory
from easylm_mling.storage.object_store import Bucket, is_bucket

# Where a multimodal Gemma 3 keeps its text model (transformers 4 and 5), and what is not of it.
_TEXT_PREFIXES = {
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "model.language_model.": "model.",
}
_NOT_TEXT = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")
_log = logging.getLogger(__name__)

# All of these are float32 values with fewer bits: widening them is exact.
DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
INDEX = "model.safetensors.index.json"


def import_hf(
    hf_dir: str | Path, checkpoint_dir: str | Path, tokenizer: str | Path | None = None, revision: str | None = None
) -> ModelConfig:
    """Write the model in `hf_dir` (of a multimodal Gemma 3, its text model) as a float32 checkpoint in `checkpoint_dir`.

    The checkpoint is step 0 with parameters only; the tokenizer's files are copied to `checkpoint_dir/tokenizer`.
    `hf_dir` may be a hub name (`google/gemma-7b`, at `revision`). A `tokenizer` that continues the model's own (a
    tokenizer.model or its folder) takes its place, and the embedding gets rows for the new pieces. Raises ConfigError,
    and writes nothing, when the weights are not exactly those of config.json or when `checkpoint_dir` has content.
    """
    if jax.process_count() > 1:
        raise ConfigError("import-hf runs in one process; run it on one host, into storage that every host can read")
    info: dict[str, Any] = {"source": {"name": str(hf_dir), "revision": revision}}
    directory = local_directory(hf_dir, revision)
    info["source"]["hub"] = directory != Path(hf_dir)
    model = model_config_from_hf(directory)
    weights = open_weights(directory, model)
    if tokenizer is not None:
        info["source"]["vocab_size"] = model.vocab_size
        weights, model = grow(weights, model, *spelled(directory, Path(tokenizer)))
    with _new_directory(checkpoint_dir) as (folder, where):
        params = read_params(weights, model, widest_mesh(model))
        info |= {"model": to_tree(model), "source_dtype": _source_dtype(weights)}
        largest = max(array.nbytes for array in to_flat(params).values())
        with Checkpoints(where, bytes_at_a_time=1 + largest) as checkpoints:
            checkpoints.save_params(params, info)
        copy_tokenizer(Path(tokenizer) if tokenizer is not None else directory, folder / TOKENIZER_FOLDER)
    return model


@contextmanager
def _new_directory(target: str | Path) -> Iterator[tuple[Path, str | Path]]:
    """A folder for files, and the directory for checkpoints, which both are `target` once the block ends without an error."""
    if not is_bucket(target):
        with atomic_directory(target) as partial:
            yield partial, partial
        return
    bucket = Bucket(str(target))
    if bucket.names():
        raise ConfigError(f"{target}: already holds something; name another one or remove it")
    with TemporaryDirectory() as folder:
        yield Path(folder), target
        files = (f for f in Path(folder).rglob("*") if f.is_file())
        bucket.write_all({f.relative_to(folder).as_posix(): f.read_bytes() for f in files})


def widest_mesh(model: ModelConfig) -> Mesh:
    """As many of the devices as `hidden_size` divides over, all on the fsdp axis."""
    devices = jax.devices()
    count = max(n for n in range(1, len(devices) + 1) if model.hidden_size % n == 0)
    return make_mesh(MeshConfig(), devices[:count])


def open_weights(hf_dir: str | Path, model: ModelConfig) -> dict[str, Any]:
    """For each Hugging Face tensor of the model, its safetensors slice, whose shape and dtype are right.

    Raises ConfigError that names the file and the tensor for one that is missing, misshapen, of an unknown dtype or
    unknown to the model, and for a file that is missing or cut short.
    """
    hf_dir = Path(hf_dir)
    expected = {}
    for p in parameter_table(model):
        for layer in range(model.num_hidden_layers if p.stacked else 1):
            expected[p.hf_name.format(layer=layer)] = p.hf_shape
    # A head that is written although it is tied says nothing new.
    accepted = expected | {"lm_head.weight": (model.vocab_size, model.hidden_size)}

    files, placed = _open_files(hf_dir)
    found, dropped = {}, 0
    for file, handle in files.items():
        for stored in handle.keys():
            if stored.endswith("rotary_emb.inv_freq"):
                continue  # a buffer of old transformers, which follows from rope_theta
            if model.model_type == "gemma3_text" and stored.startswith(_NOT_TEXT):
                dropped += 1
                continue
            name = _text_name(stored, model)
            if name not in accepted or name in found or placed.get(stored) != file:
                raise ConfigError(
                    f"{hf_dir / file}: unexpected tensor {stored}; these are not the weights of config.json"
                )
            found[name] = handle.get_slice(stored)
            _check_header(hf_dir / file, stored, found[name], accepted[name])
    planned = {_text_name(stored, model): file for stored, file in placed.items()}
    for name in expected:
        if name not in planned:
            raise ConfigError(f"{hf_dir}: tensor {name} is missing from {', '.join(files)}; download the model again")
        if name not in found:
            raise ConfigError(
                f"{hf_dir / planned[name]}: tensor {name} is missing, but {INDEX} places it here; download both"
            )
    if dropped:
        _log.warning("%s: left out %d tensors of the vision tower; this is the text model alone", hf_dir, dropped)
    return {name: found[name] for name in expected}


def _text_name(stored: str, model: ModelConfig) -> str:
    """The name in the parameter table of a stored tensor."""
    for prefix, ours in _TEXT_PREFIXES.items() if model.model_type == "gemma3_text" else ():
        if stored.startswith(prefix):
            return ours + stored.removeprefix(prefix)
    return stored


def read_params(weights: dict[str, Any], model: ModelConfig, mesh: Mesh) -> dict:
    """The float32 parameters as a nested dict, sharded over `mesh`; only what a device holds is read for it."""
    shardings = to_flat(parameter_shardings(model, mesh))
    arrays = {}
    for p in parameter_table(model):
        where = shardings[p.path]
        arrays[p.path] = jax.make_array_from_callback(p.shape, where, lambda index, p=p: _read_shard(weights, p, index))
    return to_nested(arrays)


def _read_shard(weights: dict[str, Any], p: Parameter, index) -> np.ndarray:
    """The part of parameter `p` at `index` (a slice for each axis), read from one Hugging Face tensor a layer."""
    bounds = [s.indices(n)[:2] for s, n in zip(index, p.shape, strict=True)]
    out = np.empty([stop - start for start, stop in bounds], np.float32)
    inner = p.axes[1:] if p.stacked else p.axes
    rows, shape = [], p.shape[-len(inner) :]
    for axis, size, (start, stop) in zip(inner, shape, bounds[-len(inner) :], strict=True):
        if axis == "head_dim" and rows:
            # Hugging Face keeps a head's entries together in the axis of heads, which stands before this one.
            assert (start, stop) == (0, size), (p.path, index)
            rows[-1] = slice(rows[-1].start * size, rows[-1].stop * size)
        else:
            rows.append(slice(start, stop))
    layers = range(*bounds[0]) if p.stacked else range(1)
    for part, layer in zip(out if p.stacked else out[None], layers, strict=True):
        name = p.hf_name.format(layer=layer)
        part[...] = weights[name][tuple(rows)].reshape(part.shape)
    return out


def _open_files(hf_dir: Path) -> tuple[dict[str, safe_open], dict[str, str]]:
    """The open files by name, and the name of the file that is to hold each tensor: one file, or those of the index."""
    single, index = "model.safetensors", hf_dir / INDEX
    if (hf_dir / single).is_file():
        handle = _open(hf_dir / single)
        return {single: handle}, dict.fromkeys(handle.keys(), single)
    if not index.is_file():
        raise ConfigError(f"{hf_dir}: neither {single} nor {INDEX} is here; convert the weights to safetensors first")
    placed = read_json(index).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise ConfigError(f"{index}: weight_map is missing; download the index again")
    for name, file in placed.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise ConfigError(
                f"{index}: {file!r}, the place of tensor {name}, is no file name; download the index again"
            )
        if not (hf_dir / file).is_file():
            raise ConfigError(f"{hf_dir / file}: no such file, but {INDEX} places tensor {name} in it; download it")
    return {file: _open(hf_dir / file) for file in sorted(set(placed.values()))}, placed


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="np")
    except SafetensorError as error:
        size = path.stat().st_size
        raise ConfigError(f"{path}: damaged or cut short at {size} bytes ({error}); download it again") from None


def _check_header(path: Path, name: str, header, shape: tuple[int, ...]):
    found, tag = tuple(header.get_shape()), header.get_dtype()
    if found != shape:
        raise ConfigError(
            f"{path}: tensor {name} has shape {found}, but config.json says {shape}; use its own config.json"
        )
    if tag not in DTYPES:
        raise ConfigError(f"{path}: tensor {name} has dtype {tag}; convert it to one of {', '.join(DTYPES)}")


def _source_dtype(weights: dict[str, Any]) -> str:
    """The name of the files' one dtype, or "mixed"."""
    names = {str(DTYPES[part.get_dtype()]) for part in weights.values()}
    return names.pop() if len(names) == 1 else "mixed"
