"""Of a corpus with one of each bad record known to exist, the good ones are trained on once, the bad ones written down."""

import gzip
import json
import tracemalloc

import numpy as np
import pytest
from data_corpus import data_config, documents, run_config, tokenizer, tokenizer_path

from easylm_mling.data import pool
from easylm_mling.data.catalog import build_catalog
from easylm_mling.data.loader import Loader
from easylm_mling.data.mixture import BAD, DOCUMENTS, EPOCH, TOKENS
from easylm_mling.data.shuffle import EpochOrder, windows
from easylm_mling.data.sources import lines, readers
from easylm_mling.errors import ConfigError
from easylm_mling.storage import files
from easylm_mling.storage.files import Retry

T = 32
GIGANTIC = "gigantic" + " river stone tree" * 500_000 + " " * 2_000_000

# (a line, the document it is, the reason why it is none)
JSON_LINES = [
    (b'\xef\xbb\xbf{"text": "with a byte order mark"}\n', "with a byte order mark", None),
    (rb'{"text": "lone \ud800 surrogate"}' + b"\n", "lone \ufffd surrogate", None),
    (rb'{"text": "NUL\u0000 inside"}' + b"\n", "NUL inside", None),
    (b'{"text": "with CRLF"}\r\n', "with CRLF", None),
    (b'{"text": "<bos>control<eos> tokens<pad>"}\n', "<bos>control<eos> tokens<pad>", None),
    (b'{"text": "twice", "text": "the last counts"}\n', "the last counts", None),
    (json.dumps({"text": GIGANTIC}).encode() + b"\n", GIGANTIC, None),
    (b'{"text": ""}\n', None, None),
    (b'{"text": " \\n\\u0000"}\n', None, None),
    (b"\n", None, None),
    (b'{"text": "invalid \xff UTF-8"}\n', None, "invalid UTF-8"),
    (b'{"text": "a surrogate in bytes \xed\xa0\x80"}\n', None, "invalid UTF-8"),
    (b'{"text": "truncated\n', None, "invalid JSON"),
    (b'{"text": "raw \x01 control \x1b character"}\n', None, "raw control character in JSON"),
    (b'{"text": "raw NUL \x00"}\n', None, "raw control character in JSON"),
    (b'{"text": null}\n', None, "field 'text' is NoneType, not text"),
    (b'{"body": "missing"}\n', None, "field 'text' is missing"),
    (b'{"text": ["a", "list"]}\n', None, "field 'text' is list, not text"),
    (b'{"text": 12}\n', None, "field 'text' is int, not text"),
    (b'"only text"\n', None, "not a JSON object"),
    (b'{"text": "two"} {"text": "values"}\n', None, "invalid JSON"),
    (b'{"text": "the last, without a newline"}', "the last, without a newline", None),
]
TEXT_LINES = [
    (b"\xef\xbb\xbfwith a byte order mark\n", "with a byte order mark", None),
    (b"NUL\x00 inside\n", "NUL inside", None),
    (b"with CRLF\r\n", "with CRLF", None),
    (b"raw \x01 control \x1b character\n", "raw \x01 control \x1b character", None),
    (b"invalid \xff UTF-8\n", None, "invalid UTF-8"),
    (b" \t\n", None, None),
    (GIGANTIC.encode() + b"\n", GIGANTIC, None),
    (b"the last, without a newline", "the last, without a newline", None),
]
CORPORA = {"jsonl": JSON_LINES, "ndjson.gz": JSON_LINES, "txt": TEXT_LINES}


def corpus(folder, suffix: str):
    """(config, catalog) of a file with each record once, and {offset: (line, reason)} of the bad ones."""
    bad, offset = {}, 0
    for line, _, reason in CORPORA[suffix]:
        if reason:
            bad[offset] = (line, reason)
        offset += len(line)
    content = b"".join(line for line, *_ in CORPORA[suffix])
    path = folder / f"a.{suffix}"
    path.write_bytes(gzip.compress(content, mtime=0) if suffix.endswith(".gz") else content)
    data = data_config(path, 200_000, 4096, tokenizer_path(), {"max_bad_fraction": 1.0})
    config = run_config(data, 1)
    return config, build_catalog(config.data), bad


