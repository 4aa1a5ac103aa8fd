"""Files of the network: whole or not at all, and gone on with where they were cut."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urljoin, urlsplit

from filelock import FileLock

from cmtool import __version__
from cmtool.errors import InputError, ResourceError, is_full
from cmtool.system.files import file_sha256, sync, write_json
from cmtool.system.records import Count, Facts, known_facts

if TYPE_CHECKING:
    from requests import Response

CHUNK = 1 << 18
TRIES = 6
"""How often a transfer is begun or gone on with, while next to nothing comes."""
TIMEOUT = (10.0, 60.0)
"""Seconds to wait for a connection, and for the next bytes."""
SLOWEST = 1024
"""Bytes a second below which a connection counts as cut."""
MAX_WAIT = 60.0
"""Seconds to wait at most where a server says when to come again."""
MAX_REDIRECTS = 5
AGAIN = (408, 425, 429, 500, 502, 503, 504)
"""What a server answers that is better asked again later."""


class Partial(Facts):
    """Of which file PATH.part is the beginning: its address, mark at the server, and length."""

    url: str
    tag: str
    length: Count


OnBytes = Callable[[str, float, int], None]
"""Called with a name, the bytes that are there, and of how many (0: not known)."""
OnNote = Callable[[str], None]
"""Called with a sentence about what happens."""


def download(
    url: str,
    path: Path,
    *,
    sha256: str | None = None,
    headers: Mapping[str, str] | None = None,
    progress: OnBytes = lambda *_: None,
    note: OnNote = lambda _: None,
) -> str:
    """Fetch a file to `path`, and return its sha256; the `sha256` wanted may be its beginning.

    `headers` are sent along, to the server of `url` only: they may hold a token.

    The bytes go into PATH.part, which a later call goes on with; PATH appears when it is whole and,
    with `sha256`, the file that was published. One process fetches, others wait for it. Raises
    InputError for what the server gives, and for a file that is another one; ResourceError where
    the disk is full or the connection stays away.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    with FileLock(path.with_name(f"{path.name}.lock")):
        here = file_sha256(path) if path.is_file() else None
        if here is not None and (sha256 is None or here.startswith(sha256)):
            return here
        try:
            _transfer(url, part, headers or {}, progress, note)
            sync(part)
        except OSError as error:
            if not is_full(error):
                raise
            raise _no_room(part, 0) from None
        found = _checked(part, url, sha256)
        part.replace(path)
        forget(part)
        sync(path.parent)
        return found


def _checked(part: Path, url: str, sha256: str | None) -> str:
    """Return a file's sha256. Raises InputError, and removes the file, if another is wanted."""
    found = file_sha256(part)
    if sha256 is None or found.startswith(sha256):
        return found
    forget(part)
    what = f"{url} gave another file: its sha256 is {found[:12]}..., not {sha256[:12]}..."
    raise InputError(what, "try again later, or fetch the file from another place")


def _no_room(part: Path, wanted: int) -> ResourceError:
    more = f": {wanted / 2**20:,.0f} MiB are missing" if wanted else ""
    return ResourceError(f"no room on the disk for {part}{more}", "free disk space, and try again")


def forget(part: Path) -> None:
    """Remove what is there of a file that was not fetched whole."""
    for file in (part, _facts(part)):
        file.unlink(missing_ok=True)


