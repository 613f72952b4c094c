"""The training step of a config, compiled for a TPU slice by libtpu, on any machine.

`compile_step` does it in this process; JAX must not have looked for devices yet.
"""

import os
import re
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from easylm_mling.config import ConfigError, RunConfig
from easylm_mling.plan.buffers import listed_in, to_bytes
from easylm_mling.plan.slices import Slice, find_slice

# libtpu neither asks the cloud where it runs, nor keeps other compilers out, nor logs what it does not find here.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_MIN_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "TPU_ACCELERATOR_TYPE": "v4-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    # A program out of the cache would leave no dump.
    "JAX_ENABLE_COMPILATION_CACHE": "false",
}


class Memory(NamedTuple):
    """Bytes on one chip."""

    peak: int
    arguments: int
    temporaries: int
    host: int


class CompiledStep(NamedTuple):
    hlo: str  # scheduled, as text
    live_ranges: str  # the compiler's report
    memory: Memory
    seconds: float


class DoesNotFit(Exception):
    """The compiler finds no room: `needed` and `available` bytes of a chip's memory, and the largest buffers."""

    def __init__(self, message: str):
        used = re.search(
            r"Used ([\d.]+[KMGT]?) of ([\d.]+[KMGT]?) hbm|\(([\d.]+[KMGT]?)\) exceeds available HBM \(([\d.]+[KMGT]?)\)",
            message,
        )
        self.needed, self.available = (to_bytes(x) for x in used.groups() if x) if used else (None, None)
        self.buffers = listed_in(message)
        super().__init__(message.splitlines()[0])


def slice_devices(where: Slice) -> list:
    """The slice's devices, to compile for; raises ConfigError when libtpu is not installed."""
    from jax.experimental import topologies

    shape = "x".join(str(n) for n in where.shape)
    try:
        topology = topologies.get_topology_desc(
            platform="tpu",
            topology_name=f"{where.chip.topology}:{shape}",
            chip_config_name=where.chip.core_config,
            chips_per_host_bounds=where.host,
            num_slices=where.count,
        )
    except RuntimeError as error:
        if "TPU support not installed" not in str(error):
            raise
        raise ConfigError(
            "plan needs the TPU compiler, libtpu; install it with pip install 'easylm-mling[tpu]'"
        ) from None
    return topology.devices


def compile_step(config: RunConfig) -> CompiledStep:
    """Compiles the step for `mesh.slice`. Raises ConfigError for what cannot be cut so and for a flag that the compiler
    refuses, DoesNotFit when it finds no room."""
    os.environ.update(ENVIRONMENT)
    import jax

    from easylm_mling.sharding import check_run, make_mesh
    from easylm_mling.step import abstract_batch, abstract_state, jit_train_step

    where = find_slice(config.mesh.slice or "")
    mesh = make_mesh(config.mesh, slice_devices(where))
    check_run(config, mesh)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), tempfile.TemporaryDirectory() as dump:
        lowered = jit_train_step(config, mesh).lower(abstract_state(config, mesh), abstract_batch(config, mesh))
        start = time.monotonic()
        try:
            # The dump and not `as_text()`: that fails on some asynchronous instructions of v5p.
            compiled = lowered.compile(compiler_options={"xla_dump_to": dump})
        except jax.errors.JaxRuntimeError as error:
            raise _explained(error) from None
        seconds = time.monotonic() - start
        hlo, live_ranges = (_dumped(dump, name) for name in ("after_codegen.txt", "live-range.txt"))
    m = compiled.memory_analysis()
    host = m.host_argument_size_in_bytes + m.host_temp_size_in_bytes
    memory = Memory(m.peak_memory_in_bytes, m.argument_size_in_bytes, m.temp_size_in_bytes, host)
    return CompiledStep(hlo, live_ranges, memory, seconds)


def _dumped(folder: str, ending: str) -> str:
    (file,) = Path(folder).glob(f"*jit_train_step*{ending}")
    return file.read_text(encoding="utf-8")


def _explained(error: Exception) -> Exception:
    message = str(error)
    if "RESOURCE_EXHAUSTED" in message and ("hbm" in message or "HBM" in message):
        return DoesNotFit(message)
    refused = re.search(r"No such compile option: '(\w+)'|Failed to parse .* into flag (\w+)", message)
    if refused:
        name, first = refused[1] or refused[2], message.splitlines()[0]
        return ConfigError(
            f"train.compiler_flags.{name}: the compiler refuses it ({first}); correct it or leave it out"
        )
    return error
