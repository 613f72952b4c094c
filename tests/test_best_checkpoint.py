"""The best checkpoint is never rotated away, and `export-hf --best` exports it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_models import TINY
from safetensors.numpy import load_file

from easylm_mling.checkpoint.best import best_step, best_steps, write_best
from easylm_mling.checkpoint.checkpoint import Checkpoints
from easylm_mling.checkpoint.layout import committed_steps
from easylm_mling.cli.main import main
from easylm_mling.config import ModelConfig, to_tree
from easylm_mling.errors import ConfigError
from easylm_mling.training.spike_guard import nothing_recent
from easylm_mling.training.state import TrainState, init_params


def save(run, *steps: int, best: bool = True):
    model = ModelConfig(**TINY | {"num_hidden_layers": 1}, num_attention_heads=4, num_key_value_heads=2)
    params, info = jax.jit(lambda: init_params(model, 0))(), {"config": {"model": to_tree(model)}}
    with Checkpoints(run, keep_last=1, keep_best=best) as checkpoints:
        for step in steps:
            shifted = jax.tree.map(lambda x, by=step: x + by, params)
            count = jnp.int32(step)
            state = TrainState(count, shifted, (count,), *[count] * 3, nothing_recent())
            assert checkpoints.save(state, np.zeros(1, np.int64), info, wait=True).ok


def test_the_best_is_kept_and_exported(tmp_path, capsys):
    run = tmp_path / "run"
    save(run, 3)
    write_best(run, "quick", 3, {})
    save(run, 5, 7)
    assert committed_steps(run) == [3, 7]
    assert main(["export-hf", str(run), str(tmp_path / "out"), "--best", "quick", "--dtype", "float32"]) == 0
    assert set(load_file(tmp_path / "out" / "model.safetensors")["model.norm.weight"]) == {3.0}
    # Another one is chosen; what no suite calls the best goes.
    write_best(run, "quick", 7, {})
    save(run, 9)
    assert committed_steps(run) == [7, 9]
    save(run, 11, best=False)
    assert committed_steps(run) == [11]
    assert main(["export-hf", str(run), str(tmp_path / "none"), "--best", "quick"]) == 2
    assert "was step 7, which is gone" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_a_choice_that_cannot_be_read_stops_no_save_and_no_export_by_guess(tmp_path):
    save(tmp_path, 3)
    file = write_best(tmp_path, "quick", 3, {})
    file.write_bytes(file.read_bytes()[:9])
    assert best_steps(tmp_path) == {}
    save(tmp_path, 5)
    assert committed_steps(tmp_path) == [5]
    with pytest.raises(ConfigError, match="cannot be read; run `easylm-mling eval .* --all`"):
        best_step(tmp_path, "quick")
    with pytest.raises(ConfigError, match=r"chosen by mling \(by nothing yet\)"):
        best_step(tmp_path, "mling")
