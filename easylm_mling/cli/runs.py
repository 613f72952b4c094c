"""Looking at runs and models: `sample`, `summary`, `report`."""


def add_verbs(verbs):
    """Add `sample`, `summary` and `report` to the parser's `verbs`."""
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

    report = verbs.add_parser("report", help="one HTML page about a run: losses, data, speed, restarts, checkpoints")
    report.add_argument("run_dir")
    report.add_argument("--output", metavar="FILE", help="default: RUN/report.html")
    report.set_defaults(run=_report)


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
