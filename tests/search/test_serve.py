"""The web page over an index: its answers, its limits, and the page itself in a headless Chromium."""

import base64
import contextlib
import io
import json
import pathlib
import runpy
import shutil
import socket
import struct
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import zlib
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
import torch
import uvicorn
from browser import browsers
from PIL import Image
from selenium.webdriver.common.keys import Keys

from hacan.checkpoints.pretrained import Pretrained
from hacan.errors import UserError
from hacan.search import Index, server
from hacan.search.server import decode_upload

ROOT = pathlib.Path(__file__).parents[2]
TEXTS = ["a dog runs", "a small red cat sits on the grass", "the blue dog"]


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for seed in range(5):
        noise = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
        cv2.imwrite(str(folder / f"{seed} <b>.png"), cv2.resize(noise, (90, 70), interpolation=cv2.INTER_CUBIC))
    return folder


@pytest.fixture
def index(make_model, tokenizer, pictures, tmp_path):
    model = make_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    pretrained = Pretrained(model=model, tokenizer=tokenizer, image_size=64, centre_crop=True, max_text_len=12)
    with Index.create(tmp_path / "index", model=pretrained) as index:
        index.update(pictures, progress=False)
        index.set_texts(TEXTS, progress=False)
        yield index


@contextlib.contextmanager
def serving(app):
    """The address of the application, served by another thread."""
    running = uvicorn.Server(
        uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", http=server.HttpProtocol, ws="none")
    )
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    while not running.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{running.servers[0].sockets[0].getsockname()[1]}"
    finally:
        running.should_exit = True
        thread.join()


@pytest.fixture
def address(index):
    with serving(server.make_app(index)) as address:
        yield address


def asked(address, path, *, body=None, headers=None):
    """Status, headers, content."""
    request = urllib.request.Request(address + path, data=body, headers=headers or {})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read()


def answered(address, path, **arguments):
    status, _, content = asked(address, path, **arguments)
    assert status == 200, content
    return json.loads(content)


# ------------------------------------------------------------------------------------------------------------ answers


def test_sentences_and_images_are_answered_as_by_the_index(address, index, pictures):
    assert answered(address, "/api/about") == {"pictures": 5, "texts": 3}
    found = answered(address, "/api/search?text=a%20red%20cat&top=4")
    expected = index.search("a red cat", top=4)
    assert [r["id"] for r in found["results"]] == [r.id for r in expected]
    assert [r["fine"] for r in found["results"]] == pytest.approx([r.fine for r in expected])
    assert found["results"][0]["name"].endswith(" <b>.png") and "/" not in found["results"][0]["name"]
    content = (pictures / "3 <b>.png").read_bytes()
    found = answered(address, "/api/search", body=content)
    assert found["find"] == "texts" and {r["name"] for r in found["results"]} == set(TEXTS)
    found = answered(address, "/api/search?find=pictures", body=content)
    assert found["results"][0]["name"] == "3 <b>.png" and found["results"][0]["fine"] is None


def test_images_are_addressed_by_number_and_reencoded(address, index):
    for item in index.items():
        status, headers, content = asked(address, f"/pictures/{item.id}")
        shown = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
        assert status == 200 and headers["Content-Type"] == "image/jpeg" and shown.shape == (70, 90, 3)
    assert asked(address, f"/pictures/{item.id}?size=huge")[0] == 400


@pytest.mark.parametrize(
    "path",
    ["/pictures/99", "/pictures/-1", "/pictures/99999999999999999999", "/pictures/..%2f..%2fetc%2fpasswd",
     "/pictures/%2fetc%2fpasswd", "/../../etc/passwd", "/pictures/../index.json", "/index.json", "/pictures/0/..%2f1",
     "/page.js%00", "/docs", "/openapi.json"],
)  # fmt: skip
def test_nothing_else_is_served(address, path):
    status, _, content = asked(address, path)
    assert status in (404, 422) and b"root:" not in content and b"model_hash" not in content


def test_a_file_that_became_something_else_is_not_served(address, index, tmp_path):
    (tmp_path / "secret").write_text("the secret")
    item = index.items()[0]
    path = item.payload["paths"][0]
    pathlib.Path(path).unlink()
    assert asked(address, f"/pictures/{item.id}")[0] == 410
    pathlib.Path(path).symlink_to(tmp_path / "secret")
    status, _, content = asked(address, f"/pictures/{item.id}")
    assert status == 400 and b"the secret" not in content


