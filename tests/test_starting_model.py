"""The model of a run with init_from: the checkpoint's, or what the config insists on by name."""

import json

import pytest
from hf_models import save, transformers_model

from easylm_mling.checkpoint.reading import stored_model
from easylm_mling.config import RunConfig
from easylm_mling.errors import ConfigError
from easylm_mling.hf.importing import import_hf
from easylm_mling.run.starting_model import check_start, load_config

DATA = {"tokenizer": "t.model", "sequence_length": 16, "sources": {"a": {"paths": "x.jsonl", "weight": 1}}}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    import_hf(save(transformers_model(family="gemma3_text"), folder / "hf"), folder / "checkpoint")
    return folder / "checkpoint"


@pytest.fixture
def loaded(start, tmp_path):
    def load_with(model, *override):
        tree = {"run_dir": str(tmp_path / "run"), "init_from": str(start), "data": DATA}
        tree |= {"train": {"budget_tokens": 64, "batch_size": 2}} | ({"model": model} if model is not None else {})
        (tmp_path / "config.yaml").write_text(json.dumps(tree))
        return load_config([str(tmp_path / "config.yaml")], (), override)

    return load_with


def test_what_the_config_leaves_out_is_the_checkpoints(loaded, start, caplog):
    stored = stored_model(start)
    assert loaded(None).model == loaded({"model_type": "gemma3_text"}).model == stored
    assert f"model.rope_theta={stored.rope_theta}" in caplog.text
    # Null stands for the width of a head: the same model, if the checkpoint says that width.
    assert loaded({"pad_token_id": 0, "rope_theta": stored.rope_theta}).model == stored


DIFFERENT = {
    "rope_theta": 5,
    "rope_scaling": None,
    "rope_local_base_freq": 7,
    "query_pre_attn_scalar": 99,
    "rms_norm_eps": 1e-3,
    "model_type": "llama",
    "sliding_window": 5,
    "hidden_size": 128,
    "eos_token_id": 3,
}


@pytest.mark.parametrize("key", DIFFERENT)
def test_a_difference_is_refused_by_name(loaded, key):
    with pytest.raises(ConfigError, match=f"another model than the config: model.{key}=") as caught:
        loaded({key: DIFFERENT[key]})
    assert f"--override-model {key}" in str(caught.value) and "\n" not in str(caught.value)


def test_a_difference_that_is_insisted_on_is_trained(loaded):
    assert loaded({"rope_theta": 5}, "model.rope_theta").model.rope_theta == 5
    assert loaded({"rope_theta": 5, "rms_norm_eps": 1e-3}, "rope_theta,rms_norm_eps").model.rms_norm_eps == 1e-3
    with pytest.raises(ConfigError, match="model.rms_norm_eps=0.001"):
        loaded({"rope_theta": 5, "rms_norm_eps": 1e-3}, "rope_theta")
    with pytest.raises(ConfigError, match="--override-model theta: no such key"):
        loaded({}, "theta")


def test_a_whole_config_and_its_tokenizer_are_compared_before_training(loaded):
    config: RunConfig = loaded({"rope_theta": 5}, "rope_theta")
    with pytest.raises(ConfigError, match="model.rope_theta=5.0"):
        check_start(config, "other")
    with pytest.raises(ConfigError, match="another tokenizer.*--override-model tokenizer"):
        check_start(config, "other", {"rope_theta"})
    check_start(config, "other", {"rope_theta", "tokenizer"})
