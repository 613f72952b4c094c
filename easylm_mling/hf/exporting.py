"""Export a checkpoint's parameters to a Hugging Face directory, one tensor in memory at a time.

Files and headers follow from shapes alone, so each tensor is written while it is read.
Source of the format: safetensors README (8-byte little-endian header length, JSON header, then the data).
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import tensorstore as ts

from easylm_mling.checkpoint.layout import step_directory
from easylm_mling.checkpoint.reading import check_part, load_info, open_store, stored_model
from easylm_mling.config import ModelConfig
from easylm_mling.data.tokenization.files import TOKENIZER_FOLDER, check_inside, copy_tokenizer
from easylm_mling.data.tokenization.tokenizer import shipped_fingerprints
from easylm_mling.errors import ConfigError
from easylm_mling.hf.adapters import MergedTensors, base_directory
from easylm_mling.hf.card import write_card
from easylm_mling.hf.card_sections import Export
from easylm_mling.hf.config import hf_config
from easylm_mling.hf.generation_config import GENERATION, hf_generation_config
from easylm_mling.hf.importing import INDEX
from easylm_mling.hf.json_files import read_json, write_json
from easylm_mling.hf.tensor_files import DTYPES
from easylm_mling.hf.tokenizer import bos_seen, complete_tokenizer, own_tokenizer
from easylm_mling.model.params import Parameter, parameter_table
from easylm_mling.monitoring.metrics import MetricsLog
from easylm_mling.storage.ahead import ahead
from easylm_mling.storage.atomic import atomic_directory
from easylm_mling.storage.object_store import Bucket, is_bucket, small_files
from easylm_mling.training.digests import Pieces, leaf_name

_TAGS = {"bfloat16": "BF16", "float32": "F32"}
_PIECE = 64_000_000  # bytes read at a time
AVERAGED = "The weights are the running average of those of the training steps (`train.ema`), and not the last ones.\n"


@dataclass(frozen=True)
class Tensor:
    """One Hugging Face tensor: a parameter, or one layer of a stack."""

    name: str
    parameter: Parameter
    layer: int | None  # its index in the stack
    nbytes: int  # in the dtype of the export


def export_hf(
    checkpoint_dir: str | Path,
    hf_dir: str | Path,
    step: int | None = None,
    dtype: str = "bfloat16",
    max_shard_bytes: float = 5e9,
    name: str | None = None,
    languages: tuple[str, ...] = (),
    tell: Callable[[str], None] = lambda line: None,
    ema: bool = False,
) -> list[str]:
    """Write the parameters at `step` (default: the newest) of a run or an imported checkpoint for transformers.

    With `ema` those are its averaged ones (`train.ema`).

    Values are rounded to the nearest, ties to even. A tensor larger than `max_shard_bytes` gets a file of its own. The model
    card shows `name` (default: that of `hf_dir`), and `languages` (ISO 639 codes) beside those of the data's folders.
    Adapters are merged into their base, and `tell` is called with a line for each kind of matrix: what rounding takes from them.

    Returns warnings, one line each. Raises ConfigError for an unknown dtype, a checkpoint that is missing or holds other
    shapes than its config, and an `hf_dir` with content.
    """
    tag = dtype_tag(dtype, max_shard_bytes)
    step_dir = step_directory(checkpoint_dir, step)
    step, files = int(step_dir.name), small_files(checkpoint_dir)
    tokenizer = own_tokenizer(files, shipped_fingerprints(load_info(checkpoint_dir, step)))
    check_inside(tokenizer)
    model = stored_model(checkpoint_dir, step)
    target = DTYPES[tag]
    read = open_parameters(step_dir, model, target, "average" if ema else "params")
    made = AVERAGED if ema else ""
    shards = plan_shards(model, target.itemsize, max_shard_bytes)
    with atomic_directory(hf_dir) as partial:
        tokenizer_files, bos, warnings = write_settings(partial, tokenizer, model, dtype, hf_dir)
        write_card(
            partial, Export(checkpoint_dir, files, step, model, dtype, name or Path(hf_dir).name, bos), languages, made
        )
        write_shards(partial, shards, tag, read)
    for line in read.effects() if isinstance(read, MergedTensors) else ():
        tell(line)
    if {"tokenizer.model", "tokenizer.json"} & {*tokenizer_files}:
        return warnings
    return [
        f"{checkpoint_dir}: no {TOKENIZER_FOLDER}/ folder here, so {hf_dir} has no tokenizer; copy the base model's files into it"
    ]


def dtype_tag(dtype: str, max_shard_bytes: float) -> str:
    """Return the safetensors tag of the dtype of an export; raises ConfigError for what cannot be written."""
    if dtype not in _TAGS:
        raise ConfigError(f"dtype={dtype!r} cannot be exported; use one of {', '.join(_TAGS)}")
    if not max_shard_bytes > 0:
        raise ConfigError(f"max_shard_bytes={max_shard_bytes} must be positive")
    return _TAGS[dtype]


def write_settings(
    partial: Path, tokenizer: Path, model: ModelConfig, dtype: str, hf_dir: str | Path
) -> tuple[list[str], int | None, list[str]]:
    """Write all of a Hugging Face directory but weights and card: the tokenizer's files, config and generation config.

    Returns the tokenizer's files, how many BOS transformers' tokenizer adds (hf/tokenizer.py), and warnings.
    """
    tokenizer_files = copy_tokenizer(tokenizer, partial)
    write_json(partial / "config.json", hf_config(model, dtype))
    kept = read_json(partial / GENERATION) if GENERATION in tokenizer_files else {}
    write_json(partial / GENERATION, hf_generation_config(model, kept))
    complete_tokenizer(partial)
    return tokenizer_files, *bos_seen(partial, model, hf_dir)


def write_shards(
    folder: Path, shards: dict[str, list[Tensor]], tag: str, read: Callable[[Tensor], Iterable[np.ndarray]]
):
    """Write the .safetensors files, each tensor as `read` yields it (flat pieces in the dtype of `tag`), and the index."""
    for file_name, tensors in shards.items():
        with open(folder / file_name, "xb") as file:
            file.write(shard_header(tensors, tag))
            for values in ahead(values for tensor in tensors for values in read(tensor)):
                file.write(values.view(np.uint8).data)
    if len(shards) > 1:
        write_json(folder / INDEX, shard_index(shards))


def note_export(
    checkpoint_dir: str | Path,
    hf_dir: str | Path,
    step: int,
    dtype: str,
    averaged: Sequence[int] = (),
    ema: bool = False,
) -> bool:
    """Note the export in the metrics of a run; an imported checkpoint has none. Returns False if the run is being trained.

    `averaged`: the steps that it is the mean of, if it is one. `ema`: it is of the averaged parameters.
    """
    metrics = small_files(checkpoint_dir) / "metrics.jsonl"
    if not metrics.exists():
        return True
    before = metrics.read_bytes() if is_bucket(checkpoint_dir) else b""
    mean = ({"averaged": list(averaged)} if averaged else {}) | ({"ema": True} if ema else {})
    with MetricsLog(metrics) as log:
        log.write("export", step, path=str(Path(hf_dir).absolute()), dtype=dtype, **mean)
    if not is_bucket(checkpoint_dir):
        return True
    return Bucket(str(checkpoint_dir)).replace(metrics.name, before, metrics.read_bytes())


def plan_shards(model: ModelConfig, itemsize: int, max_shard_bytes: float) -> dict[str, list[Tensor]]:
    """Return file name -> its tensors, in the order of layers, each file filled as far as `max_shard_bytes` allows."""
    order = []
    for stacked, group in itertools.groupby(parameter_table(model), lambda p: p.stacked):
        rows = list(group)
        if not stacked:
            order += [(p, p.hf_name, None) for p in rows]
            continue
        of_layers = [
            (n, p, name, i) for p in rows for i, (n, name) in enumerate(zip(p.layers, p.hf_names, strict=True))
        ]
        order += [place for _, *place in sorted(of_layers, key=lambda each: each[0])]
    groups: list[list[Tensor]] = [[]]
    for p, name, layer in order:
        tensor = Tensor(name, p, layer, math.prod(p.hf_shape) * itemsize)
        if groups[-1] and sum(t.nbytes for t in groups[-1]) + tensor.nbytes > max_shard_bytes:
            groups.append([])
        groups[-1].append(tensor)
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i:05}-of-{len(groups):05}.safetensors": group for i, group in enumerate(groups, 1)}


def shard_header(tensors: list[Tensor], tag: str) -> bytes:
    """Return the bytes before the values of a .safetensors file, a multiple of 8."""
    header: dict = {"__metadata__": {"format": "pt"}}
    offset = 0
    for t in tensors:
        header[t.name] = {"dtype": tag, "shape": t.parameter.hf_shape, "data_offsets": [offset, offset + t.nbytes]}
        offset += t.nbytes
    text = orjson.dumps(header)
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def shard_index(shards: dict[str, list[Tensor]]) -> dict:
    """Return the content of model.safetensors.index.json."""
    tensors = [t for group in shards.values() for t in group]
    return {
        "metadata": {
            "total_parameters": sum(math.prod(t.parameter.hf_shape) for t in tensors),
            "total_size": sum(t.nbytes for t in tensors),
        },
        "weight_map": {t.name: file for file, group in shards.items() for t in group},
    }


def open_parameters(
    step_dir: Path, model: ModelConfig, dtype: np.dtype, part: str = "params"
) -> Callable[[Tensor], Iterator[np.ndarray]]:
    """Return a function that yields a tensor of a checkpoint step in flat pieces, in order, rounded to `dtype`.

    `part`: "params", or "average" for the running average of what was trained. Of a step that holds adapters it yields the
    tensors of their base with the adapters added (MergedTensors). Raises ConfigError when a parameter has another shape than
    in `model`, cannot be read, or is not what was saved. The last shows only when all of its layers are read.
    """
    info = load_info(step_dir.parent.parent, int(step_dir.name))
    if base := base_directory(step_dir, info):
        return MergedTensors(open_parameters(base, model, np.dtype(np.float32)), step_dir, dtype, part)
    check_part(step_dir, part)
    stores = open_stores(step_dir, model, part)
    saved, buffers = info.get("digests", {}), [np.empty(0, np.float32)] * 2
    digests = {path: Pieces() for path in stores}

    def read(tensor: Tensor) -> Iterator[np.ndarray]:
        p = tensor.parameter
        store, digest = stores[p.path], digests[p.path]
        view = store if tensor.layer is None else store[tensor.layer]
        try:
            yield from _in_order(view, dtype, digest, (tensor.layer or 0) * view.size, buffers)
        except ValueError as error:
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(f"{step_dir}: parameter {p.path} cannot be read ({reason}); use another step") from None
        if digest.size == store.size and str(digest) != saved.get(leaf_name(part, *p.path.split("."))):
            raise ConfigError(f"{step_dir}: parameter {p.path} is not what was saved; use another step")

    return read


def open_stores(step_dir: Path, model: ModelConfig, part: str = "params") -> dict[str, ts.TensorStore]:
    """Open the stored parameters of a part, by path. Raises ConfigError for one that `open_store` refuses."""
    return {p.path: open_store(step_dir, p.path, p.shape, part=part) for p in parameter_table(model)}


def _in_order(
    view: ts.TensorStore, dtype: np.dtype, digest: Pieces, first: int, buffers: list[np.ndarray]
) -> Iterator[np.ndarray]:
    """Yield the flat values of `view` in pieces if it is stored by rows; else at once, as every chunk holds all rows.

    They are added to `digest`, whose flat array has those of the view from index `first`. Two `buffers` are read into.
    """
    axis, pieces = _pieces(view)
    stride, inner = math.prod(view.shape[axis:]), math.prod(view.shape[axis + 1 :])
    whole = None if axis == 0 else np.empty(view.shape, dtype)
    for piece, values in zip(pieces, _read_ahead(view, pieces, buffers), strict=True):
        rows = np.ascontiguousarray(values).reshape(math.prod(view.shape[:axis]), -1)
        digest.add(rows, first + piece[axis].start * inner, stride)
        if whole is None:
            yield values.astype(dtype).reshape(-1)
        else:
            whole[piece] = values
    if whole is not None:
        yield whole.reshape(-1)


def _read_ahead(
    view: ts.TensorStore, pieces: list[tuple[slice, ...]], buffers: list[np.ndarray]
) -> Iterator[np.ndarray]:
    """Yield the values of each piece, while the next one is being read; the next but one overwrites them.

    Memory that is used again costs half of the processor's time: the system need not clear it first.
    """

    def begin(i: int):
        part: Any = view[pieces[i]][ts.d[:].translate_to[0]]
        if buffers[i % 2].size < part.size:
            buffers[i % 2] = np.empty(part.size, np.float32)
        values = buffers[i % 2][: part.size].reshape(part.shape)
        return values, ts.array(values).write(part)

    values, reading = begin(0)
    try:
        for i in range(1, len(pieces) + 1):
            current, _ = values, reading.result()
            if i < len(pieces):
                values, reading = begin(i)
            yield current
    finally:
        reading.result()  # where the caller stops early, too: its buffer is used again


def _pieces(view: ts.TensorStore) -> tuple[int, list[tuple[slice, ...]]]:
    """Return the axis with the most chunks, and cuts of whole chunks along it, of about _PIECE bytes each."""
    chunk = view.chunk_layout.write_chunk_template.shape
    axis = max(range(view.rank), key=lambda a: view.shape[a] / chunk[a])
    length = view.shape[axis]
    step = chunk[axis] * max(1, _PIECE * length // (4 * view.size * chunk[axis]))
    starts = range(0, length, step)
    return axis, [(*[slice(None)] * axis, slice(start, min(start + step, length))) for start in starts]
