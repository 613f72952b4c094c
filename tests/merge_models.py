"""Tiny models for the tests of merging: each a directory as transformers saves it, and their float32 tensors."""

import json
from pathlib import Path

import numpy as np
import torch
from hf_models import raw_tensors, save, transformers_model

TAGS = {"F32": torch.float32, "BF16": torch.bfloat16}


def model_directory(folder: Path, seed: int, family="gemma", dtype=torch.float32, rows=300, near: Path | None = None):
    """A model of random weights; with `near`, those of another one, a little changed. More `rows` extend its embedding."""
    model = transformers_model(family=family)
    if rows != 300:
        model.resize_token_embeddings(rows, mean_resizing=False)
    before = tensors(near) if near else {}
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(0, 0.01 if near else 0.05, generator=generator)
            if name in before:
                old = torch.from_numpy(before[name])
                p[: len(old)] += old
            elif "norm" in name:
                p += 1
    return save(model.to(dtype), folder)


def tensors(folder: Path) -> dict[str, np.ndarray]:
    """Name -> float32 array of every tensor, without this package or the safetensors library."""
    out = {}
    for name, (tag, shape, data) in raw_tensors(folder).items():
        out[name] = torch.frombuffer(bytearray(data), dtype=TAGS[tag]).reshape(shape).float().numpy()
    return out


def change(folder: Path, **settings):
    """Change keys of a directory's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
