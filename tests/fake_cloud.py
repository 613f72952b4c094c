"""A stand-in for `gcloud` and what is behind it, for tests of tpu_scripts: queued resources, TPU VMs, ssh, scp, buckets.

It is no Google Cloud and talks to none. It knows the commands below with just the flags that Google Cloud SDK 528.0.0
documents for them (`gcloud ... --help`), and refuses any other as the real one does, with exit code 2. It records every
call, plays sequences of states, keeps buckets in a folder (or on the emulator of gcs_server.py), and really runs what is sent by ssh: each worker is a home
directory, in which `bash -c COMMAND` runs with an environment of its own. A worker finds stand-ins for three programs:
`gcloud` (this one), `curl` (which only knows the metadata server's answer to "which worker am I?") and `uv` (whose
environment is the tests' own Python). Deleting or preempting a machine kills its processes and wipes its disks.
"""

import fcntl
import json
import os
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path

# (Some imports are in the functions that need them: most calls are of those that do not.)
EVERYWHERE = "account billing-project configuration flatten format impersonate-service-account project quiet verbosity"
PLACE = "zone " + EVERYWHERE
SSH = (
    "dry-run force-key-file-overwrite internal-ip plain ssh-key-file strict-host-key-checking worker "
    "ssh-key-expiration ssh-key-expire-after " + PLACE
)
FLAGS = {
    "compute tpus queued-resources create": "runtime-version accelerator-type topology type node-id node-count node-prefix "
    "async data-disk description guaranteed internal-ips labels metadata metadata-from-file network range reserved scopes "
    "service-account shielded-secure-boot spot subnetwork tags valid-after-duration valid-after-time valid-until-duration "
    "valid-until-time reservation-host-folder reservation-host-organization reservation-host-project " + PLACE,
    "compute tpus queued-resources describe": PLACE,
    "compute tpus queued-resources delete": "async force " + PLACE,
    "compute tpus tpu-vm describe": PLACE,
    "compute tpus tpu-vm ssh": "ssh-flag command output-directory " + SSH,
    "compute tpus tpu-vm scp": "compress recurse scp-flag " + SSH,
    "storage cat": "additional-headers display-url range decryption-keys " + EVERYWHERE,
    "storage ls": "additional-headers all-versions buckets etag exhaustive fetch-encrypted-object-hashes next-page-token "
    "read-paths-from-stdin readable-sizes recursive soft-deleted full json long decryption-keys " + EVERYWHERE,
    "storage cp": "additional-headers all-versions no-clobber content-md5 continue-on-error daisy-chain do-not-decompress "
    "manifest-path preserve-posix print-created-message recursive storage-class gzip-local-all if-generation-match "
    "if-metageneration-match cache-control content-type custom-metadata " + EVERYWHERE,
}
# Those that take no value.
SWITCHES = set(
    "async guaranteed internal-ips reserved spot shielded-secure-boot force dry-run force-key-file-overwrite internal-ip plain "
    "compress recurse recursive quiet no-clobber continue-on-error".split()
)
NO_CAPACITY = "RESOURCE_EXHAUSTED: There is no more capacity in the zone; you can try in another zone"


