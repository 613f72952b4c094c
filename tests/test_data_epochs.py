"""An epoch is an epoch: whatever the number of documents and lanes, each document is read once before any is again."""

import contextlib
import itertools
import json
import lzma
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from data_corpus import assert_same, data_config, documents, epoch_order, run_config, tokenizer, tokenizer_path, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from easylm_mling.config import SourceConfig
from easylm_mling.data import pool as pool_module
from easylm_mling.data.catalog import Catalog, build_catalog, reopen_catalog
from easylm_mling.data.estimates import catalog_rates, estimate
from easylm_mling.data.loader import Loader
from easylm_mling.data.mixture import COUNTERS, DOCUMENTS, EPOCH, EXTRA, PADDING, TOKENS, initial_state
from easylm_mling.data.pool import Pool
from easylm_mling.data.shuffle import EpochOrder, _even_blocks
from easylm_mling.data.streams import LaneStream, SpillFile, StreamState
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
        # A batch holds each source within a row of its share, so one whose share is less than a row may not have come.
        rows = len(batches) * lanes * weight / sum(w for *_, w in sources)
        assert len(in_order) >= (begun[i] if batches else 0) and (rows < 2 or begun[i] > 0)
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
        assert order.shares_units == (lanes > 3)
        for epoch in range(3):
            blocks = order.blocks(epoch)
            assert blocks % lanes == 0
            parts = [order.parts(epoch, b) for b in range(blocks)]
            # The parts of each unit make it up.
            for unit in range(len(source.units)):
                ranges = sorted((p.low, p.high) for of in parts for p in of if p.unit == unit)
                assert ranges[0][0] == 0 and ranges[-1][1] == 1 << 64
                assert all(a[1] == b[0] for a, b in itertools.pairwise(ranges))
            assert all(map(len, parts))
            sizes = [sum(source.units[p.unit, 3] * ((p.high - p.low) / 2**64) for p in of) for of in parts]
            of_lanes = np.array(sizes).reshape(-1, lanes).sum(axis=0)
            assert np.ptp(of_lanes) <= (1e-3 if order.shares_units else 0.1) * of_lanes.mean()


def read_of_lanes(batches, lanes: int) -> list[list[str]]:
    """The documents that each lane has read to their ends, in order, of the batches of one source."""
    read = []
    for lane in range(lanes):
        rows = [(b["tokens"][lane], b["segment_ids"][lane]) for b, _ in batches]
        stream = np.concatenate([tokens[segments > 0] for tokens, segments in rows] or [np.zeros(0, np.int32)])
        begins, ends = (np.flatnonzero(stream == x) for x in (2, 1))
        read.append([tokenizer().decode(stream[a + 1 : b]) for a, b in zip(begins, ends, strict=False)])
    return read


