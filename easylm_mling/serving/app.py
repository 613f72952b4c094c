"""The web application: /v1/completions, /v1/chat/completions, /v1/models and /health, by Starlette."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from easylm_mling.data.tokenization.tokenizer import Tokenizer
from easylm_mling.inference.text_stream import TextStream
from easylm_mling.serving.answers import (
    chat_logprobs,
    completion_logprobs,
    envelope,
    of_prompt,
    usage,
)
from easylm_mling.serving.engine import Busy, Engine, Generation
from easylm_mling.serving.protocol import Asked, BadRequest, Reader, token_text

MOST_BYTES = 8 << 20  # of a request's body
_GONE_SECONDS = 0.5  # how often it is looked whether a client that waits for a whole answer is still there


class Service:
    """Answers requests for one model. `ends`: the ids that end a text; `chat_end`: one more for chats."""

    def __init__(
        self,
        engine: Engine,
        reader: Reader,
        tokenizer: Tokenizer,
        model: str,
        ends: frozenset[int],
        chat_end: frozenset[int],
    ):
        self._engine, self._reader, self._tokenizer, self._model = engine, reader, tokenizer, model
        self._ends, self._chat_ends, self._name = ends, ends | chat_end, token_text(tokenizer)

    def application(self) -> Starlette:
        """Return the ASGI application."""
        routes = [
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.models),
            Route("/health", self.health),
        ]
        handlers: Any = {
            BadRequest: _refused, HTTPException: _http_error, Busy: _busy, ClientDisconnect: _gone, Exception: _failed
        }  # fmt: skip
        return Starlette(routes=routes, exception_handlers=handlers)

    async def models(self, request: Request) -> Response:
        """List the one model, or describe it."""
        about = {
            "id": self._model,
            "object": "model",
            "created": 0,
            "owned_by": "easylm-mling",
            "max_model_len": self._engine.length,
        }
        if (name := request.path_params.get("name")) is None:
            return JSONResponse({"object": "list", "data": [about]})
        if name != self._model:
            raise BadRequest(f"the model {name[:200]!r} is not served here", "model", 404, "model_not_found")
        return JSONResponse(about)

    async def health(self, _: Request) -> Response:
        """Say whether texts can be written."""
        failure = self._engine.failure
        return JSONResponse({"status": failure or "ok", "writing": self._engine.writing}, 500 if failure else 200)

    async def completions(self, request: Request) -> Response:
        """Answer a request for /v1/completions."""
        asked = self._reader.completion(await _json_body(request))
        if asked.echo:
            return JSONResponse(await self._echo(request, asked))
        return await self._answer(request, asked, is_chat=False)

    async def chat(self, request: Request) -> Response:
        """Answer a request for /v1/chat/completions."""
        return await self._answer(request, self._reader.chat(await _json_body(request)), is_chat=True)

    async def _answer(self, request: Request, asked: Asked, is_chat: bool) -> Response:
        generations, changed = self._begin(asked, is_chat)
        if asked.stream:
            pieces = self._pieces(generations, changed, asked, is_chat)
            return StreamingResponse(pieces, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        await _finished(request, generations, changed)
        choices = [self._choice(n, g, asked, is_chat) for n, g in enumerate(generations)]
        counts = usage(sum(map(len, asked.prompts)), sum(g.count for g in generations))
        return JSONResponse({**envelope(self._model, is_chat, False), "choices": choices, "usage": counts})

    def _begin(self, asked: Asked, is_chat: bool) -> tuple[list[Generation], asyncio.Event]:
        loop, changed = asyncio.get_running_loop(), asyncio.Event()

        def tell():
            loop.call_soon_threadsafe(changed.set)

        ends = self._chat_ends if is_chat else self._ends
        generations = [
            Generation(
                p,
                asked.draw,
                asked.max_tokens,
                TextStream(self._tokenizer, ends, asked.stops),
                asked.logprobs or 0,
                tell,
            )
            for p in asked.prompts
        ]
        self._engine.submit(generations)
        return generations, changed

    def _choice(self, number: int, g: Generation, asked: Asked, is_chat: bool) -> dict:
        told = None
        if asked.logprobs is not None:
            tokens = g.tokens[: g.ready()]
            told = (
                chat_logprobs(tokens, self._name)
                if is_chat
                else completion_logprobs(tokens, g.stream.offsets[: len(tokens)], self._name)
            )
        content = (
            {"message": {"role": "assistant", "content": g.stream.text, "refusal": None}}
            if is_chat
            else {"text": g.stream.text}
        )
        return {"index": number, **content, "logprobs": told, "finish_reason": g.finish}

    async def _echo(self, request: Request, asked: Asked) -> dict:
        """Answer with the prompts and their log-probabilities, and what follows them."""
        futures = self._engine.score(list(asked.prompts), max(1, asked.logprobs or 0))
        parts = await asyncio.gather(*map(asyncio.wrap_future, futures))
        scored = [one for part in parts for one in part]
        # One greedy token is known from the prompt's own pass.
        is_known = asked.max_tokens == 0 or (asked.max_tokens == 1 and asked.draw.temperature == 0)
        generations: list[Generation] = []
        if not is_known:
            generations, changed = self._begin(asked, False)
            await _finished(request, generations, changed)
        choices, count = [], 0
        for n, (prompt, of) in enumerate(zip(asked.prompts, scored, strict=True)):
            tokens = of_prompt(prompt, of, asked.logprobs or 0)
            following = [tokens.pop()]
            stream = TextStream(self._tokenizer, self._ends, asked.stops)
            if is_known:
                following = following[: asked.max_tokens]
                for token in following:
                    stream.add(token[0])
                text, finish = stream.close(), stream.ended or "length"
                count += len(following)
            else:
                g = generations[n]
                text, finish, following = g.stream.text, g.finish, g.tokens[: g.ready()]
                count += g.count
            written = [*tokens, *following]
            begins = self._offsets([t[0] for t in written])
            whole = self._tokenizer.decode([i for i in prompt if i < self._tokenizer.vocab_size])
            told = completion_logprobs(written, begins, self._name) if asked.logprobs is not None else None
            choices.append({"index": n, "text": whole + text, "logprobs": told, "finish_reason": finish})
        counts = usage(sum(map(len, asked.prompts)), count)
        return {**envelope(self._model, False, False), "choices": choices, "usage": counts}

    def _offsets(self, ids: list[int]) -> list[int]:
        stream = TextStream(self._tokenizer, frozenset())
        for i in ids:
            stream.add(i)
        return stream.offsets

    async def _pieces(
        self, generations: list[Generation], changed: asyncio.Event, asked: Asked, is_chat: bool
    ) -> AsyncIterator[bytes]:
        """Yield server-sent events as texts grow. A client that goes away ends them, and with them the writing."""
        head = envelope(self._model, is_chat, True)
        shown, told = [0] * len(generations), [0] * len(generations)
        left = set(range(len(generations)))
        if asked.stream_usage:
            head["usage"] = None
        try:
            if is_chat:
                yield _event(head | {"choices": [_delta(0, {"role": "assistant", "content": ""})]})
            while left:
                await changed.wait()
                changed.clear()
                for n in sorted(left):
                    g = generations[n]
                    finish = g.finish  # before its text: it is set last
                    if finish == "error":
                        failure = BadRequest(
                            f"the model failed: {self._engine.failure or 'the server is closing'}", status=500
                        )
                        yield _event(failure.body())
                        return
                    text, ready = g.stream.text[shown[n] :], g.ready()
                    if text or (asked.logprobs is not None and ready > told[n]):
                        tokens, offsets = g.tokens[told[n] : ready], g.stream.offsets[told[n] : ready]
                        yield _event(head | {"choices": [self._piece(n, text, tokens, offsets, asked, is_chat)]})
                        shown[n], told[n] = shown[n] + len(text), ready
                    if finish:
                        last = (
                            _delta(n, {}, finish)
                            if is_chat
                            else {"index": n, "text": "", "logprobs": None, "finish_reason": finish}
                        )
                        yield _event(head | {"choices": [last]})
                        left.discard(n)
            if asked.stream_usage:
                counts = usage(sum(map(len, asked.prompts)), sum(g.count for g in generations))
                yield _event(head | {"choices": [], "usage": counts})
            yield b"data: [DONE]\n\n"
        finally:
            for g in generations:
                g.cancelled = True

    def _piece(self, n: int, text: str, tokens: list, offsets: list[int], asked: Asked, is_chat: bool) -> dict:
        told = None
        if asked.logprobs is not None:
            told = chat_logprobs(tokens, self._name) if is_chat else completion_logprobs(tokens, offsets, self._name)
        if is_chat:
            return _delta(n, {"content": text}) | {"logprobs": told}
        return {"index": n, "text": text, "logprobs": told, "finish_reason": None}


async def _finished(request: Request, generations: list[Generation], changed: asyncio.Event):
    """Wait until all texts are written; a client that goes away ends the writing."""
    try:
        while any(not g.finish for g in generations):
            try:
                await asyncio.wait_for(changed.wait(), _GONE_SECONDS)
                changed.clear()
            except TimeoutError:
                if await request.is_disconnected():
                    raise ClientDisconnect from None
    finally:
        for g in generations:
            g.cancelled = True
    if any(g.finish == "error" for g in generations):
        raise RuntimeError("the model failed")


async def _json_body(request: Request) -> Any:
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        # A page of another origin cannot send this without asking first, and is not allowed to.
        raise BadRequest("send JSON: Content-Type: application/json", status=415)
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MOST_BYTES:
            raise BadRequest(f"the body has more than {MOST_BYTES >> 20} MiB", status=413)
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"the body is no JSON ({error})") from None


def _delta(number: int, delta: dict, finish: str | None = None) -> dict:
    return {"index": number, "delta": delta, "logprobs": None, "finish_reason": finish}


def _event(tree: dict) -> bytes:
    return b"data: " + orjson.dumps(tree) + b"\n\n"


async def _refused(_: Request, error: BadRequest) -> Response:
    return JSONResponse(error.body(), error.status)


async def _http_error(_: Request, error: HTTPException) -> Response:
    return JSONResponse(BadRequest(error.detail, status=error.status_code).body(), error.status_code)


async def _busy(_: Request, error: Busy) -> Response:
    return JSONResponse(BadRequest(str(error), status=503, code="busy").body(), 503)


async def _gone(_: Request, error: ClientDisconnect) -> Response:
    return Response(status_code=499)  # nobody reads it


async def _failed(_: Request, error: Exception) -> Response:
    return JSONResponse(BadRequest(f"the server failed: {error}", status=500).body(), 500)
