"""How many tokens a corpus holds, estimated from a sample of each of its languages."""

import json
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from easylm_mling.data.catalog import Catalog, Source
from easylm_mling.data.documents import encode_documents, has_conversations
from easylm_mling.data.shuffle import seeded_order, unit_records
from easylm_mling.data.sources.columnar import open_parquet
from easylm_mling.data.sources.lines import file_lines
from easylm_mling.data.tokenization.tokenizer import Tokenizer
from easylm_mling.data.weights import Rate, Rates
from easylm_mling.errors import ConfigError, check_format, one_line
from easylm_mling.storage.atomic import write_atomically
from easylm_mling.storage.files import open_binary

# Units read of each source; at least one of each language, and more of them where they are small: these bytes of a source.
_UNITS, _LEAST_BYTES = 8, 1_000_000
# At most so many bytes are read of a unit, and tokenised of a language.
_READ_BYTES = 4_000_000
_TOKENISED_BYTES = 64_000
_FORMAT = 1
_REMOVE = "remove the file: the next start makes it anew from the same files"


class Estimate(NamedTuple):
    """Of one language: bytes of text per byte of the catalog (JSON takes room, too), and tokens per byte of text."""

    text_per_byte: float
    tokens_per_text: float


# Source -> language -> estimate.
Estimates = dict[str, dict[str, Estimate]]


def estimate(catalog: Catalog, tokenizer: Tokenizer) -> Estimates:
    """Estimate every language of every source: a pure function of the files and the tokenizer.

    Reads about a unit of each language, or 4 MB of it. A language whose sample has no good document gets 0. Raises
    ConfigError for a damaged file.
    """
    return {name: _estimate_source(source, tokenizer) for name, source in catalog.sources.items()}


def open_estimates(path: Path, catalog: Catalog, tokenizer: Tokenizer) -> Estimates:
    """Return the estimates saved in `path` if they are of this catalog and tokenizer; else make and save new ones."""
    fingerprints = {"data": catalog.fingerprint, "tokenizer": tokenizer.fingerprint}
    if path.exists() and pinned_fingerprints(path) == fingerprints:
        return load_estimates(path)
    fresh = estimate(catalog, tokenizer)
    write_atomically(path, json.dumps({"format": _FORMAT, **fingerprints, "sources": fresh}).encode())
    return fresh


def load_estimates(path: Path) -> Estimates:
    """Read what `open_estimates` saved; raises ConfigError for a damaged file or one of an unknown format."""
    sources = _read(path)["sources"]
    return {name: {language: Estimate(*e) for language, e in of.items()} for name, of in sources.items()}


def pinned_fingerprints(path: Path) -> dict[str, str]:
    """Return the fingerprints, `data` and `tokenizer`, of what was estimated; raises as `load_estimates` does."""
    saved = _read(path)
    return {key: saved[key] for key in ("data", "tokenizer")}


def _read(path: Path) -> dict:
    try:
        saved = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not readable as estimates ({one_line(error)}); {_REMOVE}") from error
    number = saved.get("format") if isinstance(saved, dict) else None
    check_format(path, "file of estimates", number, _FORMAT, _REMOVE)
    return saved


def catalog_rates(estimates: Estimates) -> Rates:
    """Return text and tokens per byte of the catalog, as `make_plan` takes them."""
    return {
        name: {language: Rate(e.text_per_byte, e.text_per_byte * e.tokens_per_text) for language, e in of.items()}
        for name, of in estimates.items()
    }


def _estimate_source(source: Source, tokenizer: Tokenizer) -> dict[str, Estimate]:
    each, least = max(1, _UNITS // len(source.languages)), _LEAST_BYTES // len(source.languages)
    order = seeded_order(len(source.units), source.name, "estimate")
    chosen: dict[int, list[int]] = {}
    sizes: dict[int, int] = {}
    for unit in order.tolist():
        language = int(source.unit_languages[unit])
        units = chosen.setdefault(language, [])
        if len(units) < each or sizes[language] < least:
            units.append(unit)
            sizes[language] = sizes.get(language, 0) + int(source.units[unit, 3])
    return {
        language: _estimate_units(source, chosen.get(i, []), tokenizer) for i, language in enumerate(source.languages)
    }


def _estimate_units(source: Source, units: list[int], tokenizer: Tokenizer) -> Estimate:
    texts, size, text_size = [], 0, 0
    for unit in units:
        read, records, is_complete = 0, 0, True
        # An Arrow batch is mapped or in memory as a whole, and its size says nothing of a part of it.
        in_parts = not source.files[int(source.units[unit, 0])].layout.startswith("arrow")
        for record in unit_records(source, unit):
            records += 1
            if isinstance(record, bytes):
                if read <= _READ_BYTES:
                    texts.append(record)
                read += len(record)
            if in_parts and read > _READ_BYTES:
                is_complete = False
                break
        # The catalog's size is of the whole unit.
        size += int(source.units[unit, 3]) if is_complete else _size_of_first(source, unit, records, read)
        text_size += read
    sample, tokenised = [], 0
    # In an order of the texts' own, so that a corpus has one estimate in every file format and under every name.
    for text in sorted(texts, key=lambda text: blake2b(text, digest_size=8).digest()):
        if tokenised >= _TOKENISED_BYTES:
            break
        part = text if has_conversations(source) else text[:_TOKENISED_BYTES]
        sample.append(_whole_letters(part))
        tokenised += len(part)
    if not tokenised:
        return Estimate(0.0, 0.0)
    # With what surrounds a document: BOS and EOS, or the template.
    tokens = len(encode_documents(source, tokenizer, sample).tokens)
    return Estimate(text_size / size, tokens / tokenised)


def _whole_letters(text: bytes) -> bytes:
    """Return UTF-8 that may be cut inside a letter without that letter."""
    return text.decode(errors="ignore").encode()


def _size_of_first(source: Source, unit: int, records: int, text: int) -> int:
    """Return the catalog's bytes of a unit's first `records` records.

    For JSON those of their lines, for parquet their part of the encoded column, else their `text`.
    """
    index, start, end, encoded = source.units[unit].tolist()
    file = source.files[index]
    if file.layout == "parquet":
        with open_binary(file.name, source.retry) as binary:
            metadata = open_parquet(binary).metadata
            groups = range(start, end)
            return max(1, encoded * records // sum(metadata.row_group(g).num_rows for g in groups))
    if not file.layout.startswith("jsonl") or source.settings["row"] == "line":
        return text
    size = 0
    for _, line in islice(file_lines(file.name, file.layout, start, end, source.retry), records):
        size += len(line)
    return max(size, text)
