"""Join and coordinate the processes that train one run together, one on each host.

Every process runs the same program in the same order and holds its own rows of each batch and its own shards of the
state. What must be decided or written once is decided and written by the first process, number 0. The run directory
must be one that all of them see.
"""

import os
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from hashlib import blake2b
from importlib.util import find_spec
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from easylm_mling.config import RunConfig, to_yaml
from easylm_mling.errors import STOPPED, STUCK, ConfigError, TrainingStopped, report_error

# How long a process may be dead or out of reach before JAX ends the others, where no broken connection tells them before.
_HEARTBEAT_SECONDS = 100


class ProcessGroup(NamedTuple):
    """Which process this is, of how many, and where process 0 listens (`host:port`, one that is free there)."""

    coordinator: str
    count: int
    index: int


def find_process_group(coordinator: str | None, count: int | None, index: int | None) -> ProcessGroup | None:
    """From the flags, or JAX's own JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID; None if neither is there."""
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    found = [os.environ.get(n) if v is None else v for v, n in zip((coordinator, count, index), names, strict=True)]
    if found == [None] * 3:
        return None
    try:
        place = ProcessGroup(str(found[0]), int(str(found[1])), int(str(found[2])))
        known = None not in found and int(place.coordinator.rpartition(":")[2]) > 0
    except ValueError:
        known = False
    if not known or not 0 <= place.index < place.count:
        raise ConfigError(
            f"--coordinator={found[0]} --processes={found[1]} --process-id={found[2]}: give all three (or {', '.join(names)}), "
            "as host:port of process 0, the number of processes, and this one's number from 0 on"
        )
    return place


@contextmanager
def joined_processes(place: ProcessGroup | None, wait_seconds: float, on_cpu: bool = False) -> Iterator[None]:
    """Within it all processes are one JAX system; alone, unless there is a `place` or this is a host of a TPU slice (whose
    TPUs are not wanted `on_cpu`).

    Raises TrainingStopped, naming those that are missing, if they are not all there after `wait_seconds`. An error inside
    ends this process at once: an orderly end would wait for the others, and those wait for this one.
    """
    # Both are there on a TPU's host only; its metadata then say who the others are.
    on_tpu = bool(find_spec("libtpu")) and any(map(os.path.exists, ("/dev/accel0", "/dev/vfio/0")))
    if place is None and (on_cpu or not on_tpu):
        yield
        return
    # Its handler of SIGTERM would take the place of ours.
    jax.config.update("jax_enable_preemption_service", False)
    initialize = partial(
        jax.distributed.initialize,
        initialization_timeout=int(wait_seconds),
        heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
    )
    if place is None:
        print(f"joining the slice's other hosts, for up to {wait_seconds:.0f} seconds", file=sys.stderr)
        try:
            initialize()
        except ValueError as error:
            print(f"no other hosts are known here ({error}): going on alone", file=sys.stderr)
    else:
        if place.count > 1:
            roll_call(place, wait_seconds)
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        initialize(*place)
    try:
        yield
    except BaseException as error:
        if not is_multiprocess():
            raise
        code = _lost(error) or report_error(error)
        if code is None:
            traceback.print_exception(error)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(STOPPED if code is None else code)


def _lost(error: BaseException) -> int | None:
    """The exit code after an error that says, for all that is known, that another process is gone."""
    # Of whatever type: an operation that fails when it is begun raises another one than one that fails later.
    if not str(error).startswith(
        ("UNKNOWN:", "UNAVAILABLE:", "INTERNAL:", "ABORTED:", "CANCELLED:", "DEADLINE_EXCEEDED:")
    ):
        return None
    first = str(error).splitlines()[0]
    print(
        f"error: process {jax.process_index()} cannot go on with the others; one of them has most likely died, and its "
        f"output says why ({first}). Start all of them again: the run goes on from its newest checkpoint",
        file=sys.stderr,
    )
    return STUCK


