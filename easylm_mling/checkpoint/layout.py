"""The folders of checkpoints, RUN/checkpoints/STEP: which are committed, and how one is set aside.

A step is visible only when it is committed: last of all Orbax renames it, or in a bucket (`gs://`) writes the object
STEP/commit_success.txt.
"""

import shutil
from pathlib import Path
from typing import Any

from etils import epath

from easylm_mling.errors import ConfigError
from easylm_mling.storage.object_store import Bucket, is_bucket

FOLDER, ASIDE, COMMITTED = "checkpoints", "set-aside", "commit_success.txt"


def checkpoints_folder(directory: str | Path) -> Any:
    """The folder of the checkpoints of `directory`: a Path, or what acts as one in a bucket."""
    return epath.Path(str(directory)) / FOLDER if is_bucket(directory) else Path(directory).absolute() / FOLDER


def committed_steps(directory: str | Path) -> list[int]:
    """The committed steps, in order."""
    root = checkpoints_folder(directory)
    if is_bucket(directory):
        names = Bucket(str(directory)).names()
        folders = [
            n.split("/")[1]
            for n in names
            if n.startswith(f"{FOLDER}/") and n.endswith(f"/{COMMITTED}") and n.count("/") == 2
        ]
    else:
        folders = [p.name for p in root.iterdir()] if root.is_dir() else []
    return sorted(int(name) for name in folders if name.isdigit())


def step_directory(directory: str | Path, step: int | None = None) -> Path:
    """The directory of `step` (default: the newest committed one) of a run or of an imported checkpoint.

    Raises ConfigError when there is none.
    """
    root, steps = checkpoints_folder(directory), committed_steps(directory)
    if not steps:
        raise ConfigError(
            f"{directory}: no checkpoint here (expected {FOLDER}/STEP); name a run directory or an imported checkpoint"
        )
    if step is not None and step not in steps:
        raise ConfigError(f"{directory}: no checkpoint of step {step}; there are {', '.join(map(str, steps))}")
    return root / str(steps[-1] if step is None else step)


def newest_step(directory: str | Path) -> int:
    """The newest committed step, 0 if there is none."""
    return max(committed_steps(directory), default=0)


def set_aside(directory: str | Path, step: int, why: str):
    """Rename a step out of the way, to DIRECTORY/set-aside/checkpoint-STEP-WHY. Nothing there is ever deleted."""
    root = checkpoints_folder(directory)
    aside = root.parent / ASIDE
    names = (f"checkpoint-{step}-{why}" + (f"-{n}" if n else "") for n in range(10**6))
    name = next(name for name in names if not (aside / name).exists())
    if is_bucket(directory):
        Bucket(str(directory)).move(f"{FOLDER}/{step}", f"{ASIDE}/{name}", COMMITTED)
    else:
        aside.mkdir(exist_ok=True)
        (root / str(step)).rename(aside / name)


def remove_unfinished(directory: str | Path) -> bool:
    """Remove what failed saves left. Returns whether there was anything: their writers may go on for a moment."""
    if is_bucket(directory):
        bucket, whole = Bucket(str(directory)), set(committed_steps(directory))
        names = [n for n in bucket.names() if n.startswith(f"{FOLDER}/")]
        left = [n for n in names if (step := n.split("/")[1]).isdigit() and int(step) not in whole]
        bucket.write_all(dict.fromkeys(left))
    else:
        left = list(checkpoints_folder(directory).glob("*orbax-checkpoint-tmp*"))
        for folder in left:
            shutil.rmtree(folder, ignore_errors=True)
    return bool(left)
