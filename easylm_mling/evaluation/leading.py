"""Evaluation by several processes: process 0 drives the harness, and sends every batch to the others, which compute along."""

from collections.abc import Sequence

import numpy as np
import orjson

from easylm_mling.distributed.agreement import broadcast_bytes
from easylm_mling.evaluation.generation import Task, Writer
from easylm_mling.evaluation.scoring.packing import Batch
from easylm_mling.evaluation.scoring.scorer import Scorer

_END = b"{}"


class LeadingScorer(Scorer):
    """A Scorer in process 0 whose batches all processes compute."""

    def score(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """As Scorer.score."""
        broadcast_bytes(orjson.dumps({"shapes": [x.shape for x in batch[:5]]}))
        broadcast_bytes(b"".join(x.tobytes() for x in batch[:5]))
        return super().score(batch)


class LeadingWriter(Writer):
    """A Writer in process 0 whose texts all processes compute."""

    def write(self, tasks: Sequence[Task]) -> list[str]:
        """As Writer.write."""
        broadcast_bytes(orjson.dumps({"tasks": [vars(task) for task in tasks]}))
        return super().write(tasks)


def follow(scorer: Scorer, writer: Writer):
    """Compute what process 0 sends, until it calls `dismiss`. Every other process calls this."""
    while order := orjson.loads(broadcast_bytes(b"")):
        if "tasks" in order:
            writer.write(
                [Task(**{**t, "prompt": tuple(t["prompt"]), "stops": tuple(t["stops"])}) for t in order["tasks"]]
            )
            continue
        numbers, arrays = np.frombuffer(broadcast_bytes(b""), np.int32), []
        for shape in order["shapes"]:
            size = int(np.prod(shape))
            arrays.append(numbers[:size].reshape(shape))
            numbers = numbers[size:]
        scorer.score(Batch(*arrays, owners=[]))


def dismiss():
    """Let the processes that `follow` go on. Process 0 calls this."""
    broadcast_bytes(_END)
