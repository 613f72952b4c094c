"""Shares by number, size, temperature and UniMax; sources that end; weights that change at a token count."""

import dataclasses
import gzip
import json
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_corpus import (
    data_config,
    documents,
    epoch_documents,
    epoch_order,
    run_config,
    tokenizer,
    tokenizer_path,
    write,
)
from hypothesis import given
from hypothesis import strategies as st
from jax.experimental import multihost_utils

from easylm_mling.config import SourceConfig, StageConfig, WeightingConfig
from easylm_mling.data import estimates, pool
from easylm_mling.data.catalog import build_catalog
from easylm_mling.data.estimates import catalog_rates, estimate, load_estimates, open_estimates, pinned_fingerprints
from easylm_mling.data.loader import Loader
from easylm_mling.data.mixture import EXTRA, PADDING, ROWS, TOKENS
from easylm_mling.data.shuffle import EpochOrder
from easylm_mling.data.sources import lines
from easylm_mling.data.weights import (
    ONE,
    MixingPlan,
    integer_weights,
    language_text,
    language_tokens,
    make_plan,
    planned_as_if,
    spread,
)
from easylm_mling.errors import ConfigError
from easylm_mling.run.host_sync import next_on_all_hosts

T, LANES = 32, 4
SIZES = st.lists(st.floats(1, 1e6), min_size=1, max_size=8)


@given(SIZES, st.floats(1, 1e7), st.floats(0, 1), st.integers(1, 9))
def test_spread_keeps_the_cap_and_the_total_and_shares_the_rest_by_temperature(sizes, total, temperature, cap):
    times = spread(sizes, total, temperature, cap)
    read = [n * size for n, size in zip(times, sizes, strict=True)]
    assert all(0 <= n <= cap * (1 + 1e-9) for n in times)
    assert sum(read) == pytest.approx(min(total, cap * sum(sizes)), rel=1e-6)
    free = [r / size**temperature for r, n, size in zip(read, times, sizes, strict=True) if n < cap * (1 - 1e-9)]
    assert not free or max(free) == pytest.approx(min(free), rel=1e-6)
    # Nobody is held at the cap who would have been under it.
    if free:
        assert all(r / s**temperature <= free[0] * (1 + 1e-6) for r, s in zip(read, sizes, strict=True))


def test_weights_whose_sum_overflows_are_shares_all_the_same():
    assert integer_weights([1e308, 1e308]) == [ONE // 2, ONE // 2]
    assert integer_weights([1.7e308, 0.0, 1.7e308, 1.7e308, 1.7e308])[1] == 0


@given(st.lists(st.lists(st.integers(0, 5), min_size=3, max_size=3).filter(any), min_size=1, max_size=4), st.data())
def test_a_target_is_the_sum_of_the_stages_shares(weights, data):
    gaps = data.draw(st.lists(st.integers(1, 9), min_size=len(weights) - 1, max_size=len(weights) - 1))
    plan = MixingPlan((0, *np.cumsum(gaps).tolist()), tuple(integer_weights(w) for w in weights), {})
    total = [0, 0, 0]
    for turn in range(40):
        assert plan.target(turn) == total
        total = [a + b for a, b in zip(total, plan.shares_at(turn), strict=True)]
    lanes = data.draw(st.integers(1, 9))
    planned = planned_as_if(plan, lanes, 40)
    assert (planned.sum(axis=1) == 40).all() and (planned >= 0).all()
    assert np.abs(planned - np.array(total) / ONE).max() <= 1
    assert np.abs(planned.sum(axis=0) - np.array(total) / ONE * lanes).max() <= 2


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("corpora")
    write(root / "web", "jsonl", documents(400, prefix="w"))
    write(root / "books", "parquet", documents(100, prefix="b"))
    for language, count in (("xx", 90), ("yy", 7)):
        write(root / "many" / language / "data", "arrow", documents(count, prefix=language), rows=3)
    return root


def mixture(root, batch=8, budget=10**9, weighting=None, stages=(), **sources):
    """(config, catalog) of web, books and many; a keyword gives the settings of one."""
    paths = {"web": "web.jsonl", "books": "books.parquet", "many": "many/{language}/data.arrow"}
    made = {
        name: SourceConfig((str(root / path),), **{"weight": 1.0, "holdout_fraction": 0.0, **sources.get(name, {})})
        for name, path in paths.items()
        if name in sources or not sources
    }
    data = {"lanes": LANES, "stages": tuple(stages)}
    if weighting:
        data["weighting"] = weighting
        made = {n: dataclasses.replace(s, weight=s.weight if s.weight == 0 else None) for n, s in made.items()}
    config = run_config(data_config(made, length=T, tokenizer=tokenizer_path(), data=data), batch)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, budget_tokens=budget))
    return config, build_catalog(config.data)


