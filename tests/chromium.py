"""A headless Chromium for tests, driven through chromedriver's HTTP protocol (W3C WebDriver), without a library."""

import base64
import contextlib
import json
import shutil
import socket
import subprocess
import time
import urllib.request

import pytest

TAB, ENTER, RIGHT, LEFT = "\ue004", "\ue007", "\ue014", "\ue012"


class Browser:
    """One window, `width` pixels wide."""

    ELEMENT = "element-6066-11e4-a52e-4f735466cecf"

    def __init__(self, driver, width, folder):
        options = {
            "binary": shutil.which("chromium"),
            "args": ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
                     f"--window-size={width},900", f"--user-data-dir={folder}"],
        }  # fmt: skip
        if width < 500:  # narrower than a desktop window may be: as a telephone
            options["mobileEmulation"] = {
                "deviceMetrics": {"width": width, "height": 900, "pixelRatio": 1, "touch": True}
            }
        wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        self._driver = driver
        self._session = self._ask("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]

    def __call__(self, method, path, body=None):
        return self._ask(method, f"/session/{self._session}{path}", body)

    def _ask(self, method, path, body):
        data = None if method == "GET" else json.dumps(body or {}).encode()
        request = urllib.request.Request(self._driver + path, data=data, method=method)
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.loads(answer.read())["value"]

    def open(self, address):
        self("POST", "/url", {"url": address})

    def run(self, script):
        return self("POST", "/execute/sync", {"script": script, "args": []})

    def find(self, css):
        return self("POST", "/element", {"using": "css selector", "value": css})[self.ELEMENT]

    def type(self, css, text):
        self("POST", f"/element/{self.find(css)}/value", {"text": text})

    def click(self, css):
        self("POST", f"/element/{self.find(css)}/click")

    def press(self, key):
        keys = [{"type": "keyDown", "value": key}, {"type": "keyUp", "value": key}]
        self("POST", "/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": keys}]})

    def hover(self, css):
        move = {"type": "pointerMove", "duration": 0, "x": 0, "y": 0, "origin": {self.ELEMENT: self.find(css)}}
        mouse = {"type": "pointer", "id": "mouse", "parameters": {"pointerType": "mouse"}, "actions": [move]}
        self("POST", "/actions", {"actions": [mouse]})

    def wait(self, condition):
        for _ in range(600):
            if value := self.run(f"return {condition}"):
                return value
            time.sleep(0.1)
        raise AssertionError(f"{condition} stayed false; the page says {self.run('return document.body.innerText')!r}")

    def errors(self):
        """What the page complained about in the console, since the last call."""
        return [line["message"] for line in self("POST", "/se/log", {"type": "browser"})]

    def screenshot(self, path, *, whole=False):
        """What is in the window, or the whole page."""
        if not whole:
            path.write_bytes(base64.b64decode(self("GET", "/screenshot")))
            return
        taken = {"cmd": "Page.captureScreenshot", "params": {"captureBeyondViewport": True}}
        size = self("POST", "/goog/cdp/execute", {"cmd": "Page.getLayoutMetrics", "params": {}})["cssContentSize"]
        taken["params"]["clip"] = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        path.write_bytes(base64.b64decode(self("POST", "/goog/cdp/execute", taken)["data"]))


@contextlib.contextmanager
def browsers(folder):
    """start(width) -> Browser; all of them end with the context. Skips the test where there is no Chromium."""
    if not shutil.which("chromium") or not shutil.which("chromedriver"):
        pytest.skip("no chromium and chromedriver here (Debian: apt-get install chromium chromium-driver)")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with open(folder / "driver.log", "w") as log:
        process = subprocess.Popen(["chromedriver", f"--port={port}"], stdout=log, stderr=log)
    started = []

    def start(width):
        started.append(Browser(f"http://127.0.0.1:{port}", width, folder / f"profile-{len(started)}"))
        return started[-1]

    try:
        for _ in range(300):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            time.sleep(0.1)
        yield start
    finally:
        for browser in started:  # after a failure too: a browser outlives its driver
            browser("DELETE", "")
        process.terminate()
        process.wait()
