"""Requests of OpenAI's completions and chat interfaces, checked to the letter: what cannot be had is refused, not ignored.

Source: the API reference of OpenAI, "Completions" and "Chat completions".
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from easylm_mling.data.conversations.messages import Message
from easylm_mling.data.tokenization.tokenizer import Tokenizer
from easylm_mling.inference.decoder import MOST_TOPS, Draw
from easylm_mling.inference.dialogue import Dialogue

MOST_PROMPTS, _MOST_STOPS = 128, 16
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
# They change nothing of an answer.
_SILENT = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
# What is not to be had, and the values that ask for nothing.
_NOT_HAD: dict[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "suffix": ("",), "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},),
    "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],), "response_format": ({"type": "text"},),
    "modalities": (["text"],), "parallel_tool_calls": (True, False), "reasoning_effort": ("none",),
}  # fmt: skip


class BadRequest(Exception):
    """A request that is refused, with its HTTP status, the parameter at fault, and a code for programs."""

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None):
        super().__init__(message)
        self.message, self.param, self.status, self.code = message, param, status, code

    def body(self) -> dict:
        """Return OpenAI's JSON of an error."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class Asked:
    """A request: token ids of each prompt, and what is wanted of each."""

    prompts: tuple[list[int], ...]
    max_tokens: int
    draw: Draw
    stops: tuple[str, ...]
    logprobs: int | None  # likeliest tokens beside each; None: no log-probabilities
    echo: bool
    stream: bool
    stream_usage: bool


class Reader:
    """Reads requests for the model `names[0]`, whose window has `length` tokens."""

    def __init__(
        self,
        names: tuple[str, ...],
        tokenizer: Tokenizer,
        dialogue: Dialogue | str,
        length: int,
        bos: list[int],
        vocab_size: int,
    ):
        """`dialogue`: a text says why there is none. `bos`: before each prompt that is a text."""
        self._names, self._tokenizer, self._dialogue, self._length = names, tokenizer, dialogue, length
        self._bos, self._vocab_size = bos, vocab_size

    def completion(self, body: Any) -> Asked:
        """Read a request for /v1/completions. Raises BadRequest."""
        fields = self._fields(body, {"prompt", "max_tokens", "logprobs", "echo"})
        prompts = tuple(self._prompts(fields.get("prompt")))
        logprobs = _number(fields, "logprobs", None, 0, MOST_TOPS, whole=True)
        most = _number(fields, "max_tokens", 16, 0, 1 << 31, whole=True)
        echo, stream = _flag(fields, "echo"), _flag(fields, "stream")
        if most == 0 and not echo:
            raise BadRequest("max_tokens of 0 goes with echo only", "max_tokens")
        if echo and stream:
            raise BadRequest("echo does not go with stream", "echo")
        for n, prompt in enumerate(prompts):
            where = f"prompt {n + 1}: " if len(prompts) > 1 else ""
            self._check_window(len(prompt), most, "max_tokens", where)
        return self._asked(fields, prompts, most, logprobs, echo)

    def chat(self, body: Any) -> Asked:
        """Read a request for /v1/chat/completions. Raises BadRequest."""
        known = {"messages", "max_tokens", "max_completion_tokens", "logprobs", "top_logprobs"}
        fields = self._fields(body, known)
        if isinstance(self._dialogue, str):
            raise BadRequest(self._dialogue, "messages")
        messages = fields.get("messages")
        if not isinstance(messages, list) or not messages:
            raise BadRequest("messages must be a list of {role, content}", "messages")
        try:
            prompt = self._dialogue.prompt([_message(n, m) for n, m in enumerate(messages, 1)])
        except ValueError as error:
            raise BadRequest(str(error), "messages") from None
        name = "max_completion_tokens" if fields.get("max_completion_tokens") is not None else "max_tokens"
        self._check_window(len(prompt), 1, name, "")
        most = _number(fields, name, self._length - len(prompt), 1, 1 << 31, whole=True)
        self._check_window(len(prompt), most, name, "")
        tops = _number(fields, "top_logprobs", 0, 0, MOST_TOPS, whole=True)
        if tops and not _flag(fields, "logprobs"):
            raise BadRequest("top_logprobs goes with logprobs: true", "top_logprobs")
        return self._asked(fields, (prompt,), most, tops if _flag(fields, "logprobs") else None, False)

    def _fields(self, body: Any, known: set[str]) -> dict[str, Any]:
        if not isinstance(body, dict):
            raise BadRequest("the body must be a JSON object")
        shared = {"model", "temperature", "top_p", "top_k", "seed", "stop", "stream", "stream_options"}
        for key, value in body.items():
            if key in _NOT_HAD:
                if value is not None and value not in _NOT_HAD[key]:
                    raise BadRequest(f"{key} cannot be had here; leave it out", key)
            elif key not in known | shared | _SILENT:
                raise BadRequest(f"unknown argument {str(key)[:100]!r}", str(key)[:100])
        model = body.get("model")
        if model not in self._names:
            raise BadRequest(
                f"the model {str(model)[:200]!r} is not served here; it is {self._names[0]!r}",
                "model",
                404,
                "model_not_found",
            )
        return body

    def _asked(
        self, fields: dict, prompts: tuple[list[int], ...], most: int, logprobs: int | None, echo: bool
    ) -> Asked:
        options = fields.get("stream_options") or {}
        if not isinstance(options, dict) or options.keys() - {"include_usage", "include_obfuscation"}:
            raise BadRequest("stream_options may have include_usage", "stream_options")
        seed = _number(fields, "seed", None, -(1 << 63), (1 << 63) - 1, whole=True)
        draw = Draw(
            float(_number(fields, "temperature", 1.0, 0, 1e6)),
            float(_number(fields, "top_p", 1.0, 0, 1)),
            _number(fields, "top_k", 0, -1, 1 << 31, whole=True),
            int.from_bytes(os.urandom(4), "big") if seed is None else seed & 0xFFFFFFFF,
        )
        if draw.top_p == 0:
            raise BadRequest("top_p must be above 0", "top_p")
        if draw.top_k < 0:  # how some clients say: all
            draw = Draw(draw.temperature, draw.top_p, 0, draw.seed)
        stream = _flag(fields, "stream")
        return Asked(
            prompts, most, draw, _stops(fields.get("stop")), logprobs, echo, stream, bool(options.get("include_usage"))
        )

    def _prompts(self, value: Any) -> list[list[int]]:
        one = isinstance(value, str) or (isinstance(value, list) and value and all(type(i) is int for i in value))
        prompts = [value] if one else value
        if not isinstance(prompts, list) or not prompts:
            raise BadRequest("prompt must be a text, a list of texts, token ids, or a list of lists of them", "prompt")
        if len(prompts) > MOST_PROMPTS:
            raise BadRequest(f"{len(prompts)} prompts; a request may have {MOST_PROMPTS}", "prompt")
        return [self._ids(prompt) for prompt in prompts]

    def _ids(self, prompt: Any) -> list[int]:
        if isinstance(prompt, str):
            ids = [*self._bos, *self._tokenizer.encode([_clean(prompt, "prompt")])[0].tolist()]
        elif isinstance(prompt, list) and all(type(i) is int for i in prompt):
            ids = prompt
            if wrong := next((i for i in ids if not 0 <= i < self._vocab_size), None):
                raise BadRequest(f"token {wrong} is outside the vocabulary of {self._vocab_size}", "prompt")
        else:
            raise BadRequest("prompt must be a text, a list of texts, token ids, or a list of lists of them", "prompt")
        if not ids:
            raise BadRequest("the prompt is empty", "prompt")
        return ids

    def _check_window(self, prompt: int, most: int, param: str, where: str):
        if prompt + most > self._length:
            raise BadRequest(
                f"{where}the window has {self._length} tokens; the prompt has {prompt}, and {most} more are asked for ({param})",
                param, code="context_length_exceeded",
            )  # fmt: skip


