"""HTTP around a desk: a page, what it asks for, and nothing else of this machine.

No file can be asked for by its path. Other sites can neither read answers nor have work done: the
Host and Origin of a request must be this server's. One request at a time uses the model.
"""

from __future__ import annotations

import asyncio
import socket
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import uvicorn
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cmtool.errors import BusyError, InputError, UserError
from cmtool.page.asked import Asked, AskedEdit, AskedHarm, AskedMorph, AskedSamples
from cmtool.page.desk import Answer, Desk

STATIC = Path(__file__).parent / "static"
FILES = {
    "": ("index.html", "text/html; charset=utf-8"),
    "page.js": ("page.js", "text/javascript; charset=utf-8"),
    "easel.js": ("easel.js", "text/javascript; charset=utf-8"),
    "parts.js": ("parts.js", "text/javascript; charset=utf-8"),
    "page.css": ("page.css", "text/css; charset=utf-8"),
    "icon.svg": ("icon.svg", "image/svg+xml"),
}
"""What the page consists of, by the name in its address."""
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self';"
    " img-src 'self' data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none';"
    " frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
MAX_UPLOAD = 64 << 20
"""Bytes of a picture that is dropped on the page."""
MAX_ASKED = 16 << 20
"""Bytes of any other request."""
MAX_WAITING = 16
"""Requests that wait for the model; more are sent away."""
A = TypeVar("A", bound=Asked)
Work = Callable[[], Answer]


class Replaced(UserError):
    """A newer request of the same tab waits: nobody looks at the answer of this one."""


STATUS = {BusyError: 503, Replaced: 409}
"""HTTP's number for an error of the user; 400 for those not named here."""


class Line:
    """Requests in line for the model: one is served, few wait, and of a tab only the newest."""

    def __init__(self) -> None:
        self.is_served = False
        self.waiting: OrderedDict[object, asyncio.Future[None]] = OrderedDict()

    @asynccontextmanager
    async def place(self, tab: str) -> AsyncIterator[None]:
        """Wait for the model. Raises BusyError where many wait, Replaced when a newer one comes."""
        if self.is_served:
            await self._wait(tab or object())
        self.is_served = True
        try:
            yield
        finally:
            self._next()

    async def _wait(self, key: object) -> None:
        older = self.waiting.pop(key, None)
        if older is not None and not older.done():
            older.set_exception(Replaced("a newer request of this tab came", "wait for its answer"))
        if len(self.waiting) >= MAX_WAITING:
            raise BusyError("too many requests wait for the model", "try again in a moment")
        mine = self.waiting[key] = asyncio.get_running_loop().create_future()
        try:
            await mine
        except asyncio.CancelledError:  # the browser went away
            if self.waiting.get(key) is mine:
                del self.waiting[key]
            elif mine.done() and not mine.cancelled() and mine.exception() is None:
                self._next()
            raise

    def _next(self) -> None:
        """Let the next one in line have the model."""
        while self.waiting:
            _, first = self.waiting.popitem(last=False)
            if not first.done():
                first.set_result(None)
                return
        self.is_served = False


