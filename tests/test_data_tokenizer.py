"""Ids are SentencePiece's, and no text can write a control token."""

import numpy as np
import pytest
import sentencepiece
from data_corpus import tokenizer, tokenizer_path, train_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from easylm_mling.config import ModelConfig
from easylm_mling.data.tokenization.tokenizer import Tokenizer
from easylm_mling.errors import ConfigError

NASTY = [
    "", " ", "   a  b   ", "\t\ttab\t", "\n\n\n", "\r\n", "x" * 5000, " " * 3000, "<bos> <eos> <pad> <unk>",
    "<0x41><0x0A>", "▁▁under▁", "\u2581", "日本語のテスト。", "한국어 문장", "e\u0301\u0323 ẍ", "👩\u200d👩\u200d👧🇯🇵",
    "\ufffd\ufffd", "\u200b\ufeff\u2028", "0123456789 ０１２", "\x01\x7f", "𝒳𐍈", "ﷺ ½ ㌔ ﬁ", "نص عربي", "हिन्दी", "ไทย",
]  # fmt: skip


def test_ids_are_the_reference_s():
    reference = sentencepiece.SentencePieceProcessor(model_file=tokenizer_path())
    for text, ids in zip(NASTY, tokenizer().encode(NASTY), strict=True):
        assert ids.dtype == np.int32
        assert ids.tolist() == reference.encode(text), text


@settings(deadline=None, max_examples=300)
@given(st.text(st.characters(exclude_categories=("Cs",)) | st.sampled_from("▁<>bos \n雨7é"), max_size=40))
def test_any_text_comes_back(text):
    (ids,) = tokenizer().encode([text])
    reference = sentencepiece.SentencePieceProcessor(model_file=tokenizer_path())
    assert ids.tolist() == reference.encode(text)
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


def test_a_tokenizer_that_the_encoders_read_differently_is_refused(tmp_path):
    path = train_tokenizer(tmp_path / "t.model", remove_extra_whitespaces=True)
    with pytest.raises(ConfigError, match="disagree"):
        Tokenizer(path)


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
