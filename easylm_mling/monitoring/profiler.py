"""A trace of some steps by JAX's profiler: `profile.steps=100:105` leaves it in RUN/profile."""

from collections.abc import Callable
from pathlib import Path

import jax

from easylm_mling.config import ProfileConfig


class Profiler:
    """The first process traces; the loop tells it of every step. A profiler that fails is told, and the run goes on."""

    def __init__(self, config: ProfileConfig, folder: Path, tell: Callable[[str], None]):
        (self._first, self._last), self._folder, self._tell = config.window, folder, tell
        self._tracing = False

    def before(self, step: int):
        """`step` is about to be launched."""
        # A resumed run may begin inside the window.
        if self._first <= step <= self._last and not self._tracing:
            options = jax.profiler.ProfileOptions()
            # Python's own tracer hooks into every thread, the loader's and the saves', too, and on a busy machine the start of a
            # trace with it once was a segmentation fault. What the devices and XLA do is traced without.
            options.python_tracer_level = 0
            try:
                jax.profiler.start_trace(str(self._folder), profiler_options=options)
                self._tracing = True
            except (RuntimeError, OSError) as error:
                self._first = self._last = 0
                self._tell(f"no profile is taken: {error}")

    def after(self, step: int):
        """`step` is done."""
        if self._tracing and step >= self._last:
            self.close()

    def close(self):
        if not self._tracing:
            return
        self._tracing = False
        try:
            jax.profiler.stop_trace()
            self._tell(f"a profile of steps {self._first} to {self._last} lies in {self._folder}")
        except (RuntimeError, OSError) as error:
            self._tell(f"the profile could not be written: {error}")
