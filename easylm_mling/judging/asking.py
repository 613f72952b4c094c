"""A judge behind an OpenAI-compatible endpoint, and the file of its replies, so that none is asked for twice."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from hashlib import blake2b
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import orjson

from easylm_mling.errors import ConfigError, TrainingStopped, check, one_line
from easylm_mling.judging.settings import JudgeSettings
from easylm_mling.storage.jsonl import JsonlWriter, read_jsonl

_BYTES_PER_TOKEN = 3  # of text of four languages, for the foretold cost
_REPLY_TOKENS = 300  # of a reason and a mark
_MOST_FAILURES = 10  # in a row, before the first reply: then the endpoint does not work, and nothing more is asked


@dataclass(frozen=True)
class Request:
    """One judgement to ask for. `repeat` is added to the judge's seed."""

    messages: list[dict[str, str]]
    repeat: int = 0

    def key(self, settings: JudgeSettings) -> str:
        """Return the digest of all that the reply depends on."""
        return blake2b(orjson.dumps([settings.endpoint, self.body(settings), self.repeat]), digest_size=16).hexdigest()

    def body(self, settings: JudgeSettings) -> dict[str, Any]:
        """Return what is sent to the endpoint."""
        sent = {
            "temperature": settings.temperature, "top_p": settings.top_p, settings.length_key: settings.max_tokens,
            "seed": None if settings.seed is None else settings.seed + self.repeat,
        }  # fmt: skip
        return {"model": settings.model, "messages": self.messages, **{k: v for k, v in sent.items() if v is not None}}


@dataclass(frozen=True)
class Reply:
    """What the judge wrote, or why there is nothing (`failure`); the tokens that the endpoint counted."""

    text: str
    failure: str = ""
    input_tokens: int = 0
    output_tokens: int = 0


class Judge:
    """Asks for judgements and keeps the replies in a file, each as it comes. What failed is asked again another time."""

    def __init__(self, settings: JudgeSettings, store: Path):
        """Raises ConfigError without the openai package or the key in the environment."""
        check(find_spec("openai") is not None, "--judge: needs another package: pip install 'easylm-mling[judge]'")
        self._key = os.environ.get(settings.key_variable, "")
        check(
            bool(self._key),
            f"the environment has no {settings.key_variable}; put the endpoint's key there (any word for a server without keys)",
        )
        from openai import OpenAI

        self._settings = settings
        self._client: Any = OpenAI(
            base_url=settings.endpoint,
            api_key=self._key,
            max_retries=settings.attempts - 1,
            timeout=settings.timeout_seconds,
        )
        store.parent.mkdir(parents=True, exist_ok=True)
        self._replies = {}
        for line in read_jsonl(store) if store.is_file() else ():
            if isinstance(line.get("key"), str) and isinstance(line.get("text"), str) and not line.get("failure"):
                fields = {k: line[k] for k in ("text", "input_tokens", "output_tokens")}
                self._replies[line["key"]] = Reply(**fields)
        self._writer = JsonlWriter(store, ascii_only=False)

    def check_endpoint(self) -> str | None:
        """Raise ConfigError if the endpoint cannot be had, or has no such model. Returns a warning if it does not tell."""
        from openai import APIStatusError, OpenAIError

        settings = self._settings
        try:
            names = [m.id for m in self._client.models.list()]
        except APIStatusError as error:
            if error.status_code in (401, 403):
                raise ConfigError(f"{settings.endpoint}: refuses the key in {settings.key_variable}") from None
            return f"{settings.endpoint} does not list its models ({error.status_code})"
        except OpenAIError as error:
            raise ConfigError(
                f"{settings.endpoint}: cannot be reached ({one_line(error)}); see that it is up"
            ) from None
        some = ", ".join(names[:5])
        check(settings.model in names, f"{settings.endpoint} has no model {settings.model!r}; it has {some or 'none'}")
        return None

    def left(self, requests: list[Request]) -> list[Request]:
        """Return the requests without a reply in the file, each once."""
        keys = {r.key(self._settings): r for r in requests}
        return [r for key, r in keys.items() if key not in self._replies]

    def foretold(self, requests: list[Request]) -> tuple[int, int, float | None]:
        """Return about how many tokens `left` reads and writes, and what that costs in dollars, if prices are known."""
        asked = self.left(requests)
        read = sum(len(m["content"].encode()) for r in asked for m in r.messages) // _BYTES_PER_TOKEN
        return read, _REPLY_TOKENS * len(asked), self.cost(read, _REPLY_TOKENS * len(asked))

    def cost(self, read: int, written: int) -> float | None:
        """Return the price of so many tokens, in dollars; None without prices."""
        prices = self._settings.input_price, self._settings.output_price
        return None if prices[0] is None or prices[1] is None else (read * prices[0] + written * prices[1]) / 1e6

    def ask(self, requests: list[Request], progress: Callable[[int, int], None]) -> Iterator[Reply]:
        """Yield the reply to each request. Those without one are asked side by side; a failure is a Reply that says why.

        Raises TrainingStopped if the endpoint fails again and again before it has replied once.
        """
        left, failures = self.left(requests), {}
        answered = in_a_row = 0
        with ThreadPoolExecutor(self._settings.parallel) as pool:
            futures = {pool.submit(self._ask, r): r.key(self._settings) for r in left}
            try:
                for done, future in enumerate(as_completed(futures), 1):
                    reply, key = future.result(), futures[future]
                    (failures if reply.failure else self._replies)[key] = reply
                    answered, in_a_row = answered + (not reply.failure), in_a_row + 1 if reply.failure else 0
                    if not answered and in_a_row >= min(_MOST_FAILURES, len(left)):
                        raise TrainingStopped(
                            f"{self._settings.endpoint}: {in_a_row} requests failed and none was answered "
                            f"({reply.failure}); what was judged before is kept, and the same command goes on"
                        )
                    progress(done, len(left))
            finally:
                pool.shutdown(cancel_futures=True)
        for request in requests:
            key = request.key(self._settings)
            yield self._replies.get(key) or failures[key]

    def close(self):
        """Close the file of replies."""
        self._writer.close()

    def _ask(self, request: Request) -> Reply:
        from openai import OpenAIError

        try:
            got = self._client.chat.completions.create(**request.body(self._settings))
            text = got.choices[0].message.content or ""
            usage = got.usage
            reply = Reply(text, "", usage.prompt_tokens if usage else 0, usage.completion_tokens if usage else 0)
        except (OpenAIError, ValueError, AttributeError, IndexError, TypeError) as error:
            # The last four: a body that is no answer in the protocol's form.
            text = one_line(error).replace(self._key, "...")
            reply = Reply("", f"{type(error).__name__}: {text}")
        self._writer.append({"key": request.key(self._settings), **vars(reply)})
        return reply
