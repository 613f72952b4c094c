"""The file that says what a run needs: INI, as the standard library of every Python 3.9 reads it (TOML only from 3.11 on),
with comments, one argument a line and no quoting: a space, quote or letter of any language is what it looks like.
"""

from __future__ import annotations

import configparser
import difflib
import os
import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# What the machine runs before we come: by the name of the accelerator.
RUNTIMES = {
    "v4": "tpu-ubuntu2204-base",
    "v5litepod": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}
CAPACITY = {"spot": ["--spot"], "reserved": ["--reserved"], "on-demand": []}

KEYS = {
    "run": ("name", "bucket"),
    "machine": ("project", "zone", "type", "runtime", "capacity", "valid_until", "create_flags", "ssh_flags"),
    "train": ("config", "settings", "run_dir", "command", "files"),
    "setup": ("script",),
    "after": ("script",),
    "secrets": ("names",),
    "policy": (
        "max_crashes",
        "keep_minutes",
        "poll_seconds",
        "backoff_seconds",
        "settle_seconds",
        "stop_minutes",
        "answer_seconds",
        "silence_minutes",
    ),
}
# Flags of `create` that the run file has a key for, or that make the machine this run's.
OWN_FLAGS = (
    "--project", "--zone", "--accelerator-type", "--runtime-version", "--spot", "--reserved", "--node-id", "--labels",
    "--valid-until-duration", "--node-count", "--node-prefix", "--async", "--format", "--quiet",
)  # fmt: skip


class WrongInput(ValueError):
    """Something that a person must change; one line says what and how."""


@dataclass(frozen=True)
class RunFile:
    """One run. Paths are absolute; `config` and `files` lie in the project."""

    path: Path
    name: str
    url: str  # gs://BUCKET/.../NAME: where everything of the run lies
    project: str
    zone: str
    type: str
    runtime: str
    capacity: str
    valid_until: str
    create_flags: tuple[str, ...]
    ssh_flags: tuple[str, ...]
    command: tuple[str, ...]  # what every worker runs, in the project's folder
    run_dir: str
    files: tuple[str, ...]
    setup: Path | None
    after: Path | None
    environment: dict[str, str]
    secrets: tuple[str, ...]
    max_crashes: int
    keep_minutes: float
    poll_seconds: float
    backoff_seconds: float
    settle_seconds: float
    stop_minutes: float
    answer_seconds: float
    silence_minutes: float


def read_run_file(path: str) -> RunFile:
    """Raises WrongInput for anything that is missing, unknown or cannot be."""
    values = _sections(Path(path))

    def get(section: str, key: str, default: str | None = None) -> str:
        value = values[section].get(key, "" if default is None else default)
        if value == "" and default is None:
            raise WrongInput(f"{path}: [{section}] needs `{key} = ...`")
        return value

    def lines(section: str, key: str) -> tuple[str, ...]:
        return tuple(line for line in get(section, key, "").split("\n") if line)

    def number(key: str, default: float, least: float) -> float:
        try:
            value = float(get("policy", key, str(default)))
        except ValueError:
            value = -1.0
        if not least <= value < 1e9:
            raise WrongInput(f"{path}: [policy] {key} must be a number from {least:g} on")
        return value

    def script(section: str) -> Path | None:
        name = get(section, "script", "")
        if name and not _beside(path, name).is_file():
            raise WrongInput(f"{path}: [{section}] script = {name} is no file ({_beside(path, name)})")
        return _beside(path, name) if name else None

    name = get("run", "name")
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", name):
        raise WrongInput(f"{path}: [run] name = {name} must be up to 40 of a-z, 0-9 and -, beginning with a letter")
    bucket = get("run", "bucket").rstrip("/")
    if not re.fullmatch(r"gs://[a-z0-9][-_.a-z0-9]*(/[^*?\[\]#\n]+)?", bucket):
        raise WrongInput(f"{path}: [run] bucket = {bucket} must be like gs://my-bucket/runs, without * ? [ ] #")
    run_dir = get("train", "run_dir", f"{bucket}/{name}")
    environment, secrets = values["environment"], tuple(" ".join(lines("secrets", "names")).split())
    for key in (*environment, *secrets):
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", key):
            raise WrongInput(f"{path}: {key} cannot be the name of an environment variable")
    config = lines("train", "config")
    return RunFile(
        path=Path(path).resolve(), name=name, url=f"{bucket}/{name}",
        project=get("machine", "project"), zone=get("machine", "zone"),
        type=get("machine", "type"), runtime=_runtime(path, get("machine", "type"), get("machine", "runtime", "")),
        capacity=_capacity(path, get("machine", "capacity")), valid_until=get("machine", "valid_until", ""),
        create_flags=_flags(path, lines("machine", "create_flags")), ssh_flags=lines("machine", "ssh_flags"),
        command=lines("train", "command") or _trainer(path, config, lines("train", "settings"), run_dir),
        run_dir=run_dir, files=_files(path, config, lines("train", "files")),
        setup=script("setup"), after=script("after"), environment=environment, secrets=secrets,
        max_crashes=int(number("max_crashes", 3, 0)), keep_minutes=number("keep_minutes", 30, 0),
        poll_seconds=number("poll_seconds", 30, 0.01), backoff_seconds=number("backoff_seconds", 10, 0),
        # JAX's own heartbeat ends the others 100 seconds after one died.
        settle_seconds=number("settle_seconds", 150, 0), stop_minutes=number("stop_minutes", 10, 0),
        answer_seconds=number("answer_seconds", 60, 1), silence_minutes=number("silence_minutes", 30, 0.01),
    )  # fmt: skip


