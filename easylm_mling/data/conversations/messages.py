"""Messages of one conversation, whatever the format of its row: system, user and assistant in turns.

A conversation travels through the mixer as a document: its canonical JSON, `{"messages": [...]}`. A message has `role` and
`content`; a question may have `input`, what it is about; an answer that is not to be trained on has `train` false. `notes`
names what was left out of the row.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import orjson

from easylm_mling.config.conversations import GUANACO_MARKS, ROLES, ConversationConfig
from easylm_mling.data.sources.readers import clean, parse_json

Message = dict[str, Any]

QUESTION_LEFT_OUT = "a last question without an answer"


def document(row: Mapping[str, Any], config: ConversationConfig) -> bytes:
    """Return the canonical JSON of a row's conversation; raises ValueError with a short reason for one that is none."""
    names = config.names
    messages, notes = _READERS[config.format](row, names, config), []
    if messages and messages[-1]["role"] == "user" and any(m["role"] == "assistant" for m in messages):
        messages.pop()
        notes = [QUESTION_LEFT_OUT]
    _check(messages)
    return orjson.dumps({"messages": messages, **({"notes": notes} if notes else {})})


def messages_of(text: bytes) -> list[Message]:
    """Return the messages of a conversation's canonical JSON."""
    return orjson.loads(text)["messages"]


def notes_of(text: bytes) -> list[str]:
    """Return what was left out of a conversation's row."""
    return orjson.loads(text).get("notes", [])


def _check(messages: list[Message]):
    """Raise ValueError unless it is an optional system line, then questions and answers in turns, none empty."""
    turns = messages[1:] if messages and messages[0]["role"] == "system" else messages
    if not any(m["role"] == "assistant" for m in turns):
        raise ValueError("no answer")
    for number, message in enumerate(turns, 1 + len(messages) - len(turns)):
        expected = "user" if (number - len(messages) + len(turns)) % 2 else "assistant"
        if message["role"] != expected:
            raise ValueError(f"roles out of order: message {number} is of the {message['role']}, not the {expected}")
    for number, message in enumerate(messages, 1):
        if not message["content"].strip():
            what = {"assistant": "answer", "user": "question", "system": "system line"}[message["role"]]
            raise ValueError(f"empty {what} (message {number})")


def _from_messages(row: Mapping[str, Any], names: dict[str, str], config: ConversationConfig) -> list[Message]:
    value = _value(row, names["messages"])
    messages = _message_list(value, names, config, f"field {names['messages']!r}")
    column = names.get("system")
    system = row.get(column) if column else None
    if system and not (messages and messages[0]["role"] == "system"):
        messages.insert(0, {"role": "system", "content": _text(system, f"field {column!r}")})
    return _without_empty_system(messages)


def _message_list(value: Any, names: dict[str, str], config: ConversationConfig, where: str) -> list[Message]:
    if isinstance(value, str):  # a table may hold JSON
        value = parse_json(value.encode(errors="replace"))
    if not isinstance(value, list):
        raise ValueError(f"{where} is {type(value).__name__}, not a list of messages")
    roles = ROLES | config.roles
    messages = []
    for number, item in enumerate(value, 1):
        if not isinstance(item, dict):
            raise ValueError(f"message {number} is {type(item).__name__}, not an object")
        for key in ("tool_calls", "function_call"):
            if item.get(key):
                raise ValueError(f"message {number} has {key}, which are not read")
        role = item.get(names["role"])
        if not isinstance(role, str) or role not in roles:
            raise ValueError(f"message {number}: unknown role {role!r}; name it in roles")
        content = _content(item.get(names["content"]), number, names["content"])
        message: Message = {"role": roles[role], "content": content}
        train = item.get(names.get("train", ""))
        if isinstance(train, bool | int | float) and not train and message["role"] == "assistant":
            message["train"] = False
        messages.append(message)
    return messages


