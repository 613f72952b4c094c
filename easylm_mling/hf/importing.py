"""Import Hugging Face weights: into a checkpoint that training starts from, or as sharded arrays.

Every name, shape and dtype is checked from the files' headers before the first byte of a weight is read.
"""

import logging
import math
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from easylm_mling.checkpoint.writing import write_checkpoint
from easylm_mling.config import MeshConfig, ModelConfig, to_tree
from easylm_mling.data.tokenization.files import JSON, MODEL, TOKENIZER_FOLDER, copy_tokenizer
from easylm_mling.data.tokenization.tokenizer import fingerprints
from easylm_mling.errors import ConfigError
from easylm_mling.hf.config import model_config_from_hf
from easylm_mling.hf.generation_config import GENERATION
from easylm_mling.hf.hub import local_directory
from easylm_mling.hf.json_files import read_json
from easylm_mling.hf.tensor_files import DTYPES, TensorFile, check_header
from easylm_mling.hf.vocabulary import extend_vocabulary
from easylm_mling.model.params import Parameter, parameter_table, to_flat, to_nested
from easylm_mling.model.sharding import make_mesh, parameter_shardings

# Where a multimodal Gemma keeps its text model (transformers 4 and 5), and its other tensors.
_TEXT_PREFIXES = {
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "model.language_model.": "model.",
}
_TOWERS = ("vision_tower", "multi_modal_projector", "audio_tower", "embed_vision", "embed_audio", "vision_embedder")
_NOT_TEXT = tuple(f"{prefix}{tower}." for prefix in ("", "model.") for tower in _TOWERS)
_MULTIMODAL = ("gemma3_text", "gemma4_text", "gemma4_unified_text")
_PIECE = 4_000_000  # bytes of float32 that are made at a time: they stay in a core's cache
_COMPARED = 64_000_000  # bytes compared at a time
_log = logging.getLogger(__name__)

INDEX = "model.safetensors.index.json"


def import_hf(
    hf_dir: str | Path, checkpoint_dir: str | Path, tokenizer: str | Path | None = None, revision: str | None = None
) -> ModelConfig:
    """Write the model in `hf_dir` as a float32 checkpoint: step 0 of `checkpoint_dir`, with parameters only.

    `hf_dir` may be a hub name (`google/gemma-7b`, at `revision`). Of a multimodal Gemma only the text model is taken. The
    tokenizer's files are copied to `checkpoint_dir/tokenizer`. A `tokenizer` (its file or its folder) that extends
    the model's own takes its place, and the embedding gets rows for the new pieces.

    Raises ConfigError, and writes nothing, if the weights are not exactly those of config.json or `checkpoint_dir` has
    content.
    """
    if jax.process_count() > 1:
        raise ConfigError("import-hf runs in one process; run it on one host, into storage that every host can read")
    directory = local_directory(hf_dir, revision)
    source = {"name": str(hf_dir), "revision": revision, "hub": directory != Path(hf_dir)}
    model = model_config_from_hf(directory)
    if "text_config" in read_json(directory / "config.json"):
        source["multimodal"] = True
    weights = open_weights(directory, model)
    if tokenizer is not None:
        source["vocab_size"] = model.vocab_size
        weights, model = extend_vocabulary(weights, model, directory, Path(tokenizer))
    copied: list[str] = []

    def describe(folder: Path) -> dict:
        copied.extend(
            copy_tokenizer(Path(tokenizer) if tokenizer is not None else directory, folder / TOKENIZER_FOLDER)
        )
        if tokenizer is not None and (directory / GENERATION).is_file():
            shutil.copyfile(directory / GENERATION, folder / TOKENIZER_FOLDER / GENERATION)
        info = {"source": source, "model": to_tree(model), "source_dtype": _source_dtype(weights)}
        return info | {"tokenizer": sorted(fingerprints(folder / TOKENIZER_FOLDER).values())}

    write_checkpoint(checkpoint_dir, parameter_table(model), partial(read_finite, weights), describe)
    if not {JSON, MODEL} & {*copied}:
        _log.warning(
            "%s: no tokenizer.json or tokenizer.model here; name one with data.tokenizer when you train", hf_dir
        )
    return model