def build(desk: Desk, hosts: set[str] | None, key: str = "") -> Starlette:
    """Return the application. `hosts` are what Host and Origin may name, None for any.

    With a key, the whole page lies under it: who does not know it finds nothing.
    """
    line = Line()

    async def answered(request: Request, work: Work) -> Response:
        async with line.place(request.headers.get("x-tab", "")[:64]):
            return JSONResponse(await run_in_threadpool(work))

    async def about(_: Request) -> Response:
        return JSONResponse(await run_in_threadpool(desk.about))

    async def picture(request: Request) -> Response:
        content = await body(request, MAX_UPLOAD)
        fit = request.query_params.get("fit", "centre")
        return await answered(request, lambda: desk.picture(content, fit))

    async def example(request: Request) -> Response:
        index = request.path_params["index"] % 10**9
        return await answered(request, lambda: desk.example(index))

    def posted(kind: type[A], work: Callable[[A], Answer]) -> Callable[[Request], Any]:
        async def endpoint(request: Request) -> Response:
            if not request.headers.get("content-type", "").startswith("application/json"):
                raise InputError("the request is not JSON", "send application/json")
            asked = read(kind, await body(request, MAX_ASKED))
            return await answered(request, lambda: work(asked))

        return endpoint

    routes = [
        *(Route(f"/{name}", _static(*file), methods=["GET"]) for name, file in FILES.items()),
        Route("/about", about, methods=["GET"]),
        Route("/example/{index:int}", example, methods=["GET"]),
        Route("/picture", picture, methods=["POST"]),
        Route("/edit", posted(AskedEdit, desk.edit), methods=["POST"]),
        Route("/harm", posted(AskedHarm, desk.harmed), methods=["POST"]),
        Route("/samples", posted(AskedSamples, desk.samples), methods=["POST"]),
        Route("/morph", posted(AskedMorph, desk.morph), methods=["POST"]),
    ]
    return Starlette(
        routes=[Mount(f"/{key}", routes=list(routes))] if key else routes,
        middleware=[Middleware(Guard, hosts=hosts)],
        exception_handlers={UserError: _user_error, HTTPException: _http_error},
    )


class Guard:
    """Sends away what comes from other sites, and puts HEADERS on every answer."""

    def __init__(self, app: ASGIApp, hosts: set[str] | None) -> None:
        self.app = app
        self.hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request = Request(scope)

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                names = [(k.lower().encode(), v.encode()) for k, v in HEADERS.items()]
                message["headers"] = [*message["headers"], *names]
            await send(message)

        refused = self.refusal(request)
        app = self.app if refused is None else _error(refused, 403)
        await app(scope, receive, with_headers)

    def refusal(self, request: Request) -> UserError | None:
        """Return why a request is refused, if it is."""
        host = request.headers.get("host", "")
        if self.hosts is not None and host not in self.hosts:
            return UserError(f"no host {host!r} here", "use the address that the command printed")
        origin = request.headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host:
            return UserError("the request comes from another site", "use the page itself")
        return None


async def body(request: Request, most: int) -> bytes:
    """Return what a request carries. Raises InputError for more bytes than `most`."""
    content = bytearray()
    try:
        async for chunk in request.stream():
            content += chunk
            if len(content) > most:
                raise InputError("the file is too large", f"give at most {most >> 20} MB")
    except ClientDisconnect:
        raise InputError("the upload was cut off", "try again") from None
    return bytes(content)


def read(kind: type[A], content: bytes) -> A:
    """Return a request of this kind. Raises InputError for one that is none."""
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "the request"
        raise InputError(f"{where}: {first['msg']}", "load the page again") from None


def _static(name: str, kind: str) -> Callable[[Request], Any]:
    async def endpoint(_: Request) -> Response:
        return Response((STATIC / name).read_bytes(), media_type=kind)

    return endpoint


def _error(error: UserError, status: int) -> JSONResponse:
    return JSONResponse({"what": error.what, "hint": error.hint}, status)


async def _user_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, UserError)
    return _error(error, STATUS.get(type(error), 400))


async def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = {404: "there is nothing of this name", 405: "not by this method"}
    shown = UserError(what.get(error.status_code, error.detail), "load the page again")
    return _error(shown, error.status_code)


def listening(host: str, port: int) -> socket.socket:
    """Return a socket that listens. Raises UserError where the port is taken."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        what = f"port {port}: {(error.strerror or str(error)).lower()}"
        raise UserError(what, "add --port 0 for a free one") from None
    listener.listen(128)
    return listener


def serve(app: ASGIApp, listener: socket.socket) -> None:
    """Answer until a signal ends it."""
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, lifespan="off", ws="none",
        server_header=False, timeout_keep_alive=5, timeout_graceful_shutdown=5,
        h11_max_incomplete_event_size=64 << 10,
    )  # fmt: skip
    uvicorn.Server(config).run(sockets=[listener])