def _content(value: Any, number: int, key: str) -> str:
    """Return the text of a message, which may be a list of parts; they are put together without a space."""
    if isinstance(value, list):
        for part in value:
            if not isinstance(part, dict) or not isinstance(part.get("text"), str):
                kind = part.get("type") if isinstance(part, dict) else type(part).__name__
                raise ValueError(f"message {number} has a part that is no text ({kind})")
        value = "".join(part["text"] for part in value)
    if value is None:
        raise ValueError(f"message {number} has no {key!r}")
    return _text(value, f"{key!r} of message {number}")


def _from_alpaca(row: Mapping[str, Any], names: dict[str, str], config: ConversationConfig) -> list[Message]:
    messages = _system(row, names)
    history = row.get(names["history"])
    for number, pair in enumerate(history if history is not None else [], 1):
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError(f"field {names['history']!r}: entry {number} is no pair of question and answer")
        for role, text in zip(("user", "assistant"), pair, strict=True):
            messages.append({"role": role, "content": _text(text, f"field {names['history']!r}")})
    question = {"role": "user", "content": _field(row, names["instruction"])}
    given = row.get(names["input"])
    if given is not None and (about := _text(given, f"field {names['input']!r}")).strip():
        question["input"] = about
    return [*messages, question, {"role": "assistant", "content": _field(row, names["output"])}]


def _from_question(row: Mapping[str, Any], names: dict[str, str], config: ConversationConfig) -> list[Message]:
    question, answer = _field(row, names["question"]), _field(row, names["response"])
    return [*_system(row, names), {"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _from_prompt(row: Mapping[str, Any], names: dict[str, str], config: ConversationConfig) -> list[Message]:
    messages = []
    for name, role in (("prompt", "user"), ("completion", "assistant")):
        value = _value(row, names[name])
        if isinstance(value, list):
            messages += _message_list(value, names, config, f"field {names[name]!r}")
        else:
            messages.append({"role": role, "content": _text(value, f"field {names[name]!r}")})
    return _without_empty_system(messages)


def _from_guanaco(row: Mapping[str, Any], names: dict[str, str], config: ConversationConfig) -> list[Message]:
    """Split one text at its marks.

    A mark of the one who is speaking already is text, unless it begins a line: answers quote such marks.
    """
    text, marks = _field(row, names["text"]), config.roles or GUANACO_MARKS
    pattern = re.compile("|".join(re.escape(mark) for mark in sorted(marks, key=len, reverse=True)))
    messages, begin = [], 0
    for match in pattern.finditer(text):
        role, at = marks[match[0]], match.start()
        if messages and messages[-1]["role"] == role and text[at - 1] != "\n":
            continue
        if messages:
            messages[-1]["content"] = text[begin:at].strip()
        elif text[:at].strip():
            raise ValueError("text before the first mark of a turn")
        messages.append({"role": role, "content": ""})
        begin = match.end()
    if not messages:
        raise ValueError("no mark of a turn; name them in roles")
    messages[-1]["content"] = text[begin:].strip()
    return messages


def _system(row: Mapping[str, Any], names: dict[str, str]) -> list[Message]:
    value = row.get(names["system"])
    content = "" if value is None else _text(value, f"field {names['system']!r}")
    return [{"role": "system", "content": content}] if content.strip() else []


def _without_empty_system(messages: list[Message]) -> list[Message]:
    """An empty system line is none; data sets write one in every row."""
    begins_empty = messages and messages[0]["role"] == "system" and not messages[0]["content"].strip()
    return messages[1:] if begins_empty else messages


def _value(row: Mapping[str, Any], column: str) -> Any:
    if row.get(column) is None:
        raise ValueError(f"field {column!r} is {'null' if column in row else 'missing'}")
    return row[column]


def _field(row: Mapping[str, Any], column: str) -> str:
    return _text(_value(row, column), f"field {column!r}")


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where} is {type(value).__name__}, not text")
    return clean(value).decode()


_READERS: dict[str, Callable[[Mapping[str, Any], dict[str, str], ConversationConfig], list[Message]]] = {
    "messages": _from_messages,
    "sharegpt": _from_messages,
    "alpaca": _from_alpaca,
    "question": _from_question,
    "prompt": _from_prompt,
    "guanaco": _from_guanaco,
}