class Cloud:
    """Everything lies in one folder; `cloud.json` is changed under a lock by whoever comes."""

    def __init__(self, folder: Path):
        self.folder = folder

    # For tests.

    def make(self, **worker_environment: str) -> "Cloud":
        """`creations`, one for each machine asked for: {"refuse": text} or {"states": [...]}; then all goes well.

        A state may have a reason: "FAILED: why". `zones_refused` (zone -> text), `delete_refused` (text) and `ssh_hangs` (numbers
        of workers) last until they are changed.
        """
        (self.folder / "buckets").mkdir(parents=True)
        (self.folder / "bin").mkdir()
        empty = {
            "resources": {}, "creations": [], "made": 0, "ssh_refused": 0, "describe_fails": 0, "storage_fails": 0,
            "zones_refused": {}, "delete_refused": "", "ssh_hangs": [],
        }  # fmt: skip
        (self.folder / "cloud.json").write_text(json.dumps(empty))
        (self.folder / "worker-environment.json").write_text(json.dumps(worker_environment))
        python, here = sys.executable, Path(__file__).parent.resolve()
        # Imported, so that it is compiled once: a test makes hundreds of calls.
        program = f"import sys; sys.path.insert(0, '{here}'); import fake_cloud; sys.exit(fake_cloud.main())"
        self._program("gcloud", f'FAKE_CLOUD="{self.folder}" exec "{python}" -I -S -c "{program}" "$@"')
        self._program(
            "curl",
            'case "$*" in *"/instance/attributes/agent-worker-number") echo "$FAKE_WORKER" ;; *) exit 22 ;; esac',
        )
        self._program(
            "uv",
            f'echo "uv $*" >> "{self.folder}/uv.txt"\ncase $1 in --version) echo "uv 0.13.9 (stand-in)" ;;\n'
            f'venv) mkdir -p "$5/bin"; printf \'#!/bin/sh\\nexec "{python}" "$@"\\n\' > "$5/bin/python"; chmod +x "$5/bin/python" ;;\n'
            f'pip) if [ -e "{self.folder}/no-pypi" ]; then echo "no route to pypi.org" >&2; exit 1; fi; test -s "$7" ;; esac',
        )
        return self

    def _program(self, name: str, text: str):
        path = self.folder / "bin" / name
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)

    @contextmanager
    def changing(self):
        """The content of cloud.json, to be changed by one at a time."""
        with open(self.folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            state = json.loads((self.folder / "cloud.json").read_text())
            yield state
            (self.folder / "new.json").write_text(json.dumps(state, indent=1))
            (self.folder / "new.json").rename(self.folder / "cloud.json")

    @property
    def state(self) -> dict:
        with self.changing() as state:
            return state

    def bucket(self, url: str) -> Path:
        return self.folder / "buckets" / url.removeprefix("gs://")

    def calls(self) -> list[dict]:
        path = self.folder / "calls.jsonl"
        return [json.loads(x) for x in path.read_text().splitlines()] if path.exists() else []

    def home(self, name: str, worker: int) -> Path:
        return self.folder / "machines" / self.state["resources"][name]["machine"] / f"worker-{worker}"

    def preempt(self, name: str, states: list[str]):
        """The machine is gone, with all that lay on it."""
        with self.changing() as state:
            state["resources"][name]["states"] = states
            machine = state["resources"][name]["machine"]
        self.wipe(machine)

    def wipe(self, machine: str):
        for _ in range(100):
            if not (left := self.processes(machine)):
                break
            for pid in left:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            time.sleep(0.02)
        import shutil

        shutil.rmtree(self.folder / "machines" / machine, ignore_errors=True)

    def processes(self, machine: str = "") -> list[int]:
        """What runs on a machine, or on any of this cloud's."""
        found = []
        marks = f"FAKE_MACHINE={machine}".encode(), f"FAKE_CLOUD={self.folder}\0".encode()
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                environment = b"\0" + (entry / "environ").read_bytes() + b"\0"
                dead = (entry / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
            except OSError:
                continue
            mark = b"\0" + marks[0] + (b"\0" if machine else b"")
            if mark in environment and b"\0" + marks[1] in environment and not dead:
                found.append(int(entry.name))
        return found

    # gcloud.

    def call(self, arguments: list[str]) -> int:
        try:
            code = self._run(arguments)
        except Refused as refused:
            print(refused, file=sys.stderr)
            code = refused.code
        line = json.dumps({"arguments": arguments, "code": code, "by": os.environ.get("FAKE_MACHINE", "laptop")})
        with open(self.folder / "calls.jsonl", "a") as log:
            log.write(line + "\n")
        return code

    def _run(self, arguments: list[str]) -> int:
        for verb in FLAGS:
            if arguments[: len(verb.split())] == verb.split():
                names, flags = _parse(verb, arguments[len(verb.split()) :])
                if verb.startswith("compute") and ("zone" not in flags or "project" not in flags):
                    raise Refused(f"ERROR: (gcloud.{verb}) one of the arguments [--zone, --project] is missing", 2)
                if why := self.state["zones_refused"].get(flags.get("zone")):
                    raise Refused(f"ERROR: (gcloud.{verb.replace(' ', '.')}) {why}")
                return getattr(self, "_" + verb.replace(" ", "_").replace("-", "_"))(names, flags)
        raise Refused(f"ERROR: (gcloud) Invalid choice: {arguments}", 2)

    def _compute_tpus_queued_resources_create(self, names, flags) -> int:
        name = names[0]
        if flags.get("node-id") != name or not {"accelerator-type", "runtime-version"} <= set(flags):
            raise Refused("ERROR: (gcloud.compute.tpus.queued-resources.create) argument missing", 2)
        with self.changing() as state:
            if _key(state, name, flags):
                raise Refused(f"ERROR: (gcloud.compute.tpus.queued-resources.create) ALREADY_EXISTS: {name}")
            creation = state["creations"].pop(0) if state["creations"] else {}
            if "refuse" not in creation:
                state["made"] += 1
                port = _free_port()
                labels = dict(x.split("=") for x in flags.get("labels", "").split(",") if x)
                # One name may be asked for in several zones.
                key = f"{name}@{flags['zone']}" if name in state["resources"] else name
                state["resources"][key] = {
                    "zone": flags["zone"], "project": flags["project"], "labels": labels, "machine": f"{name}-{state['made']}", "port": port, "type": flags["accelerator-type"],
                    "states": creation.get("states", ["WAITING_FOR_RESOURCES", "ACTIVE"]),
                }  # fmt: skip
        if "refuse" in creation:
            raise Refused(f"ERROR: (gcloud.compute.tpus.queued-resources.create) {creation['refuse']}")
        return 0

    def _resource(self, name: str, verb: str, flags: dict[str, str]) -> dict:
        state = self.state
        key = _key(state, name, flags)
        if key is None:
            where = f"'projects/{flags['project']}/locations/{flags['zone']}/queuedResources/{name}'"
            raise Refused(f"ERROR: (gcloud.compute.tpus.{verb}) NOT_FOUND: Resource {where} was not found")
        return {**state["resources"][key], "key": key}

    def _compute_tpus_queued_resources_describe(self, names, flags) -> int:
        with self.changing() as state:
            fails = state["describe_fails"]
            state["describe_fails"] = max(0, fails - 1)
        if fails:
            raise Refused("ERROR: (gcloud.compute.tpus.queued-resources.describe) INTERNAL: Internal error encountered")
        resource = self._resource(names[0], "queued-resources.describe", flags)
        current = resource["states"][0]
        with self.changing() as state:
            states = state["resources"][resource["key"]]["states"]
            if len(states) > 1:
                states.pop(0)
            if current == "GONE":
                del state["resources"][resource["key"]]
        if current == "GONE":
            self._resource(names[0], "queued-resources.describe", flags)
        node = {"acceleratorType": resource["type"], "labels": resource["labels"]}
        name, _, why = current.partition("/")[0].partition(": ")
        reason = {f"{name.lower()}Data": {"error": {"code": 3, "message": why}}} if why else {}
        answer = {"name": names[0], "state": {"state": name, **reason}, "tpu": {"nodeSpec": [{"node": node}]}}
        print(json.dumps(answer))
        return 0

    def _compute_tpus_tpu_vm_describe(self, names, flags) -> int:
        found = self._resource(names[0], "tpu-vm.describe", flags)
        queued, _, node = found["states"][0].partition("/")
        endpoints = [{"ipAddress": f"10.0.0.{i}"} for i in range(_hosts(found["type"]))]
        state = node or ("READY" if queued == "ACTIVE" else "PREEMPTED")
        print(json.dumps({"name": names[0], "state": state, "networkEndpoints": endpoints, "labels": found["labels"]}))
        return 0

    def _compute_tpus_queued_resources_delete(self, names, flags) -> int:
        resource = self._resource(names[0], "queued-resources.delete", flags)
        if why := self.state["delete_refused"]:
            raise Refused(f"ERROR: (gcloud.compute.tpus.queued-resources.delete) {why}")
        if resource["states"][0] not in ("SUSPENDED", "FAILED") and "force" not in flags:
            raise Refused("ERROR: (gcloud.compute.tpus.queued-resources.delete) FAILED_PRECONDITION: use --force")
        self.preempt(resource["key"], ["DELETING", "GONE"])
        return 0

    def _compute_tpus_tpu_vm_ssh(self, names, flags) -> int:
        import subprocess
        import threading

        if "command" not in flags:
            raise Refused("this stand-in has no terminal; give --command", 2)
        with self.changing() as state:
            refused = state["ssh_refused"]
            state["ssh_refused"] = max(0, refused - 1)
        found, hangs = self._ready(names[0], "ssh", flags), self.state["ssh_hangs"]
        if refused:
            print("ssh: connect to host 10.0.0.0 port 22: Connection refused", file=sys.stderr)
            raise Refused("ERROR: (gcloud.compute.tpus.tpu-vm.ssh) [/usr/bin/ssh] exited with return code [255].", 255)
        codes = {}
        # gcloud cuts the command at spaces and ssh joins it again.
        command = " ".join(flags["command"].split(" "))

        def one(worker: int):
            while worker in hangs:
                time.sleep(1)
            home, environment = self._worker(found, worker)
            shell = ["/bin/bash", "-c", command]
            with subprocess.Popen(
                shell, cwd=home, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            ) as process:  # fmt: skip
                # As ssh does, it ends when nobody holds its output any more.
                out, err = process.communicate()
            # Each as it comes: another one may never end.
            print(out.decode(errors="replace"), end="", flush=True)
            print(err.decode(errors="replace"), end="", file=sys.stderr, flush=True)
            codes[worker] = process.returncode

        threads = [threading.Thread(target=one, args=(w,)) for w in _workers(flags.get("worker", "0"), found["type"])]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return next((codes[w] for w in sorted(codes) if codes[w]), 0)

    def _compute_tpus_tpu_vm_scp(self, names, flags) -> int:
        import subprocess

        *sources, destination = names
        remote = [n for n in names if ":" in n]
        found = self._ready(remote[0].partition(":")[0], "scp", flags)
        for worker in _workers(flags.get("worker", "0"), found["type"]):
            home, _ = self._worker(found, worker)
            at = [str(home / n.partition(":")[2]) if n in remote else n for n in [*sources, destination]]
            recurse = ["-r"] if "recurse" in flags else []
            if subprocess.run(["cp", *recurse, *at]).returncode:
                raise Refused("ERROR: (gcloud.compute.tpus.tpu-vm.scp) [/usr/bin/scp] exited with return code [1].")
        return 0

    def _ready(self, name: str, verb: str, flags: dict[str, str]) -> dict:
        found = self._resource(name, f"tpu-vm.{verb}", flags)
        if found["states"][0] != "ACTIVE":
            raise Refused(f"ERROR: (gcloud.compute.tpus.tpu-vm.{verb}) the TPU is in state {found['states'][0]}")
        return found

    def _worker(self, found: dict, worker: int) -> tuple[Path, dict[str, str]]:
        home = self.folder / "machines" / found["machine"] / f"worker-{worker}"
        home.mkdir(parents=True, exist_ok=True)
        environment = {
            "HOME": str(home), "USER": "user", "LANG": "C.UTF-8", "PATH": f"{self.folder}/bin:/usr/bin:/bin",
            "FAKE_CLOUD": str(self.folder), "FAKE_MACHINE": found["machine"], "FAKE_WORKER": str(worker),
            "EASYLM_ROOT": f"{home}/easylm", "EASYLM_LIBTPU_LOCKFILE": f"{home}/libtpu_lockfile", "EASYLM_PUSH_SECONDS": "0.5",
            # What a slice's hosts know of each other.
            "JAX_COORDINATOR_ADDRESS": f"localhost:{found['port']}", "JAX_PROCESS_ID": str(worker),
            "JAX_NUM_PROCESSES": str(_hosts(found["type"])),
        }  # fmt: skip
        return home, environment | json.loads((self.folder / "worker-environment.json").read_text())

    def _storage_cat(self, names, flags) -> int:
        self._storage("cat")
        data = self._object(names[0], "cat")
        if tail := flags.get("range"):
            data = data[-int(tail.removeprefix("-")) :]
        sys.stdout.buffer.write(data)
        return 0

    def _storage_ls(self, names, flags) -> int:
        self._storage("ls")
        url = names[0]
        found = sorted(n for n in self._store.names(url.rstrip("/")) if n == url or n.startswith(url.rstrip("/") + "/"))
        if not found:
            raise Refused("ERROR: (gcloud.storage.ls) One or more URLs matched no objects.")
        print("\n".join([f"{url}:", *found]))
        return 0

    def _storage_cp(self, names, flags) -> int:
        self._storage("cp")
        *sources, destination = names
        for source in sources:
            folder = None
            if source.startswith("gs://"):
                folder = [n for n in self._store.names(source) if n.startswith(source + "/")]
            elif Path(source).is_dir():
                folder = [str(p) for p in sorted(Path(source).rglob("*")) if p.is_file()]
            if folder and "recursive" not in flags:
                raise Refused("ERROR: (gcloud.storage.cp) Omitting directory; use --recursive")
            # Into a folder that is there, else under its name.
            into = destination.endswith("/") or (not destination.startswith("gs://") and Path(destination).is_dir())
            to = f"{destination.rstrip('/')}/{source.rstrip('/').rpartition('/')[2]}" if into else destination
            for one in folder or [source]:
                self._copy(one, to + one[len(source) :], flags.get("if-generation-match") == "0")
        return 0

    def _copy(self, source: str, to: str, only_new: bool):
        if source == "-":
            data = sys.stdin.buffer.read()
        else:
            data = self._object(source, "cp") if source.startswith("gs://") else Path(source).read_bytes()
        if not to.startswith("gs://"):
            Path(to).parent.mkdir(parents=True, exist_ok=True)
            Path(to).write_bytes(data)
        elif not self._store.put(to, data, only_new):
            raise Refused("ERROR: HTTPError 412: At least one of the pre-conditions you specified did not hold.")

    def _storage(self, verb: str):
        if os.environ.get("FAKE_MACHINE"):
            return
        with self.changing() as state:
            fails = state["storage_fails"]
            state["storage_fails"] = max(0, fails - 1)
        if fails:
            raise Refused(f"ERROR: (gcloud.storage.{verb}) HTTPError 503: Service Unavailable")

    def _object(self, url: str, verb: str) -> bytes:
        data = self._store.get(url)
        if data is None:
            raise Refused(f"ERROR: (gcloud.storage.{verb}) The following URLs matched no objects or files:\n{url}")
        return data

    @property
    def _store(self):
        host = json.loads((self.folder / "worker-environment.json").read_text()).get("STORAGE_EMULATOR_HOST")
        return Emulator(host) if host else Folder(self.folder / "buckets")


class Folder:
    """Buckets as folders."""

    def __init__(self, path: Path):
        self.path = path

    def get(self, url: str) -> bytes | None:
        path = self.path / url.removeprefix("gs://")
        return path.read_bytes() if path.is_file() else None

    def put(self, url: str, data: bytes, only_new: bool) -> bool:
        path = self.path / url.removeprefix("gs://")
        if only_new and path.exists():
            return False
        path.parent.mkdir(parents=True, exist_ok=True)
        # An object is there as a whole or not at all.
        new = path.with_name(f".{path.name}-{os.getpid()}")
        new.write_bytes(data)
        new.rename(path)
        return True

    def names(self, url: str) -> list[str]:
        path = self.path / url.removeprefix("gs://")
        files = path.rglob("*") if path.is_dir() else [path]
        return [f"gs://{p.relative_to(self.path)}" for p in files if p.is_file()]


class Emulator:
    """Buckets of a server that speaks the JSON API of Google's storage (gcs_server.py)."""

    def __init__(self, host: str):
        self.host = host

    def _ask(self, path: str, data: bytes | None = None) -> bytes | None:
        from urllib.error import HTTPError
        from urllib.request import urlopen

        try:
            with urlopen(self.host + path, data) as answer:
                return answer.read()
        except HTTPError as error:
            if error.code in (404, 412):
                return None
            raise

    def get(self, url: str) -> bytes | None:
        bucket, name = _divided(url)
        return self._ask(f"/storage/v1/b/{bucket}/o/{name}?alt=media") if name else None

    def put(self, url: str, data: bytes, only_new: bool) -> bool:
        bucket, name = _divided(url)
        new = "&ifGenerationMatch=0" if only_new else ""
        return self._ask(f"/upload/storage/v1/b/{bucket}/o?uploadType=media&name={name}{new}", data) is not None

    def names(self, url: str) -> list[str]:
        bucket, name = _divided(url)
        listed = json.loads(self._ask(f"/storage/v1/b/{bucket}/o?prefix={name}") or b"{}")
        return [f"gs://{bucket}/{x['name']}" for x in listed.get("items", [])]


def _divided(url: str) -> tuple[str, str]:
    from urllib.parse import quote

    bucket, _, name = url.removeprefix("gs://").partition("/")
    return bucket, quote(name, safe="")


class Refused(Exception):
    def __init__(self, text: str, code: int = 1):
        super().__init__(text)
        self.code = code


def _parse(verb: str, arguments: list[str]) -> tuple[list[str], dict[str, str]]:
    names, flags, allowed = [], {}, set(FLAGS[verb].split())
    for argument in arguments:
        if not argument.startswith("--"):
            names.append(argument)
            continue
        name, equals, value = argument[2:].partition("=")
        if name not in allowed or bool(equals) == (name in SWITCHES):
            raise Refused(f"ERROR: (gcloud.{verb.replace(' ', '.')}) unrecognized arguments: {argument}", 2)
        flags[name] = value
    if not names:
        raise Refused(f"ERROR: (gcloud.{verb.replace(' ', '.')}) argument NAME: Must be specified.", 2)
    return names, flags


def _key(state: dict, name: str, flags: dict[str, str]) -> str | None:
    """Of the resource of a name in a zone of a project. One that a test put there without them is everywhere."""
    for key, resource in state["resources"].items():
        place = [resource.get(x, flags[x]) == flags[x] for x in ("zone", "project")]
        if key.partition("@")[0] == name and all(place):
            return key
    return None


def _free_port() -> int:
    import socket

    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def _hosts(accelerator: str) -> int:
    kind, _, number = accelerator.rpartition("-")
    chips = int(number) // 2 if kind in ("v4", "v5p") else int(number)
    return 1 if chips <= 8 and kind in ("v5litepod", "v6e") else max(1, chips // 4)


def _workers(flag: str, accelerator: str) -> list[int]:
    """Of `all`, a number, a list of numbers or a range."""
    if flag == "all":
        return list(range(_hosts(accelerator)))
    ends = [part.partition("-") for part in flag.split(",")]
    return [n for first, _, last in ends for n in range(int(first), int(last or first) + 1)]


def main() -> int:
    return Cloud(Path(os.environ["FAKE_CLOUD"])).call(sys.argv[1:])
