"""Ids are SentencePiece's for every tokenizer and text, and no text can write a control token."""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from data_corpus import documents, tokenizer, tokenizer_path, train_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from easylm_mling.config import ModelConfig
from easylm_mling.data.tokenization.tokenizer import Tokenizer, join_documents
from easylm_mling.errors import ConfigError

NASTY = [
    "", " ", "   a  b   ", "\t\ttab\t", "\n\n\n", "\r\n", "x" * 5000, " " * 3000, "<bos> <eos> <pad> <unk>",
    "<0x41><0x0A>", "▁▁under▁", "\u2581", "日本語のテスト。", "한국어 문장", "e\u0301\u0323 ẍ", "👩\u200d👩\u200d👧🇯🇵",
    "\ufffd\ufffd", "\u200b\ufeff\u2028", "0123456789 ０１２", "\x01\x7f", "𝒳𐍈", "ﷺ ½ ㌔ ﬁ", "نص عربي", "हिन्दी", "ไทย",
    "a\0b", "\0", "river stone " * 7000, "雨" * 70_000,
]  # fmt: skip


def reference_ids(texts: list[str], path: str | None = None) -> list[list[int]]:
    return sentencepiece.SentencePieceProcessor(model_file=path or tokenizer_path()).encode(texts)


def test_ids_are_the_reference_s():
    for text, ids, expected in zip(NASTY, tokenizer().encode(NASTY), reference_ids(NASTY), strict=True):
        assert ids.dtype == np.int32
        assert ids.tolist() == expected, text


def test_ids_do_not_depend_on_the_texts_around_them():
    texts = documents(50, seed=3)
    together = [ids.tolist() for ids in tokenizer().encode(texts)]
    assert together == reference_ids(texts)
    assert [tokenizer().encode([t])[0].tolist() for t in reversed(texts)] == together[::-1]


@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "unigram"},
        {"byte_fallback": False},
        {"add_dummy_prefix": True},
        {"remove_extra_whitespaces": True},
        {"normalization_rule_name": "nfkc"},
        {"normalization_rule_name": "nmt_nfkc"},
        {"user_defined_symbols": ["<tool_call>", "<tool"]},
    ],
    ids=str,
)
def test_ids_are_the_reference_s_whatever_the_tokenizer_does(tmp_path, options):
    path = train_tokenizer(tmp_path / "t.model", **options)
    marks = ["\u0645\u0651\u064e", "\u05d1\u05bc\u05b8", "e\u0301", "\ufb01"]  # nfkc changes their order, or joins them
    texts = [*marks, "x <tool_call> y <tool>", " 雨雨 \u4e8a\u4e8b the ", *documents(20, seed=9), *NASTY]
    assert [ids.tolist() for ids in Tokenizer(path).encode(texts)] == reference_ids(texts, path)


def test_the_longest_user_defined_piece_is_taken(tmp_path):
    t = Tokenizer(train_tokenizer(tmp_path / "t.model", user_defined_symbols=["<tool_call>", "<tool"]))
    (long,), (short,) = t.encode(["<tool_call>", "<tool"])
    assert long != short and t.encode(["x<tool_call><tool"])[0].tolist()[-2:] == [long, short]


def test_appended_pieces_of_equal_score_are_merged_as_the_reference_merges_them(tmp_path):
    """Scripts that merge vocabularies write 0.0 as the score of every piece they add."""
    model = ModelProto.FromString(Path(tokenizer_path()).read_bytes())
    for piece in ("qj", "jx", "xq"):
        model.pieces.add(piece=piece, score=0.0)
    path = tmp_path / "tokenizer.model"
    path.write_bytes(model.SerializeToString())
    texts, t = ["qjx", "jxq", "xqj", "qjxq", "a qjx b"], Tokenizer(str(path))
    assert [ids.tolist() for ids in t.encode(texts)] == reference_ids(texts, str(path))
    assert max(t.encode(["qj"])[0]) >= tokenizer().vocab_size, "no appended piece was used"


def test_threads_get_their_own_ids():
    """The loader reads ahead in a thread of its own while an evaluation reads held-out text."""
    texts = [documents(120, seed=seed) for seed in range(4)]
    expected, interval = [reference_ids(t) for t in texts], sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(len(texts)) as pool:
            for _ in range(5):
                got = list(pool.map(tokenizer().encode, texts))
                assert [[ids.tolist() for ids in part] for part in got] == expected
    finally:
        sys.setswitchinterval(interval)


@settings(deadline=None, max_examples=300)
@given(st.text(st.characters(exclude_categories=("Cs",)) | st.sampled_from("▁<>bos \n雨7é"), max_size=40))
def test_any_text_comes_back(text):
    (ids,) = tokenizer().encode([text])
    assert [ids.tolist()] == reference_ids([text])
    assert tokenizer().decode(ids) == text.replace("▁", " ")


def test_control_tokens_written_in_a_text_stay_text():
    t = tokenizer()
    (ids,) = t.encode(["<bos> <eos> <pad> a<bos>b"])
    assert not {t.bos_id, t.eos_id, t.pad_id} & set(ids.tolist())
    assert t.decode(ids) == "<bos> <eos> <pad> a<bos>b"


@pytest.mark.parametrize("content", [None, b"", b"no model at all", b"\x0a\xff\xff\xff"])
def test_a_file_that_is_no_model_is_named(tmp_path, content):
    path = tmp_path / "tokenizer.model"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match="tokenizer.model") as error:
        Tokenizer(str(path))
    assert "\n" not in str(error.value)


def test_a_document_has_one_bos_and_one_eos_and_none_is_fine():
    t = tokenizer()
    joined = join_documents(t, ["a", "<bos>b<eos>", ""])
    assert joined.dtype == np.int32 and joined[0] == t.bos_id and joined[-1] == t.eos_id
    assert np.count_nonzero(joined == t.bos_id) == np.count_nonzero(joined == t.eos_id) == 3
    assert join_documents(t, []).shape == (0,) and join_documents(t, []).dtype == np.int32


def test_the_model_must_fit_the_tokenizer():
    t = tokenizer()
    fits = dict(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
    )
    t.check_model(ModelConfig(vocab_size=t.vocab_size, **fits))
    with pytest.raises(ConfigError, match=f"{t.vocab_size - 1} is less than the {t.vocab_size} pieces"):
        t.check_model(ModelConfig(vocab_size=t.vocab_size - 1, **fits))
    for name in ("bos", "eos", "pad"):
        with pytest.raises(ConfigError, match=f"model.{name}_token_id=9"):
            t.check_model(ModelConfig(vocab_size=1200, **fits, **{f"{name}_token_id": 9}))


def test_the_fingerprint_is_of_the_file(tmp_path):
    with open(tokenizer_path(), "rb") as file:
        blob = file.read()
    (tmp_path / "same.model").write_bytes(blob)
    assert Tokenizer(str(tmp_path / "same.model")).fingerprint == tokenizer().fingerprint
    other = train_tokenizer(tmp_path / "other.model", vocab_size=400)
    assert Tokenizer(other).fingerprint != tokenizer().fingerprint
