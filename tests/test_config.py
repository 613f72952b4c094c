import dataclasses

import pytest

from easylm_mling import config as c
from easylm_mling.config.describe import known_keys

MINIMAL = """
run_dir: runs/x
model: {vocab_size: 64, hidden_size: 8, intermediate_size: 16, num_hidden_layers: 1, num_attention_heads: 2, num_key_value_heads: 1, head_dim: 4}
data: {tokenizer: t.model, sequence_length: 16, sources: {a: {paths: x.jsonl, weight: 1}}}
train: {budget_tokens: 100B, batch_size: 4}
"""


@pytest.fixture
def minimal(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(MINIMAL)
    return str(file)


def test_files_merge_left_to_right_then_overrides(minimal, tmp_path):
    second = tmp_path / "d.yaml"
    second.write_text("train: {batch_size: 8}\noptimizer: {warmup: 1M tokens}")
    got = c.load([minimal, str(second)], ["train.seed=7", "data.sources.a.weight=0.5"])
    assert (got.train.batch_size, got.train.seed, got.train.budget_tokens) == (8, 7, 100 * 10**9)
    assert got.data.sources["a"].paths == ("x.jsonl",) and got.data.sources["a"].weight == 0.5
    assert got.optimizer.warmup.to_steps(got.tokens_per_step) == 10**6 // (8 * 16) + 1


def test_a_config_survives_the_trip_through_plain_trees_and_yaml(minimal, tmp_path):
    got = c.load([minimal], ["optimizer.warmup=20 steps", "init_from=some/where"])
    assert c.from_tree(c.RunConfig, c.to_tree(got)) == got
    file = tmp_path / "resolved.yaml"
    file.write_text(c.to_yaml(got))
    assert c.load([str(file)]) == got
    changes = c.differences(got, c.load([minimal]))
    assert [(change.key, change.old, change.new) for change in changes] == [
        ("init_from", "some/where", None),
        ("optimizer.warmup", "20 steps", "0 steps"),
    ]


@pytest.mark.parametrize(
    "override, message",
    [
        ("train.batchsize=8", "unknown key 'train.batchsize'; did you mean 'batch_size'?"),
        ("trian.batch_size=8", "unknown key 'trian'; did you mean 'train'?"),
        ("data.sources.a.weights=1", "unknown key 'data.sources.a.weights'; did you mean 'weight'?"),
        ("data.sources.a.weight=-1", r"data.sources.a.weight=-1.0 must be a finite number"),
        ("data.sources.a.weight=.nan", r"data.sources.a.weight=nan must be a finite number"),
        ("data.sources.a.weight=much", r"data.sources.a.weight='much' must be a number"),
        ("data.sources.a.weight=0", "every weight is 0"),
        ("train.batch_size=2.5", "train.batch_size=2.5 must be a whole number"),
        ("train.batch_size=0", "train.batch_size=0 must be positive"),
        ("train.accumulation_steps=3", "train.batch_size=4 must be a multiple of train.accumulation_steps=3"),
        ("data.lanes=3", "train.batch_size=4 must be a multiple of data.lanes=3"),
        ("data.sequence_length=9000", "longer than model.max_position_embeddings=8192"),
        ("optimizer.warmup=20", "optimizer.warmup=20 must be a length such as"),
        ("optimizer.schedule=linear", "optimizer.schedule='linear' must be"),
        ("model.num_key_value_heads=3", "must be a multiple of model.num_key_value_heads=3"),
        ("train=5", "train: expected `key: value` lines, found 5"),
        ("nonsense", "'nonsense' is not an override"),
        ("run_dir=${oc.env:HOME}", "run_dir='${oc.env:HOME}': ${...} is not filled in here"),
        ("data.sources.a.max_epochs=2", "data.sources.a: max_epochs=2 does not go with when_used_up=repeat"),
        ("data.sources.a.when_used_up=stop", "data.sources.a: max_epochs=0 does not go with when_used_up=stop"),
        ("data.sources.a.when_used_up=end", "data.sources.a.when_used_up='end' must be one of repeat"),
        ("data.sources.a.sample_fraction=0", "data.sources.a.sample_fraction=0.0 must be in (0, 1]"),
        ("data.sources.a.language_by=unimax", "data.sources.a.language_by=unimax needs data.sources.a.max_epochs"),
        ("data.sources.a.language_by=rows", "data.sources.a.language_by='rows' must be one of bytes"),
        ("data.weighting.by=size", "data.weighting.by='size' must be one of number"),
        ("data.weighting.by=bytes", "data.sources.a.weight=1.0 means nothing with data.weighting.by=bytes"),
        ("data.sources.a.weight=null", "data.sources.a.weight is missing"),
        ("data.sources.a.sources={b: {paths: x}}", "unknown key 'data.sources.a.paths'; a group has only"),
        ("data.sources.g={weight: 1, sources: {}}", "data.sources.g.sources: name at least one source"),
        ("data.sources.g={weight: 1, sources: {b: {paths: x}}}", "data.sources.g.sources.b.weight is missing"),
        ("data.sources.g={sources: {b: {paths: x, weight: 1}}}", "data.sources.g.weight is missing"),
        ("data.sources.g={weight: -1, sources: {b: {paths: x, weight: 1}}}", "data.sources.g: weights must be finite"),
        ("data.sources.g={weight: 1, sources: {b: {paths: x, weight: 0}}}", "data.sources.g: weights must be finite"),
        ("data.sources.g={weight: 1, sources: {b: x}}", "data.sources.g.sources.b: expected `key: value` lines"),
        ("data.stages=[{from_tokens: 5, weights: {b: 1}}]", "data.stages[0].weights.b: no such source; there are a"),
        ("data.stages=[{from_tokens: 5, weights: {a: 0}}]", "data.stages[0]: every weight is 0"),
        ("data.stages=[{from_tokens: 5, weights: {a: -1}}]", "data.stages[0].weights.a=-1.0 must be a finite number"),
        (
            "data.stages=[{from_tokens: 5, weights: {}}, {from_tokens: 5, weights: {}}]",
            "data.stages: from_tokens must rise",
        ),
        ("train.remat=fulll", "train.remat='fulll' must be one of"),
    ],
)
def test_each_mistake_is_one_line_that_names_the_key(minimal, override, message):
    with pytest.raises(c.ConfigError) as error:
        c.load([minimal], [override])
    assert message.replace("\\", "") in str(error.value)
    assert "\n" not in str(error.value)


def test_groups_become_sources_that_divide_their_weight(minimal, tmp_path):
    group = "data.sources.g={weight: 3, sources: {ko: {paths: k, weight: 1}, deep: {weight: 2, sources: {x: {paths: x, weight: 7}}}}}"
    got = c.load([minimal], [group])
    assert {n: s.weight for n, s in got.data.sources.items()} == {"a": 1, "g/ko": 1, "g/deep/x": 2}
    file = tmp_path / "resolved.yaml"
    file.write_text(c.to_yaml(got))
    assert c.load([str(file)]) == got
    plain = ["data.weighting.by=tokens", "data.sources.a.weight=null", "data.sources.g={sources: {ko: {paths: k}}}"]
    assert {n: s.weight for n, s in c.load([minimal], plain).data.sources.items()} == {"a": None, "g/ko": None}


def test_stages_are_read_as_people_write_them(minimal):
    got = c.load([minimal], ["data.stages=[{from_tokens: 1.5B, weights: {a: 2}}]"])
    assert got.data.stages == (c.StageConfig(1_500_000_000, {"a": 2.0}),)
    with pytest.raises(c.ConfigError, match="data.stages goes with data.weighting.by=number, not with 'bytes'"):
        c.load(
            [minimal],
            ["data.stages=[{from_tokens: 1, weights: {}}]", "data.weighting.by=bytes", "data.sources.a.weight=null"],
        )


def test_missing_key_missing_file_and_bad_yaml(minimal, tmp_path):
    with pytest.raises(c.ConfigError, match="nowhere.yaml: no such config file"):
        c.load(["nowhere.yaml"])
    short = tmp_path / "short.yaml"
    short.write_text("run_dir: x")
    with pytest.raises(c.ConfigError, match="model is missing"):
        c.load([str(short)])
    bad = tmp_path / "bad.yaml"
    bad.write_text("run_dir: [1,\n b: }")
    with pytest.raises(c.ConfigError, match="bad.yaml: cannot be read as YAML") as error:
        c.load([str(bad)])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text, value", [("100B", 10**11), ("1.5M", 1_500_000), ("1e9", 10**9), ("4_096", 4096), (7, 7)]
)
def test_whole_numbers_as_people_write_them(minimal, text, value):
    assert c.load([minimal], [f"train.budget_tokens={text}"]).train.budget_tokens == value


