"""Several real processes train one run: the same bits as one, whatever is killed, stopped or left out."""

import json
import random
import signal
import socket
import struct
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import jax
import numpy as np
import pytest
from processes import (
    ROOT,
    assert_same_bits,
    ends,
    free_port,
    outcome,
    output_of,
    printed,
    run,
    start,
    wait_for_step,
)

from easylm_mling.data.mixture import BLOCK, COUNTERS, DataState
from easylm_mling.distributed.joining import ProcessGroup, find_process_group, roll_call
from easylm_mling.errors import ConfigError
from easylm_mling.run.host_sync import HostSync, own_quarantine


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A run of one process on all devices, and what became of it."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    run(run_dir, 1)
    return outcome(run_dir)


@pytest.mark.faults
def test_two_processes_are_one_whatever_befalls_them(undisturbed, tmp_path):
    """2 processes, one is told to stop; 2 again, one is killed; 1 goes on to the end. Both write one log."""
    run_dir, steps = tmp_path / "run", [0]
    for how in (signal.SIGTERM, signal.SIGKILL):
        processes = start(run_dir, 2)
        wait_for_step(processes, run_dir, steps[-1] + 1)
        processes[1].send_signal(how)
        codes = ends(run_dir, processes)
        if how == signal.SIGTERM:
            # All was done before the signal came, or all stopped together.
            assert codes in ([42, 42], [0, 0]), printed(run_dir)
            lines = [json.loads(x) for x in (run_dir / "metrics.jsonl").read_text().splitlines()]
            steps = [x["step"] for x in lines if x["kind"] == "train"]
            assert steps == list(range(1, len(steps) + 1))
            assert "stopped by a signal" not in output_of(run_dir, 1).read_text()
        else:
            check_the_survivor(run_dir, 0, codes[0])
    run(run_dir, 1)
    assert_same_bits(outcome(run_dir), undisturbed)


def check_the_survivor(run_dir, process, code):
    # 85: it found out itself; SIGABRT: JAX's coordination did. Or all was done before.
    assert code in (85, -signal.SIGABRT, 0), printed(run_dir)
    said = output_of(run_dir, process).read_text(errors="replace")
    assert code == 0 or "most likely died" in said or "another task died" in said


@pytest.mark.faults
@pytest.mark.long
def test_two_processes_may_be_one_and_two_again(undisturbed, tmp_path):
    for processes, until in ((2, 3), (1, 6), (2, 0)):
        run(tmp_path / "run", processes, f"train.stop_at_step={until}")
    assert_same_bits(outcome(tmp_path / "run"), undisturbed)
    assert "step 10/10" not in output_of(tmp_path / "run", 1).read_text()


@pytest.mark.faults
@pytest.mark.long
def test_two_processes_may_be_one_and_four(undisturbed, tmp_path):
    for processes, until in ((2, 3), (1, 5), (4, 7), (2, 0)):
        run(tmp_path / "run", processes, f"train.stop_at_step={until}", seconds=300)
    assert_same_bits(outcome(tmp_path / "run"), undisturbed)


CLOCK = """
import os, time
skew, rate, real, ticks, start = *map(float, os.environ["CLOCK"].split()), time.time, time.monotonic, time.monotonic()
time.time = lambda: real() + skew
time.monotonic = lambda: start + rate * (ticks() - start)
"""


