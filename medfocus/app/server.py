"""The page's server: a few paths, each a step of the reader's work."""

from __future__ import annotations

import asyncio
import base64
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import jinja2
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response

from medfocus.app.clicks import NothingThereError, Point, agreeing
from medfocus.app.desk import Desk
from medfocus.app.guard import Door, Guard, Refused
from medfocus.app.reading import Opened, Reader, Reading
from medfocus.app.uploads import Limits, Upload, body, uploads
from medfocus.app.worker import Busy, Worker
from medfocus.images.decode import MOST_BYTES
from medfocus.images.errors import ImageError, TooLargeError
from medfocus.storage.redaction import kind_and_place

NOTICE = "For research; not for clinical use."
MOST_POINTS = 64
_MOST_JSON = 64_000  # bytes
_STATIC = {"page.css": "text/css", "page.js": "text/javascript", "icon.svg": "image/svg+xml"}
_PAGE = Path(__file__).parent / "page"

Made = TypeVar("Made")
Which = Literal["first", "edited"]


@dataclass(frozen=True)
class About:
    """The model, as the page names it."""

    model: str
    version: str  # "" of a folder
    dataset: str  # "" where that is not known
    method: str
    segmenter: str
    measured: Mapping[str, float] = field(default_factory=dict)  # on test images: accuracy, ece


@dataclass(frozen=True)
class Bounds:
    """How much is taken and kept."""

    upload: Limits = field(default_factory=Limits)
    uploads: int = 2  # requests whose bodies are in memory at once
    jobs: int = 32  # that run or wait
    images: int = 32
    bytes: int = 2_000_000_000  # of the kept images together
    seconds: float = 1800  # after the last use


class _Given(BaseModel):
    model_config = ConfigDict(extra="forbid")


class GivenPoint(_Given):
    """A point as a page sends it."""

    x: Annotated[float, Field(ge=0, le=1)]
    y: Annotated[float, Field(ge=0, le=1)]
    inside: bool


class GivenPoints(_Given):
    """All points of an image; none takes the edit back."""

    points: Annotated[list[GivenPoint], Field(max_length=MOST_POINTS)]


