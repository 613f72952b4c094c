"""Merging: the formulas against plain NumPy, exact where nothing changes, and refused before a byte is written."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from data_corpus import train_tokenizer
from hf_models import any_finite_bits, raw_tensors, save, transformers_model
from merge_models import change, model_directory, tensors

from easylm_mling.checkpoint.checkpoint import Checkpoints
from easylm_mling.cli.main import main
from easylm_mling.config import ModelConfig, to_tree
from easylm_mling.errors import ConfigError, VerificationError
from easylm_mling.hf.exporting import export_hf
from easylm_mling.hf.importing import import_hf, widest_mesh
from easylm_mling.merge import stream
from easylm_mling.merge.recipe import MergeRecipe, ModelRef, load_recipe, model_ref
from easylm_mling.merge.verify import verify_merge
from easylm_mling.merge.writing import merge_to_checkpoint, merge_to_hf
from easylm_mling.model.sharding import parameter_shardings
from easylm_mling.training.spike_guard import nothing_recent
from easylm_mling.training.state import TrainState, init_params

FAMILY = ["gemma", "gemma3_text", "llama"]
BY_KIND = {"embedding": 0.0, "attention": 0.25, "norms": 1.5}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Family -> the directories of a base and of two models that began with it."""
    root, made = tmp_path_factory.mktemp("models"), {}
    for family in FAMILY:
        base = model_directory(root / family / "base", 1, family)
        made[family] = [base, *(model_directory(root / family / f"m{i}", i, family, near=base) for i in (2, 3))]
    return made


def kind_of(name: str) -> str:
    if "norm" in name:
        return "norms"
    return "embedding" if "embed" in name or "lm_head" in name else "attention" if "attn" in name else "mlp"


def slerp(t: float, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = a.astype(np.float64), b.astype(np.float64)
    angle = np.arccos(np.sum(a / np.linalg.norm(a) * b / np.linalg.norm(b)))
    return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)


