"""A user's images, in batches: their classes, explanations and masks.

An unreadable file is reported in one line and skipped.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from flows.cli import terminal
from medfocus.datasets.listing import SUFFIXES, is_image
from medfocus.datasets.records import Record, chunks
from medfocus.images import decode, stack
from medfocus.images.contact_sheet import montage
from medfocus.images.errors import ImageError
from medfocus.images.geometry import BLACK, Frame
from medfocus.images.png import encode_png

if TYPE_CHECKING:
    from medfocus.masks.segmenter import Segmenter
    from medfocus.masks.store import MaskStore
    from medfocus.serving.predictor import Prediction, Predictor

_BATCH = 16  # images in memory at once
PREDICTIONS, EXPLANATIONS, MASKS = "predictions.csv", "explanations.csv", "masks.csv"


@dataclass(frozen=True)
class UserImage:
    """A user's decoded image."""

    path: Path  # of the file; a frame or a slice adds # and its name
    sha256: str  # as in a record
    pixels: np.ndarray  # (H, W, 3) uint8 RGB


@dataclass
class Images:
    """A user's files and folders; unreadable files are reported and counted."""

    paths: Sequence[Path]
    work: str  # a word for the work, for the progress bar
    failed: int = 0

    def batches(self) -> Iterator[list[UserImage]]:
        """Yield the readable images in batches, with a progress bar."""
        below = (file for path in self.paths for file in _files(path))
        images = list(dict.fromkeys(image for file in below for image in _images_in(file)))
        for path in self.paths:
            if path.is_dir() and not any(True for _ in _files(path)):
                known = ", ".join(suffix[1:] for suffix in SUFFIXES)
                fault = f"contains no image ({known})"
                self._report(ImageError(str(path), "no image in the file", fault, "Give another folder."))
        with terminal.bar(len(images), self.work) as bar:
            for chunk in chunks(images, _BATCH):
                if batch := [image for path in chunk if (image := self._read(path)) is not None]:
                    yield batch
                bar.update(len(chunk))

    def _read(self, path: Path) -> UserImage | None:
        try:
            return UserImage(path, *decode.read_named(path))
        except ImageError as error:
            self._report(error)
        except OSError as error:
            fault = f"cannot be read ({error.strerror})"
            fix = "Correct the path, or copy the file again."
            self._report(ImageError(str(path), "cannot be read", fault, fix))
        return None

    def _report(self, error: ImageError) -> None:
        self.failed += 1
        terminal.tell(str(error))


