"""Import and export: the same bits both ways, the same model as transformers', and nothing half done."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.torch import load_file, save_file
from transformers import GemmaConfig, GemmaForCausalLM

from easylm_mling.checkpoint import Checkpoints, load_params
from easylm_mling.config import ConfigError, MeshConfig, ModelConfig, to_tree
from easylm_mling.hf import exporting
from easylm_mling.hf.config import hf_config, model_config_from_hf
from easylm_mling.hf.exporting import export_hf
from easylm_mling.hf.importing import import_hf, open_weights, read_params, widest_mesh
from easylm_mling.model import logits
from easylm_mling.params import parameter_table, to_flat
from easylm_mling.sharding import make_mesh, parameter_shardings
from easylm_mling.step import TrainState, abstract_params, init_params, model_graph

TINY = dict(vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=3, head_dim=32)
HEADS = [(4, 4), (4, 2), (4, 1)]
INDEX = "model.safetensors.index.json"
GATE = "model.layers.1.mlp.gate_proj.weight"


def transformers_model(heads=4, kv_heads=2, dtype=torch.float32) -> GemmaForCausalLM:
    config = GemmaConfig(
        **TINY,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=512,
        rope_theta=10_000.0,
    )
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = GemmaForCausalLM(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(0, 0.1 if "norm" in name else 0.05)
    return model.to(dtype)


def save(model, directory: Path, **settings) -> Path:
    model.save_pretrained(directory, **settings)
    (directory / "tokenizer.model").write_bytes(bytes(range(256)))
    (directory / "tokenizer_config.json").write_text('{"add_bos_token":   true}\r\n')
    return directory


def raw_tensors(directory: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Name -> (dtype, shape, bytes) of every tensor, read from the files without any library."""
    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        blob = path.read_bytes()
        length = int.from_bytes(blob[:8], "little")
        for name, entry in json.loads(blob[8 : 8 + length]).items():
            if name != "__metadata__":
                start, stop = entry["data_offsets"]
                assert name not in found
                found[name] = (entry["dtype"], entry["shape"], blob[8 + length + start : 8 + length + stop])
    return found


def any_finite_bits(model, seed=0):
    """Fill a model with random bit patterns: every exponent, subnormals and both zeros, but no infinity or NaN."""
    generator = np.random.default_rng(seed)
    for p in model.parameters():
        width = np.uint32 if p.dtype == torch.float32 else np.uint16
        bits = generator.integers(0, np.iinfo(width).max, p.shape, width, endpoint=True)
        bits.reshape(-1)[:2] = 0, 1 << (8 * bits.itemsize - 1)
        values = torch.from_numpy(bits).view(p.dtype)
        p.data = torch.where(torch.isfinite(values), values, torch.ones_like(values))
    return model


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save(transformers_model(dtype=torch.bfloat16), tmp_path_factory.mktemp("hf") / "source")


@pytest.fixture(scope="module")
def checkpoint(source, tmp_path_factory):
    directory = tmp_path_factory.mktemp("imported") / "checkpoint"
    import_hf(source, directory)
    return directory


def our_logits(directory: Path, tokens: np.ndarray, dtype) -> np.ndarray:
    model = model_config_from_hf(directory)
    params = read_params(open_weights(directory, model), model, make_mesh(MeshConfig(), jax.devices()[:1]))
    gemma = nnx.merge(model_graph(model), params)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden = gemma(jnp.asarray(tokens), positions, jnp.ones(tokens.shape, jnp.int32), dtype)
    return np.asarray(logits(hidden, gemma.embed_tokens[...]))


def their_logits(model, tokens) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(tokens)).logits.float().numpy()


@pytest.mark.parametrize("heads, kv_heads", HEADS)
def test_logits_are_those_of_transformers(tmp_path, heads, kv_heads):
    tokens = np.random.default_rng(0).integers(0, TINY["vocab_size"], (2, 40))
    theirs = transformers_model(heads, kv_heads)
    directory = save(theirs, tmp_path / "hf")
    with jax.default_matmul_precision("highest"):
        ours = our_logits(directory, tokens, jnp.float32)
    assert np.abs(ours - their_logits(theirs, tokens)).max() <= 2e-5


