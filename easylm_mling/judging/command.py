"""The command `eval MODEL --judge FILE`: answers, judgements, and the table of marks."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import orjson
from rich.console import Console

from easylm_mling.config import to_tree
from easylm_mling.data.tokenization.tokenizer import Tokenizer
from easylm_mling.errors import ConfigError, check, check_format
from easylm_mling.evaluation.command import Meter
from easylm_mling.evaluation.options import EvalOptions, identity, place
from easylm_mling.evaluation.request_cache import RequestCache
from easylm_mling.formatting import markdown_table
from easylm_mling.inference.dialogue import open_dialogue
from easylm_mling.inference.generate import find_tokenizer, load_model, read_model
from easylm_mling.judging.answering import Answer, Answerer, read_answers
from easylm_mling.judging.asking import Judge, Reply, Request
from easylm_mling.judging.questions import Question, load_questions, questions_digest, words_digest
from easylm_mling.judging.settings import AnswerSettings, load_settings
from easylm_mling.judging.verdicts import (
    Compared,
    Judged,
    compared,
    comparison_summary,
    judged,
    mark_difference,
    mark_requests,
    pair_requests,
    summary,
)
from easylm_mling.monitoring.console import say, warn
from easylm_mling.storage.atomic import atomic_file, write_atomically

FORMAT = 1
_NO_LIMIT = 1 << 30  # tokens of a prompt: the answerer refuses one that does not fit


@dataclass(frozen=True)
class JudgedModel:
    """What judge-NAME.json and judge-NAME.jsonl hold of one model."""

    about: dict
    answers: dict[str, str]
    marks: dict[str, float]


def judge_model(
    options: EvalOptions, settings_file: str, agrees: Callable[[str], bool] | None, console: Console
) -> dict:
    """Let a model answer, let the judge mark the answers, print the table and write it; returns the summary.

    `options.model` may also be a .jsonl of answers. `agrees` is asked about the cost; None: nobody is there.

    All that can be checked is, before a model is loaded or a judgement is paid for. Raises ConfigError for what is wrong,
    and TrainingStopped if the endpoint fails; what was answered and judged is kept, and the same command goes on.
    """
    settings = load_settings(settings_file)
    questions = load_questions(settings.questions)
    name = options.suite.name
    asked = {"judge": settings.model, "words": words_digest(), "questions": questions_digest(questions)}
    baseline = _read_baseline(options.baseline, asked) if options.baseline else None
    check(not settings.pairwise or baseline is not None, f"{settings_file}: pairwise needs --baseline judge-NAME.json")
    from_file = options.model.endswith(".jsonl")
    given = {"--step": options.step, "--tokenizer": options.tokenizer, "--max-length": options.max_length}
    stray = next((flag for flag, value in given.items() if from_file and value is not None), None)
    check(stray is None, f"{stray}: {options.model} holds answers, and no model is asked; leave it out")
    answers = read_answers(options.model, questions) if from_file else None
    folder = Path(options.output or f"{options.model}-judged") if from_file else None
    folder = folder or place(options)[1]
    judge = Judge(settings, folder / f"judgements-{name}.jsonl")
    try:
        if warning := judge.check_endpoint():
            warn(console, warning)
        answers = answers or _answer(options, settings.answers, questions, folder, console)
        requests = mark_requests(questions, answers, settings.repeats)
        ours = {q.id: answers[q.id].text for q in questions}
        if settings.pairwise:
            assert baseline
            requests += pair_requests(questions, ours, baseline.answers)
        _confirm_cost(judge, requests, settings.model, agrees, console)
        meter = Meter(console)
        replies = list(judge.ask(requests, lambda done, of: meter("judgements", done, of)))
    finally:
        judge.close()
    marks = len(questions) * settings.repeats
    items = judged(questions, answers, replies[:marks])
    pairs = compared(questions, ours, baseline.answers, replies[marks:]) if settings.pairwise and baseline else []
    read, written = (sum(getattr(r, kind) for r in replies) for kind in ("input_tokens", "output_tokens"))
    about = {
        "model": Path(options.model.rstrip("/")).name,
        "step": None if from_file else place(options)[0],
        **asked,
        "settings": to_tree(settings),
    }
    tree = {
        "format": FORMAT, "about": about, **summary(items), "judgements": len(replies),
        "failures": sum(bool(r.failure) for r in replies), "tokens": [read, written], "cost": judge.cost(read, written),
    }  # fmt: skip
    if baseline:
        own = {i.question.id: i.mark for i in items if i.mark is not None}
        difference, error, count = mark_difference(own, baseline.marks)
        tree["baseline"] = {"about": baseline.about, "difference": difference, "error": error, "questions": count}
    if pairs:
        tree["pairs"] = comparison_summary(pairs)
    _write(folder, name, tree, items, pairs)
    _show(console, tree, folder, name)
    return tree


def _answer(
    options: EvalOptions, settings: AnswerSettings, questions: list[Question], folder: Path, console: Console
) -> dict[str, Answer]:
    tokenizer = Tokenizer(str(options.tokenizer or find_tokenizer(options.model, options.step)), "--tokenizer ")
    # What may be missing or wrong is found before the parameters are loaded.
    dialogue = open_dialogue(options.model, options.step, tokenizer, settings.template, _NO_LIMIT)
    model = read_model(options.model, options.step)
    tokenizer.check_model(model)
    answerer = Answerer(dialogue, model, tokenizer, settings, options.dtype, options.window(model))
    digest = identity(options, place(options)[0], answerer.model, tokenizer)
    cache = RequestCache(folder / f"answers-{digest}.jsonl")
    _, params, _ = load_model(options.model, step=options.step)
    try:
        return answerer.write(params, questions, cache, Meter(console))
    finally:
        cache.close()


def _confirm_cost(
    judge: Judge, requests: list[Request], name: str, agrees: Callable[[str], bool] | None, console: Console
):
    """Say what the judgements will cost, and go on only with consent. What is in the file of replies costs nothing."""
    left = judge.left(requests)
    if not left:
        return
    read, written, cost = judge.foretold(requests)
    price = "the price is unknown (input_price and output_price)" if cost is None else f"about ${cost:.2f}"
    text = f"{len(left):,} judgements by {name}: about {read:,} tokens read and {written:,} written, {price}"
    say(console, text)
    check(agrees is not None, f"{text}: no one is here to agree; say --yes")
    assert agrees
    if not agrees("ask the judge?"):
        raise ConfigError("nothing was asked; the model's answers are kept")


def ask_person(question: str) -> bool:
    """Ask on the terminal; returns True for yes."""
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _read_baseline(path: str, asked: dict) -> JudgedModel:
    file = Path(path)
    try:
        tree = orjson.loads(file.read_bytes())
        rows = [orjson.loads(line) for line in file.with_suffix(".jsonl").read_bytes().splitlines()]
    except (OSError, ValueError) as error:
        why = " ".join(str(error).split())[:150]
        raise ConfigError(
            f"--baseline {path}: cannot be read ({why}); name a judge-NAME.json that eval --judge wrote"
        ) from None
    check(isinstance(tree, dict) and "marks" in tree, f"--baseline {path}: holds no marks; name a judge-NAME.json")
    check_format(path, "judge's results", tree.get("format"), FORMAT, "judge again")
    other = [key for key in asked if tree["about"].get(key) != asked[key]]
    check(
        not other,
        f"--baseline {path}: is of {' and '.join(f'other {k}' for k in other)}; marks of both models must be made alike",
    )
    answers = {r["id"]: r["answer"] for r in rows}
    return JudgedModel(tree["about"], answers, {r["id"]: r["mark"] for r in rows if r["mark"] is not None})


def _write(folder: Path, name: str, tree: dict, items: list[Judged], pairs: list[Compared]):
    folder.mkdir(parents=True, exist_ok=True)
    outcomes = {p.question.id: p for p in pairs}
    with atomic_file(folder / f"judge-{name}.jsonl") as file:
        for i in items:
            pair = outcomes.get(i.question.id)
            row = {
                **vars(i.question), "answer": i.answer.text, "ended": i.answer.ended, "mark": i.mark, "marks": i.marks,
                "replies": [_reply(r) for r in i.replies],
                **({"outcome": pair.outcome, "agreed": pair.agreed, "pair": [_reply(r) for r in pair.replies]} if pair else {}),
            }  # fmt: skip
            file.write(json.dumps(row, ensure_ascii=False).encode(errors="backslashreplace") + b"\n")
    write_atomically(folder / f"judge-{name}.md", "\n".join([f"# {name}", "", *_lines(tree), ""]).encode())
    write_atomically(folder / f"judge-{name}.json", orjson.dumps(tree, option=orjson.OPT_INDENT_2))


def _reply(reply: Reply) -> dict:
    return {"failure": reply.failure} if reply.failure else {"text": reply.text}


def _lines(tree: dict) -> list[str]:
    rows = [
        (group, m["questions"], m["marked"], _number(m["mean"]), _number(m["error"]), _number(m["percent"], 1))
        for group, m in tree["marks"].items()
    ]
    lines = markdown_table(("questions", "asked", "marked", "mark (0 to 5)", "±", "of 100"), rows)
    lines += ["", f"- Judge: {tree['about']['judge']}. {tree['judgements']} judgements, {tree['failures']} failures, "
                  f"{tree['without a mark']} replies without a mark; none of these counts as 0."]  # fmt: skip
    if tree["repeats agree"] is not None:
        lines.append(f"- Repeats of one judgement gave one mark in {tree['repeats agree']:.0%} of the questions.")
    lines.append(
        f"- Answers: {tree['letters in an answer']:.0f} letters on average, "
        f"{_percent(tree['answers in its language'])} in the question's language, {tree['empty answers']} empty"
        + (
            "."
            if tree["answers ended by themselves"] is None
            else f", {tree['answers ended by themselves']:.0%} ended by themselves."
        )
    )
    if base := tree.get("baseline"):
        lines.append(
            f"- {_number(base['difference'], sign='+')} ± {_number(base['error'])} marks from {base['about']['model']}, paired "
            f"over {base['questions']} questions."
        )
    if pairs := tree.get("pairs"):
        disagree = pairs["orders disagree"]
        lines.append(
            f"- Compared in both orders: {pairs['wins']} wins, {pairs['losses']} losses, {pairs['ties']} ties; win rate "
            f"{_number(pairs['win rate'])} ± {_number(pairs['error'])}. The orders disagree in "
            f"{_percent(disagree)} of them (a tie). {pairs['without a verdict']} without a verdict."
        )
        if pairs["the longer one won"] is not None:
            lines.append(
                f"- The longer answer won {pairs['the longer one won']:.0%} of what was won; ours are "
                f"{pairs['letters longer']:+.0f} letters longer."
            )
    return lines


def _number(value: float | None, digits: int = 2, sign: str = "") -> str:
    return "-" if value is None or value != value else f"{value:{sign}.{digits}f}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def _show(console: Console, tree: dict, folder: Path, name: str):
    for line in _lines(tree):
        say(console, line)
    if tree["failures"]:
        warn(console, f"{tree['failures']} judgements failed; the same command asks for them again")
    if tree["cost"] is not None:
        say(
            console,
            f"all judgements together read {tree['tokens'][0]:,} tokens and wrote {tree['tokens'][1]:,}: ${tree['cost']:.2f}",
        )
    say(console, f"written to {folder}/judge-{name}.md, .json and .jsonl")
