"""The promises of the mixer for conversations: whole in rows that are nearly full, the same bits on any hosts and restarts."""

import dataclasses
import gzip
import json
from collections import Counter

import numpy as np
import orjson
import pytest
from conversation_cases import conversation, encoder, texts, tokenizer
from data_corpus import assert_same, data_config, run_config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from easylm_mling.config import ConversationConfig, SourceConfig
from easylm_mling.data import pool
from easylm_mling.data.catalog import build_catalog, reopen_catalog
from easylm_mling.data.conversations.encoding import UNTRAINED
from easylm_mling.data.holdout import holdout_rows
from easylm_mling.data.loader import Loader
from easylm_mling.data.mixture import BAD, DOCUMENTS, GOOD, PADDING, TOKENS, whole_state
from easylm_mling.data.packing import LOOKAHEAD, choose_next, take
from easylm_mling.data.shuffle import open_orders
from easylm_mling.data.token_cache import TokenCache
from easylm_mling.data.weights import make_plan
from easylm_mling.errors import ConfigError

T = 128
TOKENIZER = "data/sample/tokenizer/tokenizer.model"


def rows_of(count: int, seed: int = 0) -> list[dict]:
    """Different conversations of one to three exchanges in four languages."""
    rng, rows = np.random.default_rng(seed), []
    for i in range(count):
        turns = [
            texts(("ja", "ko", "zh", "en")[i % 4])[int(rng.integers(300))] for _ in range(2 * int(rng.integers(1, 4)))
        ]
        turns[0] = f"{seed}.{i} {turns[0][: int(rng.integers(1, 40))]}"
        rows.append(
            {"messages": [{"role": ("user", "assistant")[k % 2], "content": t[:60]} for k, t in enumerate(turns)]}
        )
    return rows


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("rows")
    for name, count in (("chat", 90), ("few", 5)):
        lines = [orjson.dumps(row) for row in rows_of(count, seed=len(name))]
        # Every way to be bad: unreadable, no conversation, nothing to learn.
        lines[3:3] = [
            b"{",
            b'{"messages": []}',
            orjson.dumps(
                {"messages": [{"role": "user", "content": "x " * 400}, {"role": "assistant", "content": "y"}]}
            ),
        ]
        (root / f"{name}.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    with open(root / "text.jsonl", "w") as file:
        file.writelines(json.dumps({"text": t}) + "\n" for t in texts("en")[:60])
    return root


def source(path, weight=1.0, **settings) -> SourceConfig:
    about = {"template": "gemma"} | settings.pop("conversations", {})
    made = None if path.stem == "text" else ConversationConfig(**about)
    return SourceConfig((str(path),), weight, conversations=made, **{"holdout_fraction": 0.0, **settings})


def build(sources: dict[str, SourceConfig], lanes: int, per_lane: int = 1, **data):
    made = data_config(sources, length=T, tokenizer=TOKENIZER, data={"lanes": lanes, **data})
    config = run_config(made, lanes * per_lane)
    return config, build_catalog(config.data)


def draw(config, catalog, steps, hosts=1, state=None, quarantine=None):
    each = config.lanes // hosts
    loaders = [
        Loader(
            config.mixer, catalog, tokenizer(), state, range(h * each, (h + 1) * each), quarantine if not h else None
        )
        for h in range(hosts)
    ]
    made = []
    for _ in range(steps):
        got = [next(loader, None) for loader in loaders]
        if any(item is None for item in got):
            break
        batches, states = zip(*got, strict=True)
        made.append(({k: np.concatenate([b[k] for b in batches]) for k in batches[0]}, whole_state(list(states))))
    for loader in loaders:
        loader.flush()
        loader.close()
    return made


def whole_conversations(batch, row) -> list[np.ndarray]:
    """The tokens of each segment of a row, UNTRAINED added to those that are no targets of the row before them."""
    segments, tokens = batch["segment_ids"][row], batch["tokens"][row]
    trained = np.concatenate([[False], batch["loss_mask"][row][:-1] > 0])
    marked = np.where(trained, tokens, tokens | UNTRAINED)
    return [marked[segments == s] for s in range(1, segments.max() + 1)]


def check_batches(batches, number, wanted: dict[bytes, str]) -> Counter:
    """Every row of source `number` is conversations of `wanted`, whole; returns how often each was read."""
    read = Counter()
    for batch, _ in batches:
        for row in np.flatnonzero(batch["source"] == number):
            parts = whole_conversations(batch, row)
            read.update(wanted[part.astype(np.int32).tobytes()] for part in parts)
            real = sum(map(len, parts))
            assert (batch["segment_ids"][row][:real] > 0).all() and not batch["segment_ids"][row][real:].any()
            assert not batch["loss_mask"][row][real - 1 :].any() and batch["loss_mask"][row].any()
            positions = [np.arange(len(p)) for p in parts]
            np.testing.assert_array_equal(batch["positions"][row][:real], np.concatenate(positions))
            kept = batch["loss_mask"][row] > 0
            np.testing.assert_array_equal(batch["targets"][row][:-1][kept[:-1]], batch["tokens"][row][1:][kept[:-1]])
    return read


def wanted_of(root, name) -> dict[bytes, str]:
    count = {"chat": 90, "few": 5}[name]
    e = encoder("gemma", length=T)
    made = [orjson.dumps(row) for row in rows_of(count, seed=len(name))]
    return {e.encode(text).tobytes(): text.decode() for text in made}


@st.composite
def mixtures(draw):
    names = draw(st.lists(st.sampled_from(["chat", "few", "text"]), min_size=1, max_size=3, unique=True))
    capped = draw(st.booleans())
    rule = {"max_epochs": 2, "when_used_up": "redistribute"} if capped else {}
    return (
        {n: {"weight": draw(st.integers(1, 5)), **rule} for n in names},
        draw(st.sampled_from([1, 2, 4])),
        draw(st.sampled_from([1, 2])),
    )


@settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(mixtures(), st.data())
def test_any_mixture_is_the_same_on_any_hosts_across_any_stops(root, mixture, data):
    # All sources pooled, none, or the small ones.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool, "POOLED_BYTES", data.draw(st.sampled_from([0, 4000, 10**6]), label="pooled"))
        names, lanes, per_lane = mixture
        config, catalog = build({n: source(root / f"{n}.jsonl", **s) for n, s in names.items()}, lanes, per_lane)
        whole = draw(config, catalog, 25)
        first, second = sorted(data.draw(st.lists(st.integers(0, len(whole)), min_size=2, max_size=2), label="stops"))
        counts = data.draw(st.lists(st.sampled_from([h for h in (1, 2, 4) if lanes % h == 0]), min_size=3, max_size=3))
        pieces, state = [], None
        for steps, hosts in zip((first, second - first, 25 - second), counts, strict=True):
            pieces += draw(config, catalog, steps, hosts, state)
            state = pieces[-1][1] if pieces else None
        assert_same(pieces, whole)
        for i, name in enumerate(names):
            if name != "text" and whole:
                read = check_batches(whole, i, wanted_of(root, name))
                assert whole[-1][1].lanes[:, i, DOCUMENTS].sum() == read.total()
                if "max_epochs" in names[name]:
                    assert max(read.values(), default=0) <= 2
        if whole:
            final = whole[-1][1]
            assert final.lanes[..., [TOKENS, PADDING]].sum() == len(whole) * lanes * per_lane * T
            assert final.languages[:, 0].sum() == final.lanes[..., TOKENS].sum()
            assert final.languages[:, 1].sum() == final.lanes[..., DOCUMENTS].sum()
            assert final.languages[:, 2].sum() == final.lanes[..., BAD].sum()


@pytest.mark.parametrize("pooled", [0, 10**6])
def test_an_epoch_has_every_conversation_once_and_bad_rows_are_written_down(root, tmp_path, monkeypatch, pooled):
    monkeypatch.setattr(pool, "POOLED_BYTES", pooled)
    rule = {"max_epochs": 1, "when_used_up": "stop"}
    config, catalog = build({"chat": source(root / "chat.jsonl", **rule)}, 1)
    batches = draw(config, catalog, 10_000, quarantine=tmp_path / "quarantine.jsonl")
    wanted = wanted_of(root, "chat")
    read = check_batches(batches, 0, wanted)
    assert read == Counter(wanted.values())
    entries = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    content = (root / "chat.jsonl").read_bytes()
    assert {e["reason"]: content[e["offset"] :].split(b"\n")[0][:200].decode() == e["head"] for e in entries} == {
        "invalid JSON": True, "no answer": True, f"no token of an answer is in the first {T} tokens": True,
    }  # fmt: skip
    final = batches[-1][1].lanes
    assert (final[..., BAD].sum(), final[..., GOOD].sum()) == (3, 90)


@pytest.mark.parametrize("packed", [False, True])
def test_lanes_that_share_a_file_read_every_conversation_once(root, tmp_path, monkeypatch, packed):
    """One file for four lanes: each parses a part of its rows, and the bad ones of its part are written down."""
    monkeypatch.setattr(pool, "POOLED_BYTES", 0)
    path, content = root / "chat.jsonl", (root / "chat.jsonl").read_bytes()
    if packed:
        path = tmp_path / "chat.jsonl.gz"
        path.write_bytes(gzip.compress(content))
    rule = {"max_epochs": 2, "when_used_up": "redistribute"}
    sources = {"chat": source(path, **rule), "text": source(root / "text.jsonl")}
    config, catalog = build(sources, 4, **{"max_bad_fraction": 1.0})
    orders = open_orders(config.mixer, catalog, make_plan(config.mixer, catalog, None))
    assert orders[0].shares_units and len(catalog.sources["chat"].units) < 4 * 32
    batches = draw(config, catalog, 400, quarantine=tmp_path / "q.jsonl")
    wanted = wanted_of(root, "chat")
    assert check_batches(batches, 0, wanted) == Counter({text: 2 for text in wanted.values()})
    final = batches[-1][1].lanes[:, 0]
    assert (final[:, BAD].sum(), final[:, GOOD].sum()) == (6, 180)
    assert final[:, DOCUMENTS].sum() == 180 and np.count_nonzero(final[:, DOCUMENTS]) == 4
    # Each at its place in the file: the row that is refused, and no other of its number in another part.
    entries = [json.loads(line) for line in (tmp_path / "q.jsonl").read_text().splitlines()]
    assert len(entries) == 6
    for entry in entries:
        assert ("no token of an answer" in entry["reason"]) == ("x x x" in entry["head"])
        if not packed:
            assert content[entry["offset"] :].split(b"\n")[0][:200].decode() == entry["head"]


def test_a_conversation_that_is_dropped_is_listed_and_not_counted(root, tmp_path):
    about = {"conversations": {"too_long": "drop"}, "max_epochs": 1, "when_used_up": "stop"}
    config, catalog = build({"chat": source(root / "chat.jsonl", **about)}, 1)
    batches = draw(config, catalog, 10_000, quarantine=tmp_path / "q.jsonl")
    reasons = Counter(
        json.loads(line)["reason"].partition(",")[2] for line in (tmp_path / "q.jsonl").read_text().splitlines()
    )
    dropped = reasons[f" longer than a row of {T} (too_long: drop)"]
    final = batches[-1][1].lanes
    assert dropped > 1 and final[..., BAD].sum() == 2 and final[..., GOOD].sum() == 91 - dropped
    assert final[..., DOCUMENTS].sum() == 91 - dropped


def test_tokens_from_the_cache_are_the_same_bits(root, tmp_path, monkeypatch):
    monkeypatch.setattr(pool, "POOLED_BYTES", 0)
    config, catalog = build({"chat": source(root / "chat.jsonl")}, 2)
    plain = draw(config, catalog, 20)
    cached, _ = build({"chat": source(root / "chat.jsonl")}, 2, token_cache=str(tmp_path / "cache"))
    cache = TokenCache(tmp_path / "cache", tokenizer())
    (order,) = open_orders(cached.mixer, catalog, make_plan(cached.mixer, catalog, None))
    for block in range(order.blocks(0)):
        assert cache.fill(order, 0, block) > 0
    assert_same(draw(cached, catalog, 20), plain)


def test_validation_has_whole_conversations_that_are_never_trained_on(root):
    config, catalog = build({"chat": source(root / "chat.jsonl", holdout_fraction=0.3)}, 1)
    batch = holdout_rows(config.mixer, catalog, tokenizer(), "chat", 100)
    wanted = wanted_of(root, "chat")
    held = check_batches([(batch, None)], 0, wanted)
    assert 10 < held.total() == len(held) < 50
    read = check_batches(draw(config, catalog, 60), 0, wanted)
    assert not held.keys() & read.keys() and len(held) + len(read) == 90


def test_another_template_is_another_run(root, tmp_path):
    form = tmp_path / "own.yaml"
    form.write_text("prompt: 'Q: {user}\\nA: '\n")
    config, catalog = build({"chat": source(root / "chat.jsonl", conversations={"template": str(form)})}, 1)
    assert reopen_catalog(catalog, config.data).fingerprint == catalog.fingerprint
    form.write_text("prompt: 'q: {user}\\na: '\n")
    with pytest.raises(
        ConfigError, match="data.sources.chat.conversations or its template is not the one that this run began"
    ):
        reopen_catalog(catalog, config.data)


def test_a_source_of_texts_keeps_the_catalog_that_it_had(root):
    _, catalog = build({"text": source(root / "text.jsonl")}, 1)
    assert "conversations" not in catalog.sources["text"].settings


@pytest.mark.parametrize("name, message", [
    ("notes.txt", "a text file holds no conversations"),
    ("text.jsonl", "no field 'messages' in its first 60 rows; set conversations.keys.messages to one of: text"),
])  # fmt: skip
def test_a_file_without_conversations_is_refused(root, name, message):
    (root / "notes.txt").write_text("hello\n")
    with pytest.raises(ConfigError, match=message):
        build({"x": SourceConfig((str(root / name),), 1.0, conversations=ConversationConfig(template="gemma"))}, 1)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=200), st.integers(40, 90))
