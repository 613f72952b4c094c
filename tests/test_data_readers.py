"""Every document is read once, wherever the units are cut; what cannot be read costs one record, or names its file."""

import dataclasses
import gzip
import json
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_corpus import LAYOUTS, data_config, documents, epoch_documents, epoch_order, write
from hypothesis import given, settings
from hypothesis import strategies as st

from easylm_mling.data.shuffle import windows
from easylm_mling.data.sources.readers import BadRecord, read_unit
from easylm_mling.data.sources.splitting import layout_of
from easylm_mling.errors import ConfigError


def read(path, layout=None, row="document", start=0, end=None):
    """(documents, bad records) of a unit, by default of all."""
    end = path.stat().st_size if end is None else end
    records = list(read_unit(str(path), layout or layout_of(str(path)), start, end, "text", row))
    return [r.decode() for r in records if not isinstance(r, BadRecord)], [
        r for r in records if isinstance(r, BadRecord)
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_epoch_holds_every_document_once(tmp_path, layout):
    texts = documents(200)
    write(tmp_path / "a", layout, texts[:120])
    path = write(tmp_path / "b", layout, texts[120:])
    order = epoch_order(data_config(path.with_name(path.name.replace("b", "*", 1)), block_bytes=1000))
    if not layout.endswith(("gz", "zst")):
        assert order.blocks(0) > 5
    for epoch in (0, 1):
        assert sorted(epoch_documents(order, epoch)) == sorted(texts)
    assert epoch_documents(order, 0) != epoch_documents(order, 1)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.text(max_size=12), max_size=12), st.data())
def test_any_cut_of_a_jsonl_file_gives_each_line_to_one_unit(tmp_path_factory, texts, data):
    path = tmp_path_factory.mktemp("cut") / "a.jsonl"
    path.write_bytes("\n".join(json.dumps({"text": t}, ensure_ascii=data.draw(st.booleans())) for t in texts).encode())
    whole, _ = read(path)
    size = path.stat().st_size
    cuts = [0, *sorted(data.draw(st.lists(st.integers(0, size), max_size=4))), size]
    pieces = [read(path, start=a, end=b)[0] for a, b in zip(cuts, cuts[1:], strict=False)]
    assert [text for piece in pieces for text in piece] == whole
    assert len(whole) == sum(bool(t.replace("\0", "").strip()) for t in texts)


@pytest.mark.parametrize("layout", ["jsonl", "jsonl.gz", "parquet", "arrow", "arrow-file"])
@settings(deadline=None, max_examples=40)
@given(
    lines=st.lists(st.sampled_from(["\n", "", "a\n", "b\n", "雨\n", "tail"]), min_size=1, max_size=30),
    rows=st.integers(1, 6),
    unit=st.integers(1, 60),
)
def test_lines_join_to_the_same_documents_wherever_units_end(tmp_path_factory, layout, lines, rows, unit):
    lines = [line.replace("\n", f"{i}\n") if line.strip() else line for i, line in enumerate(lines)]
    expected, current = [], []
    for line in [*lines, ""]:
        if line.strip():
            current.append(line.rstrip("\n"))
        elif current:
            expected.append("\n".join(current))
            current = []
    path = write(tmp_path_factory.mktemp("lines") / "a", layout, lines, rows=rows)
    if not expected:
        return
    assert sorted(epoch_documents(epoch_order(_tiny_blocks(path, unit)))) == sorted(expected)


def _tiny_blocks(path, unit):
    data = data_config(path, row="line")
    object.__setattr__(data, "block_bytes", 4 * unit)  # smaller than a config may ask for: more cuts in small files
    return data


def test_text_is_repaired(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        rb'{"text": "a\ud800b\u0000c \ud83d\ude00"}' + b"\n" + '{"text": "\u3000\\n\\t"}\n\n{"text": "x"}\r\n'.encode()
    )
    assert read(path) == (["a\ufffdbc \U0001f600", "x"], [])
    schema = pa.schema([("text", pa.string())])
    pq.write_table(pa.table({"text": ["a\0b", "\0", " \u3000", "ok"]}, schema=schema), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == (["ab", "ok"], [])


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\n{"text": "two"}\n')
    assert read(tmp_path / "a.jsonl") == (["one", "two"], [])


BAD_LINES = {
    b'{"text": "cut o': "invalid JSON",
    b'{"text": "\xff\xfe"}': "invalid UTF-8",
    b'{"text": null}': "field 'text' is NoneType, not text",
    b'{"text": ["a"]}': "field 'text' is list, not text",
    b'{"body": "a"}': "field 'text' is missing",
    b'["text"]': "not a JSON object",
    b'{"text": "raw \x01 control"}': "raw control character in JSON",
    b'{"text": "deep", "x": ' + b"[" * 100_000: "invalid JSON",
    b'{"text": "a", "n": ' + b"9" * 5000 + b', "s": "\\ud800"}': "invalid JSON",
}


@pytest.mark.parametrize("line,reason", BAD_LINES.items(), ids=range(len(BAD_LINES)))
def test_a_bad_line_costs_itself_only(tmp_path, line, reason):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "before"}\n' + line + b'\n{"text": "after"}\n')
    good, bad = read(path)
    assert good == ["before", "after"]
    assert bad == [BadRecord(reason, str(path), 19, line[:200])]


