"""A bucket without a network: PyPI's gcp-storage-emulator, with the generations and preconditions that it lacks, and a proxy
before it that is slow, fails or goes away when told to.
"""

import contextlib
import itertools
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

BUCKET = "bucket"
# The last: the request was done, but whoever asked does not learn of it.
WAYS_TO_FAIL = ("refused", "silence", "half")


def environment(url: str) -> dict[str, str]:
    """What makes gcsfs, google-cloud-storage and tensorstore talk to a server at `url`."""
    return {
        "STORAGE_EMULATOR_HOST": url,
        "TENSORSTORE_GCS_HTTP_URL": url,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
        # It would ask Google what kind of bucket it is.
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    }


@contextlib.contextmanager
def bucket() -> Iterator[str]:
    """The URL of a server with one bucket, BUCKET, in a process of its own."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([sys.executable, __file__], text=True, **pipes) as server:
        assert server.stdout
        try:
            yield f"http://localhost:{int(server.stdout.readline())}"
        finally:
            server.kill()


class Proxy(threading.Thread):
    """Before the server at `url`: `seconds` late; every `fail_every`-th request fails, each time in another of `ways`; or `gone`.

    A request that begins with something that holds `lost` (bytes; none: no request) waits, and is never answered.
    The server answers one request a connection, and so does this. `serving` holds the numbers of those that have no answer yet.
    """

    def __init__(self, url: str):
        super().__init__(daemon=True)
        self.seconds, self.fail_every, self.gone, self.lost = 0.0, 0, False, b""
        self.ways, self.failed, self.asked = WAYS_TO_FAIL[:2], 0, 0
        self.serving: set[int] = set()
        self._server = ("localhost", urlsplit(url).port)
        self._count = itertools.count(1)
        self._listener = socket.create_server(("localhost", 0), backlog=200)
        self.url = f"http://localhost:{self._listener.getsockname()[1]}"
        self.start()

    def run(self):
        while True:
            with contextlib.suppress(OSError):
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket):
        with contextlib.suppress(OSError), client:
            # Clients may connect twice and use the first connection that is there; only a request counts.
            if not client.recv(1, socket.MSG_PEEK):
                return
            number = self.asked = next(self._count)
            self.serving.add(number)
            try:
                self._answer(client, number)
            finally:
                self.serving.discard(number)

    def _answer(self, client: socket.socket, number: int):
        while self.gone:  # as if packets were dropped
            time.sleep(0.05)
        time.sleep(self.seconds)
        if self.lost and self.lost in client.recv(4096, socket.MSG_PEEK):
            while self.lost:
                time.sleep(0.05)
            return
        failure = None
        if self.fail_every and number % self.fail_every == 0:
            failure = self.ways[self.failed % len(self.ways)]
            self.failed += 1
        if failure in WAYS_TO_FAIL[:2]:
            client.recv(1 << 16)
            client.sendall(
                b"HTTP/1.0 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n" if failure == "refused" else b""
            )
            return
        with socket.create_connection(self._server) as server:
            upload = threading.Thread(target=_copy, args=(client, server), daemon=True)
            upload.start()
            answer = bytearray()
            while part := server.recv(1 << 20):
                answer += part
            client.sendall(answer[: len(answer) // 2] if failure == "half" else answer)
            # To close is not enough while the other thread reads from it.
            client.shutdown(socket.SHUT_RDWR)


def _copy(source: socket.socket, target: socket.socket):
    with contextlib.suppress(OSError):
        while part := source.recv(1 << 20):
            target.sendall(part)
    # Or the server would wait for the rest of what a killed process was sending, and serve nobody else.
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)


def serve():
    """Print the port, then serve until killed."""
    from gcp_storage_emulator import server
    from gcp_storage_emulator.handlers import objects

    def download(request, response, storage, *args, **kwargs):
        objects.download(request, response, storage, *args, **kwargs)
        if response.status in (HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT):
            found = storage.get_file_obj(request.params["bucket_name"], request.params["object_id"])
            response["x-goog-generation"] = found["generation"]

    def get(request, response, storage, *args, **kwargs):
        media = request.query.get("alt") == ["media"]
        (download if media else objects.get)(request, response, storage, *args, **kwargs)

    for _, handlers in server.HANDLERS:
        for method, handler in handlers.items():
            if handler is objects.download:
                handlers[method] = download
            elif handler is objects.get:
                handlers[method] = get

    # It takes an empty object for none, and what came of one whose sender died for all of it.
    read_data, read_raw = server._read_data, server._read_raw_data
    server._read_data = lambda handler, query: read_data(handler, query) or (b"" if "uploadType" in query else None)

    def read_whole(handler):
        raw = read_raw(handler)
        if len(raw or b"") < int(handler.headers.get("Content-Length") or 0):
            raise ConnectionError("cut short")
        return raw

    server._read_raw_data = read_whole
    one_at_a_time = threading.Lock()

    class Handler(server.RequestHandler):
        def _do(self, method: str):
            with one_at_a_time:
                if self._is_as_asked():
                    server.Router(self).handle(method)

        def do_GET(self):
            self._do("GET")

        def do_POST(self):
            self._do("POST")

        def do_PUT(self):
            self._do("PUT")

        def do_DELETE(self):
            self._do("DELETE")

        def _is_as_asked(self) -> bool:
            url = urlsplit(self.path)
            query = parse_qs(url.query)
            name = query["name"][0] if "name" in query else unquote(url.path.partition("/o/")[2])
            there = self.storage.objects.get(BUCKET, {}).get(name.removesuffix("/compose"))
            generation = there["generation"] if there else "0"
            status = None
            if query.get("ifGenerationMatch", [generation]) != [generation]:
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                status = HTTPStatus.PRECONDITION_FAILED
            elif generation in query.get("ifGenerationNotMatch", []):
                status = HTTPStatus.NOT_MODIFIED
            if status:
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()
            return status is None

        def log_message(self, *_):
            pass

    storage = server.Storage(use_memory_fs=True)
    # The whole table of objects, written down at each request.
    storage._write_config_to_file = lambda: None
    server.buckets.create_bucket(BUCKET, storage)
    http = server.server.ThreadingHTTPServer(("localhost", 0), server.partial(Handler, storage))
    print(http.server_port, flush=True)
    http.serve_forever()


if __name__ == "__main__":
    # The folder of this file must not hide packages from the emulator.
    sys.path = [p for p in sys.path if Path(p or os.getcwd()) != Path(__file__).parent]
    serve()
