"""The launcher's state machine, which is a pure function, and its run files."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from easylm_mling import errors as exits

TPU_SCRIPTS = Path(__file__).parent.parent / "tpu_scripts"
sys.path.insert(0, str(TPU_SCRIPTS))

from launcher import decide as d  # noqa: E402
from launcher import machine as m  # noqa: E402
from launcher.bucket import Bucket, NoAnswer  # noqa: E402
from launcher.gcloud import Answer  # noqa: E402
from launcher.machine import Machine, look  # noqa: E402
from launcher.rehearse import rehearsal  # noqa: E402
from launcher.run_file import WrongInput, read_run_file  # noqa: E402
from launcher.workers import EXITED, IDLE, LOST, RUNNING, Worker  # noqa: E402


def worker(number: int, attempt: int, state: str, code=None, pack="p") -> Worker:
    return Worker(number, pack, attempt, state, code)


def next_action(workers, kind=m.READY, attempt=2, hosts=None, ended_for=0.0) -> str:
    hosts = len(workers or ()) if hosts is None else hosts
    return d.decide(d.Seen(Machine(kind, "said", hosts), workers, "p", attempt, ended_for), 10).what


# Everything that a worker can say, of the attempt that is to run (2) and others.
SAYINGS = [
    (0, IDLE, None), (1, RUNNING, None), (1, EXITED, 42), (1, LOST, None), (2, RUNNING, None), (2, EXITED, 0), (2, EXITED, 1),
    (2, EXITED, 42), (2, LOST, None), (3, RUNNING, None),
]  # fmt: skip


def test_only_a_machine_that_is_lost_is_deleted_and_no_guess_is_acted_on():
    for sayings in itertools.product(SAYINGS, repeat=3):
        workers = [worker(i, *s) for i, s in enumerate(sayings)]
        for kind in (m.UNKNOWN, m.COMING, m.GOING):
            assert next_action(workers, kind) == d.WAIT
        assert next_action(workers, m.FOREIGN) == d.REFUSE
        assert next_action(workers, m.LOST) == d.DELETE
        assert next_action(workers, m.ABSENT) == d.CREATE
        for ended_for in (0.0, 11.0):
            assert next_action(workers, ended_for=ended_for) not in (d.DELETE, d.CREATE)
        # One that does not answer may be doing anything.
        assert next_action(workers[1:], hosts=3) == d.WAIT
    assert next_action(None, hosts=3) == d.WAIT


def test_what_follows_from_what_the_workers_say():
    for sayings in itertools.product(SAYINGS, repeat=3):
        workers = [worker(i, *s) for i, s in enumerate(sayings)]
        attempts, states = [s[0] for s in sayings], [s[1] for s in sayings]
        soon, late = next_action(workers), next_action(workers, ended_for=11.0)
        over = [s[1] in (EXITED, LOST) for s in sayings]
        if 3 in attempts:
            assert soon == late == d.REFUSE
        elif 2 not in attempts:
            assert soon == late == (d.END_OTHERS if RUNNING in states else d.START)
        elif all(o for o, a in zip(over, attempts, strict=True) if a == 2):
            assert soon == late == d.ENDED
        elif any(o for o, a in zip(over, attempts, strict=True) if a == 2):
            assert (soon, late) == (d.WAIT, d.END_OTHERS)
        else:
            # A start that did not reach all is repeated: it changes nothing where it did.
            assert soon == late == (d.WAIT if set(attempts) == {2} else d.START)


def test_another_pack_is_set_up_before_a_start_and_never_under_a_trainer():
    assert next_action([worker(0, 1, EXITED, 42), worker(1, 1, EXITED, 42, pack="old")]) == d.SET_UP
    assert next_action([worker(0, 2, RUNNING), worker(1, 2, RUNNING, pack="old")]) == d.WAIT


@pytest.mark.parametrize(
    "ends, what, why",
    [
        (((EXITED, 0), (EXITED, 0)), d.FINISHED, "done"),
        (((EXITED, 42), (EXITED, 42)), d.RESTART, "signal"),
        (((EXITED, 42), (EXITED, 0)), d.RESTART, "signal"),
        (((EXITED, 85), (EXITED, 1)), d.CRASH, "worker 1 ended with 1"),
        (((EXITED, 85), (EXITED, 134)), d.CRASH, "worker 1 ended with 134"),
        (((EXITED, 85), (EXITED, 85)), d.CRASH, "worker 0 ended with 85"),
        (((EXITED, 85), (LOST, None)), d.CRASH, "worker 1 died"),
        (((EXITED, 0), (LOST, None)), d.CRASH, "worker 1 died"),
        (((EXITED, 85), (EXITED, 2)), d.WRONG, "worker 1 ended with 2"),
        (((EXITED, 2), (EXITED, 3)), d.STOP, "no checkpoint"),
        (((EXITED, 3), (EXITED, 85)), d.STOP, "no checkpoint"),
        (((EXITED, 130), (EXITED, 42)), d.CRASH, "worker 0 ended with 130"),
    ],
)
def test_exit_codes_decide(ends, what, why):
    found = d.verdict([worker(i, 2, *end) for i, end in enumerate(ends)], 2)
    assert found[0] == what and why in found[1]
    # One that was never reached has not done its part.
    assert d.verdict([worker(0, 2, EXITED, 0), worker(1, 1, EXITED, 0)], 2)[0] == d.CRASH


def test_exit_codes_are_the_trainers():
    ours = (d.DONE, d.WRONG_INPUT, d.NO_CHECKPOINT, d.PREEMPTED, d.STUCK)
    assert ours == (exits.DONE, exits.WRONG_INPUT, exits.NO_CHECKPOINT, exits.PREEMPTED, exits.STUCK)


@pytest.mark.parametrize(
    "answer", ['{"state": {"state": "NEVER_HEARD_OF"}}', "no json", '{"state": 3}', "[]", "null", '{"tpu": {}}']
)
def test_an_answer_that_is_not_understood_is_unknown(answer):
    run = read_run_file(str(TPU_SCRIPTS / "examples" / "v4-64.ini"))
    assert look(lambda *a, **k: Answer(0, answer, ""), run, "me").kind == m.UNKNOWN
    for error in ("", "PERMISSION_DENIED", "NOT_FOUND: Project", "timeout", f"{run.name}: INTERNAL"):
        assert look(lambda *a, error=error, **k: Answer(1, "", error), run, "me").kind == m.UNKNOWN
    assert look(lambda *a, **k: Answer(1, "", f"NOT_FOUND: queuedResources/{run.name}"), run, "me").kind == m.ABSENT


@pytest.mark.parametrize(
    "labels, kind",
    [
        ({}, m.FOREIGN),
        ({"easylm-owner": "you"}, m.FOREIGN),
        ({"easylm-run": "me"}, m.FOREIGN),
        ({"easylm-owner": "me"}, m.LOST),
    ],
)
def test_only_the_owner_that_the_label_names_is_the_owner(labels, kind):
    run = read_run_file(str(TPU_SCRIPTS / "examples" / "v4-64.ini"))
    for node in ({"labels": labels}, {} if not labels else {"labels": labels}):
        found = {"state": {"state": "SUSPENDED"}, "tpu": {"nodeSpec": [{"node": node}]}}
        assert look(lambda *a, found=found, **k: Answer(0, json.dumps(found), ""), run, "me").kind == kind


EXAMPLES = sorted((TPU_SCRIPTS / "examples").glob("*.ini"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_examples_are_of_their_type_and_their_configs_load(path, monkeypatch):
    from easylm_mling.config import load

    monkeypatch.chdir(TPU_SCRIPTS.parent)
    run = read_run_file(str(path))
    assert run.type == path.stem or (path.stem, run.type) == ("first", "v6e-8")
    settings = [x for x in run.command[4:] if "=" in x]
    config = load([str(TPU_SCRIPTS.parent / x) for x in run.command[4:] if "=" not in x], settings)
    assert config.run_dir == f"{run.url}"
    assert path.stem == "first" or config.mesh.slice == path.stem.replace("v5litepod", "v5e")
    assert rehearsal(run, exists=False)


def test_every_kind_of_slice_has_an_example():
    assert {p.stem for p in EXAMPLES} >= {"v4-64", "v4-256", "v5litepod-64", "v5p-64", "v6e-64"}


@pytest.mark.parametrize(
    "old, new, said",
    [
        ("zone =", "zon =", "did you mean zone"),
        ("[machine]", "[machin]", "did you mean machine"),
        ("name = mling-7b", "name = Mling 7b", "must be up to 40 of a-z"),
        ("gs://my-bucket/runs", "/runs", "must be like gs://"),
        ("gs://my-bucket/runs", "gs://my-bucket/*", "must be like gs://"),
        ("type = v4-64", "type = v9-64", "must be like v4-64"),
        ("capacity = spot", "capacity = cheap", "must be one of spot, reserved, on-demand"),
        ("capacity = spot", "capacity = spot\ncreate_flags = --labels=a=b", "none of ours"),
        ("configs/run/v4-64.yaml", "configs/run/none.yaml", "is no file or folder in the project"),
        ("configs/run/v4-64.yaml", "../../etc/passwd", "is no file or folder in the project"),
        ("project = my-project", "", "needs `project = ...`"),
        ("settings =", "settings =\n    run_dir=elsewhere", "run_dir"),
        ("[train]", "[policy]\nmax_crashes = many\n[train]", "max_crashes must be a number"),
        ("names = HF_TOKEN", "names = A-B", "cannot be the name of an environment variable"),
        ("tpu_scripts/import.sh", "nowhere.sh", "is no file"),
        ("[train]", "[run]", "cannot be read"),
    ],
)
def test_what_is_wrong_in_a_run_file_is_named(tmp_path, old, new, said):
    text = (TPU_SCRIPTS / "examples" / "v4-64.ini").read_text()
    assert old in text
    (tmp_path / "run.ini").write_text(text.replace(old, new, 1))
    with pytest.raises(WrongInput, match=said.replace("[", r"\[").replace("*", r"\*")):
        read_run_file(str(tmp_path / "run.ini"))


def test_an_old_python_runs_it():
    """Where one is there: what it needs of the language is also held by reading it (test_launch.py)."""
    old = next((p for p in ("python3.9", "python3.10") if _runs(p)), None)
    if old is None:
        pytest.skip("no Python 3.9 or 3.10 here")
    printed = subprocess.run(
        [old, TPU_SCRIPTS / "tpu.py", "up", TPU_SCRIPTS / "examples" / "v4-64.ini", "--dry-run"],
        env={**os.environ, "HF_TOKEN": "of a person"},
        capture_output=True,
        text=True,
    )
    assert printed.returncode == 0 and "queued-resources create mling-7b" in printed.stdout, printed.stderr


def test_what_is_asked_for_is_written_down_or_is_an_error():
    bucket = Bucket(lambda *arguments, **_: Answer(1, "", "ERROR: 503"), "gs://bucket/run")
    with pytest.raises(NoAnswer, match="ERROR: 503"):
        bucket.want("run")


def _runs(program: str) -> bool:
    try:
        return subprocess.run([program, "-c", ""], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False
