"""Adapters are those of peft, for every family: its files in and out, its logits, its merge, and its training."""

import json
import re
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from hf_models import FAMILIES, TINY, raw_tensors, save, their_logits, transformers_model
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_step import make_config

from easylm_mling.checkpoint.parameters import load_adapters, load_params
from easylm_mling.checkpoint.reading import stored_model
from easylm_mling.config import LoraConfig, OptimizerConfig
from easylm_mling.errors import ConfigError
from easylm_mling.hf.adapters import stored_adapters
from easylm_mling.hf.exporting import export_hf
from easylm_mling.hf.importing import import_hf, widest_mesh
from easylm_mling.hf.peft import adapter_config, adapter_tensors, export_adapter, verify_adapter
from easylm_mling.hf.peft_importing import import_adapter
from easylm_mling.model.decoder import ForwardOptions, logits
from easylm_mling.model.lora import Adapters
from easylm_mling.model.params import to_flat
from easylm_mling.training.state import abstract_adapters, abstract_params, init_state, model_graph, state_shardings
from easylm_mling.training.step import jit_train_step

# peft 0.21 asks transformers 5.23 by an old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOKENS = np.random.default_rng(0).integers(3, TINY["vocab_size"], (2, 24))


def peft_model(base, rank=8, alpha=16, spread=0.02, **settings):
    """`base` with a random adapter whose B is not zero."""
    torch.manual_seed(1)
    wanted = PeftConfig(r=rank, lora_alpha=alpha, target_modules=ALL, task_type="CAUSAL_LM", **settings)
    model = get_peft_model(base, wanted).eval()
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.normal_(0, spread)
    return model


def our_logits(base_dir, adapter_dir, lora: LoraConfig) -> np.ndarray:
    """Logits with the adapter beside the base, as a training step has them."""
    model, mesh = stored_model(base_dir), widest_mesh(stored_model(base_dir))
    gemma = nnx.merge(model_graph(model), load_params(base_dir, abstract_params(model, mesh)))
    adapters = load_adapters(adapter_dir, abstract_adapters(model, lora, mesh))["lora"]
    positions = jnp.broadcast_to(jnp.arange(TOKENS.shape[1], dtype=jnp.int32), TOKENS.shape)

    @jax.jit
    def forward(gemma, factors, tokens):
        segments = jnp.ones(tokens.shape, jnp.int32)
        hidden = gemma(tokens, positions, segments, ForwardOptions(jnp.float32), Adapters(lora, factors))
        return logits(hidden, gemma.head, model.final_logit_softcapping)

    with jax.default_matmul_precision("highest"):
        return np.asarray(forward(gemma, adapters, jnp.asarray(TOKENS, jnp.int32)))


@pytest.mark.parametrize(
    "family, rank",
    [("gemma", 8), ("gemma2", 8), ("gemma3_text", 8), ("gemma4", 8), ("llama", 32)]
    + [pytest.param("gemma4_small", 8, marks=pytest.mark.slow)],
)
def test_an_adapter_of_peft_comes_in_and_goes_out(tmp_path, family, rank):
    # An untied head of that size doubles the rounding errors of both sides.
    kernels = 0.15 if family == "llama" else 0.2
    base = transformers_model(4, 2, family=family, kernels=kernels)
    import_hf(save(base, tmp_path / "hf"), tmp_path / "base")
    plain = their_logits(base, TOKENS)
    theirs = peft_model(base, rank, use_rslora=family == "gemma2")
    theirs.save_pretrained(tmp_path / "peft")
    wanted = their_logits(theirs, TOKENS)
    assert np.abs(wanted - plain).max() > 0.02

    lora = import_adapter(tmp_path / "peft", tmp_path / "adapter", tmp_path / "base")
    assert (lora.rank, lora.alpha, lora.rslora, list(lora.projections)) == (rank, 16, family == "gemma2", ALL)
    assert np.abs(our_logits(tmp_path / "base", tmp_path / "adapter", lora) - wanted).max() <= 1e-5

    assert export_adapter(tmp_path / "adapter", tmp_path / "out") == []
    assert verify_adapter(tmp_path / "adapter", tmp_path / "out")
    assert raw_tensors(tmp_path / "out") == raw_tensors(tmp_path / "peft")
    again = PeftModel.from_pretrained(
        transformers_model(4, 2, family=family, kernels=kernels), str(tmp_path / "out")
    ).eval()
    np.testing.assert_array_equal(their_logits(again, TOKENS), wanted)

    told: list[str] = []
    export_hf(tmp_path / "adapter", tmp_path / "merged", dtype="float32", tell=told.append)
    assert len(told) == 7 and told[0].startswith("q_proj: rounding error over the adapters' effect 0")
    merged = FAMILIES[family][1].from_pretrained(tmp_path / "merged", attn_implementation="eager").eval()
    assert np.abs(their_logits(merged, TOKENS) - wanted).max() <= 1e-5


