"""What a run says of itself: events and goodput, metrics, trackers, the profiler's window, the console."""

import io
import json
import logging
import math
import os
import struct
import subprocess
import sys
import threading
import time
import types
from datetime import UTC, datetime
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh
from processes import ROOT, TINY, train_here
from rich.console import Console

import easylm_mling.monitoring.profiler as profiler_module
import easylm_mling.monitoring.trackers as trackers_module
from easylm_mling.config import LogConfig, ProfileConfig, load, to_yaml
from easylm_mling.data.catalog import Catalog
from easylm_mling.data.holdout import holdout_rows
from easylm_mling.data.tokenization.tokenizer import Tokenizer
from easylm_mling.errors import ConfigError, TrainingStopped
from easylm_mling.monitoring.console import ProgressLine, sources_table, warn
from easylm_mling.monitoring.events import EventLog, read_event_log
from easylm_mling.monitoring.goodput import KINDS, Goodput
from easylm_mling.monitoring.metrics import TIMINGS, MetricsLog, read_lines, read_metrics
from easylm_mling.monitoring.profiler import Profiler
from easylm_mling.monitoring.throughput import Throughput
from easylm_mling.monitoring.trackers import Trackers, check_trackers, numbers
from easylm_mling.run.monitor import Monitor
from easylm_mling.run.validation import by_language

TOKENIZER = ROOT / "data/sample/tokenizer/tokenizer.model"


def config(run_dir="runs/none", *overrides):
    os.chdir(ROOT)
    return load(["configs/demo.yaml"], [*TINY, "mesh.cpu_devices=0", f"run_dir={run_dir}", *overrides])


def event(at, name, step=0, attempt=1, **values):
    when = datetime.fromtimestamp(1_800_000_000 + at, UTC).isoformat(timespec="milliseconds")
    return {"event": name, "time": when, "attempt": attempt, "step": step, **values}


def goodput(events):
    result = Goodput()
    for each in events:
        result.add(each)
    return result


def test_goodput_of_a_run_that_was_killed_once():
    """By hand: 10 steps of 2 s, the last 4 done again after a kill; a save that stood still for 1 s."""
    first = [
        event(5, "start", seconds=5),
        event(15, "compiled", 1, seconds=10),
        event(17, "first_step", 1, seconds=12),
        event(27, "progress", 6),
        event(28, "saved", 6, seconds=1.0),
        event(36, "progress", 10),
    ]
    second = [
        event(136, "start", 10, 2, seconds=6),
        event(140, "restored", 6, 2, seconds=3),
        event(150, "compiled", 7, 2, seconds=10),
        event(152, "first_step", 7, 2, seconds=12),
        event(158, "progress", 10, 2),
        event(160, "evaluated", 10, 2, seconds=2),
        event(160, "done", 10, 2),
    ]
    assert goodput(first + second).seconds == pytest.approx(
        {
            "init": 6 + 6,
            "restore": 3,
            "compile": 20,
            "step": 12 + 8,
            "evaluation": 2,
            "save": 1,
            "lost": 8,
            "idle": 94,
            "tasks": 0,
        }
        | {"init": 5 + 6 + 1}
    )
    assert goodput(first + second).share() == pytest.approx(20 / 160)


NAMES = (
    "start",
    "restored",
    "compiled",
    "first_step",
    "progress",
    "evaluated",
    "saved",
    "save_failed",
    "failed",
    "else",
)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(NAMES), st.floats(-3, 50), st.integers(0, 12), st.floats(0, 30)),
        min_size=1,
        max_size=30,
    )
)
def test_goodput_adds_up_to_the_whole_time_whatever_happened(story):
    """Also when clocks go back between machines, and when events come in no sensible order."""
    now, events = 1000.0, []
    for name, gap, step, seconds in story:
        now += gap
        events.append(event(now, name, step, 1, seconds=seconds))
    result = goodput(events)
    times = [datetime.fromisoformat(e["time"]).timestamp() for e in events]
    begun = times[0] - (story[0][3] if story[0][0] == "start" else 0)
    assert sum(result.seconds.values()) == pytest.approx(max(times) - begun, abs=0.01)
    assert result.seconds.keys() == set(KINDS) and min(result.seconds.values()) > -1e-6


