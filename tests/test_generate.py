"""Generation: the cache changes nothing, rows do not disturb each other, and the model is that of transformers."""

from functools import partial
from pathlib import Path

import hf_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import GemmaForCausalLM

from easylm_mling.checkpoint.checkpoint import Checkpoints
from easylm_mling.config import MeshConfig, ModelConfig, to_tree
from easylm_mling.errors import ConfigError
from easylm_mling.hf.importing import import_hf
from easylm_mling.inference import generate as module
from easylm_mling.inference.generate import generate, load_model, sample_text
from easylm_mling.model.decoder import ForwardOptions, logits
from easylm_mling.model.sharding import make_mesh
from easylm_mling.training.state import model_graph

PROMPTS = [[2, 17, 40, 5], [2], [2, 9, 9, 250, 31, 77, 8, 120, 44], [2, 299, 3]]


# Small embeddings and large kernels: else a tied model only repeats the last token.
transformers_model = partial(hf_models.transformers_model, kernels=0.3, embedding=0.02)


def one_device():
    return make_mesh(MeshConfig(), jax.devices()[:1])


@pytest.fixture(scope="module")
def theirs():
    return transformers_model()


@pytest.fixture(scope="module")
def directory(theirs, tmp_path_factory):
    path = tmp_path_factory.mktemp("hf") / "model"
    theirs.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def loaded(directory):
    return load_model(directory, one_device())


@partial(jax.jit, static_argnums=0)
def all_scores(graph, params, row):
    gemma, positions = nnx.merge(graph, params), jnp.arange(row.shape[1])[None]
    hidden = gemma(row, positions, jnp.ones_like(row), ForwardOptions(jnp.float32))
    return logits(hidden, gemma.head, gemma.config.final_logit_softcapping)


