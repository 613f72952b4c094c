"""Compilation of the training step, ahead of time: beside the restore and the first batches, and cached for the next start."""

import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import jax
from jax.sharding import Mesh

from easylm_mling.config import RunConfig
from easylm_mling.training.state import abstract_batch, abstract_state
from easylm_mling.training.step import jit_train_step

# The least recently used goes first. The step of Gemma 7B takes some tens of MB.
_CACHE_BYTES = 2 * 2**30


def enable_compilation_cache():
    """Cache compiled programs in the user's cache folder, or where JAX_COMPILATION_CACHE_DIR says (empty: nowhere)."""
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    jax.config.update("jax_compilation_cache_dir", str(base / "easylm_mling" / "compiled"))
    jax.config.update("jax_compilation_cache_max_size", _CACHE_BYTES)


def compile_ahead(config: RunConfig, mesh: Mesh) -> Future:
    """Compile `train_step` in a thread of its own; the result is the program (state, batch) -> (state, metrics).

    Its state and batch must lie as abstract_state and abstract_batch say.
    """

    def compiled():
        with jax.set_mesh(mesh):  # a context of this thread alone
            lowered = jit_train_step(config, mesh).lower(abstract_state(config, mesh), abstract_batch(config, mesh))
            return lowered.compile()

    pool = ThreadPoolExecutor(1, thread_name_prefix="compiling")
    program = pool.submit(compiled)
    pool.shutdown(wait=False)
    return program
