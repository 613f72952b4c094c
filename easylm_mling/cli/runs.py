"""Looking at runs and models: `sample`, `summary`, `report`."""


def add_verbs(verbs):
    """Add `sample`, `summary` and `report` to the parser's `verbs`."""
    sample = verbs.add_parser("sample", help="continue texts with a model")
    sample.add_argument("model_dir", help="a Hugging Face directory, a run's directory, or one made by import-hf")
    asked = sample.add_mutually_exclusive_group(required=True)
    asked.add_argument("--prompt", action="append", help="may be given several times")
    asked.add_argument("--file", metavar="JSONL", help="a prompt a line, as `prompt`, perhaps with settings of its own")
    sample.add_argument(
        "--output", metavar="JSONL", help="of --file: its lines with their texts; a repeated command goes on"
    )
    sample.add_argument(
        "--stop", action="append", help="of --file: a text ends before this; may be given several times"
    )
    sample.add_argument("--rows", type=int, help="of --file: texts that are written at once (default: 16)")
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

    report = verbs.add_parser("report", help="one HTML page about a run: losses, data, speed, restarts, checkpoints")
    report.add_argument("run_dir")
    report.add_argument("--output", metavar="FILE", help="default: RUN/report.html")
    report.set_defaults(run=_report)


def _sample(a) -> int:
    from easylm_mling.errors import check

    if a.file:
        return _sample_file(a)
    alone = (a.output, a.stop, a.rows) == (None, None, None)
    check(alone, "sample: --output, --stop and --rows are of --file; give the prompts in a file")
    from easylm_mling.inference.generate import sample_text

    settings = {"temperature": a.temperature, "top_k": a.top_k, "top_p": a.top_p, "seed": a.seed, "dtype": a.dtype}
    texts = sample_text(a.model_dir, a.prompt, a.max_new_tokens, a.tokenizer, a.step, **settings)
    for prompt, text in zip(a.prompt, texts, strict=True):
        print(f"[{prompt}]{text}")
    return 0


def _sample_file(a) -> int:
    from easylm_mling.errors import check
    from easylm_mling.inference.prompt_file import sample_file

    check(a.output, "sample --file: needs --output JSONL for the texts")
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "seed", "stop")
    settings = {name: getattr(a, name) for name in names}
    rows = 16 if a.rows is None else a.rows
    before, now = sample_file(a.model_dir, a.file, a.output, settings, a.tokenizer, a.step, rows, a.dtype)
    print(f"{now:,} texts written to {a.output}" + (f", which had {before:,}" if before else ""))
    return 0


def _summary(a) -> int:
    from easylm_mling.run.summary import print_summary

    print_summary(a.run_dir)
    return 0


def _report(a) -> int:
    from easylm_mling.monitoring.report.page import write_report

    print(f"written to {write_report(a.run_dir, a.output)}")
    return 0
