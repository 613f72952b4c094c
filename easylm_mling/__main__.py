"""The command line: `easylm-mling VERB ...`, the same as `python -m easylm_mling VERB ...`."""

import argparse
import sys
from pathlib import Path

from easylm_mling.config import load

EXIT_STOPPED, EXIT_WRONG_INPUT, EXIT_INTERRUPTED = 1, 2, 130


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except (ValueError, RuntimeError) as error:
        # Ours are one line with the way out. Anything else is a fault of the program and keeps its traceback.
        if not type(error).__module__.startswith("easylm_mling"):
            raise
        print(f"error: {error}", file=sys.stderr)
        return EXIT_WRONG_INPUT if isinstance(error, ValueError) else EXIT_STOPPED
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_STOPPED
    except KeyboardInterrupt:
        print("interrupted; everything saved so far is whole", file=sys.stderr)
        return EXIT_INTERRUPTED


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="easylm-mling", description="Continue the pretraining of Gemma on your own languages."
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    train = verbs.add_parser("train", help="train to a token budget; the same command again resumes")
    train.add_argument(
        "config", nargs="+", metavar="CONFIG.yaml|key=value", help="files merge left to right, then key.path=value"
    )
    train.set_defaults(run=_train)

    importer = verbs.add_parser(
        "import-hf", help="Hugging Face weights -> a checkpoint that train starts from (init_from=...)"
    )
    importer.add_argument("hf_dir")
    importer.add_argument("checkpoint_dir")
    importer.set_defaults(run=_import)

    exporter = verbs.add_parser("export-hf", help="a run or an imported checkpoint -> a Hugging Face directory")
    exporter.add_argument("checkpoint_dir", help="a run's directory, or one made by import-hf")
    exporter.add_argument("hf_dir")
    exporter.add_argument("--step", type=int, help="default: the newest")
    exporter.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    exporter.add_argument("--max-shard-gb", type=float, default=5.0, help="largest size of one file in GB (default: 5)")
    exporter.set_defaults(run=_export)

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

    summary = verbs.add_parser("summary", help="each source's tokens, share and held-out loss of a run")
    summary.add_argument("run_dir")
    summary.set_defaults(run=_summary)
    return parser


# Each verb imports what it needs: a config error should not wait for jax to load.


def _train(a) -> int:
    files = [x for x in a.config if "=" not in x or Path(x).is_file()]
    config = load(files, [x for x in a.config if x not in files])
    from easylm_mling.train import train

    return train(config)


def _import(a) -> int:
    from easylm_mling.hf.importing import import_hf

    import_hf(a.hf_dir, a.checkpoint_dir)
    print(
        f"imported {a.hf_dir} to {a.checkpoint_dir}; start from it with `easylm-mling train CONFIG init_from={a.checkpoint_dir}`"
    )
    return 0


def _export(a) -> int:
    from easylm_mling.checkpoint import step_directory
    from easylm_mling.hf.exporting import export_hf
    from easylm_mling.metrics import MetricsLog

    step = int(step_directory(a.checkpoint_dir, a.step).name)
    for warning in export_hf(a.checkpoint_dir, a.hf_dir, step, a.dtype, a.max_shard_gb * 1e9):
        print(f"warning: {warning}", file=sys.stderr)
    record = Path(a.checkpoint_dir) / "metrics.jsonl"
    if record.exists():
        with MetricsLog(record) as log:
            log.write("export", step, path=str(Path(a.hf_dir).absolute()), dtype=a.dtype)
    print(f"exported step {step} of {a.checkpoint_dir} in {a.dtype} to {a.hf_dir}")
    return 0


def _sample(a) -> int:
    from easylm_mling.generate import sample_text

    settings = {"temperature": a.temperature, "top_k": a.top_k, "top_p": a.top_p, "seed": a.seed, "dtype": a.dtype}
    texts = sample_text(a.model_dir, a.prompt, a.max_new_tokens, a.tokenizer, a.step, **settings)
    for prompt, text in zip(a.prompt, texts, strict=True):
        print(f"[{prompt}]{text}")
    return 0


def _summary(a) -> int:
    from easylm_mling.summary import print_summary

    print_summary(a.run_dir)
    return 0


if __name__ == "__main__":
    sys.exit(main())