@pytest.mark.parametrize("heads, kv_heads", HEADS)
def test_bfloat16_stays_close_to_transformers(tmp_path, heads, kv_heads):
    tokens = np.random.default_rng(1).integers(0, TINY["vocab_size"], (4, 64))
    theirs = transformers_model(heads, kv_heads, torch.bfloat16)
    directory = save(theirs, tmp_path / "hf")
    a = jax.nn.log_softmax(their_logits(theirs, tokens))
    b = jax.nn.log_softmax(our_logits(directory, tokens, jnp.bfloat16))
    divergence = np.sum(np.exp(a) * (a - b), axis=-1)
    assert divergence.mean() <= 5e-4 and divergence.max() <= 1e-2


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("shard", ["10MB", "60KB"])
def test_a_round_trip_keeps_every_bit(tmp_path, dtype, shard):
    model = any_finite_bits(transformers_model(4, 2, getattr(torch, dtype)))
    source = save(model, tmp_path / "source", max_shard_size=shard)
    import_hf(source, tmp_path / "checkpoint")
    bytes_a_file = {"10MB": 10e6, "60KB": 60e3}[shard]
    assert export_hf(tmp_path / "checkpoint", tmp_path / "exported", dtype=dtype, max_shard_bytes=bytes_a_file) == []
    exported = tmp_path / "exported"
    assert raw_tensors(exported) == raw_tensors(source)
    assert (exported / INDEX).is_file() == (source / INDEX).is_file() == (shard == "60KB")
    for name in ("tokenizer.model", "tokenizer_config.json"):
        assert (exported / name).read_bytes() == (source / name).read_bytes()


def test_float16_is_widened_exactly(tmp_path):
    model = any_finite_bits(transformers_model(4, 2, torch.float16))
    import_hf(save(model, tmp_path / "source"), tmp_path / "checkpoint")
    export_hf(tmp_path / "checkpoint", tmp_path / "exported", dtype="float32")
    expected = {k: v.float().numpy().tobytes() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    assert {k: v[2] for k, v in raw_tensors(tmp_path / "exported").items()} == expected


def test_export_rounds_to_nearest_even(tmp_path):
    model = any_finite_bits(transformers_model())
    ties = model.model.norm.weight.data.view(torch.int32)
    ties[:4] = torch.tensor([0x3F808000, 0x3F818000, 0x3F808001, 0x3F817FFF], dtype=torch.int32)
    import_hf(save(model, tmp_path / "source"), tmp_path / "checkpoint")
    export_hf(tmp_path / "checkpoint", tmp_path / "exported")
    bits = np.frombuffer(raw_tensors(tmp_path / "exported")["model.norm.weight"][2], np.uint16)
    assert bits[:4].tolist() == [0x3F80, 0x3F82, 0x3F81, 0x3F81]
    loaded = load_file(tmp_path / "exported" / "model.safetensors")
    for name, values in model.state_dict().items():
        if name != "lm_head.weight":
            assert torch.equal(loaded[name].view(torch.int16), values.bfloat16().view(torch.int16)), name


@pytest.mark.parametrize("max_shard_bytes", [1e9, 50_000])
def test_transformers_loads_the_export_whole(checkpoint, source, tmp_path, max_shard_bytes):
    export_hf(checkpoint, tmp_path / "out", max_shard_bytes=max_shard_bytes)
    model, report = GemmaForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values()), report
    assert model.dtype == torch.bfloat16 and model.config.tie_word_embeddings
    assert "lm_head.weight" not in raw_tensors(tmp_path / "out")
    expected = GemmaForCausalLM.from_pretrained(source).state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in model.state_dict().items())


def test_shards_obey_the_limit_and_the_index_counts(checkpoint, tmp_path):
    limit = 50_000
    export_hf(checkpoint, tmp_path / "out", max_shard_bytes=limit)
    files = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    assert (
        files == [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)] and len(files) > 3
    )
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    tensors = raw_tensors(tmp_path / "out")
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(len(data) for _, _, data in tensors.values())
    assert index["metadata"]["total_parameters"] == sum(np.prod(shape) for _, shape, _ in tensors.values())
    for file in files:
        blob = (tmp_path / "out" / file).read_bytes()
        length = int.from_bytes(blob[:8], "little")
        assert length % 8 == 0 and json.loads(blob[8 : 8 + length])["__metadata__"] == {"format": "pt"}
        assert len(blob) - 8 - length <= limit


