"""Agreement between the processes of a run: who writes, and what all of them decide together.

Every process runs the same program in the same order and holds its own rows of each batch and its own shards of the
state. What must be decided or written once is decided and written by the primary process, number 0. The run directory
must be one that all of them see.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b

import jax
import numpy as np
from jax.experimental import multihost_utils

from easylm_mling.errors import ConfigError


def is_multiprocess() -> bool:
    """Whether there are other processes. Does not wake a device when there are none."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def process_index() -> int:
    """This process's number, from 0 on."""
    return jax.process_index() if is_multiprocess() else 0


def is_primary() -> bool:
    """Whether this is process 0, the one that writes."""
    return process_index() == 0


def all_agree(ok: bool) -> bool:
    """Logical AND over all processes; none goes on before all have called. Collective."""
    return bool(np.all(multihost_utils.process_allgather(np.array(ok)))) if is_multiprocess() else ok


def broadcast(number: int) -> int:
    """The primary process's `number` (of 64 bits), in all processes. Collective."""
    if not is_multiprocess():
        return number
    # JAX would make a 32-bit number of a 64-bit one.
    halves = np.array([number], np.int64).view(np.uint32)
    return int(multihost_utils.broadcast_one_to_all(halves).view(np.int64)[0])


def broadcast_bytes(content: bytes) -> bytes:
    """The primary process's `content`, in all processes. Collective."""
    if not is_multiprocess():
        return content
    size = broadcast(len(content))
    padded = np.zeros(-(-size // 4) * 4, np.uint8)
    if is_primary():
        padded[:size] = np.frombuffer(content, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(padded.view(np.uint32))).view(np.uint8)[:size].tobytes()


@contextmanager
def primary_first(config_text: str) -> Iterator[None]:
    """Run the block in the primary process and then, if that went well, in all others. Collective.

    Raises ConfigError in every process if they were started with different configs.
    """
    if not is_multiprocess():
        yield
        return
    digest = np.frombuffer(blake2b(config_text.encode(), digest_size=8).digest(), np.uint32)
    digests = multihost_utils.process_allgather(digest)
    if others := np.flatnonzero(np.any(digests != digests[0], axis=1)).tolist():
        raise ConfigError(f"process {others[0]} was started with another config than process 0; give all the same")
    if is_primary():
        yield
        all_agree(True)
    else:
        all_agree(True)
        yield
