"""Tiny random models with the sample tokenizer, as the harness's own HF model and as ours: shared by tests of evaluation/."""

import shutil
from pathlib import Path

import hf_models
import jax
import torch
from transformers import AutoTokenizer

from easylm_mling.config import MeshConfig
from easylm_mling.data.tokenization.tokenizer import Tokenizer
from easylm_mling.evaluation.harness import HarnessModel, Limits
from easylm_mling.evaluation.request_cache import RequestCache
from easylm_mling.evaluation.scoring.scorer import Scorer
from easylm_mling.inference.generate import load_model
from easylm_mling.model.sharding import make_mesh

ROOT = Path(__file__).parent.parent
TOKENIZER = ROOT / "data" / "sample" / "tokenizer"
LENGTH = 96
IDS = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}


def save(directory: Path, family: str = "gemma", **settings) -> Path:
    """A random float32 model of 4096 tokens, whose likeliest tokens differ from place to place."""
    sizes = {"vocab_size": 4096} | ({"vocab_size_per_layer_input": 4096} if family == "gemma4_small" else {})
    made = hf_models.transformers_model(
        family=family, kernels=0.2, embedding=0.05, **sizes | IDS | settings, dtype=torch.float32
    )
    made.save_pretrained(directory)
    for file in TOKENIZER.iterdir():
        shutil.copy(file, directory)
    return directory


def theirs(directory: Path, bos: bool = True, length: int = LENGTH, batch: int = 16):
    """The harness's own HF model on a saved one."""
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    # Its cache of logits takes the wrong positions where requests of different lengths end in the same tokens.
    return HFLM(
        logits_cache=False,
        pretrained=model,
        tokenizer=tokenizer,
        max_length=length,
        add_bos_token=bos,
        batch_size=batch,
        device="cpu",
    )


def ours(directory: Path, cache: Path, sizes=(1, 1, 1), length: int = LENGTH, **limits) -> HarnessModel:
    """Our adapter on a saved model, over a mesh of these sizes."""
    count = sizes[0] * sizes[1] * sizes[2]
    mesh = make_mesh(MeshConfig(*sizes), jax.devices()[:count])
    graph, params, model = load_model(directory, mesh)
    scorer = Scorer(graph, params, model, mesh, "float32")
    return HarnessModel(scorer, Tokenizer(str(directory)), RequestCache(cache), Limits(length, **limits))
