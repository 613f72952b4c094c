"""The stop rate of held-out answers: which tokens end an answer, and the probability of them from the logits of the loss."""

import json
from functools import cache

import jax
import numpy as np
import pytest
from flax import nnx
from jax import numpy as jnp
from processes import ROOT
from test_step import T, make_batch, make_config

from easylm_mling.config import ConversationConfig
from easylm_mling.data.conversations.encoding import ConversationEncoder
from easylm_mling.data.conversations.templates import read_template
from easylm_mling.data.mixture import row_arrays
from easylm_mling.data.tokenization.tokenizer import Tokenizer
from easylm_mling.model.decoder import ForwardOptions
from easylm_mling.model.sharding import batch_sharding, make_mesh
from easylm_mling.run.validation import answer_ends
from easylm_mling.training.state import init_params, model_graph, state_shardings
from easylm_mling.training.step import jit_eval_step

TALK = [
    {"role": "user", "content": "봄에는 무엇을 심나요?"},
    {"role": "assistant", "content": "상추와 감자를 심습니다."},
    {"role": "user", "content": "And in autumn?"},
    {"role": "assistant", "content": "Garlic, and spinach.\nBoth like the cold."},
]


@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 2, 2)])
def test_it_is_the_softmax_at_the_ends_and_the_losses_keep_their_bits(mesh):
    config = make_config(mesh)
    devices = make_mesh(config.mesh, jax.devices()[: int(np.prod(mesh))])
    batch, params = make_batch(), init_params(config.model, 0)
    ends = (np.random.default_rng(1).random((8, T)) < 0.3).astype(np.float32)
    model = nnx.merge(model_graph(config.model), params)
    rows = (jnp.asarray(batch[k]) for k in ("tokens", "positions", "segment_ids"))
    scores = np.asarray(model(*rows, ForwardOptions(jnp.float32)) @ params["embed_tokens"].T, np.float64)
    chosen = np.take_along_axis(scores, batch["targets"][..., None], -1)[..., 0]
    chance = np.exp(chosen) / np.exp(scores).sum(-1) * ends
    with jax.set_mesh(devices):
        sharded = jax.device_put(params, state_shardings(config, devices).params)
        step = jit_eval_step(config, devices)
        plain = step(sharded, jax.device_put(batch, batch_sharding(devices)))
        entropy, targets, chances, count = step(
            sharded, jax.device_put({**batch, "ends": ends}, batch_sharding(devices))
        )
    np.testing.assert_allclose(chances, [chance[batch["source"] == s].sum() for s in (0, 1)], rtol=1e-5)
    np.testing.assert_array_equal(count, [ends[batch["source"] == s].sum() for s in (0, 1)])
    jax.tree.map(np.testing.assert_array_equal, (entropy, targets), plain)


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer(str(ROOT / "data" / "sample" / "tokenizer" / "tokenizer.model"))


def ends_of(length: int, row: int, **settings) -> list[str]:
    """The pieces of the ends in a row of `row` tokens with the conversation twice."""
    config = ConversationConfig(**settings)
    template = read_template(config, str(ROOT / "data/sample/tokenizer/tokenizer.model"), "key")
    encoder = ConversationEncoder(config, template, tokenizer(), length, "key")
    tokens = encoder.encode(json.dumps({"messages": TALK}).encode())
    twice = np.concatenate([tokens, tokens])
    real = min(len(twice), row + 1)
    arrays = row_arrays(np.pad(twice, (0, row + 1))[None, : row + 1], tokenizer().bos_id, tokenizer().eos_id)
    arrays["loss_mask"][:, real - 1 :] = 0
    return [tokenizer().piece(i) for i in arrays["targets"][answer_ends(arrays, tokenizer()) > 0].tolist()]


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"template": "gemma"}, ["<end_of_turn>"] * 4),
        ({"template": "gemma", "train_on": "last"}, ["<end_of_turn>"] * 2),
        ({"template": "gemma", "train_end": False}, []),
        ({"template": "komt", "train_on": "last"}, ["<eos>"] * 2),
        ({"template": "alpaca", "train_on": "last", "train_end": False}, []),
    ],
)
def test_the_end_of_each_trained_answer_is_one(settings, expected):
    assert ends_of(512, 400, **settings) == expected


def test_an_answer_that_was_cut_has_no_end():
    whole = len(ends_of(512, 400, template="gemma"))
    # A few tokens fewer than the first answer has behind its question.
    cut = [len(ends_of(length, 400, template="gemma")) for length in range(30, 130, 20)]
    assert whole == 4 and 0 in cut and 2 in cut and set(cut) <= {0, 2, 4}
