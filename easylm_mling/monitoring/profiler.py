"""A trace of some steps by JAX's profiler: `profile.steps=100:105` leaves it in RUN/profile."""

import importlib.metadata
import re
from collections.abc import Callable
from pathlib import Path

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

    def before(self, step: int):
        """Begin the trace if `step`, which is about to be launched, is one of its steps."""
        # A resumed run may begin between the first and the last.
        if self._first <= step <= self._last and not self._tracing:
            options = jax.profiler.ProfileOptions()
            # Python's own tracer hooks into every thread, the loader's and the saves', too. What the devices and XLA do is traced
            # without it.
            options.python_tracer_level = 0
            try:
                if problem := unfit_libtpu():
                    raise RuntimeError(problem)
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


def unfit_libtpu() -> str:
    """Why this process's libtpu cannot profile with this JAX; "" if it can, or if no libtpu is loaded.

    The two share a C struct that grows with versions, and JAX does not stop when its sizes differ: the process ends with a
    segmentation fault (jaxlib 0.10.2 and libtpu 0.0.52: "Unexpected PLUGIN_Profiler_Api size").
    """
    maps = Path("/proc/self/maps")
    if not maps.exists() or "libtpu" not in maps.read_text():
        return ""
    wanted = next((r for r in importlib.metadata.requires("jax") or () if r.startswith("libtpu")), "")
    series = re.match(r"libtpu==([\d.]+)\.\*", wanted)
    installed = importlib.metadata.version("libtpu")
    if series is None or installed.startswith(f"{series[1]}."):
        return ""
    return (
        f"libtpu {installed} cannot profile with jax {jax.__version__} (its profiler would end the process); install "
        f"libtpu=={series[1]}.*"
    )
