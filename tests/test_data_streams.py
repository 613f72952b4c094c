"""The token stream of a lane: every document once an epoch, and the same tokens from any state that was saved."""

import contextlib

import numpy as np
import pytest
from data_corpus import data_config, documents, epoch_order, tokenizer, write
from test_data_tokenizer_json import qwen

from easylm_mling.data import spill_file
from easylm_mling.data.mixture import BAD, DOCUMENTS, EPOCH, TOKENS, initial_state
from easylm_mling.data.spill_file import SpillFile
from easylm_mling.data.streams import LaneStream, StreamState
from easylm_mling.data.tokenization.tokenizer import Tokenizer, join_documents
from easylm_mling.errors import ConfigError


@pytest.fixture
def open_stream():
    """A function (order, state, lane) -> Lane; its temporary files are closed after the test."""
    with contextlib.ExitStack() as stack:

        def make(order, state, lane=0, on_window=lambda window: None):
            spilled = stack.enter_context(contextlib.closing(SpillFile()))
            start = StreamState.from_counters(state[lane, 0])
            return Lane(LaneStream(order, tokenizer(), lane, len(state), start, spilled), state[lane, 0], on_window)

        yield make


class Lane:
    """A stream whose state is written into `counters` after every row, as the loader does after every batch."""

    def __init__(self, stream, counters, on_window):
        self.stream, self.counters, self.on_window = stream, counters, on_window

    def take(self, count):
        while (row := self.stream.take(count)) is None:
            self.on_window(self.stream.entered)
        self.stream.state.write_to(self.counters)
        return row


def read_documents(tokens) -> list[str]:
    """The whole documents in a piece of a stream, each checked to have one BOS and one EOS."""
    begins, ends = np.flatnonzero(tokens == 2), np.flatnonzero(tokens == 1)
    ends = ends[np.searchsorted(ends, begins[0]) :]
    np.testing.assert_array_equal(begins[1 : len(ends) + 1], ends[: len(begins) - 1] + 1)
    return [tokenizer().decode(tokens[a + 1 : b]) for a, b in zip(begins, ends, strict=False)]


