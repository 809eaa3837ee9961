"""A page in headless Chromium, by its DevTools protocol over a pipe: what it asks for, reports, and looks like."""

import base64
import fcntl
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking")
FLAGS += (
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--remote-debugging-pipe",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
)


class Page:
    """One page, opened by `open`. requests: addresses that it asked for; errors: what its console said is wrong."""

    def __enter__(self):
        self.folder = tempfile.mkdtemp(prefix="ftjax-browser-")
        (theirs_in, self.out), (self.inp, theirs_out) = os.pipe(), os.pipe()

        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (theirs_in, theirs_out)]
        move = f'exec "$@" 3<&{ends[0]} 4>&{ends[1]}'  # where the protocol has its ends
        self.process = subprocess.Popen(
            ["bash", "-c", move, "bash", CHROMIUM, *FLAGS, f"--user-data-dir={self.folder}", "about:blank"],
            pass_fds=ends, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        for end in (theirs_in, theirs_out, *ends):
            os.close(end)
        self.buffer, self.number, self.session = b"", 0, None
        self.requests, self.errors, self.events = [], [], []
        page = next(t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        self.session = self.call("Target.attachToTarget", targetId=page["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.wait()
        os.close(self.inp), os.close(self.out)
        shutil.rmtree(self.folder, ignore_errors=True)

    def call(self, method, **params):
        """What a method of the protocol returns; events that come before are kept."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        os.write(self.out, json.dumps(message | ({"sessionId": self.session} if self.session else {})).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]

    def _next(self):
        while b"\0" not in self.buffer:
            read = os.read(self.inp, 1 << 16)
            assert read, "the browser has ended"
            self.buffer += read
        text, self.buffer = self.buffer.split(b"\0", 1)
        message = json.loads(text)
        method, params = message.get("method"), message.get("params", {})
        if method:
            self.events.append(method)
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        if method == "Runtime.exceptionThrown" or (
            method == "Log.entryAdded" and params["entry"]["level"] in ("warning", "error")
        ) or (method == "Runtime.consoleAPICalled" and params["type"] in ("warning", "error", "assert")):  # fmt: skip
            self.errors.append(params)
        return message

    def open(self, file: Path, width: int, height: int = 900):
        """Load a file into a window of so many pixels, and wait until all of it is there."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.events.clear()
        self.call("Page.navigate", url=Path(file).resolve().as_uri())
        while "Page.loadEventFired" not in self.events:
            self._next()

    def value(self, script: str):
        """What a script comes to, as plain data."""
        return self.call("Runtime.evaluate", expression=script, returnByValue=True)["result"]["value"]

    def picture(self, file: Path):
        """The whole page as a PNG file."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        Path(file).write_bytes(base64.b64decode(shot["data"]))
