"""Data before and after a run: `data convert`, `data inspect`, `data audit`, `data tokenize`."""

import json

from easylm_mling.cli.config import add_config, config_files, load_config
from easylm_mling.errors import check


def add_verbs(verbs):
    """Add `data` and its verbs to the parser's `verbs`."""
    data = verbs.add_parser("data", help="look at what a run will read, and at what it has read")
    verbs = data.add_subparsers(required=True, metavar="VERB")
    inspect = verbs.add_parser("inspect", help="before a run: sizes, shares and epochs of every source and language")
    add_config(inspect, help="as for train; `data` is enough, and without a budget all is read once")
    inspect.add_argument("--json", action="store_true", help="print everything as JSON instead of tables")
    inspect.add_argument("--png", metavar="FILE", help="also draw the shares")
    inspect.add_argument(
        "--show",
        type=int,
        metavar="N",
        help="instead print the first N documents of each source, trained tokens marked",
    )
    inspect.add_argument("--html", metavar="FILE", help="with --show: write them as a page")
    inspect.set_defaults(run=_inspect)

    convert = verbs.add_parser("convert", help="supervised sets into conversations, asked in many phrasings")
    convert.add_argument("recipe", metavar="RECIPE.yaml")
    convert.add_argument("output", metavar="OUT.jsonl")
    convert.set_defaults(run=_convert)

    audit = verbs.add_parser("audit", help="after a step: which documents each row of its batch came from")
    audit.add_argument("run_dir")
    audit.add_argument("--step", type=int, required=True)
    audit.add_argument("--row", type=int, help="default: every row")
    audit.add_argument("--json", action="store_true", help="one JSON object a row, with the row's tokens")
    audit.set_defaults(run=_audit)

    tokenize = verbs.add_parser("tokenize", help="fill data.token_cache ahead of training, on Ray; may be interrupted")
    add_config(tokenize)
    tokenize.add_argument("--epochs", type=int, default=1, help="of every source (default: 1)")
    tokenize.add_argument("--ray-address", help="of a Ray cluster (default: this machine)")
    tokenize.set_defaults(run=_tokenize)


def _inspect(a) -> int:
    from easylm_mling.config import load_mixer

    config = load_mixer(*config_files(a))
    from rich.console import Console

    check(a.show is None or a.show > 0, f"--show {a.show}: name how many documents, 1 or more")
    check(a.html is None or a.show is not None, "--html goes with --show N")
    if a.show:
        from easylm_mling.data.tools.show import print_documents, shown_documents, write_html

        shown = list(shown_documents(config, a.show))
        if a.html:
            write_html(iter(shown), a.html)
        print_documents(iter(shown), Console())
        return 0

    from easylm_mling.data.tools.inspect import inspect_data, plot_inspection, print_inspection

    inspection = inspect_data(config)
    if a.json:
        print(json.dumps(inspection, ensure_ascii=False, indent=1))
    else:
        print_inspection(inspection, Console())
    if a.png:
        plot_inspection(inspection, a.png)
    return 0


def _convert(a) -> int:
    from easylm_mling.data.conversion.convert import LEFT_OUT, convert

    manifest = convert(a.recipe, a.output)
    for name, one in manifest["sets"].items():
        left = ", ".join(f"{one[why]:,} {why.replace('_', ' ')}" for why in LEFT_OUT if one[why])
        print(f"{name}: {one['written']:,} of {one['read']:,} rows{f' (left out: {left})' if left else ''}")
    print(f"{manifest['output']['rows']:,} conversations written to {a.output}")
    return 0


def _tokenize(a) -> int:
    config = load_config(a)
    from rich.console import Console

    from easylm_mling.data.catalog import build_catalog
    from easylm_mling.data.tools.pretokenize import tokenize

    written = tokenize(config.mixer, build_catalog(config.data), a.epochs, a.ray_address, Console())
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
