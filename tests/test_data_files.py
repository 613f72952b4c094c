"""The files of a source: each is read once and whole, or refused by name, whatever it is called and however it is packed."""

import bz2
import codecs
import gzip
import io
import json
import lzma
import os
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from data_corpus import data_config, documents, epoch_documents, epoch_order, tokenizer_path, write

from easylm_mling.cli.main import main
from easylm_mling.config import SourceConfig
from easylm_mling.data.catalog import build_catalog, reopen_catalog
from easylm_mling.data.shuffle import unit_records
from easylm_mling.data.sources import listing
from easylm_mling.data.sources.lines import MAX_LINE_BYTES
from easylm_mling.data.sources.readers import BadRecord
from easylm_mling.errors import ConfigError

TEXTS = [text.strip() for text in documents(40)]


def config_of(paths, **settings):
    paths = paths if isinstance(paths, tuple) else (str(paths),)
    return data_config({"s": SourceConfig(paths, 1.0, holdout_fraction=0.0, **settings)})


def names(paths) -> list[str]:
    return [Path(f.name).name for f in build_catalog(config_of(paths)).sources["s"].files]


def texts(paths, **settings) -> list[str]:
    return sorted(epoch_documents(epoch_order(config_of(paths, **settings))))


def refusal(paths) -> str:
    with pytest.raises(ConfigError) as error:
        texts(paths)
    assert "\n" not in str(error.value)
    return str(error.value)


def lines(texts=TEXTS) -> bytes:
    return "".join(f"{text}\n\n" for text in texts).encode()


def test_a_linked_folder_is_read_like_any_other(tmp_path):
    write(tmp_path / "elsewhere" / "a", "jsonl", TEXTS[:20])
    write(tmp_path / "data" / "b", "jsonl", TEXTS[20:])
    (tmp_path / "data" / "more").symlink_to(tmp_path / "elsewhere")
    for paths in ("data", "data/**", "data/**/*.jsonl", "data/**/**/*.jsonl"):
        assert texts(tmp_path / paths) == sorted(TEXTS), paths


@pytest.mark.parametrize("paths", ["data", "data/**/*.jsonl", "data/**"])
def test_a_link_to_a_folder_above_is_refused(tmp_path, paths):
    write(tmp_path / "data" / "x" / "a", "jsonl", TEXTS)
    (tmp_path / "data" / "x" / "again").symlink_to(tmp_path / "data")
    assert "data/x/again is a link to a folder that it lies in" in refusal(tmp_path / paths)


@pytest.mark.parametrize("paths", ["data", "data/*.jsonl", "data/**/*.jsonl", "data/b.jsonl", "data/{language}"])
@pytest.mark.parametrize("target", ["gone", "b.jsonl"])
def test_a_link_that_leads_nowhere_is_refused(tmp_path, paths, target):
    write(tmp_path / "data" / "a", "jsonl", TEXTS)
    (tmp_path / "data" / "b.jsonl").symlink_to(target)
    assert f"data/b.jsonl is a link to {target}, which is not there" in refusal(tmp_path / paths)


def test_a_linked_folder_that_is_gone_is_refused_below_a_pattern(tmp_path):
    write(tmp_path / "data" / "ja" / "a", "jsonl", TEXTS)
    (tmp_path / "data" / "ko").symlink_to(tmp_path / "unmounted")
    for paths in ("data/*/a.jsonl", "data/{language}/*.jsonl", "data/**/a.jsonl"):
        assert "data/ko is a link to" in refusal(tmp_path / paths)


@pytest.mark.parametrize("paths", ["data", "data/*.jsonl", "data/b.jsonl"])
def test_a_pipe_is_refused_and_nobody_waits_for_it(tmp_path, paths):
    write(tmp_path / "data" / "a", "jsonl", TEXTS)
    os.mkfifo(tmp_path / "data" / "b.jsonl")
    assert "data/b.jsonl is a pipe" in refusal(tmp_path / paths)


