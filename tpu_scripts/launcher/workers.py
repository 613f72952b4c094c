"""What the launcher says to the workers of a machine, through ssh, and what it understands of their answers."""

from __future__ import annotations

import os
import random
import re
import shlex
import tempfile
import threading
from typing import NamedTuple

from .gcloud import Answer
from .run_file import RunFile, secret_values

IDLE, RUNNING, EXITED, LOST = "idle", "running", "exited", "lost"
_LINE = re.compile(
    r"^easylm-worker (?P<number>\d+) pack=(?P<pack>\w*) attempt=(?P<attempt>\d+) "
    r"state=(?P<state>idle|running|exited|lost) code=(?P<code>-|\d+)\r?$",
    re.MULTILINE,
)
_OTHERS = re.compile(r"^easylm-account (\S+) (\S+)\r?$", re.MULTILINE)
# Installing hundreds of megabytes on a new machine takes minutes.
_SETUP_SECONDS = 3600
_SECRETS_SECONDS = 600
# Workers that did not answer are asked in so many groups at most, each a gcloud on this computer.
_MOST_GROUPS = 8
# A connection that is dead ends by itself.
_SSH = ("--ssh-flag=-oConnectTimeout=20", "--ssh-flag=-oServerAliveInterval=15", "--ssh-flag=-oServerAliveCountMax=4")


class Worker(NamedTuple):
    number: int
    pack: str  # that it is ready to run; empty: none
    attempt: int  # the last begun; 0: none
    state: str
    code: int | None  # how it ended


class Workers:
    """All workers of the run's machine. What they run is in worker_setup.sh and worker_run.sh.

    `silent` are those that did not answer the last question to all, `why` is what gcloud said of that, and `others` the
    account that began the run on a worker, where this one's may not act for it.
    """

    def __init__(self, gcloud, run: RunFile):
        self.gcloud, self.run = gcloud, run
        self.hosts = 0
        self.silent: list[int] = []
        self.why = self.others = ""

    def ssh(self, command: str, worker: str = "all", timeout: float = 300) -> Answer:
        return self.gcloud(
            "compute", "tpus", "tpu-vm", "ssh", self.run.name, *place(self.run), *_SSH, f"--worker={worker}",
            f"--command={command}", timeout=timeout,
        )  # fmt: skip

    def status(self, hosts: int) -> list[Worker]:
        """Of those that answered, whatever the others did. A machine that is new has nothing to say, which is an answer."""
        if hosts != self.hosts:
            self.hosts, self.silent = hosts, []
        answers = self._each(self._script("status"), self.run.answer_seconds)
        workers = _read(answers)
        self.silent = sorted(set(range(hosts)) - {w.number for w in workers})
        self.why = next((a.why for a in answers if not a.ok), "")
        accounts = [match for a in answers for match in _OTHERS.findall(a.out)]
        self.others = "{} (this one is {})".format(*accounts[0]) if accounts else ""
        return workers

    def set_up(self, url: str, pack: str) -> Answer:
        """`url` is where the pack lies. Takes minutes on a new machine, and no time on one that is ready."""
        if answer := self._bring_secrets():
            return answer
        # Several may come at once, of which one is late: each unpacks for itself, and the first one's stays.
        command = (
            f'set -e; base={_BASE}/{self.run.name}; mkdir -p "$base"; cd "$base"; if [ ! -e code-{pack} ]; then '
            f"new=$(mktemp -d new.XXXXXX); gcloud storage cp {shlex.quote(url)} $new.tar.gz --quiet; "
            f"sha256sum $new.tar.gz | grep -q ^{pack}; tar -xzf $new.tar.gz -C $new; rm $new.tar.gz; chmod 755 $new; "
            f'mv -T $new code-{pack} || rm -r $new; fi; bash code-{pack}/tpu_scripts/worker_setup.sh "$base" {pack}'
        )
        return _joined(self._each(self._as_owner(command), _SETUP_SECONDS))

    def start(self, attempt: int) -> list[Worker]:
        return _read(self._each(self._script(f"start {attempt}"), max(60.0, self.run.answer_seconds)))

    def stop(self, seconds: float, hosts: int = 0) -> list[Worker]:
        """Ask for an end, and wait for it on those that answer: one that is silent is asked, and not waited for.

        `hosts` are those of the machine, where `status` was not asked before.
        """
        if hosts:
            self.status(hosts)
        return _read(self._each(self._script(f"stop {seconds:.0f}"), seconds + 120, self.run.answer_seconds))

    def after(self) -> Answer:
        """Where the whole machine did its work, one worker does the rest."""
        return self.ssh(self._script("after"), worker="0", timeout=6 * 3600)

    def _each(self, command: str, timeout: float, silent_timeout: float | None = None) -> list[Answer]:
        """Ask all workers; those that were silent apart from the others, so that they hold up nobody."""
        if not self.silent:
            return [self.ssh(command, "all", timeout)]
        answers: list[Answer] = []
        # They end with the launcher: it may be stopped meanwhile.
        threads = [
            threading.Thread(target=lambda g=g, t=t: answers.append(self.ssh(command, g, t)), daemon=True)
            for g, t in self._groups(timeout, timeout if silent_timeout is None else silent_timeout)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return answers

    def _groups(self, timeout: float, silent_timeout: float) -> list[tuple[str, float]]:
        """(what `--worker` takes, seconds): those that answered, then the others in parts that differ from look to look."""
        answering = sorted(set(range(self.hosts)) - set(self.silent))
        parts, silent = min(_MOST_GROUPS, len(self.silent)), random.sample(self.silent, len(self.silent))
        groups = [(_numbers(answering), timeout)] if answering else []
        return groups + [(_numbers(sorted(silent[i::parts])), silent_timeout) for i in range(parts)]

    def _script(self, verb: str) -> str:
        """A verb of worker_run.sh; where nothing was set up yet, what a new machine says."""
        script = f"bash {_BASE}/{self.run.name}/code/tpu_scripts/worker_run.sh {verb}"
        new = f'echo "easylm-worker $({_NUMBER}) pack= attempt=0 state=idle code=-"'
        return f"if [ -e {_BASE}/{self.run.name}/code ]; then {self._as_owner(script)}; else {new}; fi"

    def _as_owner(self, script: str) -> str:
        """What lies on a worker is the run's, whoever logs in: the account that made it does what is to be done."""
        base = f"{_BASE}/{self.run.name}"
        quoted = shlex.quote(script)
        return (
            f"(umask 022; mkdir -p {_BASE}; chmod 1777 {_BASE} 2> /dev/null; [ -e {base} ] || mkdir {base} 2> /dev/null; "
            f"if [ -O {base} ]; then bash -c {quoted}; elif sudo -n true 2> /dev/null; then "
            f'sudo -n -H -u "#$(stat -c %u {base})" bash -c {quoted}; '
            f'else echo "easylm-account $(stat -c %U {base}) $(id -un)"; exit 1; fi)'
        )

    def _bring_secrets(self) -> Answer | None:
        """By a file, so that no command line has them; returns an answer that is an error."""
        if not self.run.secrets:
            return None
        name = f".easylm-{self.run.name}-secrets"
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "secrets")
            # Others may not read it, neither here nor, since scp keeps that, there.
            with open(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), "wb") as file:
                for key, value in secret_values(self.run).items():
                    file.write(f"{key}={value}".encode() + b"\0")
            answer = self.gcloud(
                "compute", "tpus", "tpu-vm", "scp", path, f"{self.run.name}:{name}", *place(self.run), "--worker=all",
                timeout=_SECRETS_SECONDS,
            )  # fmt: skip
        if not answer.ok:
            return answer
        # From the home of who logs in to where the run lies; a name that is taken last, so that it is whole.
        keep = f"umask 077; cd {_BASE}/{self.run.name} && cat > secrets.new && mv secrets.new secrets"
        command = f'{self._as_owner(keep)} < "$HOME"/{name} && rm -f "$HOME"/{name}'
        moved = _joined(self._each(command, max(60.0, self.run.answer_seconds)))
        return None if moved.ok else moved


# On a disk, and the same for all accounts. (Another place is for tests, where many workers share one disk.)
_BASE = '"${EASYLM_ROOT:-/var/tmp/easylm}"'
_NUMBER = (
    "curl --silent --fail --max-time 5 -H Metadata-Flavor:Google "
    "http://metadata.google.internal/computeMetadata/v1/instance/attributes/agent-worker-number || "
    "(hostname | sed -n s/.*-w-//p | grep . || echo 0)"
)


def place(run: RunFile) -> list[str]:
    return [f"--zone={run.zone}", f"--project={run.project}", *run.ssh_flags]


def _numbers(workers: list[int]) -> str:
    return ",".join(map(str, workers))


def _joined(answers: list[Answer]) -> Answer:
    """One answer: all that was printed, and an error if there is one."""
    failed = [a for a in answers if not a.ok]
    out = "".join(a.out for a in answers)
    return Answer(failed[0].code, out, "\n".join(a.err for a in failed)) if failed else Answer(0, out, "")


def _read(answers: list[Answer]) -> list[Worker]:
    """The workers that answered, each once: gcloud's own exit code says nothing about the others."""
    workers = {}
    for m in _LINE.finditer("\n".join(a.out for a in answers)):
        code = None if m["code"] == "-" else int(m["code"])
        workers[int(m["number"])] = Worker(int(m["number"]), m["pack"], int(m["attempt"]), m["state"], code)
    return [workers[n] for n in sorted(workers)]
