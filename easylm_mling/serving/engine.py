"""The one thread that uses the model: it writes the texts of many requests side by side, and scores prompts between."""

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from easylm_mling.inference.decoder import Decoder, Draw, Tokens
from easylm_mling.inference.text_stream import TextStream


class Written(NamedTuple):
    """One token of a text: its id, its log-probability in nats, and the likeliest ones with theirs, if they were asked for."""

    id: int
    logprob: float
    tops: list[tuple[int, float]]


class Busy(Exception):
    """Too many texts wait already."""


@dataclass
class Generation:
    """A text that is asked for. The engine's thread fills it in, and calls `on_change` after each change.

    `finish` is stop, length, or error, and empty before. Set `cancelled` to have it dropped.
    """

    prompt: list[int]
    draw: Draw
    max_new_tokens: int
    stream: TextStream
    tops: int = 0
    on_change: Callable[[], None] = lambda: None
    tokens: list[Written] = field(default_factory=list)
    count: int = 0  # of tokens written, the end included
    finish: str = ""
    cancelled: bool = False

    def ready(self) -> int:
        """Return how many of the tokens belong to the text that is sure."""
        length, offsets = len(self.stream.text), self.stream.offsets
        if self.finish == "length" or (self.finish and len(self.stream.ids) < self.count):
            return len(self.tokens)  # no stop string cut it
        return next((n for n, offset in enumerate(offsets) if offset >= length), len(offsets))


class Engine:
    """Runs a Decoder in a thread of its own. Texts wait their turn in order, at most `most_waiting` of them."""

    def __init__(self, decoder: Decoder, most_waiting: int = 256):
        self.length, self.rows = decoder.length, decoder.rows
        self._decoder, self._most_waiting = decoder, most_waiting
        self._waiting: deque[Generation] = deque()
        self._jobs: deque[tuple[list[list[int]], int, Future]] = deque()
        self._writing: dict[int, Generation] = {}
        self._changed = threading.Condition()
        self._closed = False
        self.failure = ""
        self._thread = threading.Thread(target=self._run, name="easylm-engine", daemon=True)
        self._thread.start()

    @property
    def writing(self) -> int:
        """How many texts are being written."""
        return len(self._writing)

    def submit(self, generations: list[Generation]):
        """Ask for texts. Raises Busy, and takes none, if too many wait."""
        with self._changed:
            self._check(len(generations))
            self._waiting.extend(generations)
            self._changed.notify()

    def score(self, prompts: list[list[int]], tops: int) -> list[Future]:
        """Return Futures of lists, which together have a Tokens for each prompt: what Decoder.score says. Raises Busy."""
        parts = [prompts[start : start + self.rows] for start in range(0, len(prompts), self.rows)]
        futures: list[Future] = [Future() for _ in parts]
        with self._changed:
            self._check(len(prompts))
            self._jobs.extend((part, tops, future) for part, future in zip(parts, futures, strict=True))
            self._changed.notify()
        return futures

    def close(self):
        """End the thread, after the tokens that are being computed; what is not finished ends as an error."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _check(self, more: int):
        if self.failure or self._closed:
            raise RuntimeError(self.failure or "the server is closing")
        if len(self._waiting) + len(self._jobs) * self.rows + more > self._most_waiting:
            raise Busy(f"{len(self._waiting)} texts wait already; try again later")

    def _run(self):
        try:
            while self._turn():
                pass
            self._drop("the server is closing")
        except Exception as error:  # whatever it is, those who wait must be told
            self.failure = f"{type(error).__name__}: {error}"
            self._drop(self.failure)
            raise

    def _turn(self) -> bool:
        """Score one group of prompts, begin texts where rows are free, and write on; False once closed."""
        with self._changed:
            while not (self._closed or self._waiting or self._jobs or self._writing):
                self._changed.wait()
            if self._closed:
                return False
            job = self._jobs.popleft() if self._jobs else None
            free = [row for row in range(self.rows) if row not in self._writing]
            begun = {row: self._waiting.popleft() for row in free[: len(self._waiting)]}
            # From here on it is known, also should it fail.
            self._writing |= begun
        if job:
            prompts, tops, future = job
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(_by_prompt(self._decoder.score(prompts, tops), prompts))
                except Exception as error:
                    future.set_exception(error)
                    raise
        for row, generation in begun.items():
            if not generation.cancelled:
                self._decoder.begin(row, generation.prompt, generation.draw)
        for row in [row for row, generation in self._writing.items() if generation.cancelled]:
            del self._writing[row]
        if self._writing:
            self._write()
        return True

    def _write(self):
        tops = max(g.tops for g in self._writing.values())
        tokens = self._decoder.advance(tops=tops > 0)
        for row, generation in list(self._writing.items()):
            for n in range(tokens.ids.shape[1]):
                _add(generation, tokens, row, n)
                if generation.finish:
                    del self._writing[row]
                    break
            generation.on_change()

    def _drop(self, why: str):
        with self._changed:
            left = [*self._writing.values(), *self._waiting]
            jobs = [job[2] for job in self._jobs]
            self._writing.clear()
            self._waiting.clear()
            self._jobs.clear()
        for generation in left:
            generation.finish = "error"
            generation.on_change()
        for future in jobs:
            future.set_exception(RuntimeError(why))


def _add(generation: Generation, tokens: Tokens, row: int, n: int):
    token, generation.count = int(tokens.ids[row, n]), generation.count + 1
    if generation.stream.add(token):
        tops = zip(
            tokens.top_ids[row, n, : generation.tops].tolist(),
            tokens.top_logprobs[row, n, : generation.tops].tolist(),
            strict=True,
        )
        generation.tokens.append(Written(token, float(tokens.logprobs[row, n]), list(tops)))
    if generation.stream.ended:
        generation.finish = "stop"
    elif generation.count == generation.max_new_tokens:
        generation.stream.close()
        generation.finish = "length"


def _by_prompt(scored: Tokens, prompts: list[list[int]]) -> list[Tokens]:
    return [Tokens(*(np.asarray(x[i, : len(p)]) for x in scored)) for i, p in enumerate(prompts)]