def test_config_speaks_both_dialects(source, checkpoint, tmp_path):
    export_hf(checkpoint, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["rope_theta"] == 10_000.0 and written["rope_parameters"]["rope_theta"] == 10_000.0
    assert written["dtype"] == written["torch_dtype"] == "bfloat16"
    assert (
        written["hidden_act"] == written["hidden_activation"] == "gelu_pytorch_tanh" and written["rope_scaling"] is None
    )
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == 1
    theirs = json.loads((source / "config.json").read_text())
    assert {k: written[k] for k in theirs.keys() & written.keys()} == {
        k: theirs[k] for k in theirs.keys() & written.keys()
    }
    model = model_config_from_hf(source)
    for drop in (["rope_parameters", "dtype"], ["rope_theta", "rope_scaling", "torch_dtype"], ["hidden_act"]):
        (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in written.items() if k not in drop}))
        assert model_config_from_hf(tmp_path) == model


@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
def test_both_dialects_of_the_rotary_base_are_read(tmp_path, theta):
    written = hf_config(ModelConfig(**TINY, num_attention_heads=4, num_key_value_heads=2, rope_theta=theta), "float32")
    for drop in ("rope_parameters", "rope_theta"):
        (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in written.items() if k != drop}))
        assert model_config_from_hf(tmp_path).rope_theta == theta


def test_import_is_sharded_and_bit_equal_to_one_device(source):
    model = model_config_from_hf(source)
    weights = open_weights(source, model)
    wide, one = widest_mesh(model), make_mesh(MeshConfig(), jax.devices()[:1])
    assert wide.shape["fsdp"] == 8 == jax.device_count()
    two_axes = make_mesh(MeshConfig(fsdp=2, tensor=4))
    expected = to_flat(read_params(weights, model, one))
    for mesh in (wide, two_axes):
        got = to_flat(read_params(weights, model, mesh))
        for p in parameter_table(model):
            assert got[p.path].sharding == to_flat(parameter_shardings(model, mesh))[p.path]
            assert np.array_equal(got[p.path], expected[p.path]), p.path
    shards = to_flat(read_params(weights, model, wide))["layers.mlp.gate_proj"].addressable_shards
    assert {s.data.shape for s in shards} == {(3, 128, 8)}


def test_import_uses_as_many_devices_as_divide():
    odd = ModelConfig(**TINY | {"hidden_size": 60}, num_attention_heads=4, num_key_value_heads=2)
    assert widest_mesh(odd).size == 6


def test_an_imported_checkpoint_restores_on_another_mesh(source, checkpoint):
    model = model_config_from_hf(source)
    restored = to_flat(load_params(checkpoint, abstract_params(model, make_mesh(MeshConfig(fsdp=2, tensor=2, data=2)))))
    expected = to_flat(read_params(open_weights(source, model), model, widest_mesh(model)))
    for path, values in expected.items():
        assert restored[path].dtype == jnp.float32 and np.array_equal(restored[path], values), path


def test_a_checkpoint_of_a_run_exports_its_own_step(tmp_path):
    model = ModelConfig(**TINY, num_attention_heads=4, num_key_value_heads=2)
    params, info = jax.jit(lambda: init_params(model, 0))(), {"config": {"model": to_tree(model)}}
    with Checkpoints(tmp_path / "run", keep_last=5) as checkpoints:
        for step in (3, 20):
            shifted = jax.tree.map(lambda x, by=step: x + by, params)
            count = jnp.int32(step)
            checkpoints.save(TrainState(count, shifted, (count,), count, count), np.zeros(1, np.int64), info)
    for step, expected in ((None, 20), (3, 3)):
        out = tmp_path / f"out{expected}"
        (warning,) = export_hf(tmp_path / "run", out, step=step, dtype="float32")
        assert "no tokenizer" in warning and "\n" not in warning
        values = load_file(out / "model.safetensors")["model.norm.weight"]
        assert torch.equal(values, torch.full((64,), float(expected)))
    with pytest.raises(ConfigError, match="no checkpoint of step 4; there are 3, 20"):
        export_hf(tmp_path / "run", tmp_path / "out4", step=4)


