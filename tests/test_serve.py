"""`serve`: OpenAI's own client and lm-evaluation-harness get from it what the model gives in this process."""

import asyncio
import json
import threading
import time

import httpx
import numpy as np
import openai
import pytest
from eval_models import ours, save

from easylm_mling.cli.main import main
from easylm_mling.data.tokenization.tokenizer import Tokenizer
from easylm_mling.errors import ConfigError
from easylm_mling.inference.dialogue import open_dialogue
from easylm_mling.inference.generate import continue_texts, generate, load_model
from easylm_mling.serving.command import ModelServer, ServeOptions, listen

LENGTH = 96
SECONDS = 120  # more than a slow machine needs


def post(url, **what):
    return httpx.post(url, timeout=SECONDS, **what)


def get(url):
    return httpx.get(url, timeout=SECONDS)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def loaded(saved):
    return load_model(saved)


@pytest.fixture(scope="module")
def tokenizer(saved):
    return Tokenizer(str(saved))


@pytest.fixture(scope="module")
def server(saved, loaded, tokenizer):
    options = ServeOptions(str(saved), template="gemma", rows=4, dtype="float32")
    server = ModelServer(options, loaded, tokenizer, LENGTH, listen("127.0.0.1", 0))
    thread = threading.Thread(target=server.run)
    thread.start()
    yield server
    server.stop()
    thread.join()


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=server.url, api_key="none", max_retries=0) as client:
        yield client


def alone(loaded, tokenizer, texts, count):
    return continue_texts(*loaded, tokenizer, texts, count, dtype="float32")


def test_completions_are_what_the_model_writes(client, loaded, tokenizer, saved):
    texts = ["봄에는", "The house", "家の"]
    answer = client.completions.create(model="tiny", prompt=texts, max_tokens=16, temperature=0)
    expected = alone(loaded, tokenizer, texts, 16)
    assert [c.text for c in answer.choices] == expected and [c.index for c in answer.choices] == [0, 1, 2]
    sizes = [1 + len(ids) for ids in tokenizer.encode(texts)]
    assert answer.usage.prompt_tokens == sum(sizes)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    # Ids are taken as they are.
    ids = [2, *tokenizer.encode(texts[:1])[0].tolist()]
    assert (
        client.completions.create(model="tiny", prompt=ids, max_tokens=16, temperature=0).choices[0].text == expected[0]
    )
    stop = expected[0][3:5]
    cut = client.completions.create(
        model="tiny", prompt=texts[0], max_tokens=16, temperature=0, stop=["\0no", stop], logprobs=2
    )
    assert cut.choices[0].text == expected[0].partition(stop)[0] and cut.choices[0].finish_reason == "stop"
    told = cut.choices[0].logprobs
    assert len(told.tokens) == len(told.token_logprobs) == len(told.text_offset)
    assert all(
        len(t) == 2 and max(t.values()) == lp for t, lp in zip(told.top_logprobs, told.token_logprobs, strict=True)
    )
    assert [m.id for m in client.models.list()] == ["tiny"] and client.models.retrieve("tiny").id == "tiny"


def test_chats_are_asked_by_the_template_and_stream(client, loaded, tokenizer, saved):
    messages = [
        {"role": "system", "content": "짧게."},
        {"role": "user", "content": [{"type": "text", "text": "왜요?"}]},
    ]
    plain = [{"role": "system", "content": "짧게."}, {"role": "user", "content": "왜요?"}]
    prompt = open_dialogue(saved, None, tokenizer, "gemma", LENGTH).prompt(plain)
    [ids] = generate(*loaded, [prompt], 20, dtype="float32")
    settings = {"model": "tiny", "messages": messages, "max_completion_tokens": 20, "temperature": 0}
    whole = client.chat.completions.create(**settings, logprobs=True, top_logprobs=3)
    text = whole.choices[0].message.content
    assert text == tokenizer.decode([i for i in ids if i != 1]) and whole.usage.prompt_tokens == len(prompt)
    content = whole.choices[0].logprobs.content
    assert all(t.top_logprobs[0].logprob == t.logprob and len(t.top_logprobs) == 3 for t in content)
    streamed = client.chat.completions.create(
        **settings, stream=True, logprobs=True, stream_options={"include_usage": True}
    )
    chunks = list(streamed)
    deltas = [c.choices[0].delta.content or "" for c in chunks if c.choices]
    assert "".join(deltas) == text and sum(map(bool, deltas)) >= 2 and chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage == whole.usage and chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    logprobs = [t.logprob for c in chunks if c.choices and c.choices[0].logprobs for t in c.choices[0].logprobs.content]
    assert logprobs == [t.logprob for t in content]


