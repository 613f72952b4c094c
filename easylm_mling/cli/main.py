"""The command line: `easylm-mling VERB ...`, the same as `python -m easylm_mling VERB ...`."""

import argparse
import json
import sys
from pathlib import Path

from easylm_mling.config import RunConfig, load
from easylm_mling.errors import report_error


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except (ValueError, RuntimeError, OSError, KeyboardInterrupt) as error:
        code = report_error(error)
        if code is None:
            raise
        return code


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="easylm-mling", description="Continue the pretraining of Gemma on your own languages."
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    train = verbs.add_parser("train", help="train to a token budget; the same command again resumes")
    train.add_argument(
        "config", nargs="+", metavar="CONFIG.yaml|key=value", help="files merge left to right, then key.path=value"
    )
    train.add_argument(
        "--accept-data-change",
        action="store_true",
        help="go on although files, sources or the tokenizer changed; changed sources begin anew",
    )
    train.add_argument(
        "--max-hours", type=float, metavar="HOURS", help="save and end (exit code 0) at the first step after so long"
    )
    train.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help="of several processes, one a host: a free port of process 0 (a TPU slice needs none of these three)",
    )
    train.add_argument("--processes", type=int, metavar="N", help="how many processes there are")
    train.add_argument("--process-id", type=int, metavar="I", help="which one this is, from 0 on")
    train.add_argument("--wait-seconds", type=float, default=300, help="for the other processes to join (default: 300)")
    train.set_defaults(run=_train)

    _add_plan(
        verbs.add_parser("plan", help="before a run, without a TPU: does it fit a slice, how fast, how long, what cost")
    )

    _add_hf_verbs(verbs)

    sample = verbs.add_parser("sample", help="continue texts with a model")
    sample.add_argument("model_dir", help="a Hugging Face directory, a run's directory, or one made by import-hf")
    sample.add_argument("--prompt", action="append", required=True, help="may be given several times")
    sample.add_argument("--max-new-tokens", type=int, default=64)
    sample.add_argument("--temperature", type=float, default=0.0, help="0 (default): always the likeliest token")
    sample.add_argument("--top-k", type=int, help="draw from so many of the likeliest tokens (default: all)")
    sample.add_argument("--top-p", type=float, default=1.0, help="draw from the smallest set with this probability")
    sample.add_argument("--seed", type=int, default=0)
    sample.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    sample.add_argument("--step", type=int, help="of a run: default, the newest")
    sample.add_argument("--tokenizer", help="default: the one that lies with the model")
    sample.set_defaults(run=_sample)

    _add_data_verbs(verbs.add_parser("data", help="look at what a run will read, and at what it has read"))

    summary = verbs.add_parser("summary", help="each source's tokens, share and held-out loss of a run")
    summary.add_argument("run_dir")
    summary.set_defaults(run=_summary)

    report = verbs.add_parser("report", help="one HTML page about a run: losses, data, speed, restarts, checkpoints")
    report.add_argument("run_dir")
    report.add_argument("--output", metavar="FILE", help="default: RUN/report.html")
    report.set_defaults(run=_report)
    return parser


def _add_hf_verbs(verbs):
    importer = verbs.add_parser(
        "import-hf", help="Hugging Face weights -> a checkpoint that train starts from (init_from=...)"
    )
    importer.add_argument("hf_dir", help="a downloaded model's directory, or a hub name such as google/gemma-7b")
    importer.add_argument("checkpoint_dir")
    importer.add_argument("--revision", help="of a hub name: a branch, tag or commit (default: the newest)")
    importer.add_argument(
        "--tokenizer", help="a tokenizer that continues the model's own: adds rows for its new pieces"
    )
    importer.set_defaults(run=_import)

    exporter = verbs.add_parser("export-hf", help="a run or an imported checkpoint -> a Hugging Face directory")
    exporter.add_argument("checkpoint_dir", help="a run's directory, or one made by import-hf")
    exporter.add_argument("hf_dir")
    exporter.add_argument("--step", type=int, help="default: the newest")
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


def _add_plan(plan: argparse.ArgumentParser):
    plan.add_argument("config", nargs="*", metavar="CONFIG.yaml|key=value", help="as for train, with mesh.slice=v4-64")
    plan.add_argument("--price-per-chip-hour", type=float, metavar="PRICE", help="to show what the run will cost")
    plan.add_argument("--json", action="store_true", help="print everything as JSON instead of text")
    plan.add_argument(
        "--keep", action="store_true", help="leave the plan in run_dir: train shows it beside what it measures"
    )
    plan.add_argument(
        "--search", metavar="DIR", help="try meshes, micro-batches and remat; DIR keeps the measurements and best.yaml"
    )
    plan.add_argument(
        "--compare",
        nargs="+",
        default=[],
        metavar="CONFIG.yaml",
        help="each of these over the configs before, side by side",
    )
    plan.add_argument(
        "--calibrate", metavar="RUN", help="correct step times by what this run measured, and say where they were wrong"
    )
    plan.set_defaults(run=_plan)


