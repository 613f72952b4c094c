"""Global batches are the same for any number of hosts and across any stop; bad data stops a run with a message."""

import dataclasses
import json
import re
import threading
from contextlib import ExitStack

import jax
import numpy as np
import pytest
from data_corpus import assert_same, data_config, documents, run_config, tokenizer, tokenizer_path, write

from easylm_mling.config import SourceConfig
from easylm_mling.data import pool
from easylm_mling.data.catalog import Catalog, build_catalog
from easylm_mling.data.holdout import holdout_rows
from easylm_mling.data.loader import Loader
from easylm_mling.data.mixture import BAD, COUNTERS, DOCUMENTS, ROWS, TOKENS, whole_state
from easylm_mling.data.quarantine import check_bad_records
from easylm_mling.errors import ConfigError, DataError
from easylm_mling.run.host_sync import place_batch

BATCH, LANES, T = 8, 4, 32


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """(config, catalog) of three sources in different layouts, one of them tiny."""
    root = tmp_path_factory.mktemp("corpora")
    write(root / "web", "jsonl", documents(150, prefix="w"))
    write(
        root / "books",
        "parquet",
        [line for d in documents(80, prefix="b") for line in [*d.splitlines(keepends=True), "\n"]],
    )
    for language, count in (("xx", 60), ("yy", 7)):
        write(root / "many" / language / "data", "arrow", documents(count, prefix=language))
    sources = {
        "web": SourceConfig((str(root / "web.jsonl"),), 0.5, holdout_fraction=0.1),
        "books": SourceConfig((str(root / "books.parquet"),), 0.3, row="line", holdout_fraction=0.1),
        "many": SourceConfig(
            (str(root / "many/{language}/data.arrow"),), 0.2, language_temperature=0.5, holdout_fraction=0.1
        ),
    }
    config = run_config(data_config(sources, length=T, tokenizer=tokenizer_path(), data={"lanes": LANES}), BATCH)
    return config, build_catalog(config.data)


def global_batches(corpora, steps, hosts=1, state=None):
    """[(whole batch, whole state)] as `hosts` hosts together make them."""
    config, catalog = corpora
    each = LANES // hosts
    loaders = [
        Loader(config.mixer, catalog, tokenizer(), state, range(h * each, h * each + each)) for h in range(hosts)
    ]
    made = []
    for _ in range(steps):
        batches, states = zip(*(next(loader) for loader in loaders), strict=True)
        made.append(({k: np.concatenate([b[k] for b in batches]) for k in batches[0]}, whole_state(list(states))))
    for loader in loaders:
        loader.close()
    return made


@pytest.fixture(scope="module")
def undisturbed(corpora):
    return global_batches(corpora, 40)


def test_shapes_and_types(undisturbed):
    batch, state = undisturbed[0]
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
        **{k: ((BATCH, T), np.dtype(np.int32)) for k in ("tokens", "targets", "segment_ids", "positions")},
        "loss_mask": ((BATCH, T), np.dtype(np.float32)),
        "source": ((BATCH,), np.dtype(np.int32)),
    }
    assert state.lanes.shape == (LANES, 3, len(COUNTERS)) and state.languages.shape == (4, 3)
    assert state.lanes.dtype == state.languages.dtype == np.int64


@pytest.mark.parametrize("hosts", [2, 4])
def test_any_number_of_hosts_draws_the_same_global_batches(corpora, undisturbed, hosts):
    assert_same(global_batches(corpora, 40, hosts), undisturbed)


@pytest.mark.parametrize("stop,hosts", [(0, 1), (1, 1), (7, 4), (8, 1), (19, 2), (39, 1)])
def test_a_resume_gives_the_same_batches_on_another_number_of_hosts(corpora, undisturbed, stop, hosts):
    resumed = global_batches(corpora, 40 - stop - 1, hosts, undisturbed[stop][1])
    assert_same(resumed, undisturbed[stop + 1 :])


def test_a_state_is_not_touched_by_what_is_read_after_it(corpora, undisturbed):
    config, catalog = corpora
    with Loader(config.mixer, catalog, tokenizer()) as loader:
        states = [next(loader)[1] for _ in range(10)]
    for state, (_, want) in zip(states, undisturbed, strict=False):
        for x, y in zip(state, want, strict=True):
            np.testing.assert_array_equal(x, y)


