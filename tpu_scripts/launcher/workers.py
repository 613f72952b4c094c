"""What the launcher says to all workers of a machine, through ssh, and what it understands of their answers."""

from __future__ import annotations

import os
import re
import shlex
import tempfile
from typing import NamedTuple

from .gcloud import Answer
from .run_file import RunFile, secret_values

IDLE, RUNNING, EXITED, LOST = "idle", "running", "exited", "lost"
_LINE = re.compile(
    r"^easylm-worker (?P<number>\d+) pack=(?P<pack>\w*) attempt=(?P<attempt>\d+) "
    r"state=(?P<state>idle|running|exited|lost) code=(?P<code>-|\d+)\r?$",
    re.MULTILINE,
)
# Installing hundreds of megabytes on a new machine takes minutes.
_SETUP_SECONDS = 3600


class Worker(NamedTuple):
    number: int
    pack: str  # that it is ready to run; empty: none
    attempt: int  # the last begun; 0: none
    state: str
    code: int | None  # how it ended


class Workers:
    """All workers of the run's machine. What they run is in worker_setup.sh and worker_run.sh."""

    def __init__(self, gcloud, run: RunFile):
        self.gcloud, self.run = gcloud, run

    def ssh(self, command: str, worker: str = "all", timeout: float = 300) -> Answer:
        return self.gcloud(
            "compute", "tpus", "tpu-vm", "ssh", self.run.name, *place(self.run), f"--worker={worker}",
            f"--command={command}", timeout=timeout,
        )  # fmt: skip

    def status(self) -> list[Worker]:
        """Of those that answered, whatever the others did. A machine that is new has nothing to say, which is an answer."""
        script = self._script("status")
        new = "echo easylm-worker 0 pack= attempt=0 state=idle code=-"
        return _read(self.ssh(f"if [ -e {_BASE}/{self.run.name}/code ]; then {script}; else {new}; fi"))

    def set_up(self, url: str, pack: str) -> Answer:
        """`url` is where the pack lies. Takes minutes on a new machine, and no time on one that is ready."""
        if answer := self._bring_secrets():
            return answer
        # Several may come at once, of which one is late: each unpacks for itself, and the first one's stays.
        command = (
            f'set -e; base={_BASE}/{self.run.name}; mkdir -p "$base"; cd "$base"; if [ ! -e code-{pack} ]; then '
            f"new=$(mktemp -d new.XXXXXX); gcloud storage cp {shlex.quote(url)} $new.tar.gz --quiet; "
            f"sha256sum $new.tar.gz | grep -q ^{pack}; tar -xzf $new.tar.gz -C $new; rm $new.tar.gz; "
            f'mv -T $new code-{pack} || rm -r $new; fi; bash code-{pack}/tpu_scripts/worker_setup.sh "$base" {pack}'
        )
        return self.ssh(command, timeout=_SETUP_SECONDS)

    def start(self, attempt: int) -> list[Worker]:
        return _read(self.ssh(self._script(f"start {attempt}")))

    def stop(self, seconds: float) -> list[Worker]:
        return _read(self.ssh(self._script(f"stop {seconds:.0f}"), timeout=seconds + 120))

    def after(self) -> Answer:
        """Where the whole machine did its work, one worker does the rest."""
        return self.ssh(self._script("after"), worker="0", timeout=6 * 3600)

    def _script(self, verb: str) -> str:
        return f"bash {_BASE}/{self.run.name}/code/tpu_scripts/worker_run.sh {verb}"

    def _bring_secrets(self) -> Answer | None:
        """By a file, so that no command line has them; returns an answer that is an error."""
        if not self.run.secrets:
            return None
        made = self.ssh(f"umask 077; mkdir -p {_BASE}/{self.run.name}")
        if not made.ok:
            return made
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "secrets")
            # Others may not read it, neither here nor, since scp keeps that, there.
            with open(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), "wb") as file:
                for name, value in secret_values(self.run).items():
                    file.write(f"{name}={value}".encode() + b"\0")
            to = f"{self.run.name}:easylm/{self.run.name}/secrets"
            answer = self.gcloud(
                "compute", "tpus", "tpu-vm", "scp", path, to, *place(self.run), "--worker=all", timeout=600
            )
        return None if answer.ok else answer


_BASE = '"$HOME"/easylm'


def place(run: RunFile) -> list[str]:
    return [f"--zone={run.zone}", f"--project={run.project}", *run.ssh_flags]


def _read(answer: Answer) -> list[Worker]:
    """The workers that answered: gcloud's own exit code says nothing about the others."""
    return [
        Worker(int(m["number"]), m["pack"], int(m["attempt"]), m["state"], None if m["code"] == "-" else int(m["code"]))
        for m in _LINE.finditer(answer.out)
    ]
