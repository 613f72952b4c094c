"""`easylm-mling data audit`: the documents of every row of a past batch, and its tokens, bit for bit.

Every checkpoint leaves its data state in RUN/data_states (see data/state_archive.py). An audit draws the batches again
from the newest state before the step: at most checkpoint.every_steps of them.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from easylm_mling.config import MixerConfig, StageConfig, from_tree, load_kept
from easylm_mling.data.catalog import Catalog, reopen_catalog
from easylm_mling.data.conversations.encoding import UNTRAINED
from easylm_mling.data.documents import encode_documents, has_conversations
from easylm_mling.data.estimates import catalog_rates, load_estimates
from easylm_mling.data.loader import Batch, Loader
from easylm_mling.data.mixture import BLOCK, DOCUMENT, EPOCH, OFFSET, WINDOW, DataState, initial_state
from easylm_mling.data.packing import choose_next, take
from easylm_mling.data.pool import Piece, Pool, is_pooled
from easylm_mling.data.shuffle import EpochOrder, unit_records, windows
from easylm_mling.data.state_archive import kept_steps, load_state
from easylm_mling.data.tokenization.tokenizer import Tokenizer
from easylm_mling.data.weights import make_plan
from easylm_mling.errors import ConfigError
from easylm_mling.storage.object_store import run_files

STATES, CATALOG, ESTIMATES = "data_states", "catalog.json", "estimates.json"


def audit(run_dir: str | Path, step: int, row: int | None = None) -> list[dict]:
    """Return the rows of the batch of `step`, or one of them: lane, source, tokens (int32 [T]) and documents.

    Each document has `language`, `file`, `unit` (its first position in the file, and the one after its last: see
    data/sources/readers.py), `document` (its number among the unit's good documents, from 0), `epoch`, `first` (which of
    its tokens is the first in the row; 0 is BOS), `tokens` (how many), and `begins` (the start of its text). A row's
    tokens are made twice, by the loader and from the documents named, and must agree.

    Raises ConfigError if the run has not done the step, or if its files have changed.
    """
    run = run_files(run_dir)
    config, before, fingerprints = _state_before(run, step, run_dir)
    if row is not None and not 0 <= row < config.batch_size:
        raise ConfigError(f"--row {row}: a batch has rows 0 to {config.batch_size - 1}")
    catalog, tokenizer = Catalog.load(run / CATALOG), Tokenizer(config.data.tokenizer)
    if fingerprints != {"data": catalog.fingerprint, "tokenizer": tokenizer.fingerprint}:
        raise ConfigError(
            f"{run_dir}: step {step} was drawn before the data was changed (--accept-data-change); only later steps can be audited"
        )
    catalog = reopen_catalog(catalog, config.data)
    plan = make_plan(config, catalog, catalog_rates(load_estimates(run / ESTIMATES)))
    state, drawn = before
    if state is None:
        languages = sum(len(source.languages) for source in catalog.sources.values())
        state = initial_state(config.lanes, len(catalog.sources), range(config.lanes), languages)
    with Loader(config, catalog, tokenizer, state, plan=plan) as loader:
        for _ in range(drawn + 1, step):
            state = next(loader)[1]
        return _rows(config, tokenizer, loader.orders, state, next(loader)[0], row)


def _state_before(run: Path, step: int, name: str | Path) -> tuple[MixerConfig, tuple[DataState | None, int], dict]:
    """Return the config that the batch of `step` was drawn by, the newest state before it with its step, and fingerprints."""
    kept = kept_steps(run / STATES)
    if step < 1 or step > max(kept, default=0):
        raise ConfigError(f"--step {step}: the checkpoints of {name} hold steps 1 to {max(kept, default=0)}")
    earlier, later = [k for k in kept if k < step], [k for k in kept if k >= step]
    # The stages are those that held when the next checkpoint was made: a run may have gone on with other ones.
    info = load_state(run / STATES, later[0]).info
    base = load_state(run / STATES, earlier[-1]) if earlier else None
    config = load_kept(run / "config.yaml")
    stages = tuple(from_tree(StageConfig, stage) for stage in info["stages"])
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, stages=stages, lanes=config.lanes))
    prints = {key: (base.info if base else info)[key] for key in ("data", "tokenizer")}
    mixer = dataclasses.replace(config.mixer, batch_size=config.batch_size_at(step))
    return mixer, (base.state, earlier[-1]) if base else (None, 0), prints


def _rows(
    config: MixerConfig,
    tokenizer: Tokenizer,
    orders: list[EpochOrder],
    before: DataState,
    batch: Batch,
    row: int | None,
) -> list[dict]:
    rows, length = [], config.data.sequence_length
    per_lane = config.batch_size // config.lanes
    pooled = _pooled_rows(config, tokenizer, orders, before, batch["source"].tolist(), row)
    for lane in range(config.lanes) if row is None else [row // per_lane]:
        readers: dict[int, Iterator[list[dict]]] = {}
        for r in range(lane * per_lane, (lane + 1) * per_lane):
            source = int(batch["source"][r])
            if source not in readers and not is_pooled(orders[source].source):
                cursor = before.lanes[lane, source]
                readers[source] = _pieces(orders[source], tokenizer, cursor, config.lanes, length)
            if row not in (None, r) and source not in readers:
                continue
            # No documents: a row of padding at the end of a run by epochs.
            documents = next(readers[source], []) if source in readers else pooled[r]
            tokens = batch["tokens"][r]
            made = np.concatenate([np.zeros(0, np.int32), *[d.pop("ids") for d in documents]]) & ~UNTRAINED
            if not np.array_equal(made, tokens[: len(made)]) or (tokens[len(made) :] != tokenizer.pad_id).any():
                raise ConfigError(f"row {r}: its tokens are not those of its documents; please report this as a bug")
            if row in (None, r):
                name = orders[source].source.name
                rows.append({"row": r, "lane": lane, "source": name, "tokens": tokens, "documents": documents})
    return rows


def _pooled_rows(
    config: MixerConfig,
    tokenizer: Tokenizer,
    orders: list[EpochOrder],
    before: DataState,
    sources: list[int],
    row: int | None,
) -> dict[int, list[dict]]:
    """Return the documents of each row, or of one, that is of a pooled source, with the `ids` of each, read anew.

    `sources`: that of each row of the batch.
    """
    lanes, per_lane, length = config.lanes, config.batch_size // config.lanes, config.data.sequence_length
    rows = {}
    with contextlib.ExitStack() as stack:
        pools = {}
        for s in set(sources):
            if is_pooled(orders[s].source):
                pools[s] = Pool(orders[s], tokenizer, before.lanes[:, s], range(0))
                stack.callback(pools[s].close)
        # Lanes take turns: which documents are left depends on the lanes before.
        for r in (lane * per_lane + turn for turn in range(per_lane) for lane in range(lanes)):
            if pool := pools.get(sources[r]):
                pieces = pool.take(r // per_lane, length)
                if row in (None, r):
                    rows[r] = [_document(orders[sources[r]], tokenizer, pool.provenance(p.document), p) for p in pieces]
    return rows


def _document(order: EpochOrder, tokenizer: Tokenizer, provenance: tuple[int, int], piece: Piece) -> dict:
    unit, number = provenance
    good = (record for record in unit_records(order.source, unit) if isinstance(record, bytes))
    text = next(islice(good, number, None))
    whole = encode_documents(order.source, tokenizer, [text]).tokens
    ids = whole[piece.first : piece.first + piece.tokens]
    about = _about(order, unit, number, piece.epoch, piece.first, text, ids)
    return {**about, "tokens": piece.tokens}


def _about(order: EpochOrder, unit: int, number: int, epoch: int, first: int, text: bytes, ids: np.ndarray) -> dict:
    index, start, end, _ = order.source.units[unit].tolist()
    file = order.source.files[index]
    return {
        "language": file.language,
        "file": file.name,
        "unit": [start, end],
        "document": number,
        "epoch": epoch,
        "first": first,
        "begins": text[:60].decode(errors="ignore"),
        "ids": ids,
    }


def _pieces(
    order: EpochOrder, tokenizer: Tokenizer, cursor: np.ndarray, lanes: int, length: int
) -> Iterator[list[dict]]:
    """Yield the documents of each row of a lane's stream from `cursor` on, with the `ids` of each."""
    if has_conversations(order.source):
        yield from _whole_rows(order, tokenizer, cursor, lanes, length)
        return
    row, room = [], length
    for document in _documents(order, tokenizer, cursor, lanes):
        ids, first = document.pop("ids"), document["first"]
        while len(ids):
            part, ids = ids[:room], ids[room:]
            row.append({**document, "first": first, "tokens": len(part), "ids": part})
            first, room = first + len(part), room - len(part)
            if not room:
                yield row
                row, room = [], length
    if row:
        yield row


def _whole_rows(
    order: EpochOrder, tokenizer: Tokenizer, cursor: np.ndarray, lanes: int, length: int
) -> Iterator[list[dict]]:
    """Yield the conversations of each row of a lane's stream from `cursor` on, with the `ids` of each."""
    row: list[dict] = []
    room, at = length, [int(cursor[c]) for c in (DOCUMENT, OFFSET)]
    for window in _encoded_windows(order, tokenizer, cursor, lanes):
        ends = np.cumsum([len(d["ids"]) for d in window], dtype=np.int64)
        while at[0] < len(window):
            chosen = choose_next(ends, *at, room, not row)
            if chosen is None:
                yield row
                row, room = [], length
                continue
            row.append({**window[chosen], "tokens": len(window[chosen]["ids"])})
            room -= row[-1]["tokens"]
            at = list(take(*at, chosen))
        at = [0, 0]
    if row:
        yield row


def _encoded_windows(order: EpochOrder, tokenizer: Tokenizer, cursor: np.ndarray, lanes: int) -> Iterator[list[dict]]:
    """Yield the conversations of a lane's windows from the one at `cursor` on, those that are refused left out."""
    for epoch, documents in _windows(order, cursor, lanes):
        encoded = []
        for text, (unit, number) in documents:
            ids = encode_documents(order.source, tokenizer, [text]).tokens
            if len(ids):
                encoded.append(_about(order, unit, number, epoch, 0, text, ids))
        yield encoded