def test_the_page_may_load_nothing_from_elsewhere(address):
    for path in ("/", "/page.css", "/page.js"):
        status, headers, content = asked(address, path)
        assert status == 200 and "default-src 'none'" in headers["Content-Security-Policy"]
        assert b"http://" not in content and b"https://" not in content and b"//cdn" not in content


def test_other_names_are_not_answered(address):
    assert asked(address, "/api/about", headers={"Host": "evil.example"})[0] == 400


def test_words_are_mapped(address, index):
    item = index.items()[0].id
    found = answered(address, f"/api/explain?id={item}&text=a%20red%20cat%20runs&stream=ksf")
    assert [word["word"] for word in found["words"]] == ["a", "red", "cat", "runs"]
    content = base64.b64decode(found["words"][2]["map"].split(",")[1])
    assert cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR).shape == (64, 64, 3)
    query = {"id": item, "text": "a", "stream": "nothing"}
    assert asked(address, "/api/explain?" + urllib.parse.urlencode(query))[0] == 400
    assert asked(address, "/api/explain?id=99&text=cat")[0] == 404


def test_a_sentence_without_words_is_explained(address, index):
    item = index.items()[0].id
    assert len(answered(address, "/api/search?text=%E2%80%8B")["results"]) == 5  # a space of no width
    status, _, content = asked(address, f"/api/explain?id={item}&text=%E2%80%8B")
    assert status == 400 and b"no word" in content


def test_the_script_listens_on_localhost_by_default(index, monkeypatch):
    seen = []
    main = runpy.run_path(str(ROOT / "scripts" / "serve.py"))["main"]
    monkeypatch.setattr(Index, "open", lambda path, **keywords: contextlib.nullcontext(index))
    monkeypatch.setattr(uvicorn, "run", lambda app, **keywords: seen.append((app, keywords)))
    assert main(["an index"]) == 0 and main(["an index", "--host", "0.0.0.0"]) == 0
    assert [keywords["host"] for _, keywords in seen] == ["127.0.0.1", "0.0.0.0"]
    for (app, _), status in zip(seen, (400, 200), strict=True):
        with serving(app) as address:
            assert asked(address, "/api/about", headers={"Host": "my-machine.lan"})[0] == status


def test_a_port_that_is_taken_is_named(index, monkeypatch, capsys):
    main = runpy.run_path(str(ROOT / "scripts" / "serve.py"))["main"]
    monkeypatch.setattr(Index, "open", lambda path, **keywords: contextlib.nullcontext(index))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert main(["an index", "--port", str(taken.getsockname()[1])]) == 2
    assert "give another one with --port" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------- limits