def draw(config, catalog, steps, state=None):
    """[(batch, state)] of at most `steps` batches, and why the data ended, if it did."""
    with Loader(config.mixer, catalog, tokenizer(), state) as loader:
        return [item for item, _ in zip(loader, range(steps), strict=False)], loader.ended


def shares(config, catalog, budget=None):
    rates = catalog_rates(estimate(catalog, tokenizer()))
    plan = make_plan(config.mixer, catalog, rates)
    sizes = {n: sum(language_tokens(s, rates[n])) for n, s in catalog.sources.items()}
    return np.array(plan.shares[0]) / ONE, np.array(list(sizes.values()))


def test_shares_by_bytes_tokens_temperature_and_unimax(root):
    by = lambda **settings: shares(*mixture(root, weighting=WeightingConfig(**settings)))  # noqa: E731
    share, tokens = by(by="tokens")
    np.testing.assert_allclose(share, tokens / tokens.sum(), rtol=1e-6)
    np.testing.assert_allclose(by(by="temperature", temperature=0.5)[0], tokens**0.5 / (tokens**0.5).sum(), rtol=1e-6)
    config, catalog = mixture(root, weighting=WeightingConfig(by="bytes"))
    share, rates = shares(config, catalog)[0], catalog_rates(estimate(catalog, tokenizer()))
    sizes = np.array([sum(language_text(s, rates[name])) for name, s in catalog.sources.items()])
    np.testing.assert_allclose(share, sizes / sizes.sum(), rtol=1e-6)
    documents = [epoch_documents(EpochOrder(s, 0, 2000)) for s in catalog.sources.values()]
    truth = np.array([sum(len(d.encode()) for d in of_source) for of_source in documents])
    np.testing.assert_allclose(sizes, truth, rtol=0.01)
    # books and many are under the cap of two epochs only if the budget is small.
    budget = int(tokens.sum() * 1.2)
    config, catalog = mixture(root, budget=budget, weighting=WeightingConfig(by="unimax", max_epochs=2))
    share, _ = shares(config, catalog)
    epochs = share * budget / tokens
    assert epochs.max() < 2.001 and share[0] > share[1] and epochs[1] == pytest.approx(2, rel=0.01)