def test_every_setting_that_peft_and_vllm_read_is_written(tmp_path):
    """The keys that peft itself saves, but for those of other methods and its own defaults; the values as it has them."""
    base = transformers_model(4, 2)
    import_hf(save(base, tmp_path / "hf"), tmp_path / "base")
    peft_model(base, 4, 8, use_rslora=True, lora_dropout=0.05).save_pretrained(tmp_path / "peft")
    import_adapter(tmp_path / "peft", tmp_path / "adapter", tmp_path / "base")
    export_adapter(tmp_path / "adapter", tmp_path / "out", base_name="google/gemma-2b")
    ours, theirs = (json.loads((tmp_path / d / "adapter_config.json").read_text()) for d in ("out", "peft"))
    assert ours["base_model_name_or_path"] == "google/gemma-2b" and ours["lora_alpha"] == 8
    assert set(ours["target_modules"]) == set(theirs["target_modules"])
    for key in ours.keys() - {"base_model_name_or_path", "target_modules"}:
        assert ours[key] == theirs[key], key
    assert (tmp_path / "out" / "tokenizer.model").is_file()


def test_merging_in_bfloat16_says_what_rounding_takes(tmp_path):
    """A small change is lost to rounding in large part, and a large one is kept; each tensor is rounded once."""
    base = transformers_model(4, 2)
    import_hf(save(base, tmp_path / "hf"), tmp_path / "base")
    shares = []
    for spread in (1e-4, 0.5):
        theirs, name = peft_model(transformers_model(4, 2), spread=spread), f"{spread}"
        theirs.save_pretrained(tmp_path / f"peft-{name}")
        import_adapter(tmp_path / f"peft-{name}", tmp_path / f"adapter-{name}", tmp_path / "base")
        told: list[str] = []
        export_hf(tmp_path / f"adapter-{name}", tmp_path / f"merged-{name}", tell=told.append)
        shares.append(float(next(line for line in told if line.startswith("gate_proj")).split()[-1]))
        key = "model.layers.1.mlp.gate_proj.weight"
        exact = theirs.merge_and_unload().state_dict()[key]
        _, shape, blob = raw_tensors(tmp_path / f"merged-{name}")[key]
        ours = torch.frombuffer(bytearray(blob), dtype=torch.bfloat16).reshape(shape)
        # The two products differ in their last bit, which decides few roundings.
        assert (ours == exact.bfloat16()).float().mean() > 0.999
    assert shares[0] > 0.5 and shares[1] < 0.1


@pytest.mark.slow
def test_twenty_steps_are_those_of_peft_and_torch(tmp_path):
    base = transformers_model(4, 2)
    import_hf(save(base, tmp_path / "hf"), tmp_path / "base")
    theirs = peft_model(base, spread=0.05)
    theirs.save_pretrained(tmp_path / "peft")
    lora = import_adapter(tmp_path / "peft", tmp_path / "adapter", tmp_path / "base")
    model, mesh = stored_model(tmp_path / "base"), widest_mesh(stored_model(tmp_path / "base"))
    optimizer = OptimizerConfig(learning_rate=1e-3, final_fraction=1.0, clip_norm=1e9, weight_decay=0.1, beta2=0.95)
    config = replace(make_config(mesh=(1, 8, 1)), model=model, lora=lora, optimizer=optimizer)
    adapters = load_adapters(tmp_path / "adapter", abstract_adapters(model, lora, mesh))
    frozen = load_params(tmp_path / "base", abstract_params(model, mesh))
    rows = np.random.default_rng(2).integers(3, TINY["vocab_size"], (20, 8, 17))
    same = {"segment_ids": np.ones((8, 16), np.int32), "loss_mask": np.ones((8, 16), np.float32)}
    same |= {"positions": np.broadcast_to(np.arange(16, dtype=np.int32), (8, 16)), "source": np.zeros(8, np.int32)}
    losses = []
    with jax.set_mesh(mesh):
        begin = jax.jit(
            partial(init_state, config=config), out_shardings=state_shardings(config, mesh)._replace(frozen={})
        )
        state, step = begin(adapters)._replace(frozen=frozen), jit_train_step(config, mesh)
        for part in rows.astype(np.int32):
            state, metrics = step(state, {"tokens": part[:, :-1], "targets": part[:, 1:], **same})
            losses.append(float(metrics["loss_sum"].sum() / metrics["loss_count"].sum()))

    trained = [p for p in theirs.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(trained, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for part, ours in zip(rows, losses, strict=True):
        scores = theirs(torch.from_numpy(part[:, :-1])).logits.float()
        loss = torch.nn.functional.cross_entropy(scores.flatten(0, 1), torch.from_numpy(part[:, 1:]).flatten())
        assert loss.item() == pytest.approx(ours, abs=1e-5)
        adamw.zero_grad()
        loss.backward()
        adamw.step()
    stepped = {n.replace(".default", ""): p.detach().numpy() for n, p in theirs.named_parameters() if p.requires_grad}
    flat = to_flat(jax.device_get(state.params))
    for layer in range(model.num_hidden_layers):
        for name, of in [(n, "self_attn" if n in ALL[:4] else "mlp") for n in ALL]:
            for factor in "AB":
                wanted = stepped[f"base_model.model.model.layers.{layer}.{of}.{name}.lora_{factor}.weight"]
                got = flat[f"lora.layers.{name}.{factor.lower()}"][layer].reshape(wanted.shape)
                np.testing.assert_allclose(got, wanted, atol=1e-5, err_msg=f"{layer} {name} {factor}")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base, imported, and an adapter of it by peft."""
    folder = tmp_path_factory.mktemp("made")
    base = transformers_model(4, 2)
    import_hf(save(base, folder / "hf"), folder / "base")
    peft_model(base).save_pretrained(folder / "peft")
    return folder


WRONG = [
    ({"peft_type": "IA3"}, "peft_type='IA3'; only LORA"),
    ({"lora_alpha": None}, "lora_alpha=None must be a number"),
    ({"r": 4}, r"has shape \(8, 64\), and for this base it is \(4, 64\)"),
    ({"r": 100}, "lora.rank=100 is larger than a side of q_proj"),
    ({"use_dora": True}, "use_dora=true is not supported"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save="),
    ({"alpha_pattern": {"q_proj": 3}}, "alpha_pattern="),
    # PiSSA's adapters stand beside another base than the one they name, and activated ones do nothing before certain tokens.
    ({"init_lora_weights": "pissa"}, 'init_lora_weights="pissa" is not supported'),
    ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens="),
    ({"not_thought_of_yet": True}, "not_thought_of_yet=true is not supported"),
    ({"target_modules": ["q_proj", "k_proj", "lm_head"]}, "target_modules names lm_head, of which"),
]


@pytest.mark.parametrize("change, message", WRONG)
def test_what_is_no_plain_adapter_of_the_base_is_refused(made, tmp_path, change, message):
    settings = json.loads((made / "peft" / "adapter_config.json").read_text()) | change
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(settings))
    (tmp_path / "peft" / "adapter_model.safetensors").symlink_to(made / "peft" / "adapter_model.safetensors")
    refuses(tmp_path / "peft", made / "base", message)


def test_an_adapter_of_another_base_is_refused(made, tmp_path):
    for other, message in (({"num_hidden_layers": 2}, "unexpected tensor"), ({"hidden_size": 32}, "has shape")):
        import_hf(save(transformers_model(4, 2, **other), tmp_path / f"hf-{message}"), tmp_path / message)
        refuses(made / "peft", tmp_path / message, f"{message}.*another base; name its own with --base")


def test_an_adapter_of_a_multimodal_base_has_the_names_of_its_text_model(made, tmp_path):
    import_adapter(made / "peft", tmp_path / "adapter", made / "base")
    lora, arrays = stored_adapters(tmp_path / "adapter" / "checkpoints" / "0")
    names = [*adapter_tensors(arrays, multimodal=True)]
    assert names[0] == "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight"
    targets = adapter_config(lora, "", None, multimodal=True)["target_modules"]
    assert re.fullmatch(targets, "model.language_model.layers.0.mlp.up_proj")
    assert not re.fullmatch(targets, "model.vision_tower.encoder.layers.0.self_attn.q_proj")
    # Such names are read, too.
    shutil.copytree(made / "peft", tmp_path / "peft")
    plain = load_file(made / "peft" / "adapter_model.safetensors")
    renamed = {name.replace("model.layers", "model.language_model.layers"): a for name, a in plain.items()}
    save_file(renamed, tmp_path / "peft" / "adapter_model.safetensors", {"format": "pt"})
    import_adapter(tmp_path / "peft", tmp_path / "again", made / "base")
    again = stored_adapters(tmp_path / "again" / "checkpoints" / "0")[1]
    assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(arrays, again, strict=True))


def refuses(adapter: Path, base: Path, message: str):
    with pytest.raises(ConfigError, match=message) as caught:
        import_adapter(adapter, base.parent / "imported-adapter", base)
    assert "\n" not in str(caught.value) and not (base.parent / "imported-adapter").exists()
