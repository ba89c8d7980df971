"""The report in a headless Chromium: every click and key of the heatmap viewer, and what it draws."""

import base64

import cv2
import numpy as np
import pytest
from browser import browsers
from selenium.webdriver.common.keys import Keys
from test_report import CAPTIONS, evaluated  # noqa: F401  (a fixture)

from hacan.report.heatmaps import explain, overlay

NAMES = ("one.png", "<b>two.png", "three.jpg")
DRAWN = "document.querySelectorAll('.maps canvas').length === 3 && document.querySelector('.maps canvas').width === 64"


def canvases(browser):
    """The three maps as they are drawn, [64, 64, 3] RGB."""
    found = browser.run("return [...document.querySelectorAll('.maps canvas')].map((c) => c.toDataURL())")
    contents = [np.frombuffer(base64.b64decode(uri.split(",")[1]), np.uint8) for uri in found]
    return [cv2.imdecode(content, cv2.IMREAD_COLOR_RGB) for content in contents]


def wait_for_word(browser, number):
    """Wait until this word is selected and drawn; return its text."""
    browser.wait(f"document.querySelectorAll('.words button')[{number}].getAttribute('aria-pressed') === 'true'")
    text = browser.run(f"return document.querySelectorAll('.words button')[{number}].textContent")
    browser.wait(f"document.querySelector('[aria-live]').textContent === 'heatmaps of the word {text}'")
    assert browser.run("return document.querySelectorAll('.words [aria-pressed=true]').length") == 1
    return text


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 400])
def test_clicks_and_keys_of_the_viewer(evaluated, tmp_path, width):  # noqa: F811
    make, pretrained, write = evaluated
    report = write(tmp_path / "report.html", make(curve=True, bootstrap=20), pretrained=pretrained)
    with browsers(tmp_path) as start:
        browser = start(width)
        browser.open(report.as_uri())
        browser.wait(DRAWN)
        data = "JSON.parse(document.getElementById('data').textContent)"
        pairs = browser.run(f"return {data}.pairs.map((pair) => pair.caption)")
        chosen = "document.getElementById('pair').value"

        # a pair by its button in the gallery: the viewer shows it, is scrolled to, and has the focus
        number = next(k for k, caption in enumerate(pairs) if caption == CAPTIONS[3])
        browser.click(f".see[data-pair='{number}']")
        browser.wait(f"{chosen} === '{number}' && {DRAWN}")
        assert browser.run("return document.activeElement.id") == "pair"
        top = browser.run("return document.getElementById('heatmaps').getBoundingClientRect().top")
        assert -20 <= top <= 400

        # a word by a click, its neighbours by the arrow keys, round the ends
        words = browser.run("return [...document.querySelectorAll('.words button')].map((b) => b.textContent)")
        assert words == ["[CLS]", *CAPTIONS[3].split(), "[SEP]"]
        browser.click(".words button:nth-child(4)")
        assert wait_for_word(browser, 3) == "dog"
        browser.press(Keys.RIGHT)
        assert wait_for_word(browser, 4) == "sits"
        assert browser.run("return document.activeElement.textContent") == "sits"
        browser.press(Keys.LEFT)
        browser.press(Keys.LEFT)
        assert wait_for_word(browser, 2) == "red"

        # what is drawn is the overlay of that word, each stream on its own scale
        image = browser.run(f"return {data}.pairs[{number}].image")
        found = explain(pretrained, tmp_path / NAMES[image], CAPTIONS[3])
        for drawn, stream in zip(canvases(browser), found.streams, strict=True):
            expected = overlay(found.image, stream.grids[2], *stream.range).astype(float)
            other = overlay(found.image, stream.grids[2].T, *stream.range).astype(float)
            assert np.abs(drawn - expected).mean() < 8  # the image below went through a JPEG
            assert np.abs(drawn - expected).mean() < np.abs(drawn - other).mean()

        # without opacity only the image is left
        browser.run("document.getElementById('opacity').focus(); return 1")
        browser.press(Keys.HOME)
        browser.wait("document.getElementById('opacity').value === '0'")
        wait_for_word(browser, 2)
        one, two, three = canvases(browser)
        assert np.abs(one.astype(int) - found.image).mean() < 12
        assert (one == two).all() and (one == three).all()

        # next and previous pair, round the ends; and by the list
        browser.click("button[aria-label='next pair']")
        browser.wait(f"{chosen} === '{(number + 1) % len(pairs)}'")
        for _ in range(number + 2):
            browser.click("button[aria-label='previous pair']")
        browser.wait(f"{chosen} === '{len(pairs) - 1}' && {DRAWN}")
        browser.click("#pair option[value='1']")
        browser.wait(f"{chosen} === '1' && {DRAWN}")
        assert browser.run("return document.querySelector('#viewer .note').textContent.startsWith('Fine similarity')")

        # a keyboard alone: from the list on to a word, and a button of the gallery by Enter
        browser.run("document.querySelector('button[aria-label=\"next pair\"]').focus(); return 1")
        browser.press(Keys.TAB)
        reached = browser.run("return [...document.querySelectorAll('.words button')].indexOf(document.activeElement)")
        wait_for_word(browser, reached)  # the chosen word, whichever that is
        browser.press(Keys.RIGHT)
        wait_for_word(browser, (reached + 1) % browser.run("return document.querySelectorAll('.words button').length"))
        browser.run("document.querySelector('.see[data-pair=\"0\"]').focus(); return 1")
        browser.press(Keys.ENTER)
        browser.wait(f"{chosen} === '0'")

        # the rest of the page: links lead to their parts, the provenance opens, nothing is cut off or fetched
        for name in browser.run("return [...document.querySelectorAll('nav a')].map((a) => a.hash.slice(1))"):
            browser.click(f"nav a[href='#{name}']")
            place = browser.run(f"return document.getElementById('{name}').getBoundingClientRect().top")
            assert -1 <= place < browser.run("return innerHeight")
        browser.click("#provenance summary")
        assert "ids hash" in browser.run("return document.querySelector('#provenance dl').innerText")
        assert browser.run("return document.documentElement.scrollWidth <= document.documentElement.clientWidth")
        pictures = "[...document.querySelectorAll('img')]"
        browser.run(f"{pictures}.forEach((i) => {{ i.loading = 'eager'; }}); return 1")
        browser.wait(f"{pictures}.every((i) => i.complete && i.naturalWidth)")
        assert browser.run("return performance.getEntriesByType('resource').map((e) => e.name)") == []
        assert browser.errors() == []