def _add_data_verbs(parser: argparse.ArgumentParser):
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    inspect = verbs.add_parser("inspect", help="before a run: sizes, shares and epochs of every source and language")
    inspect.add_argument("config", nargs="+", metavar="CONFIG.yaml|key=value", help="as for train")
    inspect.add_argument("--json", action="store_true", help="print everything as JSON instead of tables")
    inspect.add_argument("--png", metavar="FILE", help="also draw the shares")
    inspect.set_defaults(run=_inspect)

    audit = verbs.add_parser("audit", help="after a step: which documents each row of its batch came from")
    audit.add_argument("run_dir")
    audit.add_argument("--step", type=int, required=True)
    audit.add_argument("--row", type=int, help="default: every row")
    audit.add_argument("--json", action="store_true", help="one JSON object a row, with the row's tokens")
    audit.set_defaults(run=_audit)

    tokenize = verbs.add_parser("tokenize", help="fill data.token_cache ahead of training, on Ray; may be interrupted")
    tokenize.add_argument("config", nargs="+", metavar="CONFIG.yaml|key=value", help="as for train")
    tokenize.add_argument("--epochs", type=int, default=1, help="of every source (default: 1)")
    tokenize.add_argument("--ray-address", help="of a Ray cluster (default: this machine)")
    tokenize.set_defaults(run=_tokenize)


# Each verb imports what it needs: a config error should not wait for jax to load.


def _config(a, *more: str) -> RunConfig:
    files = [x for x in a.config if "=" not in x or Path(x).is_file()]
    return load([*files, *more], [x for x in a.config if x not in files])


def _train(a) -> int:
    config = _config(a)
    from easylm_mling.distributed.processes import find_process_group, joined_processes
    from easylm_mling.run.train import train

    place, on_cpu = find_process_group(a.coordinator, a.processes, a.process_id), bool(config.mesh.cpu_devices)
    with joined_processes(place, a.wait_seconds, on_cpu):
        return train(config, accept_data_change=a.accept_data_change, max_hours=a.max_hours)


def _plan(a) -> int:
    configs = {name: _config(a, name) for name in a.compare}
    if a.config and not configs:
        configs = {"": _config(a)}
    from easylm_mling.monitoring.console import make_console
    from easylm_mling.plan.command import PlanOptions, plan

    return plan(configs, PlanOptions(a.price_per_chip_hour, a.json, a.keep, a.search, a.calibrate), make_console())


def _inspect(a) -> int:
    from rich.console import Console

    from easylm_mling.data.tools.inspect import inspect_data, plot_inspection, print_inspection

    found = inspect_data(_config(a))
    if a.json:
        print(json.dumps(found, ensure_ascii=False, indent=1))
    else:
        print_inspection(found, Console())
    if a.png:
        plot_inspection(found, a.png)
    return 0


def _tokenize(a) -> int:
    from rich.console import Console

    from easylm_mling.data.catalog import build_catalog
    from easylm_mling.data.tools.pretokenize import tokenize

    config = _config(a)
    written = tokenize(config, build_catalog(config.data), a.epochs, a.ray_address, Console())
    print(f"{written:,} tokens written to {config.data.token_cache}")
    return 0


def _audit(a) -> int:
    from easylm_mling.data.tools.audit import audit

    for row in audit(a.run_dir, a.step, a.row):
        if a.json:
            print(json.dumps({**row, "tokens": row["tokens"].tolist()}, ensure_ascii=False))
            continue
        print(f"row {row['row']} (lane {row['lane']}): {row['source']}")
        for d in row["documents"]:
            language = f"{d['language']} " if d["language"] else ""
            unit = f"{d['unit'][0]}-{d['unit'][1]}"
            print(
                f"  {d['tokens']} tokens from its {d['first']}: {language}{d['file']} unit {unit} document {d['document']} "
                f"epoch {d['epoch']}: {d['begins']!r}"
            )
    return 0


def _import(a) -> int:
    from easylm_mling.hf.importing import import_hf

    model = import_hf(a.hf_dir, a.checkpoint_dir, a.tokenizer, a.revision)
    if a.tokenizer:
        print(f"the vocabulary now has {model.vocab_size} rows; train with model.vocab_size={model.vocab_size}")
    print(
        f"imported {a.hf_dir} to {a.checkpoint_dir}; start from it with `easylm-mling train CONFIG init_from={a.checkpoint_dir}`"
    )
    return 0


def _export(a) -> int:
    from easylm_mling.checkpoint.layout import step_directory
    from easylm_mling.hf.exporting import export_hf, note_export

    step = int(step_directory(a.checkpoint_dir, a.step).name)
    shard_bytes, languages = a.max_shard_gb * 1e9, tuple(a.language)
    for warning in export_hf(a.checkpoint_dir, a.hf_dir, step, a.dtype, shard_bytes, a.push_to_hub, languages):
        print(f"warning: {warning}", file=sys.stderr)
    if not note_export(a.checkpoint_dir, a.hf_dir, step, a.dtype):
        print("warning: the run is being trained, so the export is not noted in its metrics.jsonl", file=sys.stderr)
    print(f"exported step {step} of {a.checkpoint_dir} in {a.dtype} to {a.hf_dir}")
    if a.verify:
        from easylm_mling.hf.verify import verify_export

        for line in verify_export(a.checkpoint_dir, a.hf_dir, step):
            print(f"verified: {line}" if not line.startswith("not checked") else line)
    if a.push_to_hub:
        from easylm_mling.hf.hub import push

        print(f"uploaded to {push(a.hf_dir, a.push_to_hub)}")
    return 0


def _sample(a) -> int:
    from easylm_mling.inference.generate import sample_text

    settings = {"temperature": a.temperature, "top_k": a.top_k, "top_p": a.top_p, "seed": a.seed, "dtype": a.dtype}
    texts = sample_text(a.model_dir, a.prompt, a.max_new_tokens, a.tokenizer, a.step, **settings)
    for prompt, text in zip(a.prompt, texts, strict=True):
        print(f"[{prompt}]{text}")
    return 0


def _summary(a) -> int:
    from easylm_mling.run.summary import print_summary

    print_summary(a.run_dir)
    return 0


def _report(a) -> int:
    from easylm_mling.monitoring.report.page import write_report

    print(f"written to {write_report(a.run_dir, a.output)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