LARGE = st.tuples(
    st.sampled_from(["jsonl", "jsonl.gz", "jsonl.zst", "parquet", "arrow", "txt.xz"]),
    st.integers(1, 3),  # files
    st.integers(1, 64),  # lanes
    st.integers(8, 60),  # documents a lane
    st.integers(1, 3),  # epochs
    st.sampled_from([1, 3]),  # languages
)


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(LARGE, st.integers(0, 99))
def test_a_large_source_of_few_units_is_read_by_epochs_too(tmp_path_factory, case, stop):
    """With the threshold of a large source at none: one packed file, say, for 64 lanes."""
    (layout, files, lanes, per_lane, cap, languages), folder = case, tmp_path_factory.mktemp("large")
    texts = [f"d{n} tree light river" + " stone" * (n % 3) for n in range(lanes * per_lane)]
    for i in range(files * languages):
        some = texts[i :: files * languages]
        path = folder / f"l{i % languages}" / f"{i}"
        if layout == "txt.xz":
            path.parent.mkdir(exist_ok=True)
            path.with_suffix(".txt.xz").write_bytes(lzma.compress("\n".join(some).encode()))
        else:
            write(path, layout, some, rows=50)
    paths = str(folder / ("{language}" if languages > 1 else "*") / "*")
    data = data_config(paths, length=T, tokenizer=tokenizer_path(), data={"lanes": lanes}, max_epochs=cap,
                       when_used_up="redistribute")  # fmt: skip
    config, catalog = run_config(data, lanes), build_catalog(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool_module, "POOLED_BYTES", 0)
        with Loader(config.mixer, catalog, tokenizer()) as loader:
            batches = list(loader)
        stop = len(batches) * stop // 100
        state = batches[stop - 1][1] if stop else None
        with Loader(config.mixer, catalog, tokenizer(), state) as loader:
            assert_same(list(loader), batches[stop:])
    # The run ends with the lane that has least: until then no lane is a whole epoch ahead of another.
    epochs = np.array([s.lanes[:, 0, EPOCH] for _, s in batches])
    assert (np.ptp(epochs, axis=1) <= 1).all()
    counts = Counter(itertools.chain(*read_of_lanes(batches, lanes)))
    assert set(counts) <= set(texts) and max(counts.values(), default=0) <= cap
    # Every lane's streams together, to their ends: exactly the cap.
    order, length = loader.orders[0], 10 * T
    with contextlib.closing(SpillFile()) as spill:
        begun = initial_state(lanes, 1, range(lanes)).lanes[:, 0]
        streams = [
            LaneStream(order, tokenizer(), lane, lanes, StreamState.from_counters(begun[lane]), spill)
            for lane in range(lanes)
        ]
        whole: Counter[str] = Counter()
        for stream in streams:
            pieces = []
            while (row := stream.take(length)) is None or len(row):
                pieces += [] if row is None else [row[:length]]
            ids = np.concatenate([np.zeros(0, np.int32), *pieces])
            begins, ends = np.flatnonzero(ids == 2), np.flatnonzero(ids == 1)
            whole.update(tokenizer().decode(ids[a + 1 : b]) for a, b in zip(begins, ends, strict=True))
    assert set(whole) == set(texts) and set(whole.values()) == {cap}
    TRIED.append((lanes, len(texts), len(catalog.sources["s"].units), cap))


TRIED = []


@pytest.fixture(scope="module", autouse=True)
def counts_of_the_property():
    """Print what the property of large sources was tried on (pytest -s)."""
    yield
    if TRIED:
        lanes, texts, units, caps = map(list, zip(*TRIED, strict=True))
        print(f"\n{len(TRIED)} large sources: {min(lanes)} to {max(lanes)} lanes, {min(texts)} to {max(texts)} documents in "
              f"{min(units)} to {max(units)} units, {sum(u < n for u, n in zip(units, lanes, strict=True))} with fewer units "
              f"than lanes; {sum(n * c for n, c in zip(texts, caps, strict=True)):,} documents read")  # fmt: skip


def test_a_run_that_began_with_whole_units_keeps_to_them(tmp_path):
    """Its cursors count in blocks of whole units: the catalog's format says so, also when it is saved again."""
    data = data_config(write(tmp_path / "a", "jsonl.gz", documents(50)))
    catalog, file = build_catalog(data), tmp_path / "catalog.json"
    catalog.save(file)
    tree = json.loads(file.read_text())
    assert EpochOrder(reopen_catalog(Catalog.load(file), data).sources["s"], 0, 2000, lanes=4).shares_units
    file.write_text(json.dumps(tree | {"format": 2}))
    for _ in range(2):
        old = reopen_catalog(Catalog.load(file), data)
        assert old.fingerprint == catalog.fingerprint
        assert not EpochOrder(old.sources["s"], 0, 2000, lanes=4).shares_units
        old.save(file)


def test_no_block_is_empty_however_uneven_the_units():
    rng = np.random.default_rng(0)
    for _ in range(500):
        lanes = int(rng.integers(1, 65))
        sizes = rng.integers(1, 1000, int(rng.integers(lanes, lanes * 20)))
        sizes[rng.integers(len(sizes))] = rng.choice([1, 10**6])
        blocks = _even_blocks(sizes, lanes, int(rng.integers(100, 100_000)))
        assert blocks[0] == 0 and set(np.diff(blocks).tolist()) <= {0, 1} and (blocks[-1] + 1) % lanes == 0
