"""A web server over a folder, in this process, that serves ranges, slowly, and fails when told to."""

import contextlib
import itertools
import threading
import time
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

WAYS_TO_FAIL = ("status", "silence", "half")


class Server(ThreadingHTTPServer):
    """`fail_every`: of so many requests one fails, each time in another way. 0: none. `ranges`: serve them at all."""

    daemon_threads = True

    def __init__(self, folder: Path, fail_every: int = 0, seconds: float = 0.0, ranges: bool = True):
        self.folder, self.fail_every, self.seconds, self.ranges = folder, fail_every, seconds, ranges
        self.ways = WAYS_TO_FAIL
        self.etags, self.asked, self.failed, self.sent = True, [], 0, 0
        self._count, self._lock = itertools.count(1), threading.Lock()
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def failure(self) -> str | None:
        with self._lock:
            number = next(self._count)
            if not self.fail_every or number % self.fail_every:
                return None
            self.failed += 1
            return self.ways[self.failed % len(self.ways)]

    def handle_error(self, request, client_address):
        """A client that hangs up is no error."""


class Handler(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def __init__(self, request, address, server: Server):
        super().__init__(request, address, server, directory=str(server.folder))

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self._answer(body=False)

    def do_GET(self):
        self._answer(body=True)

    def _answer(self, body: bool):
        server = self.server
        server.asked.append((self.command, self.path, self.headers.get("Range")))
        time.sleep(server.seconds)
        failure = server.failure()
        if failure == "status":
            self.send_error(503, "try later")
            return
        path = Path(self.translate_path(self.path))
        if failure == "silence" or (failure and not path.is_file()):
            self.close_connection = True
            return
        if not path.is_file():
            SimpleHTTPRequestHandler.do_GET(self) if body else SimpleHTTPRequestHandler.do_HEAD(self)
            return
        wanted = self.headers.get("Range") if server.ranges else None
        size = path.stat().st_size
        begin, end = 0, size
        if wanted:
            first, last = wanted.removeprefix("bytes=").split("-")
            begin, end = int(first), min(int(last) + 1, end)
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(end - begin))
        if wanted:
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{size}")
        if server.etags:
            self.send_header("ETag", f'"{path.stat().st_mtime_ns:x}"')
        self.end_headers()
        if not body:
            return
        with open(path, "rb") as file:
            file.seek(begin)
            part = file.read(end - begin)
        if failure == "half":
            part, self.close_connection = part[: len(part) // 2], True
        self.wfile.write(part)
        server.sent += len(part)


@contextlib.contextmanager
def serve(folder: Path, **options) -> Iterator[Server]:
    with Server(folder, **options) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
