"""`data inspect --show` marks exactly the targets, in a terminal, in plain text and on a page."""

import html
import io
import json
import re

import pytest
from conversation_cases import texts
from rich.console import Console

from easylm_mling.cli.main import main
from easylm_mling.config import load_mixer
from easylm_mling.data.tools.inspect import inspect_data, print_inspection
from easylm_mling.data.tools.show import print_documents, shown_documents, write_html

CONFIG = "configs/tune/conversations.yaml"


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A config whose messages hold markup, control tokens and brackets."""
    folder = tmp_path_factory.mktemp("hostile")
    answers = ["<script>alert(1)</script> [bold]x[/bold]", "it is <end_of_turn>", texts("ko")[0], texts("ja")[0]]
    rows = [
        {"messages": [{"role": "user", "content": f"<b>{i}</b>"}, {"role": "assistant", "content": a}]}
        for i, a in enumerate(answers)
    ]
    rows += [{"messages": []}]
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    file = folder / "config.yaml"
    file.write_text(
        "data:\n  tokenizer: data/sample/tokenizer/tokenizer.model\n  sequence_length: 256\n  sources:\n    s:\n"
        f"      paths: {folder}/rows.jsonl\n      weight: 1\n      holdout_fraction: 0\n"
        "      conversations: {template: gemma}\n"
    )  # fmt: skip
    return file, answers


def test_the_marked_text_is_the_answers_with_their_ends(hostile, tmp_path):
    file, answers = hostile
    shown = list(shown_documents(load_mixer([str(file)]), 10))
    assert len(shown) == 4 and all(s.targets > 0 for s in shown)
    wanted = sorted(a + "<end_of_turn>" for a in answers)
    out = io.StringIO()
    print_documents(iter(shown), Console(file=out, width=80))
    marked = ["".join(run) for run in re.findall(r"⟦(.*?)⟧⟦(<end_of_turn>)⟧", out.getvalue(), re.DOTALL)]
    assert sorted(marked) == wanted
    write_html(iter(shown), tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<script>" not in page
    runs = re.findall(r"<mark>([^<]*)</mark><mark><span class='control'>([^<]*)</span></mark>", page)
    assert sorted(html.unescape("".join(run)) for run in runs) == wanted


def test_a_terminal_shows_targets_in_colour(hostile):
    out = io.StringIO()
    print_documents(shown_documents(load_mixer([str(hostile[0])]), 1), Console(file=out, force_terminal=True, width=80))
    assert "⟦" not in out.getvalue() and "\x1b[1;32m" in out.getvalue()


def test_inspect_tells_what_is_refused_cut_and_trained(hostile):
    inspection = inspect_data(load_mixer([str(hostile[0])]))
    sample = inspection["sources"]["s"]["conversations"]
    assert sample["read"] == 5 and sample["refused"] == {"no answer": 1} and sample["writes_control"] == 1
    assert 0 < sample["targets"] < 1 and sample["joint_differs"] == 0
    json.dumps(inspection)
    out = io.StringIO()
    print_inspection(inspection, Console(file=out, width=120))
    assert "s: 20.0% of the rows are refused: no answer" in out.getvalue()
    assert "s: 20.0% of the rows write the name of a control token: it stays text" in out.getvalue()


def test_the_sample_conversations_are_read_whole(capsys, tmp_path):
    inspection = inspect_data(load_mixer([CONFIG]))
    for name in ("chat", "tasks", "forum"):
        assert inspection["sources"][name]["conversations"]["refused"] == {}
    assert main(["data", "inspect", CONFIG, "--show", "2", "--html", str(tmp_path / "x.html")]) == 0
    assert capsys.readouterr().out.count(" of them targets") == 8 and (tmp_path / "x.html").stat().st_size > 1000
    assert main(["data", "inspect", CONFIG, "--show", "0"]) == 2
    assert main(["data", "inspect", CONFIG, "--html", "x.html"]) == 2