@pytest.mark.parametrize("calls", [0, 1, 9])
def test_a_killed_export_leaves_nothing(checkpoint, tmp_path, monkeypatch, calls):
    real, made = exporting._pieces, []

    def dies(view):
        assert not (tmp_path / "out").exists()
        if len(made) == calls:
            raise KeyboardInterrupt
        made.append(view)
        return real(view)

    monkeypatch.setattr(exporting, "_pieces", dies)
    with pytest.raises(KeyboardInterrupt):
        export_hf(checkpoint, tmp_path / "out", max_shard_bytes=50_000)
    assert list(tmp_path.iterdir()) == []


def test_a_killed_import_leaves_nothing(source, tmp_path, monkeypatch):
    def dies(self, params, info):
        assert not (tmp_path / "checkpoint").exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoints, "save_params", dies)
    with pytest.raises(KeyboardInterrupt):
        import_hf(source, tmp_path / "checkpoint")
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_checkpoint_is_not_exported(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "copy")
    for path in (tmp_path / "copy" / "checkpoints" / "0" / "params").glob("ocdbt.process_0/d/*"):
        path.unlink()
    with pytest.raises(ConfigError, match="parameter embed_tokens cannot be read"):
        export_hf(tmp_path / "copy", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_directories_with_content_are_refused(source, checkpoint, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep me")
    with pytest.raises(ConfigError, match="full: already exists"):
        import_hf(source, tmp_path / "full")
    with pytest.raises(ConfigError, match="full: already exists"):
        export_hf(checkpoint, tmp_path / "full")
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["mine.txt"]
    (tmp_path / "empty").mkdir()
    export_hf(checkpoint, tmp_path / "empty")
    assert (tmp_path / "empty" / "model.safetensors").is_file()


def test_export_refuses_what_it_cannot_write(checkpoint, tmp_path):
    with pytest.raises(ConfigError, match="dtype='int8' cannot be exported"):
        export_hf(checkpoint, tmp_path / "out", dtype="int8")
    with pytest.raises(ConfigError, match="max_shard_bytes=0"):
        export_hf(checkpoint, tmp_path / "out", max_shard_bytes=0)
    with pytest.raises(ConfigError, match="no checkpoint here"):
        export_hf(tmp_path, tmp_path / "out")


CONFIG_FAULTS = {
    "model_type='llama'": {"model_type": "llama"},
    "attention_bias=True": {"attention_bias": True},
    "tie_word_embeddings=False": {"tie_word_embeddings": False},
    "hidden_activation='relu'": {"hidden_activation": "relu"},
    "use_bidirectional_attention=True": {"use_bidirectional_attention": True},
    "rope_scaling": {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "rope_parameters": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0}},
    "rope_theta=5.0, but": {"rope_theta": 5.0, "rope_parameters": {"rope_type": "default", "rope_theta": 6.0}},
    "head_dim is missing": {"head_dim": None},
    "hidden_size='wide'": {"hidden_size": "wide"},
    r"eos_token_id=\[1, 107\]": {"eos_token_id": [1, 107]},
    "num_attention_heads=4 must be a multiple": {"num_key_value_heads": 3},
}


@pytest.mark.parametrize("message", CONFIG_FAULTS)
def test_a_config_of_another_model_is_refused(source, tmp_path, message):
    config = json.loads((source / "config.json").read_text()) | CONFIG_FAULTS[message]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=message) as caught:
        import_hf(tmp_path, tmp_path / "checkpoint")
    assert str(tmp_path / "config.json") in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[]", ""])
