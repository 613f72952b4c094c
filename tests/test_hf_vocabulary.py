"""A grown vocabulary: old rows keep their bits, new ones are means of their text's, and everything else agrees."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from data_corpus import train_tokenizer
from hf_models import raw_tensors, save, transformers_model
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from easylm_mling.checkpoint.checkpoint import load_params
from easylm_mling.config import MeshConfig
from easylm_mling.errors import ConfigError
from easylm_mling.hf.config import model_config_from_hf
from easylm_mling.hf.exporting import export_hf
from easylm_mling.hf.importing import import_hf
from easylm_mling.inference.generate import sample_text
from easylm_mling.model.sharding import make_mesh
from easylm_mling.training.state import abstract_params

ROWS = 460  # of the old model; its tokenizer has 400 pieces
NEW = ["안녕", "\u2581hello\u2581there", "새벽에", "the"] + [f"piece{i}" for i in range(76)]


def extended(source: Path, target: Path, pieces: list[str]) -> Path:
    proto = ModelProto()
    proto.ParseFromString(source.read_bytes())
    for piece in pieces:
        proto.pieces.add(piece=piece, score=proto.pieces[-1].score - 1)
    target.write_bytes(proto.SerializeToString())
    return target


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A model of 460 rows, an untied head, and a tokenizer of 400 pieces."""
    directory = tmp_path_factory.mktemp("hf") / "source"
    model = transformers_model(dtype=torch.bfloat16, family="llama")
    model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id = 2, 1, 0
    model.resize_token_embeddings(ROWS)
    torch.nn.init.normal_(model.lm_head.weight)
    save(model, directory)
    train_tokenizer(directory / "tokenizer.model", vocab_size=400, hard_vocab_limit=True)
    (directory / "tokenizer_config.json").write_text('{"old": true}')
    return directory


def test_new_pieces_start_as_the_mean_of_their_text(source, tmp_path):
    (tmp_path / "new").mkdir()
    new = extended(source / "tokenizer.model", tmp_path / "new" / "tokenizer.model", NEW)
    (tmp_path / "new" / "tokenizer_config.json").write_text('{"new": true}')
    model = import_hf(source, tmp_path / "checkpoint", tokenizer=tmp_path / "new")
    assert model.vocab_size == 480 == SentencePieceProcessor(model_file=str(new)).vocab_size()
    export_hf(tmp_path / "checkpoint", tmp_path / "out", dtype="float32")
    old, grown = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    reference = SentencePieceProcessor(model_file=str(source / "tokenizer.model"))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert grown[name].shape == (480, 64)
        before, after = old[name].float().numpy(), grown[name].numpy()
        np.testing.assert_array_equal(after[:400], before[:400])
        for row, piece in enumerate(NEW, 400):
            ids = reference.encode(piece.replace("\u2581", " "))
            assert reference.unk_id() not in ids
            np.testing.assert_array_equal(after[row], before[ids].astype(np.float64).mean(axis=0).astype(np.float32))
    assert all(
        torch.equal(grown[k], old[k].float()) for k in old if k not in ("model.embed_tokens.weight", "lm_head.weight")
    )
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 480
    assert (tmp_path / "out" / "tokenizer_config.json").read_text() == '{"new": true}'
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == new.read_bytes()
    assert len(sample_text(tmp_path / "out", ["안녕"], 3)) == 1


def test_unused_rows_behind_the_last_piece_stay(source, tmp_path):
    new = extended(source / "tokenizer.model", tmp_path / "tokenizer.model", NEW[:4])
    assert import_hf(source, tmp_path / "checkpoint", tokenizer=new).vocab_size == ROWS
    export_hf(tmp_path / "checkpoint", tmp_path / "out")
    old, grown = (load_file(d / "model.safetensors")["lm_head.weight"] for d in (source, tmp_path / "out"))
    changed = (old != grown).any(dim=1).nonzero().flatten().tolist()
    assert changed == [400, 401, 402, 403]


def test_a_grown_embedding_is_the_same_bits_on_any_mesh(source, tmp_path):
    new = extended(source / "tokenizer.model", tmp_path / "tokenizer.model", NEW)
    model = import_hf(source, tmp_path / "checkpoint", tokenizer=new)
    wide, one = (make_mesh(MeshConfig(*sizes), jax.devices()[:n]) for sizes, n in (((1, 2, 4), 8), ((1, 1, 1), 1)))
    a, b = (load_params(tmp_path / "checkpoint", abstract_params(model, mesh)) for mesh in (wide, one))
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_tokenizer_that_does_not_continue_the_old_one_is_refused(source, tmp_path):
    def refused(message, tokenizer, directory=source):
        with pytest.raises(ConfigError, match=message) as caught:
            import_hf(directory, tmp_path / "checkpoint", tokenizer=tokenizer)
        assert "\n" not in str(caught.value) and not (tmp_path / "checkpoint").exists()

    refused("400 pieces are no more than the 400", source / "tokenizer.model")
    refused("is not a readable SentencePiece model", tmp_path)
    (tmp_path / "broken.model").write_bytes(b"no model")
    refused("broken.model: is not a readable SentencePiece model", tmp_path / "broken.model")
    proto = ModelProto()
    proto.ParseFromString(source.joinpath("tokenizer.model").read_bytes())
    was, proto.pieces[350].piece = proto.pieces[350].piece, "other"
    (tmp_path / "other.model").write_bytes(proto.SerializeToString())
    refused(f"piece 350 is 'other', but {was!r}", extended(tmp_path / "other.model", tmp_path / "more.model", NEW))
    spaced = tmp_path / "spaced"
    spaced.mkdir()
    for name in ("config.json", "model.safetensors"):
        (spaced / name).write_bytes((source / name).read_bytes())
    refused(
        "spaced/tokenizer.model: is not a readable",
        extended(source / "tokenizer.model", tmp_path / "n.model", NEW),
        spaced,
    )
    train_tokenizer(spaced / "tokenizer.model", vocab_size=400, add_dummy_prefix=True)
    refused("space before every text", extended(spaced / "tokenizer.model", tmp_path / "n.model", NEW), spaced)


def test_a_tokenizer_with_more_pieces_than_rows_is_refused(source, tmp_path):
    (tmp_path / "small").mkdir()
    tensors = load_file(source / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:380].clone()
    save_file(tensors, tmp_path / "small" / "model.safetensors")
    config = json.loads((source / "config.json").read_text()) | {"vocab_size": 380}
    (tmp_path / "small" / "config.json").write_text(json.dumps(config))
    (tmp_path / "small" / "tokenizer.model").write_bytes((source / "tokenizer.model").read_bytes())
    assert model_config_from_hf(tmp_path / "small").vocab_size == 380
    new = extended(source / "tokenizer.model", tmp_path / "n.model", NEW)
    with pytest.raises(ConfigError, match="the model has 380 rows, but its tokenizer.model 400 pieces"):
        import_hf(tmp_path / "small", tmp_path / "checkpoint", tokenizer=new)
    assert raw_tensors(source)["lm_head.weight"][1] == [ROWS, 64]