def roll_call(place: ProcessGroup, wait_seconds: float):
    """Wait until all processes have called at process 0; raise TrainingStopped that names the missing.

    (JAX's own wait ends in an abort that does not say who is missing.) One line of text goes each way.
    """
    host, _, port = place.coordinator.rpartition(":")
    until = time.monotonic() + wait_seconds
    answer = _collect(int(port), place.count, until) if place.index == 0 else _call(host, int(port), place.index, until)
    if answer is None:
        raise TrainingStopped(
            f"process {place.index}: process 0 did not answer at {place.coordinator} within {wait_seconds:.0f} seconds; "
            "start it, or correct --coordinator, or wait longer with --wait-seconds"
        )
    if answer != "go":
        raise TrainingStopped(
            f"{answer} of {place.count} did not join within {wait_seconds:.0f} seconds; start every process, or wait longer "
            "with --wait-seconds"
        )


def _collect(port: int, count: int, until: float) -> str:
    """Process 0's part: "go", or the names of the missing, told to all who called."""
    called: dict[int, socket.socket] = {}
    with socket.create_server(("", port)) as server:
        while len(called) < count - 1 and (left := until - time.monotonic()) > 0:
            server.settimeout(left)
            with suppress(TimeoutError):
                caller, _ = server.accept()
                if 0 < (number := _said(caller)) < count:
                    called[number] = caller
                else:
                    caller.close()
    missing = sorted(set(range(1, count)) - set(called))
    listed = ", ".join(map(str, missing[:20])) + (f" and {len(missing) - 20} more" if len(missing) > 20 else "")
    answer = f"process{'es' if len(missing) > 1 else ''} {listed}" if missing else "go"
    for caller in called.values():
        with suppress(OSError):
            caller.sendall(answer.encode())
            caller.close()
    return answer


def _said(caller: socket.socket) -> int:
    """Its number, 0 if it says none: whoever scans ports calls, too."""
    caller.settimeout(1)
    said = b""
    with suppress(OSError):
        said = caller.recv(16).strip()
    return int(said) if said.isdigit() else 0


def _call(host: str, port: int, index: int, until: float) -> str | None:
    while (left := until - time.monotonic()) > 0:
        with suppress(OSError), socket.create_connection((host, port), timeout=left) as caller:
            caller.sendall(f"{index}\n".encode())
            # Process 0 may have begun to wait later than this one.
            caller.settimeout(left + 5)
            if answer := caller.recv(1000).decode(errors="replace"):
                return answer
        time.sleep(0.1)
    return None


def is_multiprocess() -> bool:
    """Whether there are other processes. Does not wake a device when there are none."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def process_index() -> int:
    return jax.process_index() if is_multiprocess() else 0


def is_primary() -> bool:
    return process_index() == 0


def all_agree(well: bool) -> bool:
    """Whether it is well with all processes; all must ask, and none goes on before all have."""
    return bool(np.all(multihost_utils.process_allgather(np.array(well)))) if is_multiprocess() else well


def broadcast(number: int) -> int:
    """What the first process says, for all."""
    if not is_multiprocess():
        return number
    return int(multihost_utils.broadcast_one_to_all(np.array([number], np.int64).view(np.uint32)).view(np.int64)[0])


@contextmanager
def primary_first(config: RunConfig) -> Iterator[None]:
    """The block runs in process 0, and then, if that went well, in all others; everywhere with the same config."""
    if not is_multiprocess():
        yield
        return
    digest = np.frombuffer(blake2b(to_yaml(config).encode(), digest_size=8).digest(), np.uint32)
    digests = multihost_utils.process_allgather(digest)
    if others := np.flatnonzero(np.any(digests != digests[0], axis=1)).tolist():
        raise ConfigError(f"process {others[0]} was started with another config than process 0; give all the same")
    if is_primary():
        yield
        all_agree(True)
    else:
        all_agree(True)
        yield
