"""Recipes of a merge: which models, by which formula, with which weights.

linear           sum w_i m_i, with weights that sum to 1 (average: of steps of one run)
task_arithmetic  start + sum w_i (m_i - base); start is base unless it is named (Ilharco et al. 2023, arXiv 2212.04089).
                 The chat vector is start=continued, base=base, models=[instruct] (Huang et al. 2023, arXiv 2310.04799)
slerp            the way on the sphere from the first model to the second, as far as the second's weight (0 to 1) says
"""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import yaml

from easylm_mling.config import from_tree
from easylm_mling.config.basics import setting
from easylm_mling.config.yaml12 import read_yaml
from easylm_mling.errors import ConfigError, check, one_line
from easylm_mling.model.params import Parameter

KINDS = ("average", "linear", "task_arithmetic", "slerp")
PARAMETER_KINDS = ("embedding", "attention", "mlp", "norms")
VOCABULARIES = ("same", "first_rows", "leave_embedding")


@dataclass(frozen=True)
class ModelRef:
    """A model of a recipe: a run, an imported checkpoint, a Hugging Face directory or a hub name."""

    model: str = setting(
        help="a run's directory, one made by import-hf, a Hugging Face directory, or a hub name", path=True
    )
    step: int | None = setting(None, "of a run; null: the newest", unit="steps")
    revision: str | None = setting(None, "of a hub name: a branch, tag or commit")
    weight: float = setting(1.0, "its weight in the formula")
    by_kind: dict[str, float] = setting(
        help="weights of its parameters of a kind, in the place of `weight`: embedding, attention, mlp, norms",
        factory=dict,
    )

    def __post_init__(self):
        for kind in self.by_kind:
            check(kind in PARAMETER_KINDS, f"{self.text}: by_kind.{kind} must be one of {', '.join(PARAMETER_KINDS)}")
        for value in (self.weight, *self.by_kind.values()):
            check(math.isfinite(value), f"{self.text}: weight {value} must be a finite number")

    def weight_of(self, kind: str) -> float:
        """Return the weight of parameters of a kind."""
        return self.by_kind.get(kind, self.weight)

    @property
    def key(self) -> tuple[str, int | None, str | None]:
        """Which model it is, whatever its weight."""
        return self.model, self.step, self.revision

    @property
    def text(self) -> str:
        """The model as flags name it."""
        at = self.step if self.step is not None else self.revision
        return self.model if at is None else f"{self.model}@{at}"


@dataclass(frozen=True)
class MergeRecipe:
    """How models become one. The first of the order start, base, models gives config, vocabulary and tokenizer."""

    kind: str = setting(help="average, linear, task_arithmetic or slerp")
    models: tuple[ModelRef, ...] = setting((), "the models with their weights; for slerp two")
    base: ModelRef | None = setting(None, "task_arithmetic: what is subtracted from each of the models")
    start: ModelRef | None = setting(None, "task_arithmetic: what the differences are added to; null: base")
    run: str | None = setting(None, "average: the run whose steps are averaged", path=True)
    last: int | None = setting(None, "average: so many of the newest steps")
    first_step: int | None = setting(None, "average: the steps from this one on", unit="steps")
    last_step: int | None = setting(None, "average: the steps up to this one", unit="steps")
    weights: tuple[float, ...] = setting((), "average: a weight for each step, oldest first; none: all the same")
    normalize: bool = setting(True, "linear: divide the weights by their sum")
    vocabulary: str = setting(
        "same",
        "same: all models have the same rows. first_rows: a vocabulary was extended; rows that all have are merged, "
        "and the others are the first model's. leave_embedding: embedding and head are the first model's",
    )
    tokenizer: str | None = setting(
        None, "the model (as `models` names it) whose tokenizer's files are written", path=True
    )

    def __post_init__(self):
        check(self.kind in KINDS, f"kind={self.kind!r} must be one of {', '.join(KINDS)}")
        check(
            self.vocabulary in VOCABULARIES,
            f"vocabulary={self.vocabulary!r} must be one of {', '.join(VOCABULARIES)}",
        )
        self._check_names()
        if self.kind == "task_arithmetic":
            check(self.base is not None, "task_arithmetic needs base: what is subtracted from the models")
        check(bool(self.models) or self.kind == "average", f"{self.kind}: models is missing; name at least one")
        if self.kind == "slerp":
            check(len(self.models) == 2, f"slerp is between two models, and here are {len(self.models)}")
            second = self.models[1]
            for value in (second.weight, *second.by_kind.values()):
                check(0 <= value <= 1, f"{second.text}: the second model's weight {value} must be from 0 to 1 in slerp")
        if self.kind in ("linear", "average") and self.normalize:
            for kind in PARAMETER_KINDS if self.models else ():
                check(
                    abs(math.fsum(m.weight_of(kind) for m in self.models)) > 1e-8,
                    f"{self.kind}: the weights of {kind} sum to 0; change them, or write normalize: false",
                )

    def _check_names(self):
        own = {"average": {"run", "last", "first_step", "last_step", "weights"}, "task_arithmetic": {"base", "start"}}
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        for kind, names in own.items():
            for name in sorted(names if self.kind != kind else ()):
                check(getattr(self, name) == defaults[name], f"{name} belongs to kind: {kind}, and this is {self.kind}")
        if self.kind == "average" and not self.models:
            check(self.run is not None, "average needs run: the run whose steps are averaged")
            spans = (self.last is not None) + (self.first_step is not None or self.last_step is not None)
            check(spans == 1, "average needs either last, or first_step and last_step")
            check(self.last is None or self.last > 0, f"last={self.last} must be positive")

    @property
    def sources(self) -> list[ModelRef]:
        """The different models, first the one that gives config, vocabulary and tokenizer."""
        refs = [r for r in (self.start, self.base, *self.models) if r is not None]
        return list({ref.key: ref for ref in reversed(refs)}.values())[::-1]

    def coefficients(self, kind: str) -> list[float]:
        """Return the weight of each of `models` for parameters of a kind; those of linear are divided by their sum."""
        weights = [m.weight_of(kind) for m in self.models]
        if self.kind not in ("linear", "average") or not self.normalize:
            return weights
        total = math.fsum(weights)
        return [w / total for w in weights]


