"""Windows tokenised ahead of time: the trainer reads those that the cache has and tokenises the others, for the same bits.

    CACHE/KEY/SOURCE/EPOCH.BLOCK.WINDOW.safetensors

KEY is a digest of all that decides a source's bits (tokenizer, files, cuts, order, seed), so a cache of other data is
never found, and several runs can share one folder. A file appears whole, carries a checksum of its content, and is checked
when its window is opened; a damaged one is as good as none.
"""

import zlib
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import numpy as np
import orjson
from safetensors.numpy import save

from easylm_mling.data.shuffle import EpochOrder, Window, windows
from easylm_mling.data.sources.readers import BadRecord
from easylm_mling.data.tokenization.tokenizer import Tokenizer, join_documents
from easylm_mling.storage.atomic import write_atomically

_FORMAT = "2"


class TokenWindow(NamedTuple):
    """A window of tokens, int32 in a mapped file; its documents end at `ends`, int64. `window` has no texts."""

    tokens: np.ndarray
    ends: np.ndarray
    window: Window


class TokenCache:
    """The tokenised windows in the folder `root`, of any data and tokenizer."""

    def __init__(self, root: str | Path, tokenizer: Tokenizer):
        self.root, self.tokenizer = Path(root), tokenizer
        self._folders: dict[str, Path] = {}

    def load(self, order: EpochOrder, epoch: int, block: int, window: int) -> TokenWindow | None:
        """The window if it is here and whole, else None."""
        path = self._path(order, epoch, block, window)
        try:
            arrays, about = _parse(np.frombuffer(path.read_bytes(), np.uint8))
            tokens = _parse(np.asarray(np.memmap(path, np.uint8, "r")))[0]["tokens"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        if about.pop("checksum", None) != _checksum(arrays, about):
            return None
        bad = [BadRecord(b["reason"], b["file"], b["offset"], bytes.fromhex(b["head"])) for b in about["bad"]]
        found = Window([], arrays["places"], bad, arrays["bad_units"].tolist(), about["read"], about["last"])
        return TokenWindow(tokens, arrays["ends"], found)

    def fill(self, order: EpochOrder, epoch: int, block: int) -> int:
        """Write the windows of a block that are not here; returns how many tokens those hold."""
        number = tokens = 0
        while (there := self.load(order, epoch, block, number)) is not None:
            if there.window.last:
                return 0
            number += 1
        for window in windows(order, epoch, block, skip=number):
            tokens += self._write(self._path(order, epoch, block, number), window)
            number += 1
        return tokens

    def _write(self, path: Path, window: Window) -> int:
        tokens = join_documents(self.tokenizer, [text.decode() for text in window.documents])
        arrays = {
            "tokens": tokens,
            "ends": np.flatnonzero(tokens == self.tokenizer.eos_id) + 1,
            "places": window.provenance,
            "bad_units": np.array(window.bad_units, np.int64),
        }
        bad = [{"reason": b.reason, "file": b.file, "offset": b.offset, "head": b.head.hex()} for b in window.bad]
        about = {"bad": bad, "read": window.read, "last": window.last}
        about["checksum"] = _checksum(arrays, about)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, save(arrays, {"about": orjson.dumps(about).decode()}))
        return len(tokens)

    def _path(self, order: EpochOrder, epoch: int, block: int, window: int) -> Path:
        name = order.source.name
        if name not in self._folders:
            key = blake2b(f"{_FORMAT} {order.fingerprint} {self.tokenizer.fingerprint}".encode(), digest_size=16)
            self._folders[name] = self.root / key.hexdigest() / name.replace("/", "__")
        return self._folders[name] / f"{epoch}.{block}.{window}.safetensors"


def _parse(file: np.ndarray) -> tuple[dict[str, np.ndarray], dict]:
    """The arrays of a safetensors file, uint8, without copying them as its library does, and its metadata.

    Raises ValueError, KeyError or TypeError if it is damaged.
    """
    start = 8 + int(file[:8].view("<u8")[0])
    header = orjson.loads(file[8:start].tobytes())
    about = orjson.loads(header.pop("__metadata__")["about"])
    types = {"I32": "<i4", "I64": "<i8"}
    parts = {name: (types[h["dtype"]], h["shape"], *h["data_offsets"]) for name, h in header.items()}
    return {n: file[start + a : start + b].view(t).reshape(shape) for n, (t, shape, a, b) in parts.items()}, about


def _checksum(arrays: dict[str, np.ndarray], about: dict) -> int:
    """CRC-32, against damage: a cryptographic digest takes five times as long, a quarter of the time of a batch."""
    crc = zlib.crc32(orjson.dumps(about, option=orjson.OPT_SORT_KEYS))
    for name in sorted(arrays):
        crc = zlib.crc32(np.ascontiguousarray(arrays[name]).data, crc)
    return crc