def recomputed(loaded, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens without a cache: the whole text again for every token."""
    graph, params, model = loaded
    tokens = list(prompt)
    width = -(-(len(prompt) + count) // 64) * 64
    # A prompt may end with what is another family's EOS.
    while len(tokens) < len(prompt) + count and (len(tokens) == len(prompt) or tokens[-1] != model.eos_token_id):
        row = jnp.asarray([tokens + [0] * (width - len(tokens))])
        tokens.append(int(jnp.argmax(all_scores(graph, params, row)[0, len(tokens) - 1])))
    return tokens[len(prompt) :]


@pytest.mark.parametrize(
    "heads, kv_heads, family",
    [(4, 4, "gemma"), (4, 1, "gemma"), (4, 2, "gemma2"), (4, 2, "gemma3_text"), (4, 2, "llama")]
    + [(4, 2, family) for family in ("gemma4", "mistral", "qwen2", "qwen3")]
    + [
        pytest.param(4, 2, family, marks=pytest.mark.slow)
        for family in ("gemma4_small", "mistral_yarn", "qwen3_window")
    ],
)
def test_greedy_text_is_that_of_transformers(tmp_path, heads, kv_heads, family):
    theirs = transformers_model(heads, kv_heads, family=family)
    theirs.save_pretrained(tmp_path / "hf")
    ours = generate(*load_model(tmp_path / "hf", one_device()), PROMPTS, 30, dtype="float32")
    for prompt, new in zip(PROMPTS, ours, strict=True):
        ids = torch.tensor([prompt])
        expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=30, do_sample=False)
        assert new == expected[0, len(prompt) :].tolist()
    assert len({tuple(new) for new in ours}) == len(PROMPTS) and max(len(set(new)) for new in ours) > 3


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3_text", "gemma4_small", "mistral_yarn", "qwen2"])
def test_the_cache_changes_nothing(family, tmp_path):
    transformers_model(family=family).save_pretrained(tmp_path)
    loaded = load_model(tmp_path, one_device())
    for prompt, new in zip(PROMPTS, generate(*loaded, PROMPTS, 20, dtype="float32"), strict=True):
        assert new == recomputed(loaded, prompt, 20)


def test_a_long_prompt_crosses_the_query_chunks(loaded):
    graph, params, model = loaded
    long = ModelConfig(**to_tree(model) | {"max_position_embeddings": 2048})
    prompt = [2, *np.random.default_rng(0).integers(3, 300, 600).tolist()]
    (new,) = generate(graph, params, long, [prompt], 4, dtype="float32")
    assert new == recomputed(loaded, prompt, 4)


@pytest.mark.slow
def test_a_row_is_the_same_in_any_company(loaded):
    for settings in ({}, {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "seed": 3}):
        alone = generate(*loaded, PROMPTS[:1], 20, dtype="float32", **settings)
        together = generate(*loaded, PROMPTS, 20, dtype="float32", **settings)
        assert together[0] == alone[0]


def test_text_ends_at_eos_and_says_so(loaded):
    def ending_at(eos: int) -> list[list[int]]:
        model = ModelConfig(**to_tree(loaded[2]) | {"eos_token_id": eos})
        return generate(model_graph(model), loaded[1], model, PROMPTS, 30, dtype="float32")

    free = ending_at(299)
    assert [len(new) for new in free] == [30] * 4
    stop = free[0][7]
    ended = ending_at(stop)
    for old, new in zip(free, ended, strict=True):
        assert new == (old[: old.index(stop) + 1] if stop in old else old)
    assert len(ended[0]) <= 8 and {len(new) for new in ended} != {len(ended[0])}


def test_one_compilation_serves_lengths_prompts_and_settings(loaded):
    generate(*loaded, PROMPTS, 1, dtype="float32")
    before = module._generate._cache_size()
    for count in (1, 2, 33, 64):
        assert all(len(new) <= count for new in generate(*loaded, PROMPTS, count, dtype="float32"))
    generate(*loaded, [[2] * 50, [2], [2, 5], [2] * 64], 5, dtype="float32")
    assert module._generate._cache_size() == before
    generate(*loaded, PROMPTS, 3, temperature=1.0, dtype="float32")
    before = module._generate._cache_size()
    for temperature, top_k, top_p, seed in ((0.5, None, 1.0, 1), (2.0, 5, 0.5, 2)):
        generate(*loaded, PROMPTS, 7, temperature, top_k, top_p, seed, "float32")
    assert module._generate._cache_size() == before


def test_a_draw_depends_on_the_seed_and_narrow_draws_are_greedy(loaded):
    def draw(**settings):
        return generate(*loaded, PROMPTS, 20, dtype="float32", **settings)

    assert draw(temperature=1.0, seed=1) == draw(temperature=1.0, seed=1) != draw(temperature=1.0, seed=2)
    greedy = draw()
    assert draw(temperature=1.0, top_k=1) == draw(temperature=1.0, top_p=1e-6) == draw(temperature=1e-4) == greedy
    assert draw(temperature=1.0) != greedy
    (first, second), *_ = [generate(*loaded, [[2, 5]] * 2, 20, temperature=1.0, dtype="float32")]
    assert first != second


@pytest.mark.parametrize(
    "temperature, top_k, top_p, expected",
    [
        (1.0, 5, 1.0, [0.4, 0.3, 0.2, 0.06, 0.04]),
        (0.5, 5, 1.0, [0.16, 0.09, 0.04, 0.0036, 0.0016]),
        (1.0, 2, 1.0, [0.4, 0.3, 0, 0, 0]),
        (1.0, 5, 0.65, [0.4, 0.3, 0, 0, 0]),
        (1.0, 5, 0.75, [0.4, 0.3, 0.2, 0, 0]),
        # After top_k the three are 4/9, 3/9, 2/9: 0.75 is reached with two, as transformers orders the two filters.
        (1.0, 3, 0.75, [0.4, 0.3, 0, 0, 0]),
    ],
)
def test_draws_follow_the_filtered_distribution(temperature, top_k, top_p, expected):
    order = np.asarray([3, 0, 4, 1, 2])
    scores = jnp.broadcast_to(jnp.log(jnp.asarray([0.4, 0.3, 0.2, 0.06, 0.04]))[order] + 7.0, (20_000, 5))
    settings = jnp.float32(temperature), jnp.int32(top_k), jnp.float32(top_p)
    drawn = jax.jit(module._sample)(jax.random.key(0), 0, scores, *settings)
    frequencies = np.bincount(order[np.asarray(drawn)], minlength=5) / 20_000
    expected = np.asarray(expected) / np.sum(expected)
    assert np.abs(frequencies - expected).max() < 0.015 and not frequencies[expected == 0].any()


def test_every_kind_of_directory_gives_the_same_model(directory, loaded, tmp_path):
    import_hf(directory, tmp_path / "imported")
    graph, params, model = load_model(tmp_path / "imported")
    with Checkpoints(tmp_path / "run") as checkpoints:
        checkpoints.save_params(params, {"config": {"model": to_tree(model)}})
    for other in (load_model(tmp_path / "imported", one_device()), load_model(tmp_path / "run", one_device())):
        assert (other[0], other[2]) == (loaded[0], loaded[2])
        jax.tree.map(np.testing.assert_array_equal, other[1], loaded[1])
    # Sharded over all devices the sums are in another order, but the text is the same.
    assert jax.tree.leaves(params)[0].sharding.num_devices == 8
    assert generate(graph, params, model, PROMPTS, 8, dtype="float32") == generate(*loaded, PROMPTS, 8, dtype="float32")


def test_text_in_float32_is_of_float32_products(loaded, monkeypatch):
    """A TPU would round their operands to bfloat16."""
    seen = []

    def traced(params, tokens, *_, **__):
        seen.append(jax.config.jax_default_matmul_precision)  # pyright: ignore[reportAttributeAccessIssue]
        return jnp.zeros((len(tokens), 1), jnp.int32), jnp.zeros(len(tokens), jnp.int32)

    monkeypatch.setattr(module, "_generate", traced)
    for dtype in ("float32", "bfloat16"):
        generate(*loaded, [[2, 5]], 1, dtype=dtype)
    assert seen == ["highest", None]


def test_bfloat16_generates(loaded):
    for new in generate(*loaded, PROMPTS, 5):
        assert len(new) == 5 or new[-1] == 1


def test_a_directory_that_is_no_model_is_refused(directory, tmp_path):
    with pytest.raises(ConfigError, match="no checkpoint here"):
        load_model(tmp_path)
    with pytest.raises(ConfigError, match="has no steps"):
        load_model(directory, step=3)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"prompts": [[2], []]}, "prompt 1 is empty"),
        ({"prompts": [[2, 300]]}, "prompt 0 holds a token outside the vocabulary of 300"),
        ({"prompts": [[-1]]}, "outside the vocabulary"),
        ({"prompts": [[2] * 500], "max_new_tokens": 13}, "max_position_embeddings=512"),
        ({"max_new_tokens": -1}, "max_new_tokens=-1"),
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"dtype": "float16"}, "dtype='float16'"),
    ],
)
def test_settings_out_of_range_are_refused(loaded, change, message):
    with pytest.raises(ConfigError, match=message):
        generate(*loaded, **{"prompts": PROMPTS, "max_new_tokens": 4} | change)


def test_nothing_asked_is_nothing_made(loaded):
    assert generate(*loaded, [], 5) == [] and generate(*loaded, PROMPTS, 0) == [[]] * 4


def train_tokenizer(path: Path):
    import sentencepiece

    text = ["the quick brown fox jumps over the lazy dog", "pack my box with five dozen liquor jugs", "1 2 3 <x> abc"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text * 20),
        model_prefix=str(path / "tokenizer"),
        vocab_size=296,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        split_digits=True,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        minloglevel=2,
    )


def test_sample_text_adds_one_bos_and_finds_the_tokenizer(directory, tmp_path, monkeypatch):
    from easylm_mling.data.tokenization.tokenizer import Tokenizer

    prompts = ["the quick", "", "<bos> dog"]
    with pytest.raises(ConfigError, match="no tokenizer.model here"):
        sample_text(directory, prompts, 4)
    train_tokenizer(tmp_path)
    theirs = GemmaForCausalLM.from_pretrained(directory)
    theirs.save_pretrained(tmp_path)
    import_hf(tmp_path, tmp_path / "imported")
    seen = []
    real = module.generate
    monkeypatch.setattr(
        module, "generate", lambda g, p, m, ids, *a, **k: seen.append(ids) or real(g, p, m, ids, *a, **k)
    )
    texts = sample_text(tmp_path, prompts, 6, dtype="float32")
    assert texts == sample_text(tmp_path / "imported", prompts, 6, dtype="float32")
    assert texts == sample_text(directory, prompts, 6, tokenizer_path=tmp_path / "tokenizer.model", dtype="float32")
    tokenizer = Tokenizer(str(tmp_path / "tokenizer.model"))
    assert seen[0] == [[2, *ids.tolist()] for ids in tokenizer.encode(prompts)] and all(
        i.count(2) == 1 for i in seen[0]
    )
    assert texts == [tokenizer.decode(ids) for ids in real(*load_model(directory), seen[0], 6, dtype="float32")]
    monkeypatch.setattr(module, "generate", lambda *_: [[260, 299, 265, 1]])
    assert sample_text(tmp_path, [""], 6) == [tokenizer.decode([260, 265])] != [""]