def resolve_average(recipe: MergeRecipe) -> MergeRecipe:
    """Return an average of a run's steps with its `models` filled in. Raises ConfigError if steps are missing."""
    from easylm_mling.checkpoint.layout import committed_steps, step_directory

    if recipe.kind != "average" or recipe.models:
        return recipe
    run = str(recipe.run)
    step_directory(run)  # says so if there is none
    steps = committed_steps(run)
    shown = ", ".join(map(str, steps))
    if recipe.last is not None:
        check(recipe.last <= len(steps), f"{run}: last={recipe.last}, but there are {len(steps)} steps ({shown})")
        chosen = steps[-recipe.last :]
    else:
        low, high = recipe.first_step or 0, recipe.last_step if recipe.last_step is not None else steps[-1]
        for name, step in (("first_step", recipe.first_step), ("last_step", recipe.last_step)):
            check(step is None or step in steps, f"{run}: no checkpoint of {name}={step}; there are {shown}")
        chosen = [step for step in steps if low <= step <= high]
        check(bool(chosen), f"{run}: no step from {low} to {high}; there are {shown}")
    weights = recipe.weights or (1.0,) * len(chosen)
    check(
        len(weights) == len(chosen),
        f"{len(weights)} weights for {len(chosen)} steps ({', '.join(map(str, chosen))}); give one for each",
    )
    # The newest first: config and tokenizer are its.
    models = tuple(ModelRef(run, step, weight=w) for step, w in zip(chosen, weights, strict=True))[::-1]
    return MergeRecipe("average", models, normalize=recipe.normalize, vocabulary=recipe.vocabulary)


def load_recipe(path: str | Path) -> MergeRecipe:
    """Load a recipe from YAML; raises ConfigError for an unknown key or a value that makes no sense."""
    if not Path(path).is_file():
        raise ConfigError(f"{path}: no such recipe; name a YAML file, or use the flags of `merge`")
    try:
        tree = read_yaml(Path(path).read_bytes())
    except (yaml.YAMLError, UnicodeDecodeError, ConfigError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {one_line(error)}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected `key: value` lines at the top level")
    listed = tree.get("models")
    tree = tree | {name: _ref_tree(tree[name]) for name in ("base", "start") if name in tree}
    if isinstance(listed, list):
        tree["models"] = [_ref_tree(m) for m in listed]
    try:
        return from_tree(MergeRecipe, tree)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def model_ref(text: str, weight: float = 1.0) -> ModelRef:
    """Return the model that `PATH`, `PATH@STEP` or `OWNER/NAME@REVISION` means."""
    return from_tree(ModelRef, _ref_tree(text) | {"weight": weight})


def _ref_tree(value) -> dict:
    if isinstance(value, dict):
        return value
    text, _, at = str(value).rpartition("@")
    if not text or "/" in at or Path(str(value)).exists():
        return {"model": str(value)}
    return {"model": text, "step" if at.isdigit() else "revision": int(at) if at.isdigit() else at}


def parameter_kind(p: Parameter) -> str:
    """Return the kind of a parameter by which weights may differ: one of PARAMETER_KINDS."""
    if p.kind in ("embedding", "norm"):
        return {"embedding": "embedding", "norm": "norms"}[p.kind]
    return "attention" if "self_attn." in p.path else "mlp"
