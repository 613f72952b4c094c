"""A PEFT adapter, read into a checkpoint: what is no plain LoRA of the base is refused, never read as if it were."""

import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from easylm_mling.checkpoint.base import find_base, stored_base
from easylm_mling.checkpoint.reading import load_info, stored_model
from easylm_mling.checkpoint.writing import write_checkpoint
from easylm_mling.config import PROJECTIONS, LoraConfig, ModelConfig, to_tree
from easylm_mling.data.tokenization.files import TOKENIZER_FOLDER, check_inside, copy_tokenizer
from easylm_mling.data.tokenization.tokenizer import fingerprints, shipped_fingerprints
from easylm_mling.errors import ConfigError, check
from easylm_mling.hf.importing import tensor_pieces
from easylm_mling.hf.json_files import read_json
from easylm_mling.hf.peft import CONFIG, MULTIMODAL_PREFIX, PREFIX, WEIGHTS
from easylm_mling.hf.tensor_files import TensorFile, check_header
from easylm_mling.hf.tokenizer import own_tokenizer
from easylm_mling.model.params import Parameter, adapter_table
from easylm_mling.storage.object_store import small_files

# Settings that change nothing of a stored adapter, and those that are read -> what makes it a plain LoRA. Whatever else is set
# (use_dora, rank_pattern, modules_to_save, alora_invocation_tokens, and what peft will think of) makes it another function.
_SILENT = {
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "r",
    "lora_alpha", "use_rslora", "lora_dropout", "target_modules", "exclude_modules", "layers_pattern", "megatron_core",
    "qalora_group_size", "ensure_weight_tying",
}  # fmt: skip
_PLAIN = {"bias": ("none",), "init_lora_weights": (True, False, "gaussian")}
_NOTHING = (None, False, [], {})


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
    files = small_files(base_dir)
    tokenizer = own_tokenizer(files, shipped_fingerprints(load_info(base_dir, base.step)))
    check_inside(tokenizer)

    def describe(folder: Path) -> dict:
        copy_tokenizer(tokenizer, folder / TOKENIZER_FOLDER)
        return {
            "source": {"name": str(adapter_dir), "revision": None, "hub": False},
            "model": to_tree(model),
            "lora": to_tree(lora),
            "base": base._asdict(),
            "tokenizer": sorted(fingerprints(folder / TOKENIZER_FOLDER).values()),
        }

    write_checkpoint(checkpoint_dir, table, partial(_read, weights), describe)
    return lora


def _named_tensors(adapter_dir: Path) -> dict[str, Any]:
    """Return the slices of the adapter's file by our names, those of a model of text alone."""
    if not (adapter_dir / WEIGHTS).is_file():
        raise ConfigError(f"{adapter_dir}: no {WEIGHTS} here; save the adapter again with safe_serialization=True")
    file = TensorFile(adapter_dir / WEIGHTS)
    names = {name: name.replace(MULTIMODAL_PREFIX, PREFIX, 1) for name in file.keys()}
    shape = rf"{re.escape(PREFIX)}\d+\.\w+\.({'|'.join(PROJECTIONS)})\.lora_[AB]\.weight"
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


def _read(weights: dict[str, Any], p: Parameter, layer: int) -> Iterator[np.ndarray]:
    """Yield one layer of a factor as flat float32 pieces; raises ConfigError for NaN or infinity."""
    name = p.hf_names[layer]
    for values in tensor_pieces(weights[name], p.hf_shape):
        check(bool(np.isfinite(values).all()), f"tensor {name} holds NaN or infinity; use a whole adapter")
        yield values
