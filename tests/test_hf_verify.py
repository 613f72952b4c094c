"""The check of an export says yes to a right one, and names what is wrong with any other."""

import json
import shutil

import numpy as np
import pytest
import torch
from hf_models import FAMILIES, save, transformers_model
from safetensors.torch import load_file, save_file

from easylm_mling.cli import main as command
from easylm_mling.errors import VerificationError
from easylm_mling.hf import verify
from easylm_mling.hf.importing import import_hf
from easylm_mling.hf.verify import verify_export


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A checkpoint and its export, made and verified by the command."""
    root = tmp_path_factory.mktemp("verify")
    source = save(transformers_model(dtype=torch.bfloat16, family="gemma3_text"), root / "source")
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(f"data/sample/tokenizer/{name}", source / name)
    import_hf(source, root / "checkpoint")
    return root / "checkpoint", root / "out"


def test_the_command_verifies_a_right_export(exported, capsys):
    checkpoint, out = exported
    assert command.main(["export-hf", str(checkpoint), str(out), "--max-shard-gb", "0.00006", "--verify"]) == 0
    said = capsys.readouterr().out
    assert "54 tensors" in said and "bit for bit the checkpoint's in BF16" in said
    assert "exactly one BOS" in said and "are transformers' to" in said and "not checked" not in said


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_verified(family, tmp_path):
    import_hf(save(transformers_model(family=family), tmp_path / "source"), tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / "tokenizer" / "tokenizer.model").unlink()
    assert command.main(["export-hf", str(tmp_path / "checkpoint"), str(tmp_path / "out"), "--dtype", "float32"]) == 0
    lines = verify_export(tmp_path / "checkpoint", tmp_path / "out")
    assert [line.startswith("not checked") for line in lines] == [False, False, True, False], lines


@pytest.fixture
def copy(exported, tmp_path):
    checkpoint, out = exported
    from easylm_mling.hf.exporting import export_hf

    export_hf(checkpoint, tmp_path / "copy")
    return checkpoint, tmp_path / "copy"


def refused(copy, message):
    with pytest.raises(VerificationError, match=message) as caught:
        verify_export(*copy)
    assert "\n" not in str(caught.value)


def test_one_flipped_bit_is_found(copy):
    file = copy[1] / "model.safetensors"
    blob = bytearray(file.read_bytes())
    blob[-7] ^= 1
    file.write_bytes(blob)
    refused(copy, "tensor model.norm.weight is not the checkpoint's")


def test_swapped_tensors_and_missing_ones_are_found(copy):
    file = copy[1] / "model.safetensors"
    tensors = load_file(file)
    a, b = (f"model.layers.{i}.mlp.up_proj.weight" for i in (1, 2))
    tensors[a], tensors[b] = tensors[b], tensors[a]
    save_file(tensors, file)
    refused(copy, f"tensor {a} is not the checkpoint's")
    del tensors[a]
    save_file(tensors, file)
    refused(copy, f"tensor {a} is missing")


@pytest.mark.parametrize(
    "change",
    [{"sliding_window": 10}, {"rms_norm_eps": 1e-5}, {"rope_local_base_freq": 10_001.0, "rope_parameters": None}],
)
def test_another_config_is_found(copy, change):
    file = copy[1] / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    refused(copy, f"config.json: {next(iter(change))}=")


def test_other_logits_are_found(copy, monkeypatch):
    real = verify._their_logits
    monkeypatch.setattr(verify, "_their_logits", lambda *a: real(*a) + np.float32(0.01))
    refused(copy, "float32 logits differ from transformers' by 1.00e-02")
    monkeypatch.setattr(verify, "_their_logits", lambda *a: real(*a) * np.nan)
    refused(copy, "float32 logits differ")


def test_a_tokenizer_with_two_bos_is_found(copy):
    file = copy[1] / "tokenizer.json"
    tree = json.loads(file.read_text())
    template = tree["post_processor"]["single"] if "single" in tree["post_processor"] else None
    assert template, "the sample tokenizer adds BOS by a template"
    tree["post_processor"]["single"] = [template[0], *template]
    file.write_text(json.dumps(tree))
    refused(copy, "does not start with one BOS")


def test_what_needs_torch_is_said_when_it_is_not_there(copy, monkeypatch):
    monkeypatch.setattr(verify.importlib.util, "find_spec", lambda name: None)
    assert verify_export(*copy)[-1].startswith("not checked: logits and tokenizer")
