"""`eval --judge`: marks with their errors, both orders, resumed without asking twice, whatever the endpoint does."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("openai", reason="needs the extra [judge]")
pytest.importorskip("lm_eval", reason="needs the extra [eval]")

from judge_server import WAYS_TO_FAIL, serve  # noqa: E402

from easylm_mling.cli.main import main  # noqa: E402
from easylm_mling.errors import ConfigError, TrainingStopped  # noqa: E402
from easylm_mling.evaluation.options import EvalOptions  # noqa: E402
from easylm_mling.evaluation.scoring.suites import Suite  # noqa: E402
from easylm_mling.judging.command import judge_model  # noqa: E402
from easylm_mling.judging.questions import (  # noqa: E402
    language_of,
    load_questions,
    mark_messages,
    pair_messages,
    read_mark,
    read_verdict,
    without_end_marks,
)
from easylm_mling.judging.settings import load_settings  # noqa: E402
from easylm_mling.monitoring.console import make_console  # noqa: E402

ROOT = Path(__file__).parent.parent
KEY = "key-of-the-test"
LANGUAGES = ("ko", "ja", "zh", "en")
QUIET = make_console(quiet=True)


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.001)


def examined(messages):
    """What stands between the lines of dashes: the question, perhaps a reference, and the answers."""
    return [part.strip() for part in messages[1]["content"].split("-----")[1::2]]


def by_stars(messages):
    """A judge that counts the stars of an answer, or prefers the one with more."""
    if '"better"' in messages[1]["content"]:
        first, second = (a.count("*") for a in examined(messages)[-2:])
        return f'So.\n{{"better": "{"tie" if first == second else "first" if first > second else "second"}"}}'
    return f'Because.\n{{"score": {examined(messages)[-1].count("*")}}}'


@pytest.fixture
def judge():
    with serve(by_stars) as server:
        yield server


def write(folder, url, stars, name="answers", **settings):
    """A settings file, 12 questions, and answers with so many stars; returns the options."""
    rows = [
        {"id": f"q{n}", "language": LANGUAGES[n % 4], "question": f"Question {n}?", "category": "abc"[n % 3]}
        for n in range(12)
    ]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    answers = folder / f"{name}.jsonl"
    answers.write_text(
        "\n".join(json.dumps({"id": f"q{n}", "answer": f"A{n} {'*' * s}</s>"}) for n, s in enumerate(stars))
    )
    tree = {"endpoint": url, "model": "strong", "questions": "questions.jsonl", "attempts": 1} | settings
    (folder / "j.yaml").write_text(json.dumps(tree))
    return EvalOptions(str(answers), Suite("j", ()), output=str(folder / f"{name}-out"))


def judge_answers(options, console=QUIET, agrees=lambda _: True):
    return judge_model(options, str(Path(options.model).parent / "j.yaml"), agrees, console)


def asked_of(server):
    return [examined(body["messages"])[-1] for body in server.asked]


def test_marks_have_their_errors_by_language_and_category(judge, tmp_path, capsys):
    stars = [0, 1, 2, 3, 4, 5, 5, 4, 3, 2, 1, 0]
    options = write(tmp_path, judge.url, stars, input_price=2.0, output_price=8.0)
    tree = judge_answers(options, make_console())
    marks = tree["marks"]
    assert marks["all"]["mean"] == 2.5 and marks["all"]["percent"] == 50 and marks["all"]["marked"] == 12
    assert marks["all"]["error"] == pytest.approx(np.std(stars, ddof=1) / 12**0.5)
    assert marks["ko"]["mean"] == np.mean([0, 4, 3]) and marks["b"]["mean"] == np.mean([1, 4, 4, 1])
    # End marks are gone, the judge is asked in the question's language, once for each.
    assert sorted(asked_of(judge)) == sorted(f"A{n} {'*' * s}".strip() for n, s in enumerate(stars))
    assert all(
        ("질문" in b["messages"][1]["content"])
        == ("Question 4?" in str(b) or "Question 0?" in str(b) or "Question 8?" in str(b))
        for b in judge.asked
    )
    assert {(b["temperature"], b["seed"], b["max_tokens"]) for b in judge.asked} == {(0.0, 0, 1024)}
    assert "top_p" not in judge.asked[0]
    assert tree["tokens"] == [1200, 120] and tree["cost"] == pytest.approx((1200 * 2 + 120 * 8) / 1e6)
    page = (tmp_path / "answers-out" / "judge-j.md").read_text()
    assert "| all | 12 | 12 | 2.50 |" in page and "| all | 12 | 12 | 2.50 |" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "answers-out" / "judge-j.jsonl").read_text().splitlines()]
    assert [r["mark"] for r in rows] == stars and rows[3]["replies"][0]["text"].startswith("Because.")


def test_nothing_is_asked_twice_and_failures_are_no_zeros(judge, tmp_path):
    options = write(tmp_path, judge.url, [5] * 12, parallel=3)
    judge.fail_every = 2
    tree = judge_answers(options)
    assert tree["failures"] == judge.failed == 6 == len(WAYS_TO_FAIL)
    assert tree["marks"]["all"] == {"questions": 12, "marked": 6, "mean": 5, "error": 0, "percent": 100}
    judge.fail_every = 0
    tree = judge_answers(options)
    assert len(judge.asked) == 18 and tree["failures"] == 0 and tree["marks"]["all"]["marked"] == 12
    judge_answers(options)
    assert len(judge.asked) == 18
    # Another judge, or another way to ask it, is asked anew.
    judge.models.append("other")
    judge_answers(write(tmp_path, judge.url, [5] * 12, model="other"))
    judge_answers(write(tmp_path, judge.url, [5] * 12, temperature=None))
    assert len(judge.asked) == 18 + 24 and "temperature" not in judge.asked[-1]


def test_an_endpoint_that_errs_is_asked_again(judge, tmp_path):
    judge.fail_every, judge.ways = 2, (429, 500)
    tree = judge_answers(write(tmp_path, judge.url, [4] * 12, attempts=4, parallel=1))
    assert tree["failures"] == 0 and judge.failed >= 11


def test_another_endpoint_of_the_same_name_is_asked_anew(judge, tmp_path):
    judge_answers(write(tmp_path, judge.url, [3] * 12))
    with serve(lambda messages: '{"score": 1}') as other:
        tree = judge_answers(write(tmp_path, other.url, [3] * 12))
        assert len(other.asked) == 12 and tree["marks"]["all"]["mean"] == 1


def test_the_language_of_an_answer_is_told_only_where_it_is_known(judge, tmp_path):
    options = write(tmp_path, judge.url, [2] * 12)
    assert judge_answers(options)["answers in its language"] == 0.25  # all are written in English letters
    file = tmp_path / "questions.jsonl"
    for code in ("ko", "ja", "zh", "en"):
        file.write_text(file.read_text().replace(f'"language": "{code}"', '"language": "fr"'))
    assert judge_answers(options)["answers in its language"] is None


def test_replies_that_a_kill_cut_short_are_asked_for_again(judge, tmp_path):
    options = write(tmp_path, judge.url, [3] * 12)
    judge_answers(options)
    file = tmp_path / "answers-out" / "judgements-j.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:7]) + lines[7][:30])
    assert judge_answers(options)["marks"]["all"]["mean"] == 3
    assert len(judge.asked) == 12 + 5


def test_an_endpoint_that_never_answers_ends_the_command_and_keeps_all(judge, tmp_path):
    options = write(tmp_path, judge.url, [3] * 12, parallel=2)
    judge.fail_every, judge.ways = 1, (500,)
    with pytest.raises(TrainingStopped, match="10 requests failed and none was answered .*the same command goes on"):
        judge_answers(options)
    judge.fail_every = 0
    assert judge_answers(options)["marks"]["all"]["marked"] == 12


def test_replies_without_a_mark_are_counted_apart(judge, tmp_path):
    judge.reply = lambda messages: "I cannot say." if "A1" in examined(messages)[-1] else by_stars(messages)
    tree = judge_answers(write(tmp_path, judge.url, [2] * 12))
    assert tree["without a mark"] == 3 and tree["failures"] == 0
    assert tree["marks"]["all"]["marked"] == 9 and tree["marks"]["all"]["mean"] == 2


def test_repeats_show_whether_the_judge_agrees_with_itself(judge, tmp_path):
    tree = judge_answers(write(tmp_path, judge.url, [2] * 12, repeats=3))
    assert tree["judgements"] == 36 and tree["repeats agree"] == 1 and {b["seed"] for b in judge.asked} == {0, 1, 2}
    moods = iter(range(100))
    judge.reply = lambda messages: f'{{"score": {next(moods) % 2 + 1}}}'
    tree = judge_answers(write(tmp_path, judge.url, [1] * 12, repeats=3, parallel=1))
    assert tree["repeats agree"] == 0


def test_both_orders_are_compared_and_a_judge_of_places_says_nothing(judge, tmp_path):
    base = judge_answers(write(tmp_path, judge.url, [2] * 12, "base"))
    assert "pairs" not in base
    ours = [3, 3, 3, 3, 3, 3, 3, 2, 2, 2, 1, 1]
    options = write(tmp_path, judge.url, ours, "new", pairwise=True)
    options = replace(options, baseline=str(tmp_path / "base-out" / "judge-j.json"))
    tree = judge_answers(options)
    pairs = tree["pairs"]
    assert (pairs["wins"], pairs["ties"], pairs["losses"]) == (7, 3, 2) and pairs["orders disagree"] == 0
    assert pairs["win rate"] == pytest.approx(8.5 / 12)
    difference = np.array(ours) - 2
    assert tree["baseline"]["difference"] == pytest.approx(difference.mean())
    assert tree["baseline"]["error"] == pytest.approx(difference.std(ddof=1) / 12**0.5)
    judge.reply = lambda messages: '{"better": "first"}' if '"better"' in messages[1]["content"] else by_stars(messages)
    (tmp_path / "new-out" / "judgements-j.jsonl").unlink()
    pairs = judge_answers(options)["pairs"]
    assert pairs["orders disagree"] == 1 and pairs["win rate"] == 0.5 and pairs["error"] == 0 and pairs["ties"] == 0


def test_a_baseline_of_other_questions_is_refused(judge, tmp_path):
    judge_answers(write(tmp_path, judge.url, [2] * 12, "base"))
    options = write(tmp_path, judge.url, [3] * 12, "new")
    options = replace(options, baseline=str(tmp_path / "base-out" / "judge-j.json"))
    file = tmp_path / "questions.jsonl"
    file.write_text(file.read_text().replace("Question 3?", "Question three?"))
    with pytest.raises(ConfigError, match="is of other questions; marks of both models must be made alike"):
        judge_answers(options)


def test_nothing_is_asked_without_consent_to_the_cost(judge, tmp_path):
    options = write(tmp_path, judge.url, [2] * 12, input_price=1000.0, output_price=1000.0)
    with pytest.raises(
        ConfigError, match=r"12 judgements by strong: about [\d,]+ tokens read and 3,600 written, about \$\d"
    ):
        judge_answers(options, agrees=None)
    said = []
    with pytest.raises(ConfigError, match="nothing was asked"):
        judge_answers(options, agrees=lambda text: bool(said.append(text)))
    assert said == ["ask the judge?"] and not judge.asked
    judge_answers(options, agrees=lambda _: True)
    judge_answers(options, agrees=None)  # all is there, so nothing is asked
    assert len(judge.asked) == 12


def test_the_key_is_shown_and_stored_nowhere(judge, tmp_path, capsys):
    judge.fail_every, judge.ways = 2, (500,)  # an endpoint that repeats the key in its errors
    judge_answers(write(tmp_path, judge.url, [2] * 12), make_console())
    written = b"".join(f.read_bytes() for f in tmp_path.rglob("*") if f.is_file())
    assert b"InternalServerError" in written and KEY.encode() not in written
    out = capsys.readouterr()
    assert KEY not in out.out + out.err


def test_what_is_wrong_is_told_in_one_line(judge, tmp_path, monkeypatch):
    options = write(tmp_path, judge.url, [2] * 12)

    def refused(match, options=options, **settings):
        if settings:
            options = write(tmp_path, judge.url, [2] * 12, **settings)
        with pytest.raises(ConfigError, match=match) as error:
            judge_answers(options)
        assert "\n" not in str(error.value) and KEY not in str(error.value) and not judge.asked

    refused("has no model 'weak'; it has strong", model="weak")
    refused("endpoint='ftp://x' must be a URL", endpoint="ftp://x")
    refused("holds a name or a key", endpoint="http://me:secret@here/v1")
    refused("cannot be reached", endpoint="http://127.0.0.1:9/v1")
    refused("unknown key 'atempts'; did you mean 'attempts'", atempts=3)
    refused("pairwise needs --baseline", pairwise=True)
    refused("answers.max_new_tokens=0 must be positive", answers={"max_new_tokens": 0})
    refused("the environment has no NOT_THERE", key_variable="NOT_THERE")
    options = write(tmp_path, judge.url, [2] * 11)
    refused("has no answer to q11", options)
    refused("--step: .* holds answers, and no model is asked", replace(options, step=3))
    options = write(tmp_path, judge.url, [2] * 12)
    (tmp_path / "questions.jsonl").write_text('{"id": "a", "language": "en", "question": 3}')
    refused("line 1: a question has the texts id, language and question", options)
    options = write(tmp_path, judge.url, [2] * 12)
    monkeypatch.setenv("OPENAI_API_KEY", "another")
    refused("refuses the key in OPENAI_API_KEY", options)


@pytest.mark.parametrize(
    "reply, mark",
    [
        ('Good.\n{"score": 4}', 4), ('{"score": "3.5"}', 3.5), ('{"score": 2/5}', 2), ('{"score": 6}', None), ('{"score": -1}', None),
        ("4", None), ("", None), ('At first {"score": 1}, but then {"score": 5}', 5), ('```json\n{"reason": "x", "score": 0}\n```', 0),
    ],
)  # fmt: skip
def test_marks_are_read(reply, mark):
    assert read_mark(reply) == mark


def test_verdicts_languages_and_end_marks_are_read():
    assert read_verdict('x {"better": "Second"}') == "second" and read_verdict("the first") is None
    told = {
        "네, 그렇습니다": "ko",
        "はい、GPTです": "ja",
        "漢字だけ": "ja",
        "是的，没错": "zh",
        "Yes": "en",
        "Да, конечно": None,
        "42": None,
    }
    assert {text: language_of(text) for text in told} == told
    assert without_end_marks("Yes.</s> <|eot_id|>\n") == "Yes." and without_end_marks("a </s> b") == "a </s> b"


def test_a_text_that_looks_like_the_form_stays_as_it_is():
    question = load_questions(str(ROOT / "data/judge/questions.jsonl"))[0]
    assert question.reference
    for messages in (
        mark_messages(question, "{question} {answer} \\1"),
        pair_messages(question, "{second}", "{first}"),
    ):
        assert [p for p in examined(messages)][0] == question.question and examined(messages)[1] == question.reference
    assert examined(mark_messages(question, "{question} {answer} \\1"))[-1] == "{question} {answer} \\1"
    assert examined(pair_messages(question, "{second}", "{first}"))[-2:] == ["{second}", "{first}"]


def test_our_questions_and_settings_are_whole():
    settings = load_settings(str(ROOT / "configs/judge/sixty.yaml"))
    questions = load_questions(settings.questions)
    assert len(questions) == 60
    for language in LANGUAGES:
        own = [q for q in questions if q.language == language]
        assert len(own) == 15 and len({q.category for q in own}) == 6
        assert all(language_of(q.question) == language for q in own)
        for messages in (mark_messages(own[0], "x"), pair_messages(own[0], "x", "y")):
            assert language_of(messages[0]["content"]) == language and not re.search(r"\{\w+\}", messages[1]["content"])


@pytest.mark.slow
def test_a_models_own_answers_are_written_once(judge, one_device, tmp_path, monkeypatch, capsys):
    from eval_models import save

    from easylm_mling.judging import answering

    model = save(tmp_path / "model", num_hidden_layers=1)
    write(tmp_path, judge.url, [0] * 12, answers={"template": "alpaca", "max_new_tokens": 8, "rows": 5})
    judge.reply = lambda messages: f'{{"score": {len(examined(messages)[-1]) % 6}}}'
    command = ["eval", str(model), "--judge", str(tmp_path / "j.yaml"), "--yes", "--output", str(tmp_path / "out")]
    assert main(command) == 0
    rows = [json.loads(line) for line in (tmp_path / "out" / "judge-j.jsonl").read_text().splitlines()]
    assert len({r["answer"] for r in rows}) > 1 and len(judge.asked) <= 12
    for name in ("judge-j.md", "judgements-j.jsonl"):
        (tmp_path / "out" / name).unlink()
    monkeypatch.setattr(answering, "generate", None)  # all answers are kept
    asked = len(judge.asked)
    assert main(command) == 0 and len(judge.asked) == 2 * asked
    assert [json.loads(line)["answer"] for line in (tmp_path / "out" / "judge-j.jsonl").read_text().splitlines()] == [
        r["answer"] for r in rows
    ]


@pytest.mark.parametrize(
    "flag", ["--limit 3", "--shots 0", "--data kept", "--form chat", "--template alpaca", "--include-path x", "--all"]
)
def test_flags_of_suites_are_refused_beside_a_judge(flag, tmp_path, capsys):
    assert main(["eval", "model", "--judge", str(tmp_path / "j.yaml"), *flag.split()]) == 2
    assert f"{flag.split()[0]}: is of suites and tasks" in capsys.readouterr().err
