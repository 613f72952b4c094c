"""The launcher on a cloud that is a stand-in (fake_cloud.py), with a stand-in for the trainer (launched.py)."""

import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_cloud import FLAGS, NO_CAPACITY, Cloud, _parse
from launched import (
    ROOT,
    TPU,
    curve,
    end,
    expected_curve,
    kill,
    nothing_is_left,
    run_directory,
    stand_in,
    steps,
    tpu,
    wait_for,
    write_run_file,
)


@pytest.fixture
def cloud(tmp_path):
    cloud = Cloud(tmp_path / "cloud").make()
    yield cloud
    for machine in [r["machine"] for r in cloud.state["resources"].values()]:
        cloud.wipe(machine)


def creates(cloud: Cloud) -> list[dict]:
    return [c for c in cloud.calls() if c["arguments"][3] == "create"]


@pytest.mark.slow
def test_a_run_comes_to_the_same_end_whatever_befalls_it(cloud, tmp_path):
    """No capacity, errors of every service, a preemption in the middle with all disks wiped, a worker that dies, and the
    launcher killed: the same loss curve, and nothing is left.
    """
    with cloud.changing() as state:
        state["creations"] = [{"refuse": NO_CAPACITY}, {"states": ["ACCEPTED", "PROVISIONING", "ACTIVE"]}]
        state["describe_fails"], state["ssh_refused"] = 2, 2
    run_file = stand_in(tmp_path, cloud, 45, FAULT="35 137 0", STEP_SECONDS=0.05)
    first = tpu(cloud, "run", run_file, "--keep-alive")
    wait_for(lambda: 8 in steps(cloud))
    cloud.preempt("test", ["SUSPENDING", "SUSPENDED"])
    wait_for(lambda: cloud.state["made"] == 2)
    with cloud.changing() as state:
        state["storage_fails"], state["ssh_refused"] = 2, 1
    wait_for(lambda: 20 in steps(cloud))
    kill(first)
    before = len(steps(cloud))
    wait_for(lambda: len(steps(cloud)) > before)  # the trainer does not need the launcher
    printed = end(tpu(cloud, "run", run_file, "--keep-alive"))
    assert "worker 0 ended with 137 (crash 1 of 3 that are borne); going on" in printed
    assert curve(cloud) == expected_curve(45)
    assert sorted(set(steps(cloud))) == list(range(1, 46))
    nothing_is_left(cloud)
    # The one that was preempted was asked for once more, and no other.
    assert [c["code"] for c in creates(cloud)] == [1, 0, 0]
    status = end(tpu(cloud, "status", run_file))
    assert "there is none" in status and "ended: done" in status and "step        45" in status
    assert "attempts    3, on 2 machines" in status and "attempt 2: worker 0 ended with 137" in status
    assert "(crash" not in end(tpu(cloud, "run", run_file))  # done is done
    nothing_is_left(cloud)


@pytest.mark.slow
def test_by_hand_up_run_stop_run_down(cloud, tmp_path):
    run_file = stand_in(tmp_path, cloud, 10_000, more="[secrets]\nnames = TOKEN\n", STEP_SECONDS=0.02)
    assert "2 workers ready; billed until `down`" in end(tpu(cloud, "up", run_file, TOKEN="abc"))
    secrets = cloud.home("test", 1) / "easylm" / "test" / "secrets"
    assert secrets.read_bytes() == b"TOKEN=abc\0" and secrets.stat().st_mode & 0o777 == 0o600
    assert end(tpu(cloud, "up", run_file, TOKEN="abc")).count("\n") == 1  # nothing is done twice
    assert "nothing watches it now" in end(tpu(cloud, "run", run_file, TOKEN="abc"))
    wait_for(lambda: 5 in steps(cloud))
    assert "ACTIVE, READY, 2 workers (billed)" in end(tpu(cloud, "status", run_file))
    stopped = end(tpu(cloud, "stop", run_file))
    assert "worker 0: ended with 42" in stopped and "worker 1: ended with 42" in stopped
    reached = max(steps(cloud))
    end(tpu(cloud, "run", run_file, TOKEN="abc"))
    wait_for(lambda: max(steps(cloud)) > reached)
    done = steps(cloud)  # once: it goes on meanwhile
    assert sorted(done) == list(range(1, max(done) + 1))  # not one step was done again
    assert "no machine is left" in end(tpu(cloud, "down", run_file))
    nothing_is_left(cloud)
    assert len(creates(cloud)) == 1
    logs = end(tpu(cloud, "logs", run_file))
    assert f"from step {reached}" in logs and "w0 " in logs and "w1 " in logs


