"""Headless Chromium, driven by the DevTools protocol over two pipes: JSON messages that end in a zero byte."""

from __future__ import annotations

import base64
import io
import itertools
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.image import imread
from numpy.typing import NDArray

__all__ = ["CHROMIUM", "Tab", "open_page"]

#: Path of the browser, or None.
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

_WAIT = 60.0  # seconds; a busy machine is slow


class Tab:
    """Page in the browser; `events` are the protocol messages about it so far."""

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self._to, self._from = to_browser, from_browser
        self._numbers = itertools.count(1)
        self._rest = b""
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []

    def attach(self) -> None:
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> Mapping[str, Any]:
        """Call a method of the protocol; return its result."""
        number = next(self._numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + _WAIT
        while True:
            answer = self._next(deadline)
            if answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]

    def _next(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._rest:
            if not select.select([self._from], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError("the browser does not answer")
            part = os.read(self._from, 1 << 20)
            if not part:
                raise RuntimeError("the browser has ended")
            self._rest += part
        line, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        if "method" in message:
            self.events.append(message)
        return message

    def run(self, code: str) -> Any:
        """Return the awaited value of a JavaScript expression."""
        answer = self.call("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"]["exception"]["description"])
        return answer["result"].get("value")

    def wait_for(self, code: str) -> None:
        """Wait until a JavaScript expression is true."""
        deadline = time.monotonic() + _WAIT
        while not self.run(code):
            if time.monotonic() > deadline:
                raise TimeoutError(f"never true: {code}")
            time.sleep(0.05)

    def picture(self, selector: str) -> NDArray[np.float32]:
        """Return the pixels of an element: [height, width, RGB], 0 to 1."""
        clip = self.run(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            "e.scrollIntoView({behavior: 'instant'}); const r = e.getBoundingClientRect();"
            "return {x: r.x + scrollX, y: r.y + scrollY, width: r.width, height: r.height, scale: 1}; })()"
        )
        png = self.call("Page.captureScreenshot", clip=clip)["data"]
        pixels: NDArray[np.float32] = imread(io.BytesIO(base64.b64decode(png)))[..., :3]
        return pixels

    def problems(self) -> list[str]:
        """Return errors and warnings in the console, and uncaught exceptions."""
        found = []
        for event in self.events:
            match event:
                case {"method": "Runtime.exceptionThrown", "params": {"exceptionDetails": details}}:
                    found.append(details.get("exception", {}).get("description", details["text"]))
                case {"method": "Runtime.consoleAPICalled", "params": {"type": "error" | "warning", "args": args}}:
                    found.append(" ".join(str(arg.get("value", arg.get("description"))) for arg in args))
                case {"method": "Log.entryAdded", "params": {"entry": {"level": "error" | "warning", "text": text}}}:
                    found.append(text)
        return found

    def requests(self) -> list[str]:
        """Return the URLs that the page has requested."""
        asked = "Network.requestWillBeSent"
        return [event["params"]["request"]["url"] for event in self.events if event["method"] == asked]


@contextmanager
def open_page(path: Path, profile: Path, width: int = 1280, height: int = 900) -> Iterator[Tab]:
    """Yield a tab with a loaded page, in a separate browser with an empty profile."""
    assert CHROMIUM is not None
    to_read, to_write = os.pipe()
    from_read, from_write = os.pipe()

    def as_three_and_four() -> None:
        # Go through high numbers: a pipe may already use the target number of the other.
        high = (os.dup2(to_read, 1003), os.dup2(from_write, 1004))
        os.dup2(high[0], 3)
        os.dup2(high[1], 4)

    browser = subprocess.Popen(
        [
            CHROMIUM,
            "--headless",
            "--remote-debugging-pipe",
            "--no-sandbox",
            "--use-angle=swiftshader",
            "--enable-unsafe-swiftshader",
            "--hide-scrollbars",
            f"--user-data-dir={profile}",
            f"--window-size={width},{height}",
        ],
        preexec_fn=as_three_and_four,
        close_fds=False,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(to_read)
    os.close(from_write)
    try:
        tab = Tab(to_write, from_read)
        tab.attach()
        tab.call("Page.navigate", url=path.resolve().as_uri())
        tab.wait_for("document.readyState === 'complete' && location.protocol === 'file:'")
        yield tab
    finally:
        os.close(to_write)
        os.close(from_read)
        try:
            browser.wait(10)
        except subprocess.TimeoutExpired:
            browser.kill()
            browser.wait()
