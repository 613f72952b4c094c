"""PEFT's adapters, as peft and vLLM load them, written from a checkpoint.

Source of the format: peft 0.21.2, `utils/save_and_load.py` and `tuners/lora/config.py`. What peft does not find it replaces by
defaults without a word (a missing lora_alpha by 8), so every setting is written, and none that is missing is guessed.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from easylm_mling.checkpoint.base import Base, stored_base
from easylm_mling.checkpoint.layout import step_directory
from easylm_mling.checkpoint.reading import load_info
from easylm_mling.config import LoraConfig
from easylm_mling.data.tokenization.files import check_inside, copy_tokenizer
from easylm_mling.data.tokenization.tokenizer import shipped_fingerprints
from easylm_mling.errors import VerificationError
from easylm_mling.hf.adapters import stored_adapters
from easylm_mling.hf.exporting import Tensor, write_shards
from easylm_mling.hf.json_files import read_json, write_json
from easylm_mling.hf.tensor_files import TensorFile
from easylm_mling.hf.tokenizer import own_tokenizer
from easylm_mling.model.params import Parameter
from easylm_mling.storage.atomic import atomic_directory
from easylm_mling.storage.object_store import small_files

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_VERSION = "0.21.2"  # of peft, whose form this is
PREFIX, MULTIMODAL_PREFIX = "base_model.model.model.layers.", "base_model.model.model.language_model.layers."


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
    lora, arrays = stored_adapters(where, "average" if ema else "params")
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
    lora, arrays = stored_adapters(step_directory(checkpoint_dir, step), "average" if ema else "params")
    stored, file = read_json(Path(adapter_dir) / CONFIG), TensorFile(Path(adapter_dir) / WEIGHTS)
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
    return name.replace(PREFIX, MULTIMODAL_PREFIX, 1) if multimodal else name


def _reader(arrays: list[tuple[Parameter, np.ndarray]]):
    by_path = {p.path: array for p, array in arrays}

    def read(tensor: Tensor) -> Iterator[np.ndarray]:
        yield np.ascontiguousarray(by_path[tensor.parameter.path][tensor.layer or 0]).reshape(-1)

    return read


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
