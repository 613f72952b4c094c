"""Say how a merged model was made: the formula, and every model with its weight and digest."""

from pathlib import Path

from easylm_mling.formatting import markdown_table
from easylm_mling.hf.card import write_card
from easylm_mling.hf.card_sections import Export, front_matter, has_gemma_terms, language_codes, limits, usage
from easylm_mling.hf.tokenizer import separator_of
from easylm_mling.merge.opening import Opened
from easylm_mling.merge.recipe import PARAMETER_KINDS, MergeRecipe, ModelRef
from easylm_mling.storage.object_store import small_files

_FORMULAS = {
    "average": "the weighted mean of the models",
    "linear": "the weighted mean of the models",
    "task_arithmetic": "start + the weighted sum of (model - base)",
    "slerp": "the spherical interpolation between two models",
}
_MERGED = "This is a merged model: nothing was trained after the merge, and no evaluation comes with it."


def write_merge_card(
    folder: Path, opened: Opened, dtype: str, name: str, bos: int | None, languages: tuple[str, ...] = ()
):
    """Write README.md: for steps of one run the card of its newest step, else one of the merge; both say how it was made.

    All sources have been read. Raises ConfigError for a language that is no ISO 639 code.
    """
    first = opened.sources[0]
    of_run = len({s.ref.model for s in opened.sources}) == 1 and "config" in first.info
    if of_run:
        run, step = first.ref.model, first.step or 0
        export = Export(run, small_files(run), step, opened.model, dtype, name, bos)
        write_card(folder, export, languages, section(opened))
        return
    codes = language_codes(languages, {})
    gemma = has_gemma_terms(opened.model)
    hub = list(dict.fromkeys(s.ref.model for s in opened.sources if s.on_hub))
    values = {"tags": ["merge"], **({"base_model": hub, "base_model_relation": "merge"} if hub else {})}
    head = f"# {name.split('/')[-1]}\n\n{title(opened)[0].upper()}{title(opened)[1:]}, made with easylm_mling.\n"
    export = Export("", folder, 0, opened.model, dtype, name, bos)
    how = [section(opened), usage(export, separator_of(folder)), limits(gemma, True, _MERGED)]
    parts = [front_matter(values, gemma, codes), head, *how]
    (folder / "README.md").write_text("\n".join(parts), encoding="utf-8")


def title(opened: Opened) -> str:
    """Return what it is in a few words, such as `a linear merge of a and b`."""
    names = list(dict.fromkeys(Path(s.ref.model).name for s in opened.sources))
    return (
        f"a {opened.recipe.kind} merge of {', '.join(names[:-1])} and {names[-1]}"
        if names[1:]
        else (f"a {opened.recipe.kind} merge of steps of {names[0]}")
    )


def section(opened: Opened) -> str:
    """Return the Markdown section with the formula and every model's weight and digest."""
    rows = [(r["model"], r["role"], r["weight"], f"`{r['digest']}`") for r in record(opened)["models"]]
    notes = [
        f"Every tensor is {_formula(opened.recipe)}, computed in float32 and rounded once.",
        "A digest is the BLAKE2b of a model's float32 values: that of an import is that of the model it was made from.",
        *(f"{note[0].upper()}{note[1:]}." for note in opened.notes),
    ]
    table = markdown_table(("model", "role", "weight", "digest"), rows, "---")
    return "\n".join(["## How it was made", "", *table, "", "\n\n".join(notes), ""])


def record(opened: Opened) -> dict:
    """Return how it was made as plain data: kind, vocabulary, and for each model its role, weight and digest."""
    r, models = opened.recipe, []
    for role, ref, kinds in _roles(r):
        source = opened.merging.sources[ref.key]
        models.append({"model": source.shown, "role": role, "weight": kinds, "digest": source.digest})
    return {"kind": r.kind, "vocabulary": r.vocabulary, "models": models}


def _roles(r: MergeRecipe) -> list[tuple[str, ModelRef, str]]:
    """Return (role, model, its weight in words) in the order of the recipe."""
    rows = [(role, ref, "-") for role, ref in (("start", r.start), ("base", r.base)) if ref is not None]
    for i, ref in enumerate(r.models):
        by_kind = {kind: r.coefficients(kind)[i] for kind in PARAMETER_KINDS}
        if r.kind == "slerp":
            by_kind = {kind: w if i else 1 - w for kind, w in {k: r.coefficients(k)[1] for k in by_kind}.items()}
        same = len(set(by_kind.values())) == 1
        words = f"{by_kind['mlp']:.6g}" if same else ", ".join(f"{kind} {w:.6g}" for kind, w in by_kind.items())
        rows.append(("model", ref, words))
    return rows


def _formula(r: MergeRecipe) -> str:
    if r.kind == "linear" and not r.normalize:
        return "the weighted sum of the models"
    return _FORMULAS[r.kind]
