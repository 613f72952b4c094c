"""`easylm-mling serve`: the model behind HTTP, until a signal ends it."""

import socket
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import uvicorn

from easylm_mling.config import ModelConfig
from easylm_mling.data.tokenization.tokenizer import Tokenizer
from easylm_mling.errors import ConfigError, check, one_line
from easylm_mling.inference.decoder import Decoder
from easylm_mling.inference.dialogue import open_dialogue
from easylm_mling.serving.app import Service
from easylm_mling.serving.engine import Engine
from easylm_mling.serving.protocol import Reader

LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True)
class ServeOptions:
    """What is served, and how."""

    model: str
    step: int | None = None
    template: str | None = None
    name: str = ""  # what clients call the model; by default its folder's name
    rows: int = 8
    dtype: str = "bfloat16"


class ModelServer:
    """A loaded model that is served: `run` until a signal, or until `stop` is called in another thread."""

    def __init__(
        self,
        options: ServeOptions,
        loaded: tuple[Any, dict, ModelConfig],
        tokenizer: Tokenizer,
        length: int,
        listening: socket.socket,
    ):
        graph, params, model = loaded
        self.name = options.name or options.model.rstrip("/").rpartition("/")[2]
        try:
            dialogue = open_dialogue(options.model, options.step, tokenizer, options.template, length)
        except ConfigError as error:
            if options.template:
                raise
            dialogue = str(error)
        self.template = None if isinstance(dialogue, str) else dialogue.name
        self.no_template = dialogue if isinstance(dialogue, str) else ""
        self._socket = listening
        host, port = listening.getsockname()[:2]
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
        bos = [model.bos_token_id] if model.bos_token_id >= 0 else []
        reader = Reader((self.name, options.model), tokenizer, dialogue, length, bos, model.vocab_size)
        self.engine = Engine(Decoder(graph, params, model, options.rows, length, options.dtype))
        ends = frozenset({model.eos_token_id, *model.stop_token_ids})
        chat_end = frozenset() if isinstance(dialogue, str) else frozenset({dialogue.end})
        service = Service(self.engine, reader, tokenizer, self.name, ends, chat_end)
        config = uvicorn.Config(
            service.application(), log_level="warning", lifespan="off", ws="none", timeout_graceful_shutdown=5
        )
        self._server = uvicorn.Server(config)

    def run(self):
        """Serve until it is stopped, by an interrupt say: then what is being written may end, for 5 seconds."""
        try:
            with suppress(KeyboardInterrupt):  # uvicorn raises it again when it has ended
                self._server.run(sockets=[self._socket])
        finally:
            self.engine.close()

    def stop(self):
        """End `run`, from another thread."""
        self._server.should_exit = True


def listen(host: str, port: int) -> socket.socket:
    """Take a port. Raises ConfigError if that cannot be."""
    check(0 <= port < 1 << 16, f"--port {port}: must be 0 (any) to 65535")
    bound = None
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, socket.SOCK_STREAM)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen(128)  # from now on clients wait, and are not refused
    except OSError as error:
        if bound:
            bound.close()
        raise ConfigError(
            f"--host {host} --port {port}: cannot be listened on ({one_line(error)}); name another, or --port 0 for any that is free"
        ) from None
    return bound