def test_the_last_step_passes_the_budget_by_less_than_a_batch(minimal):
    for budget in (1, 63, 64, 65, 1000):
        got = c.load([minimal], [f"train.budget_tokens={budget}"])
        assert 0 <= got.total_steps * got.tokens_per_step - budget < got.tokens_per_step


# As a run's life needs it: what may change when it resumes, what with --accept-data-change, what no step depends on.
FREE = {
    "run_dir", "init_from", "data.stages", "data.max_bad_fraction", "data.token_cache", "data.retries", "data.retry_seconds",
    "train.stop_at_step", "train.log_every_steps", "train.max_skipped_in_a_row", "train.spike_sigmas", "train.stuck_minutes",
    "train.digest_every_steps", "train.rewind", "train.skip_batches", "train.remat", "train.remat_first",
    "train.remat_first_layers", "train.remat_memory", "train.attention", "train.attention_block", "train.offload",
    "train.accumulation_steps", "train.loss_chunk", "train.compiler_flags", "lora.init_from",
}  # fmt: skip
# The last two are written by the run itself.
FREE_LISTS = ("data.stages", "train.earlier_batch_sizes", "train.counted_tokens")
FREE_SECTIONS = ("mesh", "checkpoint", "eval", "log", "profile")
OUTSIDE_STEP = {
    "stop_at_step", "log_every_steps", "digest_every_steps", "max_skipped_in_a_row", "stuck_minutes", "rewind", "skip_batches",
    "remat_memory",
}  # fmt: skip


def test_what_a_key_affects_is_said_by_the_key_itself():
    for name, key in known_keys().items():
        section = name.split(".")[0]
        free = name in FREE or section in FREE_SECTIONS or name.startswith(FREE_LISTS)
        assert key.setting.free == free, name
        data = name == "data.tokenizer" or name.startswith(("data.sources", "data.weighting"))
        assert key.setting.data == data, name
        outside = section == "train" and name.removeprefix("train.") in OUTSIDE_STEP
        assert key.setting.outside_step == outside, name


def test_a_neighbour_of_a_free_key_is_not_free():
    @dataclasses.dataclass(frozen=True)
    class Invented(c.TrainConfig):
        attention_dropout: float = 0.0

    settings = {key: leaf.setting for key, leaf in c.leaves(Invented(1)).items()}
    assert settings["attention"].free and not settings["attention_dropout"].free
    assert "attention_dropout" in c.step_settings(Invented(1)) and "stop_at_step" not in c.step_settings(Invented(1))
