"""`merge --search`: the weights that are best on one half of held-out text, reported on the other, the same after a kill."""

import json

import numpy as np
import pytest
from processes import TINY, train_here
from rich.console import Console

from easylm_mling.cli.main import main
from easylm_mling.config import load_mixer
from easylm_mling.errors import ConfigError
from easylm_mling.merge.recipe import MergeRecipe, load_recipe, model_ref
from easylm_mling.merge.search import Search, SearchOptions, choose_weights

QUIET = Console(quiet=True)


pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose loss still falls, with its steps 2, 4 and 10."""
    run_dir = tmp_path_factory.mktemp("run") / "run"
    train_here(
        run_dir,
        "mesh.data=1",
        "mesh.fsdp=1",
        "mesh.tensor=1",
        "checkpoint.every_steps=2",
        "checkpoint.keep_last=9",
        "optimizer.learning_rate=0.02",
    )
    return run_dir


def mixer(*more):
    return load_mixer(["configs/demo.yaml"], [*TINY, "data.sequence_length=32", *more])


def forward(run):
    """From step 2 on in the direction of step 4: the further, the better, to a point."""
    return MergeRecipe("task_arithmetic", (model_ref(f"{run}@4"),), base=model_ref(f"{run}@2"))


def test_the_weight_is_the_best_of_a_grid_and_the_other_half_chose_nothing(run, tmp_path):
    search = Search(forward(run), SearchOptions(mixer(), rows=8, low=0.0, high=8.0, evaluations=40))
    best, tried = choose_weights(search, tmp_path / "e.jsonl", QUIET)
    grid = [search.evaluate((w,)) for w in np.arange(0, 8.01, 0.5)]
    lowest = min(grid, key=lambda t: t.choosing)
    assert 0 < lowest.weights[0] and best.choosing <= lowest.choosing + 1e-4
    assert abs(best.weights[0] - lowest.weights[0]) <= 0.5
    assert best == min(tried, key=lambda t: t.choosing) and len({t.weights for t in tried}) == len(tried) <= 40
    # Both halves have other targets: a row of two languages lies in the rows of both, with the targets of one.
    parts = [h.rows for h in search.halves]
    rows = [{(t * m).tobytes() for t, m in zip(p["targets"], p["loss_mask"], strict=True) if m.any()} for p in parts]
    assert rows[0] and rows[1] and not rows[0] & rows[1]


@pytest.mark.slow
def test_weights_of_one_model_are_that_model(run):
    """What a search measures at weight 1 of one model is what that model measures, and linear weights sum to 1."""
    linear = MergeRecipe("linear", tuple(model_ref(f"{run}@{n}") for n in (2, 4, 10)))
    search = Search(linear, SearchOptions(mixer(), rows=4))
    assert search.free == 2
    alone = Search(
        MergeRecipe("task_arithmetic", (model_ref(f"{run}@10"),), base=model_ref(f"{run}@2")),
        SearchOptions(mixer(), rows=4),
    )
    assert search.evaluate((0.0, 1.0)).choosing == pytest.approx(alone.evaluate((1.0,)).choosing, abs=1e-4)
    assert search.evaluate((0.0, 0.0)).choosing == pytest.approx(alone.evaluate((0.0,)).choosing, abs=1e-6)
    assert [m.weight for m in search.with_weights((0.25, 0.5)).models] == [0.25, 0.25, 0.5]


def test_a_killed_search_goes_on_and_another_is_refused(run, tmp_path, monkeypatch):
    options = SearchOptions(mixer(), rows=4, high=3.0, evaluations=9)
    path = tmp_path / "e.jsonl"
    whole = choose_weights(Search(forward(run), options), path, QUIET)
    lines = path.read_bytes().splitlines(keepends=True)
    assert len(lines) == 9
    path.write_bytes(b"".join(lines[:5]) + lines[5][:20])
    search, made = Search(forward(run), options), []
    evaluate = search.evaluate
    monkeypatch.setattr(search, "evaluate", lambda w: made.append(w) or evaluate(w))
    assert choose_weights(search, path, QUIET) == whole
    assert len(made) == 1 + 4  # the first again, to see that it is the same search
    other = MergeRecipe("task_arithmetic", (model_ref(f"{run}@10"),), base=model_ref(f"{run}@2"))
    with pytest.raises(ConfigError, match="is of other models or another text"):
        choose_weights(Search(other, options), path, QUIET)


@pytest.mark.slow
def test_the_command_writes_the_best_model_and_says_by_what_it_was_chosen(run, tmp_path, capsys):
    out = tmp_path / "merged"
    command = ["merge", str(out), "--linear", f"{run}@2", f"{run}@10", "--dtype", "float32"]
    search = ["--search", "configs/demo.yaml", *TINY, "--rows", "4", "--evaluations", "8"]
    assert main([*command, *search]) == 0
    printed = capsys.readouterr().out
    recipe = load_recipe(tmp_path / "merged.search" / "recipe.yaml")
    rows = [json.loads(line) for line in (tmp_path / "merged.search" / "evaluations.jsonl").read_text().splitlines()]
    best = min(rows, key=lambda r: r["choosing"])
    assert [m.weight for m in recipe.models] == [round(1 - best["weights"][0], 4), best["weights"][0]]
    card = (out / "README.md").read_text()
    assert f"{best['choosing']:.4f} bits a byte on the half that chose, {best['reported']:.4f} on the other" in card
    assert f"({best['reported']:.4f} as written) on the other" in printed
    page = (tmp_path / "merged.search" / "search.md").read_text()
    assert page.count("| best |") == 1 and (tmp_path / "merged.search" / "search.png").stat().st_size > 10_000
    assert main([*command, *search]) == 2  # nothing is overwritten


@pytest.mark.parametrize(
    "change, match",
    [
        ({"kind": "slerp"}, "--search chooses the weights of linear and task_arithmetic"),
        ({"vocabulary": "first_rows"}, "needs models with the same vocabulary"),
        ({"models": 1}, "needs two models or more"),
    ],
)
def test_what_cannot_be_searched_is_told(run, change, match):
    count = change.pop("models", 2)
    recipe = MergeRecipe(
        **{"kind": "linear", "models": tuple(model_ref(f"{run}@{n}", 0.5) for n in (2, 4)[:count])} | change
    )
    with pytest.raises(ConfigError, match=match):
        Search(recipe, SearchOptions(mixer()))


def test_zero_evaluations_are_not_the_default_in_silence(run, tmp_path, capsys):
    command = ["merge", str(tmp_path / "out"), "--linear", f"{run}@2", f"{run}@4"]
    for flag in ("--evaluations", "--rows"):
        assert main([*command, flag, "0"]) == 2 and f"{flag} goes with --search" in capsys.readouterr().err
        assert main([*command, "--search", "configs/demo.yaml", flag, "0"]) == 2
        assert "--evaluations must be positive, and --rows 2 or more" in capsys.readouterr().err


def test_sources_without_enough_held_out_text_are_told(run):
    none = [f"data.sources.{s}.holdout_fraction=0" for s in ("cc100-ja",)]
    with pytest.raises(ConfigError, match="cc100-ja: has 0 held-out rows, and both halves need one"):
        Search(forward(run), SearchOptions(mixer(*none)))
