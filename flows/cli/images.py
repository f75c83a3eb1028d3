"""Images of a user's, one after the other: what a model says of them, why, and their masks.

A file that cannot be read is told in a line and left out; the others go on.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
from medfocus.images.geometry import letterbox, letterbox_mask
from medfocus.images.png import encode_png

if TYPE_CHECKING:
    from medfocus.masks.segmenter import Segmenter
    from medfocus.masks.store import MaskStore
    from medfocus.serving.predictor import Predictor

_BATCH = 16  # images in memory at once
PREDICTIONS, EXPLANATIONS, MASKS = "predictions.csv", "explanations.csv", "masks.csv"


@dataclass(frozen=True)
class Given:
    """A user's image, read."""

    path: Path  # of a frame or slice with its name behind a #
    sha256: str  # as a record has it
    pixels: np.ndarray  # (H, W, 3) uint8 RGB


@dataclass
class Images:
    """A user's files and folders; what of them cannot be read is told and counted."""

    given: Sequence[Path]
    doing: str
    failed: int = 0

    def batches(self) -> Iterator[list[Given]]:
        """What can be read, a few at a time, with a bar."""
        below = (file for path in self.given for file in _below(path))
        files = list(dict.fromkeys(one for file in below for one in _images_in(file)))
        for path in self.given:
            if path.is_dir() and not any(True for _ in _below(path)):
                known = ", ".join(suffix[1:] for suffix in SUFFIXES)
                self._tell(
                    ImageError(
                        str(path), "no image in the file", f"holds no image ({known})", "Give another folder."
                    )
                )
        with terminal.bar(len(files), self.doing) as bar:
            for some in chunks(files, _BATCH):
                if read := [one for path in some if (one := self._read(path)) is not None]:
                    yield read
                bar.update(len(some))

    def _read(self, path: Path) -> Given | None:
        try:
            return Given(path, *decode.read_named(path))
        except ImageError as error:
            self._tell(error)
        except OSError as error:
            fault = f"cannot be read ({error.strerror})"
            self._tell(
                ImageError(str(path), "cannot be read", fault, "Correct the path, or copy the file again.")
            )
        return None

    def _tell(self, error: ImageError) -> None:
        self.failed += 1
        terminal.tell(str(error))


class Folder:
    """Where a command puts its table and images; what stands there is not written over by chance."""

    def __init__(self, folder: Path, table: str, *, force: bool) -> None:
        """Make the folder. Raises FileExistsError where it has such a table already and no ``force``."""
        self.table = folder / table
        if self.table.exists() and not force:
            raise FileExistsError(f"{self.table} is there already. Give another --out, or --force.")
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._taken, self._force = folder, set[str](), force
        self._columns: list[str] | None = None

    def image(self, source: Path, kind: str, pixels: np.ndarray) -> str:
        """Save a PNG named after a user's file; its name. A further one of the same name gets a number."""
        stem, number = f"{stack.flat(source.name)}_{kind}", 1
        while self._is_taken(name := f"{stem}{'' if number == 1 else f'_{number}'}.png"):
            number += 1
        self._taken.add(name)
        (self._folder / name).write_bytes(encode_png(pixels))
        return name

    def _is_taken(self, name: str) -> bool:
        return name in self._taken or (not self._force and (self._folder / name).exists())

    def rows(self, rows: Iterable[Mapping[str, object]]) -> None:
        """Add lines to the table; they are on disk after each call."""
        for row in rows:
            first = self._columns is None
            self._columns = self._columns or list(row)
            with self.table.open("w" if first else "a", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, self._columns, lineterminator="\n")
                if first:
                    writer.writeheader()
                writer.writerow(row)


def predict(predictor: Predictor, images: Images, out: Folder) -> int:
    """A line per image with the class, every probability and the mask's fate, and its overlay; how many."""
    from medfocus.focus.modes import focus

    done = 0
    for batch in images.batches():
        predictions = predictor.predict_decoded([one.pixels for one in batch])
        for one, prediction in zip(batch, predictions, strict=True):
            overlay = focus(one.pixels, prediction.mask, "overlay", feather=0.0)
            out.rows(
                [
                    {
                        "file": str(one.path),
                        "label": prediction.label,
                        **{f"probability_{c}": f"{p:.6f}" for c, p in prediction.probabilities.items()},
                        "mask_status": prediction.mask_status,
                        "mask_score": f"{prediction.mask_score:.6f}",
                        "mask_coverage": f"{prediction.mask.mean():.6f}",
                        "overlay": out.image(one.path, "overlay", overlay),
                    }
                ]
            )
        done += len(batch)
    return done


