"""This package on one GPU, beside transformers and torch on the same card: the demo, logits, a step, generation.

    benchmarks/gpu.sh                     # on a machine with a GPU: makes the environment and runs this
    python benchmarks/gpu.py [--out runs/gpu] [--only PART ...] [--tiny] [override=value ...]

Each part is a process of its own, and what it prints also lies in OUT/PART.txt. A Gemma of random weights (1.1 billion
parameters unless model.* overrides say otherwise) is compared with transformers: float32 logits, tokens a second of training
in bfloat16 (benchmarks/step.py, with attention by XLA and by cuDNN, and with fp8 products where the card has them), and tokens a
second of greedy generation. `--tiny` takes a small model and the CPU instead, to try the script itself.

Ends with 0 if every part did, with 1 if one failed, and with 3, after one line, where JAX sees no GPU.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

BILLION = [
    "model.vocab_size=32768", "model.hidden_size=2048", "model.intermediate_size=8192", "model.num_hidden_layers=16",
    "model.num_attention_heads=16", "model.num_key_value_heads=16", "model.head_dim=128",
    "model.max_position_embeddings=2048", "data.sequence_length=2048", "train.batch_size=8",
]  # fmt: skip
TINY = [
    "model.vocab_size=512", "model.hidden_size=64", "model.intermediate_size=128", "model.num_hidden_layers=2",
    "model.num_attention_heads=4", "model.num_key_value_heads=4", "model.head_dim=16",
    "model.max_position_embeddings=256", "data.sequence_length=64", "train.batch_size=2",
]  # fmt: skip
ONE_DEVICE = ["mesh.cpu_devices=0", "mesh.data=1", "mesh.fsdp=1", "mesh.tensor=1"]
NO_GPU = 3
TOLERANCE = 1e-3  # of float32 logits, as a share of the largest


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/gpu", help="folder of what is written")
    parser.add_argument("--only", nargs="+", default=(), help="these parts only")
    parser.add_argument("--tiny", action="store_true", help="a small model, on the CPU")
    parser.add_argument("--part", choices=("device", "model", "parity", "generation"), help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*")
    a = parser.parse_args()
    if a.tiny:
        os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # torch needs memory of the same card
    out, shape = Path(a.out), [*(TINY if a.tiny else BILLION), *a.overrides]
    if a.part == "device":
        return device(a.tiny)
    if a.part == "model":
        write_model(out / "model", shape)
    elif a.part:
        {"parity": parity, "generation": generation}[a.part](out / "model", "cpu" if a.tiny else "cuda")
    if a.part:
        return 0
    out.mkdir(parents=True, exist_ok=True)
    if code := run("device", [__file__, "--part", "device", *["--tiny"] * a.tiny], out):
        return NO_GPU if code == NO_GPU else 1
    card = (out / "device.txt").read_text(encoding="utf-8")
    commands = parts(out, shape, a.tiny, card)
    if unknown := set(a.only) - set(commands):
        parser.error(f"--only: {', '.join(sorted(unknown))} is none of {', '.join(commands)}")
    failed = [name for name, command in commands.items() if (not a.only or name in a.only) and run(name, command, out)]
    print(f"\nfailed: {', '.join(failed)}" if failed else "\nevery part ended well")
    return int(bool(failed))


def parts(out: Path, shape: list[str], tiny: bool, card: str) -> dict[str, list[str]]:
    """Return the command of each part, in order. `card` is what the part `device` printed."""
    demo, exported = str(out / "demo"), str(out / "demo-hf")
    ours = ["-m", "easylm_mling"]
    few = ["train.budget_tokens=20_000", "eval.every_steps=0"] if tiny else []
    step = ["benchmarks/step.py", *(["--rounds", "1"] if tiny else []), *shape, "train.compute_dtype=bfloat16"]
    itself = [__file__, *["--tiny"] * tiny, "--out", str(out), *shape]
    commands = {
        "demo": [*ours, "train", "configs/demo.yaml", f"run_dir={demo}", *ONE_DEVICE, *few],
        "export": [*ours, "export-hf", demo, exported, "--verify"],
        "sample": [*ours, "sample", exported, "--prompt", "오늘 아침에", "--prompt", "In the morning"],
        "model": [*itself, "--part", "model"],
        "parity": [*itself, "--part", "parity"],
        "step": [*step, "train.attention=xla"],
    }
    if not tiny:
        commands["step-cudnn"] = [*step, "train.attention=cudnn"]
    if tiny or "has fp8" in card:
        commands["step-fp8"] = [*step, "train.products.forward=fp8", *([] if tiny else ["train.attention=cudnn"])]
    return commands | {"generation": [*itself, "--part", "generation"]}


def run(name: str, command: list[str], out: Path) -> int:
    """Run Python with `command`, show what it prints and keep it as OUT/NAME.txt; returns its exit code."""
    print(f"\n== {name}", flush=True)
    with (
        open(out / f"{name}.txt", "w", encoding="utf-8") as kept,
        subprocess.Popen(
            [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process,
    ):
        assert process.stdout
        for line in process.stdout:
            print(line, end="", flush=True)
            kept.write(line)
    return process.returncode


def device(tiny: bool) -> int:
    """Print what JAX and torch run on; returns NO_GPU if it is no GPU."""
    import jax
    import torch

    from easylm_mling.model.quantized import FIRST_FP8_GPU

    try:
        (first, *_) = jax.devices("cpu" if tiny else "gpu")
    except RuntimeError as error:
        print(f"no GPU: {str(error).splitlines()[0]}; install jax[cuda13] or jax[cuda12] and the driver, or use --tiny")
        return NO_GPU
    capability = str(getattr(first, "compute_capability", "0.0"))
    fp8 = ", has fp8" if tuple(map(int, capability.split("."))) >= FIRST_FP8_GPU else ""
    print(
        f"{first.device_kind}, compute capability {capability}{fp8}; JAX {jax.__version__}, torch {torch.__version__}"
    )
    if not tiny and not torch.cuda.is_available():
        print("torch sees no GPU: its numbers would be the CPU's, so nothing is compared; install torch for this CUDA")
        return 1
    return 0


def write_model(folder: Path, shape: list[str]):
    """Write a Gemma of random weights as transformers does."""
    import torch
    from step import transformers_model

    from easylm_mling.config import load

    model = transformers_model(load(["configs/demo.yaml"], shape), "cpu")
    model.to(torch.bfloat16).save_pretrained(folder)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:,.0f} M parameters in {folder}")


def parity(folder: Path, place: str):
    """Compare float32 logits of both packages on torch's `place`; raises SystemExit if they are not those of one model."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import torch
    from flax import nnx
    from transformers import AutoModelForCausalLM

    from easylm_mling.inference.generate import load_model
    from easylm_mling.model.decoder import ForwardOptions, logits
    from easylm_mling.model.precision import products_in

    graph, params, config = load_model(folder)
    tokens = np.random.default_rng(0).integers(3, config.vocab_size, (2, 64), np.int32)
    positions = jnp.broadcast_to(jnp.arange(64, dtype=jnp.int32), tokens.shape)

    @jax.jit
    def scores(params):
        gemma = nnx.merge(graph, params)
        hidden = gemma(jnp.asarray(tokens), positions, jnp.ones_like(tokens), ForwardOptions(jnp.float32))
        return logits(hidden, gemma.head, config.final_logit_softcapping)

    with products_in(jnp.float32):
        ours = np.asarray(scores(params))
    torch.backends.cuda.matmul.allow_tf32 = False
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").to(place)
    with torch.no_grad():
        theirs = model(torch.from_numpy(tokens.astype(np.int64)).to(place)).logits.cpu().numpy()
    difference, largest = np.abs(ours - theirs).max(), max(1.0, np.abs(theirs).max())
    print(f"float32 logits differ by {difference:.1e} at most; the largest is {largest:.2f}")
    if not difference <= TOLERANCE * largest:
        raise SystemExit("these are not the logits of one model")


