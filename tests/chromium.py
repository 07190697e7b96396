"""Drives a headless Chromium by the DevTools protocol over two pipes: no driver, no package.

The browser reads commands from its descriptor 3 and writes answers and events to 4, each a line of
JSON that ends with a zero byte (`--remote-debugging-pipe`).
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

FLAGS = (
    "--headless=new",
    "--no-sandbox",  # root may not start it otherwise
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",  # a container's shared memory is small
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--force-color-profile=srgb",
    "--remote-debugging-pipe",
)
KEYS = {
    "Tab": (9, ""),
    "Enter": (13, "\r"),
    " ": (32, " "),
    "Home": (36, ""),
    "End": (35, ""),
    "ArrowLeft": (37, ""),
    "ArrowUp": (38, ""),
    "ArrowRight": (39, ""),
    "ArrowDown": (40, ""),
}


def find_chromium() -> str | None:
    """Returns the path of Debian's Chromium, None where it is not installed."""
    return shutil.which("chromium")


class Chromium:
    """A browser with one tab. What the page says, asks for and breaks is kept in lists."""

    def __init__(self, executable: str) -> None:
        self.complaints: list[str] = []  # of the console: errors, warnings, refused by its policy
        self.requests: list[str] = []  # whatever the page would load; its own data not
        self.dialogs: list[str] = []
        self._loaded = False
        self._rest, self._last, self._session = b"", 0, ""
        self._answers: dict[int, dict[str, Any]] = {}
        self._profile = Path(tempfile.mkdtemp(prefix="chromium-"))
        theirs_in, self._to = os.pipe()
        self._from, theirs_out = os.pipe()
        # By way of 100 and 101: one that is 3 or 4 already would be overwritten by the other.
        self._pid = os.posix_spawn(
            executable,
            [executable, *FLAGS, f"--user-data-dir={self._profile}", "about:blank"],
            {**os.environ, "HOME": str(self._profile)},
            file_actions=[
                (os.POSIX_SPAWN_DUP2, theirs_in, 100),
                (os.POSIX_SPAWN_DUP2, theirs_out, 101),
                (os.POSIX_SPAWN_DUP2, 100, 3),
                (os.POSIX_SPAWN_DUP2, 101, 4),
                (os.POSIX_SPAWN_CLOSE, 100),
                (os.POSIX_SPAWN_CLOSE, 101),
                (os.POSIX_SPAWN_OPEN, 2, self._profile / "stderr", 0o101, 0o600),
            ],
            setpgroup=0,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        try:
            targets = self.call("Target.getTargets")["targetInfos"]
            tab = next(target["targetId"] for target in targets if target["type"] == "page")
            attached = self.call("Target.attachToTarget", targetId=tab, flatten=True)
            self._session = attached["sessionId"]
            for domain in ("Page", "Runtime", "Log", "Network", "Accessibility"):
                self.call(f"{domain}.enable")
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends the browser, all its processes, and what it wrote."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        os.close(self._to)
        os.close(self._from)
        for _ in range(50):  # its children may still be writing for a moment
            shutil.rmtree(self._profile, ignore_errors=True)
            if not self._profile.exists():
                break
            time.sleep(0.1)

    def call(self, method: str, timeout: float = 120, **parameters: Any) -> dict[str, Any]:
        """Sends one command and returns its result."""
        number = self._send(method, parameters)
        self._wait(lambda: number in self._answers, timeout, method)
        answer = self._answers.pop(number)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return dict(answer["result"])

    def open(self, path: Path) -> None:
        """Loads a page and forgets what was heard of earlier ones."""
        for heard in (self.complaints, self.requests, self.dialogs):
            heard.clear()
        self._loaded = False
        self.call("Page.navigate", url=path.as_uri())
        self._wait(lambda: self._loaded, 120, "load")

    def run(self, expression: str) -> Any:
        """Returns the value of a JavaScript expression, awaited if it is a promise."""
        answer = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in answer:
            raise RuntimeError(str(answer["exceptionDetails"]))
        return answer["result"].get("value")

    def press(self, key: str, shift: bool = False) -> None:
        """Presses one key, as a keyboard would."""
        code, text = KEYS[key]
        common = {
            "key": key,
            "code": "Space" if key == " " else key,
            "windowsVirtualKeyCode": code,
            "modifiers": 8 if shift else 0,
        }
        down = {"type": "keyDown", "text": text} if text else {"type": "rawKeyDown"}
        self.call("Input.dispatchKeyEvent", **common, **down)
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def write(self, text: str) -> None:
        """Types text where the focus is."""
        self.call("Input.insertText", text=text)

    def look(
        self,
        width: int = 1280,
        height: int = 900,
        *,
        scheme: str = "light",
        motion: str = "no-preference",
        media: str = "screen",
    ) -> None:
        """Sets the size of the window, what the reader prefers, and screen or paper."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        features = [
            {"name": "prefers-color-scheme", "value": scheme},
            {"name": "prefers-reduced-motion", "value": motion},
        ]
        self.call("Emulation.setEmulatedMedia", media=media, features=features)

    def print(self) -> bytes:
        """Returns the page as a PDF, as it would be printed."""
        printed = self.call("Page.printToPDF")
        return base64.b64decode(printed["data"])

    def _send(self, method: str, parameters: dict[str, Any]) -> int:
        self._last += 1
        message: dict[str, Any] = {"id": self._last, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._to, data) :]
        return self._last

    def _wait(self, done: Callable[[], bool], timeout: float, what: str) -> None:
        end = time.monotonic() + timeout
        while not done():
            ready, _, _ = select.select([self._from], [], [], max(end - time.monotonic(), 0))
            data = os.read(self._from, 1 << 20) if ready else b""
            if not data:
                stderr = (self._profile / "stderr").read_text("utf-8", "replace")[-500:]
                raise TimeoutError(f"no answer of the browser to {what}; it said: {stderr}")
            *messages, self._rest = (self._rest + data).split(b"\0")
            for message in messages:
                self._hear(json.loads(message))

    def _hear(self, message: dict[str, Any]) -> None:
        if "id" in message:
            self._answers[message["id"]] = message
            return
        event, about = message["method"], message["params"]
        if event == "Page.loadEventFired":
            self._loaded = True
        elif event == "Runtime.exceptionThrown":
            self.complaints.append(str(about["exceptionDetails"]))
        elif event == "Runtime.consoleAPICalled":
            self.complaints.append(f"{about['type']}: {about['args']}")
        elif event == "Log.entryAdded":
            self.complaints.append(f"{about['entry']['level']}: {about['entry']['text']}")
        elif event == "Network.requestWillBeSent":
            url = about["request"]["url"]
            if not url.startswith("data:") and about["type"] != "Document":
                self.requests.append(url)
        elif event == "Page.javascriptDialogOpening":
            self.dialogs.append(about["message"])
            self._send("Page.handleJavaScriptDialog", {"accept": True})  # else the page stands
