"""Rows that come and go: each writes what it would write alone, with the log-probabilities of the whole forward pass."""

import jax
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_generate import all_scores, one_device, transformers_model

from easylm_mling.data.tokenization.tokenizer import Tokenizer
from easylm_mling.errors import ConfigError
from easylm_mling.inference.decoder import Decoder, Draw
from easylm_mling.inference.generate import generate, load_model
from easylm_mling.inference.text_stream import TextStream

TOKENIZER = Tokenizer("data/sample/tokenizer")
BYTES = next(i for i in range(TOKENIZER.vocab_size) if TOKENIZER.piece(i) == "<0x00>")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """A model with local and global layers."""
    path = tmp_path_factory.mktemp("hf") / "model"
    transformers_model(family="gemma3_text").save_pretrained(path)
    return load_model(path, one_device())


@pytest.fixture(scope="module")
def decoder(loaded):
    return Decoder(*loaded, rows=3, length=100, dtype="float32")


def alone(loaded, prompt, count):
    [ids] = generate(*loaded, [prompt], count, dtype="float32")
    return ids


def until_end(model, ids):
    ends = {model.eos_token_id, *model.stop_token_ids}
    cut = next((n + 1 for n, i in enumerate(ids) if i in ends), len(ids))
    return ids[:cut]


@pytest.mark.slow
def test_rows_that_begin_at_other_times_write_what_each_writes_alone(loaded, decoder):
    model = loaded[2]
    prompts = {0: [2, 17, 40, 5], 1: [2], 2: [2, *range(3, 73)]}
    written = {row: [] for row in prompts}
    decoder.begin(0, prompts[0], Draw())
    for turn in range(3):
        tokens = decoder.advance(tops=turn == 1)
        for row in range(turn + 1):
            written[row] += tokens.ids[row].tolist()
        if turn < 2:
            decoder.begin(turn + 1, prompts[turn + 1], Draw())
    assert [len(w) for w in written.values()] == [24, 16, 8]
    for row, prompt in prompts.items():
        expected = alone(loaded, prompt, len(written[row]))
        assert until_end(model, written[row]) == expected
    # A row is used again, beside rows that go on.
    decoder.begin(0, [2, 9, 9], Draw())
    assert until_end(model, decoder.advance().ids[0].tolist()) == alone(loaded, [2, 9, 9], 8)


def test_a_draw_depends_on_its_seed_and_not_on_its_row_or_on_the_others(decoder):
    draw = Draw(temperature=1.0, top_p=0.9, top_k=20, seed=5)
    got = []
    for row, other in ((0, Draw()), (1, Draw(0.7, seed=9))):
        decoder.begin(row, [2, 7], draw)
        decoder.begin(1 - row, [2, 8, 8], other)
        got.append(np.concatenate([decoder.advance().ids[row] for _ in range(2)]).tolist())
    assert got[0] == got[1]
    decoder.begin(0, [2, 7], Draw(1.0, 0.9, 20, seed=6))
    assert decoder.advance().ids[0].tolist() != got[0][:8]


def test_log_probabilities_are_those_of_the_whole_forward_pass(loaded, decoder):
    graph, params, _ = loaded
    prompt = [2, 17, 40, 5]
    decoder.begin(0, prompt, Draw())
    tokens = decoder.advance(tops=True)
    whole = [*prompt, *tokens.ids[0].tolist()]
    scores = np.asarray(jax.nn.log_softmax(all_scores(graph, params, np.array([whole], np.int32)), axis=-1))[0]
    for n, token in enumerate(tokens.ids[0].tolist()):
        at = scores[len(prompt) - 1 + n]
        np.testing.assert_allclose(tokens.logprobs[0, n], at[token], atol=2e-5)
        np.testing.assert_allclose(tokens.top_logprobs[0, n], np.sort(at)[::-1][:20], atol=2e-5)
        assert tokens.top_ids[0, n, 0] == at.argmax() == token
    scored = decoder.score([whole, [2, 3]], tops=2)
    np.testing.assert_array_equal(scored.ids[0, : len(whole) - 1], whole[1:])
    for n in range(len(whole)):
        np.testing.assert_allclose(scored.logprobs[0, n], scores[n, scored.ids[0, n]], atol=2e-5)
        np.testing.assert_allclose(scored.top_logprobs[0, n, 0], scores[n].max(), atol=2e-5)
    assert scored.ids[0, len(whole) - 1] == scores[-1].argmax()


def test_what_does_not_fit_is_refused(loaded, decoder):
    for prompt, message in (([2] * 100, "room for 99"), ([], "0 tokens"), ([10**6], "outside the vocabulary")):
        with pytest.raises(ConfigError, match=message):
            decoder.begin(0, prompt, Draw())
    with pytest.raises(ConfigError, match="the model reads 2 to"):
        Decoder(*loaded, rows=1, length=10**7)


TEXT = st.text(alphabet="나무木ab\n 😀", max_size=12)


@settings(max_examples=300, deadline=None)
@given(TEXT, st.lists(st.text(alphabet="나무ab\n", min_size=1, max_size=3), max_size=1))
def test_a_streamed_text_only_grows_and_ends_before_the_first_stop(text, stops):
    ids = TOKENIZER.encode([text])[0].tolist()
    whole = TOKENIZER.decode(ids)
    stream, before = TextStream(TOKENIZER, frozenset({1}), stops), ""
    for token in [*ids, 1]:
        stream.add(token)
        assert stream.text.startswith(before) and "\ufffd" not in stream.text
        before = stream.text
        if stream.ended:
            break
    cut = min((whole.find(s) for s in stops if s in whole), default=len(whole))
    assert stream.text == whole[:cut] and stream.ended == "stop"
    assert stream.ids == ids[: len(stream.ids)]
    assert stream.offsets == sorted(stream.offsets) and all(o <= len(whole) for o in stream.offsets)


@pytest.mark.parametrize(
    "tokenizer", [TOKENIZER, Tokenizer("data/sample/tokenizer/tokenizer.model")], ids=["json", "model"]
)
@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.one_of(st.integers(3, 300), st.integers(3, TOKENIZER.vocab_size - 1)), max_size=30))
@example(ids=[ord("V") + BYTES, 0xF2 + BYTES, 2214])  # the second undoes the first
@example(ids=[0xE4 + BYTES, 0xBD + BYTES, 0xA0 + BYTES, ord("a") + BYTES])
def test_whatever_a_model_writes_only_grows_and_ends_as_it_is_decoded(tokenizer, ids):
    stream, before = TextStream(tokenizer, frozenset({1})), ""
    for token in ids:
        stream.add(token)
        assert stream.text.startswith(before)
        before = stream.text
    assert stream.close().startswith(before) and stream.text == tokenizer.decode(ids)


def test_a_text_that_is_cut_by_its_limit_keeps_what_has_come():
    stream = TextStream(TOKENIZER, frozenset({1}), ["ab"])
    for token in TOKENIZER.encode(["tree a"])[0].tolist():
        stream.add(token)
    assert stream.text == "tree " and stream.close() == "tree a" and not stream.ended
