"""The cache of answered requests: a file that only grows, one line a batch, so that a kill loses one batch at most."""

from collections.abc import Iterable
from hashlib import blake2b
from pathlib import Path
from typing import Any

import orjson

from easylm_mling.storage.jsonl import JsonlWriter, read_jsonl


class RequestCache:
    """Answers by request. A line holds the answers of a whole batch: either all of them are there, or none."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._answers: dict[str, Any] = {}
        for line in read_jsonl(path) if path.is_file() else ():
            if isinstance(line.get("answers"), dict):
                self._answers.update(line["answers"])
        self.restored = len(self._answers)  # answers of earlier evaluations
        self._writer = JsonlWriter(path, ascii_only=False)

    def __contains__(self, key: str) -> bool:
        return key in self._answers

    def __getitem__(self, key: str) -> Any:
        return self._answers[key]

    def add(self, answers: dict[str, Any]):
        """Store the answers of one batch, on disk before this returns."""
        if answers:
            self._writer.append({"answers": answers})
            self._writer.flush()
            self._answers.update(answers)

    def close(self):
        """Close the file."""
        self._writer.close()


def request_key(kind: str, *parts: Iterable[int] | dict | bytes) -> str:
    """Return a digest of what is asked of the model: a kind, token ids and settings."""
    digest = blake2b(kind.encode(), digest_size=12)
    for part in parts:
        raw = part if isinstance(part, bytes) else orjson.dumps(part, option=orjson.OPT_SORT_KEYS)
        digest.update(len(raw).to_bytes(8, "little") + raw)
    return digest.hexdigest()
