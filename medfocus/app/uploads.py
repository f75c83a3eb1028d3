"""A request's images, in memory alone and no more of them than there is room for."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from medfocus.app.guard import Refused
from medfocus.images import decode

FIELD = "images"


@dataclass(frozen=True)
class Limits:
    """Of one request."""

    files: int = 16
    bytes: int = decode.MOST_BYTES + 4_000_000  # of all files together, and what is between them


@dataclass(frozen=True)
class Upload:
    """An image's file as it came."""

    name: str
    data: bytes


async def uploads(request: Request, limits: Limits) -> list[Upload]:
    """The files of a multipart form. Raises Refused for another body, or one past a limit."""
    if not request.headers.get("content-type", "").casefold().startswith("multipart/form-data"):
        fix = f"Send multipart/form-data, with a file {FIELD!r} per image."
        raise Refused(415, "the request", "is no form with files", fix)
    parser = _InMemory(request.headers, body(request, limits.bytes), max_files=limits.files, max_fields=0)
    parser.spool_max_size = limits.bytes + 1
    try:
        form = await parser.parse()
    except MultiPartException as error:
        if "Too many files" in error.message:
            fault = f"has more than {limits.files} files"
            raise Refused(413, "the request", fault, "Send the others in another one.") from error
        fix = f"Send multipart/form-data, with a file {FIELD!r} per image."
        raise Refused(400, "the request", "is no form of files that can be read", fix) from error
    try:
        files = [given for _, given in form.multi_items() if isinstance(given, UploadFile)]
        if not files:
            raise Refused(400, "the request", "has no file", f"Send a file {FIELD!r} per image.")
        return [Upload(file.filename or "an image without a name", await file.read()) for file in files]
    finally:
        await form.close()


async def body(request: Request, most: int) -> AsyncGenerator[bytes, None]:
    """A request's body, piece by piece. Raises Refused before more than ``most`` bytes are held."""
    too_large = Refused(
        413, "the request", f"is larger than {_told(most)}, the most that is taken", "Send less at once."
    )
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > most:
        raise too_large
    count = 0
    async for piece in request.stream():
        count += len(piece)
        if count > most:
            raise too_large
        yield piece


class _InMemory(MultiPartParser):
    """Starlette's own, whose files stay in memory up to ``spool_max_size``: here that is the whole body."""


def _told(count: int) -> str:
    return f"{count // 1_000_000} MB" if count >= 1_000_000 else f"{count // 1000} kB"