class OutputFolder:
    """The folder for a command's table and images; files of earlier commands are not overwritten."""

    def __init__(self, folder: Path, table: str, *, force: bool) -> None:
        """Create the folder. Raises FileExistsError if it has the table already and ``force`` is False."""
        self.table = folder / table
        if self.table.exists() and not force:
            raise FileExistsError(f"{self.table} already exists. Give another --out, or --force.")
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._written, self._force = folder, set[str](), force
        self._columns: list[str] = []
        self.rows = 0  # written

    def image(self, source: Path, kind: str, pixels: np.ndarray) -> str:
        """Save a PNG named after a user's file, with a number if the name is taken; return its name."""
        stem, number = f"{stack.flat(source.name)}_{kind}", 1
        while self._is_taken(name := f"{stem}{'' if number == 1 else f'_{number}'}.png"):
            number += 1
        self._written.add(name)
        (self._folder / name).write_bytes(encode_png(pixels))
        return name

    def _is_taken(self, name: str) -> bool:
        return name in self._written or (not self._force and (self._folder / name).exists())

    def row(self, row: Mapping[str, object]) -> None:
        """Add a line to the table and write it to disk."""
        self._columns = self._columns or list(row)
        with self.table.open("a" if self.rows else "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self._columns, lineterminator="\n")
            if not self.rows:
                writer.writeheader()
            writer.writerow(row)
        self.rows += 1


def predict(predictor: Predictor, images: Images, out: OutputFolder) -> None:
    """Write each image's class, probabilities, set of classes, mask facts and overlay."""
    from medfocus.focus.modes import focus

    no_set = predictor.calibration.no_set
    if no_set:
        terminal.tell(no_set)
    for image, prediction in _predictions(predictor, images):
        overlay = focus(image.pixels, prediction.mask, "overlay", feather=0.0)
        out.row(
            {
                "file": str(image.path),
                "label": prediction.label,
                **{f"probability_{c}": f"{p:.6f}" for c, p in prediction.probabilities.items()},
                **({"no_set": no_set} if no_set else {"set": "; ".join(prediction.set)}),
                "mask_status": prediction.mask_status,
                "mask_score": f"{prediction.mask_score:.6f}",
                "mask_coverage": f"{prediction.mask.mean():.6f}",
                "overlay": out.image(image.path, "overlay", overlay),
            }
        )


def _predictions(predictor: Predictor, images: Images) -> Iterator[tuple[UserImage, Prediction]]:
    for batch in images.batches():
        predictions = predictor.predict_decoded([image.pixels for image in batch])
        yield from zip(batch, predictions, strict=True)


def explain(predictor: Predictor, images: Images, out: OutputFolder) -> None:
    """Write a sheet and the attribution's share inside the mask for each image.

    The sheet shows the image with its mask, CLIP's view, and the attribution.
    """
    for image, prediction in _predictions(predictor, images):
        sheet, way, inside = _explanation(predictor, image, prediction)
        out.row(
            {
                "file": str(image.path),
                "label": prediction.label,
                "probability": f"{prediction.probabilities[prediction.label]:.6f}",
                "way": way,
                "inside_mask": inside,
                "mask_coverage": f"{prediction.mask.mean():.6f}",
                "sheet": out.image(image.path, "why", sheet),
            }
        )


def _explanation(
    predictor: Predictor, image: UserImage, prediction: Prediction
) -> tuple[np.ndarray, str, str]:
    """Return the sheet, the attribution's method, and its share inside the mask ("" if unknown)."""
    from medfocus.explain.explain import explain_one, share_in_mask
    from medfocus.focus.modes import focus
    from medfocus.focus.view import visible
    from medfocus.reports.figures import attribution_overlay

    view = predictor.view(image.pixels, prediction.mask)  # (S, S, C)
    heat, way = explain_one(predictor.method, view, predictor.classes.index(prediction.label))
    inside = share_in_mask(heat, prediction.mask, predictor.focus, predictor.frame)
    overlay = focus(image.pixels, prediction.mask, "overlay", feather=0.0)
    seen = visible(view)
    tiles = [Frame(len(view), padding=BLACK).image(overlay), seen, attribution_overlay(seen, heat)]
    return (
        montage(tiles, 3, ["mask", "CLIP's view", f"why {prediction.label}"]),
        way,
        "" if inside is None else f"{inside:.6f}",
    )


def masks(
    segmenter: Segmenter, store: MaskStore, images: Images, out: OutputFolder, *, batch_size: int
) -> None:
    """Write each image's mask, overlay, status, score and coverage.

    ``store`` caches the masks, so a study of the same images finds them.
    """
    from medfocus.focus.modes import focus
    from medfocus.masks.store import cache_masks

    for batch in images.batches():
        records = [_record(image) for image in batch]
        paths = [image.path for image in batch]
        cache_masks(zip(records, paths, strict=True), segmenter, store, batch_size=batch_size)
        for image, record in zip(batch, records, strict=True):
            mask = store.get(record.sha256, segmenter.key)
            assert mask is not None
            overlay = focus(image.pixels, mask.region, "overlay", feather=0.0)
            out.row(
                {
                    "file": str(image.path),
                    "status": mask.status,
                    "score": f"{mask.score:.6f}",
                    "coverage": f"{mask.coverage:.6f}",
                    "mask": out.image(image.path, "mask", mask.region),
                    "overlay": out.image(image.path, "overlay", overlay),
                }
            )


def _files(path: Path) -> Iterator[Path]:
    """Yield a file itself, or the images in and below a folder, without hidden files."""
    if not path.is_dir():
        yield path
        return
    for file in sorted(path.rglob("*")):
        hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
        if not hidden and is_image(file):
            yield file


def _images_in(file: Path) -> list[Path]:
    """Return the frames or slices of a file, or the file itself; an unreadable file is reported later."""
    try:
        return decode.frames_of(file)
    except (ImageError, OSError):
        return [file]


def _record(image: UserImage) -> Record:
    height, width = image.pixels.shape[:2]
    return Record(str(image.path), image.sha256, width, height, "RGB", label="", split="", patient="")
