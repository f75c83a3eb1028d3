"""The files of an upload, read into bounded memory and never written to disk."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from medfocus.app.guard import Refused
from medfocus.images import decode

FIELD = "images"
_FIX = f"Send multipart/form-data with a file {FIELD!r} per image."


@dataclass(frozen=True)
class UploadLimits:
    """The limits of one request."""

    files: int = 16
    bytes: int = decode.MOST_BYTES + 4_000_000  # of all files together, with the form's own bytes


@dataclass(frozen=True)
class Upload:
    """The file of an image."""

    name: str
    data: bytes


async def uploads(request: Request, limits: UploadLimits) -> list[Upload]:
    """Read the files of a multipart form. Raises Refused for another body, or a form beyond a limit."""
    if not request.headers.get("content-type", "").casefold().startswith("multipart/form-data"):
        raise Refused(415, "the request", "is no form with files", _FIX)
    parser = _InMemory(request.headers, body(request, limits.bytes), max_files=limits.files, max_fields=0)
    parser.spool_max_size = limits.bytes + 1
    try:
        form = await parser.parse()
    except MultiPartException as error:
        if "Too many files" in error.message:
            fault = f"has more than {limits.files} files"
            raise Refused(413, "the request", fault, "Send the rest in another request.") from error
        raise Refused(400, "the request", "is no readable form of files", _FIX) from error
    try:
        files = [value for _, value in form.multi_items() if isinstance(value, UploadFile)]
        if not files:
            raise Refused(400, "the request", "has no file", _FIX)
        return [Upload(file.filename or "an image without a name", await file.read()) for file in files]
    finally:
        await form.close()


async def body(request: Request, most: int) -> AsyncGenerator[bytes, None]:
    """Yield a request's body in pieces. Raises Refused instead of yielding more than ``most`` bytes."""
    too_large = Refused(413, "the request", f"is larger than {_size(most)}, the limit", "Send less at once.")
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
    """Starlette's parser with a ``spool_max_size`` of its own, so that every file stays in memory."""


def _size(count: int) -> str:
    return f"{count // 1_000_000} MB" if count >= 1_000_000 else f"{count // 1000} kB"
