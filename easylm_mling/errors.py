"""Errors of ours, the exit codes of a process, and the one line that an error becomes.

0    done: the budget, train.stop_at_step, --max-hours or the end of the data is reached
1    training cannot go on, or a crash: look at the message
2    something in the config or the data is wrong; the same command will fail again
3    no checkpoint of the run is usable; nothing is begun anew
42   a signal asked to stop and everything is saved: the same command goes on
85   stuck, or another process was lost: the same command goes on, but count how often
130  stopped at once by a second signal; what was saved is whole
"""

import os
import re
import sys
import time
import traceback
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

DONE, STOPPED, WRONG_INPUT, NO_CHECKPOINT, PREEMPTED, STUCK, INTERRUPTED = 0, 1, 2, 3, 42, 85, 130


class EasylmError(Exception):
    """An error whose message is one line that says what is wrong and the way out."""

    code = STOPPED


class ConfigError(EasylmError, ValueError):
    """A setting, or something that it names, is wrong."""

    code = WRONG_INPUT


class UnknownFormat(ConfigError):
    """A file or directory of ours has a format that this version does not know."""


class DataError(EasylmError, ValueError):
    """The data is too damaged to train on."""

    code = WRONG_INPUT


class DamagedCheckpoint(EasylmError, ValueError):
    """A stored step is not what was saved."""

    code = WRONG_INPUT


class TrainingStopped(EasylmError, RuntimeError):
    """Training cannot go on."""


class NoUsableCheckpoint(TrainingStopped):
    """Every checkpoint that is left is damaged."""

    code = NO_CHECKPOINT


class VerificationError(EasylmError, RuntimeError):
    """An export is not what its checkpoint says."""


def check(ok: bool, message: str):
    """Raise ConfigError with `message` unless `ok`."""
    if not ok:
        raise ConfigError(message)


def check_format(where: object, what: str, number: object, known: int, otherwise: str = ""):
    """Raise UnknownFormat unless the format `number` of the `what` in `where` is the `known` one.

    `otherwise` is the way out where the version that wrote it is not at hand.
    """
    if number != known:
        stored = "no format number" if number is None else f"format {number!r}"
        raise UnknownFormat(
            f"{where}: this {what} has {stored}, and this version of easylm_mling knows format {known}; use the version that "
            f"wrote it{otherwise and f', or {otherwise}'}"
        )


def is_expected(error: BaseException) -> bool:
    """Return True if the message is enough for a user: an error of ours, of the file system, or an interrupt."""
    return isinstance(error, (EasylmError, OSError, KeyboardInterrupt))


def report_error(error: BaseException) -> int:
    """Print the error in one line, and below it the traceback of an unexpected one; return the exit code."""
    if isinstance(error, KeyboardInterrupt):
        print("interrupted; everything saved so far is whole", file=sys.stderr)
        return INTERRUPTED
    if is_expected(error):
        print(f"error: {error}", file=sys.stderr)
        return getattr(error, "code", STOPPED)
    print(f"error: unexpected {type(error).__name__}: {one_line(error)}; please report it with this:", file=sys.stderr)
    traceback.print_exception(error)
    return STOPPED


@contextmanager
def crash_file(folder: Path) -> Generator[None, None, None]:
    """Write the traceback of an unexpected error inside to FOLDER/crash-TIME-PID.txt, and pass the error on."""
    try:
        yield
    except Exception as error:
        if not is_expected(error):
            file = folder / f"crash-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
            with suppress(OSError):
                file.write_text(without_secrets("".join(traceback.format_exception(error))), encoding="utf-8")
                error.add_note(f"(also in {file})")
        raise


def one_line(error: BaseException) -> str:
    """Return an error's text on one line, without secrets, of at most 200 characters."""
    return without_secrets(" ".join(str(error).split()) or type(error).__name__)[:200]


def without_secrets(text: str) -> str:
    """Return `text` without what may be a key in its addresses: names before an @, and all that follows a question mark."""
    text = re.sub(r"(\w+://)[^/\s'\"@]+@", r"\1...@", text)
    # Not only after a host: clients print paths without one.
    return re.sub(r"\?[^\s'\")]+", "?...", text)
