"""The catalog lists and cuts files once, and a run whose files or settings changed under it is refused."""

import dataclasses
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_corpus import LAYOUTS, data_config, documents, write

from easylm_mling.config import SourceConfig
from easylm_mling.data.catalog import Catalog, build_catalog
from easylm_mling.errors import ConfigError


def message_of(call, *args) -> str:
    with pytest.raises(ConfigError) as error:
        call(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_units_tile_the_file_and_are_about_as_large_as_asked(tmp_path, layout):
    path = write(tmp_path / "a", layout, documents(500))
    source = build_catalog(data_config(path, block_bytes=8000)).sources["s"]
    assert (source.units[1:, 1] == source.units[:-1, 2]).all() and source.units[0, 1] == 0
    if not layout.endswith(("gz", "zst")):
        assert len(source.units) > 5
        assert (source.units[:-1, 3] < 5000).all()


def test_it_comes_back_from_its_file_and_leaves_no_other(tmp_path):
    write(tmp_path / "x" / "a", "parquet", documents(50))
    write(tmp_path / "y" / "a", "jsonl", documents(50))
    paths = {"one": tmp_path / "x" / "*", "two": tmp_path / "y" / "*"}
    catalog = build_catalog(data_config({name: SourceConfig((str(path),), 1.0) for name, path in paths.items()}))
    catalog.save(tmp_path / "catalog.json")
    again = Catalog.load(tmp_path / "catalog.json")
    again.check(catalog)
    assert again.fingerprint == catalog.fingerprint
    for name, source in catalog.sources.items():
        assert again.sources[name].files == source.files
        np.testing.assert_array_equal(again.sources[name].units, source.units)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["catalog.json", "x", "y"]


def test_the_language_is_the_folder_it_stands_for(tmp_path):
    for language in ("aaa_Latn", "bbb_Cyrl"):
        for part in "pq":
            write(tmp_path / language / "train" / f"data-{part}", "arrow", documents(20))
    source = build_catalog(data_config(tmp_path / "{language}" / "train" / "data-*.arrow")).sources["s"]
    assert source.languages == ("aaa_Latn", "bbb_Cyrl")
    assert [f.language for f in source.files] == ["aaa_Latn"] * 2 + ["bbb_Cyrl"] * 2
    assert sorted(set(source.unit_languages.tolist())) == [0, 1]
    for wrong in ("{language}.arrow", "x/{language}/{language}", "{language}/**/a.arrow", "pre-{language}/a"):
        assert "{language}" in message_of(build_catalog, data_config(wrong))


def test_files_that_changed_are_named(tmp_path):
    for name in "abc":
        write(tmp_path / name, "jsonl", documents(30, prefix=name))
    data = data_config(tmp_path / "*.jsonl")
    stored = build_catalog(data)
    (tmp_path / "b.jsonl").write_bytes((tmp_path / "b.jsonl").read_bytes().replace(b"b3 ", b"B3 "))
    assert f"data.sources.s.paths: {tmp_path / 'b.jsonl'} is changed" in message_of(stored.check, build_catalog(data))
    (tmp_path / "a.jsonl").unlink()
    assert f"{tmp_path / 'a.jsonl'} is missing" in message_of(stored.check, build_catalog(data))
    write(tmp_path / "a", "jsonl", documents(30, prefix="a"))
    write(tmp_path / "b", "jsonl", documents(30, prefix="b"))
    stored.check(build_catalog(data))
    write(tmp_path / "a0", "jsonl", documents(3))
    assert f"{tmp_path / 'a0.jsonl'} is new" in message_of(stored.check, build_catalog(data))


def test_settings_that_decide_the_order_may_not_change_and_weights_may(tmp_path):
    write(tmp_path / "a", "jsonl", documents(30))
    data = data_config(tmp_path / "a.jsonl")
    stored = build_catalog(data)
    for key, value in dict(seed=1, block_bytes=3000, sequence_length=64).items():
        assert f"data.{key} was" in message_of(stored.check, build_catalog(dataclasses.replace(data, **{key: value})))
    for key, value in dict(
        text_column="id", row="line", holdout_fraction=0.5, language_temperature=0.5, language_max_repeats=9
    ).items():
        fresh = Catalog(
            {"s": dataclasses.replace(stored.sources["s"], settings={**stored.sources["s"].settings, key: value})},
            stored.settings,
        )
        assert f"data.sources.s.{key} was" in message_of(stored.check, fresh)
        assert fresh.fingerprint != stored.fingerprint
    source = dataclasses.replace(data.sources["s"], weight=0.25)
    stored.check(build_catalog(dataclasses.replace(data, sources={"s": source})))
    assert "data.sources: this run began with s and now has s, t" in message_of(
        stored.check, build_catalog(dataclasses.replace(data, sources={"s": source, "t": source}))
    )


def test_files_that_are_not_there_or_hold_nothing(tmp_path):
    assert "data.sources.s.paths" in message_of(build_catalog, data_config(tmp_path / "no*.jsonl"))
    (tmp_path / "a.jsonl").touch()
    assert "data.sources.s.paths: there is no text" in message_of(build_catalog, data_config(tmp_path / "a.jsonl"))
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "b.parquet")
    assert "data.sources.s.paths: there is no text" in message_of(build_catalog, data_config(tmp_path / "b.parquet"))
    (tmp_path / "c.csv").write_text("text\na\n")
    assert f"{tmp_path / 'c.csv'}: unknown file format" in message_of(build_catalog, data_config(tmp_path / "c.csv"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_text_column_that_is_not_there(tmp_path, layout):
    path = write(tmp_path / "a", layout, documents(150), column="content")
    message = message_of(build_catalog, data_config(path))
    assert str(path) in message and "'text'" in message and "id, content" in message
    build_catalog(data_config(path, text_column="content"))


def test_some_rows_without_the_field_are_no_reason_to_refuse_a_file(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "a"}\nnot json\n' * 40 + '{"text": "b"}\n')
    build_catalog(data_config(tmp_path / "a.jsonl"))


def test_a_column_that_is_no_text(tmp_path):
    path = write(tmp_path / "a", "parquet", documents(20))
    message = message_of(build_catalog, data_config(path, text_column="id"))
    assert "int64, not text" in message and "id, text" in message


@pytest.mark.parametrize("layout", ["jsonl.gz", "jsonl.zst", "parquet", "arrow"])
def test_a_file_that_is_not_what_its_suffix_says(tmp_path, layout):
    path = tmp_path / f"a.{layout}"
    path.write_bytes(os.urandom(3000))
    message = message_of(build_catalog, data_config(path))
    assert str(path) in message and "damaged" in message


def test_a_catalog_that_is_not_one(tmp_path):
    path = tmp_path / "catalog.json"
    assert "catalog.json" in message_of(Catalog.load, path)
    path.write_text('{"format": 1, ')
    assert "catalog.json" in message_of(Catalog.load, path)
    for content, has in (('{"format": 99}', "format 99"), ("{}", "no format number"), ("[]", "no format number")):
        path.write_text(content)
        message = message_of(Catalog.load, path)
        assert (
            f"catalog.json: this catalog has {has}" in message
            and "use the version that wrote it, or start a new run_dir" in message
        )
