"""Conversations to token ids of which some are targets: ids(prompt), then ids(answer), each on its own.

A model is asked with the ids of a prompt and goes on with those of its answer, so both are tokenised apart: pieces that
would join the end of a prompt and the beginning of an answer never come out. A token that is no target has UNTRAINED
added to its id; so the loss mask travels with the tokens through every file and buffer.
"""

import re
from hashlib import blake2b
from typing import NamedTuple

import numpy as np

from easylm_mling.config.conversations import ConversationConfig
from easylm_mling.data.conversations.messages import Message, messages_of
from easylm_mling.data.conversations.templates import Render, compile_jinja, parse_plain
from easylm_mling.data.tokenization.tokenizer import Tokenizer
from easylm_mling.errors import ConfigError

# Above every id: a vocabulary has far fewer pieces.
UNTRAINED = 1 << 30
# The parts of a message that hold text.
PARTS = ("content", "input")
_SYSTEM_SALT = b"system line"
# Looks like the mark of a turn in a template. One that the tokenizer does not have is of another tokenizer's template.
_MARK = re.compile(r"<\|[^|<>\s]+\|>|<(?:start|end)_of_turn>|<\|?turn\|?>")


class TooLong(ValueError):
    """A conversation that is longer than a row, and is to be left out."""


class ConversationEncoder:
    """Encodes conversations by one template and tokenizer. A pure function of each conversation."""

    def __init__(
        self, config: ConversationConfig, template: dict[str, str], tokenizer: Tokenizer, length: int, key: str
    ):
        """Take the `template` of templates.read_template; `length`: the most tokens of a conversation.

        Raises ConfigError that begins with `key` for a template that cannot write a conversation, and for one whose marks
        the tokenizer does not have.
        """
        self._config, self._tokenizer, self._length, self._key = config, tokenizer, length, key
        names = {i: tokenizer.piece(i) for i in tokenizer.control_ids}
        self._ids = {name: i for i, name in names.items() if len(name) > 1}
        ordered = sorted(self._ids, key=len, reverse=True)
        self._controls = re.compile("|".join(map(re.escape, ordered)) or "(?!)")
        self._is_control = np.zeros(tokenizer.vocab_size, bool)
        self._is_control[list(tokenizer.control_ids)] = True
        self._render, self._has_system = self._open(template)

    def encode(self, text: bytes) -> np.ndarray:
        """Return the tokens of a conversation's canonical JSON, int32: BOS first, and UNTRAINED added to what is no target.

        Raises ValueError with a short reason for one that cannot be trained on, and TooLong.
        """
        messages = self._prepared(text)
        ids, trained = self._tokenise(self._written(messages, self._wanted(messages)))
        if len(ids) > self._length:
            if self._config.too_long == "drop":
                raise TooLong(f"{len(ids)} tokens, longer than a row of {self._length} (too_long: drop)")
            ids, trained = ids[: self._length], trained[: self._length]
        if not trained.any():
            raise ValueError(f"no token of an answer is in the first {self._length} tokens")
        return np.where(trained, ids, ids | UNTRAINED).astype(np.int32)

    def prompt(self, messages: list[Message]) -> np.ndarray:
        """Return the ids, int32, that ask a model for the answer to `messages`, which end in a question."""
        safe, mark = self._neutralised(self._placed(list(messages)))
        return self._tokenise(_Written(self._render(safe, True), [], mark))[0]

    def joint(self, text: bytes) -> bool:
        """Return True if prompts and answers tokenised together have the ids that they have apart."""
        messages = self._prepared(text)
        written = self._written(messages, self._wanted(messages))
        whole = written._replace(spans=[])
        ids, together = self._tokenise(written)[0], self._tokenise(whole)[0]
        # EOS stands in no text of a form without an end token.
        return np.array_equal(ids[: len(together)], together)

    def is_cut(self, text: bytes) -> bool:
        """Return True if the conversation is longer than a row."""
        messages = self._prepared(text)
        return len(self._tokenise(self._written(messages, self._wanted(messages)))[0]) > self._length

    def writes_control(self, text: bytes) -> bool:
        """Return True if a message writes the name of a control token, which becomes text."""
        return any(self._controls.search(m[part]) for m in messages_of(text) for part in PARTS if part in m)

    def _open(self, template: dict[str, str]) -> tuple[Render, bool]:
        """Return the template's function, and whether it has a place for a system line; checks it by a small example."""
        eos = self._tokenizer.piece(self._tokenizer.eos_id)
        if template["kind"] == "plain":
            form = parse_plain(template["text"], self._key)
            self._check_tokens(list(form.tokens))
            return (lambda messages, _: form.render(messages, eos)), form.has_system
        pad = self._tokenizer.piece(self._tokenizer.pad_id) if self._tokenizer.pad_id >= 0 else ""
        special = {"bos_token": "", "eos_token": eos, "pad_token": pad}
        render = compile_jinja(template["text"], self._config.date, special, self._key)
        question = {"role": "user", "content": "question"}
        try:
            whole = render([question, {"role": "assistant", "content": "answer"}], False)
        except ValueError as error:
            raise ConfigError(f"{self._key}.template: it cannot write one question and its answer: {error}") from None
        self._check_tokens(_MARK.findall(whole))
        try:
            has_system = "system-line" in render([{"role": "system", "content": "system-line"}, question], True)
        except ValueError:
            has_system = False  # as Gemma's, which raises
        return render, has_system

    def _check_tokens(self, tokens: list[str]):
        for token in tokens:
            if token not in self._ids:
                raise ConfigError(
                    f"{self._key}.template writes {token}, which is no control token of {self._tokenizer.path}; use the "
                    "template of the tokenizer's own model, or a plain form such as alpaca"
                )

    def _prepared(self, text: bytes) -> list[Message]:
        """Return the messages with their system line in its place."""
        messages = messages_of(text)
        if self._config.system and messages[0]["role"] != "system":
            digest = blake2b(text, digest_size=8, salt=_SYSTEM_SALT).digest()
            if int.from_bytes(digest, "big") < self._config.system_probability * 2**64:
                messages.insert(0, {"role": "system", "content": self._config.system})
        return self._placed(messages)

    def _placed(self, messages: list[Message]) -> list[Message]:
        if self._has_system or messages[0]["role"] != "system":
            return messages
        system, question, *rest = messages
        if self._config.system_place == "drop":
            return [question, *rest]
        content = f"{system['content'].strip()}\n\n{question['content'].strip()}"
        return [{**question, "content": content}, *rest]

    def _wanted(self, messages: list[Message]) -> list[int]:
        """Return the indices of the answers that are targets."""
        answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        if self._config.train_on == "last":
            return answers[-1:]
        if self._config.train_on == "flagged":
            answers = [i for i in answers if messages[i].get("train", True)]
            if not answers:
                raise ValueError("no answer is to be trained on: every one says train: false")
        return answers

    def _neutralised(self, messages: list[Message]) -> tuple[list[Message], str]:
        """Return the messages with a letter that they do not hold, the mark, put into each control token's name in them.

        So in the text that the template writes, a control token's whole name is the template's.
        """
        texts = [m[part] for m in messages for part in PARTS if part in m]
        mark = next(chr(c) for c in range(0xE000, 0xF8FF) if not any(chr(c) in text for text in texts))

        def broken(text: str) -> str:
            while self._controls.search(text):
                text = self._controls.sub(lambda name: name[0][0] + mark + name[0][1:], text)
            return text

        return [{**m, **{part: broken(m[part]) for part in PARTS if part in m}} for m in messages], mark

    def _written(self, messages: list[Message], wanted: list[int]) -> "_Written":
        """Return the text, and where the answers `wanted` stand in it.

        Raises ValueError if the template writes another beginning once an answer follows: then a model would never be
        asked by what it was trained behind. Also if it leaves a message out.
        """
        safe, mark = self._neutralised(messages)
        whole, spans = self._render(safe, False), []
        for i, message in enumerate(safe):
            parts = [message[part].strip() for part in PARTS if part in message]
            if (message["role"] != "assistant" or i in wanted) and not all(part in whole for part in parts):
                raise ValueError(f"the template leaves out a part of message {i + 1} ({message['role']})")
        for i in wanted:
            prompt = self._render(safe[:i], True)
            after = whole if i == len(safe) - 1 else self._render(safe[: i + 1], False)
            if not whole.startswith(prompt) or not whole.startswith(after):
                raise ValueError(
                    f"the template writes what stands before answer {i + 1} otherwise once more follows; "
                    "train_on: last may help"
                )
            answer = after[len(prompt) :]
            if safe[i]["content"].strip() not in answer:
                raise ValueError(f"the template leaves out a part of message {i + 1} (assistant)")
            ends = [m.end() for m in self._controls.finditer(answer)]
            has_end = bool(ends) and not answer[ends[-1] :].strip()
            # White space behind the end token, or behind an answer without one, is the template's own.
            length = ends[-1] if has_end else len(answer.rstrip())
            spans.append(_Span(len(prompt), len(prompt) + length, has_end, i == len(safe) - 1))
        return _Written(whole, spans, mark)

    def _tokenise(self, written: "_Written") -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of a text with a BOS before it, and which of them are targets."""
        whole, spans, mark = written
        chunks, at, train_end = [], 0, self._config.train_end  # (text or control id, is a target)
        for span in spans:
            chunks += [(piece, False) for piece in self._split(whole[at : span.begin], mark)]
            answer: list[tuple[str | int, bool]] = [(p, True) for p in self._split(whole[span.begin : span.end], mark)]
            if span.has_end:
                answer[-1] = (answer[-1][0], train_end)
            elif span.is_last:
                answer.append((self._tokenizer.eos_id, train_end))
            chunks, at = chunks + answer, span.end
        if not (spans and spans[-1].is_last and not spans[-1].has_end):
            chunks += [(piece, False) for piece in self._split(whole[at:], mark)]
        # Some templates write BOS whatever bos_token is.
        if chunks and chunks[0][0] == self._tokenizer.bos_id:
            del chunks[0]
        texts = iter(self._tokenizer.encode([piece for piece, _ in chunks if isinstance(piece, str)]))
        parts, trained = [np.array([self._tokenizer.bos_id], np.int32)], [np.zeros(1, bool)]
        for piece, is_target in chunks:
            ids = next(texts) if isinstance(piece, str) else np.array([piece], np.int32)
            if isinstance(piece, str) and self._is_control[ids].any():
                raise ValueError("a text comes out as a control token")
            parts.append(ids)
            trained.append(np.full(len(ids), is_target))
        ids = np.concatenate(parts)
        # Where EOS is the same token, it may end the conversation.
        inside = ids[1:-1] if self._tokenizer.separates else ids[1:]
        if (inside == self._tokenizer.bos_id).any():
            raise ValueError("the template writes BOS, or the token that is both BOS and EOS, inside the conversation")
        return ids, np.concatenate(trained)

    def _split(self, text: str, mark: str) -> list[str | int]:
        """Return a text cut at its control tokens, which become ids; the mark of `_neutralised` is gone from the rest."""
        pieces, at = [], 0
        for match in self._controls.finditer(text):
            pieces += [text[at : match.start()].replace(mark, ""), self._ids[match[0]]]
            at = match.end()
        pieces.append(text[at:].replace(mark, ""))
        return [p for p in pieces if p != ""]


class _Span(NamedTuple):
    """An answer in a text: from `begin` to `end`, its end token included if it `has_end`."""

    begin: int
    end: int
    has_end: bool
    is_last: bool


class _Written(NamedTuple):
    """A conversation as its template writes it, the answers in it, and the mark that breaks control tokens' names."""

    text: str
    spans: list[_Span]
    mark: str
