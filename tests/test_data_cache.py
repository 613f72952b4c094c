"""The token cache gives the bits that tokenising gives, whatever of it is there, cut short or damaged."""

import dataclasses
import io

import numpy as np
import pytest
from data_corpus import data_config, documents, epoch_order, run_config, tokenizer, tokenizer_path, write
from rich.console import Console

from easylm_mling.config import SourceConfig
from easylm_mling.data import pool, token_cache
from easylm_mling.data.catalog import build_catalog
from easylm_mling.data.loader import Loader, open_orders
from easylm_mling.data.token_cache import TokenCache
from easylm_mling.data.tokenization import tokenizer as tokenizer_module
from easylm_mling.data.tools.pretokenize import blocks, tokenize
from easylm_mling.data.weights import make_plan
from easylm_mling.errors import ConfigError


@pytest.fixture(autouse=True)
def nothing_pooled(monkeypatch):
    """As with large sources: only their windows are cached."""
    monkeypatch.setattr(pool, "POOLED_BYTES", 0)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    root = tmp_path_factory.mktemp("cached")
    good = documents(300)
    sources = {
        "table": SourceConfig((str(write(root / "a", "parquet", [*good[:150], None, *good[150:]])),), 2.0),
        # Cannot be cut, so its one block has several windows.
        "packed": SourceConfig((str(write(root / "b", "jsonl.gz", documents(200, seed=1))),), 1.0),
    }
    data = data_config(sources, tokenizer=tokenizer_path(), data={"token_cache": str(root / "cache"), "lanes": 4})
    return run_config(data, 4)


def drawn(config, cached: bool):
    token_cache = config.data.token_cache if cached else None
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, token_cache=token_cache))
    with Loader(config.mixer, build_catalog(config.data), tokenizer()) as loader:
        return [next(loader) for _ in range(120)]


def assert_same(a, b):
    for (batch_a, state_a), (batch_b, state_b) in zip(a, b, strict=True):
        for key in batch_a:
            np.testing.assert_array_equal(batch_a[key], batch_b[key])
        for x, y in zip(state_a, state_b, strict=True):
            np.testing.assert_array_equal(x, y)


def filled(config):
    catalog = build_catalog(config.data)
    plan = make_plan(config.mixer, catalog, None)
    cache = TokenCache(config.data.token_cache, tokenizer())
    orders = open_orders(config.mixer, catalog, plan)
    return sum(cache.fill(orders[s], e, b) for s, e, b in blocks(config.mixer, catalog, plan, 2))


def files(config):
    from pathlib import Path

    return sorted(Path(config.data.token_cache).rglob("*.safetensors"))


def test_cached_batches_are_the_tokenised_ones_whatever_is_missing_or_damaged(config, monkeypatch):
    plain = drawn(config, cached=False)
    assert_same(drawn(config, cached=True), plain)
    assert filled(config) > 0 and filled(config) == 0
    whole = {path: path.read_bytes() for path in files(config)}
    assert any(".1.safetensors" in path.name for path in whole), "no block of several windows"

    calls = []
    encode = tokenizer_module.Tokenizer.encode
    monkeypatch.setattr(
        tokenizer_module.Tokenizer, "encode", lambda self, texts: calls.append(1) or encode(self, texts)
    )
    first = drawn(config, cached=True)
    from_cache = len(calls)
    assert_same(first, plain)
    calls.clear()
    drawn(config, cached=False)
    assert from_cache < len(calls) / 5, "the cache was hardly used"

    for i, (path, content) in enumerate(whole.items()):
        if i % 3 == 0:
            path.unlink()
        elif i % 3 == 1:
            path.write_bytes(content[: len(content) // 2])
        else:
            at = len(content) - 5
            path.write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
    assert_same(drawn(config, cached=True), plain)
    assert filled(config) > 0
    assert {path: path.read_bytes() for path in files(config)} == whole


def test_another_tokenizer_order_or_corpus_finds_nothing(config):
    filled(config)
    there = len(files(config))
    other = dataclasses.replace(config, data=dataclasses.replace(config.data, seed=5))
    assert filled(other) > 0 and len(files(config)) > there


def test_a_cache_of_another_format_is_refused_by_name(config, monkeypatch):
    filled(config)
    monkeypatch.setattr(token_cache, "_FORMAT", 2)
    with pytest.raises(
        ConfigError,
        match=r"safetensors: this token cache has format 1, .* knows format 2; .* remove the folder .*cache",
    ):
        drawn(config, cached=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own, in its threads
def test_ray_fills_what_the_trainer_finds(config, tmp_path):
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, token_cache=str(tmp_path / "by ray")))
    catalog, console = build_catalog(config.data), Console(file=io.StringIO())
    pytest.importorskip("ray", reason="needs the extra [ray]")
    assert tokenize(config.mixer, catalog, 1, None, console) > 0
    assert tokenize(config.mixer, catalog, 1, None, console) == 0
    assert_same(drawn(config, cached=True), drawn(config, cached=False))


def test_mistakes_are_named(config):
    nowhere = dataclasses.replace(config, data=dataclasses.replace(config.data, token_cache=None))
    with pytest.raises(ConfigError, match="data.token_cache is not set"):
        tokenize(nowhere.mixer, build_catalog(config.data), 1, None, Console(file=io.StringIO()))


def test_a_block_without_a_document_to_train_on_is_filled_and_read(tmp_path):
    """All of its documents are held out, or bad."""
    (tmp_path / "a.jsonl").write_text("no json\n" * 9)
    path = write(tmp_path / "b", "jsonl", documents(9))
    for source in (tmp_path / "a.jsonl", path):
        order = epoch_order(data_config(source, holdout_fraction=1 - 1e-9))
        cache = TokenCache(tmp_path / "cache", tokenizer())
        for block in range(order.blocks(0)):
            assert cache.fill(order, 0, block) == 0 == cache.fill(order, 0, block)
            stored = cache.load(order, 0, block, 0)
            assert stored and not len(stored.ends) and stored.window.last
            assert len(stored.window.bad) + stored.window.good == 9
