"""Files that lie elsewhere give the same batches as local ones, bit for bit, through a server that fails and is slow."""

import dataclasses
import json
import tracemalloc

import fsspec
import numpy as np
import pyarrow as pa
import pytest
from data_corpus import (
    LAYOUTS,
    assert_same,
    data_config,
    documents,
    epoch_documents,
    run_config,
    tokenizer,
    tokenizer_path,
    write,
)
from http_server import serve

from easylm_mling.config import HubDataset, SourceConfig
from easylm_mling.data.catalog import Catalog, build_catalog, reopen_catalog
from easylm_mling.data.loader import Loader
from easylm_mling.data.shuffle import EpochOrder, windows
from easylm_mling.errors import ConfigError
from easylm_mling.storage import files
from easylm_mling.storage.files import Retry, open_binary

FAST = {"retry_seconds": 0.001}


def message_of(call, *args) -> str:
    with pytest.raises(ConfigError) as error:
        call(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A folder with every layout, a source of lines and one of three languages."""
    root = tmp_path_factory.mktemp("corpus")
    for layout in LAYOUTS:
        write(root / layout / "a", layout, documents(60, prefix=layout))
        write(root / layout / "b", layout, documents(60, seed=1, prefix=layout))
    lines = [line for d in documents(60, prefix="l") for line in [*d.splitlines(), ""]]
    (root / "lines.txt").write_text("\n".join(lines), encoding="utf-8")
    for language, count in (("xx", 60), ("yy", 7), ("zz", 30)):
        write(root / "many" / language / "train" / "data-0", "arrow", documents(count, prefix=language))
        (root / "many" / language / "train" / "state.json").write_text("{}")
    return root


def mixture(root: str):
    suffix = {"arrow-file": "arrow"}
    sources = {
        layout: SourceConfig((f"{root}/{layout}/*.{suffix.get(layout, layout)}",), 1.0, holdout_fraction=0.0)
        for layout in LAYOUTS
    }
    sources["lines"] = SourceConfig((f"{root}/lines.txt",), 1.0, row="line")
    sources["many"] = SourceConfig((f"{root}/many/{{language}}/",), 2.0, language_temperature=0.5)
    return run_config(data_config(sources, tokenizer=tokenizer_path(), data={"lanes": 4, **FAST}), 4)


def batches(config, catalog, count: int, state=None):
    with Loader(config, catalog, tokenizer(), state) as loader:
        return [next(loader) for _ in range(count)]


@pytest.mark.slow
def test_a_server_that_fails_and_is_slow_gives_the_batches_of_local_files(corpus, tmp_path):
    config = mixture(str(corpus))
    want = batches(config, build_catalog(config.data), 150)
    with serve(corpus, fail_every=20, seconds=0.001) as server:
        config = mixture(server.url)
        catalog = build_catalog(config.data)
        assert_same(batches(config, catalog, 100), want[:100])
        catalog.save(tmp_path / "catalog.json")
        asked = len(server.asked)
        again = reopen_catalog(Catalog.load(tmp_path / "catalog.json"), config.data)
        assert again.fingerprint == catalog.fingerprint
        # Nothing is cut again, so nothing is read but magic bytes.
        assert {wanted for *_, wanted in server.asked[asked:]} == {None, "bytes=0-5"}
        assert_same(batches(config, again, 50, want[99][1]), want[100:])
        assert server.failed == len(server.asked) // 20 > 20


@pytest.mark.parametrize("way", ["status", "silence"])
def test_the_last_error_is_one_line_with_file_attempts_and_cause(corpus, way):
    data = lambda url: data_config(f"{url}/jsonl/a.jsonl", data={"retries": 2, **FAST})  # noqa: E731
    with serve(corpus) as server:
        order = EpochOrder(build_catalog(data(server.url)).sources["s"], 0, 2000)
        assert next(windows(order, 0, 0)).documents
        server.fail_every, server.ways = 1, (way,)
        message = message_of(lambda: next(windows(order, 0, 0)))
        assert f"{server.url}/jsonl/a.jsonl: cannot be read, 3 attempts (" in message
        message = message_of(build_catalog, data(server.url))
        assert f"{server.url}/jsonl/a.jsonl: cannot be read, 3 attempts (" in message


def test_waits_double_and_end(monkeypatch):
    waits = []
    monkeypatch.setattr(files.time, "sleep", waits.append)

    def fail():
        raise TimeoutError("too\nslow?token=secret")

    message = message_of(files.attempt, "s3://b/k", Retry(4, 0.5), fail)
    assert waits == [0.5, 1, 2, 4]
    assert message.startswith("s3://b/k: cannot be read, 5 attempts (too slow?...)") and "secret" not in message


def test_a_read_that_comes_short_is_read_again(corpus, monkeypatch):
    whole, calls = files._Local.read, []

    def halves(self, size=-1):
        calls.append(size)
        return whole(self, size // 2 if len(calls) % 3 else size)

    path = corpus / "jsonl" / "a.jsonl"
    want = epoch_documents(epoch_order_of(path))
    monkeypatch.setattr(files._Local, "read", halves)
    assert epoch_documents(epoch_order_of(path)) == want
    monkeypatch.setattr(files._Local, "read", lambda self, size=-1: whole(self, size - 1))
    message = message_of(epoch_order_of, path)
    assert f"{path}: cannot be read, 6 attempts (" in message and "bytes came of" in message


def test_what_cannot_pass_is_not_tried_again(corpus):
    with serve(corpus) as server:
        assert "matches no file" in message_of(build_catalog, data_config(f"{server.url}/nothing.jsonl"))
        assert "matches no file" in message_of(build_catalog, data_config(f"{server.url}/no/*.jsonl"))
        assert len(server.asked) < 6
        assert "is not there" in message_of(open_binary, f"{server.url}/nothing.jsonl", Retry())


def test_a_server_without_ranges_is_refused(corpus):
    with serve(corpus, ranges=False) as server:
        message = message_of(lambda: epoch_documents(epoch_order_of(f"{server.url}/jsonl/a.jsonl")))
        assert "does not give ranges" in message


def epoch_order_of(path, block_bytes=2000, **settings):
    data = data_config(path, block_bytes=block_bytes, data=FAST, **settings)
    return EpochOrder(build_catalog(data).sources["s"], data.seed, data.block_bytes)


@pytest.mark.parametrize("etags", [True, False])
def test_a_changed_remote_file_is_refused(tmp_path, etags):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "one"}))
    with serve(tmp_path) as server:
        server.etags = etags
        data = data_config(f"{server.url}/a.jsonl", data=FAST)
        stored = build_catalog(data)
        reopen_catalog(stored, data)
        (tmp_path / "a.jsonl").write_text(json.dumps({"text": "two"}))
        assert f"{server.url}/a.jsonl is changed since" in message_of(reopen_catalog, stored, data)


@pytest.mark.slow
def test_a_block_of_a_large_remote_file_costs_its_own_bytes(tmp_path):
    stock = ["".join(np.random.default_rng(i).choice(list("abcdefgh 日本"), 500)) for i in range(100)]
    texts = [f"{i} {stock[i % 100]}{stock[i // 100]}" for i in range(10_000)]
    for layout, rows in (("jsonl", 1), ("parquet", 10**6), ("arrow", 50), ("arrow-file", 50)):
        path = write(tmp_path / layout, layout, texts, rows=rows)
        with serve(tmp_path) as server:
            order = epoch_order_of(f"{server.url}/{path.name}", block_bytes=100_000)
            assert server.sent < 3_000_000, f"{layout}: cutting read {server.sent} bytes"
            server.sent, before = 0, pa.total_allocated_bytes()
            tracemalloc.start()
            reader = windows(order, 0, 0)
            window = next(reader)
            peak = tracemalloc.get_traced_memory()[1] + pa.total_allocated_bytes() - before
            tracemalloc.stop()
            reader.close()
            assert 0 < len(window.documents) < 400
            assert peak < 6_000_000, f"{layout}: a block took {peak} bytes"
            assert server.sent < 4_500_000, f"{layout}: a block read {server.sent} bytes"


@pytest.fixture
def memory():
    filesystem = fsspec.filesystem("memory")
    yield filesystem
    filesystem.rm("/", recursive=True)


def put(filesystem, path: str, text: str = "one"):
    with filesystem.open(path, "wb") as file:
        file.write(json.dumps({"text": text}).encode())


def names(path) -> list[str]:
    return [f.name for f in build_catalog(data_config(path)).sources["s"].files]


def test_patterns_mean_the_same_everywhere(memory, tmp_path):
    there = ("a.jsonl", "b.jsonl", "x/a.jsonl", "x/y/c.jsonl", ".hidden/d.jsonl", "x/.e.jsonl", "x/dataset_info.json")
    for path in there:
        put(memory, f"/{path}")
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text('{"text": "one"}')
    for pattern, wanted in {
        "*.jsonl": ["a.jsonl", "b.jsonl"],
        "[a]*.jsonl": ["a.jsonl"],
        "*/a.jsonl": ["x/a.jsonl"],
        "x": ["x/a.jsonl", "x/y/c.jsonl"],
        "x/": ["x/a.jsonl", "x/y/c.jsonl"],
        "**/*.jsonl": ["a.jsonl", "b.jsonl", "x/a.jsonl", "x/y/c.jsonl"],
        "x/**/c.jsonl": ["x/y/c.jsonl"],
        "{language}/y": ["x/y/c.jsonl"],
    }.items():
        assert names(f"memory:///{pattern}") == [f"memory:///{w}" for w in wanted], pattern
        assert names(f"{tmp_path}/{pattern}") == [f"{tmp_path}/{w}" for w in wanted], pattern
    (source,) = build_catalog(data_config("memory:///{language}/a.jsonl")).sources.values()
    assert source.languages == ("x",)


def test_a_folder_of_two_formats_is_refused(memory):
    put(memory, "/f/a.jsonl")
    put(memory, "/f/README.txt")
    assert "memory:///f holds jsonl and text files" in message_of(build_catalog, data_config("memory:///f"))


def test_a_package_that_is_missing_is_named(monkeypatch):
    def missing(name):
        raise ImportError("Install it")

    monkeypatch.setattr(files.fsspec.core, "url_to_fs", missing)
    for scheme, extra in (("gs", "gcs"), ("s3", "s3"), ("https", "http"), ("hf", "hf")):
        message = message_of(build_catalog, data_config(f"{scheme}://bucket/a.jsonl"))
        assert f"pip install 'easylm-mling[{extra}]'" in message


def test_an_unknown_scheme_and_secrets_in_names_are_refused():
    assert "nosuch" in message_of(build_catalog, data_config("nosuch://bucket/a.jsonl"))
    for path in ("https://user:secret@host/a.jsonl", "https://host/a.jsonl?sig=secret", "s3://key:secret@bucket/a"):
        message = message_of(build_catalog, data_config(path))
        assert "environment" in message and "secret" not in message


def test_a_data_set_is_resolved_to_its_files(tmp_path):
    write(tmp_path / "hub" / "data" / "train-0", "parquet", documents(20, prefix="a"))
    write(tmp_path / "hub" / "data" / "train-1", "parquet", documents(20, prefix="b"))
    write(tmp_path / "hub" / "data" / "test-0", "parquet", documents(20, prefix="c"))
    (tmp_path / "hub" / "README.md").write_text(
        "---\nconfigs:\n- config_name: small\n  data_files:\n  - {split: train, path: data/train-1.parquet}\n"
        "- config_name: all\n  data_files:\n  - {split: train, path: 'data/train-*'}\n  - {split: test, path: 'data/test-*'}\n---\n"
    )

    def data(config, split="train"):
        dataset = HubDataset(str(tmp_path / "hub"), config, split)
        return data_config({"s": SourceConfig((), 1.0, dataset=dataset)})

    files_of = {config: build_catalog(data(config)).sources["s"].files for config in ("small", "all")}
    assert [f.name.split("/")[-1] for f in files_of["all"]] == ["train-0.parquet", "train-1.parquet"]
    assert [f.name.split("/")[-1] for f in files_of["small"]] == ["train-1.parquet"]
    assert "its splits are: train, test" in message_of(build_catalog, data("all", "dev"))
    assert "small" in message_of(build_catalog, data("none"))
    stored = build_catalog(data("all"))
    # A data set that grew is, to a run that began before, the one it began with.
    write(tmp_path / "hub" / "data" / "train-2", "parquet", documents(5))
    assert reopen_catalog(stored, data("all")).fingerprint == stored.fingerprint
    assert "data.sources.s.dataset was" in message_of(reopen_catalog, stored, data("small"))
    (tmp_path / "hub" / "data" / "train-0.parquet").unlink()
    assert "train-0.parquet: is not there" in message_of(reopen_catalog, stored, data("all"))


def test_a_source_has_paths_or_a_data_set():
    both = dataclasses.replace(SourceConfig(("a",), 1.0), dataset=HubDataset("b"))
    assert "keep one of them" in message_of(both.validate, "s")
    assert "paths is empty" in message_of(SourceConfig((), 1.0).validate, "s")
