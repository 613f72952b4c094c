"""Which models can be merged: their configs, heads, shapes and tokenizers compared before a byte is written."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from easylm_mling.config import ModelConfig
from easylm_mling.data.tokenization.files import JSON, MODEL
from easylm_mling.data.tokenization.tokenizer import Tokenizer, fingerprints
from easylm_mling.errors import ConfigError, check
from easylm_mling.hf.config import hf_config
from easylm_mling.merge.recipe import MergeRecipe
from easylm_mling.merge.sources import Source

_IDS = ("pad_token_id", "bos_token_id", "eos_token_id", "stop_token_ids")
# What does not change the function that the weights compute.
_MAY_DIFFER = {
    "vocab_size",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "max_position_embeddings",
    "initializer_range",
}


def merged_model(recipe: MergeRecipe, sources: Sequence[Source]) -> tuple[ModelConfig, Source, list[str]]:
    """Return the merged model's config, the source whose tokenizer it gets, and notes, one line each.

    The first of `sources` gives both, but for `recipe.tokenizer`. Raises ConfigError for models of other shapes or settings,
    and for tokenizers of which one does not continue the other.
    """
    first, *others = sources
    notes = [note for other in others for note in _compared(first, other, recipe.vocabulary)]
    teller = _tokenizer_source(recipe, sources)
    if teller is first:
        return first.model, first, notes
    ours, theirs = _pieces_of(first), _pieces_of(teller)
    check(
        theirs is not None and (ours is None or theirs.vocab_size == ours.vocab_size),
        f"tokenizer={recipe.tokenizer}: it does not have the pieces of {first.ref.text}; name another model, or none",
    )
    ids = {name: getattr(teller.model, name) for name in _IDS}
    notes.append(f"tokenizer, chat template and ids are those of {teller.ref.text}")
    return dataclasses.replace(first.model, **ids), teller, notes


def _tokenizer_source(recipe: MergeRecipe, sources: Sequence[Source]) -> Source:
    if recipe.tokenizer is None:
        return sources[0]
    for source in sources:
        if recipe.tokenizer in (source.ref.text, source.ref.model):
            return source
    names = ", ".join(s.ref.text for s in sources)
    raise ConfigError(f"tokenizer={recipe.tokenizer}: none of the models that are merged; name one of {names}")


def _compared(first: Source, other: Source, vocabulary: str) -> list[str]:
    """Return notes on what two models differ in; raises ConfigError where they cannot be merged."""
    a, b = first.ref.text, other.ref.text
    ours, theirs = (hf_config(s.model, "float32") for s in (first, other))
    for name in sorted(ours.keys() | theirs.keys()):
        pair = ours.get(name), theirs.get(name)
        if pair[0] != pair[1] and name not in _MAY_DIFFER:
            raise ConfigError(
                f"{a} and {b} are no models of one shape: {name} is {pair[0]!r} and {pair[1]!r}; merge others"
            )
    notes = []
    if ours["max_position_embeddings"] != theirs["max_position_embeddings"]:
        notes.append(f"max_position_embeddings stays that of {a}: {ours['max_position_embeddings']}")
    rows = first.model.vocab_size, other.model.vocab_size
    if rows[0] != rows[1]:
        check(
            vocabulary != "same",
            f"{a} has {rows[0]} rows in its embedding and {b} has {rows[1]}; say vocabulary: first_rows if one continues "
            "the other, or leave_embedding",
        )
        if vocabulary == "first_rows":
            notes.append(
                f"of the embedding the first {min(rows)} rows are merged with {b}, whose embedding has {rows[1]}"
            )
    if vocabulary == "leave_embedding":
        notes.append(f"embedding and head are those of {a}; of {b} they are left out")
    return notes + _tokenizers_compared(first, other)


def _tokenizers_compared(first: Source, other: Source) -> list[str]:
    """Compare two tokenizers piece by piece; one may have more pieces than the other, behind those of both."""
    a, b = (fingerprints(s.tokenizer) for s in (first, other))
    if not a or not b:
        lacking = first if not a else other
        return [f"{lacking.ref.text} has no tokenizer here, so it was not compared"]
    if any(a.get(name) == b.get(name) for name in a.keys() & b.keys()):
        return []
    # Of one kind where there is one: a tokenizer.json may name pieces otherwise than a tokenizer.model.
    kind = next((name for name in (MODEL, JSON) if name in a and name in b), None)
    ours, theirs = (Tokenizer(str(s.tokenizer / kind if kind else s.tokenizer), key="") for s in (first, other))
    for i in range(min(ours.vocab_size, theirs.vocab_size)):
        if ours.piece(i) != theirs.piece(i):
            raise ConfigError(
                f"{first.ref.text} and {other.ref.text} have other tokenizers: piece {i} is {ours.piece(i)!r} and "
                f"{theirs.piece(i)!r}; merge models of one tokenizer, or of one that continues the other"
            )
    more = ours.vocab_size - theirs.vocab_size
    return [f"the tokenizer of {first.ref.text} has {more:+d} pieces beside that of {other.ref.text}"] if more else []


def _pieces_of(source: Source) -> Tokenizer | None:
    folder: Path = source.tokenizer
    return Tokenizer(str(folder), key="") if fingerprints(folder) else None
