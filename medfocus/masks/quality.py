"""Compare masks with known regions. Known regions serve only to measure masks and to train adapters."""

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
from medfocus.masks.segmenter import check_image

if TYPE_CHECKING:
    from medfocus.masks.sam2.segmenter import Sam2Segmenter

LEAST_PART = 0.1  # of the largest connected part; ``parts`` drops smaller parts


def known_region(root: Path, path: str, height: int, width: int) -> np.ndarray | None:
    """Read the known region (H, W) bool of the image ``path`` below ``root``; None if missing or empty.

    The region is the union of ``root/masks/<path without suffix>.png``, all ``root/masks/<path without
    suffix>_mask*.png``, and all ``<name>_mask.png`` and ``<name>_mask_1.png`` (any number) next to the image
    ``<name>``. Each file is resized to the image. For ``x.dcm#07`` the names begin with ``x_07``. If
    ``root`` only wraps the folder of the data set, ``masks`` may also be inside that folder. Raises as
    ``medfocus.images.decode.read`` does.
    """
    region = np.zeros((height, width), bool)
    for file in _files_of(root, path):
        plane = Image.fromarray(decode.read(file)[..., 0])
        region |= np.asarray(plane.resize((width, height), Image.Resampling.NEAREST)) > 127
    return region if region.any() else None


def _files_of(root: Path, path: str) -> list[Path]:
    """List the files of an image's known region."""
    image = root / path
    stem = stack.flat(image.name)
    tops = {root, unwrapped(root)} if root.is_dir() else {root}
    files: list[Path] = []
    for top in tops:
        if image.is_relative_to(top):
            mask = top / MASKS / image.relative_to(top).with_name(f"{stem}.png")
            files += [mask] if mask.is_file() else []
            files += mask.parent.glob(f"{glob.escape(mask.stem)}_mask*.png")
    if image.parent.is_dir():
        folder = image.parent
        files += _masks_in(folder, folder.stat().st_mtime_ns).get(stem.casefold(), [])
    return files


@lru_cache(maxsize=64)
def _masks_in(folder: Path, changed: int) -> dict[str, list[Path]]:
    """Map the name of an image, without suffix and in lower case, to its masks in ``folder``.

    The folder is listed once for all of its images, and again if its mtime, ``changed``, is new.
    """
    masks: dict[str, list[Path]] = defaultdict(list)
    for file in sorted(folder.iterdir()):
        mask = MASK_STEM.fullmatch(stack.stem(file.name).casefold())
        if mask and file.name.casefold().endswith(SUFFIXES):
            masks[mask[1]].append(file)
    return masks


def iou(a: np.ndarray, b: np.ndarray) -> float:
    """Return the intersection over union of two regions (H, W) bool; 1 if both are empty."""
    either = int((a | b).sum())
    return float((a & b).sum() / either) if either else 1.0


def dice(a: np.ndarray, b: np.ndarray) -> float:
    """Return the Dice coefficient of two regions (H, W) bool; 1 if both are empty."""
    total = int(a.sum()) + int(b.sum())
    return float(2 * (a & b).sum() / total) if total else 1.0


def center_box(height: int, width: int) -> np.ndarray:
    """Return the centred box with half of the image's area, (H, W) bool: a mask that ignores the image."""
    region = np.zeros((height, width), bool)
    y, x = round(height * (1 - 0.5**0.5) / 2), round(width * (1 - 0.5**0.5) / 2)
    region[y : height - y, x : width - x] = True
    return region


def innermost(region: np.ndarray) -> tuple[float, float]:
    """Return the point (x, y) of a region (H, W) bool farthest from its edge, as shares of the sides."""
    depth = np.zeros(np.add(region.shape, 2))
    ndimage.distance_transform_edt(np.pad(region, 1), distances=depth)
    y, x = np.unravel_index(int(depth[1:-1, 1:-1].argmax()), region.shape)
    return float((x + 0.5) / region.shape[1]), float((y + 0.5) / region.shape[0])


def correction(region: np.ndarray, mask: np.ndarray) -> tuple[float, float, bool] | None:
    """Return the point (x, y), as shares of the sides, and whether it lies inside, that a reader would add.

    The point is the innermost place of the larger of two areas: the area that the mask (H, W) bool misses of
    the region (H, W) bool, and the area of the mask outside the region. Returns None if both are empty.
    """
    missed, wrong = region & ~mask, mask & ~region
    if not (missed.any() or wrong.any()):
        return None
    inside = bool(missed.sum() >= wrong.sum())
    return *innermost(missed if inside else wrong), inside


def corners(region: np.ndarray) -> np.ndarray:
    """Return the top left and bottom right corner (2, 2) of a region (H, W) bool, as shares of the sides."""
    height, width = region.shape
    rows, columns = np.flatnonzero(region.any(1)), np.flatnonzero(region.any(0))
    box = [(columns[0], rows[0]), (columns[-1] + 1, rows[-1] + 1)]
    return np.array(box, np.float32) / np.array([width, height], np.float32)


def parts(region: np.ndarray) -> list[np.ndarray]:
    """Return the connected parts of a region (H, W) bool, such as two lungs, without small parts."""
    labels, _ = connected(region)
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return [labels == i for i in np.flatnonzero(sizes >= LEAST_PART * max(1, sizes.max()))]


def masks_of_a_reader(
    segmenter: Sam2Segmenter, image: np.ndarray, region: np.ndarray
) -> dict[str, np.ndarray]:
    """Segment an image (H, W, 3) uint8 as a reader would who sees its region (H, W) bool: masks (H, W) bool.

    Each connected part of the region gets "one point", the innermost, "two points", with a ``correction`` of
    the first mask, and its "box". A mask is the union over the parts.
    """
    from medfocus.masks.sam2.segmenter import PointPrompts

    encoded = segmenter.encode([check_image(image)])

    def at(coords: np.ndarray, labels: Sequence[int]) -> np.ndarray:
        prompt = PointPrompts(coords[None].astype(np.float32), np.array([labels], np.int32))
        best = segmenter.best(encoded, 0, prompt)
        return np.zeros_like(region) if best is None else segmenter.region(image, best[0])

    masks = {name: np.zeros_like(region) for name in ("one point", "two points", "box")}
    for part in parts(region):
        point = innermost(part)
        first = at(np.array([point]), [1])
        wrong = correction(part, first)
        both = first if wrong is None else at(np.array([point, wrong[:2]]), [1, int(wrong[2])])
        for name, mask in zip(masks, (first, both, at(corners(part), [2, 3])), strict=True):
            masks[name] |= mask
    return masks


def masks_at_points(
    segmenter: Sam2Segmenter, image: np.ndarray, points: Sequence[tuple[float, float]]
) -> tuple[np.ndarray, np.ndarray]:
    """Segment an image (H, W, 3) uint8 at points (x, y), given as shares of its sides.

    Returns the union (H, W) bool of the best mask of each point by predicted IoU, and the unions (3, H, W)
    bool of the best, second and third masks, so that ground truth can select one.
    """
    regions = segmenter.at_points(image, points)  # (P, 3, H, W)
    return np.logical_or.reduce(regions[:, 0]), np.logical_or.reduce(regions)