def test_events_survive_a_kill_and_count_attempts(tmp_path):
    file = tmp_path / "events.jsonl"
    with EventLog(file) as log:
        log.write("start", 0)
        log.write("saved", 4, seconds=0.5, bytes=10)
    with open(file, "a") as cut:
        cut.write('{"event": "progress", "time": "2026-11-')
    with pytest.raises(TrainingStopped), EventLog(file) as log:
        assert (log.attempt, log.step) == (2, 4)
        log.write("start", 4)
        raise TrainingStopped("no\nroom")
    events = list(read_event_log(file))
    assert [(e["event"], e["attempt"], e["step"]) for e in events] == [
        ("start", 1, 0), ("saved", 1, 4), ("start", 2, 4), ("failed", 2, 4),
    ]  # fmt: skip
    assert events[-1]["error"] == "no room" and datetime.fromisoformat(events[0]["time"]).tzinfo == UTC


def test_progress_is_written_now_and_then(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("easylm_mling.monitoring.events.time.monotonic", lambda: clock[0])
    with EventLog(tmp_path / "events.jsonl") as log:
        for step in range(20_000):
            clock[0] += 1.0
            log.progress(step)
    # Every second at first, then once a minute.
    assert 500 < len(list(read_event_log(tmp_path / "events.jsonl"))) < 900


@pytest.fixture(scope="module")
def monitored(tmp_path_factory):
    """A run in two attempts, with everything that it can say."""
    run_dir = tmp_path_factory.mktemp("monitored") / "run"
    asked = ["eval.every_steps=4", "log.tensorboard=true", "checkpoint.every_steps=4"]
    output = train_here(run_dir, *asked, "train.stop_at_step=6", "profile.steps=2:3")
    return run_dir, output + train_here(run_dir, *asked)


def test_damaged_lines_of_the_records_are_passed_over(tmp_path):
    whole = b'{"event": "start", "time": "2026-01-01T00:00:00Z", "attempt": 1, "step": 0, "seconds": 1.5}\n'
    damaged = [
        b"\xff{[\n",
        b"[1]\n",
        b"{}\n",
        whole.replace(b"2026", b"x"),
        whole.replace(b"1.5", b'"x"'),
        whole[:40] + b"\n",
    ]
    (tmp_path / "events.jsonl").write_bytes(b"".join([*damaged, whole, *damaged]))
    assert [event["event"] for event in read_event_log(tmp_path / "events.jsonl")] == ["start"]
    line = b'{"kind": "rewind", "step": 3, "skip_batches": 1}\n'
    (tmp_path / "metrics.jsonl").write_bytes(b"".join([*damaged, line, line.replace(b"3", b'"x"'), b'{"step": 3}\n']))
    assert [e["step"] for e in read_lines(tmp_path / "metrics.jsonl", "rewind")] == [3]


def test_the_events_of_a_run(monitored):
    run_dir, _ = monitored
    events = [e for e in read_event_log(run_dir / "events.jsonl") if e["event"] != "progress"]
    begins = ["evaluated", "compiled", "first_step", "evaluated", "saved", "saved", "stopped"]
    again = ["restored", "compiled", "first_step", "evaluated", "saved", "evaluated", "saved", "done"]
    order = [e["event"] for e in events]
    # When a save is whole is its own affair.
    assert sorted(order[: len(begins) + 1]) == sorted(["start", *begins])
    assert sorted(order[len(begins) + 1 :]) == sorted(["start", *again])
    assert order[len(begins)] == "stopped" and order[-1] == "done"
    assert [e["step"] for e in events if e["event"] == "saved"] == [4, 6, 8, 10]
    assert all(e["bytes"] > 100_000 and e["seconds"] >= 0 for e in events if e["event"] == "saved")
    start = next(e for e in events if e["event"] == "start")
    assert (start["hosts"], start["devices"], start["device_kind"]) == (1, 8, "cpu")
    assert start["versions"].keys() >= {"python", "jax", "orbax-checkpoint"}
    seconds = goodput(read_event_log(run_dir / "events.jsonl")).seconds
    # A program that was compiled beside the restore may be there at once.
    assert seconds["step"] > 0 and seconds["save"] > 0 and seconds["lost"] == 0


def test_a_save_is_written_when_it_is_whole_and_its_age_is_logged(tmp_path, monkeypatch):
    """Without a look at any checkpoint: there are none."""
    c = config(tmp_path / "run", "mesh.data=1", "mesh.fsdp=1", "mesh.tensor=1")
    mesh, console = Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), ("data", "fsdp", "tensor")), Console(quiet=True)
    metrics = {"loss_sum": np.ones(5), "loss_count": np.ones(5), "learning_rate": 0.1, "skipped": 0, "spikes": 0}
    metrics |= {"skipped_in_a_row": 0, "verdict": 0}
    with EventLog(tmp_path / "events.jsonl") as events, MetricsLog(tmp_path / "metrics.jsonl") as log:
        progress, profiler = ProgressLine(console, 10, 256), Profiler(ProfileConfig(), tmp_path, print)
        monitor = Monitor(c, types.SimpleNamespace(path=tmp_path), mesh, console, log, events, progress, profiler)
        for step in (1, 2, 3):
            monitor.launching(step)
            monitor.step(step, metrics, dict)
            if step == 1:
                monitor.save_failed(1, "no answer from https://me:key@host/x?sig=1", 1)
            if step == 2:
                monitor.saved(2, 0.25, 1000)
    saves = [e for e in read_event_log(tmp_path / "events.jsonl") if e["event"].startswith("save")]
    assert [(e["event"], e["step"]) for e in saves] == [("save_failed", 1), ("saved", 2)]
    assert saves[0]["problem"] == "no answer from https://...@host/x?..." and saves[0]["in_a_row"] == 1
    assert (saves[1]["seconds"], saves[1]["bytes"]) == (0.25, 1000)
    _, before, after = read_metrics(tmp_path / "metrics.jsonl", "train")
    assert "checkpoint_seconds" not in before
    assert after["checkpoint_seconds"] == 0.25 and after["checkpoint_age_seconds"] < 60