def _facts(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _transfer(
    url: str, part: Path, headers: Mapping[str, str], progress: OnBytes, note: OnNote
) -> None:
    """Bring `part` to its whole length, by as many requests as that takes."""
    from requests import RequestException

    left = TRIES
    while left:
        before, wait = _size(part), 1.0
        try:
            with _asked(url, part, headers) as answer:
                if answer.status_code not in AGAIN:
                    if _taken(answer, url, part, progress):
                        return
                    note(f"the connection to {urlsplit(url).netloc} was cut: going on")
                else:
                    wait = _wait_of(answer)
                    note(
                        f"{urlsplit(url).netloc} answers {answer.status_code}: waiting {wait:.0f} s"
                    )
        except RequestException as error:
            note(f"no answer from {urlsplit(url).netloc}: {type(error).__name__}")
        if _size(part) - before >= CHUNK:  # it goes on, however often it is cut
            left = TRIES
            continue
        left -= 1
        if left:
            time.sleep(wait)
    raise ResourceError(
        f"{url} could not be fetched",
        "run the same command again: the download continues where it stopped",
    )


def _asked(url: str, part: Path, more: Mapping[str, str]) -> Response:
    """Return the answer to a request for what is missing of a file.

    Raises InputError for an answer that is no file, and for a redirect to where nobody may be sent.
    """
    import requests

    known = known_facts(_facts(part), Partial)
    size = _size(part) if known is not None and known.url == url and known.tag else 0
    headers = {"User-Agent": f"cmtool/{__version__}", "Accept-Encoding": "identity"}
    if size:
        headers |= {"Range": f"bytes={size}-", "If-Range": known.tag if known else ""}
    at = url
    for _ in range(MAX_REDIRECTS):
        own = more if urlsplit(at)[:2] == urlsplit(url)[:2] else {}
        answer = requests.get(
            at, headers={**own, **headers}, stream=True, timeout=TIMEOUT, allow_redirects=False
        )
        if not answer.is_redirect:
            break
        answer.close()
        at = _allowed(urljoin(at, answer.headers["Location"]), at)
    else:
        raise InputError(f"{url} redirects without end", "fetch the file by other means")
    status = answer.status_code
    if status == 416 and size:  # there is no more than what is here, or the file is another one now
        answer.close()
        forget(part)
        return _asked(url, part, more)
    if status not in (200, 206, *AGAIN):
        answer.close()
        reason = {401: ": it wants a login", 403: ": it is not allowed", 404: ": it is not there"}
        what = f"{urlsplit(at).netloc} answers {status} for {url}{reason.get(status, '')}"
        raise InputError(what, "check the address, or fetch the file by other means")
    if answer.headers.get("Content-Type", "").startswith("text/html"):
        answer.close()
        raise InputError(f"{url} is a web page, not a file", "fetch the file by other means")
    return answer


def _allowed(target: str, source: str) -> str:
    """Return where a redirect leads. Raises InputError unless it is as safe as where it comes from.

    Over https anywhere; over http only on the very server that was asked over http.
    """
    new, old = urlsplit(target), urlsplit(source)
    if new.scheme == "https" or (new.scheme == "http" and new[:2] == old[:2]):
        return target
    what = f"{source} redirects to {target}, which is not safe"
    raise InputError(what, "fetch the file by other means")


def _taken(answer: Response, url: str, part: Path, progress: OnBytes) -> bool:
    """Write what an answer brings; return whether the file is whole."""
    start, total = _span(answer)
    if answer.status_code == 200 or start != _size(part):
        if answer.status_code == 206:  # not the part that was asked for
            forget(part)
            return False
        start = 0
    tag = answer.headers.get("ETag", "")
    strong = tag if tag.startswith('"') else answer.headers.get("Last-Modified", "")
    write_json(_facts(part), {"url": url, "tag": strong, "length": total})
    missing = total - start - shutil.disk_usage(part.parent).free
    if missing > 0:
        raise _no_room(part, missing)
    with part.open("ab" if start else "wb") as file:
        done, is_ended = start, False
        for block in _blocks(answer):
            file.write(block)
            done, is_ended = done + len(block), not block
            progress(f"fetching {part.name.removesuffix('.part')}", done, total)
    return done == total if total else is_ended


def _blocks(answer: Response) -> Iterator[bytes]:
    """Yield all bytes that an answer brings before it ends, is cut, or nearly stands still.

    The last block is empty if the answer ended, and only then.
    """
    from urllib3.exceptions import HTTPError

    start, came = time.monotonic(), 0
    try:
        while True:
            yield (block := answer.raw.read1(CHUNK) or b"")
            if not block:
                return
            came += len(block)
            if time.monotonic() - start > TIMEOUT[1]:
                if came < SLOWEST * TIMEOUT[1]:
                    return
                start, came = time.monotonic(), 0
    except (HTTPError, OSError):  # what came before is kept
        return


def _span(answer: Response) -> tuple[int, int]:
    """Return where the bytes of an answer begin, and the length of the whole file (0: unknown)."""
    length = answer.headers.get("Content-Length", "")
    if answer.status_code == 206:
        first, _, rest = answer.headers.get("Content-Range", "").partition("-")
        start, total = first.removeprefix("bytes ").strip(), rest.partition("/")[2]
        if start.isdigit() and total.isdigit():
            return int(start), int(total)
        return -1, 0
    return 0, int(length) if length.isdigit() else 0


def _size(part: Path) -> int:
    return part.stat().st_size if part.is_file() else 0


def _wait_of(answer: Response) -> float:
    """Return the seconds after which a server wants to be asked again."""
    said = answer.headers.get("Retry-After", "")
    return min(float(said), MAX_WAIT) if said.isdigit() else 2.0
