"""The promises of the mixer over random mixtures, host counts and stops, and over 500 languages."""

import dataclasses
from collections import Counter

import numpy as np
import pytest
from data_corpus import assert_same, data_config, documents, run_config, tokenizer, tokenizer_path, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from easylm_mling.config import SourceConfig, StageConfig
from easylm_mling.data import pool
from easylm_mling.data.catalog import Catalog, File, Source, build_catalog
from easylm_mling.data.estimates import catalog_rates, estimate
from easylm_mling.data.loader import Loader
from easylm_mling.data.mixture import BAD, DOCUMENTS, EXTRA, PADDING, ROWS, TOKENS, initial_state, whole_state
from easylm_mling.data.shuffle import EpochOrder
from easylm_mling.data.state_archive import KeptState, keep_state, load_state
from easylm_mling.data.weights import ONE, language_rates, make_plan
from easylm_mling.errors import ConfigError

T = 32
POOL = {
    "web": ("jsonl", 120),
    "books": ("parquet", 30),
    "gz": ("jsonl.gz", 60),
    "tiny": ("jsonl", 3),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("pool")
    for name, (layout, count) in POOL.items():
        write(root / name, layout, documents(count, prefix=name))
    for language, count in (("xx", 40), ("yy", 7), ("zz", 1)):
        texts = documents(count, prefix=language)
        write(root / "many" / language / "data", "arrow", [*texts[:3], None, *texts[3:], None], rows=3)
    return root


def rule(draw):
    if draw(st.booleans()):
        return {}
    return {"max_epochs": draw(st.integers(1, 3)), "when_used_up": "redistribute"}


@st.composite
def mixtures(draw):
    """(settings by source, lanes, rows a lane and batch, stages) of up to four sources, one of several languages."""
    names = draw(st.lists(st.sampled_from([*POOL, "many"]), min_size=1, max_size=4, unique=True))
    sources = {
        n: {"weight": draw(st.integers(1, 9)), "holdout_fraction": draw(st.sampled_from([0.0, 0.2])), **rule(draw)}
        for n in names
    }
    for name in set(names) & {"many"}:
        sources[name]["language_temperature"] = draw(st.sampled_from([1.0, 0.5, 0.0]))
    stages = ()
    if draw(st.booleans()):
        stages = (StageConfig(draw(st.integers(0, 3000)), {n: draw(st.integers(1, 5)) for n in names}),)
    return sources, draw(st.sampled_from([1, 2, 4, 8])), draw(st.sampled_from([1, 2])), stages


def build(root, sources, lanes, per_lane, stages=()):
    made = {
        name: SourceConfig((str(root / (f"{name}.*" if name in POOL else "many/{language}/data.arrow")),), **settings)
        for name, settings in sources.items()
    }
    data = data_config(made, length=T, tokenizer=tokenizer_path(), data={"lanes": lanes, "stages": stages})
    config = run_config(data, lanes * per_lane)
    return config, build_catalog(config.data)


def draw_batches(config, catalog, steps, hosts=1, state=None):
    """At most `steps` (whole batch, whole state), ending where the first of the hosts ends."""
    each = config.lanes // hosts
    loaders = [Loader(config.mixer, catalog, tokenizer(), state, range(h * each, (h + 1) * each)) for h in range(hosts)]
    made = []
    for _ in range(steps):
        got = [next(loader, None) for loader in loaders]
        if any(item is None for item in got):
            break
        batches, states = zip(*got, strict=True)
        made.append(({k: np.concatenate([b[k] for b in batches]) for k in batches[0]}, whole_state(list(states))))
    for loader in loaders:
        loader.close()
    return made


def read_documents(batches, source, lanes) -> list[str]:
    """The documents of a source in the batches that are whole there: its rows of each lane, end to end."""
    documents_read = []
    for lane in range(lanes):
        tokens = [np.zeros(0, np.int32)]
        for batch, _ in batches:
            rows = np.arange(len(batch["source"])) * lanes // len(batch["source"]) == lane
            rows &= batch["source"] == source
            tokens.append(batch["tokens"][rows][batch["segment_ids"][rows] > 0])
        stream = np.concatenate(tokens)
        begins, ends = (np.flatnonzero(stream == x) for x in (2, 1))
        # BOS and EOS take turns: exactly one of each a document.
        assert (begins[1:] == ends[: len(begins) - 1] + 1).all() and 0 <= len(begins) - len(ends) <= 1
        documents_read += [tokenizer().decode(stream[a + 1 : b]) for a, b in zip(begins, ends, strict=False)]
    return documents_read


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(mixtures(), st.data())
def test_any_mixture_is_the_same_on_any_hosts_across_any_stops_and_loses_nothing(root, mixture, data):
    # All sources pooled, none, or the small ones.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool, "POOLED_BYTES", data.draw(st.sampled_from([0, 4000, 10**6]), label="pooled"))
        check_mixture(root, mixture, data)


def check_mixture(root, mixture, data):
    sources, lanes, per_lane, stages = mixture
    config, catalog = build(root, sources, lanes, per_lane, stages)
    whole = draw_batches(config, catalog, 40)
    # Two stops, three numbers of hosts.
    first, second = sorted(data.draw(st.lists(st.integers(0, len(whole)), min_size=2, max_size=2), label="stops"))
    counts = data.draw(st.lists(st.sampled_from([h for h in (1, 2, 4, 8) if lanes % h == 0]), min_size=3, max_size=3))
    pieces, state = [], None
    for steps, hosts in zip((first, second - first, 40 - second), counts, strict=True):
        pieces += draw_batches(config, catalog, steps, hosts, state)
        state = pieces[-1][1] if pieces else None
    assert_same(pieces, whole)

    plan = make_plan(config.mixer, catalog, catalog_rates(estimate(catalog, tokenizer())))
    for i, (name, source) in enumerate(catalog.sources.items()):
        check_documents(read_documents(whole, i, lanes), name, source, sources[name])
    if not whole:
        return
    final = whole[-1][1]
    assert final.lanes[..., ROWS].sum() == len(whole) * lanes * per_lane
    assert final.lanes[..., [TOKENS, PADDING]].sum() == len(whole) * lanes * per_lane * T
    assert final.languages[:, 0].sum() == final.lanes[..., TOKENS].sum()
    assert final.languages[:, 2].sum() == final.lanes[..., BAD].sum()
    assert final.languages[:, 1].sum() == final.lanes[..., DOCUMENTS].sum()
    if not final.lanes[..., EXTRA].any() and not any(s.get("max_epochs") for s in sources.values()):
        taken = np.array([np.bincount(b["source"], minlength=len(sources)) for b, _ in whole]).cumsum(axis=0)
        target = np.array([plan.target(per_lane * (n + 1)) for n in range(len(whole))]) / ONE * lanes
        assert np.abs(taken - target).max() < 2


def check_documents(read, name, source, its):
    """Only documents that are there; none twice in the same epoch; none more often than the cap."""
    languages = {"xx": 40, "yy": 7, "zz": 1} if name == "many" else {name: POOL[name][1]}
    there = {text for language, count in languages.items() for text in documents(count, prefix=language)}
    times = Counter(read)
    assert set(times) <= there
    if its.get("max_epochs"):
        assert max(times.values(), default=0) <= its["max_epochs"]


@pytest.mark.parametrize("hosts", [2, 4, 16, 32])
def test_one_to_thirty_two_hosts_draw_the_same_batches(root, hosts):
    config, catalog = build(root, {"web": {"weight": 2}, "gz": {"weight": 1}, "many": {"weight": 1}}, 32, 1)
    whole = draw_batches(config, catalog, 12)
    assert_same(draw_batches(config, catalog, 12, hosts), whole)


def test_a_run_that_changes_its_hosts_twice_equals_one_that_never_did(root):
    config, catalog = build(root, {"web": {"weight": 2}, "gz": {"weight": 1}}, 32, 1)
    whole = draw_batches(config, catalog, 15)
    pieces = draw_batches(config, catalog, 5, 32)
    pieces += draw_batches(config, catalog, 4, 2, pieces[-1][1])
    pieces += draw_batches(config, catalog, 6, 16, pieces[-1][1])
    assert_same(pieces, whole)


def rows_by_stream(batches, sources, lanes):
    """The rows of each lane and source, in the order of the batches."""
    rows = {(lane, source): [] for lane in range(lanes) for source in range(sources)}
    for batch, _ in batches:
        for r, source in enumerate(batch["source"].tolist()):
            rows[r * lanes // len(batch["source"]), source].append(batch["tokens"][r].tolist())
    return rows


def test_a_batch_size_that_changes_loses_and_repeats_no_row_of_any_lane_and_source(root, monkeypatch):
    """Every stream of a source that is not pooled goes on where it was, whatever the sizes of the batches."""
    monkeypatch.setattr(pool, "POOLED_BYTES", 0)
    sources = {"web": {"weight": 2}, "many": {"weight": 1}}
    small, catalog = build(root, sources, 4, 1)
    whole = rows_by_stream(draw_batches(small, catalog, 60), 2, 4)
    pieces = []
    for steps, per_lane in ((5, 1), (4, 3), (3, 2), (4, 1)):
        config, _ = build(root, sources, 4, per_lane)
        drawn = draw_batches(config, catalog, steps, 1, pieces[-1][1] if pieces else None)
        shares = np.array([np.bincount(b["source"], minlength=2) for b, _ in drawn]) - np.array([8, 4]) * per_lane / 3
        assert np.abs(shares).max() < 1
        pieces += drawn
    for stream, rows in rows_by_stream(pieces, 2, 4).items():
        assert rows and rows == whole[stream][: len(rows)], stream


def synthetic_source(rows: np.ndarray, by: str, cap: int) -> Source:
    """A source of a file a language, `rows` of each at 100 bytes, in units of 1 MB; no file is there."""
    files = tuple(File(f"{i}.jsonl", "jsonl", f"l{i:03}", int(n) * 100, "") for i, n in enumerate(rows))
    units = [
        (i, start, min(start + 10**6, f.size), min(10**6, f.size - start))
        for i, f in enumerate(files)
        for start in range(0, f.size, 10**6)
    ]
    settings = {
        "text_column": "text", "row": "document", "holdout_fraction": 0.0, "sample_fraction": 1.0, "max_epochs": cap,
        "language_by": by, "language_temperature": 0.3, "language_max_repeats": 1000,
    }  # fmt: skip
    return Source("glot", files, np.array(units, np.int64), settings)


@pytest.mark.parametrize("by", ["unimax", "bytes"])
def test_500_languages_from_one_row_to_a_million(by):
    """Simulated on the units, which is all that an epoch's order knows of a corpus."""
    rows = np.unique(np.round(np.geomspace(1, 10**6, 500)).astype(np.int64), return_inverse=False)
    rows = np.concatenate([np.ones(500 - len(rows), np.int64), rows])
    source = synthetic_source(rows, by, cap=4)
    tokens = (rows * 30.0).tolist()
    budget = 0.8 * sum(tokens)
    rates = language_rates(source, tokens, budget)
    order = EpochOrder(source, 0, 4_000_000, rates)
    language, size = source.unit_languages, source.units[:, 3]
    read, blocks, epochs = np.zeros(500), 0, 0
    taken = np.zeros(len(size), np.int64)
    while (read.sum() < budget / 30 * 100) and epochs < order.epochs:
        copies = order.copies(epochs)
        bundled = [order.units(epochs, block) for block in range(order.blocks(epochs))]
        # An epoch's blocks hold its units, each as often as it is due, and none is empty or too large.
        np.testing.assert_array_equal(np.bincount(np.concatenate(bundled), minlength=len(size)), copies)
        assert all(len(b) and size[b].sum() < 4_000_000 + 10**6 for b in bundled)
        taken += copies
        read += np.bincount(language, weights=copies * size, minlength=500)
        blocks, epochs = blocks + len(bundled), epochs + 1
    assert taken.max() <= 4 and blocks > 256 and read.sum() >= budget / 30 * 100
    # Every unit has been read as often as its language's rate says, to within once.
    due = np.minimum(4, rates / ONE * epochs)
    assert np.abs(taken - due[language]).max() < 1
    assert (read[:50] <= 4 * rows[:50] * 100).all()
    if by == "unimax":
        # Languages below the cap are due the same bytes, and get them but for the luck of whole units.
        free = due < 3.9
        assert 5 < free.sum() < 450
        even = (due * rows)[free]
        assert even.max() / even.min() < 1.001
        units = np.bincount(language)[free]
        assert (np.abs(read[free] - 100 * even) < 5 * 10**6 * np.sqrt(units / 4 + 1)).all()
        assert read[free].mean() == pytest.approx(100 * even.mean(), rel=0.05)
    # The order of an epoch, and the memory for it, are those of the units: 1e-6 of the bytes.
    assert len(size) < 1.2e-6 * sum(f.size for f in source.files) + 500


def test_500_real_languages_are_read_as_often_as_the_cap_says(tmp_path):
    rows = np.round(np.geomspace(1, 60, 500)).astype(int)
    for i, count in enumerate(rows):
        texts = [f"l{i} {n} small rain" for n in range(count)]
        write(tmp_path / f"l{i:03}" / "data", "jsonl", texts)
    source = SourceConfig((str(tmp_path / "{language}" / "data.jsonl"),), 1.0, holdout_fraction=0.0,
                          language_temperature=0.0, max_epochs=2, when_used_up="redistribute")  # fmt: skip
    data = data_config({"s": source}, block_bytes=20_000, length=512, tokenizer=tokenizer_path(), data={"lanes": 8})
    config = run_config(data, 8)
    catalog = build_catalog(config.data)
    single = dataclasses.replace(config, data=dataclasses.replace(config.data, lanes=1))
    single = dataclasses.replace(single, train=dataclasses.replace(config.train, batch_size=1))
    batches = draw_batches(single, catalog, 10_000)
    times = Counter(read_documents(batches, 0, 1))
    assert set(times.values()) == {2} and len(times) == rows.sum()
    languages = batches[-1][1].languages
    np.testing.assert_array_equal(languages[:, 1], 2 * rows)
    # On eight lanes, which end one by one: at most the last rows before the first lane's end are missing.
    states = [state for _, state in draw_batches(config, catalog, 10_000)]
    assert (states[-1].languages[:, 1] <= 2 * rows).all()
    assert states[-1].lanes[..., TOKENS].sum() > 0.6 * batches[-1][1].lanes[..., TOKENS].sum()


def test_the_state_of_256_lanes_and_5_sources_is_small(tmp_path):
    state = initial_state(256, 5, range(256), 412)
    assert sum(a.nbytes for a in state) < 200 * 1024
    rng = np.random.default_rng(0)
    filled = type(state)(*(rng.integers(0, 10**7, a.shape) for a in state))
    keep_state(tmp_path / "states", 1, KeptState(filled, {}))
    assert (tmp_path / "states" / "1.npz").stat().st_size < 100 * 1024


@pytest.mark.parametrize("number, has", [({"format": 9}, "format 9"), ({}, "no format number")])
def test_a_data_state_of_another_format_is_refused_by_name(tmp_path, number, has):
    np.savez(tmp_path / "7.npz", lanes=np.zeros(3), **number)
    with pytest.raises(
        ConfigError, match=f"7.npz: this data state has {has}, .* use the version that wrote it, or restore it"
    ):
        load_state(tmp_path, 7)


def test_a_damaged_data_state_is_named(tmp_path):
    keep_state(tmp_path, 7, KeptState(initial_state(2, 1, range(2)), {}))
    whole = (tmp_path / "7.npz").read_bytes()
    for size in (0, 1, len(whole) // 2, len(whole) - 1):
        (tmp_path / "7.npz").write_bytes(whole[:size])
        with pytest.raises(ConfigError, match="7.npz: not a readable data state"):
            load_state(tmp_path, 7)


def test_every_catalog_here_is_the_same_after_saving(root, tmp_path):
    _, catalog = build(root, {"many": {"weight": 1, "max_epochs": 2, "when_used_up": "stop"}}, 2, 1)
    catalog.save(tmp_path / "catalog.json")
    Catalog.load(tmp_path / "catalog.json").check(catalog)
