"""Which documents a source is trained on, validated on, or not read: a hash of the text decides."""

from hashlib import blake2b
from unicodedata import is_normalized, normalize

from easylm_mling.data.catalog import RUN_HOLDOUT

# Makes the hash that samples a source independent of the one that holds documents out.
_SAMPLE_SALT = b"sample"


def choose(texts: list[bytes], split: str, settings: dict) -> list[int]:
    """Return which of the texts are of one split: `holdout`, what the source validates on, or `train`.

    A hash of the normalised text decides, by the largest holdout_fraction of the run's sources. So a text that one
    source holds out is trained on through no other one, either, and neither is a copy with other white space.
    """
    assert split in ("train", "holdout"), split
    held_out = settings["holdout_fraction"]
    if split == "train":
        held_out = max(held_out, settings.get(RUN_HOLDOUT, 0))
    chosen = list(range(len(texts)))
    if held_out or split == "holdout":
        limit = int(held_out * 2**64)
        chosen = [i for i in chosen if (_hash(normalised(texts[i])) < limit) == (split == "holdout")]
    if split == "train" and settings["sample_fraction"] < 1:
        sampled = int(settings["sample_fraction"] * 2**64)
        chosen = [i for i in chosen if _hash(texts[i], _SAMPLE_SALT) < sampled]
    return chosen


def normalised(text: bytes) -> bytes:
    """Return UTF-8 text in Unicode's form NFKC, each run of white space a space, none at either end."""
    characters = text.decode()
    # Nearly all text is normalised, and finding that out is cheap.
    if not is_normalized("NFKC", characters):
        characters = normalize("NFKC", characters)
    return " ".join(characters.split()).encode()


def _hash(text: bytes, salt: bytes = b"") -> int:
    return int.from_bytes(blake2b(text, digest_size=8, salt=salt).digest(), "big")
