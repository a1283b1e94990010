"""`fastrdm report --watch`: the page on the loopback address, made anew whenever a file of a run has changed."""

import threading
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from fastrdm.report.run_files import FILES

HOST = "127.0.0.1"
NAMES = (HOST, "localhost")  # a page of another name, led here by its name server, gets nothing


def stamp(runs: Sequence[str | Path]) -> str:
    """Sizes and times of the runs' files as one text, which changes when a run goes on."""
    seen = []
    for file in (Path(run) / name for run in runs for name in FILES):
        try:
            state = file.stat()
        except OSError:
            continue
        seen.append(f"{state.st_mtime_ns:x}.{state.st_size:x}")
    return "-".join(seen)


class PageServer(ThreadingHTTPServer):
    """Serves `/`, the page, and `/stamp`, which the page asks for to see whether it is still the newest."""

    daemon_threads = True

    def __init__(self, page: Callable[[str], str], runs: Sequence[str | Path], port: int) -> None:
        super().__init__((HOST, port), _Handler)
        self.page, self.runs = page, runs
        self.lock = threading.Lock()
        self.made: tuple[str, bytes] = ("", b"")  # stamp and page

    @property
    def address(self) -> str:
        return f"http://{HOST}:{self.server_port}/"

    def newest(self) -> bytes:
        """The page, which is made anew when a file of the runs has changed."""
        with self.lock:
            now = stamp(self.runs)
            if now != self.made[0] or not self.made[1]:
                self.made = now, self.page(now).encode("utf-8", "backslashreplace")
            return self.made[1]


class _Handler(BaseHTTPRequestHandler):
    server: PageServer

    def do_GET(self) -> None:
        if self.headers.get("Host", "").rpartition(":")[0] not in NAMES:
            return self.send_error(403, "This server answers on the loopback address only")
        if self.path == "/stamp":
            return self._answer("text/plain", stamp(self.server.runs).encode("utf-8", "backslashreplace"))
        if self.path != "/":
            return self.send_error(404)
        try:
            page = self.server.newest()
        except ValueError as error:  # a run was taken away
            return self.send_error(404, str(error))
        self._answer("text/html", page)

    def _answer(self, kind: str, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing for a request."""


def serve(page: Callable[[str], str], runs: Sequence[str | Path], port: int) -> int:
    """Serve until Ctrl-C; the exit status. ValueError names a port that cannot be had."""
    try:
        server = PageServer(page, runs, port)
    except (OSError, OverflowError) as error:
        raise ValueError(f"--port must be a free port, got {port}: {error}") from None
    with server:
        print(f"report: {server.address} (Ctrl-C ends it)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()
    return 0