def assert_near(folder, expected):
    merged = tensors(folder)
    assert merged.keys() == expected.keys()
    for name, values in merged.items():
        np.testing.assert_allclose(values, expected[name], rtol=2e-7, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("family", FAMILY)
def test_the_formulas_are_those_of_numpy(models, family, tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "_BLOCK", 1000)  # cuts that are no rows
    monkeypatch.setattr(stream, "_WRITTEN", 2700)
    dirs = models[family]
    base, a, b = (tensors(d) for d in dirs)
    refs = [ModelRef(str(d), weight=w) for d, w in zip(dirs, (0.5, 2.0, 0.5), strict=True)]
    merge_to_hf(MergeRecipe("linear", tuple(refs)), tmp_path / "linear", "float32")
    assert_near(tmp_path / "linear", {n: (0.5 * base[n] + 2 * a[n].astype(float) + 0.5 * b[n]) / 3 for n in base})
    deltas = (refs[1], ModelRef(str(dirs[2]), weight=0.5, by_kind=BY_KIND))
    merge_to_hf(MergeRecipe("task_arithmetic", deltas, base=refs[0]), tmp_path / "task", "float32")
    weight = {n: BY_KIND.get(kind_of(n), 0.5) for n in base}
    wide = {n: base[n].astype(float) for n in base}
    expected = {n: wide[n] + 2 * (a[n] - wide[n]) + weight[n] * (b[n] - wide[n]) for n in base}
    assert_near(tmp_path / "task", expected)
    merge_to_hf(MergeRecipe("slerp", (refs[1], ModelRef(str(dirs[2]), weight=0.3))), tmp_path / "slerp", "float32")
    far = {n: np.sum(a[n] * b[n]) / np.linalg.norm(a[n]) / np.linalg.norm(b[n]) < 0.9995 for n in a}
    assert 0 < sum(far.values()) < len(far) or family == "gemma3_text"
    assert_near(
        tmp_path / "slerp", {n: slerp(0.3, a[n], b[n]) if far[n] else 0.7 * a[n].astype(float) + 0.3 * b[n] for n in a}
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_average_of_one_is_that_one(tmp_path, dtype):
    model = any_finite_bits(transformers_model(dtype=dtype))
    source = save(model, tmp_path / "source", max_shard_size="60KB")
    recipe = MergeRecipe("linear", (ModelRef(str(source), weight=3.0),))
    merge_to_hf(recipe, tmp_path / "merged", str(dtype).removeprefix("torch."), max_shard_bytes=6e4)
    assert raw_tensors(tmp_path / "merged") == raw_tensors(source)
    twice = MergeRecipe("slerp", (ModelRef(str(source)), ModelRef(str(source), weight=0.0)))
    merge_to_hf(twice, tmp_path / "slerp", str(dtype).removeprefix("torch."))
    assert raw_tensors(tmp_path / "slerp") == raw_tensors(source)


def test_a_chat_vector_of_nothing_changes_no_bit(tmp_path):
    base = save(any_finite_bits(transformers_model(), 1), tmp_path / "base")
    instruct = save(any_finite_bits(transformers_model(), 1), tmp_path / "instruct")
    continued = save(any_finite_bits(transformers_model(), 2), tmp_path / "continued")
    vector = MergeRecipe(
        "task_arithmetic", (ModelRef(str(instruct)),), base=ModelRef(str(base)), start=ModelRef(str(continued))
    )
    merge_to_hf(vector, tmp_path / "vector", "float32")
    assert raw_tensors(tmp_path / "vector") == raw_tensors(continued)
    both = MergeRecipe("task_arithmetic", (ModelRef(str(continued)), ModelRef(str(instruct))), base=ModelRef(str(base)))
    merge_to_hf(both, tmp_path / "both", "float32")
    assert raw_tensors(tmp_path / "both") == raw_tensors(continued)


def test_an_average_of_equals_is_their_value(models, tmp_path):
    source = models["gemma"][1]
    for i in range(3):
        shutil.copytree(source, tmp_path / f"m{i}")
    refs = tuple(ModelRef(str(tmp_path / f"m{i}"), weight=0.1 * (i + 1)) for i in range(3))
    merge_to_hf(MergeRecipe("linear", refs), tmp_path / "merged", "float32")
    assert raw_tensors(tmp_path / "merged") == raw_tensors(source)


def test_sources_of_every_sort_into_a_checkpoint(models, tmp_path):
    base, a, b = models["llama"]
    import_hf(a, tmp_path / "a")
    recipe = MergeRecipe("linear", (ModelRef(str(tmp_path / "a")), ModelRef(str(base)), ModelRef(str(b))))
    plain = MergeRecipe("linear", tuple(ModelRef(str(d)) for d in (a, base, b)))
    opened = merge_to_checkpoint(recipe, tmp_path / "checkpoint")
    direct, _ = merge_to_hf(plain, tmp_path / "direct", "float32")
    export_hf(tmp_path / "checkpoint", tmp_path / "exported", dtype="float32")
    assert raw_tensors(tmp_path / "exported") == raw_tensors(tmp_path / "direct")
    # An import has the digest of the model that it was made from, and another model has another.
    digests = [[s.digest for s in o.sources] for o in (opened, direct)]
    assert digests[0] == digests[1] and len(set(digests[0])) == 3
    assert (tmp_path / "checkpoint" / "tokenizer" / "tokenizer.model").is_file()
    assert sorted(p.name for p in (tmp_path / "checkpoint").iterdir()) == ["checkpoints", "tokenizer"]
    card = (tmp_path / "exported" / "README.md").read_text()
    assert "linear merge of a, base and m3" in card


def test_an_extended_vocabulary(models, tmp_path):
    base, instruct = models["llama"][:2]
    extended = model_directory(tmp_path / "extended", 7, "llama", rows=310, near=base)
    refs = {"base": ModelRef(str(base)), "start": ModelRef(str(extended))}
    chat = (ModelRef(str(instruct)),)
    with pytest.raises(ConfigError, match="310 rows in its embedding and .* has 300; say vocabulary: first_rows"):
        merge_to_hf(MergeRecipe("task_arithmetic", chat, **refs), tmp_path / "out")
    old, new, tuned = tensors(base), tensors(extended), tensors(instruct)
    delta = {n: tuned[n].astype(float) - old[n] for n in old}
    for vocabulary in ("first_rows", "leave_embedding"):
        recipe = MergeRecipe("task_arithmetic", chat, vocabulary=vocabulary, **refs)
        opened, _ = merge_to_hf(recipe, tmp_path / vocabulary, "float32")
        expected = {n: new[n] + delta[n] for n in new if kind_of(n) != "embedding"}
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            expected[name] = new[name].astype(float)
            if vocabulary == "first_rows":
                expected[name][:300] += delta[name]
        assert_near(tmp_path / vocabulary, expected)
        assert any("embedding" in note for note in opened.notes)
        assert not (tmp_path / "out").exists()
    # Merged into the shorter one, the longer one's new rows count for nothing.
    merge_to_hf(
        MergeRecipe("linear", (ModelRef(str(base)), ModelRef(str(extended))), vocabulary="first_rows"),
        tmp_path / "short",
        "float32",
    )
    assert_near(tmp_path / "short", {n: (old[n].astype(float) + new[n][: len(old[n])]) / 2 for n in old})


def save_steps(folder, steps=(10, 20, 30)):
    """A run's checkpoints; step s has parameters that are all s."""
    model = ModelConfig(300, 32, 64, 2, 2, 1, 16)
    shapes = jax.eval_shape(lambda: init_params(model, 0))
    with Checkpoints(folder, keep_last=9) as checkpoints:
        for step in steps:
            params, count = jax.tree.map(lambda x, s=step: jnp.full(x.shape, s, x.dtype), shapes), jnp.int32(step)
            data = {"lanes": np.zeros((1, 1, 1), np.int64), "languages": np.zeros((1, 1), np.int64)}
            state = TrainState(count, params, (count,), *[count] * 3, nothing_recent())
            checkpoints.save(state, data, {"model": to_tree(model)}, wait=True)
    return folder


@pytest.mark.parametrize(
    "span, mean",
    [
        ({"last": 1}, 30),
        ({"last": 2}, 25),
        ({"first_step": 10, "last_step": 30}, 20),
        ({"first_step": 10, "last_step": 20, "weights": (1.0, 3.0)}, 17.5),
        ({"last_step": 20}, 15),
    ],
)
def test_averages_of_steps(tmp_path, span, mean):
    run = save_steps(tmp_path / "run")
    recipe = MergeRecipe("average", run=str(run), **span)
    merge_to_hf(recipe, tmp_path / "out", "float32")
    assert {float(v) for x in tensors(tmp_path / "out").values() for v in np.unique(x)} == {mean}
    if "weights" in span:
        assert "| run, step 20 | model | 0.75 |" in (tmp_path / "out" / "README.md").read_text()


def test_what_cannot_be_merged_is_said_in_one_line(models, tmp_path):
    base, a, _ = (str(d) for d in models["llama"])
    run = str(save_steps(tmp_path / "run", (10, 20)))
    odd = {name: str(shutil.copytree(a, tmp_path / name)) for name in ("rope", "tied", "tokenizer", "nan", "huge")}
    change(tmp_path / "rope", rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    train_tokenizer(tmp_path / "tokenizer" / "tokenizer.model", bos_piece="<begin>")
    tied = transformers_model(family="llama3")
    tied.config.rope_parameters = transformers_model(family="llama").config.rope_parameters
    shutil.rmtree(tmp_path / "tied")
    save(tied, tmp_path / "tied")
    for name, value in (("nan", float("nan")), ("huge", 3e38)):
        broken = transformers_model(family="llama")
        broken.model.layers[1].mlp.up_proj.weight.data[3, 3] = value
        shutil.rmtree(tmp_path / name)
        save(broken, tmp_path / name)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")

    def two(other, **settings):
        return lambda: MergeRecipe("linear", (model_ref(base), model_ref(other)), **settings)

    cases = {
        "rope_.* is .* and .*; merge others": two(odd["rope"]),
        "no models of one shape: rms_norm_eps is|tie_word_embeddings is False and True": two(odd["tied"]),
        "other tokenizers: piece .* is .* and": two(odd["tokenizer"]),
        "no models of one shape": two(str(models["gemma"][0])),
        "tensor model.layers.1.mlp.up_proj.weight holds NaN": two(odd["nan"]),
        "not finite in float32; use smaller": lambda: MergeRecipe(
            "linear", (model_ref(base), model_ref(odd["huge"], 9.0)), normalize=False
        ),
        "no checkpoint of step 15; there are 10, 20": two(f"{run}@15"),
        "last=3, but there are 2 steps": lambda: MergeRecipe("average", run=run, last=3),
        "no checkpoint of first_step=15": lambda: MergeRecipe("average", run=run, first_step=15),
        "3 weights for 2 steps": lambda: MergeRecipe("average", run=run, last=2, weights=(1.0, 1.0, 1.0)),
        "weight nan must be a finite": lambda: MergeRecipe("linear", (model_ref(base, float("nan")),)),
        "weights of embedding sum to 0": lambda: MergeRecipe("linear", (model_ref(base, 1), model_ref(a, -1))),
        "second model's weight 1.5 must be from 0 to 1": lambda: MergeRecipe(
            "slerp", (model_ref(a), model_ref(base, 1.5))
        ),
        "slerp is between two": lambda: MergeRecipe("slerp", (model_ref(a),)),
        "task_arithmetic needs base": lambda: MergeRecipe("task_arithmetic", (model_ref(a),)),
        "a step belongs to a run": two(f"{a}@3"),
        "a PEFT adapter": two(str(tmp_path / "adapter")),
        "neither checkpoints nor a config.json": two(str(tmp_path)),
        "tokenizer=other: none of the models": two(a, tokenizer="other"),
        "by_kind.heads must be one of embedding": lambda: MergeRecipe("linear", (ModelRef(a, by_kind={"heads": 1.0}),)),
        "dtype='int8' cannot": two(a),
    }
    for message, make in cases.items():
        with pytest.raises(ConfigError, match=message) as caught:
            merge_to_hf(make(), tmp_path / "out", "int8" if "int8" in message else "float32")
        assert "\n" not in str(caught.value), message
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*")), message


def test_a_tokenizer_may_come_from_another_of_the_models(models, tmp_path):
    continued, base = models["gemma"][:2]
    instruct = shutil.copytree(models["gemma"][2], tmp_path / "instruct")
    (instruct / "chat_template.jinja").write_text("{{ messages }}")
    (instruct / "generation_config.json").write_text('{"eos_token_id": [1, 107], "top_k": 64}')
    recipe = MergeRecipe(
        "task_arithmetic",
        (model_ref(str(instruct)),),
        base=model_ref(str(base)),
        start=model_ref(str(continued)),
        tokenizer=str(instruct),
    )
    opened, _ = merge_to_hf(recipe, tmp_path / "out")
    assert opened.model == dataclasses.replace(opened.sources[0].model, stop_token_ids=(107,))
    assert (tmp_path / "out" / "chat_template.jinja").is_file()
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == [1, 107]


def test_the_command_a_recipe_and_the_card(models, tmp_path, capsys):
    base, a, b = models["gemma"]
    (tmp_path / "recipe.yaml").write_text(
        f"kind: task_arithmetic\nbase: {base}\nstart: {a}\nmodels:\n  - model: {b}\n    weight: 0.5\n"
        "    by_kind: {embedding: 0}\n"
    )
    assert main(["merge", str(tmp_path / "recipe.yaml"), str(tmp_path / "out"), "--verify"]) == 0
    said = capsys.readouterr().out
    assert "bit for bit what the recipe gives in BF16" in said and "float32 logits" in said
    card = (tmp_path / "out" / "README.md").read_text()
    digests = re.findall(r"\| `([0-9a-f]{32})` \|", card)
    assert len(set(digests)) == 3 and all(d in said for d in digests)
    assert "| m3 | model | embedding 0, attention 0.5, mlp 0.5, norms 0.5 |" in card and str(tmp_path) not in card
    assert 'license: "gemma"' in card
    # The flags say the same.
    flags = ["--chat-vector", str(a), str(base), str(b), "--weights", "0.5"]
    assert main(["merge", str(tmp_path / "flags"), *flags, "--dtype", "float32"]) == 0
    expected = tensors(a)["model.norm.weight"] + 0.5 * (
        tensors(b)["model.norm.weight"].astype(float) - tensors(base)["model.norm.weight"]
    )
    np.testing.assert_allclose(tensors(tmp_path / "flags")["model.norm.weight"], expected, rtol=1e-6)
    assert main(["merge", str(tmp_path / "x"), "--linear", str(a), "--slerp", str(a), str(b)]) == 2
    assert main(["merge", str(tmp_path / "recipe.yaml"), str(tmp_path / "x"), "--weights", "1"]) == 2
    assert not (tmp_path / "x").exists()


def test_verify_finds_a_changed_bit(models, tmp_path):
    recipe = MergeRecipe("linear", tuple(ModelRef(str(d)) for d in models["gemma"]))
    merge_to_hf(recipe, tmp_path / "out", "float32")
    file = tmp_path / "out" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(VerificationError, match="model.norm.weight is not what the recipe gives"):
        verify_merge(recipe, tmp_path / "out")


def test_a_recipe_is_read_strictly(tmp_path):
    recipe = tmp_path / "r.yaml"
    for text, message in {
        "kind: linear\nmodels: [a]\nweigth: 1\n": "unknown key 'weigth'; did you mean 'weights'",
        "kind: best\nmodels: [a]\n": "kind='best' must be one of",
        "kind: linear\nmodels: [a]\nbase: b\n": "base belongs to kind: task_arithmetic",
        "- a\n": "expected `key: value`",
        "kind: average\nrun: r\n": "average needs either last",
    }.items():
        recipe.write_text(text)
        with pytest.raises(ConfigError, match=message):
            load_recipe(recipe)
    recipe.write_text("kind: linear\nmodels: [runs/a@20, {model: org/m, revision: v1, weight: .5}, org/m@main]\n")
    refs = load_recipe(recipe).models
    assert [(r.model, r.step, r.revision, r.weight) for r in refs] == [
        ("runs/a", 20, None, 1.0),
        ("org/m", None, "v1", 0.5),
        ("org/m", None, "main", 1.0),
    ]


# VmHWM and not getrusage: the latter starts at what the parent held.
MERGE_AND_REPORT = """
import re, sys
from pathlib import Path
from easylm_mling.hf import exporting
from easylm_mling.merge import sources, writing
from easylm_mling.merge.recipe import MergeRecipe, ModelRef
exporting._PIECE, sources._PIECE = 1_000_000, 250_000
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
recipe = MergeRecipe(sys.argv[1], tuple(ModelRef(sys.argv[2], step, weight=.5) for step in (0, 1)))
writing.open_merge(recipe)
before = peak()
writing.merge_to_hf(recipe, sys.argv[3])
print(peak() - before)
"""


@pytest.mark.slow
def test_a_merge_holds_little(tmp_path):
    model = ModelConfig(8000, 512, 2048, 12, 4, 4, 128)
    shapes = jax.eval_shape(lambda: init_params(model, 0))
    shardings, total = parameter_shardings(model, widest_mesh(model)), 0
    fill = jax.jit(lambda v: jax.tree.map(lambda x: jnp.full(x.shape, v), shapes), out_shardings=shardings)
    (tmp_path / "both" / "checkpoints").mkdir(parents=True)
    for step in (0, 1):
        params = fill(0.5 + step)
        total += sum(x.nbytes for x in jax.tree.leaves(params))
        with Checkpoints(tmp_path / "one") as checkpoints:
            checkpoints.save_params(params, {"model": to_tree(model)})
        (tmp_path / "one" / "checkpoints" / "0").rename(tmp_path / "both" / "checkpoints" / f"{step}")
    largest = 4 * 8000 * 512
    for kind in ("linear", "slerp"):
        command = [sys.executable, "-c", MERGE_AND_REPORT, kind, tmp_path / "both", tmp_path / kind]
        grown = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        # The constant is for libraries and what is read ahead; both models take 27 times the largest tensor.
        assert total > 4e8 and grown < 2 * 1.3 * largest + 80e6, (kind, total, grown)