def generation(folder: Path, place: str):
    """Measure greedy generation of both packages in bfloat16: new tokens a second, with the prompts' own pass."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    from easylm_mling.inference.generate import generate, load_model

    rows, length, new = (2, 16, 8) if place == "cpu" else (8, 512, 256)
    graph, params, config = load_model(folder)
    tokens = np.random.default_rng(0).integers(3, config.vocab_size, (rows, length))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(place)
    prompts = torch.from_numpy(tokens).to(place)

    def ours() -> list[list[int]]:
        return generate(graph, params, config, tokens.tolist(), new)

    def theirs() -> list[list[int]]:
        whole = model.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=new, do_sample=False)
        return whole[:, length:].tolist()

    written = {}
    for name, write in (("ours", ours), ("transformers", theirs)):
        write()  # the first call compiles
        began = time.perf_counter()
        written[name] = write()
        seconds, count = time.perf_counter() - began, sum(map(len, written[name]))
        print(
            f"{name:13} {count} new tokens in {seconds:.3f} s: {count / seconds:,.0f} a second, {rows} rows at a time"
        )
    pairs = [
        a == b
        for x, y in zip(written["ours"], written["transformers"], strict=True)
        for a, b in zip(x, y, strict=False)
    ]
    # In bfloat16 two near-equal logits may change places, and all that follows differs.
    print(f"{sum(pairs) / len(pairs):.0%} of the tokens are the same")


if __name__ == "__main__":
    sys.exit(main())