@pytest.mark.slow
def test_requests_at_once_get_what_each_gets_alone(server, loaded, tokenizer):
    texts = [f"{n} tree light" for n in range(6)]  # more than rows

    async def ask():
        async with openai.AsyncOpenAI(base_url=server.url, api_key="none", max_retries=0) as client:

            async def one(n, text):
                sampled = {"temperature": 1.0, "top_p": 0.9, "seed": n} if n % 2 else {"temperature": 0}
                made = await client.completions.create(model="tiny", prompt=text, max_tokens=5 + 4 * n, **sampled)
                return made.choices[0].text

            return await asyncio.gather(*(one(n, text) for n, text in enumerate(texts)))

    first, again = asyncio.run(ask()), asyncio.run(ask())
    assert first == again
    for n in (0, 2, 4):
        assert first[n] == alone(loaded, tokenizer, [texts[n]], 5 + 4 * n)[0]


def test_the_harness_gets_the_scores_of_eval(server, saved, tmp_path):
    for needed in ("lm_eval", "tenacity"):
        pytest.importorskip(needed, reason="needs lm-eval[api]")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    lm = LocalCompletionsAPI(
        base_url=f"{server.url}/completions", model="tiny", tokenizer=str(saved), tokenizer_backend="huggingface",
        add_bos_token=True, batch_size=5, max_length=LENGTH, max_retries=1,
    )  # fmt: skip
    own = ours(saved, tmp_path / "cache")
    pairs = [(f"Question {n}: what is {n}?", answer) for n in range(4) for answer in (" yes", " no", " maybe so")]
    pairs += [("봄에는 꽃이", " 핀다"), ("雨が", "降る。")]
    kind = "loglikelihood"
    got, expected = [m.loglikelihood([Instance(kind, {}, p, n) for n, p in enumerate(pairs)]) for m in (lm, own)]
    np.testing.assert_allclose([v for v, _ in got], [v for v, _ in expected], rtol=1e-5)
    assert [g for _, g in got] == [g for _, g in expected]
    settings = {"until": ["\n", "e"], "max_gen_toks": 12, "do_sample": False}
    texts = [(f"Text {n}", dict(settings)) for n in range(3)]
    made = [m.generate_until([Instance("generate_until", {}, t, n) for n, t in enumerate(texts)]) for m in (lm, own)]
    own.cache.close()
    assert made[0] == made[1]


@pytest.mark.slow
def test_echo_has_a_log_probability_for_each_token_of_the_prompt(client, tokenizer):
    prompt = [2, *tokenizer.encode(["The house"])[0].tolist()]
    ask = {"model": "tiny", "prompt": [prompt, prompt[:2]], "echo": True, "logprobs": 1, "temperature": 0}
    none, one, more = (client.completions.create(**ask, max_tokens=n).choices for n in (0, 1, 5))
    for n, size in enumerate((len(prompt), 2)):
        told = one[n].logprobs
        assert len(told.tokens) == size + 1 and told.token_logprobs[0] is None and told.top_logprobs[0] is None
        assert none[n].logprobs.token_logprobs == told.token_logprobs[:size]
        np.testing.assert_allclose(more[n].logprobs.token_logprobs[1 : size + 1], told.token_logprobs[1:], atol=1e-5)
    assert none[0].text == "The house" and one[0].text.startswith("The house")


