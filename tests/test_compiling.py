"""Compiled programs kept from one start to the next: where, and that JAX takes it so."""

import os
import subprocess
import sys

PROGRAM = """
import jax, jax.numpy as jnp
from easylm_mling.training.compilation import enable_compilation_cache
enable_compilation_cache()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
counts = []
jax.monitoring.register_event_listener(lambda name, **_: counts.append(name))
jax.jit(lambda x: x * 3 + 1)(jnp.arange(7.0)).block_until_ready()
print(sum(name.endswith("cache_hits") for name in counts), sum(name.endswith("cache_misses") for name in counts))
"""


def hits_and_misses(environment: dict[str, str]) -> list[int]:
    printed = subprocess.check_output([sys.executable, "-c", PROGRAM], env=environment, text=True)
    return [int(word) for word in printed.split()]


def test_the_second_start_compiles_nothing(tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)

    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    hits, misses = hits_and_misses(environment)
    assert hits == 0 and misses > 0
    assert list((tmp_path / "easylm_mling" / "compiled").glob("*-cache"))
    assert hits_and_misses(environment) == [misses, 0]


def test_a_folder_that_the_user_names_is_left_to_jax(tmp_path, monkeypatch):

    environment = {
        **os.environ,
        "XDG_CACHE_HOME": str(tmp_path / "a"),
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "b"),
    }
    hits_and_misses(environment)
    assert list((tmp_path / "b").glob("*-cache")) and not (tmp_path / "a").exists()
