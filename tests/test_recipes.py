"""The recipes in configs/tune: in their own shape on the sample conversations, each row is read, and answers are trained on."""

from pathlib import Path

import pytest

from easylm_mling.config import RunConfig, from_tree
from easylm_mling.config.loading import _merged
from easylm_mling.data.catalog import build_catalog
from easylm_mling.data.loader import Loader
from easylm_mling.data.tokenization.tokenizer import Tokenizer
from easylm_mling.run.epochs import count_steps

SMALL = {
    "vocab_size": 4096, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1,
    "num_key_value_heads": 1, "head_dim": 64,
}  # fmt: skip


@pytest.mark.parametrize("name", ["aog", "komt", "ko-gemma"])
def test_a_recipe_reads_its_conversations_whole_and_trains_on_answers(name):
    tree = _merged([f"configs/tune/{name}.yaml"], ["train.batch_size=1", "train.accumulation_steps=1"])
    for source in tree["data"]["sources"].values():
        source["holdout_fraction"] = 0.0
    config = from_tree(RunConfig, tree | {"model": SMALL})
    assert config.lora and config.lora.alpha == 32
    tokenizer, catalog = Tokenizer(config.data.tokenizer), build_catalog(config.data)
    steps = count_steps(config.mixer, catalog, tokenizer)
    with Loader(config.mixer, catalog, tokenizer) as loader:
        batches = [next(loader) for _ in range(steps)]
    files = {path for source in config.data.sources.values() for path in source.paths}
    rows = sum(len(Path(file).read_bytes().splitlines()) for file in files)
    documents = sum(int((b["positions"] == 0).sum() - (b["segment_ids"] == 0).sum()) for b, _ in batches)
    assert documents == rows * config.train.budget_epochs
    targets = sum(int(b["loss_mask"].sum()) for b, _ in batches)
    tokens = sum(int((b["segment_ids"] > 0).sum()) for b, _ in batches)
    assert 0.05 < targets / tokens < 0.8
