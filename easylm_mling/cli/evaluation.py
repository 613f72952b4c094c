"""Scores of a model: `eval`, and the data for it: `fetch-eval`."""

from easylm_mling.cli.processes import add_processes, joined


def add_verbs(verbs):
    """Add `eval` to the parser's `verbs`."""
    evaluate = verbs.add_parser("eval", help="scores of a model on a suite of tasks, by lm-evaluation-harness")
    evaluate.add_argument(
        "model_dir",
        help="a Hugging Face directory, a run's directory, or one made by import-hf; with --judge also a .jsonl of answers",
    )
    asked = evaluate.add_mutually_exclusive_group(required=True)
    asked.add_argument("--suite", metavar="NAME", help="a YAML file, or its name in configs/eval: mling, kobest, quick")
    asked.add_argument(
        "--judge",
        metavar="FILE",
        help="answers marked 0 to 5 by a strong model: a YAML file, as configs/judge/sixty.yaml",
    )
    asked.add_argument("--tasks", metavar="NAME,...", help="tasks or groups of the harness or of --include-path")
    evaluate.add_argument("--shots", type=int, help="with --tasks: examples in each prompt (default: the task's own)")
    evaluate.add_argument(
        "--include-path",
        action="append",
        default=[],
        metavar="DIR",
        help="a folder of tasks in the harness's YAML form",
    )
    evaluate.add_argument("--data", metavar="DIR", help="read the tasks' data from here, where fetch-eval put it")
    evaluate.add_argument("--step", type=int, help="of a run: default, the newest")
    evaluate.add_argument("--all", action="store_true", help="every kept checkpoint of a run, and which is the best")
    evaluate.add_argument("--tokenizer", help="default: the one that lies with the model")
    evaluate.add_argument("--baseline", metavar="RESULTS.json", help="show each score's paired difference from these")
    evaluate.add_argument("--output", metavar="DIR", help="default: RUN/evaluations/STEP")
    evaluate.add_argument("--limit", type=int, metavar="N", help="only the first N items of each task, to try it out")
    evaluate.add_argument(
        "--max-length", type=int, metavar="TOKENS", help="longest text read (default: the model's, up to 8192)"
    )
    evaluate.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    evaluate.add_argument("--yes", action="store_true", help="with --judge: agree to what the judgements cost")
    evaluate.add_argument(
        "--form", choices=("plain", "chat", "both"), default="plain", help="of the prompts: both makes separate columns"
    )
    evaluate.add_argument(
        "--template",
        metavar="NAME",
        help="of the chat form: tokenizer (its own, the default), a plain form such as alpaca, or a file",
    )
    add_processes(evaluate)
    evaluate.set_defaults(run=_eval)
    fetch = verbs.add_parser("fetch-eval", help="keep the data of a suite in a folder, for machines without a network")
    fetch.add_argument("suite", help="a YAML file, or its name in configs/eval")
    fetch.add_argument("output", metavar="DIR", help="where it goes; what is there is kept")
    fetch.add_argument("--include-path", action="append", default=[], metavar="DIR", help="as eval's")
    fetch.set_defaults(run=_fetch)


def _eval(a) -> int:
    from easylm_mling.errors import check

    if a.judge:
        return _judge(a)
    check(not a.yes, "--yes: agrees to the cost of --judge; leave it out")
    from easylm_mling.evaluation.scoring.suites import load_suite, tasks_suite, with_data, with_include

    check(not a.suite or a.shots is None, "--shots: a suite has its own shots; give --shots with --tasks")
    check(a.shots is None or a.shots >= 0, f"--shots {a.shots}: must be zero or more")
    check(a.limit is None or a.limit > 0, f"--limit {a.limit}: must be positive")
    check(a.template is None or a.form != "plain", "--template: is of --form chat or both; add one of them")
    check(
        not a.all or (a.step, a.output, a.baseline) == (None, None, None),
        "--all: takes every step, and writes to RUN/evaluations; leave out --step, --output and --baseline",
    )
    suite = with_include(load_suite(a.suite) if a.suite else tasks_suite(a.tasks, a.shots), a.include_path)
    suite = with_data(suite, a.data)
    from easylm_mling.distributed.agreement import is_primary
    from easylm_mling.evaluation.checkpoints import evaluate_run
    from easylm_mling.evaluation.command import evaluate_forms
    from easylm_mling.evaluation.options import EvalOptions
    from easylm_mling.monitoring.console import make_console

    forms = ["plain", "chat"] if a.form == "both" else [a.form]
    check(len(forms) == 1 or not (a.baseline or a.all), "--form both: --baseline and --all are of one form")
    options = EvalOptions(
        a.model_dir,
        suite,
        a.step,
        a.tokenizer,
        a.output,
        a.baseline,
        a.dtype,
        a.max_length,
        a.limit,
        forms[0],
        a.template or "tokenizer",
    )
    with joined(a):
        console = make_console(quiet=not is_primary())
        if a.all:
            evaluate_run(options, console)
        else:
            evaluate_forms(options, forms, console)
    return 0


def _fetch(a) -> int:
    from pathlib import Path

    from easylm_mling.errors import ConfigError, check
    from easylm_mling.evaluation.scoring.suites import harness_is_there, load_suite, with_include
    from easylm_mling.monitoring.console import make_console, say

    suite = with_include(load_suite(a.suite), a.include_path)
    check(harness_is_there(), "fetch-eval: lm-evaluation-harness is missing; run pip install 'easylm-mling[eval]'")
    from easylm_mling.evaluation.scoring.kept_data import fetch_suite

    console = make_console()
    if problems := fetch_suite(suite, Path(a.output), lambda line: say(console, line)):
        raise ConfigError(
            f"{len(problems)} tasks of {suite.name} cannot be had: {'; '.join(problems)}; the others are in {a.output}, and "
            "the same command tries these again"
        )
    say(console, f"all of {suite.name} is in {a.output}; give eval --data {a.output}, or set eval.suite_data")
    return 0


def _judge(a) -> int:
    import sys

    from easylm_mling.errors import check

    other = {
        "--shots": a.shots is not None,
        "--include-path": a.include_path,
        "--data": a.data is not None,
        "--all": a.all,
        "--limit": a.limit is not None,
        "--form": a.form != "plain",
        "--template": a.template is not None,
    }
    given = next((flag for flag, value in other.items() if value), None)
    way = "set answers.template in its file" if given == "--template" else "leave it out"
    check(given is None, f"{given}: is of suites and tasks; with --judge {way}")
    from pathlib import Path

    from easylm_mling.evaluation.options import EvalOptions
    from easylm_mling.evaluation.scoring.suites import Suite
    from easylm_mling.judging.command import ask_person, judge_model
    from easylm_mling.monitoring.console import make_console

    suite = Suite(Path(a.judge).stem, ())
    options = EvalOptions(a.model_dir, suite, a.step, a.tokenizer, a.output, a.baseline, a.dtype, a.max_length)
    agrees = (lambda _: True) if a.yes else ask_person if sys.stdin.isatty() else None
    judge_model(options, a.judge, agrees, make_console())
    return 0