@pytest.mark.slow
def test_a_watching_launcher_sleeps_and_ends_when_another_says_down(cloud, tmp_path):
    run_file = stand_in(tmp_path, cloud, 10_000)
    watching = tpu(cloud, "run", run_file, "--keep-alive")
    wait_for(lambda: steps(cloud))
    watching.send_signal(signal.SIGSTOP)  # the laptop is closed
    cloud.preempt("test", ["SUSPENDED"])
    time.sleep(0.3)
    watching.send_signal(signal.SIGCONT)
    before = len(steps(cloud))
    wait_for(lambda: len(steps(cloud)) > before)
    second = end(tpu(cloud, "run", run_file), 2)
    assert "is driven by a launcher on" in second and "--take-over" in second
    end(tpu(cloud, "down", run_file, "--now"))
    assert "a stop was asked for" in end(watching)
    nothing_is_left(cloud)


def test_what_another_made_is_never_touched(cloud, tmp_path):
    run_file = stand_in(tmp_path, cloud)
    with cloud.changing() as state:
        labels = {"easylm-run": "test", "easylm-owner": "another"}
        theirs = {"labels": labels, "machine": "test-9", "port": 1, "type": "v4-16", "states": ["SUSPENDED"]}
        state["resources"]["test"] = theirs
    for verb in ("up", "run", "down"):
        printed = end(tpu(cloud, verb, run_file), 2)
        assert "not of this run" in printed and "it is left as it is" in printed
    assert cloud.state["resources"]["test"] == theirs
    assert not [c for c in cloud.calls() if {"delete", "ssh", "create"} & set(c["arguments"])]


@pytest.mark.parametrize(
    "code, attempts, why",
    [
        (1, 2, "worker 1 ended with 1; 2 crashes in a row without a new step"),
        pytest.param(2, 1, "something in the config or the data", marks=pytest.mark.slow),
    ],
)
def test_what_always_fails_is_given_up(cloud, tmp_path, code, attempts, why):
    run_file = stand_in(tmp_path, cloud, FAULT=f"0 {code} 1 always", STEP_SECONDS=10, policy={"max_crashes": 1})
    printed = end(tpu(cloud, "run", run_file, "--keep-alive"), 1)
    assert why in printed
    assert sorted(p.name for p in (run_directory(cloud) / "logs").iterdir()) == [
        f"attempt-{n + 1:04d}" for n in range(attempts)
    ]
    nothing_is_left(cloud)
    status = end(tpu(cloud, "status", run_file))
    assert f"attempt {attempts}: worker 1 ended with {code}" in status
    assert "w1 error: this was to be expected" in status


def test_setting_up_that_fails_is_told_and_given_up(cloud, tmp_path):
    (cloud.folder / "no-pypi").touch()
    run_file = stand_in(tmp_path, cloud, policy={"max_crashes": 0})
    printed = end(tpu(cloud, "run", run_file, "--keep-alive"), 1)
    assert "easylm-setup worker=1 failed: no route to pypi.org" in printed
    assert "setting up failed 1 times" in printed
    nothing_is_left(cloud)


ODD = 'it\'s "quoted" $(touch /tmp/never) `never` \\ 한국어 ; & | > #'
PRINTS_ITSELF = (
    "import json,os,sys,hashlib,time,pathlib; e=os.environ; r=pathlib.Path(e['RUN_DIR']); r.mkdir(parents=True, exist_ok=True); "
    "s=e['TOKEN'].encode(); w=e['WORKER']; time.sleep(0.5); "
    "(r/f'said-{w}').write_text(json.dumps([sys.argv[1:], e['ODD'], e['LINES'], hashlib.sha256(s).hexdigest(), os.getcwd()]))"
)