def spelled(text: str) -> bytes:
    return tokenizer().encode([text])[0].tobytes()


SLOW = [pytest.param(x, marks=pytest.mark.slow) if x != "ndjson.gz" else x for x in CORPORA]


@pytest.mark.parametrize("suffix", SLOW)
def test_every_good_record_is_trained_on_once_and_every_bad_one_is_written_down(tmp_path, suffix):
    config, catalog, bad = corpus(tmp_path, suffix)
    quarantine, tokens = tmp_path / "quarantine.jsonl", []
    with Loader(config.mixer, catalog, tokenizer(), quarantine=quarantine) as loader:
        for batch, state in loader:
            tokens.append(batch["tokens"][0])
            if state.lanes[0, 0, EPOCH]:
                break
    assert state.lanes[0, 0, BAD] >= len(bad)
    stream = np.concatenate(tokens)
    wanted = sorted(spelled(text) for _, text, _ in CORPORA[suffix] if text)
    begins, ends = (np.flatnonzero(stream == special)[: len(wanted)] for special in (2, 1))
    assert begins[0] == 0 and (begins[1:] == ends[:-1] + 1).all()
    assert sorted(stream[b + 1 : e].tobytes() for b, e in zip(begins, ends, strict=True)) == wanted
    order = EpochOrder(catalog.sources["s"], config.data.seed, config.data.block_bytes)
    read = [d.decode() for block in range(order.blocks(0)) for w in windows(order, 0, block) for d in w.documents]
    assert sorted(read) == sorted(text for _, text, _ in CORPORA[suffix] if text)

    entries = [e for e in map(json.loads, quarantine.read_text().splitlines()) if e["epoch"] == 0]
    assert {e["offset"]: e["reason"] for e in entries} == {offset: reason for offset, (_, reason) in bad.items()}
    assert len(entries) == len(bad)
    for e in entries:
        line = bad[e["offset"]][0]
        assert e["source"] == "s" and e["file"] == str(tmp_path / f"a.{suffix}")
        assert e["head"] == line.rstrip(b"\r\n")[:200].decode(errors="replace")


@pytest.mark.parametrize("lanes,rows", [(1, 1), (4, 4)])
def test_a_run_killed_again_and_again_lists_each_bad_record_once_an_epoch(tmp_path, lanes, rows, monkeypatch):
    monkeypatch.setattr(pool, "POOLED_BYTES", 0)
    texts = [json.dumps({"text": t}) if i % 7 else f"bad {i}" for i, t in enumerate(documents(300))]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(texts))
    data = data_config(path, length=T, tokenizer=tokenizer_path(), data={"lanes": lanes, "max_bad_fraction": 1.0})
    config = run_config(data, rows)
    catalog = build_catalog(data)

    def run(name: str, stops: list[int]):
        state = None
        for stop in stops:
            with Loader(config.mixer, catalog, tokenizer(), state, quarantine=tmp_path / name) as loader:
                # A kill: of what was made, only the state two batches before lives on.
                states = [state, *(next(loader)[1] for _ in range(stop + 2))]
                state = states[stop]
        with Loader(config.mixer, catalog, tokenizer(), state, quarantine=tmp_path / name) as loader:
            state = next(s for _, s in loader if s.lanes[..., EPOCH].min() == 2)
        # What lies behind the state goes when the next process starts.
        Loader(config.mixer, catalog, tokenizer(), state, quarantine=tmp_path / name).close()
        entries = [line for line in (tmp_path / name).read_text().splitlines() if json.loads(line)["epoch"] < 2]
        return sorted(entries), state

    whole, state = run("whole", [])
    (tmp_path / "killed").write_text('{"source": "s", "la')
    assert run("killed", [0, 1, 7, 0, 30, 11])[0] == whole
    for epoch in (0, 1):
        offsets = [e["offset"] for e in map(json.loads, whole) if e["epoch"] == epoch]
        assert len(offsets) == len(set(offsets)) == 43
    assert state.lanes[..., BAD].sum() >= len(whole)