def test_the_ledger_is_what_the_batches_hold(corpora, undisturbed):
    rows = np.zeros((LANES, 3), np.int64)
    begun = np.zeros(3, np.int64)
    for batch, state in undisturbed:
        for lane in range(LANES):
            rows[lane] += np.bincount(batch["source"].reshape(LANES, -1)[lane], minlength=3)
        begun += [np.count_nonzero(batch["tokens"][batch["source"] == s] == 2) for s in range(3)]
        np.testing.assert_array_equal(state.lanes[..., ROWS], rows)
        np.testing.assert_array_equal(state.lanes[..., TOKENS], rows * T)
        np.testing.assert_array_equal(state.lanes[..., DOCUMENTS].sum(axis=0), begun)


def test_every_batch_has_the_shares_to_a_row_a_round_and_the_run_has_them_exactly(undisturbed):
    share = np.array([0.5, 0.3, 0.2])
    counts = np.array([np.bincount(b["source"], minlength=3) for b, _ in undisturbed])
    assert (np.abs(counts - share * BATCH) < 2).all()
    assert (np.abs(counts.sum(axis=0) - share * BATCH * 40) < 1.5).all()


def test_no_target_and_no_segment_crosses_a_document(undisturbed):
    for batch, _ in undisturbed:
        tokens, targets, mask, segments, positions = (
            batch[k] for k in ("tokens", "targets", "loss_mask", "segment_ids", "positions")
        )
        inside = mask == 1
        np.testing.assert_array_equal(inside[:, :-1], tokens[:, 1:] != 2)
        np.testing.assert_array_equal(targets[:, :-1][inside[:, :-1]], tokens[:, 1:][inside[:, :-1]])
        assert not targets[~inside].any() and (targets[inside] != 2).all()
        # An EOS is where a document ends: it is learnt, and nothing is learnt from it.
        assert not inside[tokens == 1].any() and (targets == 1).any()
        np.testing.assert_array_equal(np.diff(segments), tokens[:, 1:] == 2)
        assert (segments[:, 0] == 1).all() and (positions[:, 0] == 0).all()
        assert (positions[tokens == 2] == 0).all()
        same = np.diff(segments) == 0
        assert (np.diff(positions)[same] == 1).all()


def test_training_never_sees_a_held_out_document(corpora, undisturbed):
    config, catalog = corpora
    held = openings(holdout_rows(config.mixer, catalog, tokenizer(), "web", 100)["tokens"].reshape(1, -1))
    seen = set().union(*(openings(b["tokens"][b["source"] == 0]) for b, _ in undisturbed))
    assert len(held) > 5 and len(seen) > 50
    assert not held & seen


def openings(rows) -> set[str]:
    """The first word of every document that begins in the rows; it tells the tests' documents apart."""
    begins = [(row, i + 1) for row in rows for i in np.flatnonzero(row == 2) if len(row) - i > 10]
    return {tokenizer().decode(row[i : i + 9]).split()[0] for row, i in begins}


