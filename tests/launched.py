"""What tests of tpu_scripts share: a run file, a cloud, the launcher as a process, and a trainer of some lines."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from fake_cloud import Cloud

ROOT = Path(__file__).parent.parent
TPU = ROOT / "tpu_scripts" / "tpu.py"

RUN_URL = "gs://bucket/a folder/of läufe/test"

# Counts to STEPS in place of training: a checkpoint every fifth step, a loss that depends on all steps before it, and of
# all workers the first writes. FAULT is "STEP CODE": it ends so when it gets there the first time ("always" every time).
# No step ends while the file HOLD is there.
STAND_IN = """
import json, os, signal, sys, time
from pathlib import Path
run, worker = Path(os.environ["RUN_DIR"]), int(os.environ["WORKER"])
run.mkdir(parents=True, exist_ok=True)
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
saved = run / f"checkpoint-{worker}.json"
step, loss = json.loads(saved.read_text()) if saved.exists() else (0, 1.0)
hold = Path(os.environ.get("HOLD", "no such file"))
at, code, who, always = (os.environ.get("FAULT", "-1 0 0 once").split() + ["once"])[:4]
print("from step", step, flush=True)
def save():
    new = saved.with_name(saved.name + ".new")
    new.write_text(json.dumps([step, loss]))
    new.rename(saved)
while step < int(os.environ["STEPS"]):
    if stop:
        save()
        sys.exit(42)
    marker = run / f"failed-{at}"
    if step >= int(at) >= 0 and worker == int(who) and (always == "always" or not marker.exists()):
        marker.touch()
        print("error: this was to be expected", flush=True)
        os._exit(int(code)) if int(code) < 256 else os.kill(os.getpid(), 9)
    until = time.monotonic() + float(os.environ.get("STEP_SECONDS", "0.03"))
    while (time.monotonic() < until or hold.exists()) and not stop:
        time.sleep(0.01)
    if stop:
        continue
    step, loss = step + 1, loss * 0.9 + step % 3
    if worker == 0:
        with open(run / "metrics.jsonl", "a") as log:
            line = {"kind": "train", "step": step, "time": time.time(), "loss": loss, "tokens": step * 100}
            log.write(json.dumps({**line, "tokens_per_second": 1000.0, "mfu": 0.5}) + "\\n")
    if step % 5 == 0:
        save()
save()
"""


def write_run_file(
    folder: Path, cloud: Cloud, command: list[str], environment=(), more: str = "", mounted: bool = True, **policy
) -> Path:
    """A run of the name `test` on 2 workers, whose run directory is the bucket's folder, `mounted` on every host, or gs://."""
    settings = {"poll_seconds": 0.1, "backoff_seconds": 0.05, "settle_seconds": 0.5, "keep_minutes": 0, **policy}
    path = folder / "my run.ini"
    path.write_text(
        "[run]\nname = test\nbucket = gs://bucket/a folder/of läufe\n"
        "[machine]\nproject = a-project\nzone = us-central2-b\ntype = v4-16\ncapacity = spot\n"
        + "[train]\n"
        + (f"run_dir = {run_directory(cloud)}\n" if mounted else "")
        + "command =\n"
        + "".join(f"    {x}\n" for x in command)
        + more
        + "[environment]\n"
        + "".join(f"{k} = {v}\n" for k, v in dict(environment).items())
        + "[policy]\n"
        + "".join(f"{k} = {v}\n" for k, v in settings.items()),
        encoding="utf-8",
    )
    return path


def run_directory(cloud: Cloud) -> Path:
    return cloud.bucket(RUN_URL)


def stand_in(folder: Path, cloud: Cloud, steps: int = 12, more: str = "", policy=None, **environment) -> Path:
    program = folder / "stand_in.py"
    program.write_text(STAND_IN)
    return write_run_file(
        folder, cloud, [sys.executable, str(program)], {"STEPS": steps, **environment}, more, **(policy or {})
    )


def tpu(cloud: Cloud, verb: str, run_file: Path, *flags: str, **environment: str) -> subprocess.Popen:
    """The launcher, on a laptop with Google's command line (the stand-in), and what else `environment` has."""
    env = {"PATH": f"{cloud.folder}/bin:/usr/bin:/bin", "HOME": str(cloud.folder), "LANG": "C.UTF-8", **environment}
    return subprocess.Popen(
        # Tests that run in a shell's background ignore Ctrl-C, and so would their children.
        ["env", "--default-signal=INT", sys.executable, str(TPU), verb, str(run_file), *flags],
        env=env, cwd=cloud.folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def end(process: subprocess.Popen, code: int = 0, seconds: float = 180) -> str:
    """What was printed by a launcher that must end so."""
    try:
        printed, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError(f"not ended:\n{process.communicate()[0]}") from None
    assert process.returncode == code, printed
    return printed


def wait_for(condition, seconds: float = 90):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.01)


def steps(cloud: Cloud) -> list[int]:
    path = run_directory(cloud) / "metrics.jsonl"
    return [json.loads(x)["step"] for x in path.read_text().splitlines()] if path.exists() else []


def curve(cloud: Cloud) -> dict[int, float]:
    """Step -> loss; the later line of a step counts."""
    lines = map(json.loads, (run_directory(cloud) / "metrics.jsonl").read_text().splitlines())
    return {x["step"]: x["loss"] for x in lines}


def expected_curve(steps: int) -> dict[int, float]:
    loss, found = 1.0, {}
    for step in range(steps):
        loss = loss * 0.9 + step % 3
        found[step + 1] = loss
    return found


def nothing_is_left(cloud: Cloud):
    """No machine is there or was asked for, and no process of one lives."""
    assert cloud.state["resources"] == {}
    wait_for(lambda: not cloud.processes(), 30)


def kill(process: subprocess.Popen):
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
