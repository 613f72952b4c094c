"""Joining: how the processes of a run, one for each host, become one JAX system, and how an error ends them."""

import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from importlib.util import find_spec
from typing import NamedTuple

import jax

from easylm_mling.distributed.agreement import is_multiprocess
from easylm_mling.errors import STUCK, ConfigError, TrainingStopped, report_error

# How long a process may be dead or out of reach before JAX ends the others, where no broken connection tells them before.
_HEARTBEAT_SECONDS = 100
_LOST_PEER = ("UNKNOWN:", "UNAVAILABLE:", "INTERNAL:", "ABORTED:", "CANCELLED:", "DEADLINE_EXCEEDED:")


class ProcessGroup(NamedTuple):
    """Which process this is, of how many, and where process 0 listens (`host:port`, a port that is free there)."""

    coordinator: str
    count: int
    index: int


def find_process_group(coordinator: str | None, count: int | None, index: int | None) -> ProcessGroup | None:
    """The group by the flags, or by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID; None without either.

    Raises ConfigError if only some of the three are given, or one is wrong.
    """
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    flags = (coordinator, count, index)
    given = [os.environ.get(name) if flag is None else flag for flag, name in zip(flags, names, strict=True)]
    if given == [None] * 3:
        return None
    with suppress(ValueError):
        group = ProcessGroup(str(given[0]), int(str(given[1])), int(str(given[2])))
        port = int(group.coordinator.rpartition(":")[2])
        if None not in given and port > 0 and 0 <= group.index < group.count:
            return group
    raise ConfigError(
        f"--coordinator={given[0]} --processes={given[1]} --process-id={given[2]}: give all three (or {', '.join(names)}), "
        "as host:port of process 0, the number of processes, and this one's number from 0 on"
    )


@contextmanager
def joined_processes(group: ProcessGroup | None, wait_seconds: float, on_cpu: bool = False) -> Iterator[None]:
    """Within it, all processes are one JAX system. Collective.

    Without a `group`, the hosts of a TPU slice join by its metadata, unless its TPUs are not wanted (`on_cpu`); any other
    process is alone. Raises TrainingStopped that names the processes which are not there after `wait_seconds`. An error
    inside ends this process at once: an orderly end would wait for the others, and those wait for this one.
    """
    # Both are there on a TPU's host only.
    on_tpu = bool(find_spec("libtpu")) and any(map(os.path.exists, ("/dev/accel0", "/dev/vfio/0")))
    if group is None and (on_cpu or not on_tpu):
        yield
        return
    _initialize(group, wait_seconds)
    try:
        yield
    except BaseException as error:
        if not is_multiprocess():
            raise
        code = _lost_peer(error) or report_error(error)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _initialize(group: ProcessGroup | None, wait_seconds: float):
    # Its handler of SIGTERM would take the place of ours.
    jax.config.update("jax_enable_preemption_service", False)
    initialize = partial(
        jax.distributed.initialize,
        initialization_timeout=int(wait_seconds),
        heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
    )
    if group is None:
        print(f"joining the slice's other hosts, for up to {wait_seconds:.0f} seconds", file=sys.stderr)
        try:
            initialize()
        except ValueError as error:
            print(f"no other hosts are known here ({error}): going on alone", file=sys.stderr)
        return
    if group.count > 1:
        roll_call(group, wait_seconds)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    initialize(*group)


def _lost_peer(error: BaseException) -> int | None:
    """The exit code after an error that most likely means that another process is gone; None after any other."""
    # Of whatever type: an operation that fails when it is begun raises another one than one that fails later.
    if not str(error).startswith(_LOST_PEER):
        return None
    print(
        f"error: process {jax.process_index()} cannot go on with the others; one of them has most likely died, and its "
        f"output says why ({str(error).splitlines()[0]}). Start all of them again: the run goes on from its newest checkpoint",
        file=sys.stderr,
    )
    return STUCK


def roll_call(group: ProcessGroup, wait_seconds: float):
    """Wait until all processes have called at process 0; raise TrainingStopped that names the missing. Collective.

    JAX's own wait ends in an abort that does not say who is missing. One line of text goes each way.
    """
    host, _, port = group.coordinator.rpartition(":")
    until = time.monotonic() + wait_seconds
    if group.index == 0:
        answer = _collect_calls(int(port), group.count, until)
    else:
        answer = _call(host, int(port), group.index, until)
    if answer is None:
        raise TrainingStopped(
            f"process {group.index}: process 0 did not answer at {group.coordinator} within {wait_seconds:.0f} seconds; "
            "start it, or correct --coordinator, or wait longer with --wait-seconds"
        )
    if answer != "go":
        raise TrainingStopped(
            f"{answer} of {group.count} did not join within {wait_seconds:.0f} seconds; start every process, or wait longer "
            "with --wait-seconds"
        )


def _collect_calls(port: int, count: int, until: float) -> str:
    """Process 0's part: "go", or the names of the missing, sent to all who called."""
    called: dict[int, socket.socket] = {}
    with socket.create_server(("", port)) as server:
        while len(called) < count - 1 and (left := until - time.monotonic()) > 0:
            server.settimeout(left)
            with suppress(TimeoutError):
                caller, _ = server.accept()
                if 0 < (number := _number_of(caller)) < count:
                    called[number] = caller
                else:
                    caller.close()
    missing = sorted(set(range(1, count)) - set(called))
    names = ", ".join(map(str, missing[:20])) + (f" and {len(missing) - 20} more" if len(missing) > 20 else "")
    answer = f"process{'es' if len(missing) > 1 else ''} {names}" if missing else "go"
    for caller in called.values():
        with suppress(OSError):
            caller.sendall(answer.encode())
            caller.close()
    return answer


def _number_of(caller: socket.socket) -> int:
    """The caller's process number, 0 if it gives none: port scanners call, too."""
    caller.settimeout(1)
    text = b""
    with suppress(OSError):
        text = caller.recv(16).strip()
    return int(text) if text.isdigit() else 0


def _call(host: str, port: int, index: int, until: float) -> str | None:
    """Process 0's answer; None if it gave none in time."""
    while (left := until - time.monotonic()) > 0:
        with suppress(OSError), socket.create_connection((host, port), timeout=left) as caller:
            caller.sendall(f"{index}\n".encode())
            # Process 0 may have begun to wait later than this one.
            caller.settimeout(left + 5)
            if answer := caller.recv(1000).decode(errors="replace"):
                return answer
        time.sleep(0.1)
    return None