def test_holdout_rows_are_whole_documents_then_padding(corpora):
    config, catalog = corpora
    for name in catalog.sources:
        held = holdout_rows(config.mixer, catalog, tokenizer(), name, 1000)
        index = list(catalog.sources).index(name)
        assert len(held["tokens"]) > 1 and (held["source"] == index).all()
        tokens, segments = held["tokens"].reshape(-1), held["segment_ids"].reshape(-1)
        real = int((segments > 0).sum())
        assert tokens[0] == 2 and tokens[real - 1] == 1 and (tokens[real:] == 0).all()
        assert len(held["tokens"]) == -(-real // T)
        for key in ("targets", "loss_mask", "positions"):
            assert not held[key].reshape(-1)[real - 1 if key != "positions" else real :].any()
        again = holdout_rows(config.mixer, catalog, tokenizer(), name, 2)
        for key, value in again.items():
            assert len(value) == 2
            np.testing.assert_array_equal(value, held[key][:2])


def test_holdout_rows_may_be_none(corpora):
    config, catalog = corpora
    nothing = holdout_rows(config.mixer, catalog, tokenizer(), "web", 0)
    assert {k: v.shape for k, v in nothing.items()} == {
        **dict.fromkeys(("tokens", "targets", "loss_mask", "segment_ids", "positions", "language"), (0, T)),
        "source": (0,),
    }


def one_source(path, batch=4, **settings):
    data = data_config(path, length=T, tokenizer=tokenizer_path(), **settings)
    config = run_config(data, batch)
    return config, build_catalog(data)


def test_bad_records_are_written_down_and_counted_once(tmp_path):
    lines = [json.dumps({"text": t}) for t in documents(100)]
    lines[30:30] = ['{"text": "cut', '{"text": null}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    config, catalog = one_source(tmp_path / "a.jsonl", batch=1)
    quarantine = tmp_path / "quarantine.jsonl"
    with Loader(config.mixer, catalog, tokenizer(), quarantine=quarantine) as loader:
        state = next(state for _, state in loader if state.lanes[0, 0, 0] == 1)
    assert state.lanes[..., BAD].sum() in (2, 4)
    entries = [json.loads(line) for line in quarantine.read_text().splitlines()]
    assert entries[0].keys() == {"source", "lane", "epoch", "block", "window", "file", "offset", "reason", "head"}
    first = {e["offset"]: e for e in entries[:2]}
    content = (tmp_path / "a.jsonl").read_bytes()
    for offset, entry in first.items():
        assert entry["source"] == "s" and entry["file"] == str(tmp_path / "a.jsonl")
        assert content[offset:].decode().startswith(entry["head"])
    assert sorted(e["reason"] for e in first.values()) == ["field 'text' is NoneType, not text", "invalid JSON"]


@pytest.mark.parametrize("pooled", [0, 10**9])
def test_too_many_bad_records_stop_the_run_at_one_step_on_any_hosts_and_after_any_stops(tmp_path, monkeypatch, pooled):
    monkeypatch.setattr(pool, "POOLED_BYTES", pooled)
    lines = [json.dumps({"text": t}) if i % 50 else "bad" for i, t in enumerate(documents(3000))]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    config, catalog = one_source(tmp_path / "a.jsonl", data={"lanes": 4})

    def stops_after(hosts: int, every: int) -> int:
        """Batches before the stop, drawn by so many hosts that are begun anew after so many batches each."""
        state = None
        for first in range(0, 3000, every):
            shares = [range(4 * h // hosts, 4 * (h + 1) // hosts) for h in range(hosts)]
            with ExitStack() as stack:
                loaders = [
                    stack.enter_context(Loader(config.mixer, catalog, tokenizer(), state, lanes)) for lanes in shares
                ]
                for number in range(first, first + every):
                    state = whole_state([next(loader)[1] for loader in loaders])
                    try:
                        check_bad_records(state.lanes, ["s"], 0.01, "quarantine.jsonl")
                    except DataError as error:
                        assert re.search(r"data.sources.s: \d+ of \d{4} records are bad.*=0.01; see quar", str(error))
                        return number
        raise AssertionError("it never stopped")

    step = stops_after(1, 3000)
    assert stops_after(2, 3000) == stops_after(4, 3000) == stops_after(1, 7) == step
    check_bad_records(np.full((4, 1, len(COUNTERS)), 1000), ["s"], 0.6, "")


def test_an_error_of_the_reading_thread_reaches_the_trainer(tmp_path):
    path = write(tmp_path / "a", "jsonl.gz", documents(3000))
    config, catalog = one_source(path)
    path.write_bytes(path.read_bytes()[:-2000])
    # As if nobody looked whether it is the same file.
    catalog = Catalog({"s": dataclasses.replace(catalog.sources["s"], stamps=())}, catalog.settings)
    with Loader(config.mixer, catalog, tokenizer()) as loader:
        with pytest.raises(ConfigError, match="a.jsonl.gz: damaged or cut off"):
            for _ in range(5000):
                next(loader)
    path.unlink()
    with Loader(config.mixer, catalog, tokenizer()) as loader, pytest.raises(ConfigError, match="a.jsonl.gz"):
        next(loader)


def test_closing_stops_the_thread_at_once(corpora):
    config, catalog = corpora
    before = threading.active_count()
    loader = Loader(config.mixer, catalog, tokenizer())
    next(loader)
    loader.close()
    assert threading.active_count() == before
    with pytest.raises(AssertionError, match="closed"):
        next(loader)


def test_a_weight_of_zero_draws_nothing(corpora):
    config, catalog = corpora
    sources = {**config.data.sources, "web": dataclasses.replace(config.data.sources["web"], weight=0.0)}
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, sources=sources))
    with Loader(config.mixer, catalog, tokenizer()) as loader:
        assert all((next(loader)[0]["source"] != 0).all() for _ in range(10))


def test_batches_are_sharded_over_the_batch_axes(corpora, undisturbed):
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    batch = undisturbed[0][0]
    placed = place_batch(batch, mesh, sequence=1)
    for key, value in placed.items():
        np.testing.assert_array_equal(value, batch[key])
        assert value.addressable_shards[0].data.shape[0] == BATCH // 4
