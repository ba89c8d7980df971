"""Web page over an index: search by a sentence or an image.

Images are addressed by the hash of their content, never by a path, and are sent as newly encoded JPEGs. One thread does
all the work, so concurrent requests wait for each other. The page loads nothing from other hosts.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from starlette.middleware.trustedhost import TrustedHostMiddleware

from hacan.errors import UserError, printable
from hacan.images.io import HEADER, decode_image, image_kind, read_image
from hacan.report.heatmaps import STREAM_NAMES, overlay
from hacan.report.thumbnails import data_uri, jpeg, shrink
from hacan.search.index import PICTURES, TEXTS, Index, Result
from hacan.search.word_heatmaps import explain_features

MAX_BYTES = 20 * 2**20  # of an upload
MAX_PIXELS = 50_000_000
UPLOADS = ("JPEG", "PNG", "WEBP")
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
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


def make_app(index: Index, *, hosts: tuple[str, ...] = ("127.0.0.1", "localhost", "[::1]")) -> FastAPI:
    """Return the application. hosts: accepted host names, which prevents DNS rebinding by other web sites."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))
    worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="search")
    find_maps = lru_cache(CACHED_HEATMAPS)(lambda item, text, stream: _maps(index, item, text, stream))

    async def work(function: Callable, *arguments: Any) -> Any:
        """Run a function in the worker thread, after earlier requests."""
        return await asyncio.get_running_loop().run_in_executor(worker, function, *arguments)

    @app.middleware("http")
    async def guard(request: Request, answer: Callable) -> Response:
        response = await answer(request)
        response.headers.update({name: value for name, value in HEADERS.items() if name not in response.headers})
        return response

    @app.exception_handler(UserError)
    async def explain_mistake(request: Request, error: UserError) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, status_code=400)

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
        content = await _body(request)

        def answer() -> dict[str, Any]:
            image = decode_upload(content, max_pixels=MAX_PIXELS)
            kind = find or (TEXTS if index.count(TEXTS) else PICTURES)
            results = index.search(image=image, find=kind, top=_within(top))
            return {"find": kind, "text": "", "results": [_plain(result, kind) for result in results]}

        return await work(answer)

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
    return decode_image(content, name="the image", max_pixels=max_pixels)


async def _body(request: Request) -> bytes:
    """Return the body of a request; stop reading when it exceeds `MAX_BYTES`."""
    content = bytearray()
    async for part in request.stream():
        content += part
        if len(content) > MAX_BYTES:
            raise HTTPException(413, f"the file is larger than {MAX_BYTES // 2**20} MiB: make it smaller")
    return bytes(content)


def _read(index: Index, item: str) -> np.ndarray:
    found = index.item(item)
    if found is None:
        raise HTTPException(404, "no such image in the index")
    for path in found.payload["paths"]:
        if Path(path).is_file():
            return read_image(path)
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
