"""The JSON of answers, whole and in pieces, as OpenAI's clients read them."""

import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from easylm_mling.inference.decoder import Tokens
from easylm_mling.serving.engine import Written

Name = Callable[[int], str]


def envelope(model: str, is_chat: bool, is_chunk: bool) -> dict[str, Any]:
    """Return what every answer to one request has, and every piece of it."""
    kind = ("chat.completion.chunk" if is_chunk else "chat.completion") if is_chat else "text_completion"
    return {
        "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": model,
    }


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Return the counts of tokens; those of a completion include the one that ended it."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def chat_logprobs(tokens: Sequence[Written], name: Name) -> dict[str, Any]:
    """Return the `logprobs` of a chat's choice."""

    def one(i: int, logprob: float) -> dict[str, Any]:
        return {"token": name(i), "logprob": logprob, "bytes": list(name(i).encode())}

    return {
        "content": [one(t.id, t.logprob) | {"top_logprobs": [one(*top) for top in t.tops]} for t in tokens],
        "refusal": None,
    }


def completion_logprobs(
    tokens: Sequence[Written | tuple[int, None, None]], offsets: Sequence[int], name: Name
) -> dict[str, Any]:
    """Return the `logprobs` of a completion's choice; the first token of an echoed prompt has none."""
    return {
        "tokens": [name(t[0]) for t in tokens],
        "token_logprobs": [t[1] for t in tokens],
        "top_logprobs": [None if t[2] is None else _by_name(t[2], name) for t in tokens],
        "text_offset": list(offsets),
    }


def of_prompt(prompt: list[int], scored: Tokens, tops: int) -> list[Written | tuple[int, None, None]]:
    """Return the tokens of a prompt with their log-probabilities, and behind them the likeliest next one."""
    told = [
        Written(
            int(scored.ids[n]),
            float(scored.logprobs[n]),
            list(zip(scored.top_ids[n, :tops].tolist(), scored.top_logprobs[n, :tops].tolist(), strict=True)),
        )
        for n in range(len(prompt))
    ]
    return [(prompt[0], None, None), *told]


def _by_name(tops: Sequence[tuple[int, float]], name: Name) -> dict[str, float]:
    named: dict[str, float] = {}
    for i, logprob in tops:
        # Two tokens may be written alike.
        named[name(i) if name(i) not in named else f"{name(i)} [{i}]"] = logprob
    return named