@pytest.mark.faults
@pytest.mark.long
def test_clocks_that_differ_decide_nothing(undisturbed, tmp_path):
    """A day early and a day late, and one of them five times as fast; both told to stop when their time is up."""
    (tmp_path / "clock").mkdir()
    (tmp_path / "clock" / "sitecustomize.py").write_text(CLOCK)
    for flags in (["--max-hours=0.01"], []):
        port, started = free_port(), []
        for i, clock in enumerate(("86400 1", "-86400 5")):
            skewed = {"CLOCK": clock, "PYTHONPATH": f"{tmp_path / 'clock'}:{ROOT}"}
            started += start(tmp_path / "run", 2, *flags, only=i, port=port, environment=skewed)
        assert ends(tmp_path / "run", started, 300) == [0, 0], printed(tmp_path / "run")
    said = output_of(tmp_path / "run", 0).read_text()
    assert "after --max-hours" in said or said.count("step 10/10") == 1
    assert_same_bits(outcome(tmp_path / "run"), undisturbed)
    times = [json.loads(x)["time"] for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert min(times) > time.time() + 80000


@pytest.mark.faults
@pytest.mark.long
@pytest.mark.parametrize("signalled", [0, 1])
def test_a_signal_to_one_saves_all_at_the_same_step(undisturbed, tmp_path, signalled):
    processes = start(tmp_path / "run", 2)
    wait_for_step(processes, tmp_path / "run", 2)
    processes[signalled].send_signal(signal.SIGTERM)
    codes = ends(tmp_path / "run", processes)
    # All was done before the signal came, or all stopped together.
    assert codes in ([42, 42], [0, 0]), printed(tmp_path / "run")
    run(tmp_path / "run", 1)
    assert_same_bits(outcome(tmp_path / "run"), undisturbed)


@pytest.mark.faults
@pytest.mark.long
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_ends_the_others_and_costs_no_bit(undisturbed, tmp_path, killed):
    processes = start(tmp_path / "run", 2)
    wait_for_step(processes, tmp_path / "run", 1)
    time.sleep(random.Random(killed).uniform(0, 1))
    processes[killed].kill()
    since = time.monotonic()
    codes = ends(tmp_path / "run", processes)
    assert time.monotonic() - since < 60
    check_the_survivor(tmp_path / "run", 1 - killed, codes[1 - killed])
    run(tmp_path / "run", 1)
    assert_same_bits(outcome(tmp_path / "run"), undisturbed)


@pytest.mark.faults
@pytest.mark.long
def test_what_processes_say_does_not_get_between_the_messages_of_a_step(tmp_path):
    """On a busy machine: programs side by side on CPU devices once took each other's messages, which ended every such run."""
    small = (
        "train.batch_size=8",
        "data.sequence_length=64",
        "train.budget_tokens=100000",
        "checkpoint.every_steps=1000",
    )
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    try:
        processes = start(tmp_path / "run", 4, *small, "eval.every_steps=0", "train.stop_at_step=30", settings=(), devices=8,
                          environment={"XLA_FLAGS": ""})  # fmt: skip
        assert ends(tmp_path / "run", processes, 400) == [0] * 4, printed(tmp_path / "run")
    finally:
        for process in busy:
            process.kill()
            process.wait()


@pytest.mark.faults
def test_who_is_missing_is_said_by_name(tmp_path):
    [alone] = start(tmp_path / "run", 3, "--wait-seconds=2", only=0)
    assert ends(tmp_path / "run", [alone], 60) == [1]
    assert printed(tmp_path / "run").splitlines()[-1] == (
        "error: processes 1, 2 of 3 did not join within 2 seconds; start every process, or wait longer with --wait-seconds"
    )
    [lost] = start(tmp_path / "other", 2, "--wait-seconds=1", only=1)
    assert ends(tmp_path / "other", [lost], 60) == [1]
    assert "process 0 did not answer at localhost:" in printed(tmp_path / "other").splitlines()[-1]
    assert not (tmp_path / "run").exists() and not (tmp_path / "other").exists()


def test_a_caller_that_hangs_up_does_not_end_the_roll_call():
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    zero, one = (ProcessGroup(f"localhost:{port}", 2, index) for index in (0, 1))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(roll_call, zero, 30)
        until = time.monotonic() + 20
        while time.monotonic() < until:
            with suppress(ConnectionRefusedError), socket.create_connection(("localhost", port)) as stranger:
                # It is reset when it is closed.
                stranger.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                break
        time.sleep(0.2)
        roll_call(one, 30)
        waiting.result()


def test_the_place_of_a_process(monkeypatch):
    assert find_process_group(None, None, None) is None
    assert find_process_group("a:1", 2, 1) == ProcessGroup("a:1", 2, 1)
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "b:2")
    with pytest.raises(ConfigError, match="give all three"):
        find_process_group(None, None, None)
    monkeypatch.setenv("JAX_NUM_PROCESSES", "3")
    monkeypatch.setenv("JAX_PROCESS_ID", "0")
    assert find_process_group(None, None, 2) == ProcessGroup("b:2", 3, 2)
    for wrong in (("a", 2, 1), ("a:1", 2, 2), ("a:1", 2, -1)):
        with pytest.raises(ConfigError, match="give all three"):
            find_process_group(*wrong)