def test_a_config_that_is_no_object_is_refused(tmp_path, text):
    with pytest.raises(ConfigError, match="config.json: no such file"):
        import_hf(tmp_path, tmp_path / "checkpoint")
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match="config.json: "):
        import_hf(tmp_path, tmp_path / "checkpoint")


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda t: t.pop(GATE), f"tensor {GATE} is missing from model.safetensors"),
        (
            lambda t: t.update({GATE: torch.zeros(128, 65)}),
            rf"{GATE} has shape \(128, 65\), but config.json says \(128, 64\)",
        ),
        (lambda t: t.update({GATE: torch.zeros(64, 128)}), rf"{GATE} has shape \(64, 128\)"),
        (lambda t: t.update({GATE: torch.zeros(128, 64, dtype=torch.int8)}), f"{GATE} has dtype I8"),
        (lambda t: t.update({"model.extra": torch.zeros(1)}), "unexpected tensor model.extra"),
        (lambda t: t.update({GATE.replace("1", "3"): torch.zeros(1)}), "unexpected tensor model.layers.3"),
        (lambda t: t.update({"lm_head.weight": torch.zeros(301, 64)}), r"lm_head.weight has shape \(301, 64\)"),
    ],
)
def test_weights_that_do_not_fit_are_refused_before_anything_is_written(source, tmp_path, edit, message):
    tensors = load_file(source / "model.safetensors")
    edit(tensors)
    (tmp_path / "hf").mkdir()
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    (tmp_path / "hf" / "config.json").write_bytes((source / "config.json").read_bytes())
    with pytest.raises(ConfigError, match=message) as caught:
        import_hf(tmp_path / "hf", tmp_path / "checkpoint")
    assert "\n" not in str(caught.value) and [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_buffers_and_a_tied_head_are_tolerated(source, tmp_path):
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(16)
    save_file(tensors, tmp_path / "model.safetensors")
    assert len(open_weights(tmp_path, model_config_from_hf(source))) == 2 + 9 * 3


@pytest.fixture
def sharded(tmp_path):
    directory = save(transformers_model(), tmp_path / "hf", max_shard_size="100KB")
    return directory, json.loads((directory / INDEX).read_text())


def refuses(directory: Path, message: str):
    with pytest.raises(ConfigError, match=message) as caught:
        import_hf(directory, directory.parent / "checkpoint")
    assert "\n" not in str(caught.value) and not (directory.parent / "checkpoint").exists()


def test_a_missing_shard_is_named(sharded):
    directory, index = sharded
    file = index["weight_map"][GATE]
    (directory / file).unlink()
    refuses(directory, f"{file}: no such file, but .*places tensor model.layers")


def test_an_index_that_names_the_wrong_file_is_refused(sharded):
    directory, index = sharded
    right = index["weight_map"][GATE]
    others = sorted(set(index["weight_map"].values()) - {right})
    for place, message in (
        (others[0], f"{right}: unexpected tensor {GATE}"),
        ("../elsewhere.safetensors", f"the place of tensor {GATE}, is no file name"),
        ("gone.safetensors", f"gone.safetensors: no such file, but {INDEX} places tensor {GATE}"),
    ):
        index["weight_map"][GATE] = place
        (directory / INDEX).write_text(json.dumps(index))
        refuses(directory, message)
    del index["weight_map"]
    (directory / INDEX).write_text(json.dumps(index))
    refuses(directory, "weight_map is missing")


def test_a_shard_without_its_tensor_is_refused(sharded):
    directory, index = sharded
    file = index["weight_map"][GATE]
    tensors = load_file(directory / file)
    del tensors[GATE]
    save_file(tensors, directory / file)
    refuses(directory, f"{file}: tensor {GATE} is missing")


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_a_truncated_file_is_named(source, tmp_path, keep):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_bytes((source / "config.json").read_bytes())
    (tmp_path / "hf" / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes()[:keep])
    refuses(tmp_path / "hf", "model.safetensors: damaged or cut short")


def test_a_directory_without_safetensors_is_refused(source, tmp_path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_bytes((source / "config.json").read_bytes())
    refuses(tmp_path / "hf", "neither model.safetensors nor")


# VmHWM and not getrusage: the latter starts at what the parent held.
EXPORT_AND_REPORT = """
import re, sys
from pathlib import Path
from easylm_mling.hf import exporting
exporting._PIECE = 1_000_000
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
exporting.stored_model(sys.argv[1])
before = peak()
exporting.export_hf(sys.argv[1], sys.argv[2])
print(peak() - before)
"""


def test_export_holds_about_one_tensor(tmp_path):
    model = ModelConfig(8000, 512, 2048, 16, 4, 4, 128)
    halves = lambda: jax.tree.map(lambda x: jnp.full(x.shape, 0.5), jax.eval_shape(lambda: init_params(model, 0)))  # noqa: E731
    params = jax.jit(halves, out_shardings=parameter_shardings(model, widest_mesh(model)))()
    total = sum(x.nbytes for x in jax.tree.leaves(params))
    with Checkpoints(tmp_path / "checkpoint") as checkpoints:
        checkpoints.save_params(params, {"model": to_tree(model)})
    command = [sys.executable, "-c", EXPORT_AND_REPORT, tmp_path / "checkpoint", tmp_path / "out"]
    grown = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    largest_tensor = 4 * 8000 * 512
    assert total > 2.8e8 and grown < 2 * largest_tensor, (total, grown)
