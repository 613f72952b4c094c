"""The tokenizer of an export: the checkpoint's own, and one BOS before a text."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import sentencepiece
from hf_models import save, transformers_model
from test_data_tokenizer_json import qwen
from transformers import AutoTokenizer

from easylm_mling.checkpoint import writing
from easylm_mling.cli.main import main
from easylm_mling.data.tokenization.tokenizer import Tokenizer
from easylm_mling.errors import ConfigError
from easylm_mling.hf.exporting import export_hf
from easylm_mling.hf.importing import import_hf

SAMPLE = Path("data/sample/tokenizer/tokenizer.model")


@pytest.fixture
def lone(tmp_path):
    source = save(transformers_model(), tmp_path / "source")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (source / name).unlink(missing_ok=True)
    shutil.copy(SAMPLE, source)
    import_hf(source, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def test_a_lone_tokenizer_model_is_exported_so_that_transformers_adds_one_bos(lone, tmp_path):
    assert export_hf(lone, tmp_path / "out") == []
    text = "In the morning"
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(SAMPLE))
    assert AutoTokenizer.from_pretrained(tmp_path / "out").encode(text) == [2, *pieces.encode(text)]
    assert "adds the one BOS (id 2)" in (tmp_path / "out" / "README.md").read_text()


def test_a_model_without_bos_is_told_how_its_texts_begin(tmp_path, capsys):
    """Qwen's own tokenizer adds none: that is no fault, and training puts <|endoftext|> before each document."""
    model = transformers_model(family="qwen2", vocab_size=900)
    files = qwen(tmp_path / "tokenizer")
    own = Tokenizer(str(files))
    model.config.bos_token_id = model.config.eos_token_id = own.eos_id
    source = save(model, tmp_path / "source")
    (source / "tokenizer.model").unlink()
    shutil.copytree(files, source, dirs_exist_ok=True)
    checkpoint, out = str(tmp_path / "checkpoint"), str(tmp_path / "out")
    assert main(["import-hf", str(source), checkpoint]) == 0
    assert f"it has no BOS: in training <|endoftext|> (id {own.eos_id})" in capsys.readouterr().out
    assert main(["export-hf", checkpoint, out, "--verify", "--dtype", "float32"]) == 0
    printed = capsys.readouterr()
    assert "adds no BOS, as the model's own; begin a document's text with <|endoftext|>" in printed.out
    assert "warning" not in printed.err
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"adds no BOS; a text that begins a document follows <|endoftext|> (id {own.eos_id})" in card


def test_the_card_says_what_was_seen(lone, tmp_path):
    (lone / "tokenizer" / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "GemmaTokenizer", "add_bos_token": False})
    )
    (warning,) = export_hf(lone, tmp_path / "out")
    assert "puts 0 BOS before a text" in warning
    assert "needs exactly one BOS (id 2) here; its tokenizer adds 0" in (tmp_path / "out" / "README.md").read_text()


def test_a_damaged_tokenizer_is_not_exported(lone, tmp_path):
    model = lone / "tokenizer" / "tokenizer.model"
    model.write_bytes(model.read_bytes()[:-100])
    with pytest.raises(ConfigError, match="tokenizer.model: damaged, or not the tokenizer"):
        export_hf(lone, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    # The right one lies beside it, set aside by a change of the tokenizer.
    (lone / "tokenizer-to-step-0").mkdir()
    shutil.copy(SAMPLE, lone / "tokenizer-to-step-0")
    export_hf(lone, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == SAMPLE.read_bytes()


def test_an_import_onto_a_full_disk_is_one_line_and_leaves_nothing(hf_source, tmp_path, monkeypatch):
    monkeypatch.setattr(writing.shutil, "disk_usage", lambda _: SimpleNamespace(free=1))
    with pytest.raises(ConfigError, match="and the disk has .* left; make room"):
        import_hf(hf_source, tmp_path / "checkpoint")
    monkeypatch.undo()

    def full(*_, **__):
        raise ValueError("RESOURCE_EXHAUSTED: ...\nNo space left on device")

    monkeypatch.setattr(writing.ts, "open", full)
    with pytest.raises(ConfigError, match="the disk is full; make room") as caught:
        import_hf(hf_source, tmp_path / "checkpoint")
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []
