"""Windows tokenised ahead of time: the trainer reads those that the cache has and tokenises the others, for the same bits.

    CACHE/KEY/SOURCE/EPOCH.BLOCK.WINDOW.safetensors

KEY is a digest of all that decides a source's bits: tokenizer, files, cuts, order, seed. So runs may share a folder, and
none reads another's tokens. A file is written atomically. Its checksum is checked when its window is opened, and a
damaged file counts as missing.
"""

import zlib
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from easylm_mling.data.documents import encode_window
from easylm_mling.data.shuffle import EpochOrder, Window, windows
from easylm_mling.data.sources.readers import BadRecord
from easylm_mling.data.tokenization.tokenizer import Tokenizer
from easylm_mling.errors import ConfigError, check_format
from easylm_mling.storage.atomic import write_atomically

_FORMAT = 1
_ARRAYS = ("tokens", "ends", "provenance", "bad_units")


class TokenWindow(NamedTuple):
    """A window of tokens. `window` has no texts.

    `tokens`, int32, stay in the file: a slice of them, with both ends, is read when it is asked for. `ends`, int64
    [documents], are where documents end in them.
    """

    tokens: Any
    ends: np.ndarray
    window: Window


class TokenCache:
    """The tokenised windows in the folder `root`, of any data and one tokenizer."""

    def __init__(self, root: str | Path, tokenizer: Tokenizer):
        self.root, self.tokenizer = Path(root), tokenizer
        self._folders: dict[str, Path] = {}

    def load(self, order: EpochOrder, epoch: int, block: int, window: int) -> TokenWindow | None:
        """Return the window, or None if it is not here or damaged; raises ConfigError for an unknown format."""
        path = self._path(order, epoch, block, window)
        try:
            with safe_open(path, "numpy") as file:
                about = orjson.loads(file.metadata()["about"])
                remove = f"remove the folder {self.root}: it can be filled again"
                check_format(path, "token cache", about.get("format"), _FORMAT, remove)
                arrays = {name: file.get_tensor(name) for name in _ARRAYS}
                tokens = file.get_slice("tokens")
        except ConfigError:
            raise
        except (OSError, SafetensorError, ValueError, LookupError, TypeError, AttributeError):
            return None  # damaged, or cut off by a machine that went down
        if about.pop("checksum", None) != _checksum(arrays, about):
            return None
        bad = [BadRecord(b["reason"], b["file"], b["offset"], bytes.fromhex(b["head"])) for b in about["bad"]]
        bad_units = arrays["bad_units"].tolist()
        return TokenWindow(
            tokens, arrays["ends"], Window([], arrays["provenance"], bad, bad_units, about["good"], about["last"])
        )

    def fill(self, order: EpochOrder, epoch: int, block: int) -> int:
        """Write the windows of a block that the cache lacks; returns how many tokens they hold."""
        number = tokens = 0
        while (stored := self.load(order, epoch, block, number)) is not None:
            if stored.window.last:
                return 0
            number += 1
        for window in windows(order, epoch, block, skip=number):
            tokens += self._write(order, epoch, block, number, window)
            number += 1
        return tokens

    def _write(self, order: EpochOrder, epoch: int, block: int, number: int, window: Window) -> int:
        path = self._path(order, epoch, block, number)
        tokens, ends, window = encode_window(order, self.tokenizer, epoch, block, window)
        arrays = {
            "tokens": tokens,
            "ends": ends,
            "provenance": window.provenance,
            "bad_units": np.array(window.bad_units, np.int64),
        }
        bad = [{"reason": b.reason, "file": b.file, "offset": b.offset, "head": b.head.hex()} for b in window.bad]
        about = {"format": _FORMAT, "bad": bad, "good": window.good, "last": window.last}
        about["checksum"] = _checksum(arrays, about)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, save(arrays, {"about": orjson.dumps(about).decode()}))
        return len(tokens)

    def _path(self, order: EpochOrder, epoch: int, block: int, window: int) -> Path:
        name = order.source.name
        if name not in self._folders:
            key = blake2b(f"{order.fingerprint} {self.tokenizer.fingerprint}".encode(), digest_size=16)
            self._folders[name] = self.root / key.hexdigest() / name.replace("/", "__")
        return self._folders[name] / f"{epoch}.{block}.{window}.safetensors"


def _checksum(arrays: dict[str, np.ndarray], about: dict) -> int:
    """CRC-32. It is against damage, not malice: a cryptographic digest would take a quarter of the time of a batch."""
    crc = zlib.crc32(orjson.dumps(about, option=orjson.OPT_SORT_KEYS))
    for name in sorted(arrays):
        crc = zlib.crc32(np.ascontiguousarray(arrays[name]).data, crc)
    return crc