def _documents(order: EpochOrder, tokenizer: Tokenizer, cursor: np.ndarray, lanes: int) -> Iterator[dict]:
    """Yield a lane's documents from a cursor on."""
    first, offset = (int(cursor[c]) for c in (DOCUMENT, OFFSET))
    for epoch, documents in _windows(order, cursor, lanes):
        for text, (unit, number) in documents[first:]:
            ids = encode_documents(order.source, tokenizer, [text]).tokens[offset:]
            yield _about(order, unit, number, epoch, offset, text, ids)
            offset = 0
        first = 0


def _windows(
    order: EpochOrder, cursor: np.ndarray, lanes: int
) -> Iterator[tuple[int, list[tuple[bytes, tuple[int, int]]]]]:
    """Yield the epoch and the documents of a lane's windows, without data/streams.py, which the audit checks, too."""
    epoch, block, skip = (int(cursor[c]) for c in (EPOCH, BLOCK, WINDOW))
    while order.epochs is None or epoch < order.epochs:
        blocks = order.blocks(epoch)
        if block >= blocks:
            epoch, block = epoch + 1, block - blocks
            continue
        for window in windows(order, epoch, block, skip=skip):
            yield epoch, list(zip(window.documents, map(tuple, window.provenance.tolist()), strict=True))
        block, skip = block + lanes, 0
