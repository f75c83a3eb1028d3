"""Draw medical phantoms from a seed: chest radiographs, brain MRI and breast ultrasound with known lesions.

The classes differ (in margin, shape and texture) only inside the region of the lesion. Anatomy, exposure,
devices, text and look-alikes outside of it do not depend on the class, so a classifier has to use the region.
Not for clinical use: no phantom is derived from an image of a patient.

This room imports no other room. ``draw`` draws one phantom, and ``write`` writes a data set.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from medfocus.phantoms import brain_mri, breast_ultrasound, chest_xray, png
from medfocus.phantoms.phantom import Phantom

__all__ = ["MODALITIES", "SPLITS", "Phantom", "draw", "generator", "write"]

DRAWERS = {
    "chest_xray": chest_xray,
    "brain_mri": brain_mri,
    "breast_ultrasound": breast_ultrasound,
}
MODALITIES: dict[str, tuple[str, ...]] = {name: drawer.LABELS for name, drawer in DRAWERS.items()}
SPLITS = ("train", "test")
SMALLEST = 64  # pixels per side; in smaller images the finest strokes vanish


def draw(modality: str, label: str, rng: np.random.Generator, size: int = 192) -> Phantom:
    """Draw one image of ``size`` x ``size`` pixels.

    Raises ValueError for a modality or label that is not in ``MODALITIES``, or a size below 64.
    """
    if modality not in DRAWERS:
        raise ValueError(f"phantoms: there is no modality {modality!r}; use one of {', '.join(DRAWERS)}.")
    if label not in MODALITIES[modality]:
        known = ", ".join(MODALITIES[modality])
        raise ValueError(f"phantoms: {modality} has no class {label!r}; use one of {known}.")
    if size < SMALLEST:
        raise ValueError(f"phantoms: a size of {size} px is too small to draw on; use {SMALLEST} or more.")
    _keep_memory()
    return DRAWERS[modality].draw(label, rng, size)


def generator(seed: int, modality: str, split: str, label: str, index: int) -> np.random.Generator:
    """Return the random generator of one image of a set; it depends only on the arguments."""
    name = f"{seed}/{modality}/{split}/{label}/{index}"
    return np.random.default_rng(int.from_bytes(hashlib.sha256(name.encode()).digest(), "big"))


def write(
    folder: Path, modality: str, *, seed: int, train_per_class: int, test_per_class: int, size: int = 192
) -> None:
    """Write a data set of images and known regions, with the same bytes on every machine.

    Images go to ``folder/<split>/<label>/<number>.png``, regions (0 and 255; all 0 for a class without
    lesion) to ``folder/masks/<split>/<label>/<number>.png``. A complete set replaces an earlier set at once,
    so that a reader never sees part of a set. Each image has its own ``generator``, so a larger set begins
    with the same images.

    Raises ValueError as ``draw`` does, and if ``folder`` holds anything other than such a set.
    """
    others = sorted({p.name for p in folder.iterdir()} - {*SPLITS, "masks"}) if folder.exists() else []
    if others:
        raise ValueError(
            f"{folder}: holds {others[0]!r}, which is not part of a phantom set and would be deleted. "
            "Give an empty or a new folder."
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        whole = Path(temporary) / "whole"
        for split, count in zip(SPLITS, (train_per_class, test_per_class), strict=True):
            for label in MODALITIES.get(modality, ("",)):
                images, regions = whole / split / label, whole / "masks" / split / label
                images.mkdir(parents=True)
                regions.mkdir(parents=True)
                for index in range(count):
                    phantom = draw(modality, label, generator(seed, modality, split, label, index), size)
                    (images / f"{index:05d}.png").write_bytes(png.encode(phantom.image))
                    (regions / f"{index:05d}.png").write_bytes(png.encode(phantom.region))
        if folder.exists():
            folder.rename(Path(temporary) / "replaced")
        whole.rename(folder)


@cache
def _keep_memory() -> None:
    """Make glibc keep freed memory. Otherwise it maps and clears memory for each array, in twice the time.

    After one large block is freed, malloc keeps smaller blocks instead of returning them to the system
    (mallopt(3), M_MMAP_THRESHOLD, "dynamic"). The block is never touched, so it costs nothing.
    """
    np.empty(24 * 2**20, np.uint8)