def test_values_arrive_unharmed_and_secrets_are_nowhere_else(cloud, tmp_path):
    command = [sys.executable, "-c", PRINTS_ITSELF, ODD, "two  spaces", "--a=b c"]
    run_file = write_run_file(
        tmp_path, cloud, command, {"ODD": ODD, "LINES": "one\n    two = 2\n    한"}, "[secrets]\nnames = TOKEN\n"
    )
    assert "TOKEN: not in this shell's environment" in end(tpu(cloud, "run", run_file), 2)
    secret = "hf_top's secret"
    launcher = tpu(cloud, "run", run_file, "--keep-alive", TOKEN=secret)
    seen = set()
    while launcher.poll() is None:
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                seen.add(path.read_bytes())
            except OSError:
                continue
        time.sleep(0.01)
    printed = end(launcher)
    for worker in (0, 1):
        said = json.loads((run_directory(cloud) / f"said-{worker}").read_text())
        assert said[0] == [ODD, "two  spaces", "--a=b c"]
        assert said[1:4] == [ODD, "one\ntwo = 2\n한", hashlib.sha256(secret.encode()).hexdigest()]
        assert "/easylm/test/code-" in said[4]
    assert any(PRINTS_ITSELF.encode() in s for s in seen)  # it was looked at while it ran
    assert not any(secret.encode() in s for s in seen)
    assert secret not in printed and not Path("/tmp/never").exists()
    for path in cloud.folder.rglob("*"):
        assert not path.is_file() or secret.encode() not in path.read_bytes(), path
    nothing_is_left(cloud)


def test_a_dry_run_prints_what_gcloud_takes_and_does_nothing(cloud, tmp_path):
    run_file = stand_in(tmp_path, cloud)
    for verb, flags in (
        ("up", []),
        ("run", ["--keep-alive"]),
        ("stop", []),
        ("down", []),
        ("ssh", ["--", "a  b", "c'd"]),
    ):
        printed = end(tpu(cloud, verb, run_file, "--dry-run", *flags))
        commands = [shlex.split(line) for line in printed.splitlines() if line.startswith("gcloud ")]
        assert commands
        for _, *arguments in commands:
            words = next(n for n in (4, 2) if " ".join(arguments[:n]) in FLAGS)
            _parse(" ".join(arguments[:words]), arguments[words:])
    example = ROOT / "tpu_scripts" / "examples" / "first.ini"
    assert "put your own" in end(tpu(cloud, "run", example), 2)
    assert commands[0][-1] == "--command='a  b' 'c'\"'\"'d'"
    assert cloud.calls() == []


# One worker's scripts, without a cloud.


