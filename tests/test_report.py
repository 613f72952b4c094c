"""The page about a run: complete, closed against what its records hold, bounded, and right in a browser."""

import json
import random
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from processes import ROOT, TINY
from test_monitor import event

from easylm_mling.charts import Line, _ticks, draw_svg
from easylm_mling.cli.main import main
from easylm_mling.config import load, to_yaml
from easylm_mling.errors import ConfigError, without_secrets
from easylm_mling.hf.plot import plot_losses
from easylm_mling.monitoring.report.collect import collect
from easylm_mling.monitoring.report.curve import Curve
from easylm_mling.monitoring.report.page import page, write_report
from easylm_mling.storage.object_store import write_run_format

VOID = {"meta"}
HOSTILE = "</style><script>alert('x')</script>&\"'"


class Reader(HTMLParser):
    """Checks that every tag is closed in its turn; keeps tags, attributes and text."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.attributes, self.texts = [], [], [], []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.texts.append(data)


def make_run(folder, steps=40, source="skypile", language="ja"):
    """A run's records as three attempts leave them: the first killed, the second stopped, the third failed."""
    import os

    os.chdir(ROOT)
    config = load(["configs/demo.yaml"], [*TINY, f"run_dir={folder}", "train.budget_tokens=20480"])
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    write_run_format(folder)
    rng, lines, events = random.Random(0), [], []
    names = [source if n == "skypile" else n for n in config.data.sources]
    second = 0.0

    def happens(name, step, attempt, **values):
        events.append(event(second, name, step, attempt, **values))

    for attempt, (first, last) in enumerate(((1, 15), (11, 30), (31, steps)), 1):
        second += 30
        happens(
            "start", first - 1, attempt, seconds=5.0, devices=8, hosts=2, device_kind=HOSTILE, versions={"jax": "1"}
        )
        second += 12
        happens("compiled", first, attempt, seconds=10.0)
        for step in range(first, last + 1):
            second += 1
            loss = 3 + 5 * 0.95**step + rng.random() / 10
            values = {
                "loss": loss,
                "gradient_norm": 1 + rng.random(),
                "learning_rate": 1e-4,
                "parameter_norm": 30.0 + step,
            }
            speed = {"step_seconds": 1.0, "tokens_per_second": 256.0, "mfu": 0.41, "data_wait_seconds": 1e-4}
            ledger = {
                n: {
                    "wanted": 0.2,
                    "tokens": 50 * step,
                    "documents": step,
                    "rows": step,
                    "padding": 0,
                    "bad": 0,
                    "epochs": 0.5,
                }
                for n in names
            }
            lines.append(
                {"kind": "train", "step": step, "time": second, "tokens": 256 * step, "sources": dict.fromkeys(names, loss),
                 "ledger": ledger, "skipped": int(step > 20), "goodput": 0.5, "seconds_to_budget": 3.0, **values, **speed}
            )  # fmt: skip
            if step % 10 == 0:
                evaluation = {"loss": loss, "sources": dict.fromkeys(names, loss), "bits_per_byte": 1.5}
                evaluation["languages"] = {"glot500": {language: loss}}
                lines.append({"kind": "eval", "step": step, "time": second, **evaluation})
                counted = {"glot500": {language: {"tokens": 9, "documents": 1, "bad": 0, "epochs": 0.1}}}
                lines.append({"kind": "languages", "step": step, "time": second, "languages": counted})
                happens("saved", step, attempt, seconds=0.5, bytes=10**9)
        happens("progress", last, attempt)
        if attempt == 2:
            happens("stopped", last, attempt, why="as asked")
    lines.append({"kind": "news", "step": 9, "time": 1.0, "news": [HOSTILE]})
    happens("save_failed", steps, 3, problem=HOSTILE, in_a_row=1)
    happens("failed", steps, 3, error=HOSTILE)
    cut = '{"kind": "train", "st'
    (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines) + cut, encoding="utf-8")
    (folder / "events.jsonl").write_text("".join(json.dumps(x) + "\n" for x in events) + cut, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("report") / "my run & co")


