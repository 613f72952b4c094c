"""The bad records of a run: the file that lists them, each once for every time it is read, and when they are too many."""

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from easylm_mling.data.mixture import BAD, BLOCK, DOCUMENT, EPOCH, GOOD, OFFSET, WINDOW
from easylm_mling.data.streams import EnteredWindow
from easylm_mling.errors import DataError
from easylm_mling.storage.atomic import atomic_file
from easylm_mling.storage.jsonl import JsonlWriter

# The limit of bad records holds from this many on: one among the first ten is no reason to stop.
_MIN_RECORDS = 1000


def check_bad_records(state: np.ndarray, sources: Sequence[str], limit: float, path: str | Path):
    """Raise DataError if the whole run's `state`, int64 [V, S, C], has met more than the share `limit` of bad records.

    It decides by what the run has consumed, so at the same step on any hosts and however often the run was stopped.
    """
    for name, (bad, good) in zip(sources, state[..., [BAD, GOOD]].sum(axis=0).tolist(), strict=True):
        if bad + good >= _MIN_RECORDS and bad > limit * (bad + good):
            raise DataError(
                f"data.sources.{name}: {bad} of {bad + good} records are bad, more than data.max_bad_fraction={limit}; "
                f"see {path}; repair the files or raise the limit"
            )


class Quarantine:
    """A JSONL file. An entry has source, lane, epoch, block and window of the record, and its file, offset, reason, head.

    Windows are read ahead of the trainer, so a killed process leaves entries of windows that the resumed one reads
    again. They are removed when it starts. On a full disk entries wait for room, and a checkpoint that counts them waits,
    too: see `flush`.
    """

    def __init__(self, path: str | Path, sources: Sequence[str], state: np.ndarray | None):
        """Remove entries of windows that `state` has not entered: the whole run's, int64 [V, S, C]; None: at its start."""
        self.path, self._sources = Path(path), list(sources)
        self._records: JsonlWriter | None = None  # from the first one on
        if self.path.exists():
            with open(self.path, "rb") as old, atomic_file(self.path) as new:
                new.writelines(line for line in old if self._is_consumed(line, state))

    def write(self, lane: int, source: int, window: EnteredWindow):
        """Append the bad records of a window that a lane has entered."""
        where = {"epoch": window.epoch, "block": window.block, "window": window.window}
        entry = {"source": self._sources[source], "lane": lane, **where}
        self._records = self._records or JsonlWriter(self.path, ascii_only=False)
        for b in window.bad:
            head = b.head.decode(errors="replace")
            self._records.append({**entry, "file": b.file, "offset": b.offset, "reason": b.reason, "head": head})

    def flush(self):
        """Write all entries to disk; raises OSError if there is no room for them."""
        if self._records:
            self._records.flush()

    def close(self):
        """Close the file. Entries that still wait for room are dropped: no checkpoint counts them, so they are read again."""
        if self._records:
            with suppress(OSError):
                self._records.close()

    def _is_consumed(self, line: bytes, state: np.ndarray | None) -> bool:
        """Return True if `state` has entered the window of this entry."""
        try:
            entry = json.loads(line)
        except ValueError:
            return False  # a kill cut the line short
        if entry["source"] not in self._sources:
            return True  # of a source that the run no longer has
        if state is None:
            return False
        counters = state[entry["lane"], self._sources.index(entry["source"])]
        window = [entry["epoch"], entry["block"], entry["window"]]
        reached = counters[[EPOCH, BLOCK, WINDOW]].tolist()
        # A window is entered with its first token.
        return window < reached or (window == reached and bool(counters[DOCUMENT] or counters[OFFSET]))
