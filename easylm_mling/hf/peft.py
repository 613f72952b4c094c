"""PEFT's adapters, as peft and vLLM load them: written from a checkpoint, and read into one.

Source of the format: peft 0.21.2, `utils/save_and_load.py` and `tuners/lora/config.py`. What peft does not find it replaces by
defaults without a word (a missing lora_alpha by 8), so every setting is written, and none that is missing is guessed.
"""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from easylm_mling.checkpoint.base import Base, find_base, stored_base
from easylm_mling.checkpoint.layout import step_directory
from easylm_mling.checkpoint.reading import PARTS, load_info, stored_model
from easylm_mling.config import PROJECTIONS, LoraConfig, ModelConfig, to_tree
from easylm_mling.data.tokenization.files import TOKENIZER_FOLDER, check_inside, copy_tokenizer
from easylm_mling.data.tokenization.tokenizer import fingerprints, shipped_fingerprints
from easylm_mling.errors import ConfigError, VerificationError, check
from easylm_mling.hf.adapters import stored_adapters
from easylm_mling.hf.exporting import Tensor, write_shards
from easylm_mling.hf.importing import new_directory, save_checkpoint, widest_mesh
from easylm_mling.hf.json_files import read_json, write_json
from easylm_mling.hf.tensor_files import DTYPES, check_header, open_file
from easylm_mling.hf.tokenizer import own_tokenizer
from easylm_mling.model.params import Parameter, adapter_table, to_flat, to_nested
from easylm_mling.model.sharding import adapter_shardings
from easylm_mling.storage.atomic import atomic_directory
from easylm_mling.storage.object_store import small_files

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_VERSION = "0.21.2"  # of peft, whose form this is
_PREFIX, _MULTIMODAL_PREFIX = "base_model.model.model.layers.", "base_model.model.model.language_model.layers."
# Settings that change nothing of a stored adapter, and those that are read -> what makes it a plain LoRA. Whatever else is set
# (use_dora, rank_pattern, modules_to_save, alora_invocation_tokens, and what peft will think of) makes it another function.
_SILENT = {
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "r",
    "lora_alpha", "use_rslora", "lora_dropout", "target_modules", "exclude_modules", "layers_pattern", "megatron_core",
    "qalora_group_size", "ensure_weight_tying",
}  # fmt: skip
_PLAIN = {"bias": ("none",), "init_lora_weights": (True, False, "gaussian")}
_NOTHING = (None, False, [], {})


def export_adapter(
    checkpoint_dir: str | Path,
    adapter_dir: str | Path,
    step: int | None = None,
    base_name: str | None = None,
    ema: bool = False,
) -> list[str]:
    """Write the adapters at `step` (default: the newest) of a run or an imported adapter for peft and vLLM, in float32.

    `base_name` is the model that they are loaded beside: a hub name or a directory (default: what the base was imported from).
    `ema`: write the averaged adapters (`train.ema`). Returns warnings, one line each. Raises ConfigError for a checkpoint without adapters, and an `adapter_dir` with content.
    """
    where = step_directory(checkpoint_dir, step)
    lora, arrays = stored_adapters(where, PARTS[ema])
    info, files = load_info(checkpoint_dir, int(where.name)), small_files(checkpoint_dir)
    base = stored_base(info)
    assert base
    source, warnings = _source_of(base)
    name = base_name or source.get("name") or base.init_from
    if base_name is None and not source:
        warnings.append(
            f"{adapter_dir}: the base is the checkpoint {base.init_from}, which peft cannot load; export that, and say where to "
            "with --base"
        )
    tokenizer = own_tokenizer(files, shipped_fingerprints(info))
    check_inside(tokenizer)
    multimodal = bool(source.get("multimodal")) and base_name in (None, source.get("name"))
    tensors = adapter_tensors(arrays, multimodal)
    with atomic_directory(adapter_dir) as partial:
        copy_tokenizer(tokenizer, partial)
        write_json(partial / CONFIG, adapter_config(lora, str(name), source.get("revision"), multimodal))
        (partial / "README.md").write_text(_card(lora, str(name), Path(adapter_dir).name, ema), encoding="utf-8")
        write_shards(partial, {WEIGHTS: list(tensors.values())}, "F32", _reader(arrays))
    return warnings


def adapter_config(lora: LoraConfig, base: str, revision: str | None, multimodal: bool = False) -> dict:
    """Return the content of adapter_config.json, with all that peft and vLLM read."""
    names = sorted(lora.projections)
    # A plain list of names would also be found in the towers of a multimodal model.
    targets = rf".*language_model.*\.({'|'.join(names)})" if multimodal else names
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "use_rslora": lora.rslora,
        "lora_dropout": lora.dropout,
        "target_modules": targets,
        "bias": "none",
        "use_dora": False,
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "layers_to_transform": None,
        "layers_pattern": None,
        "init_lora_weights": True,
        "inference_mode": True,
        "peft_version": _VERSION,
    }