@pytest.mark.parametrize("by", ["bytes", "tokens"])
def test_one_text_has_one_share_in_every_layout(tmp_path, by):
    """Not that of its packing: field names, escapes and other fields, dictionary encoding, an embedding column."""
    texts = [t for t in dict.fromkeys(documents(300)) if t.strip() and "\n" not in t] * 4
    vectors = pa.array([[0.5] * 64] * len(texts))
    table = pa.table({"text": texts})
    for name in ("lines.jsonl", "meta.jsonl", "packed.jsonl.gz", "plain.txt", "plain.txt.gz"):
        as_row = {
            "meta.jsonl": lambda t: json.dumps({"text": t, "url": "u" * 200}),
            "plain.txt": str,
            "plain.txt.gz": str,
        }
        rows = map(as_row.get(name, lambda t: json.dumps({"text": t})), texts)
        data = "".join(row + "\n" for row in rows).encode()
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    pq.write_table(table, tmp_path / "table.parquet")
    with pa.OSFile(str(tmp_path / "wide.arrow"), "wb") as sink:
        wide = table.append_column("embedding", vectors)
        with pa.ipc.new_stream(sink, wide.schema) as writer:
            writer.write_table(wide)
    weighting = WeightingConfig(by=by)
    names = sorted(p.name for p in tmp_path.iterdir())
    sources = {n.replace(".", "_"): SourceConfig(paths=(str(tmp_path / n),)) for n in names}
    config = run_config(data_config(sources, length=T, tokenizer=tokenizer_path(), data={"weighting": weighting}), 8)
    share, _ = shares(config, build_catalog(config.data))
    np.testing.assert_allclose(share, 1 / len(names), rtol=0.03)


def test_a_weight_of_zero_leaves_a_source_out_of_every_weighting(root):
    for by in ("bytes", "tokens", "temperature", "unimax"):
        weighting = WeightingConfig(by=by)
        share, _ = shares(*mixture(root, weighting=weighting, web={}, books={"weight": 0.0}, many={}))
        assert share[1] == 0 and share.sum() == pytest.approx(1)


def test_a_sample_without_a_good_document_is_told(tmp_path):
    (tmp_path / "web.jsonl").write_text('{"text": null}\n' * 20)
    config, catalog = mixture(tmp_path, weighting=WeightingConfig(by="tokens"), web={})
    with pytest.raises(
        ConfigError, match="data.weighting.by=tokens: no good document was found in a sample of any source"
    ):
        shares(config, catalog)


def test_estimates_are_near_the_truth_and_do_not_depend_on_the_order_of_asking(root):
    config, catalog = mixture(root)
    estimates = estimate(catalog, tokenizer())
    assert estimates == estimate(catalog, tokenizer())
    for name, source in catalog.sources.items():
        order = EpochOrder(source, 0, 2000)
        texts = epoch_documents(order)
        truth = sum(len(ids) + 2 for ids in tokenizer().encode(texts))
        assert sum(language_tokens(source, catalog_rates(estimates)[name])) == pytest.approx(truth, rel=0.1), name


@pytest.mark.parametrize(
    "content, message",
    [
        (
            '{"format": 9, "sources": {}}',
            "this file of estimates has format 9, .* use the version that wrote it, or remove the file",
        ),
        (
            '{"data": "", "tokenizer": "", "sources": {}}',
            "this file of estimates has no format number, .* or remove the file",
        ),
        ('{"format": 1, "sou', "not readable as estimates .* remove the file"),
    ],
)
def test_estimates_of_another_format_or_damaged_ones_are_refused_by_name(root, tmp_path, content, message):
    _, catalog = mixture(root)
    path = tmp_path / "estimates.json"
    estimates = open_estimates(path, catalog, tokenizer())
    assert load_estimates(path) == estimates == open_estimates(path, catalog, tokenizer())
    path.write_text(content)
    for read in (load_estimates, pinned_fingerprints, lambda p: open_estimates(p, catalog, tokenizer())):
        with pytest.raises(ConfigError, match=f"estimates.json: {message}"):
            read(path)
    path.unlink()
    assert open_estimates(path, catalog, tokenizer()) == estimates


def test_sampling_takes_a_fraction_by_text_and_leaves_the_held_out_ones_alone(tmp_path):
    path = write(tmp_path / "a", "jsonl", documents(2000))
    whole, part = (epoch_order(data_config(path, holdout_fraction=0.1, sample_fraction=f)) for f in (1.0, 0.2))
    every, some = set(epoch_documents(whole)), set(epoch_documents(part))
    assert some < every and 0.15 < len(some) / len(every) < 0.25
    assert set(epoch_documents(part, 3)) == some
    held = set(epoch_documents(part, split="holdout"))
    assert held == set(epoch_documents(whole, split="holdout")) and not held & some
    # The two hashes are independent: a tenth held out takes a tenth of the sample, not half of it.
    without = set(epoch_documents(epoch_order(data_config(path, sample_fraction=0.2))))
    assert 0.04 < len(without & held) / len(without) < 0.18


