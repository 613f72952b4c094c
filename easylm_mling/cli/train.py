"""Training: `train`."""

from easylm_mling.cli.config import add_config, add_override_model, load_config
from easylm_mling.cli.processes import add_processes, joined
from easylm_mling.errors import check


def add_verbs(verbs):
    """Add `train` to the parser's `verbs`."""
    train = verbs.add_parser("train", help="train to a token budget; the same command again resumes")
    add_config(train)
    add_override_model(train)
    train.add_argument(
        "--accept-data-change",
        action="store_true",
        help="go on although files, sources or the tokenizer changed; changed sources begin anew",
    )
    train.add_argument(
        "--change",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="go on with another budget, batch size, learning rate or schedule; recorded in RUN/history.jsonl",
    )
    train.add_argument(
        "--max-hours", type=float, metavar="HOURS", help="save and end (exit code 0) at the first step after so long"
    )
    add_processes(train)
    train.set_defaults(run=_train)


def _train(a) -> int:
    for item in a.change:
        check("=" in item, f"--change {item}: write KEY=VALUE")
    a.config += a.change
    config = load_config(a)
    from easylm_mling.run.train import train

    with joined(a, on_cpu=bool(config.mesh.cpu_devices)):
        return train(
            config,
            accept_data_change=a.accept_data_change,
            max_hours=a.max_hours,
            override_model=a.override_model,
            change=[item.partition("=")[0] for item in a.change],
        )