def adapter_tensors(arrays: list[tuple[Parameter, np.ndarray]], multimodal: bool) -> dict[str, Tensor]:
    """Return PEFT's name -> its tensor, in the order of layers."""
    named = [
        (layer, name, Tensor(_peft_name(name, multimodal), p, i, 4 * math.prod(p.hf_shape)))
        for p, _ in arrays
        for i, (layer, name) in enumerate(zip(p.layers, p.hf_names, strict=True))
    ]
    return {tensor.name: tensor for _, _, tensor in sorted(named, key=lambda each: each[0])}


def verify_adapter(
    checkpoint_dir: str | Path, adapter_dir: str | Path, step: int | None = None, ema: bool = False
) -> list[str]:
    """Compare the files of an exported adapter with its checkpoint's adapters, or with `ema` with their average.

    Returns a line for each check.

    Raises VerificationError that names the first difference.
    """
    lora, arrays = stored_adapters(step_directory(checkpoint_dir, step), PARTS[ema])
    stored, file = read_json(Path(adapter_dir) / CONFIG), open_file(Path(adapter_dir) / WEIGHTS)
    for key, value in adapter_config(lora, "", None).items():
        if key not in ("base_model_name_or_path", "revision", "target_modules") and stored.get(key) != value:
            raise VerificationError(f"{adapter_dir}/{CONFIG}: {key}={stored.get(key)}, and the run has {value}")
    tensors = adapter_tensors(arrays, isinstance(stored.get("target_modules"), str))
    if set(file.keys()) != tensors.keys():
        raise VerificationError(f"{adapter_dir}/{WEIGHTS}: holds other tensors than the run has adapters; export again")
    read = _reader(arrays)
    for name, tensor in tensors.items():
        if file.get_tensor(name).tobytes() != b"".join(values.tobytes() for values in read(tensor)):
            raise VerificationError(f"{adapter_dir}: tensor {name} is not the checkpoint's; export again")
    return [f"{len(tensors)} tensors are bit for bit the checkpoint's, and {CONFIG} has its settings"]


def import_adapter(adapter_dir: str | Path, checkpoint_dir: str | Path, base_dir: str | Path) -> LoraConfig:
    """Write the PEFT adapter in `adapter_dir` as step 0 of `checkpoint_dir`, beside the newest step of `base_dir`.

    `base_dir` is what `import-hf` made of its base, or a run. The checkpoint can be sampled, evaluated, merged and exported, and
    `lora.init_from` begins with it. Raises ConfigError, and writes nothing, for an adapter of another base (by names and
    shapes), for what is no plain LoRA, and for a `checkpoint_dir` with content.
    """
    adapter_dir = Path(adapter_dir)
    base = find_base(base_dir)
    check(
        stored_base(load_info(base_dir, base.step)) is None,
        f"--base {base_dir}: holds adapters itself; merge it first with `easylm-mling merge --checkpoint`",
    )
    model, settings = stored_model(base_dir, base.step), read_json(adapter_dir / CONFIG)
    weights = _named_tensors(adapter_dir)
    lora = _read_config(adapter_dir / CONFIG, settings, {name.split(".")[-3] for name in weights})
    lora.check_model(model)
    table = _check_tensors(adapter_dir, weights, model, lora)
    shardings = to_flat(adapter_shardings(model, lora, widest_mesh(model)))
    arrays = {p.path: jax.device_put(_stacked(p, weights), shardings[p.path]) for p in table}
    files = small_files(base_dir)
    tokenizer = own_tokenizer(files, shipped_fingerprints(load_info(base_dir, base.step)))
    check_inside(tokenizer)
    with new_directory(checkpoint_dir) as (folder, checkpoints_dir):
        copy_tokenizer(tokenizer, folder / TOKENIZER_FOLDER)
        info = {
            "source": {"name": str(adapter_dir), "revision": None, "hub": False},
            "model": to_tree(model),
            "lora": to_tree(lora),
            "base": base._asdict(),
            "tokenizer": sorted(fingerprints(folder / TOKENIZER_FOLDER).values()),
        }
        save_checkpoint(checkpoint_dir, checkpoints_dir, to_nested(arrays), info)
    return lora


def _source_of(base: Base) -> tuple[dict, list[str]]:
    """Return what the base was imported from, {} where it was trained or changed since; and warnings."""
    info = load_info(base.init_from, base.step)
    source = info.get("source")
    if not isinstance(source, dict) or "tokens" in info or "merge" in info:
        return {}, []
    if "vocab_size" in source:
        return {}, [
            f"{base.init_from}: its vocabulary was extended, so the adapter does not belong to {source['name']}"
        ]
    return source, []


def _peft_name(name: str, multimodal: bool) -> str:
    return name.replace(_PREFIX, _MULTIMODAL_PREFIX, 1) if multimodal else name


def _reader(arrays: list[tuple[Parameter, np.ndarray]]):
    by_path = {p.path: array for p, array in arrays}

    def read(tensor: Tensor) -> Iterator[np.ndarray]:
        yield np.ascontiguousarray(by_path[tensor.parameter.path][tensor.layer or 0]).reshape(-1)

    return read


