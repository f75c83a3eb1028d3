"""Convert a COCO file of instances to images, their known regions in ``masks/``, and a table of labels.

Format: cocodataset.org, "Data format". The known region of an image is the union of its instances, which are
polygons in pixels or run-length codes, compressed or not.
"""

from __future__ import annotations

import importlib
import json
import math
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np

from medfocus.datasets.faults import Fault, FaultKind
from medfocus.datasets.listing import MASKS, inside
from medfocus.images import decode
from medfocus.images.errors import ImageError
from medfocus.images.png import encode_png
from medfocus.storage import atomic
from medfocus.storage.tables import write_csv

LabelFrom = Literal["category", "supercategory", "folder"]
MOST_BYTES = 1_000_000_000  # of an annotation file
_IMAGES, _TABLE = "images", "list.csv"
_GIVE_FOLDER = "Give the folder of the images as --images."


@dataclass
class Converted:
    """The result of a conversion."""

    regions: int = 0  # images with a known region
    labels: dict[str, int] = field(default_factory=dict)  # label -> number of images; "" if an image has none
    faults: list[Fault] = field(default_factory=list)

    def report(self, path: str, kind: FaultKind, fault: str, fix: str) -> None:
        """Record a fault of an image or an annotation."""
        self.faults.append(Fault(path, kind, fault, fix))


@dataclass(frozen=True)
class _Image:
    """An entry of ``images``."""

    id: str
    path: str  # relative to the folder of the images
    width: int
    height: int


def convert(
    annotations: Path,
    out: Path,
    images: Path | None = None,
    *,
    label_from: LabelFrom = "category",
    progress: Callable[[int, int], object] | None = None,
) -> Converted:
    """Write ``out``/images, ``out``/masks/images and the manifest ``out``/list.csv, for ingestion.

    The label of an image is the label that all its instances share; otherwise it is "", and ingestion leaves
    the image out. A broken instance is reported by its id and left out of the region.

    Args:
        annotations: The JSON file.
        out: A new folder, which appears when it is complete.
        images: The folder of the images. File names are relative to it and must not lead out of it. None
            means the folder of the JSON file.
        label_from: ``category`` or ``supercategory`` of the instances, or ``folder``: the first folder in the
            file name.
        progress: Called with the number of finished images and the number of all images.

    Raises:
        ValueError: The file is not a COCO file, or none of its images can be used; nothing is written.
        FileNotFoundError, FileExistsError: ``annotations`` or ``images`` is missing, or ``out`` exists.
    """
    root = images or annotations.parent
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder; give the folder of the images as --images.")
    content = _read(annotations)
    categories = {_id(entry, "id"): entry for entry in content["categories"]}
    instances: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for entry in content["annotations"]:
        instances[_id(entry, "image_id")].append(entry)
    done = Converted()
    rows: list[tuple[str, str]] = []
    with atomic.new_folder(out) as folder:
        for place, image in enumerate(listed := _images(content, root, instances, done), start=1):
            target = f"{_IMAGES}/{PurePosixPath(image.path).as_posix()}"
            if _copied(root, image, folder / target, done):
                region = _region(image, instances[image.id], done)
                if region.any():
                    _write_mask(region, (folder / MASKS / target).with_suffix(".png"))
                    done.regions += 1
                rows.append((target, _label(image, instances[image.id], categories, label_from, done)))
            if progress is not None:
                progress(place, len(listed))
        if not rows:
            text = "; ".join(f"{each.path}: {each.fault}" for each in done.faults[:5]) or "it lists none"
            raise ValueError(f"{annotations}: no image can be used ({text}). Correct --images or the file.")
        write_csv(folder / _TABLE, ("path", "label"), sorted(rows))
    for _, label in rows:
        done.labels[label] = done.labels.get(label, 0) + 1
    return done


def _read(file: Path) -> dict[str, list[dict[str, Any]]]:
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; give a JSON of COCO instances.")
    if file.stat().st_size > MOST_BYTES:
        raise ValueError(
            f"{file}: has more than {MOST_BYTES / 1e9:.0f} GB. Split it into files of fewer images."
        )
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: is not JSON ({error}). Export it again.") from error
    for name in ("images", "annotations", "categories"):
        entries = content.get(name) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise ValueError(f"{file}: has no list {name!r} of entries. Export it as COCO instances.")
    return content


def _id(entry: Mapping[str, Any], name: str) -> str:
    """Return an id as text, because files may mix 1 and "1"."""
    return str(entry.get(name))


def _images(
    content: Mapping[str, list[dict[str, Any]]],
    root: Path,
    instances: Mapping[str, object],
    done: Converted,
) -> list[_Image]:
    """Return the usable entries: files inside ``root``, each with an id and a mask name of its own."""
    usable: dict[str, _Image] = {}
    ids: set[str] = set()
    for entry in content["images"]:
        path: Any = entry.get("file_name")
        size: tuple[Any, Any] = entry.get("width"), entry.get("height")
        name = f"image {entry.get('id')}: {path}"
        if not isinstance(path, str) or not all(isinstance(n, int) and 0 < n < 1 << 16 for n in size):
            done.report(name, "invalid annotation", "has no file name, width and height", "Export it again.")
        elif (where := inside(root, root, path)) is None:
            done.report(name, "path outside the data set", f"leads out of {root}", _GIVE_FOLDER)
        elif not where:
            done.report(name, "missing file", f"no such file inside {root}", _GIVE_FOLDER)
        elif (stem := PurePosixPath(where).with_suffix("").as_posix()) in usable:
            fault = f"has the name of {usable[stem].path} except for the suffix, and would share its mask"
            done.report(name, "invalid annotation", fault, "Rename one of them.")
        elif _id(entry, "id") in ids:
            done.report(name, "invalid annotation", "has the id of another image", "Export it again.")
        else:
            ids.add(_id(entry, "id"))
            usable[stem] = _Image(_id(entry, "id"), where, *size)
    for unknown in sorted(instances.keys() - {_id(entry, "id") for entry in content["images"]}):
        fault = "has annotations, but is not in the list of images"
        done.report(f"image {unknown}", "invalid annotation", fault, "Export it again.")
    return list(usable.values())


