"""Merges are those of mergekit 0.1.5 in float32, to 1e-6, on tiny Gemma 1, Gemma 3 and Llama.

mergekit is not among the test requirements. Install it into an environment of its own and name that one's Python:

    python -m venv /tmp/mergekit && /tmp/mergekit/bin/pip install mergekit==0.1.5
    MERGEKIT_PYTHON=/tmp/mergekit/bin/python python -m pytest tests/test_merge_mergekit.py
"""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import yaml
from hf_models import save
from merge_models import model_directory, tensors
from test_lora_peft import peft_model
from transformers import AutoModelForCausalLM

from easylm_mling.hf.exporting import export_hf
from easylm_mling.hf.importing import import_hf
from easylm_mling.hf.peft_importing import import_adapter
from easylm_mling.merge.recipe import MergeRecipe, ModelRef
from easylm_mling.merge.writing import merge_to_checkpoint, merge_to_hf

PYTHON = os.environ.get("MERGEKIT_PYTHON")
pytestmark = [
    pytest.mark.skipif(not PYTHON, reason="MERGEKIT_PYTHON names no Python with mergekit 0.1.5"),
    # peft 0.21 asks transformers 5.23 by an old name.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]


@pytest.fixture(scope="module", params=["gemma", "gemma3_text", "llama"])
def models(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    base = model_directory(root / "base", 1, request.param)
    far = model_directory(root / "far", 4, request.param)
    return [base, *(model_directory(root / f"m{i}", i, request.param, near=base) for i in (2, 3)), far]


def mergekit(folder: Path, tree: dict) -> dict[str, np.ndarray]:
    folder.mkdir()
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"dtype": "float32", **tree}))
    command = [
        Path(str(PYTHON)).parent / "mergekit-yaml",
        folder / "recipe.yaml",
        folder / "out",
        "--no-copy-tokenizer",
        f"--lora-merge-cache={folder / 'cache'}",
        "--lora-merge-dtype=float32",
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"XLA_FLAGS": ""})
    assert done.returncode == 0, done.stderr[-2000:]
    return tensors(folder / "out")


def assert_theirs(recipe: MergeRecipe, theirs: dict, folder: Path):
    """Also of the merge as a checkpoint. Of an extended vocabulary the first rows are compared."""
    merge_to_hf(recipe, folder, "float32")
    ours = tensors(folder)
    theirs.pop("lm_head.weight", None) if "lm_head.weight" not in ours else None
    assert ours.keys() == theirs.keys()
    for name, values in ours.items():
        np.testing.assert_allclose(values[: len(theirs[name])], theirs[name], rtol=0, atol=1e-6, err_msg=name)
    merge_to_checkpoint(recipe, folder.parent / "checkpoint")
    export_hf(folder.parent / "checkpoint", folder.parent / "exported", dtype="float32")
    for name, values in tensors(folder.parent / "exported").items():
        np.testing.assert_array_equal(values, ours[name], err_msg=name)


def listed(models, weights):
    return [{"model": str(m), "parameters": {"weight": w}} for m, w in zip(models, weights, strict=True)]


def refs(models, weights):
    return tuple(ModelRef(str(m), weight=w) for m, w in zip(models, weights, strict=True))


def test_linear(models, tmp_path):
    weights = (0.2, 0.7, 0.4)
    theirs = mergekit(tmp_path / "theirs", {"merge_method": "linear", "models": listed(models[:3], weights)})
    assert_theirs(MergeRecipe("linear", refs(models[:3], weights)), theirs, tmp_path / "ours")


def test_task_arithmetic(models, tmp_path):
    base, weights = models[0], (1.0, 0.6)
    tree = {"merge_method": "task_arithmetic", "base_model": str(base), "models": listed(models[1:3], weights)}
    theirs = mergekit(tmp_path / "theirs", tree)
    recipe = MergeRecipe("task_arithmetic", refs(models[1:3], weights), base=ModelRef(str(base)))
    assert_theirs(recipe, theirs, tmp_path / "ours")


def test_an_extended_vocabulary(models, tmp_path):
    """mergekit refuses such models; it gets the first rows of the extended one."""
    base, instruct = models[:2]
    family = json.loads((base / "config.json").read_text())["model_type"]
    more = model_directory(tmp_path / "more", 7, family, rows=310, near=base)
    cut = AutoModelForCausalLM.from_pretrained(more, dtype="float32")
    cut.resize_token_embeddings(300)
    save(cut, tmp_path / "cut")
    tree = {"merge_method": "task_arithmetic", "base_model": str(base)}
    theirs = mergekit(tmp_path / "theirs", tree | {"models": listed((tmp_path / "cut", instruct), (1.0, 0.7))})
    start, chat = ModelRef(str(more)), refs((instruct,), (0.7,))
    recipe = MergeRecipe("task_arithmetic", chat, base=ModelRef(str(base)), start=start, vocabulary="first_rows")
    assert_theirs(recipe, theirs, tmp_path / "ours")
    assert len(tensors(tmp_path / "ours")["model.embed_tokens.weight"]) == 310


def test_an_adapter(models, tmp_path):
    base, other = models[:2]
    peft_model(AutoModelForCausalLM.from_pretrained(base, dtype="float32")).save_pretrained(tmp_path / "adapter")
    weights = (1.0, 0.6)
    tree = {"merge_method": "task_arithmetic", "base_model": str(base)}
    tree["models"] = listed((f"{base}+{tmp_path / 'adapter'}", other), weights)
    theirs = mergekit(tmp_path / "theirs", tree)
    import_hf(base, tmp_path / "base")
    import_adapter(tmp_path / "adapter", tmp_path / "tuned", tmp_path / "base")
    recipe = MergeRecipe("task_arithmetic", refs((tmp_path / "tuned", other), weights), base=ModelRef(str(base)))
    assert_theirs(recipe, theirs, tmp_path / "ours")


@pytest.mark.parametrize("other", [1, 3])
def test_slerp(models, tmp_path, other):
    """A model near the first one, and one that points elsewhere."""
    a, b = models[0], models[other]
    tree = {"merge_method": "slerp", "base_model": str(a), "models": [{"model": str(m)} for m in (a, b)]}
    theirs = mergekit(tmp_path / "theirs", tree | {"parameters": {"t": 0.3}})
    assert_theirs(MergeRecipe("slerp", refs((a, b), (1.0, 0.3))), theirs, tmp_path / "ours")
