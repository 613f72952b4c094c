"""A judge's endpoint in this process, in OpenAI's form: it replies by a rule, late, and fails in every way when told to."""

import contextlib
import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

# A status; a body that is cut, is no JSON, has no choices, or is JSON of another form.
WAYS_TO_FAIL = (429, 500, "half", "no json", "no choices", "a list")


class Server(ThreadingHTTPServer):
    """`reply` makes the judge's text of the messages. Of `fail_every` requests one fails, each in another of `ways`."""

    daemon_threads = True

    def __init__(self, reply: Callable[[list[dict]], str], key: str = "key-of-the-test"):
        self.reply, self.key, self.models = reply, key, ["strong"]
        self.fail_every, self.ways, self.seconds, self.failed = 0, WAYS_TO_FAIL, 0.0, 0
        self.asked: list[dict] = []
        self._count, self._lock = itertools.count(1), threading.Lock()
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def failure(self):
        with self._lock:
            if not self.fail_every or next(self._count) % self.fail_every:
                return None
            self.failed += 1
            return self.ways[self.failed % len(self.ways)]

    def handle_error(self, request, client_address):
        """A client that hangs up is no error."""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._send(200, {"object": "list", "data": [{"id": m, "object": "model"} for m in self.server.models]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(body)
        time.sleep(self.server.seconds)
        failure = self.server.failure()
        text = self.server.reply(body["messages"])
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
        usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
        whole = {
            "id": "1",
            "object": "chat.completion",
            "created": 0,
            "model": body["model"],
            "choices": [choice],
            "usage": usage,
        }
        if isinstance(failure, int):
            self._send(failure, {"error": {"message": f"no, {self.server.key}", "type": "none"}})
        elif failure == "half":
            self._send(200, whole, half=True)
        elif failure == "no json":
            self._send(200, "<html>busy</html>")
        else:
            self._send(200, {"no choices": whole | {"choices": []}, "a list": [1], None: whole}[failure])

    def _send(self, status: int, content, half: bool = False):
        if self.headers["Authorization"] != f"Bearer {self.server.key}":
            status, content = 401, {"error": {"message": f"wrong: {self.headers['Authorization']}"}}
        raw = (content if isinstance(content, str) else json.dumps(content)).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw[: len(raw) // 2] if half else raw)
        self.close_connection = True


@contextlib.contextmanager
def serve(reply: Callable[[list[dict]], str]) -> Iterator[Server]:
    with Server(reply) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
