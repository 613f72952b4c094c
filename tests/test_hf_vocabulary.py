"""A grown vocabulary: old rows keep their bits, new ones are means of their text's, and everything else agrees."""

import json
import shutil
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
from test_data_tokenizer_json import llama3

from easylm_mling.checkpoint.parameters import load_params
from easylm_mling.config import MeshConfig
from easylm_mling.data.tokenization.tokenizer import Tokenizer
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
    refused("holds no tokenizer.json and no tokenizer.model", tmp_path)
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
    new = extended(source / "tokenizer.model", tmp_path / "n.model", NEW)
    refused("spaced: holds no tokenizer.json and no tokenizer.model", new, spaced)


def test_pieces_are_spelled_alone_where_a_space_is_put_before_texts(source, tmp_path):
    """Llama 2's tokenizer does so: the row of `hello` must not hold that of a space, nor `\u2581hello` that of two."""
    spaced = tmp_path / "spaced"
    shutil.copytree(source, spaced)
    train_tokenizer(spaced / "tokenizer.model", vocab_size=400, add_dummy_prefix=True)
    import_hf(spaced, tmp_path / "ck", tokenizer=extended(spaced / "tokenizer.model", tmp_path / "n.model", NEW))
    export_hf(tmp_path / "ck", tmp_path / "out", dtype="float32")
    old, grown = (
        load_file(d / "model.safetensors")["lm_head.weight"].float().numpy() for d in (spaced, tmp_path / "out")
    )
    pieces = SentencePieceProcessor(model_file=str(spaced / "tokenizer.model"))
    assert pieces.encode("a", out_type=str)[0].startswith("\u2581")
    for row, piece in enumerate(NEW, 400):
        # A newline in front takes the space that is put before the text.
        ids = pieces.encode("\n" + piece.replace("\u2581", " "))
        ids = ids[1 + ids.index(pieces.encode("\n")[-1]) :]
        np.testing.assert_array_equal(grown[row], old[ids].astype(np.float64).mean(axis=0).astype(np.float32))


def grown_json(folder: Path, target: Path, pieces: list[str]) -> Path:
    """Append pieces and one control token to a byte-level tokenizer.json."""
    shutil.copytree(folder, target)
    tree = json.loads((target / "tokenizer.json").read_text())
    first = 1 + max(t["id"] for t in tree["added_tokens"])
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False)
    for i, piece in enumerate(pieces, first):
        tree["added_tokens"].append({"id": i, "content": piece, "special": piece.startswith("<"), **flags})
    (target / "tokenizer.json").write_text(json.dumps(tree))
    return target


def test_a_tokenizer_json_grows_too(tmp_path):
    hf, pieces = tmp_path / "hf", ["새벽에", " river stone", "<|turn|>"]
    old_tokenizer = Tokenizer(str(llama3(tmp_path / "t")))
    rows = old_tokenizer.vocab_size
    model = transformers_model(family="llama")
    model.config.bos_token_id, model.config.eos_token_id = old_tokenizer.bos_id, old_tokenizer.eos_id
    model.config.pad_token_id = None
    model.resize_token_embeddings(rows)
    save(model, hf)
    (hf / "tokenizer.model").unlink()
    shutil.copytree(tmp_path / "t", hf, dirs_exist_ok=True)
    new = grown_json(hf, tmp_path / "new", pieces)
    assert import_hf(hf, tmp_path / "ck", tokenizer=new).vocab_size == rows + 3
    export_hf(tmp_path / "ck", tmp_path / "out", dtype="float32")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (new / name).read_bytes()
    before, after = (load_file(d / "model.safetensors")["lm_head.weight"].numpy() for d in (hf, tmp_path / "out"))
    np.testing.assert_array_equal(after[:rows], before)
    for row, piece in enumerate(pieces, rows):
        (ids,) = old_tokenizer.encode([piece])
        np.testing.assert_allclose(
            after[row], before[ids].astype(np.float64).mean(axis=0).astype(np.float32), rtol=1e-6
        )
    grown = Tokenizer(str(tmp_path / "ck" / "tokenizer"))
    assert [ids.tolist() for ids in grown.encode(pieces[:1])] == [[rows]] and rows + 2 in grown.control_ids
    proto = extended(Path(train_tokenizer(tmp_path / "s.model", vocab_size=400)), tmp_path / "n.model", NEW)
    with pytest.raises(
        ConfigError, match="can continue no other kind; append the pieces to the model's tokenizer.json"
    ):
        import_hf(hf, tmp_path / "other", tokenizer=proto)


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
