"""Measure one config in a process of its own: compile its step for its slice and walk the schedule.

A compiler that runs out of this machine's memory then ends alone, and several can run side by side. `Measuring` starts
the process, which is `python -m easylm_mling.plan.measure CONFIG.yaml RESULT.json`.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from easylm_mling.config import RunConfig, load, to_yaml
from easylm_mling.errors import ConfigError
from easylm_mling.plan.buffers import largest_live
from easylm_mling.plan.compilation import ENVIRONMENT, DoesNotFit, compile_step
from easylm_mling.plan.hlo import parse
from easylm_mling.plan.schedule import TIMES, walk
from easylm_mling.plan.slices import slice_of
from easylm_mling.storage.atomic import write_atomically


def measure(config: RunConfig) -> dict:
    """Return the compiler's figures for one step.

    `memory` and `buffers` (bytes a chip), `times` (seconds and FLOPs a step and chip), `collectives` and `kernels`. Or
    `does_not_fit`. Or `error`: one line for the user.
    """
    try:
        compiled = compile_step(config)
    except DoesNotFit as error:
        buffers = [b._asdict() for b in error.buffers]
        return {"does_not_fit": {"needed": error.needed, "available": error.available, "buffers": buffers}}
    except ConfigError as error:
        return {"error": str(error)}
    module = parse(compiled.hlo)
    times = walk(module, slice_of(config))
    return {
        "memory": compiled.memory._asdict(),
        "buffers": [b._asdict() for b in largest_live(compiled.live_ranges, module)],
        "times": {name: getattr(times, name) for name in TIMES},
        "collectives": [
            {**vars(c), "times": n, "waited": times.waits[c]}
            for c, n in sorted(times.collectives.items(), key=lambda item: -times.waits[item[0]])
        ],
        "kernels": [{**vars(k), "times": n} for k, n in times.kernels.items()],
    }


class Measuring:
    """A measurement in a running process. `close` ends the process and removes its files."""

    def __init__(self, config: RunConfig):
        self._folder = tempfile.TemporaryDirectory(prefix="easylm_mling_plan_")
        folder = Path(self._folder.name)
        self._result, self._log = folder / "result.json", folder / "log"
        (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
        command = [sys.executable, "-m", "easylm_mling.plan.measure", str(folder / "config.yaml"), str(self._result)]
        with open(self._log, "wb") as log:
            self._process = subprocess.Popen(command, env={**os.environ, **ENVIRONMENT}, stdout=log, stderr=log)

    def result(self) -> dict | None:
        """Return the measurement, or None while it runs."""
        code = self._process.poll()
        if code is None:
            return None
        if code == 0:
            return json.loads(self._result.read_bytes())
        lines = [line for line in self._log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        if code == -9:
            return {"error": "the compiler was killed, most likely for want of memory on this machine"}
        return {"error": f"the compiler failed: {lines[-1] if lines else f'exit code {code}'}"}

    def close(self):
        """End the process if it still runs, and remove its files."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._folder.cleanup()


if __name__ == "__main__":
    write_atomically(Path(sys.argv[2]), json.dumps(measure(load([sys.argv[1]]))).encode())