def test_what_processes_say_is_put_together(monkeypatch):
    """Large counts keep all their bits, the largest wish counts, and processes that share lanes are counted once."""
    rng = np.random.default_rng(0)
    whole = DataState(rng.integers(0, 1 << 60, (4, 3, len(COUNTERS))), rng.integers(0, 1 << 60, (5, 3)))
    said = []
    for start_, stop_request, part in ((0, 0, 0.25), (2, 2, 0.75), (2, 0, 0.75)):
        languages = whole.languages // 4 if part == 0.25 else whole.languages - whole.languages // 4
        own = whole.lanes[start_ : start_ + 2]
        said.append(np.concatenate([[stop_request, start_], own.reshape(-1), languages.reshape(-1)]).view(np.uint32))
    got = HostSync(range(2, 4))._read(
        np.array(said), DataState(np.zeros_like(whole.lanes), np.zeros_like(whole.languages))
    )
    assert got.stop_request == 2
    jax.tree.map(np.testing.assert_array_equal, got.state, whole)


def test_the_first_forgets_what_processes_that_are_gone_had_read_ahead(tmp_path):
    entry = {"source": "a", "lane": 0, "epoch": 0, "block": 4, "window": 0}
    for name in ("quarantine.jsonl", "quarantine-of-process-1.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps({**entry, "block": block}) + "\n" for block in (0, 4)))
    state = DataState(np.zeros((1, 1, len(COUNTERS)), np.int64), np.zeros((1, 3), np.int64))
    state.lanes[0, 0, BLOCK] = 4
    assert own_quarantine(tmp_path / "quarantine.jsonl", ["a"], state) == tmp_path / "quarantine.jsonl"
    # Its own list is the loader's to see to.
    assert [
        len((tmp_path / n).read_text().splitlines()) for n in ("quarantine.jsonl", "quarantine-of-process-1.jsonl")
    ] == [2, 1]


@pytest.mark.faults
@pytest.mark.long
@pytest.mark.parametrize("damage", ["a bit", "a file gone"])
def test_two_processes_set_a_damaged_step_aside(undisturbed, tmp_path, damage):
    run(tmp_path / "run", 2, "train.stop_at_step=8")
    step = tmp_path / "run" / "checkpoints" / "8"
    if damage == "a bit":
        file = max((p for p in (step / "params").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 4
        file.write_bytes(content)
    else:
        (step / "training" / "manifest.ocdbt").unlink()
    run(tmp_path / "run", 2)
    assert "the checkpoint of step 8 is damaged and set aside" in printed(tmp_path / "run")
    assert [p.name for p in (tmp_path / "run" / "set-aside").iterdir()] == ["checkpoint-8-damaged"]
    assert_same_bits(outcome(tmp_path / "run"), undisturbed)


@pytest.mark.faults
@pytest.mark.long
def test_processes_with_different_configs_do_not_train(tmp_path):
    port = free_port()
    first = start(tmp_path / "run", 2, "train.seed=1", only=0, port=port)
    second = start(tmp_path / "run", 2, only=1, port=port)
    assert ends(tmp_path / "run", first + second) == [2, 2]
    assert "process 1 was started with another config than process 0" in printed(tmp_path / "run")
    assert not list((tmp_path / "run").glob("checkpoints/*"))