@pytest.mark.parametrize("temperature, by", [(0.0, "bytes"), (0.5, "tokens"), (1.0, "unimax"), (1.0, "bytes")])
def test_no_document_is_read_more_often_than_the_cap(root, temperature, by):
    """Down to a language of seven rows, however flat the languages are made."""
    rule = {"max_epochs": 3, "when_used_up": "redistribute"}
    many = {"language_by": by, "language_temperature": temperature, "language_max_repeats": 1000, **rule}
    config, catalog = mixture(root, many=many)
    known = catalog_rates(estimate(catalog, tokenizer()))
    plan = make_plan(config.mixer, catalog, known)
    order = EpochOrder(catalog.sources["many"], 0, 2000, plan.language_rates["many"])
    counts = Counter(text for epoch in range(order.epochs) for text in epoch_documents(order, epoch))
    assert set(counts.values()) == {3} and len(counts) == 97
    assert not epoch_documents(order, order.epochs) and not epoch_documents(order, order.epochs + 5)


def test_unimax_inside_a_source_gives_equal_tokens_up_to_the_cap(root):
    rule = {"max_epochs": 4, "when_used_up": "redistribute", "language_by": "unimax"}
    config, catalog = mixture(root, many=rule)
    known = catalog_rates(estimate(catalog, tokenizer()))
    xx, yy = language_tokens(catalog.sources["many"], known["many"])
    for budget, want in ((yy * 4, 2.0), (yy * 12, 4.0)):
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, budget_tokens=round(budget)))
        real = config.total_steps * config.tokens_per_step
        rates = make_plan(config.mixer, catalog, known).language_rates["many"] / ONE
        epochs = rates * real / (rates @ [xx, yy])
        assert epochs[1] == pytest.approx(min(4, real / 2 / yy), rel=0.01) and abs(epochs[1] - want) < 1
        assert epochs @ [xx, yy] == pytest.approx(real, rel=0.01)


def test_redistributed_rows_go_to_the_others_by_their_shares(root):
    rule = {"max_epochs": 1, "when_used_up": "redistribute"}
    config, catalog = mixture(root, web={"weight": 2.0}, books={"weight": 3.0, **rule}, many={"weight": 1.0})
    drawn, ended = draw(config, catalog, 400)
    assert not ended and len(drawn) == 400
    lanes = drawn[-1][1].lanes
    assert lanes[..., ROWS].sum(axis=0) / lanes[..., ROWS].sum() == pytest.approx([1 / 3, 1 / 2, 1 / 6], abs=0.01)
    web, books, many = lanes[..., EXTRA].sum(axis=0)
    rows = [sum(np.count_nonzero(b["source"] == s) for b, _ in drawn) for s in range(3)]
    planned = lanes[..., ROWS].sum(axis=0).tolist()
    assert books == 0 and (web, many) == (rows[0] - planned[0], rows[2] - planned[2])
    assert web > 900 and abs(web - 2 * many) <= 2 * LANES
    # What was read of books is every document once: the last rows are filled up with padding.
    assert read_documents(drawn, 1) == Counter(documents(100, prefix="b"))
    taken = lanes[:, 1, TOKENS] + lanes[:, 1, PADDING]
    assert (taken % T == 0).all() and (lanes[:, 1, PADDING] < T).all() and lanes[:, 1, PADDING].any()
    padded = [b for b, _ in drawn if (b["segment_ids"] == 0).any()]
    assert sum(np.count_nonzero(b["segment_ids"] == 0) for b in padded) == lanes[..., PADDING].sum()
    for b in padded:
        after = b["segment_ids"] == 0
        assert not b["tokens"][after].any() and not b["loss_mask"][after].any() and not b["positions"][after].any()
        assert not b["targets"][after].any()
    # Everything since is the same from any state, on any side of the end.
    for stop in (20, 60, 61, 200):
        again, _ = draw(config, catalog, 30, drawn[stop - 1][1])
        for (a, x), (b, y) in zip(again, drawn[stop:], strict=False):
            np.testing.assert_array_equal(a["tokens"], b["tokens"])
            for p, q in zip(x, y, strict=True):
                np.testing.assert_array_equal(p, q)


