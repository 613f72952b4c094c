"""Merging: `merge`."""

import sys

from easylm_mling.errors import ConfigError, check


def add_verbs(verbs):
    """Add `merge` to the parser's `verbs`."""
    p = verbs.add_parser(
        "merge",
        help="average checkpoints, add a chat vector, or mix models, into a Hugging Face directory or a checkpoint",
    )
    p.add_argument("recipe", nargs="?", help="a YAML file (docs/merge.md); or say it with the flags below")
    p.add_argument("output", help="the new directory")
    kinds = p.add_argument_group("instead of a recipe, models as PATH, RUN@STEP or OWNER/NAME@REVISION")
    kinds.add_argument("--average", metavar="RUN", help="the mean of steps of a run: --last K, or --from and --to")
    kinds.add_argument("--last", type=int, metavar="K", help="the K newest steps")
    kinds.add_argument("--from", type=int, metavar="STEP", dest="first_step")
    kinds.add_argument("--to", type=int, metavar="STEP", dest="last_step")
    kinds.add_argument("--linear", nargs="+", metavar="MODEL", help="the weighted mean of models")
    kinds.add_argument(
        "--chat-vector",
        nargs=3,
        metavar=("CONTINUED", "BASE", "INSTRUCT"),
        help="CONTINUED + weight * (INSTRUCT - BASE); the weight is 1 by default",
    )
    kinds.add_argument("--slerp", nargs=2, metavar="MODEL", help="between two models; the weight is the second's")
    kinds.add_argument("--weights", type=float, nargs="+", default=[], metavar="W", help="one for each model or step")
    kinds.add_argument("--vocabulary", choices=("same", "first_rows", "leave_embedding"))
    kinds.add_argument("--tokenizer", metavar="MODEL", help="the merged model whose tokenizer's files are taken")
    search = p.add_argument_group("choose the weights of --linear, --chat-vector or a recipe by held-out text")
    search.add_argument(
        "--search",
        nargs="+",
        metavar="CONFIG.yaml|key=value",
        help="a config with a `data` section, whose sources hold text out; the bits a byte of each count by its `weight`",
    )
    search.add_argument("--evaluations", type=int, metavar="N", help="most weights that are tried (default: 60)")
    search.add_argument("--rows", type=int, metavar="N", help="most held-out rows of each source (default: 64)")
    search.add_argument("--bounds", type=float, nargs=2, metavar=("LOW", "HIGH"), help="of a weight (default: 0 1)")
    p.add_argument("--checkpoint", action="store_true", help="write a checkpoint for init_from (float32)")
    p.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    p.add_argument("--max-shard-gb", type=float, default=5.0, help="largest size of one file in GB (default: 5)")
    p.add_argument("--verify", action="store_true", help="merge again and compare every bit; logits with transformers")
    p.add_argument("--language", action="append", default=[], help="for the model card: an ISO 639 code, such as ja")
    p.set_defaults(run=_merge)


def _merge(a) -> int:
    from easylm_mling.merge.recipe import load_recipe

    flags = [name for name in ("average", "linear", "chat_vector", "slerp") if getattr(a, name)]
    check(len(flags) + (a.recipe is not None) == 1, "say what to merge: a recipe, or one of --average, --linear, ...")
    names = {"last": "last", "first_step": "from", "last_step": "to", "weights": "weights", "vocabulary": "vocabulary"}
    given = [flag for n, flag in {**names, "tokenizer": "tokenizer"}.items() if getattr(a, n) not in (None, [])]
    if a.recipe is not None and given:
        raise ConfigError(f"--{given[0]} goes with the flags; write it into {a.recipe}")
    recipe = load_recipe(a.recipe) if a.recipe is not None else _recipe(a, flags[0])
    stray = next(
        (flag for flag in ("evaluations", "rows", "bounds") if getattr(a, flag) is not None and not a.search), None
    )
    check(stray is None, f"--{stray} goes with --search")
    if a.search:
        return _search(a, recipe)
    if a.checkpoint:
        from easylm_mling.merge.writing import merge_to_checkpoint

        check(not a.language, "--language is for the model card, which a checkpoint has none of; leave it out")
        check(not a.verify, "--verify compares a Hugging Face directory; leave out --checkpoint or --verify")
        opened, warnings = merge_to_checkpoint(recipe, a.output), []
    else:
        from easylm_mling.merge.writing import merge_to_hf

        opened, warnings = merge_to_hf(recipe, a.output, a.dtype, a.max_shard_gb * 1e9, None, tuple(a.language))
    _tell(a, opened, warnings)
    if a.verify:
        from easylm_mling.merge.verify import verify_merge

        for line in verify_merge(opened.recipe, a.output):
            print(f"verified: {line}" if not line.startswith("not checked") else line)
    return 0


