"""Web page over an index: search by a sentence or an image.

Images are addressed by the hash of their content, never by a path, and are sent as newly encoded JPEGs. One thread
searches and another one decodes uploads, so concurrent requests wait for each other; their number and time are limited.
Other web sites are not answered, and the page loads nothing from them. Every error is {"detail": "one line"}.
"""

import asyncio
import contextlib
import json
import os
import re
import socket
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import h11
import numpy as np
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect
from uvicorn.protocols.http.h11_impl import H11Protocol

from hacan.errors import UserError, printable
from hacan.images.io import HEADER, decode_within, image_kind, read_image
from hacan.report.heatmaps import STREAM_NAMES, overlay
from hacan.report.thumbnails import data_uri, jpeg, shrink
from hacan.search.index import PICTURES, TEXTS, Index, Result
from hacan.search.word_heatmaps import explain_features

MAX_BYTES = 20 * 2**20  # of an upload
MAX_PIXELS = 50_000_000
UPLOADS = ("JPEG", "PNG", "WEBP")
DECODE_SECONDS, UPLOAD_SECONDS = 10, 30
MAX_UPLOADS, MAX_WAITING, MAX_CONNECTIONS = 4, 100, 200
HEAD_SECONDS = 10  # until the head of a request is complete
STALLED_SECONDS = 60  # until a client that does not read its answer is disconnected
MAX_RESULTS, MAX_TEXT_LENGTH = 100, 1000
SIZES = {"small": 480, "large": 1600}  # pixels, long side
CACHED_HEATMAPS = 128  # explanations kept, each some hundred KiB
MAP = 384
PAGE = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