def test_a_line_of_metrics_has_all_its_names(monitored):
    run_dir, _ = monitored
    lines = read_metrics(run_dir / "metrics.jsonl", "train")
    assert len(lines) == 10
    last = lines[8]
    known = {"kind", "step", "tokens", "loss", "sources", "learning_rate", "gradient_norm", "parameter_norm"}
    known |= {"skipped", "spikes", "ledger"} | set(TIMINGS)
    # Of a CPU neither peak nor memory are known.
    of_saves = {"checkpoint_seconds", "checkpoint_age_seconds"}  # once the first one is whole
    of_tasks = {"seconds", "share_of_run"}  # of the lines of scores
    assert last.keys() | of_saves == known - {"mfu", "hbm_bytes", "hbm_peak_bytes"} - of_tasks
    assert last["step_seconds"] > 0 and last["parameter_norm"] > 1 and 0 < last["goodput"] < 1
    assert last["tokens_per_second"] == pytest.approx(256 / last["step_seconds"], rel=1e-3)
    assert lines[0]["step_seconds"] is None and lines[6]["step_seconds"] is None
    evaluation = read_metrics(run_dir / "metrics.jsonl", "eval")[-1]
    assert evaluation["sources_bits_per_byte"].keys() == evaluation["sources"].keys()
    # A piece of the sample tokenizer is two to three bytes of these texts.
    assert 1 < evaluation["loss"] / math.log(2) / evaluation["bits_per_byte"] < 5


