"""The archive of data states, one for each checkpoint: `data audit` needs them long after the checkpoint is gone.

RUN/data_states/STEP.npz holds the state after that step, and the stages and fingerprints by which the batches up to it
were drawn. It takes at most some 40 kB. None is removed, except those of steps that a resumed run repeats.
"""

import io
import json
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from easylm_mling.data.mixture import DataState
from easylm_mling.errors import ConfigError, UnknownFormat, check_format
from easylm_mling.storage.atomic import write_atomically

_FORMAT = 2


class KeptState(NamedTuple):
    """A state, and `info`: `stages` (as plain lists and dicts), `data` and `tokenizer` (fingerprints)."""

    state: DataState
    info: dict


def keep_state(folder: Path, step: int, kept: KeptState):
    """Write the file of `step`, atomically."""
    folder.mkdir(exist_ok=True)
    buffer = io.BytesIO()
    info = np.frombuffer(json.dumps(kept.info).encode(), np.uint8)
    np.savez_compressed(buffer, format=_FORMAT, lanes=kept.state.lanes, languages=kept.state.languages, info=info)
    write_atomically(folder / f"{step}.npz", buffer.getvalue())


def load_state(folder: Path, step: int) -> KeptState:
    """Read the file of `step`; raises ConfigError if it is damaged or of an unknown format."""
    path = folder / f"{step}.npz"
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            number = int(file["format"]) if "format" in file else None
            check_format(path, "data state", number, _FORMAT, "restore it from a backup")
            return KeptState(DataState(file["lanes"], file["languages"]), json.loads(file["info"].tobytes()))
    except UnknownFormat:
        raise
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ConfigError(f"{path}: not a readable data state ({error}); restore it from a backup") from error


def kept_steps(folder: Path) -> list[int]:
    """Return the steps whose states are in the folder, in order."""
    return sorted(int(p.stem) for p in folder.glob("*.npz") if p.stem.isdigit())


def forget_after(folder: Path, step: int):
    """Remove the states of later steps: the run goes on from `step` and repeats those."""
    for later in kept_steps(folder):
        if later > step:
            (folder / f"{later}.npz").unlink()
