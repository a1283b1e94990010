"""`python slow_store.py FOLDER [--mb-per-second X] [--latency S]`: a web server on 127.0.0.1 that is slow or at fault.

Prints its port. Serves ranges. Used by tests, which also make it fail, and by benchmarks/loaders/forms.py.
"""

import argparse
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

PIECE = 1 << 16  # bytes sent at a time


class SlowStore(ThreadingHTTPServer):
    """Files below `folder`; the faults are changed while it runs."""

    daemon_threads = True

    def __init__(self, folder: Path, rate: float = float("inf"), latency: float = 0.0) -> None:
        """`rate`: bytes a second of all connections together. `latency`: seconds before an answer."""
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.rate, self.latency = folder, rate, latency
        self.lock, self.free = threading.Lock(), 0.0
        self.failing = 0  # answers to come that are an error of the server
        self.cutting = 0  # answers to come that end half-way
        self.damaging = 0  # answers to come with a wrong byte
        self.ranges = True
        self.asked: list[str] = []  # path of every GET

    def take(self, count: int) -> None:
        """Wait until `count` bytes may be sent."""
        with self.lock:
            start = max(self.free, time.monotonic())
            self.free = start + count / self.rate
        time.sleep(max(self.free - time.monotonic(), 0))

    def handle_error(self, *_: Any) -> None:
        """A client that goes away in the middle is none of the server's business."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    """GET and HEAD of files."""

    protocol_version = "HTTP/1.1"
    server: SlowStore

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        server, path = self.server, self.server.folder / self.path.lstrip("/")
        time.sleep(server.latency)
        if body and server.failing > 0:
            server.failing -= 1
            self._status(500)
            return
        if not path.is_file():
            self._status(404)
            return
        size = path.stat().st_size
        start, end = 0, size
        asked = self.headers.get("Range") if server.ranges else None
        if asked:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, end = int(first), min(int(last) + 1 if last else size, size)
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(end - start))
        self.send_header("Accept-Ranges", "bytes" if server.ranges else "none")
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
        self.end_headers()
        if body:
            self._send(path, start, end)

    def _send(self, path: Path, start: int, end: int) -> None:
        server, cut = self.server, None
        if server.cutting > 0:
            server.cutting -= 1
            cut = start + (end - start) // 2
        with path.open("rb") as file:
            file.seek(start)
            while start < (cut or end):
                piece = file.read(min(PIECE, (cut or end) - start))
                if server.damaging > 0:
                    server.damaging -= 1
                    piece = bytes([piece[0] ^ 1]) + piece[1:]
                server.take(len(piece))
                try:
                    self.wfile.write(piece)
                except ConnectionError:
                    return
                start += len(piece)
        if cut is not None:
            self.close_connection = True
            self.connection.close()

    def _status(self, code: int) -> None:
        self.send_response(code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Nothing: tests read what is printed."""


@contextmanager
def running(folder: Path, **how: float) -> Iterator[SlowStore]:
    """The server, while the context lasts."""
    server = SlowStore(folder, **how)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--mb-per-second", type=float, default=float("inf"))
    parser.add_argument("--latency", type=float, default=0.0)
    options = parser.parse_args()
    server = SlowStore(options.folder, options.mb_per_second * 1e6, options.latency)
    print(server.server_address[1], flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
