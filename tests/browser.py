"""A real Chromium without a window, driven through the DevTools protocol over a pair of pipes: no port, no driver."""

from __future__ import annotations

import base64
import itertools
import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

ANSWER_S = 60.0
PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless=new --remote-debugging-pipe --disable-gpu --disable-dev-shm-usage --disable-background-networking "
    "--disable-component-update --disable-extensions --no-first-run --no-default-browser-check --disable-sync"
).split()


def find_chromium() -> str | None:
    """The installed browser's program, or None."""
    return next((found for found in map(shutil.which, PROGRAMS) if found), None)


needs_chromium = pytest.mark.skipif(find_chromium() is None, reason="chromium is not installed")


class Tab:
    """A page of its own, with a session storage of its own.

    Attributes:
        problems: what the page threw, logged as an error or was refused by its policy. Answers with an error status are
            no problem of the page.
    """

    def __init__(self, browser: Browser, session: str):
        self._browser = browser
        self._session = session
        self.problems: list[str] = []
        browser.listeners[session] = self._note
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")

    def _note(self, method: str, params: dict[str, Any]) -> None:
        if method == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.problems.append(details.get("exception", {}).get("description", details["text"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
            if params["entry"]["source"] != "network":
                self.problems.append(params["entry"]["text"])

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        return self._browser.send(method, self._session, **params)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, awaited if it is a promise."""
        answer = self.send("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise AssertionError(f"{expression}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def open(self, url: str) -> None:
        self.send("Page.navigate", url=url)
        self.wait_for(f"location.href.startsWith({json.dumps(url)}) && document.readyState === 'complete'")

    def wait_for(self, expression: str, timeout_s: float = 30.0, before: Callable[[], None] | None = None) -> Any:
        """The expression's first truthy value. It may fail until then: between two pages there are no elements.

        Args:
            before: done before each look.
        """
        end = time.monotonic() + timeout_s
        while True:
            try:
                if before is not None:
                    before()
                value, failure = self.evaluate(expression), ""
            except AssertionError as error:
                value, failure = None, str(error)
            if value:
                return value
            if time.monotonic() > end:
                text = self.evaluate("document.body.innerText")
                raise AssertionError(f"not in {timeout_s:g} s: {expression}\n{failure}\n{self.problems}\n{text}")
            time.sleep(0.02)

    def text(self, selector: str) -> str:
        """What a person reads there."""
        return self.evaluate(f"document.querySelector({json.dumps(selector)}).innerText")

    def click(self, selector: str) -> None:
        """A click of the mouse in the middle of an element, which must be what is on top there."""
        where = f"""(() => {{
                const found = document.querySelector({json.dumps(selector)});
                found.scrollIntoView({{block: "center"}});
                const box = found.getBoundingClientRect();
                const [x, y] = [box.x + box.width / 2, box.y + box.height / 2];
                return found.contains(document.elementFromPoint(x, y)) ? {{x, y}} : null;
            }})()"""
        # Parts of the page that arrive move what is below them.
        before, place = None, self.evaluate(where)
        while place != before:
            time.sleep(0.1)
            before, place = place, self.evaluate(where)
        assert place is not None, f"{selector} is covered or out of sight"
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **place)

    def type(self, text: str, selector: str | None = None) -> None:
        """Types into an element that is clicked first, or into what has the focus."""
        if selector is not None:
            # A part of the page that arrives between look and click moves what is below it.
            self.wait_for(
                f"document.activeElement === document.querySelector({json.dumps(selector)})",
                before=lambda: self.click(selector),
            )
        self.send("Input.insertText", text=text)

    def press(self, key: str, code: int, text: str = "") -> None:
        """Presses a key of the keyboard, such as ("Enter", 13, "\\r") or ("Tab", 9)."""
        for kind in ("keyDown", "keyUp"):
            typed = {"text": text} if kind == "keyDown" and text else {}
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **typed)

    def resize(self, width: int, height: int, dark: bool = False) -> None:
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self, path: Path) -> None:
        """The whole page as PNG, also what is below the window."""
        data = self.send("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))


class Browser:
    """A running browser; see `chromium`."""

    def __init__(self, process: subprocess.Popen[bytes], commands: int, answers: int):
        self._process = process
        self._commands = commands
        self._ids = itertools.count(1)
        self._condition = threading.Condition()
        self._answers: dict[int, dict[str, Any]] = {}
        self._ended = False
        self.listeners: dict[str, Any] = {}
        threading.Thread(target=self._read, args=(answers,), daemon=True).start()

    def _read(self, answers: int) -> None:
        with os.fdopen(answers, "rb", buffering=0) as stream:
            rest = b""
            while data := stream.read(2**16):
                *messages, rest = (rest + data).split(b"\0")
                for message in map(json.loads, messages):
                    if "id" in message:
                        with self._condition:
                            self._answers[message["id"]] = message
                            self._condition.notify_all()
                    elif message.get("sessionId") in self.listeners:
                        self.listeners[message["sessionId"]](message["method"], message["params"])
        with self._condition:
            self._ended = True
            self._condition.notify_all()

    def send(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """A command's result; AssertionError where the browser refuses it or does not answer."""
        number = next(self._ids)
        message = {"id": number, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._commands, data) :]
        with self._condition:
            answered = self._condition.wait_for(lambda: self._ended or number in self._answers, ANSWER_S)
            assert answered and number in self._answers, f"no answer to {method}; exit status {self._process.poll()}"
            answer = self._answers.pop(number)
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def new_tab(self) -> Tab:
        context = self.send("Target.createBrowserContext")["browserContextId"]
        target = self.send("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        return Tab(self, self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"])


@contextmanager
def chromium(profile: Path) -> Iterator[Browser]:
    """A browser until the block ends, its files in `profile`."""
    program = find_chromium()
    assert program is not None
    # Its sandbox refuses root, which containers run as.
    flags = [*FLAGS, f"--user-data-dir={profile}", *(["--no-sandbox"] if os.geteuid() == 0 else [])]
    read_commands, commands = os.pipe()
    answers, write_answers = os.pipe()
    # It reads file descriptor 3 and writes 4.
    moved = f'exec "$0" "$@" 3<&{read_commands} 4>&{write_answers}'
    process = subprocess.Popen(
        ["bash", "-c", moved, program, *flags],
        pass_fds=(read_commands, write_answers),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(read_commands)
    os.close(write_answers)
    browser = Browser(process, commands, answers)
    try:
        yield browser
    finally:
        # At the end of its commands it ends itself, with all its processes.
        os.close(commands)
        try:
            process.wait(ANSWER_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
