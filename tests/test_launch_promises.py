"""What the launcher promises whatever is asked and by whom: nothing that was asked for is forgotten, and one drives."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from fake_cloud import NO_CAPACITY, Cloud
from launched import (
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
)

sys.path.insert(0, str(TPU.parent))

from launcher import machine as m  # noqa: E402
from launcher import requests  # noqa: E402
from launcher.drive import FINISHED_RUN, Driver  # noqa: E402
from launcher.gcloud import Answer, Gcloud  # noqa: E402
from launcher.logs import Follower  # noqa: E402
from launcher.run_file import RunFile, WrongInput, read_run_file  # noqa: E402
from launcher.workers import Workers  # noqa: E402

WAITS = {"states": ["WAITING_FOR_RESOURCES"]}


@pytest.fixture
def cloud(tmp_path):
    cloud = Cloud(tmp_path / "cloud").make()
    yield cloud
    for machine in [r["machine"] for r in cloud.state["resources"].values()]:
        cloud.wipe(machine)


def change(run_file, old: str, new: str):
    text = run_file.read_text()
    assert old in text
    run_file.write_text(text.replace(old, new))


def interrupted(cloud: Cloud, run_file, *flags: str) -> str:
    """A launcher that waits for a machine, and is ended by Ctrl-C."""
    made = cloud.state["made"]
    launcher = tpu(cloud, "run", run_file, *flags)
    wait_for(lambda: cloud.state["made"] > made)
    time.sleep(0.5)
    launcher.send_signal(signal.SIGINT)
    return end(launcher, 130)


def places(cloud: Cloud) -> list[str]:
    return sorted(r["zone"] for r in cloud.state["resources"].values())


@pytest.mark.slow
def test_what_was_asked_for_in_another_zone_is_withdrawn_and_down_deletes_all(cloud, tmp_path):
    with cloud.changing() as state:
        state["creations"] = [WAITS, WAITS]
    run_file = stand_in(tmp_path, cloud)
    assert "what was asked for stays asked for" in interrupted(cloud, run_file)
    change(run_file, "us-central2-b", "us-east1-d")
    assert places(cloud) == ["us-central2-b"]
    status = end(tpu(cloud, "status", run_file))
    assert "WAITING_FOR_RESOURCES, in us-central2-b" in status
    printed = interrupted(cloud, run_file)
    assert "what was asked for in us-central2-b of a-project (WAITING_FOR_RESOURCES) is withdrawn" in printed
    assert places(cloud) == ["us-east1-d"]
    change(run_file, "us-east1-d", "us-west4-a")
    end(tpu(cloud, "down", run_file))  # before the third zone was ever asked
    nothing_is_left(cloud)
    assert json.loads((run_directory(cloud) / "launch/state.json").read_text())["requests"] == []


@pytest.mark.slow
def test_a_machine_in_another_zone_that_may_train_is_no_one_to_be_left_or_deleted(cloud, tmp_path):
    run_file = stand_in(tmp_path, cloud, 10_000)
    end(tpu(cloud, "run", run_file))
    change(run_file, "us-central2-b", "us-east1-d")
    printed = end(tpu(cloud, "run", run_file), 2)
    assert "a machine (ACTIVE, READY) in us-central2-b of a-project" in printed and "`down` deletes it" in printed
    assert cloud.state["made"] == 1 and cloud.processes()
    end(tpu(cloud, "down", run_file, "--now"))
    nothing_is_left(cloud)


@pytest.mark.slow
def test_another_machine_than_the_file_asks_for_is_not_taken_for_it(cloud, tmp_path):
    with cloud.changing() as state:
        state["creations"] = [WAITS]
    run_file = stand_in(tmp_path, cloud, 10_000)
    interrupted(cloud, run_file)
    change(run_file, "v4-16", "v4-8")
    assert "what was asked for is withdrawn" in end(tpu(cloud, "up", run_file))
    assert cloud.state["resources"]["test"]["type"] == "v4-8"
    change(run_file, "v4-8", "v4-16")
    printed = end(tpu(cloud, "run", run_file), 2)
    assert "asked for with --accelerator-type=v4-8" in printed and "`down` deletes it, then `run` again" in printed


@pytest.mark.slow
def test_a_refused_deletion_is_told_and_ends(cloud, tmp_path):
    why = "PERMISSION_DENIED: Permission 'tpu.queuedResources.delete' denied on resource"
    run_file = stand_in(tmp_path, cloud, 10_000)
    end(tpu(cloud, "run", run_file))
    with cloud.changing() as state:
        state["delete_refused"] = why
    printed = end(tpu(cloud, "down", run_file, "--now"), 2)
    assert (
        why in printed and "may be billed" in printed and "--zone=us-central2-b --project=a-project --force" in printed
    )
    assert "no machine is left" not in printed
    with cloud.changing() as state:
        state["delete_refused"] = ""
    end(tpu(cloud, "down", run_file, "--now"))
    nothing_is_left(cloud)


@pytest.mark.slow
def test_a_state_that_is_lost_or_damaged_loses_no_machine_and_no_log(cloud, tmp_path):
    run_file = stand_in(tmp_path, cloud, 10_000, STEP_SECONDS=0.05)
    end(tpu(cloud, "run", run_file))
    wait_for(lambda: (run_directory(cloud) / "logs/attempt-0001/worker-1.log").exists())
    state = run_directory(cloud) / "launch/state.json"
    state.unlink()
    status = end(tpu(cloud, "status", run_file))
    assert "holds no state); but in us-central2-b of a-project: ACTIVE, READY" in status
    before, made = max(steps(cloud)), cloud.state["made"]
    assert "running" in end(tpu(cloud, "run", run_file))  # it is this run's, and goes on
    wait_for(lambda: max(steps(cloud)) > before)
    done = steps(cloud)
    assert sorted(done) == list(range(1, max(done) + 1)) and cloud.state["made"] == made
    state.write_text(state.read_text()[:100])
    assert "cannot be used" in end(tpu(cloud, "run", run_file), 2)
    assert "no machine is left" in end(tpu(cloud, "down", run_file))
    nothing_is_left(cloud)
    state.unlink()
    assert "so there is none to delete" in end(tpu(cloud, "down", run_file), 2)
    end(tpu(cloud, "run", run_file))
    assert {p.name for p in (run_directory(cloud) / "logs").iterdir()} >= {"attempt-0001"}
    assert "attempt 2 starts" in json.dumps(json.loads(state.read_text())["history"])


@pytest.mark.slow
@pytest.mark.parametrize("silent", [0, 1])
def test_a_silent_worker_costs_its_own_answer_only(cloud, tmp_path, silent):
    """The run comes to its end beside it, `stop` does not wait for it, and what stands still is replaced."""
    policy = {"answer_seconds": 3, "silence_minutes": 0.1}
    run_file = stand_in(tmp_path, cloud, 60, policy=policy, STEP_SECONDS=0.2)
    launcher = tpu(cloud, "run", run_file, "--keep-alive")
    wait_for(lambda: steps(cloud))
    with cloud.changing() as state:
        state["ssh_hangs"] = [silent]
    stopped = end(tpu(cloud, "stop", run_file), seconds=60)
    assert f"worker {1 - silent}: ended with" in stopped and f"worker {silent}" not in stopped
    end(launcher)
    launcher = tpu(cloud, "run", run_file, "--keep-alive")
    wait_for(lambda: cloud.state["made"] == 2)  # nothing is made while it hangs
    with cloud.changing() as state:
        state["ssh_hangs"] = []
    printed = end(launcher)
    assert (
        f"1 of 2 workers answer, not {silent}" in printed and "the machine is deleted, and asked for again" in printed
    )
    assert curve(cloud) == expected_curve(60)
    nothing_is_left(cloud)


@pytest.mark.slow
def test_workers_that_never_answer_have_an_end(cloud, tmp_path):
    with cloud.changing() as state:
        state["ssh_refused"] = 10_000
    run_file = stand_in(tmp_path, cloud, policy={"silence_minutes": 0.03})
    printed = end(tpu(cloud, "run", run_file, "--keep-alive"), 1)
    assert "given up: 0 of 2 workers answer" in printed and "Connection refused" in printed
    nothing_is_left(cloud)


@pytest.mark.parametrize(
    "why, looks",
    [
        ("PERMISSION_DENIED: Permission denied on 'locations/us-central2-b' (or it may not exist)", 1),
        pytest.param("NOT_FOUND: Location us-central2-b was not found", 6, marks=pytest.mark.slow),
    ],
)
def test_a_zone_that_is_not_there_is_told_and_ends(cloud, tmp_path, why, looks):
    with cloud.changing() as state:
        state["zones_refused"] = {"us-central2-b": why}
    run_file = stand_in(tmp_path, cloud)
    assert why in end(tpu(cloud, "run", run_file, "--keep-alive"), 2)
    assert len([c for c in cloud.calls() if "describe" in c["arguments"]]) == looks
    assert why in end(tpu(cloud, "down", run_file), 2)  # no "nothing is billed" on a guess
    with cloud.changing() as state:
        state["zones_refused"] = {}
        state["creations"] = [{"refuse": why}] * 100
    assert why in end(tpu(cloud, "run", run_file, "--keep-alive"), 2)
    change(run_file, "us-central2-b", "us-east1-d")
    with cloud.changing() as state:
        state["creations"], state["zones_refused"] = [], {"us-central2-b": why}
    end(tpu(cloud, "run", run_file, "--keep-alive"))  # the zone that never was stands in nobody's way
    nothing_is_left(cloud)


@pytest.mark.slow
def test_machines_that_fail_each_time_end_with_googles_reason(cloud, tmp_path):
    why = "the accelerator v4-16 was not found in zone us-central2-b"
    with cloud.changing() as state:
        state["creations"] = [{"states": ["PROVISIONING", f"FAILED: {why}"]}] * 1000
    run_file = stand_in(tmp_path, cloud, policy={"max_crashes": 2})
    printed = end(tpu(cloud, "run", run_file, "--keep-alive"), 1)
    assert f"given up: 3 machines in a row came to nothing; the last one is FAILED: {why}" in printed
    assert cloud.state["made"] == 3
    nothing_is_left(cloud)


@pytest.mark.slow
def test_capacity_is_asked_for_again_and_again_until_valid_until(cloud, tmp_path):
    failing = [{"refuse": NO_CAPACITY}, {"states": [f"FAILED: {NO_CAPACITY}"]}]
    with cloud.changing() as state:
        state["creations"] = failing * 4
    run_file = stand_in(tmp_path, cloud, policy={"max_crashes": 0, "backoff_seconds": 0.01})
    end(tpu(cloud, "run", run_file, "--keep-alive"))
    assert cloud.state["made"] == 5 and curve(cloud) == expected_curve(12)
    with cloud.changing() as state:
        state["creations"] = [{"refuse": NO_CAPACITY}] * 1000
    change(run_file, "capacity = spot", "capacity = spot\nvalid_until = 3s")
    printed = end(tpu(cloud, "run", run_file, "--keep-alive", "--again"), 1)
    assert "no machine was to be had within [machine] valid_until = 3s" in printed and NO_CAPACITY in printed


def test_of_launchers_that_start_at_once_one_drives(cloud, tmp_path):
    hold = tmp_path / "hold"  # the run must not end before the launchers have
    hold.touch()
    run_file = stand_in(tmp_path, cloud, 40, HOLD=hold)
    for _ in range(2):  # of a run that is new, and of one whose launcher was killed
        launchers = [tpu(cloud, "run", run_file, "--keep-alive") for _ in range(4)]
        wait_for(lambda ls=launchers: sum(x.poll() is None for x in ls) == 1)
        for launcher in launchers:
            if launcher.poll() is not None:
                assert "is driven by a launcher on" in end(launcher, 2)
        [driver] = [x for x in launchers if x.poll() is None]
        kill(driver)
    hold.unlink()
    end(tpu(cloud, "run", run_file, "--keep-alive"))
    assert curve(cloud) == expected_curve(40) and cloud.state["made"] == 1
    nothing_is_left(cloud)


def test_what_a_killed_launcher_was_writing_arrives_whole(tmp_path, monkeypatch):
    """gcloud outlives it, and reads what it was given only then."""
    gcloud, text = tmp_path / "gcloud", "whole " * 100_000  # more than a pipe holds
    gcloud.write_text(
        f"#!/bin/sh\ncd '{tmp_path}'; touch began; while [ ! -e killed ]; do sleep 0.01; done; cat > new; mv new object\n"
    )
    gcloud.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    code = "import sys; from launcher.gcloud import Gcloud; Gcloud()('storage', 'cp', '-', 'gs://b/x', stdin='whole ' * 100_000)"
    launcher = subprocess.Popen([sys.executable, "-c", code], cwd=TPU.parent)
    wait_for((tmp_path / "began").exists)
    launcher.kill()
    launcher.wait()
    (tmp_path / "killed").touch()
    wait_for((tmp_path / "object").exists)
    assert (tmp_path / "object").read_text() == text


def test_a_launcher_whose_place_was_taken_ends_and_writes_no_more(cloud, tmp_path):
    run_file = stand_in(tmp_path, cloud, 10_000)
    first = tpu(cloud, "run", run_file, "--keep-alive")
    wait_for(lambda: steps(cloud))
    second = tpu(cloud, "run", run_file, "--keep-alive", "--take-over")
    assert "has taken this one's place" in end(first, 2)
    end(tpu(cloud, "down", run_file, "--now"))
    end(second)
    nothing_is_left(cloud)


@pytest.mark.slow
def test_what_lies_on_a_worker_is_the_runs_and_not_of_who_logs_in(cloud, tmp_path):
    """OS Login gives each person a home of their own: here it is another one at each call."""
    here = str(TPU.parent.parent / "tests")
    program = tmp_path / "homes.py"
    program.write_text(
        f"import os, sys; sys.path.insert(0, {here!r}); import fake_cloud\nold = fake_cloud.Cloud._worker\n"
        "def worker(self, found, w):\n"
        "    home, env = old(self, found, w); home = home / f'home-{os.getpid()}'; home.mkdir(exist_ok=True)\n"
        "    env['HOME'] = str(home); return home, env\n"
        "fake_cloud.Cloud._worker = worker; sys.exit(fake_cloud.main())"
    )
    cloud._program("gcloud", f'FAKE_CLOUD="{cloud.folder}" exec "{sys.executable}" {program} "$@"')
    run_file = stand_in(tmp_path, cloud, 12)
    printed = end(tpu(cloud, "run", run_file, "--keep-alive"))
    assert printed.count("setting up") == 1 and "crash" not in printed
    assert curve(cloud) == expected_curve(12) and len(steps(cloud)) == 12
    nothing_is_left(cloud)


# Without a cloud.


@pytest.fixture
def run(tmp_path) -> RunFile:
    program = tmp_path / "cloud"
    return read_run_file(str(stand_in(tmp_path, Cloud(program), policy={"poll_seconds": 10})))


def described(state: str, run: RunFile) -> str:
    labels = {"easylm-owner": m.owner_of(run)}
    return json.dumps({"state": {"state": state}, "tpu": {"nodeSpec": [{"node": {"labels": labels}}]}})


@pytest.mark.parametrize("patient", [False, True])
def test_a_deletion_that_never_comes_to_pass_ends_with_googles_words(run, patient):
    naps = []

    def gcloud(*arguments, **_):
        if "delete" in arguments:
            return Answer(1, "", "ERROR: (gcloud) FAILED_PRECONDITION: it is busy")
        return Answer(0, described("PROVISIONING", run), "")

    with pytest.raises(requests.StillThere, match="FAILED_PRECONDITION: it is busy; mend that"):
        requests.remove(gcloud, run, lambda text: None, naps.append, patient)
    assert len(naps) < 20 and naps[0] < naps[-1]
    with pytest.raises(requests.StillThere, match="DELETING for"):
        looks = lambda *arguments, **_: Answer(0, described("DELETING", run), "")  # noqa: E731
        requests.remove(looks, run, lambda text: None, lambda seconds: None, patient)


def test_a_launcher_that_slept_while_down_was_said_leaves_nothing(run):
    """It had decided to ask for a machine, and asks when it wakes: another turn has begun and ended meanwhile."""
    objects, there = {}, []

    def gcloud(*arguments, stdin="", **_):
        if arguments[:2] == ("storage", "cp"):
            objects[arguments[3]] = stdin
        elif arguments[0] == "storage":
            text = objects.get(arguments[2])
            return Answer(0, text, "") if text is not None else Answer(1, "", "matched no objects")
        elif "create" in arguments:
            there.append(1)
            objects[f"{run.url}/launch/term-2"], objects[f"{run.url}/launch/wanted"] = "{}", "down"
        elif "delete" in arguments:
            there.clear()
        elif not there:
            return Answer(1, "", f"NOT_FOUND: queuedResources/{run.name}")
        else:
            return Answer(0, described("ACCEPTED", run), "")
        return Answer(0, "", "")

    driver = Driver(run, gcloud, FINISHED_RUN, lambda text: None, lambda seconds: None)
    with pytest.raises(WrongInput, match="has taken this one's place"):
        driver.drive(False, False)
    assert there == []


@pytest.mark.parametrize("asked", ["down 2", "stop 2"])
def test_what_is_asked_for_while_a_launcher_begins_is_not_lost(run, asked):
    """It uploads what the workers get, which takes a while; an older `down` it was started behind does not count."""
    objects, said = {f"{run.url}/launch/wanted": "down 1"}, []

    def gcloud(*arguments, stdin="", **_):
        if arguments[:2] == ("storage", "cp"):
            objects[arguments[3]] = stdin
            if "/launch/pack-" in arguments[3]:
                objects[f"{run.url}/launch/wanted"] = asked
        elif arguments[0] == "storage":
            text = objects.get(arguments[2])
            return Answer(0, text, "") if text is not None else Answer(1, "", "matched no objects")
        else:
            raise AssertionError(f"a machine was looked for or asked for: {arguments}")
        return Answer(0, "", "")

    assert Driver(run, gcloud, FINISHED_RUN, said.append, lambda seconds: None).drive(False, False) == 0
    assert said[-1] == "a stop was asked for; this launcher ends"


def test_status_calls_nothing_a_checkpoint_that_is_not_whole():
    """metrics.jsonl tells of a save when it begins; only the event is written behind it."""
    from launcher.status import _training

    at = {"step": 4, "time": "2026-01-01T00:00:00Z"}
    metrics = [{**at, "kind": "train", "loss": 1.0, "tokens": 10}, {**at, "kind": "languages"}]

    class Empty:
        def read(self, name, last_bytes=0):
            return None

    def told(events):
        return dict(_training(metrics, events, Empty(), 0.0))["checkpoint"]  # type: ignore[arg-type]

    assert told([]) == told([{**at, "event": "save_failed"}]) == "none yet"
    assert told([{**at, "event": "saved"}]).startswith("of step 4")


def test_all_that_is_left_is_named_and_the_others_are_deleted(run):
    deleted = []

    def gcloud(*arguments, **_):
        zone = next(a for a in arguments if a.startswith("--zone="))
        if "delete" in arguments:
            if zone == "--zone=a":
                return Answer(1, "", "ERROR: PERMISSION_DENIED: no")
            deleted.append(zone)
        if zone in deleted:
            return Answer(1, "", f"NOT_FOUND: queuedResources/{run.name}")
        return Answer(0, described("FAILED", run), "")

    places = [requests.at(run, {"zone": z, "project": "p"}) for z in "abc"]
    with pytest.raises(WrongInput, match="test in a of p was not deleted.*PERMISSION_DENIED: no"):
        requests.remove_all(gcloud, places, lambda text: None, lambda seconds: None)
    assert deleted == ["--zone=b", "--zone=c"]


@pytest.mark.slow
def test_of_a_gcloud_that_hangs_what_it_said_is_kept_and_it_ends(tmp_path, monkeypatch):
    program = tmp_path / "gcloud"
    # Its child, in a session of its own, holds the pipe.
    program.write_text("#!/bin/bash\necho said; echo 'ERROR: (gcloud) words' >&2; setsid sleep 30 & sleep 30\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    begun = time.monotonic()
    answer = Gcloud()("anything", timeout=0.5)
    assert (answer.ok, answer.out) == (False, "said\n") and "words" in answer.why
    assert time.monotonic() - begun < 15


def test_googles_words_are_shown_whole():
    text = 'Using it.\nERROR: (gcloud.x) {\n  "code": 8,\n  "message": "Quota exceeded"\n}\n'
    assert Answer(1, "", text).why == 'ERROR: (gcloud.x) { "code": 8, "message": "Quota exceeded" }'


def test_followed_logs_show_each_line_once_and_lose_none():
    stamp = "2026-01-01T00:00:0{}Z {}\n".format
    objects = {"logs/attempt-0001/worker-0.log": stamp(1, "a") + stamp(1, "a")}

    class Bucket:
        def list(self, name):
            return sorted(objects)

        def read(self, name, last_bytes=0):
            return objects[name]

    follower = Follower(Bucket(), None, None)  # type: ignore[arg-type]
    assert [line[-1] for line in follower.more()] == ["a", "a"]
    assert follower.more() == []
    objects["logs/attempt-0001/worker-0.log"] += stamp(1, "a") + stamp(2, "b")
    objects["logs/attempt-0001/worker-1.log"] = stamp(1, "c")  # it came later, and is older
    assert sorted(line[-1] for line in follower.more()) == ["a", "b", "c"]
    objects["logs/attempt-0001/worker-0.log"] += stamp(3, "last")
    objects["logs/attempt-0002/worker-0.log"] = stamp(5, "next")
    assert [line.split()[-1] for line in follower.more()] == ["last", "next"]
    assert follower.more() == []


@pytest.mark.skipif(os.getuid() != 0, reason="needs two accounts")
@pytest.mark.parametrize("sudo", [True, False])
def test_another_account_acts_as_the_one_that_came_first_or_says_whose_it_is(run, tmp_path, sudo):
    """Real accounts on one disk, with a stand-in for sudo where there is one."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))  # pytest's own is closed to other accounts
    folder.chmod(0o777)
    programs = {"curl": "echo 0", "hostname": "echo t1v-w-0", "gcloud": "exit 1"}
    if sudo:
        # As root is: it may become anybody. (-n true; -n -H -u "#UID" bash -c ...)
        programs["sudo"] = f'echo "$*" >> {folder}/sudo.txt; [ "$2" = true ] || echo "ran as ${{4#\\#}}"'
    (folder / "bin").mkdir()
    for name, text in programs.items():
        (folder / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / "bin" / name).chmod(0o755)
    (folder / "bin").chmod(0o755)

    def log_in(account: int, command: str) -> str:
        env = {"PATH": f"{folder}/bin:/usr/bin:/bin", "EASYLM_ROOT": f"{folder}/easylm", "HOME": str(folder)}
        as_account = ["setpriv", f"--reuid={account}", "--clear-groups", "--regid=54321", "bash", "-c", command]
        return subprocess.run(as_account, env=env, capture_output=True, text=True, cwd="/").stdout

    workers = Workers(None, run)
    assert log_in(54321, workers._script("status")) == "easylm-worker 0 pack= attempt=0 state=idle code=-\n"
    log_in(54321, workers._as_owner("mkdir -p $EASYLM_ROOT/test/code/tpu_scripts; id -u > $EASYLM_ROOT/test/who"))
    script = folder / "easylm/test/code/tpu_scripts/worker_run.sh"
    script.write_bytes((TPU.parent / "worker_run.sh").read_bytes())
    assert (folder / "easylm/test/who").read_text() == "54321\n"
    assert "state=idle" in log_in(54321, workers._script("status"))
    printed = log_in(54322, workers._script("start 1"))
    assert ("ran as 54321" in printed) if sudo else printed.startswith("easylm-account ")
    assert not (script.parents[2] / "attempt").exists()
    shutil.rmtree(folder)
