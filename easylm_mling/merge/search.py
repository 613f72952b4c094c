"""Weights of a merge chosen by held-out text: the models stay on the devices, and only the weights change.

Powell's method (SciPy's) goes along one weight after another, within bounds. It sees the first half of the held-out rows
only; the second half says what was won.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import numpy as np
from rich.console import Console

from easylm_mling.checkpoint.parameters import load_params
from easylm_mling.config import MixerConfig, ModelConfig, RunConfig, from_tree, to_tree
from easylm_mling.data.catalog import build_catalog
from easylm_mling.data.tokenization.files import tokenizer_file
from easylm_mling.data.tokenization.tokenizer import Tokenizer
from easylm_mling.errors import ConfigError, check
from easylm_mling.hf.importing import open_weights, read_params, widest_mesh
from easylm_mling.merge.opening import open_merge
from easylm_mling.merge.recipe import MergeRecipe, parameter_kind
from easylm_mling.merge.sources import Source
from easylm_mling.model.params import parameter_table, to_flat, to_nested
from easylm_mling.monitoring.console import say
from easylm_mling.run.validation import Validation
from easylm_mling.storage.jsonl import JsonlWriter, read_jsonl
from easylm_mling.training.state import abstract_params

DIGITS = 4  # of a weight
_ROWS_AT_A_TIME = 8


@dataclass(frozen=True)
class SearchOptions:
    """What the weights are chosen by, how long, and between which bounds."""

    mixer: MixerConfig  # its sources with their holdout and `weight`
    rows: int = 64  # held-out rows of each source, at most
    evaluations: int = 60
    low: float = 0.0
    high: float = 1.0
    dtype: str = "bfloat16"


@dataclass(frozen=True)
class Tried:
    """Weights, and the bits a byte that they give: on the half that chooses, on the other, and there for each source."""

    weights: tuple[float, ...]
    choosing: float
    reported: float
    sources: dict[str, float]


class _Enough(Exception):
    """All evaluations are made."""


class Search:
    """The models of a recipe on the devices, and the held-out text."""

    def __init__(self, recipe: MergeRecipe, options: SearchOptions):
        """Open and load everything. Raises ConfigError for a recipe or data that cannot be searched with."""
        check(
            recipe.kind in ("linear", "task_arithmetic"),
            f"--search chooses the weights of linear and task_arithmetic, and this is {recipe.kind}",
        )
        check(
            recipe.kind != "linear" or (recipe.normalize and len(recipe.models) > 1),
            "--search of linear needs two models or more, normalized",
        )
        check(
            recipe.vocabulary == "same", "--search needs models with the same vocabulary; make them so, or give weights"
        )
        check(options.low < options.high, f"--bounds {options.low} {options.high}: the first must be the smaller one")
        check(options.evaluations > 0 and options.rows > 1, "--evaluations must be positive, and --rows 2 or more")
        opened = open_merge(recipe)
        self.recipe, self.options = opened.recipe, options
        mesh = widest_mesh(opened.model)
        config = _run_config(opened.model, opened.tokenizer, options, mesh.size)
        tokenizer = Tokenizer(config.data.tokenizer)
        tokenizer.check_model(opened.model)
        catalog = build_catalog(config.data)
        self.wishes = {
            name: 1.0 if source.weight is None else source.weight for name, source in config.data.sources.items()
        }
        check(
            sum(self.wishes.values()) > 0, "--search: every source's weight is 0; the bits a byte of none would count"
        )
        whole = Validation(config, catalog, tokenizer, mesh)
        self.halves = whole.halves()
        for name in catalog.sources:
            count = np.isin(whole.rows["source"], [i for i, g in enumerate(whole.groups) if g[0] == name])
            rows = int(np.count_nonzero(whole.rows["loss_mask"][count].any(axis=-1)))
            check(
                rows > 1,
                f"data.sources.{name}: has {rows} held-out rows, and both halves need one; raise its holdout_fraction, or "
                "lower data.sequence_length",
            )
        loaded = {key: _load(source, opened.model, mesh) for key, source in opened.merging.sources.items()}
        models = [loaded[m.key] for m in recipe.models]
        if recipe.base is None:  # m1 + sum w_i (m_i - m1): weights that sum to 1
            self._start = self._base = models.pop(0)
        else:
            self._start, self._base = loaded[(recipe.start or recipe.base).key], loaded[recipe.base.key]
        self._models = models
        table = parameter_table(opened.model)
        self._kinds = to_nested({p.path: parameter_kind(p) for p in table})
        shardings = to_nested({path: x.sharding for path, x in to_flat(self._start).items()})
        self._merge = jax.jit(partial(_merged, kinds=self._kinds), out_shardings=shardings)

    @property
    def free(self) -> int:
        """How many weights are chosen."""
        return len(self._models)

    def with_weights(self, weights: Sequence[float]) -> MergeRecipe:
        """Return the recipe with these weights."""
        own = list(weights) if self.recipe.base is not None else [1 - math.fsum(weights), *weights]
        models = [dataclasses.replace(m, weight=round(w, DIGITS)) for m, w in zip(self.recipe.models, own, strict=True)]
        return dataclasses.replace(self.recipe, models=tuple(models))

    def evaluate(self, weights: Sequence[float]) -> Tried:
        """Return what these weights give."""
        by_kind = {
            kind: np.array(self.with_weights(weights).coefficients(kind)[-self.free :], np.float32)
            for kind in ("embedding", "attention", "mlp", "norms")
        }
        return self.measure(self._merge(self._start, self._base, self._models, by_kind), tuple(weights))

    def measure(self, params: dict, weights: tuple[float, ...] = ()) -> Tried:
        """Return what parameters give, such as those that were written."""
        choosing, reported = (half(params)["sources_bits_per_byte"] for half in self.halves)
        return Tried(weights, self._mean(choosing), self._mean(reported), reported)

    def _mean(self, sources: dict[str, float | None]) -> float:
        """The mean over sources by their `weight`. A model that is no model any more is infinitely bad."""
        if any(value is None for value in sources.values()):
            return math.inf
        return sum(self.wishes[n] * float(v or 0) for n, v in sources.items()) / sum(self.wishes[n] for n in sources)


def choose_weights(search: Search, path: Path, console: Console) -> tuple[Tried, list[Tried]]:
    """Return the best weights and all that were tried, in order. `path` keeps them: the same command goes on after a kill."""
    from scipy.optimize import minimize

    o, tried = search.options, []
    kept = _kept(path, search)
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = JsonlWriter(path)

    def measure(x: Sequence[float]) -> float:
        weights = tuple(round(float(w), DIGITS) for w in x)
        known = next((t for t in tried if t.weights == weights), None)
        if known:
            return known.choosing
        if len(tried) == o.evaluations:
            raise _Enough
        result = kept.pop(weights, None)
        if result is None:
            result = search.evaluate(weights)
            writer.append(dataclasses.asdict(result))
            writer.flush()
        tried.append(result)
        say(
            console,
            f"{len(tried):3} of {o.evaluations}: weights {weights_text(weights)}: {result.choosing:.4f} bits a byte",
        )
        return result.choosing

    given = [m.weight for m in search.recipe.models][-search.free :]
    if search.recipe.base is None:
        given = [w / math.fsum(m.weight for m in search.recipe.models) for w in given]
    corners = [[float(i == n) for i in range(search.free)] for n in range(search.free)]
    starts = [np.clip(x, o.low, o.high).tolist() for x in (given, [0.0] * search.free, *corners)]
    try:
        values = [measure(x) for x in starts]
        best = starts[int(np.argmin(values))]
        if min(values) < math.inf:
            minimize(
                measure, best, method="Powell", bounds=[(o.low, o.high)] * search.free,
                options={"xtol": 1e-2, "ftol": 1e-5, "maxfev": 10 * o.evaluations},
            )  # fmt: skip
    except _Enough:
        pass
    finally:
        writer.close()
    best = min(tried, key=lambda t: t.choosing)
    check(best.choosing < math.inf, "no weights give a finite loss; see that the models are whole")
    return best, tried


def load_written(folder: str | Path, search: Search) -> dict:
    """Return the parameters of a merged Hugging Face directory, sharded as those that were searched with."""
    model = search.halves[0].config.model
    return read_params(open_weights(folder, model), model, search.halves[0].mesh)


def _merged(start: dict, base: dict, models: list[dict], weights: dict, kinds: dict) -> dict:
    def combine(kind, s, b, *ms):
        return s + sum(weights[kind][i] * (m - b) for i, m in enumerate(ms))

    return jax.tree.map(combine, kinds, start, base, *models)


def _load(source: Source, model: ModelConfig, mesh) -> dict:
    if source.step is not None:
        return load_params(source.ref.model, abstract_params(model, mesh), source.step)
    return read_params(open_weights(source.tokenizer, source.model), model, mesh)


def _run_config(model: ModelConfig, tokenizer: Path, options: SearchOptions, devices: int) -> RunConfig:
    data = to_tree(options.mixer.data) | {"tokenizer": str(tokenizer_file(tokenizer)), "lanes": 0}
    rows = devices * max(1, _ROWS_AT_A_TIME // devices)
    train = {"batch_size": rows, "budget_tokens": 1, "compute_dtype": options.dtype}
    return from_tree(
        RunConfig,
        {
            "run_dir": "-",
            "model": to_tree(model),
            "data": data,
            "train": train,
            "eval": {"rows_per_source": options.rows},
        },
    )


def _kept(path: Path, search: Search) -> dict[tuple[float, ...], Tried]:
    """Return what an earlier call has tried, unless the first of it comes out otherwise now: then it was of other things."""
    rows = list(read_jsonl(path)) if path.is_file() else []
    try:
        kept = {
            tuple(r["weights"]): Tried(tuple(r["weights"]), r["choosing"], r["reported"], r["sources"]) for r in rows
        }
    except (KeyError, TypeError):
        raise ConfigError(f"{path}: holds no evaluations of a search; remove it") from None
    if not kept:
        return {}
    first = next(iter(kept.values()))
    if len(first.weights) == search.free and search.evaluate(first.weights) == first:
        return kept
    raise ConfigError(f"{path}: is of other models or another text; remove its folder, or name another output")


def weights_text(weights: Sequence[float]) -> str:
    """Return weights as they are shown."""
    return " ".join(f"{w:.{DIGITS}f}" for w in weights)