@pytest.mark.parametrize("layout", ["parquet", "arrow", "arrow-file"])
def test_a_bad_row_of_a_table_costs_itself_only(tmp_path, layout):
    broken = pa.Array.from_buffers(
        pa.string(), 3, [None, *pa.array([b"one", b"\xff\xfe", b"two"], pa.binary()).buffers()[1:]]
    )
    path = write(tmp_path / "a", layout, ["x"])
    table = pa.table({"text": pa.chunked_array([broken, pa.array([None, "three"], pa.string())])})
    if layout == "parquet":
        pq.write_table(table, path)
    else:
        with pa.OSFile(str(path), "wb") as sink:
            with (pa.ipc.new_stream if layout == "arrow" else pa.ipc.new_file)(sink, table.schema) as writer:
                writer.write_table(table)
    good, bad = read(path)
    assert good == ["one", "two", "three"]
    assert [b.reason for b in bad] == ["invalid UTF-8", "column 'text' is null"]
    if layout != "arrow":
        assert [b.offset for b in bad] == [1, 3]


def test_a_bad_line_among_lines_is_counted_once_wherever_units_end(tmp_path):
    lines = [None if i % 5 == 3 else "\n" if i % 9 == 0 else f"line {i}\n" for i in range(60)]
    path = write(tmp_path / "a", "parquet", lines, rows=2)
    for unit in (1, 30, 10_000):
        order = epoch_order(_tiny_blocks(path, unit))
        bad = [b.offset for block in range(order.blocks(0)) for w in windows(order, 0, block) for b in w.bad]
        assert sorted(bad) == [i for i, line in enumerate(lines) if line is None]
        read = "\n".join(sorted(epoch_documents(order))).split("\n")
        assert sorted(read) == sorted(line.strip() for line in lines if line and line.strip())


@pytest.mark.parametrize("layout", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet", "arrow", "arrow-file"])
def test_a_cut_off_file_is_an_error_that_names_it(tmp_path, layout):
    path = write(tmp_path / "a", layout, documents(300))
    blob = path.read_bytes()
    for keep in (len(blob) * 2 // 3, len(blob) // 9):
        path.write_bytes(blob[:keep])
        with pytest.raises(ConfigError, match="damaged or cut off") as error:
            read(path, end=len(blob))
        assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_file_of_several_compressed_members_is_read_whole(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(b"".join(gzip.compress(json.dumps({"text": t}).encode() + b"\n") for t in ("one", "two", "three")))
    assert read(path)[0] == ["one", "two", "three"]


@pytest.mark.parametrize("layout", ["jsonl.gz", "jsonl", "parquet"])
def test_memory_does_not_grow_with_the_file(tmp_path, layout):
    # About 18 MB of text, and in a parquet row group or a .gz there is no smaller unit to be found.
    stock = ["".join(np.random.default_rng(i).choice(list("abcdefgh 日本"), 500)) for i in range(100)]
    texts = [f"{i} {stock[i % 100]}{stock[i // 100]}" for i in range(10_000)]
    path = write(tmp_path / "a", layout, texts, rows=10**6)
    order = epoch_order(data_config(path, block_bytes=100_000))
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    reader = windows(order, 0, 0)
    first = next(reader)
    peak = tracemalloc.get_traced_memory()[1] + pa.total_allocated_bytes() - before
    tracemalloc.stop()
    assert 0 < len(first.documents) < 200
    assert peak < 4_500_000


def test_a_window_is_read_without_reading_the_rest_of_a_gz(tmp_path):
    path = write(tmp_path / "a", "jsonl.gz", documents(20_000))
    blob = path.read_bytes()
    order = epoch_order(data_config(path))
    path.write_bytes(blob[: len(blob) // 2])
    order.source = dataclasses.replace(order.source, stamps=())  # as if nobody looked whether it is the same file
    reader = windows(order, 0, 0)
    assert next(reader).documents
    with pytest.raises(ConfigError, match="damaged"):
        list(reader)
