"""How good masks are where the truth is known. The truth measures; it is never an input of anything."""

from __future__ import annotations

import glob
from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from scipy import ndimage

from medfocus.datasets.listing import MASK_STEM, MASKS, SUFFIXES, unwrapped
from medfocus.images import decode, stack
from medfocus.masks.candidates import connected

if TYPE_CHECKING:
    from medfocus.masks.sam2.segmenter import Sam2Segmenter

LEAST_PART = 0.1  # of the largest connected part: smaller ones get no point of their own


def known_region(root: Path, path: str, height: int, width: int) -> np.ndarray | None:
    """The known region (H, W) bool of the image ``path`` below ``root``; None for none or an empty one.

    ``root/masks/<path without suffix>.png`` is united with all ``root/masks/<path without
    suffix>_mask*.png``, and with what lies beside the image as ``<its name>_mask.png`` or ``_mask_1.png``,
    each brought to the image's size; those of ``x.dcm#07`` begin with ``x_07``. Where ``root`` only wraps
    the data set, the folder ``masks`` may also be in there. Raises as ``medfocus.images.decode.read`` does.
    """
    region = np.zeros((height, width), bool)
    for file in _files_of(root, path):
        plane = Image.fromarray(decode.read(file)[..., 0])
        region |= np.asarray(plane.resize((width, height), Image.Resampling.NEAREST)) > 127
    return region if region.any() else None


def _files_of(root: Path, path: str) -> list[Path]:
    """The files of an image's known region."""
    image = root / path
    stem = stack.flat(image.name)
    tops = {root, unwrapped(root)} if root.is_dir() else {root}
    files: list[Path] = []
    for top in tops:
        if image.is_relative_to(top):
            place = top / MASKS / image.relative_to(top).with_name(f"{stem}.png")
            files += [place] if place.is_file() else []
            files += place.parent.glob(f"{glob.escape(place.stem)}_mask*.png")
    if image.parent.is_dir():
        folder = image.parent
        files += _beside(folder, folder.stat().st_mtime_ns).get(stem.casefold(), [])
    return files


@lru_cache(maxsize=64)
def _beside(folder: Path, changed: int) -> dict[str, list[Path]]:
    """Name of an image, without suffix and case -> the masks of it in ``folder``, as that was ``changed``.

    So a folder is listed once and not once per image.
    """
    found: dict[str, list[Path]] = defaultdict(list)
    for file in sorted(folder.iterdir()):
        mask = MASK_STEM.fullmatch(stack.stem(file.name).casefold())
        if mask and file.name.casefold().endswith(SUFFIXES):
            found[mask[1]].append(file)
    return found


def iou(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two regions (H, W) bool; 1 where both are empty."""
    either = int((a | b).sum())
    return float((a & b).sum() / either) if either else 1.0


def dice(a: np.ndarray, b: np.ndarray) -> float:
    """Twice the intersection over the sum of two regions (H, W) bool; 1 where both are empty."""
    total = int(a.sum()) + int(b.sum())
    return float(2 * (a & b).sum() / total) if total else 1.0


def center_box(height: int, width: int) -> np.ndarray:
    """The box in the middle with half of the image's area, (H, W) bool: what knows nothing."""
    region = np.zeros((height, width), bool)
    y, x = round(height * (1 - 0.5**0.5) / 2), round(width * (1 - 0.5**0.5) / 2)
    region[y : height - y, x : width - x] = True
    return region


def innermost(region: np.ndarray) -> tuple[float, float]:
    """The middle of the pixel of a region (H, W) bool that lies deepest in it: (x, y) in sides."""
    depth = np.zeros(np.add(region.shape, 2))
    ndimage.distance_transform_edt(np.pad(region, 1), distances=depth)
    y, x = np.unravel_index(int(depth[1:-1, 1:-1].argmax()), region.shape)
    return float((x + 0.5) / region.shape[1]), float((y + 0.5) / region.shape[0])


def parts(region: np.ndarray) -> list[np.ndarray]:
    """The connected parts of a region (H, W) bool, without crumbs: two lungs are two parts."""
    labels, _ = connected(region)
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return [labels == i for i in np.flatnonzero(sizes >= LEAST_PART * max(1, sizes.max()))]


def pointed(
    segmenter: Sam2Segmenter, image: np.ndarray, points: Sequence[tuple[float, float]]
) -> tuple[np.ndarray, np.ndarray]:
    """What points (x, y), in sides of an image (H, W, 3) uint8, find: two regions (H, W) bool.

    First the union of the masks that the quality head picks, one a point; then of its first, second and third
    choices, (3, H, W), of which ground truth could choose.
    """
    regions = segmenter.at_points(image, points)  # (P, 3, H, W)
    return np.logical_or.reduce(regions[:, 0]), np.logical_or.reduce(regions)