def test_the_page_holds_what_the_run_recorded(run):
    history = collect(run)
    text = page(history)
    reader = Reader(text)
    seen = "".join(reader.texts)
    parts = (
        "my run & co",
        "Held-out loss of each source",
        "Held-out loss of each language",
        "Throughput",
        "MFU",
        "Goodput",
    )
    for part in (*parts, "Gradient norm", "config.yaml", "cc100-ja", "as asked", "failed"):
        assert part in seen, part
    assert history.restarts == [10, 30] and text.count(">restart<") >= 8
    assert [a.first_step for a in history.attempts] == [1, 11, 31] and history.attempts[0].end is None
    # Steps 11 to 15 were done twice; only the later ones are in the curves.
    assert [x for x, _ in history.curves["loss"].points] == [256 * s for s in range(1, 41)]
    assert history.skips == [21] and history.saved == 4 and history.failed_saves == 1
    assert history.goodput.seconds["lost"] > 0 and "steps done again" in seen


def test_the_page_needs_no_network_and_runs_nothing(run):
    text = page(collect(run))
    reader = Reader(text)
    assert not {"script", "link", "img", "iframe", "object"} & set(reader.tags)
    assert not [a for a, _ in reader.attributes if a in ("src", "href", "srcset") or a.startswith("on")]
    assert "url(" not in text and "@import" not in text and "http://" not in text and "https://" not in text
    assert "default-src 'none'" in text and 'name="viewport"' in text and "prefers-color-scheme: dark" in text


def test_whatever_a_run_is_called_stays_text(tmp_path):
    folder = make_run(tmp_path / "run", source="<img src=x onerror=alert(1)>", language=HOSTILE)
    text = page(collect(folder))
    reader = Reader(text)
    assert not {"script", "img"} & set(reader.tags) and "<script" not in text and "<img" not in text
    assert "<img src=x onerror=alert(1)>" in "".join(reader.texts) and HOSTILE in "".join(reader.texts)


def test_a_source_named_like_markup_stays_text_in_every_place(tmp_path, monkeypatch):
    """Even if a config let such a name through: in curves, legends, tooltips and rows, and as every word of an event."""

    def load_hostile(file):
        config = load([str(file)])
        config.data.sources[HOSTILE] = config.data.sources.pop("glot500")
        return config

    monkeypatch.setattr("easylm_mling.monitoring.report.collect.load_kept", load_hostile)
    folder = make_run(tmp_path / "run")
    for name in ("metrics.jsonl", "events.jsonl"):
        text = (folder / name).read_text(encoding="utf-8").replace('"glot500"', json.dumps(HOSTILE))
        (folder / name).write_text(text, encoding="utf-8")
    start = event(
        1e6, "start", 40, 4, hosts=HOSTILE, devices=HOSTILE, mesh={HOSTILE: HOSTILE}, versions={HOSTILE: HOSTILE}
    )
    end = event(1e6, "stopped", 40, 4, why=HOSTILE)
    with open(folder / "events.jsonl", "a", encoding="utf-8") as file:
        file.write("\n" + json.dumps(start) + "\n" + json.dumps(end) + "\n")
    with open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write("\n" + json.dumps({"kind": "export", "step": 40, "time": 1.0, "dtype": HOSTILE}) + "\n")
    history = collect(folder)
    assert HOSTILE in history.held_out and (HOSTILE, "ja") in history.languages
    text = page(history)
    reader = Reader(text)
    assert "script" not in reader.tags and "<script" not in text and reader.tags.count("style") == 1
    assert all(HOSTILE not in (name, value) for name, value in reader.attributes)
    # Legends, tooltips, rows of tables, the state at the top, attempts, saves, news and environment.
    assert "".join(reader.texts).count(HOSTILE) >= 25


def test_addresses_are_shown_without_keys():
    text = "paths: 'https://me:key@host/a.parquet?sig=SECRET&x=1'\nother: s3://bucket/x?y"
    assert without_secrets(text) == "paths: 'https://...@host/a.parquet?...'\nother: s3://bucket/x?..."


def test_a_run_that_has_not_begun_and_none_at_all(tmp_path, capsys):
    folder = make_run(tmp_path / "run")
    for name in ("metrics.jsonl", "events.jsonl"):
        (folder / name).unlink()
    assert main(["report", str(folder), "--output", str(tmp_path / "page.html")]) == 0
    assert "not begun" in "".join(Reader((tmp_path / "page.html").read_text()).texts)
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    assert "not a run's directory" in capsys.readouterr().err
    with pytest.raises(ConfigError):
        write_report(tmp_path)


