"""A COCO file of instances -> images, their known regions as ``masks/``, and a table of their labels.

The format: cocodataset.org, "Data format". A region is the union of an image's instances: polygons in
pixels, or a run-length code, counted or compressed.
"""

from __future__ import annotations

import csv
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
from PIL import Image

from medfocus.datasets.listing import MASKS, Fault, inside
from medfocus.images import decode
from medfocus.storage import atomic

LabelFrom = Literal["category", "supercategory", "folder"]
MOST_BYTES = 1_000_000_000  # of a file of annotations
_IMAGES, _TABLE = "images", "list.csv"


@dataclass
class Converted:
    """What was written, and what was not."""

    regions: int = 0  # images with one
    labels: dict[str, int] = field(default_factory=dict)  # label -> images; "" for none
    faults: list[Fault] = field(default_factory=list)


@dataclass(frozen=True)
class _Image:
    """An entry of ``images``."""

    id: str
    path: str  # as it is there
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
    """Write ``out``/images, ``out``/masks/images and ``out``/list.csv, by which this project reads them.

    An image's label is what its instances have in common, "" where that is nothing: ingestion leaves it out
    by its line. An instance that is broken gives no part of a region, and is told by its id.

    Args:
        annotations: The JSON.
        out: A folder that is not there; it appears when it is whole.
        images: The folder that file names are relative to, and may not lead out of; None: the JSON's own.
        label_from: ``category`` and ``supercategory`` of the instances, or ``folder``, a file name's first.
        progress: Called with the images that are done and with how many there are.

    Raises:
        ValueError: It is no such file, or no image of it can be used; nothing is written.
        FileNotFoundError, FileExistsError: ``annotations`` or ``images`` is not there, ``out`` is.
    """
    root = images or annotations.parent
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder; give that of the images as --images.")
    content = _read(annotations)
    categories = {_id(entry, "id"): entry for entry in content["categories"]}
    instances: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for entry in content["annotations"]:
        instances[_id(entry, "image_id")].append(entry)
    done = Converted()
    rows: list[tuple[str, str]] = []
    with atomic.whole_folder(out) as folder:
        for place, image in enumerate(listed := _images(content, root, instances, done), start=1):
            own = instances[image.id]
            target = f"{_IMAGES}/{PurePosixPath(image.path).as_posix()}"
            if _copied(root, image, folder / target, done):
                region = _region(image, own, done)
                if region.any():
                    _write_mask(region, (folder / MASKS / target).with_suffix(".png"))
                    done.regions += 1
                rows.append((target, _label(image, own, categories, label_from, done)))
            if progress is not None:
                progress(place, len(listed))
        if not rows:
            text = "; ".join(f"{each.path}: {each.fault}" for each in done.faults[:5]) or "it lists none"
            raise ValueError(f"{annotations}: no image can be used ({text}). Correct --images or the file.")
        _write_table(rows, folder / _TABLE)
    for _, label in rows:
        done.labels[label] = done.labels.get(label, 0) + 1
    return done


def _read(file: Path) -> dict[str, list[dict[str, Any]]]:
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; give a JSON of COCO instances.")
    if file.stat().st_size > MOST_BYTES:
        raise ValueError(f"{file}: has more than {MOST_BYTES / 1e9:.0f} GB. Divide it by images.")
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: is no JSON ({error}). Export it again.") from error
    for name in ("images", "annotations", "categories"):
        entries = content.get(name) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise ValueError(f"{file}: has no list {name!r} of entries. Export it as COCO instances.")
    return content


def _id(entry: Mapping[str, Any], name: str) -> str:
    """JSON knows 1 and "1", of which only one is used in a file."""
    return str(entry.get(name))


def _images(
    content: Mapping[str, list[dict[str, Any]]],
    root: Path,
    instances: Mapping[str, object],
    done: Converted,
) -> list[_Image]:
    """The entries that can be used: inside of ``root``, each file once, no two that would share a mask."""
    found: dict[str, _Image] = {}
    ids: set[str] = set()
    for entry in content["images"]:
        path: Any = entry.get("file_name")
        size: tuple[Any, Any] = entry.get("width"), entry.get("height")
        name = f"image {entry.get('id')}: {path}"
        if not isinstance(path, str) or not all(isinstance(n, int) and 0 < n < 1 << 16 for n in size):
            done.faults.append(Fault(name, "has no file name, width and height", "Export it again."))
        elif (where := inside(root, root, path)) is None:
            done.faults.append(Fault(name, f"leads out of {root}", "Give the folder as --images."))
        elif not where:
            done.faults.append(Fault(name, f"no such file inside {root}", "Give the folder as --images."))
        elif (stem := PurePosixPath(where).with_suffix("").as_posix()) in found:
            fault = f"has the name of {found[stem].path}, but for the suffix, and would share its mask"
            done.faults.append(Fault(name, fault, "Rename one of them."))
        elif _id(entry, "id") in ids:
            done.faults.append(Fault(name, "has the id of another image", "Export it again."))
        else:
            ids.add(_id(entry, "id"))
            found[stem] = _Image(_id(entry, "id"), where, *size)
    for strange in sorted(instances.keys() - {_id(entry, "id") for entry in content["images"]}):
        fault = "is the image of some annotations, but not among images"
        done.faults.append(Fault(f"image {strange}", fault, "Export it again."))
    return list(found.values())