def make_app(index: Index, *, hosts: tuple[str, ...] = ("127.0.0.1", "localhost", "[::1]")) -> FastAPI:
    """Return the application, to be served with `HttpProtocol`.

    hosts: accepted host names, which prevents DNS rebinding by other web sites; ("*",) accepts all.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="search")
    decoder = ThreadPoolExecutor(max_workers=1, thread_name_prefix="decode")
    uploads, waiting = asyncio.Semaphore(MAX_UPLOADS), asyncio.Semaphore(MAX_WAITING)
    find_maps = lru_cache(CACHED_HEATMAPS)(lambda item, text, stream: _maps(index, item, text, stream))

    async def work(function: Callable, *arguments: Any) -> Any:
        """Run a function in the worker thread, after earlier requests."""
        async with _place(waiting):
            return await asyncio.get_running_loop().run_in_executor(worker, function, *arguments)

    @app.middleware("http")
    async def guard(request: Request, answer: Callable) -> Response:
        response = _refusal(request, hosts) or await answer(request)
        response.headers.update({name: value for name, value in HEADERS.items() if name not in response.headers})
        return response

    @app.exception_handler(UserError)
    async def explain_mistake(request: Request, error: UserError) -> JSONResponse:
        return _error(400, _without_address(str(error), index.address))

    @app.exception_handler(RequestValidationError)
    async def explain_query(request: Request, error: RequestValidationError) -> JSONResponse:
        return _error(422, "; ".join(f"{found['loc'][-1]}: {found['msg']}" for found in error.errors()))

    @app.exception_handler(Exception)
    async def explain_bug(request: Request, error: Exception) -> JSONResponse:
        return _error(500, "the server has failed: see its terminal")

    for route, (name, kind) in PAGE.items():
        _serve_file(app, route, (Path(__file__).parent / "templates" / name).read_bytes(), f"{kind}; charset=utf-8")

    @app.get("/api/about")
    async def about() -> dict[str, Any]:
        return await work(lambda: {"pictures": index.count(PICTURES), "texts": index.count(TEXTS)})

    @app.get("/api/search")
    async def search(text: str, top: int = 24) -> dict[str, Any]:
        if len(text) > MAX_TEXT_LENGTH:
            raise UserError(f"the sentence has {len(text)} characters, expected {MAX_TEXT_LENGTH} at most")
        results = await work(lambda: index.search(text, top=_within(top)))
        return {"find": PICTURES, "text": text, "results": [_plain(result, PICTURES) for result in results]}

    @app.post("/api/search")
    async def search_by_picture(request: Request, find: str = "", top: int = 24) -> dict[str, Any]:
        def answer(image: np.ndarray) -> dict[str, Any]:
            kind = find or (TEXTS if index.count(TEXTS) else PICTURES)
            results = index.search(image=image, find=kind, top=_within(top))
            return {"find": kind, "text": "", "results": [_plain(result, kind) for result in results]}

        async with _place(uploads):
            decode = partial(decode_upload, await _body(request), max_pixels=MAX_PIXELS)
            return await work(answer, await asyncio.get_running_loop().run_in_executor(decoder, decode))

    @app.get("/pictures/{item}")
    async def picture(item: str, size: str = "small") -> Response:
        if size not in SIZES:
            raise UserError(f"size={size!r}: expected {' or '.join(SIZES)}")
        content = await work(lambda: jpeg(shrink(_read(index, item), SIZES[size])))
        return Response(content, media_type="image/jpeg", headers={"Cache-Control": "private, max-age=60"})

    @app.get("/api/explain")
    async def explain(id: str, text: str, stream: str = "lrg_mid") -> dict[str, Any]:
        if stream not in STREAM_NAMES or not text.strip() or len(text) > MAX_TEXT_LENGTH:
            raise UserError(f"give a sentence, and as stream one of {', '.join(STREAM_NAMES)}")

        def answer() -> dict[str, Any]:
            return find_maps(id, text, stream)

        return await work(answer)

    return app


def _serve_file(app: FastAPI, route: str, content: bytes, kind: str) -> None:
    @app.get(route)
    async def file() -> Response:
        return Response(content, media_type=kind)


def decode_upload(content: bytes, *, max_pixels: int) -> np.ndarray:
    """Return the [H, W, 3] uint8 RGB image of an uploaded JPEG, PNG or WebP file; its content decides, not its name."""
    if image_kind(content[:HEADER]) not in UPLOADS:
        raise UserError("the file is not a JPEG, PNG or WebP image: choose another one")
    return decode_within(DECODE_SECONDS, content, name="the image", max_pixels=max_pixels)


async def _body(request: Request) -> bytes:
    """Return the body of a request; stop reading at `MAX_BYTES` and after `UPLOAD_SECONDS`."""
    content = bytearray()
    try:
        async with asyncio.timeout(UPLOAD_SECONDS):
            async for part in request.stream():
                content += part
                if len(content) > MAX_BYTES:
                    raise HTTPException(413, f"the file is larger than {MAX_BYTES // 2**20} MiB: make it smaller")
    except TimeoutError as error:
        raise HTTPException(408, f"the upload took longer than {UPLOAD_SECONDS} s: make the file smaller") from error
    except ClientDisconnect as error:
        raise HTTPException(400, "the upload was aborted") from error
    return bytes(content)


@contextlib.asynccontextmanager
async def _place(places: asyncio.Semaphore) -> AsyncIterator[None]:
    """Take one of the places; answer 503 if there is none."""
    if places.locked():
        raise HTTPException(503, "the server is busy: try again in some seconds", {"Retry-After": "5"})
    async with places:
        yield


def _error(status: int, detail: str) -> JSONResponse:
    return JSONResponse({"detail": detail}, status, HEADERS)


def _refusal(request: Request, hosts: tuple[str, ...]) -> JSONResponse | None:
    """Return the answer to a request for another host name or from another web site; None for the own page."""
    host = request.headers.get("Host", "").lower()
    if "*" not in hosts and re.sub(r":\d+$", "", host) not in hosts:
        return _error(400, "unknown host name: open the address that scripts/serve.py printed")
    sent = {name: request.headers.get(f"Sec-Fetch-{name}", "") for name in ("Site", "Mode", "Dest")}
    followed = request.method == "GET" and request.url.path == "/" and sent["Mode"] == "navigate"
    site = sent["Site"] in ("", "same-origin", "none") or (followed and sent["Dest"] in ("", "document"))
    origin = request.headers.get("Origin")
    if site and (origin is None or origin.lower().partition("://")[2] == host):
        return None
    return _error(403, "requests of other web sites are not answered: open the page itself")


def _without_address(message: str, address: str) -> str:
    """Return an error message of the index without its folder or URI, in any of the forms that libraries print."""
    forms = {form.strip("/") for path in (address, os.path.abspath(address)) for form in (path, quote(path))}
    for form in sorted((form for form in forms if "/" in form), key=len, reverse=True):
        message = re.sub(rf"(file://)?/?{re.escape(form)}", "the index", message)
    return message


class HttpProtocol(H11Protocol):
    """HTTP of uvicorn with limits: of connections, of the time for a request's head and body, of stalled answers."""

    _state: Any = None
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for the head of the first request."""
        super().connection_made(transport)
        if option := getattr(socket, "TCP_USER_TIMEOUT", None):  # Linux
            transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, option, STALLED_SECONDS * 1000)
        if len(self.connections) > MAX_CONNECTIONS:
            transport.abort()
        self._limit()

    def data_received(self, data: bytes) -> None:
        """Read a part of a request."""
        super().data_received(data)
        self._limit()

    def connection_lost(self, exc: Exception | None) -> None:
        """End the limits of time."""
        super().connection_lost(exc)
        self._limit(ended=True)

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP."""
        body = json.dumps({"detail": msg}).encode()
        head = f"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        self.transport.write(head.encode() + b"connection: close\r\n\r\n" + body)
        self.transport.close()

    def _limit(self, *, ended: bool = False) -> None:
        """Restart the time when another part of a request begins: more of the same part does not extend it."""
        state = None if ended else self.conn.their_state
        if state is not self._state:
            if self._deadline:
                self._deadline.cancel()
            self._state = state
            seconds = HEAD_SECONDS if state is h11.IDLE else UPLOAD_SECONDS + 5 if state is h11.SEND_BODY else 0
            self._deadline = self.loop.call_later(seconds, self.transport.abort) if seconds else None


