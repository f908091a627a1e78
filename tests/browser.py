"""A headless chromium that tests drive by keys, over the DevTools protocol through two pipes."""

import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import TIME_LIMIT

QUIET = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
QUIET += " --disable-component-update --disable-sync --hide-scrollbars"
KEYS = {"Tab": 9, "Enter": 13, "Escape": 27, "ArrowDown": 40, "ArrowRight": 39, "+": 187}


def browser_command(profile: Path) -> list[str]:
    """Skips the test where there is no browser, except in continuous integration."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None and not os.environ.get("CI"):
        pytest.skip("no chromium here (apt-get install chromium)")
    assert browser, "no chromium: .ci/run installs it"
    return [browser, *QUIET.split(), f"--user-data-dir={profile}"]


class Browser:
    """One page, as wide as a phone, without a network unless `online`. requests: the addresses that the page opened."""

    def __init__(self, profile: Path, online: bool = False) -> None:
        (theirs, self._to), (self._from, writing) = os.pipe(), os.pipe()
        shell = f'exec "$@" 3<&{theirs} 4>&{writing}'  # chromium expects its pipes at 3 and 4
        command = [*browser_command(profile), "--remote-debugging-pipe", "about:blank"]
        self._process = subprocess.Popen(
            ["bash", "-c", shell, "bash", *command],
            pass_fds=(theirs, writing), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(theirs), os.close(writing)
        self._session, self._count, self._rest, self._events, self.requests = None, 0, b"", [], []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network"):
            self._call(f"{domain}.enable")
        speed = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
        self._call("Network.emulateNetworkConditions", offline=not online, **speed)
        phone = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
        self._call("Emulation.setDeviceMetricsOverride", **phone)

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            data = os.read(self._from, 1 << 16)
            assert data, "the browser has ended"
            self._rest += data
        message, self._rest = self._rest.split(b"\0", 1)
        message = json.loads(message)
        if message.get("method") == "Network.requestWillBeSent":
            self.requests.append(message["params"]["request"]["url"])
        return message

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self._count:
            self._events.append(answer.get("method"))
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, url: str) -> None:
        self._events.clear()
        self._call("Page.navigate", url=url)
        while "Page.loadEventFired" not in self._events:
            self._events.append(self._read().get("method"))

    def evaluate(self, expression: str) -> Any:
        answer = self._call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def press(self, key: str) -> None:
        """Presses and releases a key."""
        text = {"Enter": "\r", "+": "+"}.get(key)
        common = {"key": key, "windowsVirtualKeyCode": KEYS[key]} | ({"code": key} if len(key) > 1 else {})
        self._call("Input.dispatchKeyEvent", type="keyDown", **common, **({"text": text} if text else {}))
        self._call("Input.dispatchKeyEvent", type="keyUp", **common)

    def press_until(self, key: str, condition: str, most: int = 80) -> None:
        for _ in range(most):
            if self.evaluate(condition):
                return
            self.press(key)
        raise AssertionError(f"{key} pressed {most} times, and not {condition}")

    def wait(self, condition: str) -> None:
        """Waits until the page has handled an event."""
        end = time.monotonic() + TIME_LIMIT
        while time.monotonic() < end:
            if self.evaluate(condition):
                return
            time.sleep(0.05)
        raise AssertionError(f"not {condition}")

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()
        os.close(self._to), os.close(self._from)
