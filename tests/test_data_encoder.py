"""Remembered chunks give the ids of the whole text, whatever is remembered."""

import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import sentencepiece
from data_corpus import documents, tokenizer_path, train_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from easylm_mling.data.tokenization import encoder as encoder_module
from easylm_mling.data.tokenization.encoder import Encoder

ALPHABET = st.characters(exclude_categories=("Cs",)) | st.sampled_from("▁<>bos \nthe雨日本7é")


def model(path=None) -> bytes:
    with open(path or tokenizer_path(), "rb") as file:
        return file.read()


def reference_ids(texts: list[str], path=None) -> list[list[int]]:
    return sentencepiece.SentencePieceProcessor(model_file=path or tokenizer_path()).encode(texts)


def encoded(encoder: Encoder, texts: list[str]) -> list[list[int]]:
    ids = encoder.encode(texts)
    assert all(i.dtype == np.int32 for i in ids)
    return [i.tolist() for i in ids]


@settings(deadline=None, max_examples=100)
@given(st.lists(st.text(ALPHABET, max_size=60), max_size=8))
def test_new_and_remembered_chunks_are_the_text_s(texts):
    encoder = Encoder(model())
    wanted = reference_ids(texts)
    assert encoded(encoder, texts) == wanted
    assert encoded(encoder, texts) == wanted
    assert encoded(encoder, texts[::-1]) == wanted[::-1]


def test_what_is_remembered_is_not_encoded_again(monkeypatch):
    encoder, texts, sizes = Encoder(model()), documents(50, seed=3), []
    fast = encoder._kitoken

    class Counting:
        def encode(self, text, *rest):
            sizes.append(len(text))
            return fast.encode(text, *rest)

    monkeypatch.setattr(encoder, "_kitoken", Counting())
    once = [encoded(encoder, [t])[0] for t in texts]
    assert 0 < sum(sizes) < sum(map(len, texts)) / 2
    sizes.clear()
    assert encoded(encoder, texts) == once and not sizes


def test_a_full_memory_begins_again(monkeypatch):
    monkeypatch.setattr(encoder_module, "_REMEMBERED_IDS", 1200)
    encoder = Encoder(model())
    for seed in range(40):
        # Characters that no other text has: 300 ids each time.
        texts = ["".join(chr(0x4E00 + 100 * seed + i) for i in range(100))]
        assert encoded(encoder, texts) == reference_ids(texts)
        assert encoder._used <= 1200


def test_slots_are_shared(monkeypatch):
    monkeypatch.setattr(encoder_module, "_SLOT_BITS", 3)
    encoder, texts = Encoder(model()), documents(60, seed=5)
    for _ in range(2):
        assert encoded(encoder, texts) == reference_ids(texts)


@pytest.mark.parametrize("remembered", [3000, 1 << 23])
def test_threads_that_share_a_memory_get_their_own_ids(monkeypatch, remembered):
    """The loader reads ahead in a thread of its own while an evaluation reads held-out text."""
    monkeypatch.setattr(encoder_module, "_REMEMBERED_IDS", remembered)
    texts = [documents(120, seed=seed) for seed in range(4)]
    wanted, interval = [reference_ids(t) for t in texts], sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(len(texts)) as pool:
            for _ in range(5):
                encoder = Encoder(model())
                found = pool.map(lambda part: [i for text in part for i in encoded(encoder, [text])], texts)  # noqa: B023
                assert list(found) == wanted
    finally:
        sys.setswitchinterval(interval)


@pytest.mark.parametrize("portion", [1, 7, 100])
def test_long_texts_and_many_of_them(monkeypatch, portion):
    monkeypatch.setattr(encoder_module, "_PORTION", portion)
    encoder, texts = Encoder(model()), [*documents(20, seed=7), "", "x" * 5000, "", "a\0b", "\0"]
    assert encoded(encoder, texts) == reference_ids(texts)


@pytest.mark.parametrize(
    "options", [{"model_type": "unigram"}, {"byte_fallback": False}, {"add_dummy_prefix": True}], ids=str
)
def test_where_a_character_s_neighbours_matter_nothing_is_cut(tmp_path, options):
    path = train_tokenizer(tmp_path / "t.model", **options)
    encoder, texts = Encoder(model(path)), ["雨雨 \u4e8a\u4e8b the", *documents(20, seed=9)]
    assert not encoder._has_chunks
    whole = [encoder._kitoken.encode(t, False) for t in texts]
    assert encoded(encoder, texts) == whole
