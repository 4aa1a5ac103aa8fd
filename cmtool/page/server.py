"""HTTP around a desk: a page, what it asks for, and nothing else of this machine.

No file can be asked for by its path. Other sites can neither read answers nor have work done: the
Host and Origin of a request must be this server's. One request at a time uses the model.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from threading import Event
from types import FrameType
from typing import Any, TypeVar

import uvicorn
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cmtool.errors import BusyError, InputError, ResourceError, UserError
from cmtool.page.asked import Asked, AskedEdit, AskedHarm, AskedMorph, AskedSamples
from cmtool.page.desk import Answer, Desk, Interrupted
from cmtool.system.devices import is_out_of_memory

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
MAX_ASKED = 24 << 20
"""Bytes of any other request."""
UPLOADS, UPLOAD_SECONDS = 4, 60.0
"""Requests whose content is read at once, and how long each may take."""
MAX_WAITING = 16
"""Requests that wait for the model; more are sent away."""
A = TypeVar("A", bound=Asked)
Work = Callable[[], Answer]


class Replaced(UserError):
    """A newer request of the same tab came: nobody looks at the answer of this one."""


class Gone(UserError):
    """The browser went away."""


STATUS = {BusyError: 503, Replaced: 409, Interrupted: 409, Gone: 499}
"""HTTP's number for an error of the user; 400 for those not named here."""


class Line:
    """Requests in line for the model: one is served, few wait, and of each kind the newest."""

    def __init__(self, interrupt: Event) -> None:
        self.interrupt = interrupt
        self.served: object = None
        self.waiting: OrderedDict[object, asyncio.Future[None]] = OrderedDict()

    @asynccontextmanager
    async def place(self, key: object, gone: asyncio.Task[None]) -> AsyncIterator[None]:
        """Wait for the model, and have it; interrupt the work when `gone` is done.

        Raises BusyError where many wait, Replaced when a newer request of the key comes, Gone.
        """
        if self.served is not None:
            await self._wait(key, gone)
        self.served = key
        self.interrupt.clear()
        gone.add_done_callback(self._on_gone)
        try:
            yield
        finally:
            gone.remove_done_callback(self._on_gone)
            self._next()

    def _on_gone(self, _: asyncio.Task[None]) -> None:
        self.interrupt.set()

    async def _wait(self, key: object, gone: asyncio.Task[None]) -> None:
        if self.served == key:
            self.interrupt.set()  # nobody looks at that answer any more
        older = self.waiting.pop(key, None)
        if older is not None and not older.done():
            older.set_exception(Replaced("a newer request of this tab came", "wait for its answer"))
        if len(self.waiting) >= MAX_WAITING:
            raise BusyError("too many requests wait for the model", "try again in a moment")
        mine = self.waiting[key] = asyncio.get_running_loop().create_future()
        try:
            await asyncio.wait([mine, gone], return_when=asyncio.FIRST_COMPLETED)
        finally:
            if self.waiting.get(key) is mine:
                del self.waiting[key]
            elif gone.done() and mine.done() and mine.exception() is None:
                self._next()
        if gone.done():
            raise Gone("the browser went away", "load the page again")
        mine.result()

    def _next(self) -> None:
        """Let the next one in line have the model."""
        self.served = None
        while self.waiting:
            key, first = self.waiting.popitem(last=False)
            if not first.done():
                self.served = key  # it has it from now on
                first.set_result(None)
                return