def read_finite(weights: dict[str, Any], p: Parameter, layer: int) -> Iterator[np.ndarray]:
    """Yield one layer of a parameter (a whole one: layer 0) as flat float32 pieces. Raises ConfigError for NaN or infinity."""
    name = p.hf_names[layer]
    for values in tensor_pieces(weights[name], p.hf_shape):
        _check_finite(values, name)
        yield values


def tensor_pieces(stored: Any, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """Yield a stored tensor, or what is sliced as one, as flat float32 pieces of whole rows, in order."""
    rows, *rest = shape
    step = max(1, _PIECE // (4 * math.prod(rest)))
    for start in range(0, rows, step):
        index = (slice(start, min(start + step, rows)), *(slice(0, n) for n in rest))
        yield np.ascontiguousarray(stored[index], np.float32).reshape(-1)


def _check_finite(values: np.ndarray, name: str):
    if not np.isfinite(values).all():
        raise ConfigError(f"tensor {name} holds NaN or infinity; such a model cannot be trained, so use whole weights")


def widest_mesh(model: ModelConfig) -> Mesh:
    """Make a mesh of as many devices as `hidden_size` divides over, all on the fsdp axis."""
    devices = jax.devices()
    count = max(n for n in range(1, len(devices) + 1) if model.hidden_size % n == 0)
    return make_mesh(MeshConfig(), devices[:count])


def open_weights(hf_dir: str | Path, model: ModelConfig) -> dict[str, Any]:
    """Open each Hugging Face tensor of the model as a safetensors slice, with shape and dtype checked.

    Raises ConfigError with the file and the tensor for one that is missing, unexpected, or of a wrong shape or dtype, and for
    a file that is missing or cut short.
    """
    hf_dir = Path(hf_dir)
    expected = {}
    for p in parameter_table(model):
        expected |= dict.fromkeys(p.hf_names, p.hf_shape)
    # A tied head may be in the files too: it repeats the embedding.
    accepted = expected | {"lm_head.weight": (model.vocab_size, model.hidden_size)}

    # transformers passes over these, and published files may have them: such a layer uses those of an earlier one.
    unused = tuple(
        f"model.layers.{i}.self_attn.{name}."
        for i in range(model.num_hidden_layers - model.num_kv_shared_layers, model.num_hidden_layers)
        for name in ("k_proj", "v_proj", "k_norm")
    )
    files, placed = _open_files(hf_dir)
    slices, dropped = {}, 0
    for file, handle in files.items():
        for stored in handle.keys():
            if stored.endswith("rotary_emb.inv_freq"):
                continue  # a buffer of old transformers, computed from rope_theta
            if model.model_type in _MULTIMODAL and stored.startswith(_NOT_TEXT):
                dropped += 1
                continue
            name = _text_name(stored, model)
            if name.startswith(unused):
                continue
            if name not in accepted or name in slices or placed.get(stored) != file:
                raise ConfigError(
                    f"{hf_dir / file}: unexpected tensor {stored}; these are not the weights of config.json"
                )
            slices[name] = handle.get_slice(stored)
            check_header(hf_dir / file, stored, slices[name], accepted[name])
    planned = {_text_name(stored, model): file for stored, file in placed.items()}
    for name in expected:
        if name not in planned:
            raise ConfigError(f"{hf_dir}: tensor {name} is missing from {', '.join(files)}; download the model again")
        if name not in slices:
            raise ConfigError(
                f"{hf_dir / planned[name]}: tensor {name} is missing, but {INDEX} places it here; download both"
            )
    if dropped:
        _log.warning(
            "%s: left out %d tensors of the vision tower and its like; this is the text model alone", hf_dir, dropped
        )
    if len(slices) > len(expected):
        _check_tied_head(hf_dir, slices, model)
    return {name: slices[name] for name in expected}


def _check_tied_head(hf_dir: Path, slices: dict[str, Any], model: ModelConfig):
    """Raise ConfigError if a stored head differs from the embedding, which config.json says is the head."""
    head, embedding = slices["lm_head.weight"], slices["model.embed_tokens.weight"]
    rows = max(1, _COMPARED // (4 * model.hidden_size))
    for start in range(0, model.vocab_size, rows):
        a, b = (part[start : min(start + rows, model.vocab_size)].astype(np.float32) for part in (head, embedding))
        if not np.array_equal(a, b, equal_nan=True):
            way = (
                "write tie_word_embeddings: false into config.json if the head is to be used"
                if "tie_word_embeddings" in model.family.may_set
                else "a head of its own is not supported in this family"
            )
            raise ConfigError(
                f"{hf_dir}: lm_head.weight differs from the embedding, but config.json ties them (tie_word_embeddings); {way}, or "
                "remove the tensor"
            )


def _text_name(stored: str, model: ModelConfig) -> str:
    """Return a stored tensor's name in the parameter table."""
    for prefix, ours in _TEXT_PREFIXES.items() if model.model_type in _MULTIMODAL else ():
        if stored.startswith(prefix):
            return ours + stored.removeprefix(prefix)
    return stored


def read_params(weights: dict[str, Any], model: ModelConfig, mesh: Mesh) -> dict:
    """Read the parameters as a nested dict of float32 arrays, sharded over `mesh`. A device's part is all that is read for it."""
    shardings = to_flat(parameter_shardings(model, mesh))
    arrays = {}
    for p in parameter_table(model):
        read = partial(_read_shard, weights, p)
        arrays[p.path] = jax.make_array_from_callback(p.shape, shardings[p.path], read)
    return to_nested(arrays)


def _read_shard(weights: dict[str, Any], p: Parameter, index) -> np.ndarray:
    """Read the part of parameter `p` at `index`, a slice for each axis, from one Hugging Face tensor a layer."""
    bounds = [s.indices(n)[:2] for s, n in zip(index, p.shape, strict=True)]
    out = np.empty([stop - start for start, stop in bounds], np.float32)
    inner = p.axes[1:] if p.stacked else p.axes
    rows, shape = [], p.shape[-len(inner) :]
    for axis, size, (start, stop) in zip(inner, shape, bounds[-len(inner) :], strict=True):
        if axis == "head_dim" and rows:
            # Hugging Face folds this axis into that of the heads, which comes before it.
            assert (start, stop) == (0, size), (p.path, index)
            rows[-1] = slice(rows[-1].start * size, rows[-1].stop * size)
        else:
            rows.append(slice(start, stop))
    names = p.hf_names[slice(*bounds[0])] if p.stacked else p.hf_names
    for part, name in zip(out if p.stacked else out[None], names, strict=True):
        part[...] = weights[name][tuple(rows)].reshape(part.shape)
        _check_finite(part, name)
    return out


def _open_files(hf_dir: Path) -> tuple[dict[str, TensorFile], dict[str, str]]:
    """Open the one file or those of the index; returns them by name, and for each tensor the name of its file."""
    single, index = "model.safetensors", hf_dir / INDEX
    if (hf_dir / single).is_file():
        handle = TensorFile(hf_dir / single)
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
    return {file: TensorFile(hf_dir / file) for file in sorted(set(placed.values()))}, placed


def _source_dtype(weights: dict[str, Any]) -> str:
    """Return the name of the files' one dtype, or "mixed"."""
    names = {str(DTYPES[part.get_dtype()]) for part in weights.values()}
    return names.pop() if len(names) == 1 else "mixed"
