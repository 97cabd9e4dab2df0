"""
Headless Chromium and Firefox, to test and measure pages. No package is needed.

    with Chromium() as browser:
        browser.open("file:///tmp/page.html")
        browser.evaluate("document.title")
"""

import base64
import contextlib
import glob
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time

from configurator import UserError


class Browser:
    """A browser without a window, with an empty profile. Subclasses know its protocol."""

    def __init__(self, width=800, height=900, dark=False):
        self.size, self.dark, self.n, self.rest = (width, height), dark, 0, b""

    @classmethod
    def path(cls):
        """The path of its program, or None."""
        return next(filter(None, map(shutil.which, cls.names)), None)

    def __enter__(self):
        self.folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self.start()
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.wait()
        self.folder.cleanup()

    def wait_until(self, expression, seconds=60):
        """Wait until JavaScript is true; returns its value."""
        end = time.monotonic() + seconds
        while not (value := self.evaluate(expression)):
            if time.monotonic() > end:
                raise UserError(f"after {seconds} s, this is not true in the page: {expression}")
            time.sleep(0.05)
        return value

    def memory(self):
        """The bytes of memory of its processes; what they share counts once. Only on Linux."""
        total = 0
        for path in glob.glob("/proc/[0-9]*/smaps_rollup"):
            with contextlib.suppress(OSError):  # the process has ended
                if self.is_ours(int(path.split("/")[2])):
                    with open(path) as f:
                        total += sum(int(x.split()[1]) for x in f if x.startswith("Pss:"))
        return 1024 * total

    def is_ours(self, pid):
        """Whether a process is the browser or a descendant of it."""
        while pid > 1 and pid != self.process.pid:
            with open(f"/proc/{pid}/stat") as f:
                pid = int(f.read().rpartition(")")[2].split()[1])
        return pid == self.process.pid


class Chromium(Browser):
    """Chromium or Chrome, by the DevTools protocol over pipes."""

    names = ("chromium", "chromium-browser", "google-chrome")

    def start(self):
        to_browser, self.commands = os.pipe()
        self.answers, from_browser = os.pipe()
        # Chromium reads descriptor 3 and writes 4; the shell puts the pipes there
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
        flags += [f"--user-data-dir={self.folder.name}", "--no-first-run", "--hide-scrollbars"]
        script = f'exec "$@" 3<&{to_browser} 4>&{from_browser}'
        command = ["bash", "-c", script, "chromium", self.path(), *flags]
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        pipes["pass_fds"] = to_browser, from_browser
        self.process = subprocess.Popen(command, **pipes)
        os.close(to_browser)
        os.close(from_browser)
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        width, height = self.size
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height,
                  deviceScaleFactor=1, mobile=width < 500)  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if self.dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.enable")
        self.call("Runtime.enable")

    def __exit__(self, *error):
        super().__exit__(*error)
        os.close(self.commands)
        os.close(self.answers)

    def call(self, method, **params):
        """The result of a method of the protocol; events on the way are dropped."""
        self.n += 1
        message = {"id": self.n, "method": method, "params": params}
        if hasattr(self, "session"):
            message["sessionId"] = self.session
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.rest:
                data = os.read(self.answers, 1 << 20)
                if not data:
                    raise UserError("Chromium ended before the work was done")
                self.rest += data
            text, _, self.rest = self.rest.partition(b"\0")
            answer = json.loads(text)
            if answer.get("id") == self.n:
                if "error" in answer:
                    raise UserError(f"Chromium refused {method}: {answer['error']}")
                return answer["result"]

    def open(self, url):
        self.call("Page.navigate", url=url)

    def evaluate(self, expression):
        """The value of JavaScript; a promise is awaited."""
        result = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in result:
            raise UserError(f"{expression} failed in the page: {result['exceptionDetails']}")
        return result["result"].get("value")

    def screenshot(self, path):
        with open(path, "wb") as f:
            f.write(base64.b64decode(self.call("Page.captureScreenshot")["data"]))


class Firefox(Browser):
    """Firefox, by its Marionette protocol. evaluate() sees the page's document, not its globals."""

    names = ("firefox", "firefox-esr")

    def start(self):
        with open(os.path.join(self.folder.name, "user.js"), "w") as f:
            f.write('user_pref("marionette.port", 0);\n')  # any free port
            f.write(f'user_pref("ui.systemUsesDarkTheme", {int(self.dark)});\n')
        width, height = self.size
        command = [self.path(), "--headless", "--marionette", "--profile", self.folder.name]
        command += [f"--width={width}", f"--height={height}"]
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, **pipes)
        port, end = os.path.join(self.folder.name, "MarionetteActivePort"), time.monotonic() + 60
        while not (os.path.exists(port) and os.path.getsize(port)):
            if time.monotonic() > end or self.process.poll() is not None:
                raise UserError("Firefox did not start")
            time.sleep(0.05)
        with open(port) as f:
            self.socket = socket.create_connection(("127.0.0.1", int(f.read())))
        self.receive()  # its greeting
        self.call("WebDriver:NewSession")

    def __exit__(self, *error):
        self.socket.close()
        super().__exit__(*error)

    def receive(self):
        while True:
            size, colon, data = self.rest.partition(b":")
            if colon and len(data) >= int(size):
                self.rest = data[int(size) :]
                return json.loads(data[: int(size)])
            more = self.socket.recv(1 << 20)
            if not more:
                raise UserError("Firefox ended before the work was done")
            self.rest += more

    def call(self, method, **params):
        self.n += 1
        message = json.dumps([0, self.n, method, params]).encode()
        self.socket.sendall(b"%d:%b" % (len(message), message))
        _, _, error, result = self.receive()
        if error:
            raise UserError(f"Firefox refused {method}: {error}")
        return result

    def open(self, url):
        self.call("WebDriver:Navigate", url=url)

    def evaluate(self, expression):
        """The value of JavaScript; a promise is awaited."""
        return self.call("WebDriver:ExecuteScript", script=f"return {expression}", args=[])["value"]

    def screenshot(self, path):
        with open(path, "wb") as f:
            f.write(base64.b64decode(self.call("WebDriver:TakeScreenshot", full=False)["value"]))
