"""easylm_mling: continue the pretraining of Gemma on your own languages, on TPU pods.

from easylm_mling import export, generate, load_config, load_model, train

train(load_config(["configs/demo.yaml"], ["run_dir=runs/demo"]))
export("runs/demo", "demo-hf")
print(generate(load_model("demo-hf"), ["In the morning"]))
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from easylm_mling.api import Model, export, generate, load_config, load_model, train

__all__ = ["Model", "export", "generate", "load_config", "load_model", "train"]
__version__ = "0.1.0"


def __getattr__(name: str):
    """Import the API when it is first used: the command line must not wait for JAX."""
    if name not in __all__:
        raise AttributeError(f"module 'easylm_mling' has no attribute {name!r}")
    from easylm_mling import api

    return getattr(api, name)