def _message(number: int, value: Any) -> Message:
    where = f"message {number}"
    if not isinstance(value, dict) or value.get("role") not in _ROLES:
        raise BadRequest(f"{where} must have a role ({', '.join(_ROLES)}) and content", "messages")
    unknown = [key for key, given in value.items() if given is not None and key not in ("role", "content", "name")]
    if unknown:
        raise BadRequest(f"{where}: {unknown[0]} cannot be had here", "messages")
    content = value.get("content")
    if isinstance(content, list):
        if not all(isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in content):
            raise BadRequest(f"{where}: only parts of type text can be read", "messages")
        content = "".join(p["text"] for p in content)
    if not isinstance(content, str):
        raise BadRequest(f"{where}: content must be a text", "messages")
    return {"role": _ROLES[value["role"]], "content": _clean(content, "messages")}


def _stops(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value or []
    if not isinstance(stops, list) or len(stops) > _MOST_STOPS or not all(isinstance(s, str) for s in stops):
        raise BadRequest(f"stop must be a text or up to {_MOST_STOPS} of them", "stop")
    return tuple(s for s in stops if s)


def _clean(text: str, param: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadRequest("a text holds half a surrogate pair, which is no letter", param) from None
    return text


def _flag(fields: dict, key: str) -> bool:
    value = fields.get(key)
    if value is not None and not isinstance(value, bool):
        raise BadRequest(f"{key} must be true or false", key)
    return bool(value)


def _number(fields: dict, key: str, default: Any, low: float, high: float, whole: bool = False) -> Any:
    value = fields.get(key)
    if value is None:
        return default
    right = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if not right or not math.isfinite(value) or not low <= value <= high:
        raise BadRequest(f"{key} must be a {'whole ' if whole else ''}number from {low:g} to {high:g}", key)
    return value


def token_text(tokenizer: Tokenizer) -> Callable[[int], str]:
    """Return the function of a token's name in log-probabilities: its text, or what the vocabulary calls it."""

    def name(i: int) -> str:
        if i >= tokenizer.vocab_size:
            return f"<{i}>"
        return tokenizer.text_of_piece(i) or tokenizer.piece(i)

    return name
