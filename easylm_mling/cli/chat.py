"""Talking to a model: `chat` and `serve`."""

from easylm_mling.errors import check

_LONGEST = 8192  # tokens of a window, unless --max-length says more


def add_verbs(verbs):
    """Add `chat` and `serve` to the parser's `verbs`."""
    chat = verbs.add_parser("chat", help="talk to a model in the terminal")
    _add_model(chat)
    chat.add_argument("--system", default="", metavar="LINE", help="the system line")
    chat.add_argument("--max-new-tokens", type=int, default=1024, help="of a reply (default: 1024)")
    chat.add_argument("--temperature", type=float, default=0.7, help="default: 0.7; 0: always the likeliest token")
    chat.add_argument("--top-p", type=float, default=0.95, help="draw from the smallest set with this probability")
    chat.add_argument("--seed", type=int, default=0)
    chat.set_defaults(run=_chat)

    serve = verbs.add_parser("serve", help="answer requests as OpenAI's interface has them, on this machine")
    _add_model(serve)
    serve.add_argument("--name", default="", help="what clients call the model (default: its folder's name)")
    serve.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1, which only this machine can reach")
    serve.add_argument("--port", type=int, default=8000, help="default: 8000; 0: any that is free")
    serve.add_argument(
        "--rows", type=int, default=8, help="texts written at once (default: 8); each takes memory for a whole window"
    )
    serve.set_defaults(run=_serve)


def _add_model(verb):
    verb.add_argument("model_dir", help="a Hugging Face directory, a run's directory, or one made by import-hf")
    verb.add_argument("--step", type=int, help="of a run: default, the newest")
    verb.add_argument("--tokenizer", help="default: the one that lies with the model")
    verb.add_argument(
        "--template",
        metavar="NAME",
        help="how it is asked: tokenizer, a plain form, or a .jinja or .yaml file (default: as it was trained, else the tokenizer's)",
    )
    verb.add_argument(
        "--max-length", type=int, metavar="TOKENS", help="of the window (default: the model's, up to 8192)"
    )
    verb.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")


def _open(a):
    """Return the model's graph, params and config, its tokenizer and its window."""
    from easylm_mling.data.tokenization.tokenizer import Tokenizer
    from easylm_mling.inference.generate import find_tokenizer, load_model, read_model

    tokenizer = Tokenizer(str(a.tokenizer or find_tokenizer(a.model_dir, a.step)), "--tokenizer ")
    model = read_model(a.model_dir, a.step)
    tokenizer.check_model(model)
    length = min(model.max_position_embeddings, _LONGEST) if a.max_length is None else a.max_length
    check(
        1 < length <= model.max_position_embeddings,
        f"--max-length {length}: the model reads 2 to {model.max_position_embeddings} tokens",
    )
    graph, params, _ = load_model(a.model_dir, step=a.step)
    return graph, params, model, tokenizer, length


def _chat(a) -> int:
    import sys

    check(a.max_new_tokens > 0, f"--max-new-tokens {a.max_new_tokens}: must be positive")
    check(0 <= a.temperature < float("inf"), f"--temperature {a.temperature}: must be zero or a positive number")
    check(0 < a.top_p <= 1, f"--top-p {a.top_p}: must be above 0 and at most 1")
    from easylm_mling.inference.chat import HELP, Chat, run_chat, typed_lines
    from easylm_mling.inference.decoder import Decoder, Draw
    from easylm_mling.inference.dialogue import open_dialogue
    from easylm_mling.inference.text_stream import TextStream

    graph, params, model, tokenizer, length = _open(a)
    dialogue = open_dialogue(a.model_dir, a.step, tokenizer, a.template, length)
    decoder = Decoder(graph, params, model, 1, length, a.dtype)
    ends = frozenset({model.eos_token_id, *model.stop_token_ids, dialogue.end})
    draw = Draw(a.temperature, a.top_p, seed=a.seed)
    chat = Chat(decoder, dialogue, lambda: TextStream(tokenizer, ends), draw, a.max_new_tokens, a.system)
    print(f"{a.model_dir}, asked by its template {dialogue.name}. {HELP}", file=sys.stderr)
    run_chat(chat, typed_lines("> "), sys.stdout, sys.stderr)
    return 0


def _serve(a) -> int:
    import sys
    from importlib.util import find_spec

    check(a.rows > 0, f"--rows {a.rows}: must be positive")
    check(
        all(map(find_spec, ("starlette", "uvicorn"))),
        "serve: its web server is not installed; run pip install 'easylm-mling[serve]'",
    )
    from easylm_mling.serving.command import LOOPBACK, ModelServer, ServeOptions, listen

    listening = listen(a.host, a.port)
    graph, params, model, tokenizer, length = _open(a)
    options = ServeOptions(a.model_dir, a.step, a.template, a.name, a.rows, a.dtype)
    server = ModelServer(options, (graph, params, model), tokenizer, length, listening)
    if a.host not in LOOPBACK:
        print(f"warning: whoever can reach {a.host} can use the model; no key is asked for", file=sys.stderr)
    asked = f"chats by its template {server.template}" if server.template else f"no chats: {server.no_template}"
    print(
        f"{server.name} at {server.url}, window {length:,}, {a.rows} texts at once; {asked}",
        file=sys.stderr,
        flush=True,
    )
    server.run()
    return 0
