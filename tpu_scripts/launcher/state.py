"""What the launcher knows of a run between its calls: URL/launch/state.json, written by the one launcher that drives it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields

from .run_file import WrongInput

FORMAT = 2
_KEPT_EVENTS = 100


@dataclass
class State:
    """`attempt` is the one that is to run now, `started` the last begun.

    `requests` has everything that was asked for and may still be there, as requests.py writes it.
    """

    format: int = FORMAT
    term: int = 0  # whose turn it is to drive (driving.py)
    attempt: int = 1
    started: int = 0
    pack: str = ""
    crashes: int = 0  # in a row, without a new step
    best_step: int = 0
    machines: int = 0  # asked for so far
    ended: str = ""  # done, or why not; empty: under way
    heard: str = ""  # what was asked for last when its launcher began: only what was asked since counts
    launcher: dict = field(default_factory=dict)  # who drives: id, host, pid, place, beat (Unix seconds)
    requests: list = field(default_factory=list)
    history: list = field(default_factory=list)  # [Unix seconds, what happened]

    def text(self) -> str:
        self.history = self.history[-_KEPT_EVENTS:]
        return json.dumps(asdict(self), indent=1) + "\n"


def parse_state(text: str, url: str) -> State:
    """Raises WrongInput, with the way out, for what is damaged or of another launcher."""
    try:
        values = json.loads(text)
        if values.get("format") != FORMAT:
            raise ValueError(f"its format is {values.get('format')}, and this launcher's is {FORMAT}")
        values.setdefault("heard", "")  # of a launcher that did not know it
        state = State(**{f.name: values[f.name] for f in fields(State)})
        wrong = [f.name for f in fields(State) if type(getattr(state, f.name)) is not type(getattr(State(), f.name))]
        if wrong:
            raise ValueError(f"its {wrong[0]} is {getattr(state, wrong[0])!r}")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise WrongInput(
            f"{url}/launch/state.json cannot be used ({type(error).__name__}: {error}); put it away (gcloud storage mv "
            f"{url}/launch/state.json {url}/launch/state-damaged.json), and the same command looks for the machine itself"
        ) from None
    return state
