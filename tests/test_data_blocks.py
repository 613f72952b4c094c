"""An epoch's order is a function of its seed, the split one of the document, and languages get what they are due."""

import itertools
from collections import Counter

import numpy as np
import pytest
from data_corpus import data_config, documents, epoch_documents, epoch_order, write

from easylm_mling.data.shuffle import seeded_bits, seeded_order, windows


def test_seeded_bits_are_pinned():
    """A change here is a change of the order of every run's data."""
    assert seeded_bits(2, 0, "s", 7).tolist() == [11326224743721109149, 7213571468174093815]
    assert seeded_order(8, 0, "s").tolist() == [5, 0, 4, 3, 2, 1, 6, 7]


def test_every_key_gives_another_order(tmp_path):
    path = write(tmp_path / "a", "jsonl", documents(200))
    orders = [epoch_order(data_config(path, data={"seed": seed})) for seed in (0, 1)]
    texts = [epoch_documents(order, epoch) for order in orders for epoch in (0, 1)]
    assert all(sorted(t) == sorted(texts[0]) for t in texts)
    assert all(a != b for a, b in itertools.combinations(texts, 2))


def test_units_and_the_documents_of_a_block_are_each_in_a_new_order_every_epoch(tmp_path):
    path = write(tmp_path / "a", "jsonl", documents(300))
    many = epoch_order(data_config(path))
    units = [[many.units(epoch, b).tolist() for b in range(many.blocks(epoch))] for epoch in (0, 1)]
    assert units[0] != units[1]
    assert sorted(sum(units[0], [])) == sorted(sum(units[1], [])) == list(range(len(many.source.units)))
    one = epoch_order(data_config(path, block_bytes=10**6))
    assert len(one.source.units) == 1
    assert epoch_documents(one, 0) != epoch_documents(one, 1)


def listed(made) -> list:
    """Windows as tuples that can be compared."""
    return [tuple(w._replace(provenance=w.provenance.tolist())) for w in made]


def test_a_block_does_not_depend_on_what_was_read_before(tmp_path):
    path = write(tmp_path / "a", "parquet", documents(300))
    order = epoch_order(data_config(path))
    forwards = {(e, b): listed(windows(order, e, b)) for e in (0, 1) for b in range(order.blocks(e))}
    other = epoch_order(data_config(path))
    for key in reversed(forwards):
        assert listed(windows(other, *key)) == forwards[key]


def test_a_block_is_one_window_of_about_its_size(tmp_path):
    path = write(tmp_path / "a", "jsonl", documents(2000))
    order = epoch_order(data_config(path, block_bytes=10_000))
    blocks = [list(windows(order, 0, b)) for b in range(order.blocks(0))]
    assert len(blocks) > 5 and all(len(b) == 1 and b[0].last for b in blocks)
    sizes = [sum(map(len, b[0].documents)) for b in blocks]
    assert all(5_000 < size < 13_000 for size in sizes[:-1])


