"""Medical images drawn from a seed: chest films, brain slices and breast ultrasound, each lesion known.

What tells the classes apart (margin, shape, texture) lies inside the region of the lesion. Outside lie
anatomy, exposure, devices, text and look-alikes, all drawn without regard to the class, so a classifier has
to look at the region. Not for clinical use: nothing here is, or comes from, an image of a patient.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from . import brain_mri, breast_ultrasound, chest_xray, png
from .phantom import Phantom

__all__ = ["MODALITIES", "SPLITS", "Phantom", "draw", "generator", "write"]

DRAWERS = {
    "chest_xray": chest_xray,
    "brain_mri": brain_mri,
    "breast_ultrasound": breast_ultrasound,
}
MODALITIES: dict[str, tuple[str, ...]] = {name: drawer.LABELS for name, drawer in DRAWERS.items()}
SPLITS = ("train", "test")
SMALLEST = 64  # pixels a side; below it the finest strokes vanish


def draw(modality: str, label: str, rng: np.random.Generator, size: int = 192) -> Phantom:
    """Draw one image of ``size`` x ``size`` pixels.

    Raises ValueError for a modality or a label that ``MODALITIES`` lacks, or a size under 64.
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
    """The random numbers of one image of a set, which depend on nothing but these five."""
    name = f"{seed}/{modality}/{split}/{label}/{index}"
    return np.random.default_rng(int.from_bytes(hashlib.sha256(name.encode()).digest(), "big"))


def write(
    folder: Path, modality: str, *, seed: int, train_per_class: int, test_per_class: int, size: int = 192
) -> None:
    """Write a set of images and their known regions, the same bytes on every machine.

    Images go to ``folder/<split>/<label>/<number>.png``, regions (0 and 255; all 0 where the class has no
    lesion) to ``folder/masks/<split>/<label>/<number>.png``. The set is built beside ``folder`` and swapped
    in when it is whole, so a reader never sees half of one; an earlier set there is replaced. Each image
    has its own random numbers (``generator``), so a larger set begins with the same images.

    Raises ValueError as ``draw`` does, and where ``folder`` holds anything but such a set.
    """
    strangers = sorted({p.name for p in folder.iterdir()} - {*SPLITS, "masks"}) if folder.exists() else []
    if strangers:
        raise ValueError(
            f"{folder}: holds {strangers[0]!r}, which is no part of a phantom set and would be lost. "
            "Name an empty or a new folder."
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as beside:
        whole = Path(beside) / "whole"
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
            folder.rename(Path(beside) / "replaced")
        whole.rename(folder)


@cache
def _keep_memory() -> None:
    """Make glibc keep freed memory: else each array of a drawing is mapped and cleared anew, twice the time.

    Freeing one large block raises the size from which malloc returns memory to the system (mallopt(3),
    M_MMAP_THRESHOLD, "dynamic"). The block is never touched, so it costs nothing.
    """
    np.empty(24 * 2**20, np.uint8)
