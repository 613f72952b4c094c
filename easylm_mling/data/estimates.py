"""How many tokens a corpus holds, estimated from a sample of each of its languages."""

import json
from pathlib import Path
from typing import NamedTuple

from easylm_mling.data.catalog import Catalog, Source
from easylm_mling.data.shuffle import seeded_order, unit_records
from easylm_mling.data.tokenization.tokenizer import Tokenizer
from easylm_mling.data.weights import TokensPerByte
from easylm_mling.storage.atomic import write_atomically

# Units read of each source, at least one of each language.
_UNITS = 8
# A unit that cannot be cut small is read so far; of the text read of a language, so much is tokenised.
_READ_BYTES = 4_000_000
_TOKENISED_BYTES = 64_000


class Estimate(NamedTuple):
    """Of one language: bytes of text in a byte of the catalog (JSON and the like take room), tokens in a byte of text."""

    text_per_byte: float
    tokens_per_text: float


# Source -> language -> estimate.
Estimates = dict[str, dict[str, Estimate]]


def estimate(catalog: Catalog, tokenizer: Tokenizer) -> Estimates:
    """A pure function of the files and the tokenizer. Raises ConfigError for a damaged file.

    Reads about a unit of each language, or 4 MB of it. A language without a good document in that has estimates of 0.
    """
    return {name: _estimate_source(source, tokenizer) for name, source in catalog.sources.items()}


def open_estimates(path: Path, catalog: Catalog, tokenizer: Tokenizer) -> Estimates:
    """The estimates kept in `path` if they are of this catalog and tokenizer, else new ones, which are then kept."""
    fingerprints = {"data": catalog.fingerprint, "tokenizer": tokenizer.fingerprint}
    if path.exists() and pinned_fingerprints(path) == fingerprints:
        return load_estimates(path)
    fresh = estimate(catalog, tokenizer)
    write_atomically(path, json.dumps({**fingerprints, "sources": fresh}).encode())
    return fresh


def load_estimates(path: Path) -> Estimates:
    """What `open_estimates` kept."""
    kept = json.loads(path.read_bytes())["sources"]
    return {name: {language: Estimate(*e) for language, e in of.items()} for name, of in kept.items()}


def pinned_fingerprints(path: Path) -> dict[str, str]:
    """Of what the kept estimates are: `data` and `tokenizer`."""
    kept = json.loads(path.read_bytes())
    return {key: kept[key] for key in ("data", "tokenizer")}


def tokens_per_byte(estimates: Estimates) -> TokensPerByte:
    """Tokens in a byte of the catalog, as the plan wants them."""
    return {
        name: {language: e.text_per_byte * e.tokens_per_text for language, e in of.items()}
        for name, of in estimates.items()
    }


def _estimate_source(source: Source, tokenizer: Tokenizer) -> dict[str, Estimate]:
    each = max(1, _UNITS // len(source.languages))
    order = seeded_order(len(source.units), source.name, "estimate")
    chosen: dict[int, list[int]] = {}
    for unit in order.tolist():
        units = chosen.setdefault(int(source.unit_languages[unit]), [])
        if len(units) < each:
            units.append(unit)
    return {
        language: _estimate_units(source, chosen.get(i, []), tokenizer) for i, language in enumerate(source.languages)
    }


def _estimate_units(source: Source, units: list[int], tokenizer: Tokenizer) -> Estimate:
    texts, size, text_size = [], 0, 0
    for unit in units:
        read, whole = 0, True
        for record in unit_records(source, unit):
            if isinstance(record, bytes):
                texts.append(record)
                read += len(record)
            if read > _READ_BYTES:
                whole = False
                break
        # Of a unit that was not read to its end, only the catalog knows how large it is.
        size += int(source.units[unit, 3]) if whole else read
        text_size += read
    sample, tokenised = [], 0
    for i in seeded_order(len(texts), source.name, "sample").tolist():
        if tokenised >= _TOKENISED_BYTES:
            break
        sample.append(texts[i][:_TOKENISED_BYTES].decode(errors="ignore"))
        tokenised += len(texts[i][:_TOKENISED_BYTES])
    if not tokenised:
        return Estimate(0.0, 0.0)
    # Every document has a BOS and an EOS besides.
    tokens = sum(len(ids) + 2 for ids in tokenizer.encode(sample))
    return Estimate(text_size / size, tokens / tokenised)
