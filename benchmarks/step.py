"""The training step beside one of plain transformers and torch, and beside what the machine's matrix products allow.

    python benchmarks/step.py [--rounds 5] [override=value ...]

One Gemma of random weights (42 million parameters unless model.* overrides say otherwise) takes the same rows through
forward, backward, clipping and AdamW in both frameworks: ours as `train` runs it, theirs as a loop over
GemmaForCausalLM, with `sdpa` attention, its own loss and a fused torch.optim.AdamW. Both run where JAX runs: on a GPU if
torch sees it, too, else on the CPU with all its cores. They take turns in one process, and the losses of the first two
steps are compared. The limit is the model's FLOPs (model/flops.py: nothing that is computed twice counts) over
the best rate at which either framework multiplies large square matrices here.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import torch
from transformers import GemmaConfig, GemmaForCausalLM

from easylm_mling.config import RunConfig, load
from easylm_mling.model.flops import model_flops
from easylm_mling.model.params import parameter_count, parameter_table, to_nested
from easylm_mling.model.sharding import make_mesh
from easylm_mling.training.state import init_state, state_shardings
from easylm_mling.training.step import jit_train_step

SHAPE = [
    "model.vocab_size=16384", "model.hidden_size=512", "model.intermediate_size=2048", "model.num_hidden_layers=8",
    "model.num_attention_heads=4", "model.num_key_value_heads=4", "model.head_dim=128", "model.max_position_embeddings=1024",
    "data.sequence_length=512", "train.batch_size=4", "train.accumulation_steps=1", "train.remat=none",
    "mesh.cpu_devices=0", "mesh.data=1", "mesh.fsdp=1", "mesh.tensor=1", "optimizer.schedule=wsd", "optimizer.warmup=0 steps",
    "optimizer.learning_rate=0.001",
]  # fmt: skip
SQUARE = 2048


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("overrides", nargs="*")
    a = parser.parse_args()
    config = load(["configs/demo.yaml"], [*SHAPE, *a.overrides])
    place = "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu"
    theirs = transformers_model(config, place)
    B, T = config.train.batch_size, config.data.sequence_length
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, (B, T), np.int32)
    steps = {"ours": our_step(config, theirs, tokens), "transformers": their_step(config, theirs, tokens, place)}
    count, flops = parameter_count(config.model), B * model_flops(config.model, T)
    print(
        f"{count / 1e6:.0f} M parameters, {B} rows of {T}, {config.train.compute_dtype}, on {jax.devices()[0].device_kind}"
    )
    losses = {name: [step(), step()] for name, step in steps.items()}  # the first of ours is compiled here
    for name, found in losses.items():
        print(f"{name:13} losses of steps 1 and 2: {found[0]:.5f} {found[1]:.5f}")
    products = products_of(config.train.compute_dtype, place)
    seconds: dict[str, list[float]] = {name: [] for name in (*steps, *products)}
    for _ in range(a.rounds):
        for name, run in {**steps, **products}.items():
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    rate = max(2 * SQUARE**3 / min(seconds[name]) for name in products)
    limit = flops / rate
    print(f"limit         {limit:8.3f} s: {flops / 1e12:.3f} TFLOP at the {rate / 1e9:.0f} GFLOP/s of a product")
    for name in steps:
        least, middle = min(seconds[name]), statistics.median(seconds[name])
        print(
            f"{name:13} {least:8.3f} s at best, {middle:.3f} in the middle; {B * T / least:,.0f} tokens a second; "
            f"{limit / least:.2f} of the limit's speed"
        )
    pairs = [theirs / ours for ours, theirs in zip(seconds["ours"], seconds["transformers"], strict=True)]
    print(f"transformers / ours, round by round: {' '.join(f'{p:.2f}' for p in pairs)}")


def transformers_model(config: RunConfig, place: str) -> GemmaForCausalLM:
    m = config.model
    torch.manual_seed(0)
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "head_dim", "max_position_embeddings")  # fmt: skip
    shape = GemmaConfig(**{name: getattr(m, name) for name in names}, attn_implementation="sdpa")
    return GemmaForCausalLM(shape).to(place)


def our_step(config: RunConfig, theirs: GemmaForCausalLM, tokens: np.ndarray) -> Callable[[], float]:
    """A function that takes one step, from the other model's weights on, and returns the loss before it."""
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    weights = {name: w.detach().cpu().numpy() for name, w in theirs.state_dict().items()}
    found = {}
    for p in parameter_table(config.model):
        layers = range(p.shape[0]) if p.stacked else [0]
        found[p.path] = np.stack([weights[p.hf_name.format(layer=i)].copy() for i in layers]).reshape(p.shape)
    begin = jax.jit(partial(init_state, config=config), out_shardings=state_shardings(config, mesh))
    state = begin(to_nested(found))
    train_step = jit_train_step(config, mesh)
    mask = np.ones(tokens.shape, np.float32)
    mask[:, -1] = 0
    batch = {
        "tokens": tokens, "targets": np.roll(tokens, -1, axis=1), "segment_ids": np.ones_like(tokens), "loss_mask": mask,
        "positions": np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape),
        "source": np.zeros(len(tokens), np.int32),
    }  # fmt: skip

    def step() -> float:
        nonlocal state
        with jax.set_mesh(mesh):
            state, metrics = train_step(state, batch)
        return float(jnp.sum(metrics["loss_sum"]) / jnp.sum(metrics["loss_count"]))

    return step


def their_step(config: RunConfig, model: GemmaForCausalLM, tokens: np.ndarray, place: str) -> Callable[[], float]:
    o, rows = config.optimizer, torch.from_numpy(tokens.astype(np.int64)).to(place)
    optimizer = torch.optim.AdamW(
        model.parameters(), o.learning_rate, (o.beta1, o.beta2), o.epsilon, o.weight_decay, fused=True
    )
    narrow = torch.autocast(place, torch.bfloat16, enabled=config.train.compute_dtype == "bfloat16")

    def step() -> float:
        with narrow:
            loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), o.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def products_of(dtype: str, place: str) -> dict[str, Callable]:
    """One product of two square matrices, by JAX and by torch."""
    a = jnp.ones((SQUARE, SQUARE), dtype)
    by_jax = jax.jit(jnp.matmul)
    by_jax(a, a).block_until_ready()
    b = torch.ones((SQUARE, SQUARE), dtype=getattr(torch, dtype), device=place)

    def by_torch():
        float((b @ b)[0, 0])

    return {"product by JAX": lambda: by_jax(a, a).block_until_ready(), "product by torch": by_torch}


if __name__ == "__main__":
    main()
