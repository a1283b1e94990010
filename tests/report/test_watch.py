"""The page that follows its runs: served on the loopback address only, made anew when a run goes on."""

import http.client
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastrdm.commands.report import main
from fastrdm.report.watch import PageServer, serve


@pytest.fixture
def server(tmp_path: Path) -> Iterator[PageServer]:
    (tmp_path / "metrics.jsonl").write_text("a\n")
    pages = iter(f"page {i} of " for i in range(10))
    with PageServer(lambda stamp: next(pages) + stamp, [tmp_path], 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def get(server: PageServer, path: str, host: str = "127.0.0.1") -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    connection.request("GET", path, headers={"Host": f"{host}:{server.server_port}"})
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def test_the_page_changes_with_its_runs_and_not_else(server: PageServer, tmp_path: Path) -> None:
    _, stamp = get(server, "/stamp")
    assert get(server, "/") == get(server, "/", "localhost") == (200, f"page 0 of {stamp}")
    (tmp_path / "metrics.jsonl").write_text("a\nb\n")
    _, other = get(server, "/stamp")
    assert other != stamp
    assert get(server, "/") == (200, f"page 1 of {other}")


def test_nothing_else_is_served(server: PageServer) -> None:
    assert server.server_address[0] == "127.0.0.1"
    assert get(server, "/metrics.jsonl")[0] == 404
    assert get(server, "/", "elsewhere.example")[0] == 403


def test_a_port_in_use_and_a_path_that_is_no_run_are_refused(server: PageServer, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"--port must be a free port, got {server.server_port}"):
        serve(lambda stamp: stamp, [tmp_path], server.server_port)
    with pytest.raises(ValueError, match="--port must be a free port, got 70000"):
        serve(lambda stamp: stamp, [tmp_path], 70000)
    with pytest.raises(ValueError, match="RUN must be the folder of a run"):
        main([str(tmp_path / "none"), "--watch"])
