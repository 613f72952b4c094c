"""Decoding beside its limit: bytes that a step must read, over the bytes a second that memory gives, to the measured time.

    python benchmarks/generation.py [--hidden 1024] [--layers 8] [--context 512] [--rows 1 8] [--rounds 3]

A step writes one token of each row. It must read every parameter that takes part in a product once, and the keys and values
of each row. What memory gives is measured in the same run: the sum of as many bytes by XLA, which is all reading. Both have
the best of their rounds. A ratio of 1 is the limit; what fits into a cache can be faster. The model is a random Gemma in
float32; its vocabulary has 8,192 pieces.
"""

import argparse
import os
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from easylm_mling.config import ModelConfig
from easylm_mling.inference.decoder import Decoder, Draw
from easylm_mling.model.decoder import Gemma
from easylm_mling.model.params import looked_up_only, parameter_count
from easylm_mling.training.state import model_graph

STEPS = 8  # of one call


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=3)
    a = parser.parse_args()
    model = ModelConfig(
        vocab_size=8192, hidden_size=a.hidden, intermediate_size=4 * a.hidden, num_hidden_layers=a.layers,
        num_attention_heads=a.hidden // 128, num_key_value_heads=1, head_dim=128, max_position_embeddings=a.context,
    )  # fmt: skip
    params = nnx.to_pure_dict(nnx.state(Gemma(model, jax.random.key(0)), nnx.Param))
    weights = 4 * (parameter_count(model) - looked_up_only(model))
    print(f"{parameter_count(model):,} parameters; load {os.getloadavg()[0]:.1f}")
    for rows in a.rows:
        decoder = Decoder(model_graph(model), params, model, rows, a.context, "float32")
        prompt = np.random.default_rng(0).integers(3, model.vocab_size, a.context // 2).tolist()
        for row in range(rows):
            decoder.begin(row, prompt, Draw())
        # Every slot is read, and the mask hides those without a token.
        cache = 4 * rows * a.context * 2 * model.num_key_value_heads * model.head_dim * model.num_hidden_layers
        seconds, speed = best(decoder.advance, a.rounds) / STEPS, reading_speed(weights, a.rounds)
        limit = (weights + cache) / speed
        print(
            f"{rows:3} rows: {(weights + cache) / 1e6:,.0f} MB a step ({cache / 1e6:,.1f} MB of keys and values), "
            f"{speed / 1e9:.1f} GB/s: {1e3 * limit:.1f} ms; measured {1e3 * seconds:.1f} ms: {limit / seconds:.2f} of the limit, "
            f"{rows / seconds:.1f} tokens a second",
            flush=True,
        )
    print(f"load {os.getloadavg()[0]:.1f}")


def reading_speed(size: int, rounds: int) -> float:
    """Bytes a second at which `size` bytes are read."""
    data, total = jnp.ones(size // 4, jnp.float32), jax.jit(jnp.sum)
    return size / best(lambda: total(data).block_until_ready(), rounds)


def best(run: Callable[[], object], rounds: int) -> float:
    """Seconds of the fastest of some calls, after one that compiles."""
    run()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


if __name__ == "__main__":
    main()