def test_a_file_is_read_once_whatever_its_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "data" / "a", "jsonl", TEXTS)
    os.link("data/a.jsonl", "data/b.jsonl")
    os.symlink("a.jsonl", "data/c.jsonl")
    assert names(("data/*.jsonl", "./data/a.jsonl", str(tmp_path / "data"), "data//b.jsonl")) == ["a.jsonl"]
    (tmp_path / "data" / "ja").mkdir()
    os.link("data/a.jsonl", "data/ja/a.jsonl")
    (tmp_path / "data" / "ko").symlink_to("ja")
    assert "in two languages" in refusal("data/{language}/a.jsonl")


def test_what_a_folder_holds_beside_is_named(tmp_path, capsys):
    write(tmp_path / "data" / "a", "jsonl", TEXTS)
    for name in ("b.csv", "deep/c.docx", "_SUCCESS", ".hidden", "dataset_info.json"):
        (tmp_path / "data" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "data" / name).write_text("x")
    catalog = build_catalog(data_config(tmp_path / "data"))
    (remark,) = catalog.remarks()
    assert "data/b.csv, " in remark and "deep/c.docx; known are" in remark and "SUCCESS" not in remark
    assert reopen_catalog(catalog, data_config(tmp_path / "data")).remarks() == [remark]
    assert build_catalog(data_config(tmp_path / "data" / "*.jsonl")).remarks() == []
    os.remove(tmp_path / "data" / "a.jsonl")
    assert "b.csv" in refusal(tmp_path / "data")


def test_every_packing_is_read_whatever_the_case_of_its_suffix(tmp_path):
    packers = {
        "a.JSONL": bytes,
        "b.jsonl.gz": gzip.compress,
        "c.Jsonl.ZST": zstandard.compress,
        "d.jsonl.zstd": zstandard.compress,
        "e.jsonl.xz": lzma.compress,
        "f.jsonl.bz2": bz2.compress,
    }
    for i, (name, pack) in enumerate(packers.items()):
        blob = write(tmp_path / "one", "jsonl", documents(20, seed=i, prefix=f"{i}-")).read_bytes()
        # Of two members, streams or frames, as pigz, pixz and pzstd write them.
        cut = blob.index(b"\n", len(blob) // 2) + 1
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / name).write_bytes(pack(blob[:cut]) + pack(blob[cut:]))
    wanted = [text for i in range(len(packers)) for text in documents(20, seed=i, prefix=f"{i}-")]
    assert texts(tmp_path / "data") == sorted(wanted)