def test_the_loss_of_each_language_adds_up_to_that_of_its_source(monitored):
    run_dir, _ = monitored
    c = config(run_dir)
    rows = holdout_rows(c.mixer, Catalog.load(run_dir / "catalog.json"), Tokenizer(str(TOKENIZER)), "glot500", 2)
    copies = by_language(rows, 5)
    # Every target is in exactly one copy, with the language of its document.
    assert copies["loss_mask"].sum() == rows["loss_mask"].sum() and copies["source"].min() >= 5
    for i in range(len(rows["source"])):
        same = (copies["tokens"] == rows["tokens"][i]).all(axis=-1)
        np.testing.assert_array_equal(copies["targets"][same].sum(axis=0), rows["targets"][i])
        for target, language in zip(copies["loss_mask"][same], copies["source"][same] - 5, strict=True):
            assert (rows["language"][i][target > 0] == language).all()
    evaluation = read_metrics(run_dir / "metrics.jsonl", "eval")[-1]
    losses = evaluation["languages"]["glot500"]
    weights = np.bincount(rows["language"].reshape(-1), rows["loss_mask"].reshape(-1))
    languages = sorted(Catalog.load(run_dir / "catalog.json").sources["glot500"].languages)
    mean = sum(losses[languages[i]] * w for i, w in enumerate(weights) if w) / weights.sum()
    assert list(evaluation["languages"]) == ["glot500"] and len(losses) == (weights > 0).sum() >= 1
    assert evaluation["sources"]["glot500"] == pytest.approx(mean, rel=1e-6)


def test_bytes_of_pieces_are_those_of_the_text():
    tokenizer = Tokenizer(str(TOKENIZER))
    for file in sorted((ROOT / "data/sample/skypile/data").glob("*.jsonl"))[:1]:
        for line in file.read_text(encoding="utf-8").splitlines()[:200]:
            text = json.loads(line)["text"]
            assert tokenizer.bytes_of_pieces[tokenizer.encode([text])[0]].sum() == len(text.encode())
    odd = "\t a  b\n日本😀\x01"
    assert tokenizer.bytes_of_pieces[tokenizer.encode([odd])[0]].sum() == len(odd.encode())
    control = [tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id]
    assert tokenizer.bytes_of_pieces[control].tolist() == [0, 0, 0]


