"""The file that lists the bad records of a run, each once for every time it is read, however often the run was stopped."""

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from easylm_mling.data.mixture import BLOCK, DOCUMENT, EPOCH, OFFSET, WINDOW
from easylm_mling.data.sources.readers import BadRecord
from easylm_mling.storage.atomic import atomic_file
from easylm_mling.storage.jsonl import JsonlWriter


class Quarantine:
    """A JSONL file: source, lane, epoch, block and window that met the record; file, offset, reason, head.

    Windows are read ahead of the trainer, so a killed process leaves entries of windows that the resumed one reads
    again: those go when it starts. On a full disk entries wait for room, and so does a checkpoint that counts them: see
    `settle`.
    """

    def __init__(self, path: str | Path, sources: Sequence[str], state: np.ndarray | None):
        """`state`, int64 [V, S, C], is the whole run's that is resumed from; None: nothing was consumed yet."""
        self.path, self._sources = Path(path), list(sources)
        self._records: JsonlWriter | None = None  # from the first one on
        if self.path.exists():
            with open(self.path, "rb") as old, atomic_file(self.path) as kept:
                kept.writelines(line for line in old if self._is_consumed(line, state))

    def write(self, lane: int, source: int, counters: np.ndarray, bad: list[BadRecord]):
        """Append the bad records of the window at a lane's `counters`, int64 [C]."""
        where = {name: int(counters[c]) for name, c in (("epoch", EPOCH), ("block", BLOCK), ("window", WINDOW))}
        entry = {"source": self._sources[source], "lane": lane, **where}
        self._records = self._records or JsonlWriter(self.path, ascii_only=False)
        for b in bad:
            head = b.head.decode(errors="replace")
            self._records.append({**entry, "file": b.file, "offset": b.offset, "reason": b.reason, "head": head})

    def flush(self):
        """All that was written is on disk when it returns; raises OSError if there is no room for it."""
        if self._records:
            self._records.flush()

    def close(self):
        """Entries that still wait are of windows that no checkpoint has: they will be read again."""
        if self._records:
            with suppress(OSError):
                self._records.close()

    def _is_consumed(self, line: bytes, state: np.ndarray | None) -> bool:
        """Whether `state` has entered the window that met it."""
        try:
            entry = json.loads(line)
        except ValueError:
            return False  # a kill cut the line short
        if "lane" not in entry or entry["source"] not in self._sources:
            return True  # of a run that began before entries had a place
        if state is None:
            return False
        at = state[entry["lane"], self._sources.index(entry["source"])]
        place, reached = (entry["epoch"], entry["block"], entry["window"]), tuple(at[[EPOCH, BLOCK, WINDOW]].tolist())
        # A window is counted as entered with its first token.
        return place < reached or (place == reached and bool(at[DOCUMENT] or at[OFFSET]))
