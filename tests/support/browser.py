"""A page in the system's Chromium, without a window, driven over its debugging pipe: scripts are run in it, keys are
typed, pictures taken. Nothing has to be installed beside the browser."""

import base64
import contextlib
import itertools
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WHY_NOT = "there is no chromium here (apt-get install -y --no-install-recommends chromium)"
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run", "--disable-sync")
FLAGS += ("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage")
WAIT_S = 60.0


class Page:
    """A tab. `errors` has what its scripts raised or its policy forbade."""

    def __init__(self, send: int, receive: int):
        self._send, self._receive, self._rest = send, receive, b""
        self._numbers, self._session = itertools.count(1), None
        self.errors: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """The result of a command of the debugging protocol."""
        number = next(self._numbers)
        whose = {"sessionId": self._session} if self._session else {}
        message = {"id": number, "method": method, "params": params} | whose
        os.write(self._send, json.dumps(message).encode() + b"\0")
        while (heard := self._hear()).get("id") != number:
            if heard.get("method") == "Runtime.exceptionThrown":
                self.errors.append(json.dumps(heard["params"]["exceptionDetails"]))
            elif heard.get("method") == "Log.entryAdded" and heard["params"]["entry"]["source"] == "security":
                self.errors.append(heard["params"]["entry"]["text"])
        assert "error" not in heard, heard
        return heard["result"]

    def _hear(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            more = os.read(self._receive, 1 << 16)
            assert more, "the browser has ended"
            self._rest += more
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def open(self, url: str) -> None:
        """Loads a page."""
        self.call("Page.navigate", url=url)
        self.until("document.readyState === 'complete'")

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        told = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in told, told
        return told["result"].get("value")

    def until(self, script: str, holds: Callable[[Any], bool] = bool) -> Any:
        """The value of an expression as soon as it is as it should be."""
        end_s = time.monotonic() + WAIT_S
        while not holds(value := self.run(script)):
            assert time.monotonic() < end_s, f"{script}: still {value!r}; {self.errors}"
            time.sleep(0.05)
        return value

    def text(self, element: str) -> str:
        """The text of an element, by its id."""
        return self.run(f"document.getElementById({element!r}).textContent")

    def type(self, element: str, text: str) -> None:
        """Types text into an element and presses Enter."""
        self.run(f"document.getElementById({element!r}).focus()")
        self.call("Input.insertText", text=text)
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", windowsVirtualKeyCode=13, text="\r"
            )

    def look(self, width: int, height: int, dark: bool = False, scale: float = 1.0) -> None:
        """Sets the size of the window, and whether its user likes it dark."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=scale,
            mobile=width < 600,
        )
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=features)

    def picture(self, path: Path) -> None:
        """Writes what the window shows as PNG."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))


@contextlib.contextmanager
def browser(folder: Path) -> Iterator[Page]:
    """A page in a browser that keeps its files in `folder`."""
    (read_there, send), (receive, write_there) = os.pipe(), os.pipe()
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={folder}", "about:blank"]
    # the browser reads descriptor 3 and writes 4
    script = f'exec "$@" 3<&{read_there} 4>&{write_there}'
    process = subprocess.Popen(
        ["bash", "-c", script, "bash", *command],
        pass_fds=(read_there, write_there),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"HOME": str(folder)},
    )
    os.close(read_there), os.close(write_there)
    try:
        yield Page(send, receive)
    finally:
        os.close(send), os.close(receive)
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