def test_speed_knows_the_peak_and_leaves_pauses_out(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("easylm_mling.monitoring.throughput.time.monotonic", lambda: clock[0])
    memory = {"bytes_in_use": 7, "peak_bytes_in_use": 9}
    device = types.SimpleNamespace(device_kind="TPU v4", memory_stats=lambda: memory)
    c = config()
    throughput = Throughput(c, types.SimpleNamespace(local_devices=[device], size=4))
    assert throughput.measure(1)["step_seconds"] is None
    clock[0] += 8.0
    with throughput.pausing() as pause:
        clock[0] += 5.0
    with throughput.waiting():
        clock[0] += 2.0
    measured = throughput.measure(6)
    assert pause.seconds == 5 and (measured["step_seconds"], measured["data_wait_seconds"]) == (2.0, 0.4)
    assert (measured["tokens_per_second"], measured["tokens_per_second_per_chip"]) == (128.0, 32.0)
    assert measured["mfu"] == pytest.approx(measured["tflops_per_chip"] / 275, abs=1e-5)
    assert (measured["hbm_bytes"], measured["hbm_peak_bytes"]) == (7, 9)
    clock[0] += 1.0
    assert throughput.measure(7)["step_seconds"] == 1.0


def tensorboard_values(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Read back what lies in event files: records of length, checksum, message, checksum."""
    from tensorboardX.proto.event_pb2 import Event

    values: dict[str, list[tuple[int, float]]] = {}
    for file in sorted(folder.glob("events*")):
        content, at = file.read_bytes(), 0
        while at < len(content):
            (size,) = struct.unpack_from("<Q", content, at)
            message = Event.FromString(content[at + 12 : at + 12 + size])
            at += 16 + size
            for value in message.summary.value:
                values.setdefault(value.tag, []).append((message.step, value.simple_value))
    return values


def test_tensorboard_gets_what_metrics_get(monitored):
    run_dir, _ = monitored
    scalars, lines = tensorboard_values(run_dir / "tensorboard"), read_lines(run_dir / "metrics.jsonl", "train")
    assert scalars["train/loss"] == [(x["step"], float(np.float32(x["loss"]))) for x in lines]
    assert [step for step, _ in scalars["train/sources/skypile"]] == list(range(1, 11))
    assert [step for step, _ in scalars["eval/bits_per_byte"]] == [0, 4, 8, 10]


def test_a_profile_of_the_steps_asked_for(monitored):
    run_dir, output = monitored
    if problem := profiler_module.unfit_libtpu():
        pytest.skip(f"another test has loaded libtpu into this process: {problem}")
    assert f"a profile of steps 2 to 3 lies in {run_dir}/profile" in output
    (trace,) = (run_dir / "profile").rglob("*.xplane.pb")
    content = trace.read_bytes()
    assert b"jit(train_step)" in content
    assert b"threading.py" not in content  # no hooks into Python's threads


def test_a_profile_window_is_checked_at_the_start(tmp_path):
    assert ProfileConfig("100:105").window == (100, 105) and ProfileConfig().window == (0, 0)
    # YAML 1.1 would make a number of it.
    asked = config("r", "profile.steps=2:5")
    assert asked.profile.window == (2, 5)
    (tmp_path / "resolved.yaml").write_text(to_yaml(asked))
    assert load([str(tmp_path / "resolved.yaml")]) == asked
    (tmp_path / "bare.yaml").write_text("profile: {steps: 2:5}")
    assert load(["configs/demo.yaml", str(tmp_path / "bare.yaml")]).profile.window == (2, 5)
    for wrong in ("5:2", "0:3", "a:b", "3", "100", "1:2:3", "-1:4"):
        with pytest.raises(ConfigError, match="must be FIRST:LAST"):
            ProfileConfig(wrong)
    with pytest.raises(ConfigError, match=r"profile.steps=5:100 goes beyond the run \(10 steps\)"):
        config("r", "profile.steps=5:100")


def trackers(tmp_path, warned, **which):
    c = config(tmp_path / "run", *(f"log.{k}={v}" for k, v in which.items()))
    return Trackers(c, tmp_path / "run", warned.append)


class Broken:
    def __init__(self, *_):
        self.lines = 0

    def write(self, *_):
        self.lines += 1
        if self.lines > 3:
            raise ValueError("the network\nis down")


class Stuck(Broken):
    freed = threading.Event()

    def write(self, *_):
        self.freed.wait(60)

    def close(self):
        pass


def test_a_tracker_that_fails_is_reported_once_and_training_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers_module, "TensorBoard", Broken)
    warned = []
    with trackers(tmp_path, warned, tensorboard="true") as s, MetricsLog(tmp_path / "metrics.jsonl", s) as log:
        for step in range(5000):
            log.write("train", step, loss=1.0)
    assert warned == ["TensorBoard gets no more lines (the network is down); metrics.jsonl has them all"]
    assert len(read_metrics(tmp_path / "metrics.jsonl", "train")) == 5000


def test_a_tracker_that_hangs_holds_nothing_up(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers_module, "TensorBoard", Stuck)
    monkeypatch.setattr(trackers_module, "_LAST_SECONDS", 0.2)
    warned, begun = [], time.monotonic()
    with trackers(tmp_path, warned, tensorboard="true") as s:
        for step in range(3000):
            s.put({"kind": "train", "step": step, "time": 0.0, "loss": 1.0})
    assert time.monotonic() - begun < 5
    assert warned == ["TensorBoard cannot keep up: some lines go to metrics.jsonl only"]
    Stuck.freed.set()


def test_a_tracker_whose_package_is_missing_is_an_error_before_anything_begins(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers_module, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"log.wandb=mine needs wandb; install it with pip install 'easylm-mling\[wandb\]'"
    ):
        check_trackers(LogConfig(wandb="mine"))
    with pytest.raises(ConfigError, match="needs tensorboardX"):
        train_here(tmp_path / "run", "log.tensorboard=true")
    assert not (tmp_path / "run").exists()
    check_trackers(LogConfig())


def test_wandb_is_given_numbers_and_no_path(tmp_path, monkeypatch):
    """A stand-in for the package `wandb` that keeps what it is given."""
    calls = []

    class Run:
        def define_metric(self, *a, **k):
            calls.append(("define_metric", a, k))

        def log(self, values):
            calls.append(("log", values))

        def finish(self):
            calls.append(("finish",))

    def init(**settings):
        calls.append(("init", settings))
        return Run()

    fake = types.ModuleType("wandb")
    fake.init, fake.Settings = init, lambda **k: k
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    warned = []
    with trackers(tmp_path, warned, wandb="mine") as s:
        s.put({"kind": "train", "step": 7, "time": 1.0, "loss": 2.5, "sources": {"ja": 2.0}, "skipped": 0})
        s.put({"kind": "news", "step": 7, "time": 1.0, "news": ["x"]})
    assert not warned
    given = calls[0][1]
    assert (given["project"], given["name"], given["mode"], given["resume"]) == ("mine", "run", "offline", "allow")
    assert "data/sample" not in json.dumps(given["config"]) and given["config"]["weights"]["glot500"] == 30
    assert ("define_metric", ("*",), {"step_metric": "step"}) in calls
    assert calls[-2:] == [
        ("log", {"train/loss": 2.5, "train/sources/ja": 2.0, "train/skipped": 0, "step": 7}), ("finish",),
    ]  # fmt: skip


@pytest.mark.faults
@pytest.mark.parametrize("mode", ["offline", "online, no network"])
def test_the_real_wandb_without_a_network(tmp_path, mode):
    """Fault 17: the run trains to its end; offline, its file holds every line."""
    pytest.importorskip("wandb")
    environment = os.environ | {"WANDB_BASE_URL": "http://127.0.0.1:9", "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}
    environment |= {"WANDB_MODE": "offline"} if mode == "offline" else {"WANDB_API_KEY": "0" * 40}
    verb = [sys.executable, "-m", "easylm_mling", "train", "configs/demo.yaml", *TINY, "mesh.cpu_devices=4"]
    command = [*verb, f"run_dir={tmp_path / 'run'}", "log.wandb=mine"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl", "train")) == 10
    files = list((tmp_path / "run" / "wandb").rglob("*.wandb"))
    assert files and b"llama2ko" in files[0].read_bytes() if mode == "offline" else True
    for text in (done.stdout + done.stderr, *(f.read_bytes().decode(errors="replace") for f in files)):
        assert "0" * 40 not in text


def test_numbers_of_a_line():
    line = {"kind": "train", "step": 3, "time": 1.0, "loss": None, "a": {"b": {"c": 2}}, "news": ["x"], "yes": True}
    assert numbers(line) == {"train/a/b/c": 2}


def test_the_console_warns_and_shows_tables_without_reading_markup():
    out = io.StringIO()
    console = Console(file=out, width=100)
    warn(console, "step 3: [red]disk[/red] is full")
    source = {"wanted": 0.5, "tokens": 1000, "epochs": None}
    ledger = {f"[b]{i}": source for i in range(14)}
    console.print(sources_table(9, {"ledger": ledger, "sources": {"[b]0": 2.0}}, {"sources": {"[b]0": 1.5}}))
    with ProgressLine(console, 100, 1000) as line:
        assert line.update(1, None) is None
        line.update(2, 2.0, 0.5)
    shown = out.getvalue()
    assert "warning: step 3: [red]disk[/red] is full\n" in shown
    assert "[b]0" in shown and "and 2 more" in shown and "2.000" in shown and "1.500" in shown
    assert "loss not finite" in shown
    assert logging.getLogger().level == logging.WARNING


def test_a_libtpu_that_would_crash_takes_no_profile(tmp_path, monkeypatch):
    lines, started = [], []
    maps = "7f00-7f01 r-xp 0 00:00 0 /site-packages/libtpu/libtpu.so"
    monkeypatch.setattr(profiler_module.Path, "read_text", lambda self: maps)
    monkeypatch.setattr(profiler_module.jax.profiler, "start_trace", lambda *a, **k: started.append(a))
    monkeypatch.setattr(
        profiler_module.importlib.metadata, "requires", lambda name: ['libtpu==0.0.42.*; extra == "tpu"']
    )
    for installed, problem in (("0.0.42.1", False), ("0.0.52", True)):
        monkeypatch.setattr(profiler_module.importlib.metadata, "version", lambda name, v=installed: v)
        assert bool(profiler_module.unfit_libtpu()) == problem
    profiler_module.Profiler(ProfileConfig("1:2"), tmp_path, lines.append).before(1)
    assert not started and "no profile is taken: libtpu 0.0.52 cannot profile with jax" in lines[0]
