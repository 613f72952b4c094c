"""Compile a config's training step for a TPU slice with libtpu, on any machine.

`compile_step` compiles in this process, which must not have asked JAX for devices yet.
"""

import os
import re
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from easylm_mling.config import RunConfig
from easylm_mling.errors import ConfigError
from easylm_mling.plan.buffers import largest_live, peak_bytes
from easylm_mling.plan.hlo import parse
from easylm_mling.plan.slices import Slice, slice_of

# libtpu then neither asks the cloud where it runs, nor locks other compilers out, nor logs what this machine lacks.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_MIN_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "TPU_ACCELERATOR_TYPE": "v4-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    # A cached program would leave no dump.
    "JAX_ENABLE_COMPILATION_CACHE": "false",
}
# Leave out what the compiler does with an operation after its estimate. Memory, schedule and estimates stay the same, and
# Gemma 7B for a v6e-64 compiles in 132 s instead of 183 on 2 cores. Not for v4: it has so little vector memory that the
# first attempt at an operation often fails.
_ESTIMATES_ONLY = {
    # A second attempt is made where code is too long, and takes as long as the first.
    "xla_tpu_llo_compilation_max_retries": "0",
    "xla_jf_critical_path_scheduler": "false",
    "xla_jf_xlu_optimizer": "false",
}
_SCALE = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class Memory(NamedTuple):
    """Bytes on one chip."""

    peak: int
    arguments: int
    temporaries: int
    host: int


class CompiledStep(NamedTuple):
    """The compiler's output for one step."""

    hlo: str  # scheduled, as text
    live_ranges: str  # the compiler's report
    memory: Memory


class DoesNotFit(Exception):
    """The step needs `needed` bytes of the `available` ones of a chip; `buffers` are the largest."""

    def __init__(self, message: str, hlo: str, live_ranges: str):
        amounts = [
            int(float(x[:-1]) * _SCALE[x[-1]]) for x in re.findall(r"\b([\d.]+[KMGT])\b", message.splitlines()[0])
        ]
        self.needed = max(peak_bytes(live_ranges), *amounts[:1])
        self.available = amounts[1] if len(amounts) > 1 else None
        self.buffers = largest_live(live_ranges, parse(hlo))
        super().__init__(message.splitlines()[0])


def slice_devices(target: Slice) -> list:
    """Describe the slice's devices, to compile for."""
    from jax.experimental import topologies

    shape = "x".join(str(n) for n in target.shape)
    return topologies.get_topology_desc(
        platform="tpu",
        topology_name=f"{target.chip.topology}:{shape}",
        chip_config_name=target.chip.core_config,
        chips_per_host_bounds=target.host,
        num_slices=target.count,
    ).devices


def compile_step(config: RunConfig) -> CompiledStep:
    """Compile the step for `mesh.slice`.

    Raises ConfigError for what the mesh cannot cut and for flags that the compiler refuses, DoesNotFit for want of memory.
    """
    os.environ.update(ENVIRONMENT)
    import jax

    from easylm_mling.model.quantized import check_products
    from easylm_mling.model.sharding import check_run, make_mesh
    from easylm_mling.training.state import abstract_batch, abstract_state
    from easylm_mling.training.step import jit_train_step

    target = slice_of(config)
    mesh = make_mesh(config.mesh, slice_devices(target))
    check_run(config, mesh)
    check_products(config.train.products, mesh.devices.flat[0])
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = jit_train_step(config, mesh).lower(abstract_state(config, mesh), abstract_batch(config, mesh))
    if target.chip.name != "v4":
        # Another version may not know those options, and an error of the config must read as it does in training.
        with suppress(ConfigError, jax.errors.JaxRuntimeError):
            return _compile(lowered, {**_ESTIMATES_ONLY, **config.train.compiler_flags})
    return _compile(lowered, {})


def _compile(lowered, options: dict[str, str]) -> CompiledStep:
    import jax

    with tempfile.TemporaryDirectory() as dump:
        try:
            # `as_text()` fails on some asynchronous instructions of v5p, so the text comes from a dump.
            compiled = lowered.compile(compiler_options={**options, "xla_dump_to": dump})
        except jax.errors.JaxRuntimeError as error:
            raise _explain(error, dump) from None
        hlo, live_ranges = (_read_dump(dump, name) for name in ("after_codegen.txt", "live-range.txt"))
    m = compiled.memory_analysis()
    assert m is not None
    host = m.host_argument_size_in_bytes + m.host_temp_size_in_bytes
    memory = Memory(m.peak_memory_in_bytes, m.argument_size_in_bytes, m.temp_size_in_bytes, host)
    return CompiledStep(hlo, live_ranges, memory)


def _read_dump(folder: str, ending: str) -> str:
    (file,) = Path(folder).glob(f"*jit_train_step*{ending}")
    return file.read_text(encoding="utf-8")


def _explain(error: Exception, dump: str) -> Exception:
    """Return the compiler's error as one for the user; the error itself if it is of no known kind."""
    message = str(error)
    first_line = message.splitlines()[0]
    if "RESOURCE_EXHAUSTED" in message and "hbm" in first_line.lower():
        return DoesNotFit(message, _read_dump(dump, "after_optimizations.txt"), _read_dump(dump, "live-range.txt"))
    if "RESOURCE_EXHAUSTED" in message and "vmem" in message:
        amounts = re.search(r"Used \S+ of \S+ vmem", message)
        return ConfigError(
            f"an operation needs more vector memory than it may have ({amounts[0] if amounts else first_line}); lower "
            "train.attention_block, or raise train.compiler_flags.xla_tpu_scoped_vmem_limit_kib"
        )
    refused = re.search(r"No such compile option: '(\w+)'|Failed to parse .* into flag (\w+)", message)
    if refused or message.startswith(("INVALID_ARGUMENT", "FAILED_PRECONDITION")):
        key = f"train.compiler_flags.{refused[1] or refused[2]}" if refused else "train.compiler_flags"
        return ConfigError(f"{key}: the compiler refuses it ({first_line.strip()}); correct it or leave it out")
    return error
