"""Verify an export against its checkpoint: bytes with bytes, and logits with those of transformers.

The files are read as their users would read them, by the safetensors library and by transformers. This package does not
require torch and transformers: without them a line says what was not checked.
"""

import importlib.util
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from easylm_mling.checkpoint.layout import step_directory
from easylm_mling.checkpoint.reading import stored_model
from easylm_mling.config import MeshConfig, ModelConfig
from easylm_mling.errors import ConfigError, VerificationError
from easylm_mling.hf.config import hf_config, model_config_from_hf
from easylm_mling.hf.exporting import open_parameters, plan_shards
from easylm_mling.hf.importing import open_weights, read_params
from easylm_mling.hf.tensor_files import DTYPES
from easylm_mling.hf.tokenizer import separator_of
from easylm_mling.model.decoder import ForwardOptions, logits
from easylm_mling.model.params import parameter_count
from easylm_mling.model.sharding import make_mesh
from easylm_mling.training.state import model_graph

# Rounding moves float32 logits by less; a wrong setting moves them far more.
_LOGIT_TOLERANCE = 1e-3
_PROBE_LENGTH = 64


def verify_export(
    checkpoint_dir: str | Path, hf_dir: str | Path, step: int | None = None, ema: bool = False
) -> list[str]:
    """Verify the export of `step` in `hf_dir`; returns a line for each check, also for those that were not possible.

    With `ema` it is one of the averaged parameters.

    Raises VerificationError, which names the first difference.
    """
    model = stored_model(checkpoint_dir, step)
    lines = [_same_config(hf_dir, model), _same_bytes(step_directory(checkpoint_dir, step), Path(hf_dir), model, ema)]
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("transformers") is None:
        return [*lines, "not checked: logits and tokenizer (install torch and transformers to compare them)"]
    return [*lines, one_bos(Path(hf_dir), model), same_logits(Path(hf_dir), model)]


def _same_config(hf_dir: str | Path, model: ModelConfig) -> str:
    # Both as config.json has them: there everything is explicit, while ModelConfig may leave the query scale to its default.
    exported, stored = (hf_config(m, "float32") for m in (model_config_from_hf(hf_dir), model))
    for name, value in stored.items():
        if exported[name] != value:
            raise VerificationError(f"{hf_dir}/config.json: {name}={exported[name]}, but {value} in the checkpoint")
    return "config.json says what the checkpoint says"


def _same_bytes(step_dir: Path, hf_dir: Path, model: ModelConfig, ema: bool) -> str:
    """Compare every tensor of the files with the checkpoint's, rounded again; one of each is in memory."""
    try:
        weights = open_weights(hf_dir, model)
    except ConfigError as error:
        raise VerificationError(str(error)) from None
    (tag,) = {part.get_dtype() for part in weights.values()}
    read = open_parameters(step_dir, model, DTYPES[tag], "average" if ema else "params")
    tensors = [t for group in plan_shards(model, DTYPES[tag].itemsize, float("inf")).values() for t in group]
    for t in tensors:
        exported = weights[t.name][tuple(slice(0, n) for n in t.parameter.hf_shape)].reshape(-1)
        start = 0
        for values in read(t):
            part, start = exported[start : start + values.size], start + values.size
            if part.tobytes() != values.tobytes():
                raise VerificationError(f"{hf_dir}: tensor {t.name} is not the checkpoint's; export again")
    return (
        f"{len(tensors)} tensors ({sum(t.nbytes for t in tensors):,} bytes) are bit for bit the checkpoint's in {tag}"
    )


def one_bos(hf_dir: Path, model: ModelConfig) -> str:
    """Check that a text starts with one BOS. Without it Gemma's 0.67 on LAMBADA is 0.004 (lm-evaluation-harness PR 1465)."""
    if not any((hf_dir / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        return "not checked: tokenizer (there is none here)"
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(hf_dir).encode("a")
    if separator := separator_of(hf_dir):
        name, i = separator
        if i not in ids:
            return f"transformers' tokenizer adds no BOS, as the model's own; begin a document's text with {name}"
        if ids[0] == i and ids.count(i) == 1:
            return f"transformers' tokenizer starts a text with one {name}"
        raise VerificationError(f"{hf_dir}: its tokenizer encodes 'a' as {ids}, with {name} where no text begins")
    if model.bos_token_id < 0:
        return "not checked: tokenizer (the model has no BOS)"
    if ids[0] != model.bos_token_id or ids.count(model.bos_token_id) != 1:
        raise VerificationError(f"{hf_dir}: its tokenizer encodes 'a' as {ids}, which does not start with one BOS")
    return "transformers' tokenizer starts a text with exactly one BOS"


def same_logits(hf_dir: Path, model: ModelConfig) -> str:
    needed, memory = 9 * parameter_count(model), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        return (
            f"not checked: logits (two float32 copies need {needed / 1e9:.0f} GB of memory; {memory / 1e9:.0f} GB here)"
        )
    length = min(_PROBE_LENGTH, model.max_position_embeddings)
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, (2, length))
    tokens[:, 0] = max(0, model.bos_token_id)
    ours, theirs = _our_logits(hf_dir, model, tokens), _their_logits(hf_dir, tokens)
    difference, largest = np.abs(ours - theirs).max(), max(1.0, np.abs(theirs).max())
    if not difference <= _LOGIT_TOLERANCE * largest:
        raise VerificationError(
            f"{hf_dir}: float32 logits differ from transformers' by {difference:.2e} (largest logit {largest:.2e})"
        )
    return f"float32 logits on {tokens.size} random tokens are transformers' to {difference:.1e}"


def _our_logits(hf_dir: Path, model: ModelConfig, tokens: np.ndarray) -> np.ndarray:
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    gemma = nnx.merge(model_graph(model), read_params(open_weights(hf_dir, model), model, mesh))
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    with jax.default_matmul_precision("highest"):
        hidden = gemma(jnp.asarray(tokens), positions, jnp.ones(tokens.shape, jnp.int32), ForwardOptions(jnp.float32))
        return np.asarray(logits(hidden, gemma.head, model.final_logit_softcapping))


def _their_logits(hf_dir: Path, tokens: np.ndarray) -> np.ndarray:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(hf_dir, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(torch.from_numpy(tokens)).logits.numpy()
