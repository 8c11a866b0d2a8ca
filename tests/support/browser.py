"""A headless Chromium that is driven through its DevTools protocol over two pipes."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time

CANDIDATES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
#: what Chromium is started by: it reads commands from descriptor 3 and answers on 4
_STARTER = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execv(sys.argv[3], sys.argv[3:])"
)
_OPTIONS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe")


def find_browser():
    """The path of a Chromium, or None."""
    return next(filter(None, map(shutil.which, CANDIDATES)), None)


class Page:
    """A page in the browser; `complaints`: what its console, its scripts and the network had to complain of."""

    def __init__(self, process, commands, answers):
        self.process, self.commands, self.answers = process, commands, answers
        self.complaints, self.requests, self._buffer, self._number, self._session = [], [], b"", 0, None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method, **arguments):
        """The result of a command."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": arguments}
        if self._session:
            message["sessionId"] = self._session
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        return self._until(lambda answer: answer.get("id") == self._number)["result"]

    def _until(self, wanted):
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            while b"\0" in self._buffer:
                line, _, self._buffer = self._buffer.partition(b"\0")
                answer = json.loads(line)
                self._note(answer)
                if "error" in answer:
                    raise RuntimeError(answer["error"])
                if wanted(answer):
                    return answer
            part = os.read(self.answers, 1 << 20)
            if not part:
                raise RuntimeError(f"the browser has ended with status {self.process.wait()}")
            self._buffer += part
        raise TimeoutError("the browser does not answer")

    def _note(self, answer):
        method, told = answer.get("method"), answer.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.complaints.append(told["exceptionDetails"])
        elif method == "Runtime.consoleAPICalled" and told["type"] in ("error", "warning", "assert"):
            self.complaints.append(told["args"])
        elif method == "Log.entryAdded" and told["entry"]["level"] in ("error", "warning"):
            self.complaints.append(told["entry"])
        elif method == "Network.requestWillBeSent":
            self.requests.append(told["request"]["url"])

    def open(self, path, width, height=900):
        """Load a file in a window of this size."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self.call("Page.navigate", url=path.absolute().as_uri())
        self._until(lambda answer: answer.get("method") == "Page.loadEventFired")

    def value(self, expression):
        """What a JavaScript expression comes to, as plain values."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"])
        return answer["result"].get("value")


@contextlib.contextmanager
def browser():
    """A page of a browser of its own, which ends with the block."""
    (read_commands, commands), (answers, write_answers) = os.pipe(), os.pipe()
    with tempfile.TemporaryDirectory() as profile:
        started = [sys.executable, "-c", _STARTER, str(read_commands), str(write_answers), find_browser()]
        process = subprocess.Popen(
            [*started, *_OPTIONS, f"--user-data-dir={profile}"],
            pass_fds=(read_commands, write_answers),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(read_commands)
        os.close(write_answers)
        try:
            yield Page(process, commands, answers)
        finally:
            os.close(commands)  # which it ends by
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            os.close(answers)