def test_a_curve_of_any_length_keeps_its_peaks():
    curve, rng = Curve(200), random.Random(1)
    for x in range(100_000):
        curve.add(x, 50.0 if x == 70_001 else -50.0 if x == 31 else rng.random())
    points = curve.points
    assert 50 < len(points) <= 201 and points == sorted(points)
    assert (70_001, 50.0) in points and (31, -50.0) in points and points[-1][0] > 99_000
    curve.cut(60_000)
    assert curve.points[-1][0] < 60_000
    curve.add(60_000, 2.0)
    curve.add(60_001, None)
    assert curve.points[-1] == (60_000, 2.0)
    short = Curve()
    for x in (1, 2, 3, 2, 3):
        short.add(x, x * 10)
    assert short.points == [(1, 10.0), (2, 20.0), (3, 30.0)]


def test_a_long_run_is_held_in_bounded_memory_and_makes_a_small_page(run, tmp_path):
    folder = tmp_path / "long"
    shutil.copytree(run, folder)
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    with open(folder / "metrics.jsonl", "w") as file:
        for step in range(1, 8001):
            file.write(json.dumps({**line, "step": step, "loss": 1 / step}) + "\n")
    history = collect(folder)
    assert {len(c.points) for c in history.curves.values()} <= set(range(2001)) and len(
        history.curves["loss"].points
    ) > 900
    assert all(len(c.points) <= 400 for c in history.training.values())
    assert len(page(history)) < 1e6


def test_ticks_are_round_and_cover():
    assert _ticks(0, 10, log=False) == [0, 2, 4, 6, 8, 10] and _ticks(2.1, 8.3, log=False) == [2, 4, 6, 8, 10]
    assert _ticks(5, 5, log=False)[0] <= 5 <= _ticks(5, 5, log=False)[-1]
    assert _ticks(0.5, 300, log=True) == [0.1, 1, 10, 100, 1000] and _ticks(0.3, 1.8, log=True) == [0.2, 0.5, 1, 2]
    for low, high in ((1e-9, 1e5), (3, 3), (0.9, 1.1)):
        ticks = _ticks(low, high, log=True)
        assert ticks[0] <= low and ticks[-1] >= high and len(ticks) < 12


def test_a_chart_is_the_same_text_every_time_and_has_the_colours_of_its_page():
    lines = [Line("a", [(0, 1.0), (1, 3.0)], 9), Line("<b>", [(1, 2.0)], 1)]
    text = draw_svg("x", lines, marks=[(0.5, "restart"), (7, "outside")])
    assert text == draw_svg("x", lines, marks=[(0.5, "restart"), (7, "outside")])
    assert 'd="M 58 240 L 468 18 "' in text and "stroke-dasharray" in text and "outside" not in text
    assert {"var(--c1)", "var(--soft)", "var(--rule)"} <= set(re.findall(r"var\(--\w+\)", text))
    assert "#000000" not in text and "font-family" not in text and "<title>&lt;b&gt; 2 at 1 tokens</title>" in text
    Reader(text)


def test_names_are_drawn_as_they_are(tmp_path):
    """Also those that matplotlib would read as a formula."""
    from matplotlib.image import imread

    for name in ("$x$", "$x"):
        plot_losses(
            tmp_path / f"{len(name)}.png", [name], [{"step": s, "loss": 1, "sources": {name: 1}} for s in (0, 1)], []
        )
    assert imread(tmp_path / "3.png").shape == imread(tmp_path / "2.png").shape == (540, 1080, 4)
    assert (imread(tmp_path / "3.png") != imread(tmp_path / "2.png")).any()


def test_a_browser_shows_it_without_an_error(run, tmp_path):
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no chromium here (apt-get install chromium): the page was parsed, but not seen by a browser")
    write_report(run, tmp_path / "page.html")
    # The width of what is laid out, asked of the browser in a copy: the page itself runs nothing.
    text = (tmp_path / "page.html").read_text()
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
    asked = "<script>document.title = document.documentElement.scrollWidth + ' of ' + innerWidth</script></body>"
    (tmp_path / "asked.html").write_text(text.replace("</body>", asked))
    for width in (390, 1280):
        command = [
            browser,
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={tmp_path / 'profile'}",
        ]
        command += [f"--window-size={max(width, 500)},900", "--dump-dom", f"file://{tmp_path / 'asked.html'}"]
        shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
        laid_out, window = map(int, re.search(r"<title>(\d+) of (\d+)</title>", shown).groups())
        assert laid_out <= window, (laid_out, window)
        assert shown.count("<svg") > 8
