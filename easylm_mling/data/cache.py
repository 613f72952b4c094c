"""Windows tokenised ahead of time: the trainer takes one that is there and tokenises the others, for the same bits.

    CACHE/KEY/SOURCE/EPOCH.BLOCK.WINDOW.safetensors

KEY is a digest of all that decides a source's bits (tokenizer, files, cuts, order, seed), so a cache of other data is
never found, and several runs can share one folder. A file appears whole, carries a digest of its content, and is checked
when its window is opened; a damaged one is as good as none.
"""

from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import numpy as np
import orjson
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from easylm_mling.atomic import write_whole
from easylm_mling.data.blocks import EpochOrder, Window, windows
from easylm_mling.data.readers import Bad
from easylm_mling.data.tokenizer import Tokenizer, join_documents

_FORMAT = "1"


class TokenWindow(NamedTuple):
    """A window whose documents are tokens: int32 in `file`, ending at `ends` (int64 [documents]); `window` has no texts."""

    file: Path
    ends: np.ndarray
    window: Window

    def tokens(self, begin: int, end: int) -> np.ndarray:
        """int32 [end - begin], read from the file."""
        with safe_open(self.file, framework="np") as stored:
            return stored.get_slice("tokens")[begin:end]


class TokenCache:
    """The tokenised windows in the folder `root`, of any data and tokenizer."""

    def __init__(self, root: str | Path, tokenizer: Tokenizer):
        self.root, self.tokenizer = Path(root), tokenizer
        self._folders: dict[str, Path] = {}

    def load(self, order: EpochOrder, epoch: int, block: int, window: int) -> TokenWindow | None:
        """The window if it is here and whole, else None."""
        path = self._path(order, epoch, block, window)
        try:
            with safe_open(path, framework="np") as stored:
                arrays = {name: stored.get_tensor(name) for name in ("tokens", "ends", "places", "bad_units")}
                about = orjson.loads(stored.metadata()["about"])
        except (OSError, SafetensorError, KeyError, TypeError, orjson.JSONDecodeError):
            return None
        if about.pop("digest", None) != _digest(arrays, about):
            return None
        bad = [Bad(b["reason"], b["file"], b["offset"], bytes.fromhex(b["head"])) for b in about["bad"]]
        places = [tuple(p) for p in arrays["places"].tolist()]
        found = Window([], places, bad, arrays["bad_units"].tolist(), about["read"], about["last"])
        return TokenWindow(path, arrays["ends"], found)

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
            "places": np.array(window.places, np.int64).reshape(-1, 2),
            "bad_units": np.array(window.bad_units, np.int64),
        }
        bad = [{"reason": b.reason, "file": b.file, "offset": b.offset, "head": b.head.hex()} for b in window.bad]
        about = {"bad": bad, "read": window.read, "last": window.last}
        about["digest"] = _digest(arrays, about)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, save(arrays, {"about": orjson.dumps(about).decode()}))
        return len(tokens)

    def _path(self, order: EpochOrder, epoch: int, block: int, window: int) -> Path:
        name = order.source.name
        if name not in self._folders:
            key = blake2b(f"{_FORMAT} {order.fingerprint} {self.tokenizer.fingerprint}".encode(), digest_size=16)
            self._folders[name] = self.root / key.hexdigest() / name.replace("/", "__")
        return self._folders[name] / f"{epoch}.{block}.{window}.safetensors"


def _digest(arrays: dict[str, np.ndarray], about: dict) -> str:
    digest = blake2b(orjson.dumps(about, option=orjson.OPT_SORT_KEYS), digest_size=16)
    for name in sorted(arrays):
        digest.update(arrays[name].tobytes())
    return digest.hexdigest()
