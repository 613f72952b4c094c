"""Configs are YAML 1.2: what is written is what is read, and a path's ~ is the home directory."""

import pytest
import yaml

from easylm_mling.cli.main import PATHS, build_parser
from easylm_mling.config import ConfigError, load, to_yaml
from easylm_mling.config.describe import known_keys
from easylm_mling.config.yaml12 import read_yaml, write_yaml

MINIMAL = """
run_dir: ~/runs/x
init_from: ~/base
model: {vocab_size: 64, hidden_size: 8, intermediate_size: 16, num_hidden_layers: 1, num_attention_heads: 2, num_key_value_heads: 1, head_dim: 4}
data: {tokenizer: ~/t.model, token_cache: ~/cache, sequence_length: 16, sources: {no: {paths: [~/x.jsonl, ./~y, "gs://b/~z"], weight: 1}}}
train: {budget_tokens: 1_000, batch_size: 4}
"""


@pytest.fixture
def minimal(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "c.yaml").write_text(MINIMAL)
    return str(tmp_path / "c.yaml")


def test_only_true_and_false_are_booleans():
    texts = [
        "no",
        "No",
        "NO",
        "yes",
        "on",
        "off",
        "y",
        "n",
        "1:40",
        "2026-01-01",
        "0x1F",
        "1e9",
        "1_000",
        "+5",
        "1.50",
        "=",
    ]
    assert read_yaml(f"[{', '.join(texts)}]") == texts
    assert read_yaml("[true, False, null, ~, 7, -7, 0, 2.5]") == [True, False, None, None, 7, -7, 0, 2.5]
    assert read_yaml("{no: 1, 1: 2, 1.0: 3, true: 4, ~: 5}") == {"no": 1, "1": 2, "1.0": 3, "true": 4, "~": 5}


@pytest.mark.parametrize("text", ["017", "0o17", "-017", "0_17", "08", "00"])
def test_what_may_be_octal_is_refused_with_the_way_out(minimal, tmp_path, text):
    more = tmp_path / "more.yaml"
    more.write_text(f"train:\n  seed: {text}\n")
    with pytest.raises(ConfigError, match=rf"more.yaml, line 2: {text} may be meant as octal; write .* in quotes"):
        load([minimal, str(more)])
    with pytest.raises(ConfigError, match=f"train.seed={text}: {text} may be meant as octal"):
        load([minimal], [f"train.seed={text}"])
    assert read_yaml(f"'{text}'") == text and read_yaml(f"{text}: 1") == {text: 1}


def test_what_is_written_is_read_again_also_by_readers_of_yaml_1_1():
    texts = [
        "no",
        "017",
        "08",
        "0o17",
        "1e9",
        "1_000",
        "1:40",
        "2026-01-01",
        "~",
        "null",
        "",
        "2.5",
        "7",
        ".nan",
        "a: b",
        "x #y",
    ]
    tree = {"texts": texts, "values": [7, 2.5, 1e-5, True, None], **{text: text for text in texts}}
    assert read_yaml(write_yaml(tree)) == tree == yaml.safe_load(write_yaml(tree))


BAD = ["{a: 1, a: 2}", "a: &a [*a]", "? [1]\n: 2", "!!python/object/apply:os.system [x]", "\n".join(
    ["a0: &a0 [1, 1]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 30))]
)]  # fmt: skip


@pytest.mark.parametrize("text", BAD)
def test_bad_yaml_is_refused(text):
    with pytest.raises(yaml.YAMLError):
        read_yaml(text)


def test_anchors_and_merges_work():
    assert read_yaml("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: *a")["b"] == {"x": 1, "y": 3}


def test_a_source_may_be_called_no(minimal):
    got = load([minimal], ["data.sources.no.weight=3"])
    assert {n: s.weight for n, s in got.data.sources.items()} == {"no": 3.0}


def test_a_tilde_is_the_home_directory_in_every_path(minimal, tmp_path):
    got = load([minimal], ["data.sources.b={paths: ~/b, weight: 1}"])
    home = str(tmp_path)
    assert (got.run_dir, got.init_from, got.data.tokenizer) == (f"{home}/runs/x", f"{home}/base", f"{home}/t.model")
    assert got.data.token_cache == f"{home}/cache" and got.train.budget_tokens == 1000
    assert got.data.sources["no"].paths == (f"{home}/x.jsonl", "./~y", "gs://b/~z")
    assert got.data.sources["b"].paths == (f"{home}/b",)
    (tmp_path / "again.yaml").write_text(to_yaml(got))
    assert load([str(tmp_path / "again.yaml")]) == got
    with pytest.raises(ConfigError, match="~nobody-here/x: there is no home directory"):
        load([minimal], ["run_dir=~nobody-here/x"])


def test_every_path_is_known_as_one():
    paths = {name for name, key in known_keys().items() if key.setting.path}
    assert paths == {
        "run_dir", "init_from", "data.tokenizer", "data.token_cache", "data.sources.NAME.paths",
        "data.sources.NAME.dataset.name", "data.sources.NAME.conversations.template", "eval.suite_data",
        "lora.init_from",
    }  # fmt: skip
    arguments = set()
    for words in (["import-hf", "a", "b"], ["export-hf", "a", "b"], ["train", "a"], ["plan"], ["report", "a"],
                  ["sample", "a", "--prompt", "x"], ["data", "inspect", "a"], ["data", "audit", "a", "--step", "1"],
                  ["merge", "a", "b"], ["eval", "a", "--suite", "quick"]):  # fmt: skip
        arguments |= vars(build_parser().parse_args(words)).keys()
    assert arguments >= PATHS
