"""Planning: `plan`."""

from easylm_mling.cli.config import add_config, add_override_model, load_config


def add_verbs(verbs):
    """Add `plan` to the parser's `verbs`."""
    plan = verbs.add_parser(
        "plan", help="before a run, without a TPU: does it fit a slice, how fast, how long, what cost"
    )
    add_config(plan, needed=False, help="as for train, with mesh.slice=v4-64")
    add_override_model(plan)
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


def _plan(a) -> int:
    configs = {name: load_config(a, name) for name in a.compare}
    if a.config and not configs:
        configs = {"": load_config(a)}
    from easylm_mling.monitoring.console import make_console
    from easylm_mling.plan.command import PlanOptions, plan

    options = PlanOptions(a.price_per_chip_hour, a.json, a.keep, a.search, a.calibrate)
    return plan(configs, options, make_console())
