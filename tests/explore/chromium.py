"""A headless Chromium that is clicked and asked, where there is one."""

import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Browser:
    """Headless Chromium by the DevTools protocol over two pipes, which needs no package and no port."""

    def __init__(self, folder: Path) -> None:
        read_here, write_there = os.pipe()
        read_there, write_here = os.pipe()

        def connect() -> None:
            # Chromium reads commands from 3 and writes answers to 4; higher numbers first, so that none is overwritten.
            os.dup2(read_there, 103)
            os.dup2(write_there, 104)
            os.dup2(103, 3)
            os.dup2(104, 4)

        assert CHROMIUM is not None
        given = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
        given += [f"--user-data-dir={folder}", "about:blank"]
        self.process = subprocess.Popen(given, preexec_fn=connect, close_fds=False, stderr=subprocess.DEVNULL)
        os.close(read_there)
        os.close(write_there)
        self.read, self.write = os.fdopen(read_here, "rb"), os.fdopen(write_here, "wb", buffering=0)
        self.number, self.session = 0, ""
        targets = self("Target.getTargets")["targetInfos"]
        target = next(t["targetId"] for t in targets if t["type"] == "page")
        self.session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def __call__(self, method: str, **parameters: Any) -> Any:
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        self.write.write(json.dumps(message | ({"sessionId": self.session} if self.session else {})).encode() + b"\0")
        while True:
            text = b""
            while not text.endswith(b"\0"):
                piece = self.read.read(1)
                assert piece, "Chromium has ended"
                text += piece
            answer = json.loads(text[:-1])
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]

    def value(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        found = self("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def show(self, file: Path, width: int, height: int, phone: bool = False) -> float:
        """Open a file in a window of that size; seconds until its pictures are there."""
        size = {"width": width, "height": height, "deviceScaleFactor": 2 if phone else 1, "mobile": phone}
        self("Emulation.setDeviceMetricsOverride", **size)
        began = time.monotonic()
        self("Page.navigate", url=file.as_uri())
        while self.value("document.body && document.body.dataset.ready") != "yes":
            assert time.monotonic() - began < 60
            time.sleep(0.02)
        return time.monotonic() - began

    def mouse(self, kind: str, x: float, y: float, **more: Any) -> None:
        self("Input.dispatchMouseEvent", type=kind, x=x, y=y, **more)