@pytest.fixture
def worker(tmp_path):
    """A function that runs worker_run.sh with a verb, where a run of some command is set up."""
    base = tmp_path / "easylm" / "a run"
    for folder in ("code/tpu_scripts", "code/launch", "venv/bin"):
        (base / folder).mkdir(parents=True)
    script = base / "code" / "tpu_scripts" / "worker_run.sh"
    script.write_bytes((ROOT / "tpu_scripts" / "worker_run.sh").read_bytes())
    (base / "code/launch/run_dir").write_text(str(tmp_path / "run"))
    (base / "code/launch/url").write_text("gs://nowhere")
    (tmp_path / "gcloud").write_text("#!/bin/sh\n")
    (tmp_path / "curl").write_text("#!/bin/sh\necho 3\n")
    for program in ("gcloud", "curl"):
        (tmp_path / program).chmod(0o755)

    def run(verb: str, *arguments: str, command: str = "", **environment: str) -> str:
        if command:
            (base / "code/launch/command").write_bytes(b"/bin/bash\0-c\0" + command.encode() + b"\0")
        env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "HOME": str(tmp_path), **environment}
        env = {"EASYLM_LIBTPU_LOCKFILE": str(tmp_path / "libtpu_lockfile")} | env
        done = subprocess.run(["bash", script, verb, *arguments], env=env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    run.base = base
    yield run
    run("stop", "1")


def ended(worker) -> str:
    wait_for(lambda: "state=running" not in worker("status"))
    return worker("status")


def test_a_worker_starts_an_attempt_once_and_records_its_end(worker):
    assert worker("status") == "easylm-worker 3 pack= attempt=0 state=idle code=-"
    command = 'echo x >> "$RUN_DIR-count"; until [ -e "$RUN_DIR-go" ]; do sleep 0.02; done; exit 7'
    assert "attempt=1 state=running" in worker("start", "1", command=command)
    assert "attempt=1 state=running" in worker("start", "1")
    assert "attempt=1 state=running" in worker("start", "2")  # one at a time
    (worker.base.parent.parent / "run-go").touch()
    assert ended(worker).endswith("attempt=1 state=exited code=7")
    assert "attempt=1 state=exited code=7" in worker("start", "1")
    assert (worker.base.parent.parent / "run-count").read_text().split() == ["x"]
    assert "attempt=2" in worker("start", "2")
    assert ended(worker).endswith("attempt=2 state=exited code=7")


def test_stopping_gives_the_trainer_time_and_then_none(worker):
    ready = worker.base.parent.parent / "run-ready"
    loop = 'touch "$RUN_DIR-ready"; while :; do sleep 0.05; done'
    worker("start", "1", command=f"trap 'sleep 0.3; exit 42' TERM; {loop}")
    wait_for(ready.exists)
    assert worker("stop", "60").endswith("state=exited code=42")
    ready.unlink()
    worker("start", "2", command=f"trap '' TERM; {loop}")
    wait_for(ready.exists)
    assert worker("stop", "1").endswith("attempt=2 state=exited code=137")


def test_a_worker_that_dies_as_a_whole_is_lost(worker):
    worker("start", "1", command="sleep 60")
    wait_for(lambda: (worker.base / "trainer-pid").exists())
    session = int((worker.base / "trainer-pid").read_text().split()[1])
    os.killpg(session, signal.SIGKILL)
    wait_for(lambda: "state=lost" in worker("status"))
    assert "attempt=2 state=running" in worker("start", "2")


def test_only_a_lock_file_whose_holder_is_dead_is_removed(worker, tmp_path):
    lockfile = tmp_path / "libtpu_lockfile"
    lockfile.touch()
    with open(lockfile):
        worker("start", "1", command="true")
        ended(worker)
        assert lockfile.exists()
        assert "held by a living process" in (worker.base / "log/attempt-1.log").read_text()
    worker("start", "2", command="true")
    ended(worker)
    assert not lockfile.exists()
    assert f"removed {lockfile}, whose holder is dead" in (worker.base / "log/attempt-2.log").read_text()


def test_logs_are_cut_and_every_line_has_its_time(worker):
    # The last line has no end, and one is no UTF-8.
    command = "for i in {1..40}; do echo line $i; done; printf '\\xff\\xfe\\n'; printf last"
    worker("start", "1", command=command, EASYLM_LOG_BYTES="700")
    ended(worker)
    files = [worker.base / "log/attempt-1.log.1", worker.base / "log/attempt-1.log"]
    assert all(0 < f.stat().st_size < 800 for f in files)
    lines = b"".join(f.read_bytes() for f in files).splitlines()
    assert lines[-1].endswith(b"Z last== ended with exit code 0")
    assert lines[-2].endswith(b"Z \xff\xfe")
    assert all(line[:4].isdigit() and line[19:21] == b"Z " for line in lines)


# What is only read.


def test_the_scripts_have_no_warnings():
    scripts = sorted(str(p) for folder in ("tpu_scripts", "benchmarks") for p in (ROOT / folder).rglob("*.sh"))
    assert len(scripts) >= 2
    checked = subprocess.run([Path(sys.executable).parent / "shellcheck", *scripts], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def test_a_laptop_needs_only_python_3_9():
    import ast

    for path in [TPU, *(ROOT / "tpu_scripts" / "launcher").glob("*.py")]:
        tree = ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 9))
        for node in ast.walk(tree):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            for name in names:
                assert name.split(".")[0] in {*sys.stdlib_module_names, "launcher"}, f"{path}: {name}"


def test_locked_packages_are_the_same_everywhere():
    def locked(name: str) -> dict[str, str]:
        lines = (ROOT / name).read_text().splitlines()
        return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))

    tpu_lock, others = (
        locked("tpu_scripts/requirements-tpu.lock"),
        locked("requirements.lock") | locked("requirements-eval.lock") | locked("requirements-test.lock"),
    )
    assert {k: v for k, v in tpu_lock.items() if others.get(k, v) != v} == {}
    assert f"libtpu=={tpu_lock['libtpu']}" in (ROOT / "pyproject.toml").read_text()
