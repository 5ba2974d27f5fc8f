"""A real browser for tests and pictures: headless Chromium, spoken to over a pipe.

The DevTools protocol (https://chromedevtools.github.io/devtools-protocol/) as JSON, one message
after the other with a zero byte between them: no driver, no port and no package is needed. No host
name resolves in it, so a page that asks for anything fails to get it, and is seen asking.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
WAIT_SECONDS = 60.0
OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-default-apps", "--disable-extensions", "--hide-scrollbars",
    "--host-resolver-rules=MAP * ~NOTFOUND", "--remote-debugging-pipe",
)


def find_chromium() -> str | None:
    """Return the path of an installed Chromium, or None."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One tab of a headless Chromium with a profile of its own.

    Attributes:
        complaints: what went wrong in the pages opened so far: errors and warnings of the console,
            exceptions that nobody caught, requests that failed.
        requests: addresses that the pages asked for, the pages themselves included.

    Raises:
        RuntimeError: it does not start, or refuses what it is asked.
        TimeoutError: no answer within a minute.
    """

    def __init__(self, executable: str) -> None:
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self._events: list[str] = []
        self._unread, self._num_sent, self._session = b"", 0, ""
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        # Chromium reads from its file descriptor 3 and writes to 4.
        self._process = subprocess.Popen(
            ["sh", "-c", 'exec "$@" 3<&0 4>&1 </dev/null >/dev/null', "sh", executable, *OPTIONS,
             f"--user-data-dir={self._profile.name}", "about:blank"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )
        try:
            target = self._call("Target.createTarget", url="about:blank")["targetId"]
            attached = self._call("Target.attachToTarget", targetId=target, flatten=True)
            self._session = attached["sessionId"]
            for domain in ("Page", "Runtime", "Log", "Network"):
                self._call(f"{domain}.enable")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the browser and remove its profile."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()
        self._profile.cleanup()

    def look(self, width: int, height: int = 900, *, dark: bool = False, scale: float = 1) -> None:
        """Set the window's size in CSS pixels, the theme, and device pixels per CSS pixel."""
        self._call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height,
            deviceScaleFactor=scale, mobile=False,
        )
        theme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", features=[theme])

    def open(self, path: Path) -> None:
        """Open a file as a `file://` page and wait until it is loaded."""
        self._events.clear()
        self._call("Page.navigate", url=path.resolve().as_uri())
        while "Page.loadEventFired" not in self._events:
            self._receive()

    def evaluate(self, expression: str) -> Any:
        """Return the JSON value of a JavaScript expression in the page.

        Raises:
            RuntimeError: it throws.
        """
        answer = self._call("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{expression}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def click(self, selector: str, index: int = 0) -> None:
        """Press and release the mouse button in the middle of an element, wherever it is."""
        found = f"document.querySelectorAll({json.dumps(selector)})[{index}]"
        self.evaluate(f"{found}.scrollIntoView({{block: 'center', inline: 'center'}})")
        box = self.evaluate(f"{found}.getBoundingClientRect().toJSON()")
        place = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
        for kind in ("mousePressed", "mouseReleased"):
            self._call("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **place)

    def press(self, key: str, code: int, text: str = "") -> None:
        """Press and release a key, such as ("Tab", 9); `text` is what it types, if anything."""
        named = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        self._call("Input.dispatchKeyEvent", type="keyDown", **named, text=text)
        self._call("Input.dispatchKeyEvent", type="keyUp", **named)

    def screenshot(self, *, whole_page: bool = False) -> bytes:
        """Return what is to be seen as a PNG file."""
        shot = self._call("Page.captureScreenshot", captureBeyondViewport=whole_page)
        return base64.b64decode(shot["data"])

    def _call(self, method: str, **parameters: Any) -> Any:
        assert self._process.stdin is not None
        self._num_sent += 1
        message: dict[str, Any] = {"id": self._num_sent, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._process.stdin.write(json.dumps(message).encode() + b"\0")
        self._process.stdin.flush()
        while True:
            answer = self._receive()
            if answer.get("id") == self._num_sent:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]

    def _receive(self) -> dict[str, Any]:
        """Return the next message; note what it says if it is an event."""
        assert self._process.stdout is not None
        deadline = time.monotonic() + WAIT_SECONDS
        while b"\0" not in self._unread:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._process.stdout], [], [], left)[0]:
                raise TimeoutError(f"Chromium said nothing for {WAIT_SECONDS:g} seconds")
            got = os.read(self._process.stdout.fileno(), 1 << 20)
            if not got:
                raise RuntimeError(f"Chromium ended with {self._process.wait()}")
            self._unread += got
        text, _, self._unread = self._unread.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        self._note(message.get("method", ""), message.get("params", {}))
        return message

    def _note(self, event: str, about: dict[str, Any]) -> None:
        self._events.append(event)
        if event == "Network.requestWillBeSent":
            self.requests.append(about["request"]["url"])
        elif event == "Network.loadingFailed":
            self.complaints.append(f"request failed: {about['errorText']}")
        elif event == "Runtime.exceptionThrown":
            self.complaints.append(str(about["exceptionDetails"]))
        elif event == "Log.entryAdded" and about["entry"]["level"] in ("warning", "error"):
            self.complaints.append(about["entry"]["text"])
        elif event == "Runtime.consoleAPICalled" and about["type"] in ("warning", "error"):
            self.complaints.append(str(about["args"]))
