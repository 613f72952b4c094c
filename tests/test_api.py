"""The public API is the commands' own functions, and importing it is light."""

import subprocess
import sys

import pytest
from processes import ROOT, TINY

import easylm_mling
from easylm_mling.inference.generate import sample_text


def test_importing_the_package_loads_nothing_heavy():
    script = "import sys, easylm_mling; print([n for n in ('jax', 'numpy', 'yaml') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        easylm_mling.trian  # noqa: B018


def test_train_export_load_and_generate(tmp_path):
    config = easylm_mling.load_config(
        ["configs/demo.yaml"],
        [*TINY, f"run_dir={tmp_path / 'run'}", "train.stop_at_step=2", "mesh.tensor=2", "mesh.cpu_devices=0"],
    )
    assert easylm_mling.train(config) == 0
    assert easylm_mling.export(tmp_path / "run", tmp_path / "hf") is not None
    prompts = ["In the morning", "오늘"]
    texts = easylm_mling.generate(easylm_mling.load_model(tmp_path / "hf"), prompts, 5, dtype="float32")
    assert texts == sample_text(tmp_path / "hf", prompts, 5, dtype="float32")
    run = easylm_mling.load_model(tmp_path / "run", step=2)
    assert len(easylm_mling.generate(run, prompts, 5)) == 2
