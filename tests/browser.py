"""A headless Chromium, spoken to over Chrome's DevTools protocol."""

from __future__ import annotations

import base64
import itertools
import json
import shutil
import subprocess
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.request import urlopen

from websockets.sync.client import connect

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--remote-debugging-port=0",
)
HANGS = 60.0
"""Seconds after which a browser that says nothing is given up."""


def found() -> str | None:
    """Return Chromium's command, where it is installed."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next((path for name in names if (path := shutil.which(name))), None)


class Browser:
    """One page. ``problems`` are errors of its console, exceptions and refusals of its policy."""

    def __init__(self, home: Path) -> None:
        self.problems: list[str] = []
        self.asked: list[str] = []
        self._ids = itertools.count(1)
        command = [str(found()), *FLAGS, f"--user-data-dir={home}", "about:blank"]
        with ExitStack() as opened:
            self._process = opened.enter_context(
                subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            )
            opened.callback(self._process.terminate)
            port = _port(home / "DevToolsActivePort", self._process)
            with urlopen(f"http://127.0.0.1:{port}/json/list", timeout=HANGS) as answer:
                pages = [page for page in json.load(answer) if page["type"] == "page"]
            where = pages[0]["webSocketDebuggerUrl"]
            connection = connect(where, max_size=1 << 28, open_timeout=HANGS)
            self._socket = opened.enter_context(connection)
            for domain in ("Page", "Runtime", "Log", "Network"):
                self.call(f"{domain}.enable")
            self._opened = opened.pop_all()

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._opened.close()

    def call(self, method: str, **params: Any) -> Mapping[str, Any]:
        """Call a method of the protocol; events that come meanwhile are taken down."""
        number = next(self._ids)
        self._socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while True:
            told = json.loads(self._socket.recv(HANGS))
            if told.get("id") == number:
                assert "error" not in told, told
                result: Mapping[str, Any] = told["result"]
                return result
            self._note(told)

    def _note(self, told: Mapping[str, Any]) -> None:
        about = told.get("params", {})
        match told.get("method"):
            case "Runtime.exceptionThrown":
                self.problems.append(json.dumps(about["exceptionDetails"]))
            case "Runtime.consoleAPICalled" if about["type"] in ("error", "warning", "assert"):
                self.problems.append(json.dumps(about["args"]))
            case "Log.entryAdded" if about["entry"]["level"] in ("error", "warning"):
                self.problems.append(json.dumps(about["entry"]))
            case "Network.requestWillBeSent":
                self.asked.append(about["request"]["url"])

    def open(self, url: str) -> None:
        """Go to a page."""
        self.call("Page.navigate", url=url)
        self.wait(f"location.href === {json.dumps(url)} && document.readyState === 'complete'")

    def tell(self, expression: str) -> Any:
        """Return the value of a JavaScript expression."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, expression: str, seconds: float = HANGS) -> float:
        """Wait until an expression is true; return how long that took."""
        began = time.monotonic()
        while not self.tell(expression):
            assert time.monotonic() - began < seconds, f"{expression}; {self.text()}"
            time.sleep(0.05)
        return time.monotonic() - began

    def text(self) -> str:
        """Return what a reader of the page reads."""
        return str(self.tell("document.body?.innerText ?? ''"))

    def press(self, key: str) -> None:
        """Press and release a key."""
        code = {"Tab": 9, "Enter": 13}.get(key, 0)
        about: dict[str, Any] = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        if key == "Enter":
            about["text"] = "\r"
        self.call("Input.dispatchKeyEvent", type="keyDown", **about)
        self.call("Input.dispatchKeyEvent", type="keyUp", **about)

    def look(self, width: int, height: int, *, dark: bool = False) -> None:
        """Take another size of window, in CSS pixels, and light or dark colours."""
        phone = width < 600
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=2 if phone else 1,
            mobile=phone,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def picture(self, path: Path) -> None:
        """Write a picture of the whole page."""
        found = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(found["data"]))


def _port(path: Path, process: subprocess.Popen[bytes]) -> int:
    until = time.monotonic() + HANGS
    while not (path.exists() and path.read_text().count("\n")):
        assert process.poll() is None, "the browser ended"
        assert time.monotonic() < until, "the browser does not start"
        time.sleep(0.05)
    return int(path.read_text().split("\n")[0])
