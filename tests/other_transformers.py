"""Do other releases of transformers read our exports as we do? Each release in a virtual environment of its own.

    python tests/other_transformers.py [--folder DIR]        (some minutes; needs pip and a network)

Makes tiny random models of every family with its traps on, imports and exports them in float32, and prints for each
release the largest difference between its logits and ours. torch is that of this environment. Exit code 1 if a
difference is over 5e-6 of the largest logit, or if a release misses or leaves over a tensor.
"""

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import numpy as np

COMMON = ("gemma", "gemma2", "gemma3_text", "llama", "llama3", "llama_linear")
COMMON += ("mistral", "mistral_global", "qwen2", "qwen3")
SCALED = ("mistral_yarn", "qwen2_yarn")
# The first release with each family, and the newest of 4 and 5. The first whose Llama has a head_dim of its own, which the
# tiny models have, is 4.45. 5.5's small Gemma 4 has keys and values in layers that never use them, so it misses those.
RELEASES = {
    "4.38.2": ("gemma",),
    "4.42.4": ("gemma2",),
    "4.45.2": ("llama", "llama3"),
    "4.50.3": ("gemma3_text",),
    "4.51.3": ("qwen3",),
    "4.57.6": (*COMMON, *SCALED),
    "5.5.0": ("gemma4",),
    "5.10.1": ("gemma4_small", "gemma4_unified"),
    "5.24.0": (*COMMON, *SCALED, "qwen3_window", "gemma4", "gemma4_small", "gemma4_unified"),
}
TOLERANCE = 5e-6  # of the largest logit, with which rounding grows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="keeps models and environments (default: a temporary folder)")
    parser.add_argument("--load", nargs="+", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.load:
        load([Path(d) for d in a.load])
        return 0
    with tempfile.TemporaryDirectory(prefix="other_transformers_") as temporary:
        folder = Path(a.folder or temporary).absolute()
        make(folder)
        return max(compare(folder, release, families) for release, families in RELEASES.items())


def make(folder: Path):
    """For each family an exported directory and our logits of 2 x 40 tokens, which are longer than the windows."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax
    import jax.numpy as jnp
    from hf_models import FAMILIES, TINY, our_logits, save, transformers_model

    from easylm_mling.hf.exporting import export_hf
    from easylm_mling.hf.importing import import_hf

    tokens = np.random.default_rng(0).integers(0, TINY["vocab_size"], (2, 40))
    for family in FAMILIES:
        place = folder / family
        import_hf(save(transformers_model(family=family, kernels=0.2), place / "source"), place / "checkpoint")
        export_hf(place / "checkpoint", place / "exported", dtype="float32")
        # The stand-ins for a tokenizer are no tokenizers, and nothing here needs one.
        with jax.default_matmul_precision("highest"):
            np.savez(place / "ours.npz", tokens=tokens, logits=our_logits(place / "exported", tokens, jnp.float32))


def compare(folder: Path, release: str, families: tuple[str, ...]) -> int:
    """Prints a line a family; returns 1 if one differs."""
    python = environment(folder / f"venv-{release}", release)
    places = [str(folder / family) for family in families]
    done = subprocess.run([python, __file__, "--load", *places], stdout=subprocess.PIPE, text=True, check=True)
    wrong = 0
    for line in done.stdout.splitlines():
        found = json.loads(line)
        good = found["difference"] <= TOLERANCE * max(1.0, found["largest"]) and not found["keys"]
        wrong |= not good
        print(
            f"transformers {found['version']:8} {found['family']:12} max |difference| {found['difference']:.1e}"
            f" (largest logit {found['largest']:.1f}){'' if good else '  WRONG ' + ' '.join(found['keys'])}",
            flush=True,
        )
    return wrong


def environment(folder: Path, release: str) -> Path:
    """The interpreter of a new environment with that release; what it lacks it finds in ours, behind its own."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", f"transformers=={release}", "numpy"], check=True)
        (site,) = folder.glob("lib/python*/site-packages")
        (site / "torch_of_this_environment.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def load(places: list[Path]):
    """In the other environment: a JSON line for each model."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for place in places:
        ours = np.load(place / "ours.npz")
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            place / "exported", torch_dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
        with torch.no_grad():
            logits = model.eval()(torch.from_numpy(ours["tokens"])).logits.numpy()
        found = {
            "version": transformers.__version__,
            "family": place.name,
            "difference": float(np.abs(logits - ours["logits"]).max()),
            "largest": float(np.abs(logits).max()),
            # A tied head is not written, and older releases count it.
            "keys": sorted(k for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for k in report[kind]),
        }
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    sys.exit(main())
