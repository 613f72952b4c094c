"""Errors of ours and exit codes: how a process ends, and the one line that an error becomes.

0    done: the budget, train.stop_at_step, --max-hours or the end of the data is reached
1    training cannot go on, or a crash: look at the message
2    something in the config or the data is wrong; the same command will fail again
3    no checkpoint of the run is usable; nothing is begun anew
42   a signal asked to stop and everything is saved: the same command goes on
85   stuck, or another process was lost: the same command goes on, but count how often
130  stopped at once by a second signal; what was saved is whole
"""

import re
import sys

DONE, STOPPED, WRONG_INPUT, NO_CHECKPOINT, PREEMPTED, STUCK, INTERRUPTED = 0, 1, 2, 3, 42, 85, 130


class TrainingStopped(RuntimeError):
    """Training cannot go on; the message says why and what to do."""

    code = STOPPED


class NoUsableCheckpoint(TrainingStopped):
    """Every checkpoint that is left is damaged."""

    code = NO_CHECKPOINT


def report_error(error: BaseException) -> int | None:
    """Print the error in one line and return its exit code; None for a fault of the program, to be seen with its traceback."""
    if isinstance(error, KeyboardInterrupt):
        print("interrupted; everything saved so far is whole", file=sys.stderr)
        return INTERRUPTED
    ours = type(error).__module__.startswith("easylm_mling")
    if not isinstance(error, OSError) and not (ours and isinstance(error, (ValueError, RuntimeError))):
        return None
    print(f"error: {error}", file=sys.stderr)
    return WRONG_INPUT if isinstance(error, ValueError) else getattr(error, "code", STOPPED)


def one_line(error: BaseException) -> str:
    """An error's text on one line, without the query of a URL: signed URLs carry secrets there."""
    text = " ".join(str(error).split()) or type(error).__name__
    return re.sub(r"\?[^\s'\")]*", "?...", text)[:200]


class ConfigError(ValueError):
    """A setting is wrong. The message is one line that names the key and the way out."""


def check(ok: bool, message: str):
    if not ok:
        raise ConfigError(message)


class DamagedCheckpoint(ValueError):
    """A stored step is not what was saved; the message says what is wrong with it."""


class DataError(ValueError):
    """The data is too damaged to train on. The message is one line that names the source and the way out."""


class UnknownFormat(ConfigError):
    """A file or directory of ours has a format that this version does not know."""


def check_format(where, what: str, number, known: int):
    """Raise UnknownFormat, with the way out, unless the `format` number of the `what` in `where` is the `known` one."""
    if number != known:
        raise UnknownFormat(
            f"{where}: this {what} has {'no format number' if number is None else f'format {number!r}'}, and this version of "
            f"easylm_mling knows format {known}; use the version that wrote it"
        )