@pytest.mark.parametrize("layout", ["jsonl.gz", "parquet"])
def test_what_cannot_be_cut_comes_in_windows_and_any_can_be_skipped_to(tmp_path, layout):
    texts = documents(600)
    path = write(tmp_path / "a", layout, texts, rows=10**6)
    order = epoch_order(data_config(path, block_bytes=3000))
    blocks = range(order.blocks(0))
    whole = [(b, n, w) for b in blocks for n, w in enumerate(windows(order, 0, b))]
    assert len([w for _, n, w in whole if n]) > 5
    assert all(w.last == (i + 1 == len(whole) or whole[i + 1][1] == 0) for i, (_, _, w) in enumerate(whole))
    assert all(sum(map(len, w.documents)) < 3000 * 3 // 2 + 400 for *_, w in whole)
    assert sorted(t.decode() for *_, w in whole for t in w.documents) == sorted(texts)
    for block, number, window in whole:
        assert listed([next(windows(order, 0, block, skip=number))]) == listed([window])


def test_documents_are_shuffled_across_the_units_of_a_block(tmp_path):
    path = write(tmp_path / "a", "jsonl", documents(2000))
    order = epoch_order(data_config(path, block_bytes=20_000))
    (window,) = windows(order, 0, 1)
    place = [int(text.split()[0][1:]) for text in window.documents]
    assert place != sorted(place)
    neighbours = np.abs(np.diff(place))
    assert np.median(neighbours) > 20


@pytest.mark.parametrize("layout", ["jsonl", "jsonl.gz", "arrow"])
def test_held_out_documents_are_never_trained_on(tmp_path, layout):
    texts = documents(1000)
    path = write(tmp_path / "a", layout, texts)
    order = epoch_order(data_config(path, holdout_fraction=0.1))
    train, held = set(epoch_documents(order)), set(epoch_documents(order, split="holdout"))
    assert not train & held
    assert train | held == set(texts)
    assert 60 < len(held) < 140
    for epoch in (1, 2):
        assert set(epoch_documents(order, epoch)) == train
        assert set(epoch_documents(order, epoch, "holdout")) == held


def test_a_document_is_held_out_by_its_text_alone(tmp_path):
    texts = documents(300)
    one = epoch_order(data_config(write(tmp_path / "a", "jsonl", texts), holdout_fraction=0.2))
    two = epoch_order(
        data_config(write(tmp_path / "b", "parquet", texts[::-1] + texts), holdout_fraction=0.2, data={"seed": 5})
    )
    assert set(epoch_documents(one, split="holdout")) == set(epoch_documents(two, split="holdout"))
    assert not epoch_documents(epoch_order(data_config(tmp_path / "a.jsonl")), split="holdout")


SIZES = {"big": 900, "mid": 60, "few": 7}


def languages(tmp_path, **settings):
    for language, count in SIZES.items():
        write(tmp_path / language / "data", "jsonl", documents(count, prefix=language))
    return epoch_order(data_config(tmp_path / "{language}" / "data.jsonl", **settings))


def copies_of(order, epochs):
    """Language -> how often its average document is read in an epoch."""
    counts = Counter(t.split()[0].rstrip("0123456789") for e in range(epochs) for t in epoch_documents(order, e))
    return {language: counts[language] / SIZES[language] / epochs for language in SIZES}


def test_temperature_one_is_every_document_once(tmp_path):
    assert copies_of(languages(tmp_path), 3) == {"big": 1, "mid": 1, "few": 1}


def test_temperature_raises_small_languages_up_to_their_cap(tmp_path):
    order = languages(tmp_path, language_temperature=0.3, language_max_repeats=4)
    copies = copies_of(order, 40)
    assert copies["few"] == copies["mid"] == 4
    natural = order.source.units[:, 3].sum()
    sizes = [order.copies(e) @ order.source.units[:, 3] for e in range(40)]
    assert abs(np.mean(sizes) / natural - 1) < 0.02
    assert 0.7 < copies["big"] < 0.9


def test_between_the_caps_a_share_is_bytes_to_the_temperature(tmp_path):
    order = languages(tmp_path, language_temperature=0.5, language_max_repeats=1000)
    sizes = np.bincount(order.source.unit_languages, weights=order.source.units[:, 3])
    read = np.zeros(3)
    for epoch in range(200):
        read += np.bincount(order.source.unit_languages, weights=order.copies(epoch) * order.source.units[:, 3])
    np.testing.assert_allclose(read / read.sum(), sizes**0.5 / (sizes**0.5).sum(), rtol=0.02)


def test_no_unit_waits_longer_than_its_rate_says(tmp_path):
    order = languages(tmp_path, language_temperature=0.0, language_max_repeats=1000)
    big = order.source.unit_languages == order.source.languages.index("big")
    copies = np.array([order.copies(e)[big] for e in range(60)])
    rate = copies.mean()
    assert rate < 0.5
    assert (np.abs(np.cumsum(copies, axis=0) - rate * np.arange(1, 61)[:, None]) <= 1.2).all()
