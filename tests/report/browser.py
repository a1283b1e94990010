"""A headless Chromium for tests of pages, where there is one."""

import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")


def run(url: str, *options: str, width: int = 1280, height: int = 1000, dark: bool = False) -> str:
    """What Chromium prints about a page of a window of that size, which is 500 wide at least."""
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
    command += [f"--window-size={width},{height}", "--virtual-time-budget=5000", *options]
    command += ["--blink-settings=preferredColorScheme=0"] if dark else []
    return subprocess.run([*command, url], capture_output=True, text=True, check=True, timeout=240).stdout


def ask(page: Path, script: str, width: int = 1280, dark: bool = False) -> str:
    """Open a copy of the page in a frame of that width with this script at its end, and return what the script sets
    `answer` to. Errors of the page's own scripts are the answer if there are any.
    """
    copy, frame = (page.with_name(f"{kind}-{page.name}") for kind in ("asked", "frame"))
    watch = "<script>let failed = ''; addEventListener('error', e => failed = e.message);</script>"
    ending = f"""<script>addEventListener("load", async () => {{
      let answer = ""; const frame = () => new Promise(r => setTimeout(r, 300));
      try {{ await frame(); {script} }} catch (e) {{ answer = `error: ${{e}}`; }}
      parent.postMessage(failed || answer, "*");
    }});</script>"""
    text = page.read_text()
    copy.write_text(text.replace("<head>", f"<head>{watch}", 1).replace("</body>", f"{ending}</body>"))
    frame.write_text(
        "<html><script>addEventListener('message', e => document.documentElement.dataset.answer = e.data);</script>"
        f'<body style="margin: 0"><iframe style="border: 0" width="{width}" height="1000" src="{copy.name}"></iframe>'
    )
    found = re.search(r'<html[^>]* data-answer="([^"]*)"', run(f"file://{frame}", "--dump-dom", width=width, dark=dark))
    assert found, "the page did not come to its end"
    return unescape(found[1])