def build(desk: Workplace, about: About, door: Door) -> Guard:
    """The ASGI application. What it is given it keeps in memory, and writes nowhere."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        tidying = asyncio.create_task(desk.keep_tidy())
        yield
        tidying.cancel()
        desk.close()

    # The documents that FastAPI makes would load their scripts from elsewhere.
    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_exception_handler(Refused, _refused)
    app.add_exception_handler(RequestValidationError, _not_found)
    app.add_exception_handler(Exception, _went_wrong)
    app.add_exception_handler(404, _not_found)
    app.add_exception_handler(405, _not_found)
    page = _page(desk, about)

    @app.get("/")
    async def index() -> Response:
        return HTMLResponse(page)

    @app.get("/{name}")
    async def static(name: str) -> Response:
        if name not in _STATIC:
            raise _missing()
        return Response((_PAGE / name).read_bytes(), media_type=_STATIC[name])

    @app.post("/images")
    async def post(request: Request) -> Response:
        return await desk.take(request)

    @app.delete("/images/{name}")
    async def delete(name: str) -> Response:
        desk.desk.remove(name)
        return Response(status_code=204)

    @app.post("/images/{name}/points")
    async def points(name: str, request: Request) -> Response:
        return await desk.edit(name, request)

    @app.get("/images/{name}/{which}/attribution")
    async def attribution(name: str, which: Which) -> Response:
        return await desk.attribute(name, which)

    return Guard(app, door)


class Workplace:
    """The images at hand and the one thread that reads them."""

    def __init__(self, reader: Reader, bounds: Bounds | None = None) -> None:
        self.reader = reader
        self.bounds = bounds = bounds or Bounds()
        self.desk: Desk[Opened] = Desk(most=bounds.images, most_bytes=bounds.bytes, seconds=bounds.seconds)
        self.worker = Worker(bounds.jobs)
        self._uploading = 0

    async def keep_tidy(self) -> None:
        """Forget what is over time, also where nobody asks any more."""
        while True:
            await asyncio.sleep(min(30.0, self.bounds.seconds))
            self.desk.tidy()

    def close(self) -> None:
        """Forget everything."""
        self.worker.stop()
        self.desk.clear()

    def opened(self, name: str) -> Opened:
        """A kept image. Raises Refused where it is not there."""
        opened = self.desk.get(name)
        if opened is None:
            kept = f"{self.desk.most} images are kept, each {self.desk.seconds / 60:g} minutes"
            raise Refused(404, "this image", f"is no longer kept ({kept})", "Give it once more.")
        return opened

    async def take(self, request: Request) -> Response:
        """Read the images of a request; each has an answer or an error of its own."""
        if self._uploading >= self.bounds.uploads:
            raise _busy()
        self._uploading += 1
        try:
            given = await uploads(request, self.bounds.upload)
            answers = [await self._take_one(upload) for upload in given]
        finally:
            self._uploading -= 1
        errors = [answer["error"]["status"] for answer in answers if "error" in answer]
        status = errors[0] if len(errors) == len(answers) else 200
        return JSONResponse({"images": answers}, status)

    async def _take_one(self, upload: Upload) -> dict[str, Any]:
        try:
            opened = await self._do(partial(self._open, upload))
        except Refused as refused:
            return {"name": upload.name, "error": refused.content()}
        height, width = opened.pixels.shape[:2]
        return {
            "name": upload.name,
            "id": self.desk.put(opened),
            "width": width,
            "height": height,
            "shown": {"size": opened.shown_size, "image": _inline(opened.shown)},
            "first": _told(opened.first),
        }

    def _open(self, upload: Upload) -> Opened:
        try:
            return self.reader.open(upload.data, upload.name)
        except ImageError as error:
            status = 413 if isinstance(error, TooLargeError) else 422
            raise Refused(status, error.name, error.fault, error.fix) from error

    async def edit(self, name: str, request: Request) -> Response:
        """Answer all points of an image anew."""
        if not self.reader.is_pointed:
            fault = "cannot be edited: this model's masks are not SAM2's"
            raise Refused(409, "the mask", fault, "Take a model whose masks SAM2 makes.")
        opened = self.opened(name)
        sent = b"".join([piece async for piece in body(request, _MOST_JSON)])
        try:
            given = GivenPoints.model_validate_json(sent)
        except ValidationError as error:
            fix = f"Send {MOST_POINTS} at most, each with x and y in [0, 1] and inside."
            raise Refused(422, "the points", f"have {error.error_count()} fault(s)", fix) from error
        points = [Point(each.x, each.y, each.inside) for each in given.points]
        edited = await self._do(partial(self._edit, opened, points))
        if edited is None:
            return JSONResponse({"edited": None, "followed": 0})
        return JSONResponse({"edited": _told(edited), "followed": agreeing(edited.shown_region, points)})

    def _edit(self, opened: Opened, points: Sequence[Point]) -> Reading | None:
        try:
            return self.reader.edit(opened, points)
        except NothingThereError as error:
            fix = "Take back the last one, or set another."
            raise Refused(422, "the points", "have no region that SAM2 finds", fix) from error

    async def attribute(self, name: str, which: Which) -> Response:
        """Where the answer of a reading came from."""
        opened = self.opened(name)
        reading = opened.first if which == "first" else opened.edited
        if reading is None:
            raise Refused(404, "this image", "has no edited mask", "Set a point first.")
        made = await self._do(partial(self.reader.attribute, reading))
        return JSONResponse({"way": made.way, "inside": made.inside, "layer": _inline(made.layer)})

    async def _do(self, work: Callable[[], Made]) -> Made:
        """Work in the one thread. Raises Refused where there is no room, or what went wrong is no fault."""
        try:
            return await self.worker.do(work)
        except Busy as error:
            raise _busy() from error
        except Refused:
            raise
        except Exception as error:  # its text may name a file
            fault = f"cannot be read here ({kind_and_place(error)})"
            raise Refused(500, "this image", fault, "Try another one; if it fails too, start anew.") from None


def _told(reading: Reading) -> dict[str, Any]:
    mask = reading.mask
    return {
        "label": reading.label,
        "probabilities": reading.probabilities,
        "mask": {"status": mask.status, "score": mask.score, "coverage": mask.coverage},
        "layers": {name: _inline(png) for name, png in reading.layers.items()},
    }


def _page(desk: Workplace, about: About) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_PAGE), autoescape=True, undefined=jinja2.StrictUndefined
    )
    predictor = desk.reader.predictor
    return environment.get_template("index.html").render(
        about=about,
        classes=predictor.classes,
        focus=predictor.focus,
        calibration=calibration_note(about.measured),
        calibration_short=calibration_short(about.measured),
        is_pointed=desk.reader.is_pointed,
        bounds=desk.bounds,
        most_bytes=MOST_BYTES,
        minutes=f"{desk.bounds.seconds / 60:g}",
        notice=NOTICE,
    )


def calibration_note(measured: Mapping[str, float]) -> str:
    """How far a model's probabilities can be believed, as far as its registration says."""
    if "ece" not in measured:
        return "How well calibrated these probabilities are is not known for this model."
    right = f" Accuracy there: {100 * measured['accuracy']:.1f}\u00a0%." if "accuracy" in measured else ""
    return (
        "On its test images the probability that the model stated for its answer and its accuracy differed "
        f"by {100 * measured['ece']:.1f} percentage points on average (expected calibration error).{right}"
    )


def calibration_short(measured: Mapping[str, float]) -> str:
    """The same beside each answer."""
    if "ece" not in measured:
        return "Calibration of this model: not known."
    return f"Calibration error of this model: {100 * measured['ece']:.1f} percentage points."


def _inline(png: bytes) -> str:
    """As an address of its own: what a card shows stays there when the server has forgotten the image."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _busy() -> Refused:
    return Refused(503, "the server", "has as much to do as it takes at once", "Try again in a moment.")


def _missing() -> Refused:
    return Refused(404, "this address", "is none of the page's", "Open the page at /.")


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return error.response()


async def _went_wrong(request: Request, error: Exception) -> Response:
    fault = f"went wrong here ({kind_and_place(error)})"
    return Refused(500, "the request", fault, "Try again, or start anew.").response()


async def _not_found(request: Request, error: Exception) -> Response:
    return _missing().response()
