"""Rows of every format are the conversations that they mean, from every kind of file, and the rest is bad with its reason."""

import json

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from easylm_mling.config import ConversationConfig
from easylm_mling.config.conversations import FORMATS
from easylm_mling.data.conversations.messages import QUESTION_LEFT_OUT, document, messages_of, notes_of
from easylm_mling.data.conversations.reading import read_conversations
from easylm_mling.data.sources.readers import BadRecord
from easylm_mling.errors import ConfigError

S, U, A = "system", "user", "assistant"


def turns(*pairs):
    return [{"role": role, "content": text} for role, text in pairs]


def openai(*pairs, **more):
    return {"messages": turns(*pairs), **more}


TWO = [(U, "안녕?"), (A, "네."), (U, "もっと"), (A, "はい。")]
# (format, row, settings, the messages that it means)
GOOD = [
    ("messages", openai(*TWO), {}, turns(*TWO)),
    ("messages", openai((S, "Be kind."), *TWO), {}, turns((S, "Be kind."), *TWO)),
    ("messages", openai((S, " "), *TWO), {}, turns(*TWO)),
    ("messages", openai(("developer", "d"), *TWO), {}, turns((S, "d"), *TWO)),
    ("messages", {"messages": json.dumps(turns(*TWO))}, {}, turns(*TWO)),
    (
        "messages",
        {"messages": [{"role": U, "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                      {"role": A, "content": "c", "train": False}, {"role": U, "content": "d"},
                      {"role": A, "content": "e", "train": True}]},
        {},
        [*turns((U, "ab")), {"role": A, "content": "c", "train": False}, *turns((U, "d"), (A, "e"))],
    ),
    ("messages", {"chat": [{"who": U, "says": "q"}, {"who": "bard", "says": "a", "weight": 0}]},
     {"keys": {"messages": "chat", "role": "who", "content": "says", "train": "weight"}, "roles": {"bard": A}},
     [*turns((U, "q")), {"role": A, "content": "a", "train": False}]),
    ("sharegpt", {"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, {},
     turns((S, "s"), (U, "q"), (A, "a"))),
    ("sharegpt", {"system": "s", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, {},
     turns((S, "s"), (U, "q"), (A, "a"))),
    ("alpaca", {"instruction": "q", "output": "a"}, {}, turns((U, "q"), (A, "a"))),
    ("alpaca", {"instruction": "q", "input": "", "output": "a", "system": None}, {}, turns((U, "q"), (A, "a"))),
    ("alpaca", {"instruction": "q", "input": "x", "output": "a", "system": "s", "history": [["1", "2"], ["3", "4"]]}, {},
     [*turns((S, "s"), (U, "1"), (A, "2"), (U, "3"), (A, "4")), {"role": U, "content": "q", "input": "x"}, *turns((A, "a"))]),
    ("alpaca", {"instruction": "q", "context": "x", "response": "a"}, {"keys": {"input": "context", "output": "response"}},
     [{"role": U, "content": "q", "input": "x"}, *turns((A, "a"))]),
    ("question", {"id": "7", "system_prompt": "s", "question": "q", "response": "a"}, {}, turns((S, "s"), (U, "q"), (A, "a"))),
    ("question", {"system_prompt": "", "question": "q", "response": "a"}, {}, turns((U, "q"), (A, "a"))),
    ("prompt", {"prompt": "q", "completion": "a"}, {}, turns((U, "q"), (A, "a"))),
    ("prompt", {"prompt": turns((S, "s"), (U, "q")), "completion": turns((A, "a"))}, {}, turns((S, "s"), (U, "q"), (A, "a"))),
    ("guanaco", {"text": "### Human: q### Assistant: a\n### Human: r\n\n### Assistant: b"}, {}, turns((U, "q"), (A, "a"), (U, "r"), (A, "b"))),
    ("guanaco", {"text": "### Human: q### Assistant: write ### Assistant: so"}, {}, turns((U, "q"), (A, "write ### Assistant: so"))),
    ("guanaco", {"text": "### 사람: q ### 기계: a"}, {"roles": {"### 사람:": U, "### 기계:": A}}, turns((U, "q"), (A, "a"))),
]  # fmt: skip

# (format, row, the reason)
BAD = [
    ("messages", openai((U, "q")), "no answer"),
    ("messages", openai((A, "a")), "roles out of order: message 1 is of the assistant, not the user"),
    ("messages", openai((S, "s"), (U, "q"), (U, "q"), (A, "a")), "roles out of order: message 3 is of the user, not the assistant"),
    ("messages", openai((U, "q"), (A, "a"), (S, "s"), (A, "a")), "roles out of order: message 3 is of the system, not the user"),
    ("messages", openai((U, "q"), (A, " \n")), "empty answer (message 2)"),
    ("messages", openai((U, ""), (A, "a")), "empty question (message 1)"),
    ("messages", openai((U, "q"), ("tool", "4"), (A, "a")), "message 2: unknown role 'tool'; name it in roles"),
    ("messages", {"messages": [{"role": U, "content": "q"}, {"role": A, "content": None, "tool_calls": [{}]}]}, "message 2 has tool_calls, which are not read"),
    ("messages", {"messages": [{"role": U, "content": [{"type": "image_url"}]}]}, "message 1 has a part that is no text (image_url)"),
    ("messages", {"messages": [{"role": U, "content": None}]}, "message 1 has no 'content'"),
    ("messages", {"messages": [{"role": U, "content": 3}]}, "'content' of message 1 is int, not text"),
    ("messages", {"messages": ["q", "a"]}, "message 1 is str, not an object"),
    ("messages", {"messages": {"role": U}}, "field 'messages' is dict, not a list of messages"),
    ("messages", {"messages": "no JSON"}, "invalid JSON"),
    ("messages", {"messages": []}, "no answer"),
    ("messages", {"messages": None}, "field 'messages' is null"),
    ("messages", {"text": "q"}, "field 'messages' is missing"),
    ("sharegpt", {"conversations": [{"from": "human", "value": "q"}, {"role": A, "content": "a"}]}, "message 2: unknown role None; name it in roles"),
    ("alpaca", {"instruction": "q", "output": ""}, "empty answer (message 2)"),
    ("alpaca", {"instruction": "q"}, "field 'output' is missing"),
    ("alpaca", {"instruction": "q", "output": "a", "history": [["one"]]}, "field 'history': entry 1 is no pair of question and answer"),
    ("alpaca", {"instruction": "q", "output": "a", "input": 3}, "field 'input' is int, not text"),
    ("question", {"question": "q", "response": None}, "field 'response' is null"),
    ("prompt", {"prompt": 3, "completion": "a"}, "field 'prompt' is int, not text"),
    ("guanaco", {"text": "no marks"}, "no mark of a turn; name them in roles"),
    ("guanaco", {"text": "Hello ### Human: q### Assistant: a"}, "text before the first mark of a turn"),
    ("guanaco", {"text": "### Human: q\n### Human: r\n### Assistant: a"}, "roles out of order: message 2 is of the user, not the assistant"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(GOOD)))
def test_a_row_means_its_messages(number):
    form, row, settings, want = GOOD[number]
    assert messages_of(document(row, ConversationConfig(form, **settings))) == want


@pytest.mark.parametrize("number", range(len(BAD)))
def test_a_row_that_is_no_conversation_says_why(number):
    form, row, reason = BAD[number]
    with pytest.raises(ValueError) as error:
        document(row, ConversationConfig(form))
    assert str(error.value) == reason


def test_every_format_has_a_good_and_a_bad_row():
    assert {case[0] for case in GOOD} == {case[0] for case in BAD} == set(FORMATS)


def test_a_last_question_without_an_answer_is_left_out_and_noted():
    text = document({"text": "### Human: q### Assistant: a### Human: thanks"}, ConversationConfig("guanaco"))
    assert messages_of(text) == turns((U, "q"), (A, "a"))
    assert notes_of(text) == [QUESTION_LEFT_OUT]
    assert notes_of(document(openai(*TWO), ConversationConfig())) == []


def test_what_no_text_may_hold_is_mended_as_in_texts():
    row = openai((U, "a\0b \ud800"), (A, "c"))
    assert messages_of(document(row, ConversationConfig()))[0]["content"] == "ab \ufffd"


def write_rows(folder, layout, rows):
    path = folder / f"rows.{'arrow' if layout == 'arrow-file' else layout}"
    if layout == "jsonl":
        path.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
        return path
    table = pa.Table.from_pylist(rows)
    if layout == "parquet":
        pq.write_table(table, path, row_group_size=2)
        return path
    new = pa.ipc.new_stream if layout == "arrow" else pa.ipc.new_file
    with pa.OSFile(str(path), "wb") as sink, new(sink, table.schema) as writer:
        for batch in table.to_batches(max_chunksize=2):
            writer.write_batch(batch)
    return path


@pytest.mark.parametrize("layout", ["jsonl", "parquet", "arrow", "arrow-file"])
@pytest.mark.parametrize("form", ["messages", "alpaca"])
def test_every_kind_of_file_gives_the_same_conversations_and_places(tmp_path, layout, form):
    if form == "messages":
        rows = [openai((U, f"q{i}"), (A, f"a{i}"), id=i) for i in range(7)]
        rows[3]["messages"][1]["content"] = ""
    else:
        rows = [{"id": i, "instruction": f"q{i}", "output": f"a{i}", "input": "" if i % 2 else "x"} for i in range(7)]
        rows[3]["output"] = " "
    path = write_rows(tmp_path, layout, rows)
    config = ConversationConfig(form)
    end = path.stat().st_size if layout == "jsonl" else 10**9
    got = list(read_conversations(str(path), layout, 0, end, config))
    want = [document(row, config) for i, row in enumerate(rows) if i != 3]
    assert [g[2] for g in got if not isinstance(g, BadRecord)] == want
    (bad,) = [g for g in got if isinstance(g, BadRecord)]
    assert (got.index(bad), bad.reason, bad.file) == (3, "empty answer (message 2)", str(path))
    if layout == "jsonl":
        assert path.read_bytes()[bad.offset :].startswith(orjson.dumps(rows[3])) and b"q3" in bad.head
    elif layout != "arrow":  # there the byte of the record batch
        assert bad.offset == 3


@pytest.mark.parametrize("settings, message", [
    ({"format": "chatml"}, "c.format='chatml' must be one of messages, sharegpt, alpaca, question, prompt, guanaco"),
    ({"format": "alpaca", "keys": {"instructions": "q"}}, "unknown key 'c.keys.instructions'; did you mean 'instruction'?"),
    ({"keys": {"messages": ""}}, "c.keys.messages is empty; name a column, or remove it"),
    ({"roles": {"bard": "poet"}}, "c.roles.bard='poet' must be one of assistant, system, user"),
    ({"date": "26 Jul 2024"}, "c.date='26 Jul 2024' must be a day such as 2024-07-26"),
    ({"system_probability": 1.5}, "c.system_probability=1.5 must be between 0 and 1"),
    ({"train_on": "some"}, "c.train_on='some' must be one of all, last, flagged"),
    ({"too_long": "cut"}, "c.too_long='cut' must be one of truncate, drop"),
    ({"template": ""}, "c.template is empty; name one, or remove it for the tokenizer's own"),
])  # fmt: skip
def test_a_wrong_setting_is_named(settings, message):
    with pytest.raises(ConfigError) as error:
        ConversationConfig(**settings).validate("c")
    assert str(error.value) == message