@pytest.mark.parametrize("suffix, pack", [("gz", gzip.compress), ("xz", lzma.compress), ("bz2", bz2.compress)])
def test_a_packed_file_that_is_cut_off_or_flipped_is_refused(tmp_path, suffix, pack):
    blob = pack(lines(documents(2000)))
    for damaged in (blob[: len(blob) * 2 // 3], blob[:2000] + bytes([blob[2000] ^ 255]) + blob[2001:]):
        (tmp_path / f"a.txt.{suffix}").write_bytes(damaged)
        assert "damaged or cut off" in refusal(tmp_path / f"a.txt.{suffix}")


def test_padding_and_skippable_frames_are_no_text(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(lines()) + bytes(512))
    skippable = struct.pack("<II", 0x184D2A50, 5) + b"index"
    (tmp_path / "b.txt.zst").write_bytes(skippable + zstandard.compress(lines()) + skippable)
    assert texts(tmp_path / "a.txt.gz", row="line") == texts(tmp_path / "b.txt.zst", row="line") == sorted(TEXTS)


def test_a_window_that_every_lane_would_hold_is_refused_by_its_option(tmp_path):
    packer = zstandard.ZstdCompressor(
        compression_params=zstandard.ZstdCompressionParameters(window_log=30)
    ).compressobj()
    (tmp_path / "a.txt.zst").write_bytes(packer.compress(lines()) + packer.flush())
    assert "zstd --long" in refusal(tmp_path / "a.txt.zst")


def test_marks_between_joined_files_are_no_text(tmp_path):
    half = codecs.BOM_UTF8 + write(tmp_path / "h", "jsonl", TEXTS[:20]).read_bytes()
    rest = codecs.BOM_UTF8 + write(tmp_path / "r", "jsonl", TEXTS[20:]).read_bytes()
    (tmp_path / "a.jsonl").write_bytes(half + rest)
    assert texts(tmp_path / "a.jsonl") == sorted(TEXTS)
    (tmp_path / "a.txt").write_bytes(b"".join(codecs.BOM_UTF8 + lines(part) for part in (TEXTS[:20], TEXTS[20:])))
    assert texts(tmp_path / "a.txt", row="line") == sorted(TEXTS)


def test_a_path_that_is_there_is_no_pattern(tmp_path):
    write(tmp_path / "[zh]" / "part[12]", "jsonl", TEXTS)
    write(tmp_path / "[zh]" / "part1", "jsonl", documents(3))
    write(tmp_path / "z" / "part1", "jsonl", documents(3))
    for paths in ("[zh]/part[12].jsonl", "[zh]/part[[]*", "[zh]/*[[]12].jsonl"):
        assert names(tmp_path / paths) == ["part[12].jsonl"], paths
    assert names(tmp_path / "[zh]") == ["part1.jsonl", "part[12].jsonl"]
    assert names(tmp_path / "[z]" / "*") == ["part1.jsonl"]
    assert names(f"file://{tmp_path}/[zh]/part[12].jsonl") == ["part[12].jsonl"]


def test_a_name_that_is_no_utf_8_is_refused(tmp_path):
    blob = write(tmp_path / "a", "jsonl", TEXTS).read_bytes()
    with open(os.fsencode(tmp_path) + b"/\x93\xfa\x96{.jsonl", "wb") as file:
        file.write(blob)
    assert "rename the file" in refusal(tmp_path)


def test_an_edit_of_the_same_size_is_noticed_at_the_next_start(tmp_path, monkeypatch):
    monkeypatch.setattr(listing, "_WHOLE_BYTES", 1 << 20)
    path = tmp_path / "a.txt"
    path.write_bytes(b"river\n" * (1 << 19))
    data = data_config(path)
    catalog = build_catalog(data)
    status = path.stat()
    for place in (6 * 80_000, 6 * ((1 << 20) // 6 + 100), 6 * ((1 << 19) - 1)):
        blob = bytearray(path.read_bytes())
        blob[place : place + 5] = b"XXXXX"
        path.write_bytes(blob)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        with pytest.raises(ConfigError, match="a.txt is changed"):
            reopen_catalog(catalog, data)
        catalog = build_catalog(data)


def test_a_file_that_is_replaced_while_it_is_read_is_noticed(tmp_path):
    path = write(tmp_path / "a", "jsonl", TEXTS)
    source = build_catalog(data_config(path, block_bytes=1000)).sources["s"]
    again = reopen_catalog(build_catalog(data_config(path)), data_config(path)).sources["s"]
    assert list(unit_records(source, 0)) and list(unit_records(again, 0))
    shutil.copy(path, tmp_path / "b")
    os.replace(tmp_path / "b", path)
    for opened in (source, again):
        with pytest.raises(ConfigError, match="changed while the run read it"):
            next(unit_records(opened, 0))


def test_columns_that_are_doubled_encoded_or_joined_are_refused(tmp_path):
    table = pa.table({"text": TEXTS, "kind": pa.array(["a"] * 40).dictionary_encode()})
    for suffix, wanted in (("arrow", "'kind' is dictionary-encoded"), ("parquet", None)):
        path = tmp_path / f"encoded.{suffix}"
        if suffix == "parquet":
            pq.write_table(table, path)
            assert texts(path) == sorted(TEXTS)
            continue
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        assert wanted in refusal(path)
    doubled = pa.Table.from_arrays([pa.array(TEXTS)] * 2, names=["text", "text"])
    pq.write_table(doubled, tmp_path / "doubled.parquet")
    assert "2 columns 'text'" in refusal(tmp_path / "doubled.parquet")
    blobs = [write(tmp_path / name, "arrow", TEXTS).read_bytes() for name in "ab"]
    (tmp_path / "joined.arrow").write_bytes(b"".join(blobs))
    assert "another Arrow stream follows" in refusal(tmp_path / "joined.arrow")
    (tmp_path / "padded.arrow").write_bytes(blobs[0] + bytes(100))
    assert texts(tmp_path / "padded.arrow") == sorted(TEXTS)


def test_a_shard_without_any_value_costs_its_own_rows(tmp_path):
    write(tmp_path / "data" / "a", "parquet", TEXTS)
    pq.write_table(pa.table({"text": pa.nulls(3)}), tmp_path / "data" / "b.parquet")
    source = build_catalog(data_config(tmp_path / "data")).sources["s"]
    records = [r for unit in range(len(source.units)) for r in unit_records(source, unit)]
    assert [r.reason for r in records if isinstance(r, BadRecord)] == ["column 'text' is null"] * 3
    assert len(records) == 43


LONG_LINE = """
import re, sys
from easylm_mling.data.sources.readers import read_unit
kinds = [type(r).__name__ for r in read_unit(sys.argv[1], sys.argv[2], 0, 1, "text", "document")]
# Of this program: the maximum that getrusage tells begins with its parent's.
print(kinds, int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) // 1024)
"""


@pytest.mark.parametrize("suffix", ["gz", "zst", *(pytest.param(s, marks=pytest.mark.slow) for s in ("xz", "bz2"))])
def test_a_line_of_a_gibibyte_takes_little_memory(tmp_path, suffix):
    packers = {"gz": lambda: zlib.compressobj(1, wbits=31), "zst": zstandard.ZstdCompressor().compressobj,
               "xz": lambda: lzma.LZMACompressor(preset=0), "bz2": lambda: bz2.BZ2Compressor(1)}  # fmt: skip
    packer, blob = packers[suffix](), io.BytesIO()
    for part in [b'{"text": "short"}\n', *[b"a" * (1 << 22)] * 256, b'\n{"text": "short"}\n']:
        blob.write(packer.compress(part))
    blob.write(packer.flush())
    (tmp_path / f"a.jsonl.{suffix}").write_bytes(blob.getvalue())
    command = [sys.executable, "-c", LONG_LINE, str(tmp_path / f"a.jsonl.{suffix}"), f"jsonl.{suffix}"]
    kinds, _, megabytes = subprocess.check_output(command, text=True).strip().rpartition(" ")
    assert kinds == "['bytes', 'BadRecord', 'bytes']"
    assert int(megabytes) < 450  # of which the packages are 120, and twice the longest line 128


def test_a_long_text_of_a_table_is_a_bad_record(tmp_path):
    long = "a" * (MAX_LINE_BYTES + 1)
    pq.write_table(pa.table({"text": ["short", long, "short"]}), tmp_path / "a.parquet")
    source = build_catalog(data_config(tmp_path / "a.parquet")).sources["s"]
    kinds = [r.reason if isinstance(r, BadRecord) else r for r in unit_records(source, 0)]
    assert kinds == [b"short", "text longer than 64 MiB", b"short"]


def test_inspect_says_what_is_read_and_what_is_not(tmp_path, capsys):
    write(tmp_path / "data" / "a", "jsonl", TEXTS)
    (tmp_path / "data" / "b.jsonl.xz").write_bytes(lzma.compress(b'{"text": "x"}\n'))
    (tmp_path / "data" / "notes.csv").write_text("x")
    sources = {"s": {"paths": [f"{tmp_path}/data"], "weight": 1}}
    config = {"data": {"tokenizer": tokenizer_path(), "sequence_length": 32, "sources": sources}}
    (tmp_path / "c.yaml").write_text(json.dumps(config))
    assert main(["data", "inspect", str(tmp_path / "c.yaml")]) == 0
    printed = capsys.readouterr().out
    assert "its files are 1 jsonl, 1 jsonl.xz" in printed and "notes.csv; known are" in printed