def test_what_cannot_be_had_is_refused_with_its_status(server, client):
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
    text = {"model": "tiny", "prompt": "hi"}
    for path, body, status, message in (
        ("completions", text | {"model": "other"}, 404, "not served here; it is 'tiny'"),
        ("completions", text | {"max_tokens": 500}, 400, "the window has 96 tokens; the prompt has"),
        ("completions", text | {"prompt": [5] * 97, "max_tokens": 1}, 400, "the window has 96"),
        ("completions", text | {"prompt": [9999]}, 400, "token 9999 is outside the vocabulary of 4096"),
        ("completions", text | {"prompt": []}, 400, "prompt must be"),
        ("completions", text | {"prompt": [[1], "a"] * 65}, 400, "130 prompts"),
        ("completions", text | {"n": 2}, 400, "n cannot be had here"),
        ("completions", text | {"temprature": 0}, 400, "unknown argument 'temprature'"),
        ("completions", text | {"temperature": -1}, 400, "temperature must be a number from 0"),
        ("completions", text | {"top_p": 0}, 400, "top_p must be above 0"),
        ("completions", text | {"stop": [1]}, 400, "stop must be"),
        ("completions", text | {"echo": True, "stream": True}, 400, "echo does not go with stream"),
        ("completions", [1], 400, "must be a JSON object"),
        ("chat/completions", chat | {"messages": []}, 400, "messages must be a list"),
        ("chat/completions", chat | {"messages": chat["messages"] * 2}, 400, "in turns"),
        ("chat/completions", chat | {"messages": [{"role": "tool", "content": "x"}]}, 400, "must have a role"),
        ("chat/completions", chat | {"messages": [{"role": "user", "content": "긴 글 " * 200}]}, 400, "the window has 96"),
        ("chat/completions", chat | {"tools": [{}]}, 400, "tools cannot be had here"),
        ("chat/completions", chat | {"top_logprobs": 2}, 400, "goes with logprobs"),
        ("nothing", chat, 404, "Not Found"),
        ("models", chat, 405, "Method Not Allowed"),
    ):  # fmt: skip
        answer = post(f"{server.url}/{path}", json=body)
        error = answer.json()["error"]
        assert answer.status_code == status and message in error["message"], (body, answer.text)
        assert error["type"] == "invalid_request_error" and set(error) == {"message", "type", "param", "code"}
    url = f"{server.url}/completions"
    assert post(url, content=b"{", headers={"Content-Type": "application/json"}).status_code == 400
    assert post(url, content=json.dumps(text), headers={"Content-Type": "text/plain"}).status_code == 415
    assert post(url, json=text | {"user": "x" * (9 << 20)}).status_code == 413
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(**text, max_tokens=500)
    assert caught.value.code == "context_length_exceeded" and caught.value.param == "max_tokens"
    assert get(server.url.removesuffix("/v1") + "/health").json() == {"status": "ok", "writing": 0}


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_ends_its_work(server, monkeypatch, stream):
    decoder, seen, gate = server.engine._decoder, [], threading.Semaphore(0)
    advance, submit = decoder.advance, server.engine.submit
    monkeypatch.setattr(server.engine, "submit", lambda made: (seen.extend(made), submit(made)))

    def gated(tops=False):
        assert gate.acquire(timeout=SECONDS)
        return advance(tops=tops)

    monkeypatch.setattr(decoder, "advance", gated)
    body = {"model": "tiny", "prompt": "tree", "max_tokens": 80, "temperature": 0, "stream": stream, "stop": []}
    try:
        gate.release()
        if stream:
            with httpx.stream("POST", f"{server.url}/completions", json=body, timeout=SECONDS) as answer:
                assert next(answer.iter_lines()).startswith("data: {")
        else:
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{server.url}/completions", json=body, timeout=httpx.Timeout(SECONDS, read=0.2))
        wait_until(lambda: seen and seen[0].cancelled)
        gate.release()
        wait_until(lambda: not server.engine.writing)
        assert seen[0].count <= 24 and not seen[0].finish
    finally:
        for _ in range(20):
            gate.release()


def wait_until(holds):
    end = time.monotonic() + SECONDS
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_what_stands_in_the_way_of_serving_is_said(saved, capsys):
    taken = listen("127.0.0.1", 0)
    port = taken.getsockname()[1]
    assert main(["serve", str(saved), "--port", str(port)]) == 2
    assert f"--port {port}: cannot be listened on" in capsys.readouterr().err
    taken.close()
    with pytest.raises(ConfigError, match="--port 70000"):
        listen("127.0.0.1", 70000)
    assert main(["serve", str(saved), "--rows", "0"]) == 2


def test_a_model_without_a_template_completes_and_does_not_chat(saved, loaded, tokenizer):
    options = ServeOptions(str(saved), rows=1, dtype="float32")
    server = ModelServer(options, loaded, tokenizer, LENGTH, listen("127.0.0.1", 0))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        chat = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
        answer = post(f"{server.url}/chat/completions", json=chat)
        assert answer.status_code == 400 and "name its template: --template" in answer.json()["error"]["message"]
    finally:
        server.stop()
        thread.join()


def test_a_model_that_fails_tells_all_who_wait(saved, loaded, tokenizer, monkeypatch):
    options = ServeOptions(str(saved), template="gemma", rows=1, dtype="float32")
    server = ModelServer(options, loaded, tokenizer, LENGTH, listen("127.0.0.1", 0))
    monkeypatch.setattr(threading, "excepthook", lambda args: None)

    def fails(tops=False):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(server.engine._decoder, "advance", fails)
    thread = threading.Thread(target=server.run)
    thread.start()
    text = {"model": "tiny", "prompt": ["a", "b"], "max_tokens": 4}
    try:
        with httpx.stream("POST", f"{server.url}/completions", json=text | {"stream": True}, timeout=SECONDS) as answer:
            assert "out of memory" in "".join(answer.iter_lines())
        answer = post(f"{server.url}/completions", json=text)
        assert answer.status_code == 500 and answer.json()["error"]["type"] == "server_error"
        assert get(server.url.removesuffix("/v1") + "/health").status_code == 500
    finally:
        server.stop()
        thread.join()


def test_more_than_may_wait_are_told_to_come_again(server, monkeypatch):
    monkeypatch.setattr(server.engine, "_most_waiting", 2)
    answer = post(f"{server.url}/completions", json={"model": "tiny", "prompt": ["a"] * 3, "max_tokens": 1})
    assert answer.status_code == 503 and answer.json()["error"]["code"] == "busy"