def _search(a, recipe) -> int:
    """Choose the weights, merge with them, and measure what was written."""
    check(
        not a.checkpoint,
        "--search writes a Hugging Face directory; then merge OUTPUT.search/recipe.yaml with --checkpoint",
    )
    check(not a.verify, "--search measures what it has written; then merge OUTPUT.search/recipe.yaml with --verify")
    from pathlib import Path

    from easylm_mling.config import load_mixer
    from easylm_mling.merge.search import Search, SearchOptions, choose_weights, load_written
    from easylm_mling.merge.search_page import summary, write_search
    from easylm_mling.merge.writing import merge_to_hf
    from easylm_mling.monitoring.console import make_console, say
    from easylm_mling.storage.atomic import check_new

    check_new(a.output)
    files = [x for x in a.search if "=" not in x or Path(x).is_file()]
    mixer = load_mixer(files, [x for x in a.search if x not in files])
    low, high = a.bounds or (0.0, 1.0)
    given = {name: v for name in ("rows", "evaluations") if (v := getattr(a, name)) is not None}
    search = Search(recipe, SearchOptions(mixer, low=low, high=high, **given))
    console, folder = make_console(), Path(f"{a.output}.search")
    best, tried = choose_weights(search, folder / "evaluations.jsonl", console)
    chosen, note = search.with_weights(best.weights), summary(search, best, None)
    opened, warnings = merge_to_hf(chosen, a.output, a.dtype, a.max_shard_gb * 1e9, None, tuple(a.language), (note,))
    written = search.measure(load_written(a.output, search))
    write_search(folder, search, best, tried, written)
    _tell(a, opened, warnings)
    say(console, summary(search, best, written))
    say(console, f"the path is in {folder}: search.md, search.png, and recipe.yaml with the chosen weights")
    return 0


def _tell(a, opened, warnings):
    from easylm_mling.merge.card import record

    for note in opened.notes:
        print(f"note: {note}")
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    for model in record(opened)["models"]:
        print(f"{model['role']:6} {model['model']}  weight {model['weight']}  digest {model['digest']}")
    if a.checkpoint:
        print(f"merged into {a.output}; start from it with `easylm-mling train CONFIG init_from={a.output}`")
    else:
        print(f"merged in {a.dtype} into {a.output}")


def _recipe(a, flag: str):
    """Make the recipe that the flags say."""
    from easylm_mling.config import from_tree
    from easylm_mling.merge.recipe import MergeRecipe, model_ref

    rest = {n: v for n in ("vocabulary", "tokenizer") if (v := getattr(a, n))}
    if flag == "average":
        spans = {n: v for n in ("last", "first_step", "last_step") if (v := getattr(a, n)) is not None}
        return from_tree(MergeRecipe, {"kind": "average", "run": a.average, "weights": a.weights, **spans, **rest})
    check(a.last is None and a.first_step is None and a.last_step is None, "--last, --from and --to go with --average")
    if flag == "chat_vector":
        continued, base, _ = map(model_ref, a.chat_vector)
        check(len(a.weights) <= 1, f"--chat-vector has one weight, and here are {len(a.weights)}")
        models = (model_ref(a.chat_vector[2], *a.weights),)
        return MergeRecipe("task_arithmetic", models, base=base, start=continued, **rest)
    names = getattr(a, flag)
    if flag == "slerp":
        check(len(a.weights) <= 1, f"--slerp has one weight, and here are {len(a.weights)}")
        return MergeRecipe("slerp", (model_ref(names[0]), model_ref(names[1], *(a.weights or [0.5]))), **rest)
    weights = a.weights or [1.0] * len(names)
    check(
        len(weights) == len(names), f"--weights has {len(weights)} numbers for {len(names)} models; give one for each"
    )
    return MergeRecipe("linear", tuple(map(model_ref, names, weights)), **rest)
