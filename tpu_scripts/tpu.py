#!/usr/bin/env python3
"""tpu.py VERB RUN.ini: from a laptop to a TPU slice and back. See README.md beside it.

Needs Python 3.9 or newer and gcloud; nothing else of this project has to be installed.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time

from launcher import machine as m
from launcher import requests
from launcher.bucket import Bucket, NoAnswer
from launcher.drive import FINISHED_RUN, STARTED, UP, Driver
from launcher.driving import Turn
from launcher.gcloud import Gcloud
from launcher.logs import Follower, merged
from launcher.rehearse import rehearsal
from launcher.run_file import RunFile, WrongInput, read_run_file
from launcher.status import status
from launcher.workers import Worker, Workers, place

KEEP_ALIVE_HELP = """
--keep-alive watches until the run is done: a machine that is lost is asked for again, a trainer that crashed is started
again, and in the end the machine is deleted. A laptop may sleep, or be killed: the trainer goes on, and the same command
takes up where it was. To have a run watched while the laptop is away for days, do the same on a small VM:
  gcloud compute instances create easylm-watch --zone=ZONE --machine-type=e2-micro --image-family=debian-12 \\
      --image-project=debian-cloud --scopes=cloud-platform
copy this folder of the project there, and run the same command in tmux. Its price is the VM's.
"""

# Workers send their logs every minute.
_FOLLOW_SECONDS = 10


def main(argv: list[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    # What follows -- is for a worker, whatever it looks like.
    command = words[words.index("--") + 1 :] if "--" in words else []
    arguments = build_parser().parse_args(words[: words.index("--")] if "--" in words else words)
    arguments.command = command
    try:
        run = read_run_file(arguments.run_file)
        return arguments.verb(arguments, run)
    except WrongInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except NoAnswer as error:
        print(f"error: the run's bucket gives no answer: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            "\nthe launcher ends here; what runs goes on, and what was asked for stays asked for: it is billed as soon as it is "
            "there, until `down`",
            file=sys.stderr,
        )
        return 130


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tpu.py",
        description="Train on a TPU slice from a laptop.",
        epilog=KEEP_ALIVE_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    def add(name: str, function, text: str) -> argparse.ArgumentParser:
        verb = verbs.add_parser(
            name, help=text, description=text, epilog=KEEP_ALIVE_HELP if name == "run" else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        verb.add_argument("run_file", metavar="RUN.ini", help="tpu_scripts/examples has some")
        verb.add_argument("--dry-run", action="store_true", help="print the commands of the happy road, and do nothing")
        verb.set_defaults(verb=function)
        return verb

    for name, text in (
        ("up", "ask for the machine, wait until it is there, and set it up"),
        ("run", "the same, and start the trainer on every worker; the same command resumes"),
    ):
        verb = add(name, _drive, text)
        verb.add_argument("--take-over", action="store_true", help="although another launcher seems to drive this run")
        verb.set_defaults(keep_alive=False, again=True, goal=UP if name == "up" else STARTED)
    verb.add_argument("--keep-alive", action="store_true", help="stay, and bring it to its end (see below)")
    verb.add_argument("--again", action="store_true", default=False, help="although it is done")

    add("status", _status, "one screen: machine, step, tokens, speed, checkpoint, attempts, last error")
    logs = add("logs", _logs, "what all workers printed, by time, from the bucket")
    logs.add_argument("-n", type=int, default=200, metavar="LINES", help="the last LINES (default: 200)")
    logs.add_argument("--follow", action="store_true", help="go on with what comes, until Ctrl-C")
    logs.add_argument("--worker", type=int, help="of one only")
    logs.add_argument("--attempt", type=int, help="default: the newest")
    ssh = add("ssh", _ssh, "a shell on a worker; after -- a command, whose words arrive as they are, on one or all")
    ssh.add_argument("--worker", default="0", help="its number, or all (default: 0)")
    cp = add(
        "cp", _cp, "copy a file or a folder; worker:PATH and run:PATH (in the run's bucket) are there, PATH is here"
    )
    cp.add_argument("source")
    cp.add_argument("destination")
    cp.add_argument("--worker", default="0", help="its number, or all (default: 0)")
    add("stop", _stop, "let the trainer save and end; the machine stays, and is billed")
    down = add("down", _down, "stop, and delete the machine; the bucket keeps everything")
    down.add_argument("--now", action="store_true", help="do not wait for a last checkpoint")
    return parser


def _gcloud(a, run: RunFile):
    if a.dry_run:
        return rehearsal(run, exists=a.verb is not _drive)
    if run.project == "my-project" or run.url.startswith("gs://my-bucket/"):
        raise WrongInput(
            f"{a.run_file} still has the example's my-project or my-bucket; put your own (--dry-run needs none)"
        )
    return Gcloud()


def _say(text: str):
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def _drive(a, run: RunFile) -> int:
    say, sleep = ((lambda text: None), (lambda seconds: None)) if a.dry_run else (_say, time.sleep)
    goal = FINISHED_RUN if a.keep_alive else a.goal
    return Driver(run, _gcloud(a, run), goal, say, sleep).drive(a.take_over, a.again)


def _status(a, run: RunFile) -> int:
    text = status(_gcloud(a, run), run)
    print("" if a.dry_run else text)
    return 0


def _logs(a, run: RunFile) -> int:
    bucket = Bucket(_gcloud(a, run), run.url)
    if a.follow:
        return _follow(a, bucket)
    lines = merged(bucket, a.attempt, a.worker, a.n)
    print("\n".join(lines) or f"no logs in {run.url}/logs yet: workers send theirs every minute")
    return 0


def _follow(a, bucket: Bucket) -> int:
    """Until Ctrl-C. A bucket that gives no answer is asked again."""
    follower, first = Follower(bucket, a.attempt, a.worker), True
    try:
        while True:
            try:
                lines = follower.more()
                if first and lines:
                    lines, first = lines[max(0, len(lines) - a.n) :], False
                print("".join(f"{line}\n" for line in lines), end="", flush=True)
            except NoAnswer as error:
                _say(f"the bucket gives no answer: {error}")
            if a.dry_run:
                return 0
            time.sleep(_FOLLOW_SECONDS)
    except KeyboardInterrupt:
        return 0


def _ssh(a, run: RunFile) -> int:
    command = [f"--command={shlex.join(a.command)}"] if a.command else []
    return _gcloud(a, run).interactive(
        "compute", "tpus", "tpu-vm", "ssh", run.name, *place(run), f"--worker={a.worker}", *command
    )


def _cp(a, run: RunFile) -> int:
    names = [a.source, a.destination]
    worker = [n.startswith("worker:") for n in names]
    if sum(worker) + sum(n.startswith("run:") for n in names) != 1:
        raise WrongInput("one of the two must be worker:PATH or run:PATH, and the other a path here")
    if any(worker):
        names = [n.replace("worker:", f"{run.name}:", 1) if w else n for n, w in zip(names, worker)]
        where = [*place(run), f"--worker={a.worker}", "--recurse"]
        return _gcloud(a, run).interactive("compute", "tpus", "tpu-vm", "scp", *names, *where)
    names = [f"{run.url}/{n[4:]}" if n.startswith("run:") else n for n in names]
    return _gcloud(a, run).interactive("storage", "cp", "--recursive", *names)


def _stop(a, run: RunFile) -> int:
    gcloud = _gcloud(a, run)
    bucket = Bucket(gcloud, run.url)
    bucket.want("stop")
    workers = _stop_trainers(gcloud, requests.all_places(bucket.state(), run))
    for worker in workers:
        ended = f"ended with {worker.code}" if worker.code is not None else worker.state
        _say(f"worker {worker.number}: {ended}")
    if not workers:
        _say(
            "no worker answered, so nothing is known of the trainer: see `status`; a launcher that drives this run ends"
        )
        return 1
    _say("the machine stays, and is billed until `down`")
    return 0


def _stop_trainers(gcloud, places: list[RunFile]) -> list[Worker]:
    """Wherever the run has a machine that is ready."""
    workers = []
    for at in places:
        machine = m.look(gcloud, at)
        if machine.kind == m.READY:
            _say(f"letting the trainer save and end, for up to {at.stop_minutes:g} minutes")
            workers += Workers(gcloud, at).stop(at.stop_minutes * 60, machine.hosts)
    return workers


def _down(a, run: RunFile) -> int:
    gcloud = _gcloud(a, run)
    bucket = Bucket(gcloud, run.url)
    bucket.want("down")
    try:
        state = bucket.state()
    except WrongInput as error:
        _say(f"{error}; meanwhile {run.zone} of {run.project} is looked at")
        state = None
    places = requests.all_places(state, run)
    if state is None and m.look(gcloud, run).kind == m.ABSENT:
        raise WrongInput(
            f"{run.url} knows of no machine of this run, and there is none in {run.zone} of {run.project}, so there is none "
            "to delete (if it was asked for in another zone, put that one into the run file)"
        )
    if not a.now:
        _stop_trainers(gcloud, places)
    sleep = (lambda seconds: None) if a.dry_run else time.sleep
    requests.remove_all(gcloud, places, _say, sleep)
    _after_down(gcloud, run, bucket, sleep)
    _say("no machine is left, and nothing is billed but the bucket")
    return 0


def _after_down(gcloud, run: RunFile, bucket: Bucket, sleep):
    """A launcher may just have asked for a machine when it was told to end; and all that was asked for is gone now."""
    turn = Turn(bucket)
    try:
        if turn.wait_for_driver(_say, sleep):
            requests.remove_all(gcloud, requests.all_places(bucket.state(), run), _say, sleep)
        if bucket.state() is None:
            return
        state = turn.take(take_over=False)
    except requests.StillThere:
        raise
    except WrongInput:
        return  # a state that cannot be used, or a launcher that has begun since: there is nothing to write down
    state.requests = []
    turn.let_go(state)


if __name__ == "__main__":
    sys.exit(main())