def png_that_claims(width, height):
    """A PNG whose header promises so many pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IEND" + struct.pack(">I", zlib.crc32(b"IEND"))


def test_uploads_are_judged_before_they_are_decoded(address, monkeypatch):
    for body, message in (
        (b"no image", b"is not a JPEG, PNG or WebP"),
        (b"\0" * 9, b"is not a JPEG, PNG or WebP"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"is not a JPEG, PNG or WebP"),
        (png_that_claims(20_000, 20_000), b"400000000 pixels"),
        (png_that_claims(9000, 8000), b"9000 x 8000 pixels"),
        (png_that_claims(40, 30), b"damaged"),
    ):
        status, _, content = asked(address, "/api/search", body=body)
        assert status == 400 and message in content, content
    monkeypatch.setattr(server, "MAX_BYTES", 1000)
    assert asked(address, "/api/search", body=b"x" * 1001)[0] == 413
    with pytest.raises(UserError, match="more than 1,000,000 are not decoded"):
        decode_upload(png_that_claims(1001, 1000), max_pixels=1_000_000)


@pytest.mark.parametrize("query", ["text=", "text=%20", "text=cat&top=0", "text=cat&top=101", f"text={'a' * 1001}"])
def test_bad_questions_are_explained(address, query):
    status, _, content = asked(address, f"/api/search?{query}")
    assert status == 400 and len(json.loads(content)["detail"]) > 10


def test_questions_that_come_together_are_all_answered_one_at_a_time(address, index, monkeypatch):
    search, inside, most = index.search, [], []

    def slow(*arguments, **keywords):
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.02)
        inside.pop()
        return search(*arguments, **keywords)

    monkeypatch.setattr(index, "search", slow)
    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(lambda k: answered(address, f"/api/search?text=cat&top={k}"), [1, 2, 3, 4] * 3))
    assert [len(answer["results"]) for answer in found] == [1, 2, 3, 4] * 3 and set(most) == {1}


# ------------------------------------------------------------------------------------------------------------ browser


@pytest.fixture
def open_browser(tmp_path):
    with browsers(tmp_path) as start:
        yield start


def drop(browser, content):
    """Drop a file with this content on the page after the previous answer is shown."""
    browser.run(
        f"const bytes = Uint8Array.from(atob('{base64.b64encode(content).decode()}'), (c) => c.charCodeAt(0));"
        "const carried = new DataTransfer(); carried.items.add(new File([bytes], 'dropped.png'));"
        "document.getElementById('status').textContent = '';"
        "document.body.dispatchEvent(new DragEvent('drop', {dataTransfer: carried, bubbles: true}))"
    )


@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_in_a_browser(address, index, pictures, open_browser, tmp_path, width):
    browser = open_browser(width)
    browser.open(address)
    assert width - 20 <= browser.run("return document.documentElement.clientWidth") <= width
    browser.wait("document.getElementById('about').textContent.includes('5 pictures, 3 texts')")
    browser.type("#text", "a red cat runs")
    browser.type("#text", Keys.ENTER) if width == 1280 else browser.click("#ask button")
    browser.wait("document.querySelectorAll('#chips button').length === 4")
    names = browser.run("return [...document.querySelectorAll('#results strong')].map((e) => e.textContent)")
    assert names == [f"{r.rank}. {r.name.rsplit('/', 1)[1]}" for r in index.search("a red cat runs")]
    browser.wait("[...document.querySelectorAll('#results img')].every((e) => e.complete && e.naturalWidth)")
    mapped = "[...document.querySelectorAll('#results img')].filter((e) => e.dataset.map === '{}').length === {}"
    browser.click("#chips button:nth-child(3)")  # tapped: it stays
    browser.wait(mapped.format("cat", 5))
    browser.screenshot(tmp_path / f"page-{width}.png")
    browser.click("#chips button:nth-child(3)")
    browser.run("document.getElementById('stream').focus(); return 1")
    browser.press(Keys.TAB)  # the keyboard reaches the words
    assert browser.run("return document.activeElement.textContent") == "a"
    browser.press(Keys.TAB)
    browser.wait(mapped.format("red", 5))
    browser.run("document.activeElement.blur(); return 1")
    browser.wait(mapped.format("red", 0))
    if width == 1280:
        browser.hover("#chips button:nth-child(4)")
        browser.wait(mapped.format("runs", 5))
        browser.hover("h1")
        browser.wait(mapped.format("runs", 0))
    columns = browser.run("return new Set([...document.querySelectorAll('#results li')].map((e) => e.offsetLeft)).size")
    assert columns == (2 if width == 400 else 4)
    browser.type("#file", str(pictures / "2 <b>.png"))
    browser.wait("document.querySelectorAll('#results.texts li').length === 3")
    browser.wait("!document.getElementById('asked').hidden && document.getElementById('asked').naturalWidth === 90")
    drop(browser, (pictures / "3 <b>.png").read_bytes())
    browser.wait("document.getElementById('status').textContent === '3 texts, best first'")
    browser.click("#find option[value=pictures]")
    browser.type("#file", str(pictures / "2 <b>.png"))
    browser.wait("document.querySelector('#results.pictures strong')?.textContent === '1. 2 <b>.png'")
    (tmp_path / "bad.png").write_text("no image")
    browser.type("#file", str(tmp_path / "bad.png"))
    browser.wait("document.getElementById('status').textContent.includes('not a JPEG')")
    assert browser.run("return document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    loaded = browser.run("return performance.getEntriesByType('resource').map((e) => e.name)")
    assert all(name.startswith((address, "data:", "blob:")) for name in loaded)
    errors = browser.errors()
    assert all("400" in message or "favicon" in message for message in errors), errors


# ------------------------------------------------------------------------------------------------------------ attacks


def many_scans(count):
    """A progressive JPEG whose last scan is there `count` times more: small, valid, and slow to decode."""
    content = io.BytesIO()
    Image.fromarray(np.full((6000, 6000, 3), 120, np.uint8)).save(content, "JPEG", progressive=True)
    file = content.getvalue()
    last = file.rindex(b"\xff\xda")
    return file[:-2] + file[last:-2] * count + file[-2:]


def test_an_upload_that_is_slow_to_decode_is_ended(address, monkeypatch):
    monkeypatch.setattr(server, "DECODE_SECONDS", 1.5)
    asked(address, "/api/search", body=png_that_claims(4, 3))  # the process that starts decoders is there now
    start = time.monotonic()
    status, _, content = asked(address, "/api/search", body=many_scans(3000))
    assert status == 400 and b"takes longer than 1.5 s" in content, content
    assert time.monotonic() - start < 30
    assert len(answered(address, "/api/search?text=cat")["results"]) == 5


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}, 403),
        ({"Sec-Fetch-Site": "same-origin"}, 200),
        ({"Sec-Fetch-Site": "none"}, 200),
        ({}, 200),
    ],
)
def test_other_web_sites_are_not_answered(address, headers, status):
    assert asked(address, "/api/search?text=cat", headers=headers)[0] == status
    origin = {"Origin": address, **headers}
    assert asked(address, "/api/search?text=cat", headers=origin)[0] == status


def test_a_link_on_another_web_site_opens_the_page(address):
    headers = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    status, received, _ = asked(address, "/", headers=headers)
    assert status == 200 and received["Cross-Origin-Resource-Policy"] == "same-origin"
    assert asked(address, "/", headers={**headers, "Sec-Fetch-Dest": "iframe"})[0] == 403


def connected(address):
    host, _, port = address.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)), timeout=20)


def test_a_slow_head_is_disconnected(address, monkeypatch):
    monkeypatch.setattr(server, "HEAD_SECONDS", 0.5)
    with connected(address) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: local")
        start = time.monotonic()
        for _ in range(3):  # more of the head does not extend the time
            time.sleep(0.1)
            connection.sendall(b"h")
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(100) == b""
        assert time.monotonic() - start < 10


def test_unfinished_uploads_are_limited_in_number_and_time(address, monkeypatch, capfd):
    head = f"POST /api/search HTTP/1.1\r\nHost: {address[7:]}\r\nContent-Length: 1000\r\n\r\n".encode()
    with contextlib.ExitStack() as stack:
        for _ in range(server.MAX_UPLOADS):
            stack.enter_context(connected(address)).sendall(head + b"x")
        for _ in range(100):
            status, _, content = asked(address, "/api/search", body=b"x")
            if status == 503:
                break
            time.sleep(0.05)
        assert status == 503 and json.loads(content)["detail"].startswith("the server is busy")
    for _ in range(100):  # the aborted ones give their places back
        if asked(address, "/api/search", body=b"x")[0] == 400:
            break
        time.sleep(0.05)
    else:
        pytest.fail("aborted uploads keep their places")
    monkeypatch.setattr(server, "UPLOAD_SECONDS", 0.3)
    with connected(address) as connection:
        connection.sendall(head + b"x")
        assert b" 408 " in connection.recv(1000)
    assert "Traceback" not in capfd.readouterr().err


def test_errors_have_one_form_and_tell_no_path(address, index, tmp_path, monkeypatch):
    for path in ("/nothing", "/api/search", "/api/search?text=cat&top=many", "/api/explain?id=99&text=cat"):
        status, _, content = asked(address, path)
        assert status in (404, 422) and isinstance(json.loads(content)["detail"], str), content
    item = index.items()[0]
    pathlib.Path(item.payload["paths"][0]).write_text("no image")
    status, _, content = asked(address, f"/pictures/{item.id}")
    assert status == 400 and str(tmp_path) not in content.decode()
    shutil.rmtree(tmp_path / "index" / "features")
    status, _, content = asked(address, "/api/search?text=cat")
    assert status == 400 and b"damaged" in content and str(tmp_path) not in content.decode()
    monkeypatch.setattr(index, "search", lambda *_, **__: 1 / 0)
    status, _, content = asked(address, "/api/search?text=cat")
    assert status == 500 and isinstance(json.loads(content)["detail"], str)
