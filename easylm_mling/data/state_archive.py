"""The archive of data states, one for each checkpoint: `data audit` needs them long after the checkpoint is gone.

RUN/data_states/STEP.npz holds the state after that step, and the stages and fingerprints under which the batches up to
it were drawn. At most some 40 kilobytes a checkpoint; none is ever removed, but for those of steps that a resumed run
does again.
"""

import io
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from easylm_mling.data.mixture import DataState
from easylm_mling.errors import ConfigError
from easylm_mling.storage.atomic import write_atomically


class KeptState(NamedTuple):
    """A state, and `info`: `stages` (as plain lists and dicts), `data` and `tokenizer` (fingerprints)."""

    state: DataState
    info: dict


def keep_state(folder: Path, step: int, kept: KeptState):
    """Write the file of `step`; a reader never sees half of it."""
    folder.mkdir(exist_ok=True)
    buffer = io.BytesIO()
    info = np.frombuffer(json.dumps(kept.info).encode(), np.uint8)
    np.savez_compressed(buffer, lanes=kept.state.lanes, languages=kept.state.languages, info=info)
    write_atomically(folder / f"{step}.npz", buffer.getvalue())


def load_state(folder: Path, step: int) -> KeptState:
    """Raises ConfigError for a damaged file."""
    path = folder / f"{step}.npz"
    try:
        with np.load(path, allow_pickle=False) as file:
            info = json.loads(file["info"].tobytes())
            return KeptState(DataState(file["lanes"], file["languages"]), info)
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise ConfigError(f"{path}: not a readable data state ({error}); restore it from a backup") from error


def kept_steps(folder: Path) -> list[int]:
    return sorted(int(p.stem) for p in folder.glob("*.npz") if p.stem.isdigit())


def forget_after(folder: Path, step: int):
    """Remove the states of later steps: the run goes on from `step` and does those again."""
    for later in kept_steps(folder):
        if later > step:
            (folder / f"{later}.npz").unlink()