@pytest.mark.parametrize("layout", ["jsonl", "jsonl.zst", "parquet", "arrow"])
def test_a_stream_is_every_document_once_an_epoch(tmp_path, open_stream, layout):
    texts = documents(200)
    state = initial_state(1, 1, range(1)).lanes
    stream = open_stream(epoch_order(data_config(write(tmp_path / "a", layout, texts))), state)
    rows = [stream.take(16) for _ in range(len(join_documents(tokenizer(), texts)) // 16 * 2)]
    assert all(a[16] == b[0] for a, b in zip(rows, rows[1:], strict=False))
    read = read_documents(np.concatenate([row[:16] for row in rows]))
    assert sorted(read[:200]) == sorted(texts)
    assert len(read) > 350 and len(set(read[200:])) == len(read[200:])
    assert state[0, 0, EPOCH] == 1 and state[0, 0, TOKENS] == 16 * len(rows)
    assert state[0, 0, DOCUMENTS] in (len(read), len(read) + 1)


def test_a_stream_with_one_token_between_documents_goes_on_from_any_state(tmp_path):
    """As Qwen's: what ends a document is seen only where the next begins."""
    texts, own = documents(120), Tokenizer(str(qwen(tmp_path / "t")))
    order = epoch_order(data_config(write(tmp_path / "a", "jsonl", texts)))

    def open_at(counters):
        return Lane(LaneStream(order, own, 0, 1, StreamState.from_counters(counters), spill), counters, lambda w: None)

    with contextlib.closing(SpillFile()) as spill:
        state = initial_state(1, 1, range(1)).lanes[0, 0]
        stream, rows, states = open_at(state), [], [state.copy()]
        while state[EPOCH] == 0:
            rows.append(stream.take(16))
            states.append(state.copy())
        tokens = np.concatenate([row[:16] for row in rows])
        begins = np.flatnonzero(tokens == own.bos_id)
        assert begins[0] == 0 and state[DOCUMENTS] == len(begins)
        read = [own.decode(tokens[a + 1 : b]) for a, b in zip(begins, begins[1:], strict=False)]
        assert sorted(read[:120]) == sorted(texts)
        for start in range(0, len(rows) - 5, 5):
            resumed = states[start].copy()
            again = open_at(resumed)
            for step in range(start, start + 4):
                np.testing.assert_array_equal(again.take(16), rows[step])
                np.testing.assert_array_equal(resumed, states[step + 1])


def test_lanes_share_an_epoch_out_between_them(tmp_path, open_stream):
    texts = documents(300)
    order = epoch_order(data_config(write(tmp_path / "a", "jsonl", texts)))
    state = initial_state(3, 1, range(3)).lanes
    read = []
    for lane in range(3):
        stream, tokens = open_stream(order, state, lane), []
        # One token at a time, to stop where the lane's first epoch does; that token is already of the next.
        while not tokens or state[lane, 0, EPOCH] == 0:
            tokens.append(stream.take(1)[0])
        read += read_documents(np.array(tokens))
    assert order.blocks(0) > 6
    assert sorted(read) == sorted(texts)


@pytest.mark.parametrize("layout", ["jsonl", "jsonl.gz", "parquet"])
def test_a_stream_goes_on_from_any_state(tmp_path, open_stream, layout):
    texts = documents(150)
    path = write(tmp_path / "a", layout, texts, rows=10**6)
    if layout == "jsonl":
        path.write_text(path.read_text().replace("\n", "\nno json\n"))
    order = epoch_order(data_config(path))
    state, entered = initial_state(2, 1, range(2)).lanes, []
    stream = open_stream(order, state, 1, entered.append)
    states, rows = [state.copy()], []
    for _ in range(200):
        rows.append(stream.take(24))
        states.append(state.copy())
    assert state[1, 0, EPOCH] > 0
    assert state[1, 0, BAD] == sum(len(w.bad) for w in entered)
    for start in range(0, 200, 7):
        resumed = states[start].copy()
        again = open_stream(order, resumed, 1)
        for step in range(start, min(start + 9, 200)):
            np.testing.assert_array_equal(again.take(24), rows[step])
            np.testing.assert_array_equal(resumed, states[step + 1])


def test_readers_that_wait_too_long_start_again_and_change_nothing(tmp_path, open_stream, monkeypatch):
    order = epoch_order(data_config(write(tmp_path / "a", "jsonl.gz", documents(300))))
    stream = open_stream(order, initial_state(1, 1, range(1)).lanes)
    rows = [stream.take(64) for _ in range(60)]
    monkeypatch.setattr(spill_file, "_WAITING_READERS", 0)
    stream = open_stream(order, initial_state(1, 1, range(1)).lanes)
    np.testing.assert_array_equal([stream.take(64) for _ in range(60)], rows)


def test_a_resume_tokenises_a_row_and_a_document_of_each_stream(tmp_path, open_stream, monkeypatch):
    path = write(tmp_path / "a", "jsonl", documents(3000))
    order = epoch_order(data_config(path, block_bytes=200_000))
    state = initial_state(1, 1, range(1)).lanes
    open_stream(order, state).take(8000)
    encoded = []
    encode = tokenizer().encode
    monkeypatch.setattr(tokenizer(), "encode", lambda texts: encoded.extend(texts) or encode(texts))
    open_stream(order, state).take(32)
    assert 0 < sum(len(text) for text in encoded) < 32 * 4 + 800


def test_text_that_waits_is_not_in_memory(tmp_path, open_stream):
    path = write(tmp_path / "a", "jsonl", documents(3000))
    stream = open_stream(epoch_order(data_config(path, block_bytes=10**6)), initial_state(1, 1, range(1)).lanes)
    stream.take(32)
    attributes = vars(stream.stream).values()
    assert sum(v.nbytes for v in attributes if isinstance(v, np.ndarray)) < 3000 * 4 + 2000
    assert not any(isinstance(v, (bytes, list, str)) for v in attributes)


def test_a_source_without_a_document_to_train_on_is_an_error_and_no_endless_loop(tmp_path, open_stream):
    held_out = data_config(write(tmp_path / "a", "jsonl", documents(5)), holdout_fraction=1 - 1e-9)
    (tmp_path / "b.jsonl").write_text("not json\n" * 50)
    for data in (held_out, data_config(tmp_path / "b.jsonl")):
        with pytest.raises(ConfigError, match=r"data.sources.s: a whole epoch holds no document.*holdout_fraction"):
            open_stream(epoch_order(data), initial_state(3, 1, range(3)).lanes, lane=1).take(8)


def test_a_few_documents_are_enough(tmp_path, open_stream):
    order = epoch_order(data_config(write(tmp_path / "a", "jsonl", ["one small document"])))
    tokens = open_stream(order, initial_state(8, 1, range(8)).lanes, lane=5).take(100)[:100]
    assert set(read_documents(tokens)) == {"one small document"}


def test_units_larger_than_a_block_leave_no_lane_without_documents(tmp_path, open_stream):
    """If the large unit left empty blocks behind it, one of two lanes could meet nothing else, for ever."""
    write(tmp_path / "large", "jsonl.gz", documents(100, prefix="large"))
    write(tmp_path / "small", "jsonl", ["small"])
    order = epoch_order(data_config(tmp_path / "*", block_bytes=1000))
    for epoch in range(20):
        assert all(len(order.units(epoch, b)) for b in range(order.blocks(epoch)))
    for lanes in (1, 2, 3, 4):
        state = initial_state(lanes, 1, range(lanes)).lanes
        for lane in range(lanes):
            assert read_documents(open_stream(order, state, lane).take(1000)[:1000])


def test_a_lane_passes_the_epochs_of_a_tiny_source_quickly(tmp_path, open_stream, monkeypatch):
    """Lane 4000 of 4096 begins at epoch 4000 of a source of one block; none of those need be put in order."""
    order = epoch_order(data_config(write(tmp_path / "a", "jsonl", documents(7))))
    ordered = []
    inner = order._order_epoch
    monkeypatch.setattr(order, "_epoch", lambda epoch: ordered.append(epoch) or inner(epoch))
    state = initial_state(4096, 1, range(4096)).lanes
    open_stream(order, state, lane=4000).take(8)
    assert state[4000, 0, EPOCH] == 4000 and set(ordered) == {4000}
