"""A trace of some steps by JAX's profiler: `profile.steps=100:105` leaves it in RUN/profile."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from easylm_mling.config import ProfileConfig


class Profiler:
    """Traces the steps of `config`; a context manager. If the profiler fails, it says so by `say`, and the run goes on."""

    def __init__(self, config: ProfileConfig, folder: Path, say: Callable[[str], None]):
        (self._first, self._last), self._folder, self._say = config.window, folder, say
        self._tracing = False

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._stop()

    def before(self, step: int, state: Any):
        """Begin the trace if `step`, which is about to be launched from the arrays in `state`, is one of its steps."""
        # A resumed run may begin between the first and the last.
        if self._first <= step <= self._last and not self._tracing:
            options = jax.profiler.ProfileOptions()
            # Python's own tracer hooks into every thread, the loader's and the saves', too, and on a busy machine the start of a
            # trace with it once was a segmentation fault. What the devices and XLA do is traced without.
            options.python_tracer_level = 0
            # Nor does a trace begin in the middle of another step: while XLA's threads recorded one, its start crashed, too.
            jax.block_until_ready(state)
            try:
                jax.profiler.start_trace(str(self._folder), profiler_options=options)
                self._tracing = True
            except (RuntimeError, OSError) as error:
                self._first = self._last = 0
                self._say(f"no profile is taken: {error}")

    def after(self, step: int):
        """End the trace if `step`, which is done, is its last."""
        if step >= self._last:
            self._stop()

    def _stop(self):
        if not self._tracing:
            return
        self._tracing = False
        try:
            jax.profiler.stop_trace()
            self._say(f"a profile of steps {self._first} to {self._last} lies in {self._folder}")
        except (RuntimeError, OSError) as error:
            self._say(f"the profile could not be written: {error}")
