"""Every test runs on 8 simulated CPU devices; this must be set before jax is imported."""

import atexit
import os
import shutil
import tempfile
from unittest.mock import patch

import pytest
from jaxtyping import install_import_hook

os.environ["JAX_PLATFORMS"] = "cpu"
# Tests compile much and compute little. So their programs are compiled in an eighth of the time; XLA_FLAGS= has them compiled
# as in training.
COMPILED_FAST = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false"
)
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", COMPILED_FAST) + " --xla_force_host_platform_device_count=8"
# On tensors as small as those of tests, torch's threads only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Tests compile the same few programs again and again, also in processes of their own.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="easylm_mling_compiled_")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

# Every call in these rooms is checked against its annotations: in tests only, and before a test imports them.
install_import_hook(["easylm_mling.model", "easylm_mling.training"], "beartype.beartype")


@pytest.fixture(autouse=True)
def environment():
    """Restores the process's environment after each test: a compilation for a slice, for one, changes it."""
    with patch.dict(os.environ):
        yield


@pytest.fixture(scope="module")
def one_device():
    """Leaves one device to the tests that ask for it: where nothing is sharded, eight would only cost time."""
    import jax

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(jax, "devices", lambda *_: jax.local_devices()[:1])
        yield


@pytest.fixture(scope="module")
def hf_source(tmp_path_factory):
    """The directory of a tiny bfloat16 Gemma, as transformers saves it."""
    import torch
    from hf_models import save, transformers_model

    return save(transformers_model(dtype=torch.bfloat16), tmp_path_factory.mktemp("hf") / "source")


@pytest.fixture(scope="module")
def imported(hf_source, tmp_path_factory):
    """The checkpoint that import-hf makes of `hf_source`."""
    from easylm_mling.hf.importing import import_hf

    directory = tmp_path_factory.mktemp("imported") / "checkpoint"
    import_hf(hf_source, directory)
    return directory
