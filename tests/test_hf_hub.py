"""Hub names: what is asked of huggingface_hub, and that its failures become one line without a secret."""

import huggingface_hub
import pytest
from hf_models import raw_tensors, save, transformers_model

from easylm_mling.checkpoint.reading import load_info
from easylm_mling.cli import main as command
from easylm_mling.errors import ConfigError
from easylm_mling.hf import hub
from easylm_mling.hf.exporting import export_hf
from easylm_mling.hf.hub import local_directory, push


@pytest.fixture
def source(tmp_path):
    return save(transformers_model(), tmp_path / "cache")


def test_a_hub_name_is_downloaded_and_a_directory_is_not(source, tmp_path, monkeypatch, capsys):
    asked = []

    def snapshot_download(name, revision, allow_patterns):
        asked.append((name, revision))
        assert "*.safetensors" in allow_patterns and "tokenizer.model" in allow_patterns
        assert not {"*", "*.bin", "*.py"} & set(allow_patterns)
        return str(source)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert command.main(["import-hf", "google/gemma-7b", str(tmp_path / "a"), "--revision", "abc"]) == 0
    assert command.main(["import-hf", str(source), str(tmp_path / "b")]) == 0
    assert asked == [("google/gemma-7b", "abc")]
    assert load_info(tmp_path / "a")["source"] == {"name": "google/gemma-7b", "revision": "abc", "hub": True}
    assert not load_info(tmp_path / "b")["source"]["hub"]
    for name in ("a", "b"):
        export_hf(tmp_path / name, tmp_path / f"{name}-out", dtype="float32")
        assert raw_tensors(tmp_path / f"{name}-out") == raw_tensors(source)
    assert command.main(["import-hf", str(source), str(tmp_path / "c"), "--revision", "abc"]) == 2
    assert "a revision belongs to a hub name" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["nowhere", "./a/b", "/no/where", "../x/y", "a/b/c"])
def test_what_is_no_hub_name_is_not_asked_for(name, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked"))
    assert str(local_directory(name)).split("/") == [p for i, p in enumerate(name.split("/")) if p != "." or i]


FAILURES = [
    huggingface_hub.errors.LocalEntryNotFoundError("offline\n and not here"),
    huggingface_hub.errors.HFValidationError("bad name"),
    huggingface_hub.errors.HTTPError("refused: https://x/y?X-Amz-Signature=secret&b=c more"),
]


@pytest.mark.parametrize("error", FAILURES)
def test_a_failure_is_one_line_with_the_way_out(error, tmp_path, monkeypatch):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fails)
    monkeypatch.setattr(huggingface_hub, "create_repo", fails)
    for act, way_out in (
        (lambda: local_directory("google/x"), "hf auth login"),
        (lambda: push(tmp_path, "me/x"), "hf upload me/x"),
    ):
        with pytest.raises(ConfigError, match=way_out) as caught:
            act()
        assert "\n" not in str(caught.value) and "secret" not in str(caught.value)


def test_without_huggingface_hub_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(hub.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"pip install 'easylm-mling\[hf\]'"):
        local_directory("google/gemma-7b")


def test_an_upload_makes_a_private_model_of_the_whole_directory(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(huggingface_hub, "create_repo", lambda *a, **k: calls.append((a, k)))
    monkeypatch.setattr(huggingface_hub, "upload_folder", lambda **k: calls.append(k))
    assert push(tmp_path, "me/mine") == "https://huggingface.co/me/mine"
    assert calls[0] == (("me/mine",), {"private": True, "exist_ok": True})
    assert calls[1]["repo_id"] == "me/mine" and calls[1]["folder_path"] == str(tmp_path)