def test_a_document_longer_than_many_rows_is_cut_into_them(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "0123456789" * 2000}))
    config = run_config(data_config(path, length=T, tokenizer=tokenizer_path()), 1)
    want = [2, *tokenizer().encode(["0123456789" * 2000])[0].tolist(), 1]
    with Loader(config.mixer, build_catalog(config.data), tokenizer()) as loader:
        made = [next(loader) for _ in range(len(want) // T)]
    np.testing.assert_array_equal(np.concatenate([b["tokens"][0] for b, _ in made]), want[: len(made) * T])
    assert made[-1][1].lanes[0, 0, DOCUMENTS] == 1 and made[-1][1].lanes[0, 0, TOKENS] == len(made) * T
    assert all(b["loss_mask"].all() and (b["segment_ids"] == 1).all() for b, _ in made[:-1])


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "txt"])
def test_a_line_without_end_costs_no_memory_and_no_other_line(tmp_path, suffix, monkeypatch):
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 100_000)
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", 100_000)
    endless = b"x" * 20_000_000
    rows = [b'{"text": "a"}', endless, b'{"text": "b"}'] if suffix != "txt" else [b"a", endless, b"b"]
    content = b"\n".join(rows)
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    layout = {"txt": "text"}.get(suffix, suffix)
    for start in (0, 1000) if "." not in layout else (0,):
        tracemalloc.start()
        try:
            records = list(
                readers.read_unit(str(path), layout, start, path.stat().st_size, "text", "document", Retry())
            )
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < (20_000_000 if suffix.endswith("gz") else 1_000_000)
        bad = readers.BadRecord("line longer than 64 MiB", str(path), len(rows[0]) + 1, b"x" * 200)
        assert records == ([b"a", bad, b"b"] if start == 0 else [b"b"])


def test_units_inside_one_line_read_their_own_part_of_it(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n' + b"x" * 10_000_000 + b'\n{"text": "b"}\n')
    read, readinto = [], files._Ranges.readinto
    monkeypatch.setattr(files._Ranges, "readinto", lambda self, buffer: read.append(readinto(self, buffer)) or read[-1])
    order = EpochOrder(build_catalog(data_config(path, block_bytes=400_000)).sources["s"], 0, 400_000)
    assert sorted(d for b in range(order.blocks(0)) for w in windows(order, 0, b) for d in w.documents) == [b"a", b"b"]
    assert sum(read) < 4 * 10_000_000


def test_lines_that_no_blank_one_ends_are_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "_MAX_JOINED_BYTES", 1000)
    (tmp_path / "a.txt").write_text("".join(f"line {i}\n" for i in range(1000)))
    documents = list(
        readers.read_unit(
            str(tmp_path / "a.txt"), "text", 0, (tmp_path / "a.txt").stat().st_size, "text", "line", Retry()
        )
    )
    assert all(len(d) < 1100 for d in documents) and len(documents) > 5
    assert b"\n".join(documents).decode().splitlines() == [f"line {i}" for i in range(1000)]


def test_a_json_file_that_is_one_value_is_refused(tmp_path):
    for content in ('[{"text": "a"}, {"text": "b"}]', json.dumps({"text": "a"}, indent=1)):
        (tmp_path / "a.json").write_text(content)
        with pytest.raises(ConfigError, match="a.json: no line of it is a JSON object; write one object a line"):
            build_catalog(data_config(tmp_path / "a.json"))
    (tmp_path / "a.json").write_text('{"text": "a"}\n{"text": "b"}\n')
    assert len(build_catalog(data_config(tmp_path / "a.json")).sources["s"].files) == 1