def test_packing_takes_each_document_once_the_oldest_first(lengths, room):
    ends, cursor, taken, seen = np.cumsum(lengths), 0, 0, []
    while cursor < len(ends):
        left, oldest, row = room, cursor, []
        while cursor < len(ends) and (chosen := choose_next(ends, cursor, taken, left, not row)) is not None:
            assert chosen < cursor + LOOKAHEAD and lengths[chosen] <= left
            row.append(chosen)
            left -= lengths[chosen]
            cursor, taken = take(cursor, taken, chosen)
            assert 0 <= taken < 1 << 62
        assert row[0] == oldest
        seen += row
    assert sorted(seen) == list(range(len(lengths)))


def test_rows_of_4096_are_nearly_full():
    """Lengths as those of real answers: mean 1,069, median 928, a few longer than a row."""
    rng = np.random.default_rng(0)
    lengths = np.minimum(np.exp(rng.normal(np.log(928), 0.55, 2000)).astype(int) + 5, 4096)
    ends, cursor, taken, rows = np.cumsum(lengths), 0, 0, 0
    while cursor < len(ends):
        left = 4096
        while cursor < len(ends) and (chosen := choose_next(ends, cursor, taken, left, left == 4096)) is not None:
            left -= int(lengths[chosen])
            cursor, taken = take(cursor, taken, chosen)
        rows += 1
    assert lengths.sum() / (rows * 4096) > 0.99


def test_a_template_without_a_place_in_the_files_is_one_line(root):
    config = dataclasses.replace(source(root / "chat.jsonl"), conversations=ConversationConfig(template="tokenizer"))
    with pytest.raises(
        ConfigError, match="data.sources.chat.conversations.template=tokenizer: .* has no chat template"
    ):
        build({"chat": config}, 1)
    assert conversation("q", "a")