def _named_tensors(adapter_dir: Path) -> dict[str, Any]:
    """Return the slices of the adapter's file by our names, those of a model of text alone."""
    if not (adapter_dir / WEIGHTS).is_file():
        raise ConfigError(f"{adapter_dir}: no {WEIGHTS} here; save the adapter again with safe_serialization=True")
    file = open_file(adapter_dir / WEIGHTS)
    names = {name: name.replace(_MULTIMODAL_PREFIX, _PREFIX, 1) for name in file.keys()}
    shape = rf"{re.escape(_PREFIX)}\d+\.\w+\.({'|'.join(PROJECTIONS)})\.lora_[AB]\.weight"
    for stored, name in names.items():
        check(
            re.fullmatch(shape, name) is not None,
            f"{adapter_dir / WEIGHTS}: tensor {stored} is no adapter of {', '.join(PROJECTIONS)}; only those can be imported",
        )
    check(bool(names), f"{adapter_dir / WEIGHTS}: holds no tensors; save the adapter again")
    return {name: file.get_slice(stored) for stored, name in names.items()}


def _read_config(file: Path, settings: dict, projections: set[str]) -> LoraConfig:
    """Return the settings of an adapter; raises ConfigError for one that is missing or is no plain LoRA."""
    kind = settings.get("peft_type")
    check(kind == "LORA", f"{file}: peft_type={kind!r}; only LORA can be imported")
    for key, value in settings.items():
        plain = key in _SILENT or value in _PLAIN.get(key, _NOTHING) or value in _NOTHING
        check(plain, f"{file}: {key}={json.dumps(value)[:80]} is not supported; train a plain LoRA")
    targets = settings.get("target_modules")
    if isinstance(targets, list):
        lost = sorted({str(name).rpartition(".")[2] for name in targets} - projections)
        check(
            not lost,
            f"{file}: target_modules names {', '.join(lost)}, of which {WEIGHTS} has no tensor; use a whole adapter",
        )
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    for key, value in (("r", rank), ("lora_alpha", alpha)):
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        check(number, f"{file}: {key}={value!r} must be a number; copy the adapter's own {CONFIG}")
    check(isinstance(rank, int), f"{file}: r={rank} must be a whole number")
    dropout = settings.get("lora_dropout") or 0.0
    ordered = tuple(name for name in PROJECTIONS if name in projections)
    assert isinstance(rank, int) and isinstance(alpha, (int, float))
    return LoraConfig(rank, float(alpha), bool(settings.get("use_rslora")), float(dropout), ordered)


def _check_tensors(adapter_dir: Path, weights: dict, model: ModelConfig, lora: LoraConfig) -> list[Parameter]:
    """Return the adapter table; raises ConfigError unless the tensors are exactly its, in names and shapes."""
    table = adapter_table(model, lora)
    expected = {name: p.hf_shape for p in table for name in p.hf_names}
    another = "this adapter belongs to another base; name its own with --base"
    for name, shape in expected.items():
        check(name in weights, f"{adapter_dir / WEIGHTS}: tensor {name} is missing; {another}")
        stored = tuple(weights[name].get_shape())
        check(
            stored == shape,
            f"{adapter_dir / WEIGHTS}: tensor {name} has shape {stored}, and for this base it is {shape}; {another}",
        )
        check_header(adapter_dir / WEIGHTS, name, weights[name], shape)
    for name in weights:
        check(name in expected, f"{adapter_dir / WEIGHTS}: unexpected tensor {name}; {another}")
    return table


def _stacked(p: Parameter, weights: dict[str, Any]) -> np.ndarray:
    array = np.empty(p.shape, np.float32)
    for layer, name in zip(array, p.hf_names, strict=True):
        layer[...] = (
            np.asarray(weights[name][:], DTYPES[weights[name].get_dtype()]).astype(np.float32).reshape(layer.shape)
        )
        check(bool(np.isfinite(layer).all()), f"tensor {name} holds NaN or infinity; use a whole adapter")
    return array


def _card(lora: LoraConfig, base: str, name: str, ema: bool) -> str:
    averaged = " It is the running average of the training steps' adapters." if ema else ""
    kind = "rsLoRA" if lora.rslora else "LoRA"
    return f"""---
base_model: {json.dumps(base)}
library_name: peft
pipeline_tag: text-generation
---

# {name}

A {kind} adapter of rank {lora.rank}, alpha {lora.alpha:g}, on {", ".join(lora.projections)}, trained with easylm-mling.
It changes nothing unless it is loaded beside its own base model.{averaged}

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained({json.dumps(base)}, dtype="bfloat16")
model = PeftModel.from_pretrained(base, {json.dumps(name)})
tokenizer = AutoTokenizer.from_pretrained({json.dumps(name)})
```

vLLM loads adapters up to rank 16 unless it is told more: `--max-lora-rank {max(16, lora.rank)}`.
"""
