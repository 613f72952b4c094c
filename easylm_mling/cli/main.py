"""The entry point of the command line `easylm-mling VERB ...`, and its parser.

Each verb imports what it needs when it runs: help and a wrong config must not wait for JAX to load.
"""

import argparse

from easylm_mling import __version__
from easylm_mling.cli import chat, config, data, evaluation, hf, merge, plan, runs, train
from easylm_mling.config.paths import expanded
from easylm_mling.errors import report_error

# The arguments of all verbs that name files. Those of a config are at their place in it.
PATHS = {
    "average", "baseline", "calibrate", "chat_vector", "checkpoint_dir", "compare", "config", "data", "hf_dir", "html", "include_path", "linear",
    "model_dir", "output", "png", "recipe", "run_dir", "search", "slerp", "suite", "template",
    "tokenizer"
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code (errors.py)."""
    arguments = build_parser().parse_args(argv)
    try:
        for name in PATHS & vars(arguments).keys():
            setattr(arguments, name, expanded(getattr(arguments, name)))
        return arguments.run(arguments)
    except (Exception, KeyboardInterrupt) as error:
        return report_error(error)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all verbs; the arguments it returns have `run`, the function of their verb."""
    parser = argparse.ArgumentParser(
        prog="easylm-mling", description="Continue the pretraining of Gemma on your own languages."
    )
    parser.add_argument("--version", action="version", version=f"easylm-mling {__version__}")
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    for group in (train, plan, hf, merge, data, runs, chat, evaluation, config):
        group.add_verbs(verbs)
    return parser