def read_documents(drawn, source, lanes=LANES) -> Counter:
    """How often each document of a source stands in the batches: its rows of each lane, end to end."""
    times = Counter()
    for lane in range(lanes):
        tokens = [np.zeros(0, np.int32)]
        for batch, _ in drawn:
            own = np.arange(len(batch["tokens"])) // (len(batch["tokens"]) // lanes) == lane
            rows = own & (batch["source"] == source)
            tokens.append(batch["tokens"][rows][batch["segment_ids"][rows] > 0])
        stream = np.concatenate(tokens)
        for document in np.split(stream, np.flatnonzero(stream == 2))[1:]:
            if document[-1] == 1:
                times[tokenizer().decode(document[1:-1])] += 1
    return times


def test_stop_ends_the_run_before_the_row_that_is_missing_on_all_numbers_of_hosts(root):
    rule = {"max_epochs": 1, "when_used_up": "stop"}
    config, catalog = mixture(root, web={}, books=rule)
    drawn, ended = draw(config, catalog, 10_000)
    assert "data.sources.books is used up (max_epochs=1)" in ended and 5 < len(drawn) < 1000
    assert draw(config, catalog, 5, drawn[-1][1]) == ([], ended)
    ends = []
    for lane in range(LANES):
        with Loader(config.mixer, catalog, tokenizer(), lanes=range(lane, lane + 1)) as loader:
            ends.append(sum(1 for _ in zip(loader, range(2000), strict=False)))
            with pytest.raises(StopIteration):
                next(loader)
    # A trainer that ends with the first of its hosts ends where one host would.
    assert min(ends) == len(drawn)


@pytest.mark.parametrize("mine, theirs", [(False, True), (True, False), (False, False)])
def test_all_hosts_end_when_one_does(root, monkeypatch, mine, theirs):
    """As the trainer of a pod asks, with the answer of another host made up."""
    config, catalog = mixture(root, books={"max_epochs": 1, "when_used_up": "stop"})
    monkeypatch.setattr("easylm_mling.run.host_sync.is_multiprocess", lambda: True)
    monkeypatch.setattr(multihost_utils, "process_allgather", lambda x: np.array([bool(x), theirs]))
    with Loader(config.mixer, catalog, tokenizer()) as loader:
        if mine:
            for _ in loader:
                pass
        assert (next_on_all_hosts(loader) is None) == (mine or theirs)


def with_whole_units(catalog):
    """The catalog of a run that began when lanes did not share units."""
    return dataclasses.replace(
        catalog, sources={n: dataclasses.replace(s, dealing=2) for n, s in catalog.sources.items()}
    )


def test_a_source_too_small_to_stop_by_is_refused(root, monkeypatch):
    monkeypatch.setattr(pool, "POOLED_BYTES", 0)
    config, catalog = mixture(root, web={}, many={"max_epochs": 1, "when_used_up": "stop"})
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, block_bytes=10**6))
    catalog = with_whole_units(build_catalog(config.data))
    with pytest.raises(ConfigError, match="data.sources.many.when_used_up=stop: .* only 1 blocks.* 4 lanes"):
        Loader(config.mixer, catalog, tokenizer())


