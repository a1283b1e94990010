"""The live line on a terminal and in a file."""

import os
import pty
import subprocess
import sys

import pytest

from fastrdm import live_line
from fastrdm.live_line import LiveLine

PROGRAM = """
from fastrdm.live_line import LiveLine
line = LiveLine()
line.advance("step 1", 0.1)
line.advance("x" * 200, 0.5)
line.say("a line that stays, however long")
line.tell("no share is known")
line.close()
"""


def on_a_terminal(program: str) -> str:
    """Everything that a program writes to a terminal of 40 columns."""
    ours, its = pty.openpty()
    child = subprocess.Popen([sys.executable, "-c", program], stdout=its, env={**os.environ, "COLUMNS": "40"})
    os.close(its)
    data = b""
    try:
        while piece := os.read(ours, 4096):
            data += piece
    except OSError:  # the end of a terminal without a writer
        pass
    finally:
        os.close(ours)
    assert child.wait(60) == 0
    return data.decode()


def test_a_line_on_a_terminal_is_drawn_over_and_never_wider_than_it() -> None:
    drawn, stays = on_a_terminal(PROGRAM).split("a line that stays, however long\r\n")
    first, second, blank = [part for part in drawn.split("\r") if part]
    assert first.startswith(" 10%|") and first.endswith("| step 1")
    assert second.startswith(" 50%|") and second.endswith("| " + "x" * 22) and len(second) == 39
    assert blank == " " * 39, "nothing of it stays beside the printed line"
    assert [part for part in stays.split("\r") if part.strip()] == ["no share is known"]
    assert stays.endswith(" \r")


def test_a_file_gets_a_line_now_and_then(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(live_line.time, "monotonic", lambda: clock[0])
    line = LiveLine(every=10)
    assert not line.advance("too early", None)
    clock[0] = 111
    assert line.advance("in time", 0.5) and not line.advance("too early again", 0.6)
    line.say("said")
    assert capsys.readouterr().out == "in time\nsaid\n"
    assert LiveLine(every=10, at_once=True).advance("the first", None) and capsys.readouterr().out == "the first\n"


def test_a_closed_pipe_ends_nothing() -> None:
    program = "import os\nos.close(1)\n" + PROGRAM.replace("LiveLine()", "LiveLine(every=0)")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60)
    assert done.returncode in (0, 120) and b"Traceback" not in done.stderr, done.stderr