def _copied(root: Path, image: _Image, target: Path, done: Converted) -> bool:
    """Copy an image to ``target``; return False and report a fault if it cannot be used."""
    try:
        height, width = decode.read(root / image.path).shape[:2]
    except ImageError as error:
        done.report(image.path, error.kind, error.fault, error.fix)
        return False
    if (width, height) != (image.width, image.height):
        fault = f"has {width} x {height} pixels, but {image.width} x {image.height} in the file"
        done.report(image.path, "invalid annotation", fault, "Use the images that were annotated.")
        return False
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(root / image.path, target)
    return True


def _region(image: _Image, instances: Iterable[Mapping[str, Any]], done: Converted) -> np.ndarray:
    """Return the union of the instances of an image, (H, W) bool."""
    region = np.zeros((image.height, image.width), bool)
    for entry in instances:
        try:
            region |= instance(entry.get("segmentation"), image.height, image.width)
        except ValueError as error:
            name = f"annotation {entry.get('id')} of {image.path}"
            fix = "Draw it again; it is not part of the region."
            done.report(name, "invalid annotation", str(error), fix)
    return region


def instance(segmentation: object, height: int, width: int) -> np.ndarray:
    """Return the region of an instance, (H, W) bool. Raises ValueError with the fault if it is broken."""
    mask: Any = importlib.import_module("pycocotools.mask")  # its stubs are incomplete
    if isinstance(segmentation, list) and segmentation:
        polygons = [_polygon(each, height, width) for each in segmentation]
        codes = mask.frPyObjects(polygons, height, width)
    elif isinstance(segmentation, dict):
        codes = [_runs(segmentation, height, width)]
    else:
        raise ValueError("has a box but no outline" if not segmentation else "is not an outline")
    try:
        region = np.asarray(mask.decode(codes)).max(axis=2) > 0
    except (ValueError, TypeError) as error:
        raise ValueError(f"has a broken run-length code ({error})") from error
    if not region.any():
        raise ValueError("covers no pixel")
    return region


def _polygon(points: object, height: int, width: int) -> list[float]:
    """Return x, y, x, y, ... clipped to the image; refuse far points, on which pycocotools wastes memory."""
    if not isinstance(points, list) or not all(
        isinstance(n, int | float) and not isinstance(n, bool) and math.isfinite(n) for n in points
    ):
        raise ValueError("has a polygon with values that are not numbers")
    if len(points) < 6 or len(points) % 2:
        raise ValueError(f"has a polygon of {len(points)} values; it needs x and y of three points or more")
    bounds = (width, height) * (len(points) // 2)
    if any(not -most <= n <= 2 * most for n, most in zip(points, bounds, strict=True)):
        raise ValueError(f"has a polygon that lies far outside of {width} x {height}")
    return [min(max(float(n), 0), most) for n, most in zip(points, bounds, strict=True)]


def _runs(code: Mapping[str, Any], height: int, width: int) -> Any:
    """Return a run-length code in pycocotools' compressed form."""
    mask: Any = importlib.import_module("pycocotools.mask")
    counts, size = code.get("counts"), code.get("size")
    if size != [height, width]:
        raise ValueError(f"has a run-length code of size {size}, but the image is {[height, width]}")
    if isinstance(counts, str) and counts.isascii():
        return {"size": size, "counts": counts.encode()}
    if not isinstance(counts, list) or not all(isinstance(n, int) and n >= 0 for n in counts):
        raise ValueError("has a run-length code without counts")
    if sum(counts) != height * width:
        raise ValueError(f"has a run-length code of {sum(counts)} pixels; the image has {height * width}")
    return mask.frPyObjects({"size": size, "counts": counts}, height, width)


def _label(
    image: _Image,
    instances: Iterable[Mapping[str, Any]],
    categories: Mapping[str, Mapping[str, Any]],
    label_from: LabelFrom,
    done: Converted,
) -> str:
    """Return the label that all instances of an image share; otherwise report a fault and return ""."""
    if label_from == "folder":
        first, *others = PurePosixPath(image.path).parts
        labels = {first} if others else set[str]()
    else:
        key = "name" if label_from == "category" else "supercategory"
        named = (categories.get(_id(each, "category_id"), {}).get(key) for each in instances)
        labels = {str(name or "").strip() for name in named} - {""}
    if len(labels) == 1:
        return labels.pop()
    fault = f"has several classes ({', '.join(sorted(labels))})" if labels else "has no class"
    fix = f"Fill in its label in {_TABLE}, or remove its line."
    done.report(image.path, "missing label", f"{fault}, so it has no label", fix)
    return ""


def _write_mask(region: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_png(region.astype(np.uint8) * 255))
