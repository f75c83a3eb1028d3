"""The web server of the page."""

from __future__ import annotations

import asyncio
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

from medfocus.app.clicks import NoRegionError, Point, followed
from medfocus.app.desk import Desk
from medfocus.app.guard import Access, Guard, Refused
from medfocus.app.reading import Opened, Reader, Reading
from medfocus.app.uploads import Upload, UploadLimits, body, uploads
from medfocus.app.worker import Busy, Worker
from medfocus.images.decode import MOST_BYTES
from medfocus.images.errors import ImageError, TooLargeError
from medfocus.images.png import data_url
from medfocus.learning.calibration import Calibration
from medfocus.storage.redaction import kind_and_place

NOTICE = "For research; not for clinical use."
MOST_POINTS = 64
_MOST_JSON = 64_000  # bytes
_STATIC = {"page.css": "text/css", "page.js": "text/javascript", "icon.svg": "image/svg+xml"}
_PAGE = Path(__file__).parent / "page"

Result = TypeVar("Result")
Version = Literal["first", "edited"]


@dataclass(frozen=True)
class About:
    """The description of the model on the page."""

    model: str
    version: str  # "" for a folder
    dataset: str  # "" if unknown
    method: str
    segmenter: str
    measured: Mapping[str, float] = field(default_factory=dict)  # on test images: accuracy, ece, coverage


@dataclass(frozen=True)
class ServerLimits:
    """The limits of a server."""

    upload: UploadLimits = field(default_factory=UploadLimits)
    uploads: int = 2  # uploads in memory at once
    jobs: int = 32  # running or waiting
    images: int = 32  # in memory
    bytes: int = 2_000_000_000  # total size of these images
    seconds: float = 1800  # how long an image stays after its last use


class PagePoint(BaseModel):
    """A point that the page sends."""

    model_config = ConfigDict(extra="forbid")

    x: Annotated[float, Field(ge=0, le=1)]
    y: Annotated[float, Field(ge=0, le=1)]
    inside: bool


class PagePoints(BaseModel):
    """All points of an image; an empty list undoes the edit."""

    model_config = ConfigDict(extra="forbid")

    points: Annotated[list[PagePoint], Field(max_length=MOST_POINTS)]