def _read(index: Index, item: str) -> np.ndarray:
    found = index.item(item)
    if found is None:
        raise HTTPException(404, "no such image in the index")
    for path in found.payload["paths"]:
        if Path(path).is_file():
            try:
                return read_image(path)
            except UserError as error:  # which tells the path
                name = printable(Path(path).name)
                raise UserError(f"{name} is no longer an image that can be read; index the folder again") from error
    raise HTTPException(410, "the image file no longer exists; index the folder again")


def _maps(index: Index, item: str, text: str, stream: str) -> dict[str, Any]:
    """Return an image with the heatmap of each word as data URIs."""
    image = _read(index, item)
    found = explain_features(index.pretrained, index.features(item), image, text)
    maps = next(maps for maps in found.streams if maps.stream == stream)
    words = [
        {"word": word.text, "map": data_uri(shrink(shown, MAP))}
        for word, grid in zip(found.words, maps.grids, strict=True)
        for shown in [overlay(found.image, grid, *maps.range)]
    ]
    return {"words": words, "stream": STREAM_NAMES[stream], "unit": maps.unit, "score": maps.score}


def _plain(result: Result, kind: str) -> dict[str, Any]:
    """Return a result without the path of an image, only its file name."""
    name = printable(Path(result.name).name) if kind == PICTURES else result.name
    return {"rank": result.rank, "id": result.id, "name": name, "coarse": result.coarse, "fine": result.fine}


def _within(top: int) -> int:
    if not 1 <= top <= MAX_RESULTS:
        raise UserError(f"top={top}: expected 1 to {MAX_RESULTS}")
    return top