async def until_gone(request: Request) -> None:
    """Return when the browser went away; what it sent must be read before."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


class Endpoints:
    """What the page may ask for, answered by a desk."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self.line = Line(desk.interrupt)
        self.uploads = asyncio.Semaphore(UPLOADS)
        self.pictures = asyncio.Semaphore(1)

    def routes(self) -> list[Route]:
        """Return them with the files of the page."""
        desk = self.desk
        return [
            *(Route(f"/{name}", _static(*file), methods=["GET"]) for name, file in FILES.items()),
            Route("/about", self.about, methods=["GET"]),
            Route("/example/{index}", self.example, methods=["GET"]),
            Route("/picture", self.picture, methods=["POST"]),
            Route("/edit", self.posted(AskedEdit, desk.edit), methods=["POST"]),
            Route("/harm", self.posted(AskedHarm, desk.harmed), methods=["POST"]),
            Route("/samples", self.posted(AskedSamples, desk.samples), methods=["POST"]),
            Route("/morph", self.posted(AskedMorph, desk.morph), methods=["POST"]),
        ]

    async def about(self, _: Request) -> Response:
        """Return what the page has to know at its start."""
        return JSONResponse(await run_in_threadpool(self.desk.about))

    async def example(self, request: Request) -> Response:
        """Return a bundled picture. Raises HTTPException for what is no number."""
        index = request.path_params["index"]
        if not (index.isascii() and index.isdigit() and len(index) < 10):
            raise HTTPException(404)
        return JSONResponse(await run_in_threadpool(lambda: self.desk.example(int(index))))

    async def picture(self, request: Request) -> Response:
        """Return the picture file that was sent at the model's size."""
        fit = request.query_params.get("fit", "centre")
        async with self.pictures:
            content = await self.content_of(request, MAX_UPLOAD)
            return JSONResponse(await run_in_threadpool(lambda: self.desk.picture(content, fit)))

    def posted(self, kind: type[A], work: Callable[[A], Answer]) -> Callable[[Request], Any]:
        """Return an endpoint that does this work for JSON of this kind, with the model."""

        async def endpoint(request: Request) -> Response:
            if request.headers.get("content-type", "").partition(";")[0] != "application/json":
                raise InputError("the request is not JSON", "load the page again")
            asked = read(kind, await self.content_of(request, MAX_ASKED))
            return await self.answered(request, lambda: work(asked))

        return endpoint

    async def answered(self, request: Request, work: Work) -> Response:
        """Return the answer of the model, when it is this request's turn."""
        gone = asyncio.create_task(until_gone(request))
        tab = request.headers["x-tab"][:64]
        try:
            async with self.line.place((tab, request.url.path), gone):
                return JSONResponse(await run_in_threadpool(work))
        finally:
            gone.cancel()

    async def content_of(self, request: Request, most: int) -> bytes:
        """Return what a request carries. Raises InputError for too much of it, or too slow."""
        try:
            async with self.uploads, asyncio.timeout(UPLOAD_SECONDS):
                return await body(request, most)
        except TimeoutError:
            raise InputError("the upload took too long", "try again") from None


def build(desk: Desk, hosts: set[str] | None, key: str = "") -> Guard:
    """Return the application. `hosts` are what Host and Origin may name, None for any.

    With a key, the whole page lies under it: who does not know it finds nothing.
    """
    routes = Endpoints(desk).routes()
    app = Starlette(
        routes=[Mount(f"/{key}", routes=list(routes))] if key else routes,
        exception_handlers={
            UserError: _user_error, HTTPException: _http_error, RuntimeError: _no_memory,
            Exception: _our_mistake,
        },
    )  # fmt: skip
    return Guard(app, desk, hosts)


class Guard:
    """Sends away what comes from other sites, and puts HEADERS on every answer."""

    def __init__(self, app: ASGIApp, desk: Desk, hosts: set[str] | None) -> None:
        self.app = app
        self.desk = desk
        self.hosts = hosts

    def close(self) -> None:
        """End the work, and send away what comes later."""
        self.desk.closing.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
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
        if self.desk.closing.is_set():
            return UserError("the page is closing", "start it again")
        if self.hosts is not None and host not in self.hosts:
            return UserError(f"no host {host!r} here", "use the address that the command printed")
        origin = request.headers.get("origin")
        if origin is not None and origin != f"http://{host}":
            return UserError("the request comes from another site", "use the page itself")
        is_page = request.url.path.rpartition("/")[2] in FILES
        if not is_page and "x-tab" not in request.headers:  # which no other site can send
            return UserError("the request does not come from the page", "use the page itself")
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


async def _no_memory(_: Request, error: Exception) -> Response:
    if not is_out_of_memory(error):
        raise error
    hint = "give a smaller picture, or ask for fewer variations"
    return _error(ResourceError("out of memory", hint), 503)


async def _our_mistake(_: Request, __: Exception) -> Response:
    what = "the server failed, by a mistake of its own"
    return _error(UserError(what, "look at the terminal where it runs"), 500)


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


class Server(uvicorn.Server):
    """A server that ends its work when a signal comes, before it waits for answers."""

    def __init__(self, config: uvicorn.Config, app: Guard) -> None:
        super().__init__(config)
        self.guard = app

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """End on a signal; what uvicorn says of requests that it cuts off is no news then."""
        self.guard.close()
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL + 1)
        super().handle_exit(sig, frame)


def serve(app: Guard, listener: socket.socket) -> None:
    """Answer until a signal ends it."""
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, lifespan="off", ws="none",
        server_header=False, timeout_keep_alive=5, timeout_graceful_shutdown=2,
        h11_max_incomplete_event_size=64 << 10,
    )  # fmt: skip
    Server(config, app).run(sockets=[listener])