def build(desk: Workplace, about: About, access: Access) -> Guard:
    """Build the ASGI application. It keeps uploads in memory and writes no file."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        tidying = asyncio.create_task(desk.keep_tidy())
        yield
        tidying.cancel()
        desk.close()

    # FastAPI's documentation pages would load scripts from other sites.
    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_exception_handler(Refused, _refused)
    app.add_exception_handler(RequestValidationError, _not_found)
    app.add_exception_handler(Exception, _failed)
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

    @app.get("/images/{name}/{version}/attribution")
    async def attribution(name: str, version: Version) -> Response:
        return await desk.attribute(name, version)

    return Guard(app, access)


class Workplace:
    """The images in memory and the one thread that reads them."""

    def __init__(self, reader: Reader, limits: ServerLimits | None = None) -> None:
        self.reader = reader
        self.limits = limits = limits or ServerLimits()
        self.desk: Desk[Opened] = Desk(most=limits.images, most_bytes=limits.bytes, seconds=limits.seconds)
        self.worker = Worker(limits.jobs)
        self._uploading = 0

    async def keep_tidy(self) -> None:
        """Remove expired images, even without requests."""
        while True:
            await asyncio.sleep(min(30.0, self.limits.seconds))
            self.desk.tidy()

    def close(self) -> None:
        """Stop the thread and remove all images."""
        self.worker.stop()
        self.desk.clear()

    def opened(self, name: str) -> Opened:
        """Return an image in memory. Raises Refused if it expired."""
        opened = self.desk.get(name)
        if opened is None:
            limits = f"the server keeps {self.desk.most} images, each for {self.desk.seconds / 60:g} minutes"
            raise Refused(404, "this image", f"is no longer in memory ({limits})", "Upload it again.")
        return opened

    async def take(self, request: Request) -> Response:
        """Read the images of a request; each gets its own answer or error."""
        if self._uploading >= self.limits.uploads:
            raise _busy()
        self._uploading += 1
        try:
            files = await uploads(request, self.limits.upload)
            answers = [await self._take_one(upload) for upload in files]
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
            "shown": {"size": opened.shown_size, "image": data_url(opened.shown)},
            "first": _content(opened.first),
        }

    def _open(self, upload: Upload) -> Opened:
        try:
            return self.reader.open(upload.data, upload.name)
        except ImageError as error:
            status = 413 if isinstance(error, TooLargeError) else 422
            raise Refused(status, error.name, error.fault, error.fix) from error

    async def edit(self, name: str, request: Request) -> Response:
        """Read an image with the mask for all its points."""
        if not self.reader.takes_points:
            fault = "cannot be edited: this model's masks are not SAM2's"
            raise Refused(409, "the mask", fault, "Use a model with masks from SAM2.")
        opened = self.opened(name)
        content = b"".join([piece async for piece in body(request, _MOST_JSON)])
        try:
            page_points = PagePoints.model_validate_json(content)
        except ValidationError as error:
            fix = f"Send at most {MOST_POINTS}, each with x and y in [0, 1] and inside."
            raise Refused(422, "the points", f"are invalid ({error.error_count()} errors)", fix) from error
        points = [Point(each.x, each.y, each.inside) for each in page_points.points]
        edited = await self._do(partial(self._edit, opened, points))
        if edited is None:
            return JSONResponse({"edited": None, "followed": 0})
        return JSONResponse({"edited": _content(edited), "followed": followed(edited.shown_region, points)})

    def _edit(self, opened: Opened, points: Sequence[Point]) -> Reading | None:
        try:
            return self.reader.edit(opened, points)
        except NoRegionError as error:
            fix = "Take the last point back, or set another."
            raise Refused(422, "the points", "give no region", fix) from error

    async def attribute(self, name: str, version: Version) -> Response:
        """Return the attribution of a reading."""
        opened = self.opened(name)
        reading = opened.first if version == "first" else opened.edited
        if reading is None:
            raise Refused(404, "this image", "has no edited mask", "Set a point first.")
        attribution = await self._do(partial(self.reader.attribute, reading))
        return JSONResponse(
            {"way": attribution.way, "inside": attribution.inside, "layer": data_url(attribution.layer)}
        )

    async def _do(self, work: Callable[[], Result]) -> Result:
        """Run work in the one thread. Raises Refused if the queue is full or the work fails."""
        try:
            return await self.worker.do(work)
        except Busy as error:
            raise _busy() from error
        except Refused:
            raise
        except Exception as error:  # its text may name a file
            fault = f"cannot be read ({kind_and_place(error)})"
            fix = "Try another image. If it fails too, restart the server."
            raise Refused(500, "this image", fault, fix) from None


def _content(reading: Reading) -> dict[str, Any]:
    mask = reading.mask
    return {
        "label": reading.label,
        "probabilities": reading.probabilities,
        "set": reading.set,
        "mask": {"status": mask.status, "score": mask.score, "coverage": mask.coverage},
        "layers": {name: data_url(png) for name, png in reading.layers.items()},
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
        promise=promise_note(predictor.calibration, about.measured),
        takes_points=desk.reader.takes_points,
        limits=desk.limits,
        most_bytes=MOST_BYTES,
        minutes=f"{desk.limits.seconds / 60:g}",
        notice=NOTICE,
    )


def calibration_note(measured: Mapping[str, float]) -> str:
    """Describe the calibration of a model's probabilities on its test images."""
    if "ece" not in measured:
        return "The calibration of this model's probabilities is unknown."
    accuracy = f" Accuracy: {100 * measured['accuracy']:.1f}\u00a0%." if "accuracy" in measured else ""
    return (
        "On the test images, the probability of the predicted class and the accuracy differed by "
        f"{100 * measured['ece']:.1f} percentage points on average (expected calibration error).{accuracy}"
    )


def calibration_short(measured: Mapping[str, float]) -> str:
    """Return the short form of ``calibration_note`` for each image."""
    if "ece" not in measured:
        return "Calibration error of this model: unknown."
    return f"Calibration error of this model: {100 * measured['ece']:.1f} percentage points."


def promise_note(calibration: Calibration, measured: Mapping[str, float]) -> str:
    """Describe the promise of a model's sets and their coverage on its test images."""
    if calibration.no_set:
        return f"{calibration.no_set[0].upper()}{calibration.no_set[1:]}."
    note = (
        f"The set of an image contains the true class in {100 * calibration.confidence:g}\u00a0% of cases, "
        "for images like those that the model has learned from."
    )
    if "coverage" not in measured:
        return note
    return (
        f"{note} On the test images: {100 * measured['coverage']:.1f}\u00a0%, "
        f"{measured['mean_set_size']:.2f} classes on average."
    )


def _busy() -> Refused:
    return Refused(503, "the server", "is busy", "Try again in a moment.")


def _missing() -> Refused:
    return Refused(404, "this address", "does not exist", "Open the page at /.")


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return error.response()


async def _failed(request: Request, error: Exception) -> Response:
    fault = f"failed ({kind_and_place(error)})"
    return Refused(500, "the request", fault, "Try again, or restart the server.").response()


async def _not_found(request: Request, error: Exception) -> Response:
    return _missing().response()