def test_a_source_with_fewer_blocks_than_lanes_is_dealt_to_the_lanes_that_hold_it(root, monkeypatch):
    monkeypatch.setattr(pool, "POOLED_BYTES", 0)
    config, catalog = mixture(root, web={"weight": 9.0}, many={"max_epochs": 2, "when_used_up": "redistribute"})
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, block_bytes=10**6))
    catalog = with_whole_units(build_catalog(config.data))
    drawn, _ = draw(config, catalog, 30)
    share = np.mean([np.mean(b["source"] == 1) for b, _ in drawn])
    assert share == pytest.approx(0.1, abs=0.01)
    assert (drawn[-1][1].lanes[:, 1, TOKENS] > 0).tolist() == [True, True, False, False]
    # Nothing in place of something else was needed so far.
    assert not drawn[-1][1].lanes[..., EXTRA].any()


def test_a_run_ends_when_every_source_is_used_up_and_has_read_each_document_as_often_as_it_may(root):
    rule = {"when_used_up": "redistribute"}
    config, catalog = mixture(root, web={"max_epochs": 1, **rule}, books={"max_epochs": 2, **rule})
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, lanes=1), train=dataclasses.replace(config.train, batch_size=1))  # fmt: skip
    drawn, ended = draw(config, catalog, 10_000)
    assert ended == "every source is used up in lane 0"
    assert read_documents(drawn, 0, 1) == Counter(documents(400, prefix="w"))
    assert read_documents(drawn, 1, 1) == Counter(documents(100, prefix="b") * 2)


def test_weights_change_at_their_token_count_and_not_before(root):
    stages = [StageConfig(50 * 8 * T, {"web": 0.0, "many": 3.0}), StageConfig(80 * 8 * T + 1, {"books": 0.0})]
    config, catalog = mixture(root, stages=stages)
    plain, _ = mixture(root)
    (drawn, _), (before, _) = draw(config, catalog, 120), draw(plain, catalog, 50)
    for (a, _), (b, _) in zip(drawn, before, strict=False):
        np.testing.assert_array_equal(a["tokens"], b["tokens"])
    counts = np.array([np.bincount(b["source"], minlength=3) for b, _ in drawn])
    assert (counts[50:80, 0] == 0).all()
    assert counts[50:80].sum(axis=0)[1:] == pytest.approx([60, 180], abs=2)
    # 80 steps and a token: the round of step 81 has begun before it, the next one is the first of the new stage.
    assert counts[80, 1] == 1 and (drawn[80][0]["source"].reshape(LANES, 2)[:, 0] == 1).any()
    assert (counts[81:, 1] == 0).all() and counts[81:].sum(axis=0)[[0, 2]] == pytest.approx([156, 156], abs=3)


@pytest.mark.parametrize("layout", ["jsonl.gz", "jsonl.zst"])
@pytest.mark.parametrize("texts", [documents(6000), ["the same " * 60] * 6000], ids=["of words", "densely packed"])
def test_a_packed_file_is_as_large_as_its_text(tmp_path, monkeypatch, layout, texts):
    monkeypatch.setattr(lines, "_SAMPLED_PACKED", 100_000)
    monkeypatch.setattr(lines, "_SAMPLED_TEXT", 1_000_000)
    monkeypatch.setattr(estimates, "_READ_BYTES", 100_000)
    sources = {}
    for name, kind in (("plain", "jsonl"), ("packed", layout)):
        sources[name] = SourceConfig((str(write(tmp_path / name, kind, texts)),), None, holdout_fraction=0.0)
    data = {"weighting": WeightingConfig(by="bytes")}
    config = run_config(data_config(sources, tokenizer=tokenizer_path(), block_bytes=4_000_000, data=data), 4)
    share, tokens = shares(config, build_catalog(config.data))
    assert share[0] == pytest.approx(0.5, abs=0.05)
    truth = sum(len(ids) + 2 for ids in tokenizer().encode(texts))
    np.testing.assert_allclose(tokens / truth, 1, atol=0.25)
