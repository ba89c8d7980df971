"""Headless Chromium for tests, through selenium and the system's chromium and chromedriver."""

import contextlib
import os
import shutil

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

# Chromium connects to its maker's hosts at every start unless it is told not to.
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-quic"),
    *("--hide-scrollbars", "--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


def _chromium():
    return shutil.which("chromium") or shutil.which("google-chrome")


class Browser:
    """One window, `width` pixels wide; below 500 pixels it emulates a phone."""

    def __init__(self, width, profile):
        options = Options()
        options.binary_location = _chromium()
        for flag in (*FLAGS, f"--window-size={width},900", f"--user-data-dir={profile}"):
            options.add_argument(flag)
        if width < 500:  # narrower than a desktop window can be
            metrics = {"width": width, "height": 900, "pixelRatio": 1, "touch": True}
            options.add_experimental_option("mobileEmulation", {"deviceMetrics": metrics})
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
        self.driver.set_page_load_timeout(120)

    def open(self, address):
        self.driver.get(address)

    def run(self, script):
        return self.driver.execute_script(script)

    def find(self, css):
        return self.driver.find_element(By.CSS_SELECTOR, css)

    def type(self, css, text):
        self.find(css).send_keys(text)

    def click(self, css):
        self.find(css).click()

    def press(self, key):
        ActionChains(self.driver).send_keys(key).perform()

    def hover(self, css):
        ActionChains(self.driver).move_to_element(self.find(css)).perform()

    def wait(self, condition):
        message = f"{condition} stayed false"
        return WebDriverWait(self.driver, 60, poll_frequency=0.1).until(
            lambda driver: driver.execute_script(f"return {condition}"), message
        )

    def errors(self):
        """Return the messages in the console since the last call."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def screenshot(self, path, *, whole=False):
        """Save the window, or the whole page, as a PNG file."""
        if not whole:
            self.driver.save_screenshot(str(path))
            return
        height = self.run("return document.documentElement.scrollHeight")
        size = self.driver.get_window_size()
        self.driver.set_window_size(size["width"], height + 150)
        self.driver.save_screenshot(str(path))
        self.driver.set_window_size(size["width"], size["height"])


@contextlib.contextmanager
def browsers(folder):
    """Yield start(width) -> Browser. Without Chromium the test is skipped, or fails if HACAN_REQUIRE_BROWSER is set."""
    if not _chromium() or not shutil.which("chromedriver"):
        missing = "no chromium and chromedriver (Debian: apt-get install chromium chromium-driver)"
        if os.environ.get("HACAN_REQUIRE_BROWSER"):
            pytest.fail(missing)
        pytest.skip(missing)
    started: list[Browser] = []

    def start(width):
        started.append(Browser(width, folder / f"profile-{len(started)}"))
        return started[-1]

    try:
        yield start
    finally:
        for browser in started:
            browser.driver.quit()