def secret_values(run: RunFile) -> dict[str, str]:
    """The secrets, which are only in this machine's environment; WrongInput names those that are not."""
    missing = [name for name in run.secrets if not os.environ.get(name)]
    if missing:
        raise WrongInput(
            f"{run.path}: [secrets] {', '.join(missing)}: not in this shell's environment; export them first"
        )
    return {name: os.environ[name] for name in run.secrets}


def _sections(path: Path) -> dict[str, dict[str, str]]:
    # Keys keep their case; only `=` divides, and only whole lines are comments.
    parser = configparser.ConfigParser(interpolation=None, delimiters=("=",), comment_prefixes=("#",))
    parser.optionxform = str  # type: ignore[method-assign,assignment]
    try:
        parser.read_string(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, configparser.Error) as error:
        raise WrongInput(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    known = {**KEYS, "environment": None}
    for section in parser.sections():
        _check_known(path, section, list(known), "section")
        for key in parser[section]:
            if known[section] is not None:
                _check_known(path, key, list(known[section] or ()), f"[{section}] key")
    return {s: {k: v.strip("\n") for k, v in parser[s].items()} if s in parser else {} for s in known}


def _check_known(path: Path, name: str, known: list[str], what: str):
    if name not in known:
        near = difflib.get_close_matches(name, known, 1) or known
        raise WrongInput(f"{path}: unknown {what} {name}; did you mean {' or '.join(near)}?")


def _beside(path: str, name: str) -> Path:
    """A file that the run file names: beside it, or in the project."""
    beside = Path(path).resolve().parent / name
    return beside if beside.exists() else ROOT / name


def _runtime(path: str, accelerator: str, runtime: str) -> str:
    kind = accelerator.rpartition("-")[0]
    if not re.fullmatch(r"[a-z0-9]+-[1-9][0-9]*", accelerator) or (not runtime and kind not in RUNTIMES):
        raise WrongInput(
            f"{path}: [machine] type = {accelerator} must be like {', '.join(f'{k}-64' for k in RUNTIMES)}; of another kind "
            "give `runtime = ...` too (gcloud compute tpus tpu-vm versions list)"
        )
    return runtime or RUNTIMES[kind]


def _capacity(path: str, capacity: str) -> str:
    if capacity not in CAPACITY:
        raise WrongInput(f"{path}: [machine] capacity = {capacity} must be one of {', '.join(CAPACITY)}")
    return capacity


def _flags(path: str, flags: tuple[str, ...]) -> tuple[str, ...]:
    for flag in flags:
        if not flag.startswith("--") or flag.partition("=")[0] in OWN_FLAGS:
            raise WrongInput(
                f"{path}: [machine] create_flags: `{flag}` must be --name or --name=value, and none of ours"
            )
    return flags


def _trainer(path: str, config: tuple[str, ...], settings: tuple[str, ...], run_dir: str) -> tuple[str, ...]:
    if not config:
        raise WrongInput(f"{path}: [train] needs `config = ...`, one file a line")
    for setting in settings:
        if setting.startswith("run_dir="):
            raise WrongInput(f"{path}: [train] settings: run_dir is {run_dir}; change it by `bucket` or `run_dir`")
    return ("python", "-m", "easylm_mling", "train", *config, *settings, f"run_dir={run_dir}")


def _files(path: str, config: tuple[str, ...], files: tuple[str, ...]) -> tuple[str, ...]:
    for name in (*config, *files):
        if not (ROOT / name).exists() or not (ROOT / name).resolve().is_relative_to(ROOT):
            raise WrongInput(
                f"{path}: [train] {name} is no file or folder in the project ({ROOT}), which is what workers get"
            )
    return tuple(dict.fromkeys((*config, *files)))