def explain(predictor: Predictor, images: Images, out: Folder) -> int:
    """A line per image with the share of the attribution inside the mask, and a sheet to look at; how many.

    The sheet shows the image with its mask, what CLIP sees, and where the answer came from.
    """
    import torch

    from medfocus.explain.explain import explain as attribute
    from medfocus.explain.maps import inside_share
    from medfocus.focus.modes import focus
    from medfocus.reports.figures import attribution_overlay

    done = 0
    for batch in images.batches():
        for one, said in zip(batch, predictor.predict_decoded([g.pixels for g in batch]), strict=True):
            view = predictor.view(one.pixels, said.mask)  # (S, S, C)
            target = torch.tensor([predictor.classes.index(said.label)])
            encoder = predictor.method.encoder
            maps, way = attribute(predictor.method, encoder, torch.from_numpy(view)[None], target)
            heat = maps[0].numpy()
            inside = ""
            framed = letterbox_mask(said.mask, len(view)) > 0.5
            if predictor.focus != "crop" and framed.any():
                inside = f"{inside_share(heat, framed):.6f}"
            seen = view[..., -3:] if view.shape[2] == 6 else view[..., :3]
            overlay = focus(one.pixels, said.mask, "overlay", feather=0.0)
            tiles = [
                letterbox(overlay, len(view), (0, 0, 0)), seen, attribution_overlay(seen, heat)
            ]  # fmt: skip
            sheet = montage(tiles, 3, ["mask", "what CLIP sees", f"why {said.label}"])
            out.rows(
                [
                    {
                        "file": str(one.path),
                        "label": said.label,
                        "probability": f"{said.probabilities[said.label]:.6f}",
                        "way": way,
                        "inside_mask": inside,
                        "mask_coverage": f"{said.mask.mean():.6f}",
                        "sheet": out.image(one.path, "why", sheet),
                    }
                ]
            )
        done += len(batch)
    return done


def masks(segmenter: Segmenter, store: MaskStore, images: Images, out: Folder, *, batch_size: int) -> int:
    """A line per image with the mask's rung, score and coverage, its mask and its overlay; how many.

    Masks are kept in ``store`` and taken from it, so a study of the same images finds them.
    """
    from medfocus.focus.modes import focus
    from medfocus.masks.store import cache_masks

    done = 0
    for batch in images.batches():
        records = [_record(one) for one in batch]
        paths = [one.path for one in batch]
        cache_masks(zip(records, paths, strict=True), segmenter, store, batch_size=batch_size)
        for one, record in zip(batch, records, strict=True):
            mask = store.get(record.sha256, segmenter.key)
            assert mask is not None  # it was put there, or was there
            overlay = focus(one.pixels, mask.region, "overlay", feather=0.0)
            out.rows(
                [
                    {
                        "file": str(one.path),
                        "status": mask.status,
                        "score": f"{mask.score:.6f}",
                        "coverage": f"{mask.coverage:.6f}",
                        "mask": out.image(one.path, "mask", mask.region),
                        "overlay": out.image(one.path, "overlay", overlay),
                    }
                ]
            )
        done += len(batch)
    return done


def _below(path: Path) -> Iterator[Path]:
    """A file as it is given; of a folder the images in it and below, without hidden ones."""
    if not path.is_dir():
        yield path
        return
    for file in sorted(path.rglob("*")):
        hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
        if not hidden and is_image(file):
            yield file


def _images_in(file: Path) -> list[Path]:
    """The frames or slices of a file; of another file itself, of a bad one too, for that is told later."""
    try:
        return decode.frames_of(file)
    except (ImageError, OSError):
        return [file]


def _record(one: Given) -> Record:
    height, width = one.pixels.shape[:2]
    return Record(str(one.path), one.sha256, width, height, "RGB", label="", split="", patient="")
