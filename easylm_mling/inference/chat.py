"""`easylm-mling chat`: a conversation in a terminal, whose replies appear as they are written."""

import contextlib
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TextIO

import orjson

from easylm_mling.data.conversations.messages import Message
from easylm_mling.errors import one_line
from easylm_mling.inference.decoder import Decoder, Draw
from easylm_mling.inference.dialogue import Dialogue
from easylm_mling.inference.text_stream import TextStream
from easylm_mling.storage.atomic import write_atomically

HELP = "/reset begins anew, /system LINE sets the system line, /save FILE keeps the conversation, /quit ends"
# What a terminal would obey: a model may have read it somewhere.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Chat:
    """One conversation. `write` is called with pieces of text as they come."""

    def __init__(
        self,
        decoder: Decoder,
        dialogue: Dialogue,
        new_stream: Callable[[], TextStream],
        draw: Draw,
        max_new_tokens: int,
        system: str = "",
    ):
        self._decoder, self._dialogue, self._new_stream, self._draw = decoder, dialogue, new_stream, draw
        self._max_new_tokens, self.system = max_new_tokens, system
        self.turns: list[Message] = []

    @property
    def messages(self) -> list[Message]:
        """The conversation so far, with its system line."""
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.turns]

    def reply(self, question: str) -> Iterator[str]:
        """Yield the answer piece by piece; question and answer are then part of the conversation, also if it is interrupted.

        Raises ValueError, and forgets the question, if the conversation is longer than the window.
        """
        asked = [*self.messages, {"role": "user", "content": question}]
        prompt = self._dialogue.prompt(asked)
        room = self._decoder.length - len(prompt)
        if room < 1:
            raise ValueError(
                f"the conversation has {len(prompt)} tokens, and the window {self._decoder.length}; /reset begins anew"
            )
        stream, shown = self._new_stream(), 0
        try:
            self._decoder.begin(0, prompt, replace(self._draw, seed=self._draw.seed + len(self.turns)))
            left = min(room, self._max_new_tokens)
            while left and not stream.ended:
                for token in self._decoder.advance().ids[0][:left].tolist():
                    stream.add(token)
                    left -= 1
                    if stream.ended:
                        break
                yield stream.text[shown:]
                shown = len(stream.text)
            yield stream.close()[shown:]
        finally:
            answer = stream.text.strip()
            self.turns += [asked[-1], {"role": "assistant", "content": answer}] if answer else []


def run_chat(chat: Chat, lines: Iterator[str], out: TextIO, notes: TextIO):
    """Answer each of `lines` on `out`, and obey those that begin with a slash; their answers go to `notes`."""
    for line in map(str.strip, lines):
        if line.startswith("/"):
            if line == "/quit":
                return
            print(_obey(chat, line), file=notes, flush=True)
        elif line:
            try:
                for piece in chat.reply(line):
                    out.write(_CONTROLS.sub("", piece))
                    out.flush()
            except ValueError as error:
                print(one_line(error), file=notes, flush=True)
            except KeyboardInterrupt:
                print("\n(stopped)", file=notes, flush=True)
            out.write("\n")
            out.flush()


def _obey(chat: Chat, line: str) -> str:
    word, _, rest = line.partition(" ")
    if word == "/reset":
        chat.turns.clear()
        return "(a new conversation)"
    if word == "/system":
        chat.system = rest.strip()
        return f"(system line: {chat.system})" if chat.system else "(no system line)"
    if word == "/save" and rest.strip():
        return _save(chat, Path(rest.strip()).expanduser())
    return HELP


def _save(chat: Chat, file: Path) -> str:
    if not chat.turns:
        return "(nothing was said yet)"
    if file.exists():
        return f"{file}: already exists; name another file"
    try:
        write_atomically(file, orjson.dumps({"messages": chat.messages}) + b"\n")
    except OSError as error:
        return f"{file}: cannot be written ({one_line(error)})"
    return f"(saved to {file}, as a row that can be trained on)"


def typed_lines(prompt: str) -> Iterator[str]:
    """Yield what is typed, until the end of the input or an interrupt."""
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (the arrow keys)
        with contextlib.suppress(EOFError, KeyboardInterrupt):
            while True:
                yield input(prompt)
    else:
        yield from sys.stdin
