"""Training: `train`."""

from easylm_mling.cli.config import add_config, add_override_model, load_config
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
    train.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help="of several processes, one a host: a free port of process 0 (a TPU slice needs none of these three)",
    )
    train.add_argument("--processes", type=int, metavar="N", help="how many processes there are")
    train.add_argument("--process-id", type=int, metavar="I", help="which one this is, from 0 on")
    train.add_argument("--wait-seconds", type=float, default=300, help="for the other processes to join (default: 300)")
    train.set_defaults(run=_train)


def _train(a) -> int:
    for item in a.change:
        check("=" in item, f"--change {item}: write KEY=VALUE")
    a.config += a.change
    config = load_config(a)
    from easylm_mling.distributed.joining import find_process_group, joined_processes
    from easylm_mling.run.train import train

    group, on_cpu = find_process_group(a.coordinator, a.processes, a.process_id), bool(config.mesh.cpu_devices)
    with joined_processes(group, a.wait_seconds, on_cpu):
        return train(
            config,
            accept_data_change=a.accept_data_change,
            max_hours=a.max_hours,
            override_model=a.override_model,
            change=[item.partition("=")[0] for item in a.change],
        )
