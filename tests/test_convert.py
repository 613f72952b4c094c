"""`data convert`: the same conversations from every format and order, none of an evaluation, and errors with a way out."""

import csv
import json
import random
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from easylm_mling.cli.main import main
from easylm_mling.config.conversations import ConversationConfig
from easylm_mling.data.conversations.messages import document
from easylm_mling.data.conversion.convert import convert
from easylm_mling.data.conversion.overlap import _UNITS, Overlap
from easylm_mling.data.conversion.tasks import ask, known_tasks
from easylm_mling.errors import ConfigError

PLACES = "부엌 마당 다락 창고 서재 골목 언덕 나루".split()


def nli_rows(count: int, seed: int = 0) -> list[dict]:
    rng = random.Random(seed)
    return [
        {
            "premise": f"{i}번째 상자는 {rng.choice(PLACES)}에 있고 그 옆에는 {rng.choice(PLACES)}에서 가져온 낡은 의자가 하나 놓여 있다",
            "hypothesis": f"상자는 {rng.choice(PLACES)}에 있다",
            "label": rng.choice([0, 1, 2]),
        }
        for i in range(count)
    ]


NLI = {
    "task": "nli",
    "fields": {"premise": "premise", "hypothesis": "hypothesis", "label": "label"},
    "labels": {"0": "함의", "1": "중립", "2": "모순"},
}


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=7)
    else:
        with open(path, "w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, rows[0].keys(), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return str(path)


def run(folder, name="out", **recipe) -> tuple[list[dict], dict]:
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(recipe, allow_unicode=True, sort_keys=False), encoding="utf-8")
    manifest = convert(file, folder / f"{name}.jsonl")
    lines = (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads((folder / f"{name}.manifest.json").read_bytes()) == json.loads(json.dumps(manifest))
    return [json.loads(line) for line in lines], manifest


def content(rows):
    return sorted(json.dumps(row["messages"], ensure_ascii=False) for row in rows)


def test_every_phrasing_of_every_task_has_its_fields_and_nothing_else():
    for name, task in known_tasks().items():
        values = {f: f"<{f}>{{labels}}" for f in (*task.fields, "labels", "source", "target")}
        for language, phrasings in task.phrasings.items():
            assert len(set(phrasings)) == 10, (name, language)
            for number, phrasing in enumerate(phrasings):
                text = ask(task, language, number, values)
                assert all(text.count(values[f]) == 1 for f in task.fields), phrasing
                assert ("<labels>" in text) == (task.answer == "label"), phrasing
                # What stood in a value is not filled in again.
                assert not set(re.findall(r"\{(\w+)\}", phrasing)) - values.keys()
        assert set(task.phrasings) == {"ko", "ja", "zh", "en"}


def test_formats_and_orders_give_the_same_conversations(tmp_path):
    rows = nli_rows(60)
    results = []
    for suffix in (".jsonl", ".csv", ".tsv", ".parquet"):
        shuffled = random.Random(suffix).sample(rows, len(rows))
        paths = [
            write_rows(tmp_path / suffix / f"{i}{suffix}", part)
            for i, part in enumerate((shuffled[:23], shuffled[23:]))
        ]
        made, manifest = run(tmp_path, suffix[1:], sets={"a": {**NLI, "paths": paths}}, most_rows_per_task=40, seed=3)
        results.append(content(made))
        assert len(made) == 40 == manifest["tasks"]["nli"] and manifest["sets"]["a"]["over_most_rows"] == 20
    assert all(result == results[0] for result in results)
    # Many phrasings, and another seed asks and chooses otherwise.
    assert len(manifest["sets"]["a"]["phrasings"]) >= 8
    other, _ = run(tmp_path, "other", sets={"a": {**NLI, "paths": paths}}, most_rows_per_task=40, seed=4)
    assert content(other) != results[0]
    for row in made:
        text = document({"messages": row["messages"]}, ConversationConfig())
        assert row["messages"][1]["content"] in ("함의", "중립", "모순") and b"{" in text


def test_a_cap_is_of_a_task_over_all_its_sets_and_every_set_gives_its_part(tmp_path):
    a, b = (write_rows(tmp_path / f"{n}.jsonl", nli_rows(n, n)) for n in (300, 100))
    made, _ = run(tmp_path, sets={"a": {**NLI, "paths": [a]}, "b": {**NLI, "paths": [b]}}, most_rows_per_task=200)
    counts = [sum(row["set"] == name for row in made) for name in "ab"]
    assert sum(counts) == 200 and 130 < counts[0] < 170


def test_all_tasks_convert_and_answers_are_as_they_stand(tmp_path):
    sets = {
        "c": {"task": "classification", "fields": {"text": "t", "label": "l"}, "labels": {"true": "yes", "false": "no"}, "language": "en"},
        "q": {"task": "qa", "fields": {"question": "q", "answer": "a.text"}, "language": "ja"},
        "r": {"task": "reading", "fields": {"context": "t", "question": "q", "answer": "a.text"}, "language": "zh"},
        "s": {"task": "summarisation", "fields": {"text": "t", "summary": "q"}},
        "t": {"task": "translation", "fields": {"text": "t", "translation": "q"}, "source_language": "ja", "target_language": "ko"},
        "m": {"task": "similarity", "fields": {"first": "t", "second": "q", "label": "n"}, "options": "0~5"},
    }  # fmt: skip
    row = {"t": " {question} 긴 글 ", "q": "what?", "a": {"text": ["an answer", "another"]}, "l": True, "n": 3.0}
    path = write_rows(tmp_path / "rows.jsonl", [row])
    made, manifest = run(tmp_path, sets={n: {**s, "paths": [path]} for n, s in sets.items()})
    answers = {r["set"]: r["messages"][1]["content"] for r in made}
    assert answers == {"c": "yes", "q": "an answer", "r": "an answer", "s": "what?", "t": "what?", "m": "3"}
    asked = {r["set"]: r["messages"][0]["content"] for r in made}
    assert "{question} 긴 글" in asked["r"] and "0~5" in asked["m"] and "yes, no" in asked["c"]
    assert "한국어" in asked["t"] and "{target}" not in asked["t"]
    assert manifest["output"]["rows"] == 6


def test_rows_with_text_of_an_evaluation_are_left_out_and_counted(tmp_path):
    rows = nli_rows(30)
    held = [r["premise"] for r in rows[:5]]
    # Other punctuation and case, inside a longer text, at any depth; and one that is too short to tell.
    evaluation = [{"story": [{"text": f"ABC, {held[0]}! 끝."}]}, {"q": held[1].replace(" ", "  ")}, {"q": "네"}]
    files = [
        write_rows(tmp_path / "kobest_test.jsonl", evaluation),
        write_rows(tmp_path / "more.csv", [{"x": h} for h in held[2:5]]),
    ]
    train = write_rows(
        tmp_path / "train.jsonl", [*rows, {"premise": "", "hypothesis": "b", "label": 0}, {"premise": "없다"}]
    )
    made, manifest = run(tmp_path, sets={"a": {**NLI, "paths": [train]}}, decontaminate={"paths": files, "ngram": 13})
    counts = manifest["sets"]["a"]
    assert (counts["read"], counts["contaminated"], counts["empty"], counts["written"]) == (32, 5, 2, 25)
    text = json.dumps(made, ensure_ascii=False)
    assert not any(h in text for h in held) and all(r["premise"] in text for r in rows[5:])
    about = manifest["decontamination"]
    assert about["texts"] == 6 and about["texts_too_short"] == 1 and len(about["files"]) == 2


WORDS = st.lists(st.sampled_from(["나무", "tree", "木", "カ", "7", "물"]), max_size=30)


@settings(max_examples=200, deadline=None)
@given(st.lists(WORDS, max_size=4), WORDS, st.integers(1, 6), st.integers(0, 4))
def test_overlap_is_that_of_plain_sets_of_n_grams(known, text, shortest, more):
    ngram = shortest + more
    overlap = Overlap(map(" ".join, known), ngram, shortest)
    plain = set()
    for words in known:
        length = min(len(words), ngram)
        if len(words) >= shortest:
            plain |= {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}
    own = {tuple(text[i : i + n]) for n in range(1, len(text) + 1) for i in range(len(text) - n + 1)}
    assert (" ".join(text) in overlap) == bool(plain & own) and len(overlap) == len(plain)


def test_words_are_letters_where_a_script_has_no_spaces():
    assert _UNITS.findall("日本語のtest、나무가 7그루") == ["日", "本", "語", "の", "test", "나무가", "7그루"]


def test_what_is_wrong_is_said_in_one_line_and_leaves_nothing(tmp_path, capsys):
    train = write_rows(tmp_path / "train.jsonl", nli_rows(10))
    test = write_rows(tmp_path / "klue-nli-test.jsonl", nli_rows(3))
    split = write_rows(tmp_path / "split.csv", [{**r, "split": "dev"} for r in nli_rows(3)])
    other = write_rows(tmp_path / "label.jsonl", [*nli_rows(3), {**nli_rows(1)[0], "label": 7}])
    empty = write_rows(tmp_path / "empty.jsonl", [{"premise": "", "hypothesis": "", "label": 1}] * 3)
    (tmp_path / "table.txt").write_text("a\n")
    good = {**NLI, "paths": [train]}
    for one, more, message in (
        ({**good, "task": "nly"}, {}, "no such task; known are classification, nli, qa"),
        ({**good, "fields": {**NLI["fields"], "premise": "sentence1"}}, {}, "row 1: sets.a.fields.premise='sentence1' is not there; it has premise, hypothesis, label"),
        ({**good, "fields": {**NLI["fields"], "text": "premise"}}, {}, "sets.a.fields: nli has no field text"),
        ({**good, "fields": {"premise": "premise", "label": "label"}}, {}, "sets.a.fields.hypothesis is missing"),
        ({**good, "paths": [other]}, {}, r"label.jsonl, row 4: the label is '7', and sets.a.labels has 0, 1, 2; add it there, or to leave_out"),
        ({**good, "labels": {}}, {}, "sets.a: give labels"),
        ({**good, "language": "fr"}, {}, "must be one of ko, ja, zh, en"),
        ({**good, "paths": [test]}, {}, "named like an evaluation split"),
        ({**good, "paths": [split], "split_field": "split"}, {}, r"no row is left of 3 \(3 other split\)"),
        ({**good, "paths": [empty]}, {}, r"no row is left of 3 \(3 empty\)"),
        ({**good, "paths": [str(tmp_path / "nothing*")]}, {}, "matches no file"),
        ({**good, "paths": [str(tmp_path / "table.txt")]}, {}, "has no fields; name .jsonl, .csv"),
        (good, {"decontaminate": {"paths": [empty]}}, "no text of 8 words or more"),
        (good, {"sed": 1}, "unknown key 'sed'; did you mean 'seed'"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            run(tmp_path, sets={"a": one}, **more)
        assert not list(tmp_path.glob("out.*json*"))
    left, manifest = run(tmp_path, sets={"a": {**good, "paths": [other], "leave_out": ["7"]}})
    assert len(left) == 3 and manifest["sets"]["a"]["label_left_out"] == 1
    assert main(["data", "convert", str(tmp_path / "out.yaml"), str(tmp_path / "out.jsonl")]) == 2
    assert "out.jsonl: already exists; remove it, or name another output" in capsys.readouterr().err
    assert main(["data", "convert", str(tmp_path / "out.yaml"), str(tmp_path / "again.jsonl")]) == 0
    said = capsys.readouterr().out
    assert "a: 3 of 4 rows (left out: 1 label left out)" in said and "3 conversations written" in said
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "out.jsonl").read_bytes()


def test_case_and_width_do_not_hide_an_overlap():
    assert "he saw the old oak box" in Overlap(["THE ｏｌｄ OAK, box!"], 4, 4)
