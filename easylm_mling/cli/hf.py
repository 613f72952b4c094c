"""Hugging Face in and out: `import-hf`, `export-hf`."""

import sys


def add_verbs(verbs):
    """Add `import-hf` and `export-hf` to the parser's `verbs`."""
    importer = verbs.add_parser(
        "import-hf", help="Hugging Face weights -> a checkpoint that train starts from (init_from=...)"
    )
    importer.add_argument("hf_dir", help="a downloaded model's directory, or a hub name such as google/gemma-7b")
    importer.add_argument("checkpoint_dir")
    importer.add_argument("--revision", help="of a hub name: a branch, tag or commit (default: the newest)")
    importer.add_argument(
        "--tokenizer", help="a tokenizer that continues the model's own: adds rows for its new pieces"
    )
    importer.add_argument(
        "--base",
        metavar="CHECKPOINT",
        help="hf_dir is a PEFT adapter, and this is what import-hf made of its base model",
    )
    importer.set_defaults(run=_import)

    exporter = verbs.add_parser("export-hf", help="a run or an imported checkpoint -> a Hugging Face directory")
    exporter.add_argument("checkpoint_dir", help="a run's directory, or one made by import-hf")
    exporter.add_argument("hf_dir")
    which = exporter.add_mutually_exclusive_group()
    which.add_argument("--step", type=int, help="default: the newest")
    exporter.add_argument(
        "--average", type=int, metavar="K", help="the mean of a run's K newest checkpoints (docs/merge.md)"
    )
    exporter.add_argument(
        "--ema", action="store_true", help="of a run with train.ema: the running average of its parameters"
    )
    which.add_argument("--best", metavar="SUITE", help="the step that `eval RUN --suite SUITE --all` chose as the best")
    exporter.add_argument(
        "--adapter", action="store_true", help="of a run with lora: the adapter alone, for peft and vLLM, in float32"
    )
    exporter.add_argument(
        "--base",
        metavar="NAME",
        help="the model that the adapter is loaded beside (default: what init_from was made of)",
    )
    exporter.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    exporter.add_argument("--max-shard-gb", type=float, default=5.0, help="largest size of one file in GB (default: 5)")
    exporter.add_argument(
        "--verify",
        action="store_true",
        help="read the files back: bits, config, tokenizer and logits (with transformers)",
    )
    exporter.add_argument(
        "--language", action="append", default=[], help="for the model card: an ISO 639 code, such as ja"
    )
    exporter.add_argument(
        "--push-to-hub", metavar="OWNER/NAME", help="upload the directory (a new model is made private)"
    )
    exporter.set_defaults(run=_export)


def _import(a) -> int:
    from pathlib import Path

    from easylm_mling.errors import check

    is_adapter = (Path(a.hf_dir) / "adapter_config.json").is_file()
    if a.base or is_adapter:
        check(is_adapter, f"--base is for a PEFT adapter, and {a.hf_dir} has no adapter_config.json; leave it out")
        check(bool(a.base), f"{a.hf_dir} is a PEFT adapter; import its base model first, and name that with --base")
        check(not (a.tokenizer or a.revision), "--tokenizer and --revision go with a model; leave them out")
        return _import_adapter(a)
    from easylm_mling.data.tokenization.files import TOKENIZER_FOLDER, tokenizer_file
    from easylm_mling.data.tokenization.tokenizer import fingerprints
    from easylm_mling.hf.importing import import_hf
    from easylm_mling.hf.tokenizer import separator_of
    from easylm_mling.storage.object_store import small_files

    model = import_hf(a.hf_dir, a.checkpoint_dir, a.tokenizer, a.revision)
    if a.tokenizer:
        print(f"the vocabulary now has {model.vocab_size} rows; train with model.vocab_size={model.vocab_size}")
    files = small_files(a.checkpoint_dir) / TOKENIZER_FOLDER
    if fingerprints(files):
        print(
            f"its tokenizer is {tokenizer_file(files).name}, as in transformers; train with data.tokenizer={a.checkpoint_dir}/{TOKENIZER_FOLDER}"
        )
        if separator := separator_of(files):
            print(f"it has no BOS: in training {separator[0]} (id {separator[1]}) stands before each document")
    print(
        f"imported {a.hf_dir} to {a.checkpoint_dir}; start from it with `easylm-mling train CONFIG init_from={a.checkpoint_dir}`"
    )
    return 0