def _copied(root: Path, image: _Image, target: Path, done: Converted) -> bool:
    """Whether the image can be decoded, and is now at ``target``."""
    try:
        height, width = decode.read(root / image.path).shape[:2]
    except decode.ImageError as error:
        done.faults.append(Fault(image.path, error.fault, error.fix))
        return False
    if (width, height) != (image.width, image.height):
        fault = f"has {width} x {height} pixels, but {image.width} x {image.height} in the file"
        done.faults.append(Fault(image.path, fault, "Take the images that were annotated."))
        return False
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(root / image.path, target)
    return True


def _region(image: _Image, own: Iterable[Mapping[str, Any]], done: Converted) -> np.ndarray:
    """The union of an image's instances, (H, W) bool."""
    region = np.zeros((image.height, image.width), bool)
    for entry in own:
        try:
            region |= instance(entry.get("segmentation"), image.height, image.width)
        except ValueError as error:
            name = f"annotation {entry.get('id')} of {image.path}"
            done.faults.append(Fault(name, str(error), "Draw it again; it gives no part of the region."))
    return region


def instance(segmentation: object, height: int, width: int) -> np.ndarray:
    """One instance's region, (H, W) bool. Raises ValueError with the fault of one that is broken."""
    mask: Any = importlib.import_module("pycocotools.mask")  # its stubs know fewer forms than it
    if isinstance(segmentation, list) and segmentation:
        polygons = [_polygon(each, height, width) for each in segmentation]
        codes = mask.frPyObjects(polygons, height, width)
    elif isinstance(segmentation, dict):
        codes = [_runs(segmentation, height, width)]
    else:
        raise ValueError("has a box and no outline" if not segmentation else "is no outline")
    try:
        region = np.asarray(mask.decode(codes)).max(axis=2) > 0
    except (ValueError, TypeError) as error:
        raise ValueError(f"has a broken run-length code ({error})") from error
    if not region.any():
        raise ValueError("covers no pixel")
    return region


def _polygon(points: object, height: int, width: int) -> list[float]:
    """x, y, x, y, ... within the image. What lies far outside is refused: pycocotools would fill memory."""
    if not isinstance(points, list) or not all(
        isinstance(n, int | float) and not isinstance(n, bool) and math.isfinite(n) for n in points
    ):
        raise ValueError("has a polygon with values that are no numbers")
    if len(points) < 6 or len(points) % 2:
        raise ValueError(f"has a polygon of {len(points)} values; three points, x and y each, are the least")
    bounds = (width, height) * (len(points) // 2)
    if any(not -most <= n <= 2 * most for n, most in zip(points, bounds, strict=True)):
        raise ValueError(f"has a polygon that lies far outside of {width} x {height}")
    return [min(max(float(n), 0), most) for n, most in zip(points, bounds, strict=True)]


def _runs(code: Mapping[str, Any], height: int, width: int) -> Any:
    """A run-length code as pycocotools has it compressed."""
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
    own: Iterable[Mapping[str, Any]],
    categories: Mapping[str, Mapping[str, Any]],
    label_from: LabelFrom,
    done: Converted,
) -> str:
    """What the image's instances have in common; "" where that is nothing, which is told."""
    if label_from == "folder":
        first, *others = PurePosixPath(image.path).parts
        found = {first} if others else set[str]()
    else:
        field_ = "name" if label_from == "category" else "supercategory"
        found = {str(categories.get(_id(each, "category_id"), {}).get(field_) or "").strip() for each in own}
        found.discard("")
    if len(found) == 1:
        return found.pop()
    told = f"is of several classes ({', '.join(sorted(found))})" if found else "is of no class"
    fix = f"Fill its label in {_TABLE}, or leave it out."
    done.faults.append(Fault(image.path, f"{told}, so it has no label", fix))
    return ""


def _write_mask(region: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(region.astype(np.uint8) * 255).save(path)


def _write_table(rows: Iterable[tuple[str, str]], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("path", "label"))
        writer.writerows(sorted(rows))
