"""An epoch is an epoch: whatever the number of documents and lanes, each document is read once before any is again."""

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from data_corpus import data_config, documents, epoch_order, run_config, tokenizer, tokenizer_path, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from easylm_mling.config import SourceConfig
from easylm_mling.data.catalog import build_catalog
from easylm_mling.data.estimates import catalog_rates, estimate
from easylm_mling.data.loader import Loader
from easylm_mling.data.mixture import COUNTERS, DOCUMENTS, EPOCH, EXTRA, PADDING, TOKENS, initial_state
from easylm_mling.data.pool import Pool
from easylm_mling.data.shuffle import EpochOrder, _even_blocks
from easylm_mling.data.tools.forecast import forecast
from easylm_mling.data.weights import language_tokens, make_plan

T = 16


def corpus(folder: Path, name: str, count: int, languages: int) -> str:
    """Write `count` different documents, the languages' parts of them as equal as can be; returns the source's path."""
    for i in range(languages):
        texts = [f"{name}{n}" + " tree" * (n * 7 % 5) for n in range(i, count, languages)]
        if texts:
            write(folder / name / f"l{i}" / "data", "jsonl", texts)
    return str(folder / name / ("{language}" if languages > 1 else "*") / "data.jsonl")


SOURCE = st.tuples(
    st.one_of(st.integers(1, 30), st.integers(30, 1000), st.integers(1000, 10_000)),
    st.integers(0, 2),
    st.integers(1, 3),
    st.integers(1, 9),
)


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(SOURCE, min_size=1, max_size=5), st.integers(1, 64), st.integers(1, 150))
def test_in_any_prefix_no_document_is_two_reads_ahead_of_another(tmp_path_factory, sources, lanes, steps):
    folder, read = tmp_path_factory.mktemp("epochs"), {f"s{i}": [] for i in range(len(sources))}
    made = {}
    for i, (count, cap, languages, weight) in enumerate(sources):
        rule = {"max_epochs": cap, "when_used_up": "redistribute"} if cap else {}
        paths = (corpus(folder, f"s{i}", count, languages),)
        made[f"s{i}"] = SourceConfig(paths, float(weight), holdout_fraction=0.0, **rule)
    data = data_config(made, length=T, tokenizer=tokenizer_path(), block_bytes=4_000_000, data={"lanes": lanes})
    config = run_config(data, lanes)
    take = Pool.take

    def noting(pool, lane, count):
        pieces = take(pool, lane, count)
        read[pool._order.source.name] += [p.document for p in pieces if p.first == 0]
        return pieces

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pool, "take", noting)
        with Loader(config.mixer, build_catalog(data), tokenizer()) as loader:
            batches = list(itertools.islice(loader, steps))
    begun = np.sum([s.lanes[..., DOCUMENTS].sum(axis=0) for _, s in batches[-1:]], axis=0)
    for i, (count, cap, _, _) in enumerate(sources):
        in_order = read[f"s{i}"]
        assert not batches or len(in_order) >= begun[i] > 0
        # Each epoch's documents, one after the other.
        epochs = [in_order[n : n + count] for n in range(0, len(in_order), count)]
        assert all(sorted(e) == list(range(count)) for e in epochs[:-1])
        assert all(len(set(e)) == len(e) for e in epochs)
        assert not cap or len(in_order) <= cap * count


@pytest.mark.parametrize("documents_there, lanes", [(1, 8), (7, 16), (300, 4), (480, 16)])
def test_a_cap_is_exact_whatever_the_number_of_lanes(tmp_path, documents_there, lanes):
    texts = documents(documents_there)
    order = epoch_order(data_config(write(tmp_path / "a", "jsonl", texts), max_epochs=2, when_used_up="redistribute"))
    pool = Pool(order, tokenizer(), initial_state(lanes, 1, range(lanes)).lanes[:, 0], range(lanes))
    counts = Counter()
    while pieces := [p for lane in range(lanes) for p in pool.take(lane, T)]:
        counts.update(p.document for p in pieces if p.first == 0)
    assert set(counts) == set(range(documents_there)) and set(counts.values()) == {2}
    state = np.zeros((lanes, len(COUNTERS)), np.int64)
    pool.write_to(state)
    assert state[:, DOCUMENTS].sum() == 2 * documents_there and (state[:, EPOCH] == 2).all()
    assert state[:, TOKENS].sum() == 2 * sum(len(ids) + 2 for ids in tokenizer().encode(texts))
    assert (state[:, [TOKENS, PADDING]].sum(axis=1) % T == 0).all()
    pool.close()


def test_a_capped_source_keeps_its_share_until_it_ends_and_the_forecast_knows_when(tmp_path):
    sources = {
        "a": SourceConfig((str(write(tmp_path / "a", "jsonl", documents(200))),), 1.0, holdout_fraction=0.0, max_epochs=1,
                          when_used_up="redistribute"),
        "b": SourceConfig((str(write(tmp_path / "b", "jsonl", documents(400, 1))),), 1.0, holdout_fraction=0.0),
    }  # fmt: skip
    data = data_config(sources, length=T, tokenizer=tokenizer_path(), block_bytes=4_000_000, data={"lanes": 16})
    config, catalog = run_config(data, 16), build_catalog(data)
    with Loader(config.mixer, catalog, tokenizer()) as loader:
        drawn = list(itertools.islice(loader, 100))
    rows = [int((b["source"] == 0).sum()) for b, _ in drawn]
    rates = catalog_rates(estimate(catalog, tokenizer()))
    sizes = {n: language_tokens(s, rates[n]) for n, s in catalog.sources.items()}
    expected = forecast(config.mixer, catalog, make_plan(config.mixer, catalog, rates), sizes)
    ends = round(expected.sources["a"].used_up_at / (16 * T))
    assert 20 < ends < 90
    assert all(n == 8 for n in rows[: ends - 4]) and not any(rows[ends + 6 :])
    assert drawn[-1][1].lanes[:, 1, EXTRA].sum() > 0


def test_blocks_of_a_large_source_are_dealt_evenly_in_every_epoch(tmp_path):
    """Each lane has as many blocks of an epoch as the others, of about as many bytes."""
    path = write(tmp_path / "a", "jsonl", documents(2000))
    source = build_catalog(data_config(path, block_bytes=4000)).sources["s"]
    for lanes in (1, 3, 16, 30):
        order = EpochOrder(source, 0, 4000, lanes=lanes)
        for epoch in range(3):
            blocks = order.blocks(epoch)
            assert blocks % lanes == 0
            units = [order.units(epoch, b) for b in range(blocks)]
            assert sorted(np.concatenate(units).tolist()) == list(range(len(source.units)))
            assert all(map(len, units))
            sizes = np.array([source.units[u, 3].sum() for u in units]).reshape(-1, lanes).sum(axis=0)
            assert np.ptp(sizes) <= 0.35 * sizes.mean()


def test_no_block_is_empty_however_uneven_the_units():
    rng = np.random.default_rng(0)
    for _ in range(500):
        lanes = int(rng.integers(1, 65))
        sizes = rng.integers(1, 1000, int(rng.integers(lanes, lanes * 20)))
        sizes[rng.integers(len(sizes))] = rng.choice([1, 10**6])
        blocks = _even_blocks(sizes, lanes, int(rng.integers(100, 100_000)))
        assert blocks[0] == 0 and set(np.diff(blocks).tolist()) <= {0, 1} and (blocks[-1] + 1) % lanes == 0