def _import_adapter(a) -> int:
    from easylm_mling.hf.peft_importing import import_adapter

    lora = import_adapter(a.hf_dir, a.checkpoint_dir, a.base)
    print(
        f"imported the adapter {a.hf_dir} of rank {lora.rank}, alpha {lora.alpha:g}, to {a.checkpoint_dir}, beside {a.base}"
    )
    print(f"begin with it: init_from={a.base} lora.init_from={a.checkpoint_dir} and the same lora.rank and lora.alpha")
    return 0


def _export(a) -> int:
    from easylm_mling.checkpoint.best import best_step
    from easylm_mling.checkpoint.layout import step_directory
    from easylm_mling.errors import check, one_line
    from easylm_mling.hf.exporting import export_hf, note_export
    from easylm_mling.storage.freed_memory import keep_freed_memory

    keep_freed_memory()
    check(a.adapter or a.base is None, "--base goes with --adapter; leave it out")
    wanted = best_step(a.checkpoint_dir, a.best) if a.best else a.step
    step = int(step_directory(a.checkpoint_dir, wanted).name)
    shard_bytes, languages = a.max_shard_gb * 1e9, tuple(a.language)
    merged, averaged = None, []
    dtype = a.dtype
    check(not (a.ema and a.average is not None), "--ema and --average are two ways to average; leave one of them out")
    if a.adapter:
        warnings, dtype = _export_adapter(a, step), "float32"
        what = f"the adapter of step {step}"
    elif a.average is not None:
        merged, warnings = _export_average(a, shard_bytes, languages)
        averaged = [s.step for s in merged.sources[::-1] if s.step is not None]
        what = f"the mean of the steps {', '.join(map(str, averaged))}"
    else:
        warnings = export_hf(
            a.checkpoint_dir, a.hf_dir, step, a.dtype, shard_bytes, a.push_to_hub, languages, print, a.ema
        )
        what = f"step {step}"
    what += ", averaged by train.ema," if a.ema else ""
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    try:
        reason = (
            "" if note_export(a.checkpoint_dir, a.hf_dir, step, dtype, averaged, a.ema) else "the run is being trained"
        )
    except OSError as error:  # a run of somebody else's, which may only be read; the export is whole
        reason = one_line(error)
    if reason:
        print(f"warning: the export is not noted in the run's metrics.jsonl: {reason}", file=sys.stderr)
    print(f"exported {what} of {a.checkpoint_dir} in {dtype} to {a.hf_dir}")
    if a.verify:
        for line in _verify(a, step, merged):
            print(f"verified: {line}" if not line.startswith("not checked") else line)
    if a.push_to_hub:
        from easylm_mling.hf.hub import push

        print(f"uploaded to {push(a.hf_dir, a.push_to_hub)}")
    return 0


def _export_adapter(a, step: int) -> list[str]:
    from easylm_mling.errors import check
    from easylm_mling.hf.peft import export_adapter

    check(
        a.average is None,
        "--adapter writes the adapter of one step; leave out --average, or --adapter for a merged mean",
    )
    check(not a.language, "--language is for the card of a whole model; leave it out with --adapter")
    return export_adapter(a.checkpoint_dir, a.hf_dir, step, a.base, a.ema)


def _export_average(a, shard_bytes: float, languages: tuple[str, ...]):
    """Export the mean of the newest checkpoints; returns what was merged, and warnings."""
    from easylm_mling.errors import check
    from easylm_mling.merge.recipe import MergeRecipe
    from easylm_mling.merge.writing import merge_to_hf

    newest = a.step is None and a.best is None
    check(newest, "--average takes the newest steps; leave out --step, or use `merge --average RUN --from --to`")
    recipe = MergeRecipe("average", run=a.checkpoint_dir, last=a.average)
    return merge_to_hf(recipe, a.hf_dir, a.dtype, shard_bytes, a.push_to_hub, languages)


def _verify(a, step: int, merged) -> list[str]:
    if a.adapter:
        from easylm_mling.hf.peft import verify_adapter

        return verify_adapter(a.checkpoint_dir, a.hf_dir, step, a.ema)
    if merged is not None:
        from easylm_mling.merge.verify import verify_merge

        # Its recipe names the steps: the run may have newer ones by now.
        return verify_merge(merged.recipe, a.hf_dir)
    from easylm_mling.hf.verify import verify_export

    return verify_export(a.checkpoint_dir, a.hf_dir, step, a.ema)
