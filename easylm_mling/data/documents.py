"""The documents of a source as tokens: texts between BOS and EOS, or conversations with the tokens that are no targets marked.

A conversation that its template cannot write, or that holds nothing to learn, is a bad record like a row that cannot be
read. One that is too long, and is to be dropped, is listed with them but counts as neither bad nor good.
"""

from collections.abc import Container, Iterable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import orjson

from easylm_mling.config import ConversationConfig, from_tree
from easylm_mling.data.catalog import Source
from easylm_mling.data.conversations.encoding import ConversationEncoder, TooLong
from easylm_mling.data.shuffle import EpochOrder, Part, Window, unit_conversations
from easylm_mling.data.sources.readers import BadRecord
from easylm_mling.data.tokenization.tokenizer import Tokenizer, document_ends, join_documents


class Encoded(NamedTuple):
    """Documents end to end: `tokens`, int32, and `ends`, int64, where each ends in them.

    `kept` numbers the texts that they are of; `refused` says for the others why.
    """

    tokens: np.ndarray
    ends: np.ndarray
    kept: list[int]
    refused: dict[int, ValueError]


def has_conversations(source: Source) -> bool:
    """Return True if the source's documents are conversations, which are packed whole into rows."""
    return "conversations" in source.settings


def conversation_encoder(source: Source, tokenizer: Tokenizer) -> ConversationEncoder:
    """Return the encoder of a source of conversations; raises ConfigError for a template that does not fit."""
    return _encoder(source.name, orjson.dumps(source.settings["conversations"]), tokenizer)


@lru_cache(maxsize=16)
def _encoder(name: str, settings: bytes, tokenizer: Tokenizer) -> ConversationEncoder:
    tree = orjson.loads(settings)
    config, key = from_tree(ConversationConfig, tree["config"]), f"data.sources.{name}.conversations"
    return ConversationEncoder(config, tree["template"], tokenizer, tree["length"], key)


def encode_documents(source: Source, tokenizer: Tokenizer, texts: list[bytes]) -> Encoded:
    """Return the tokens of documents of the source."""
    if not has_conversations(source):
        tokens = join_documents(tokenizer, [text.decode() for text in texts])
        return Encoded(tokens, document_ends(tokenizer, tokens), list(range(len(texts))), {})
    encoder = conversation_encoder(source, tokenizer)
    parts, kept, refused = [np.zeros(0, np.int32)], [], {}
    for i, text in enumerate(texts):
        try:
            parts.append(encoder.encode(text))
            kept.append(i)
        except ValueError as error:
            refused[i] = error
    return Encoded(np.concatenate(parts), np.cumsum([len(p) for p in parts[1:]], dtype=np.int64), kept, refused)


def encode_window(
    order: EpochOrder, tokenizer: Tokenizer, epoch: int, block: int, window: Window
) -> tuple[np.ndarray, np.ndarray, Window]:
    """Return the tokens of a block's window, where its documents end in them, and it without those that were refused."""
    encoded = encode_documents(order.source, tokenizer, window.documents)
    if not encoded.refused:
        return encoded.tokens, encoded.ends, window
    places = [tuple(window.provenance[i].tolist()) for i in encoded.refused]
    refused = dict(zip(places, encoded.refused.values(), strict=True))
    records, bad_units = refused_records(order.source, refused, order.parts(epoch, block))
    return (
        encoded.tokens,
        encoded.ends,
        window._replace(
            documents=[window.documents[i] for i in encoded.kept],
            provenance=window.provenance[encoded.kept],
            bad=window.bad + records,
            bad_units=window.bad_units + bad_units,
            good=window.good - len(encoded.refused),
        ),
    )


def refused_records(
    source: Source, refused: dict[tuple[int, int], ValueError], parts: Iterable[Part]
) -> tuple[list[BadRecord], list[int]]:
    """Return what the quarantine lists of refused conversations, and the units of those that count as bad.

    `refused`: (unit, number among the good documents of the unit's part) -> reason. `parts` are those that were read; they
    are read again, for the offsets.
    """
    records = []
    for part in sorted({part for part in parts if any(unit == part.unit for unit, _ in refused)}):
        reasons = {number: reason for (unit, number), reason in refused.items() if unit == part.unit}
        file = source.files[int(source.units[part.unit, 0])].name
        for number, (offset, head) in _places(source, part, reasons).items():
            records.append(BadRecord(str(reasons[number]), file, offset, head))
    return records, sorted(unit for (unit, _), reason in refused.items() if not isinstance(reason, TooLong))


def _places(source: Source, part: Part, wanted: Container[int]) -> dict[int, tuple[int, bytes]]:
    """Return offset and head of documents of a part of a unit, by their numbers among its good ones."""
    items = unit_conversations(source, part.unit, None if part.is_whole else part.holds)
    good = (item for item in items if not isinstance(item, BadRecord))
    return {n: (offset, head) for n, (offset, head, _) in enumerate(good) if n in wanted}
