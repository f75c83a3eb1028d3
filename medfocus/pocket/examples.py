"""Training images of the pocket SAM2: warped phantoms and pairs, with prompts of four kinds.

The kinds are one point; two points or a box; four points; and none at all, which asks for the image's region
of interest. SAM2's prompt encoder has an embedding for "not a point", which becomes the prompt "none".
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch.utils.data import Dataset

from medfocus.masks.sam2.segmenter import NO_PROMPT
from medfocus.pocket.pairs import Pairs, components
from medfocus.pocket.pool import Drawn, Pool

IMAGE_SIZE = 256  # pixels a side of the model's input
PARTS = 6  # most parts of an image that prompts may mean
LEAST_PIXELS = 24  # of a part or a region at IMAGE_SIZE; smaller ones are no target
PHANTOM_SHARE = 0.3  # of the images, if there are pairs
# Share of the images that show another image in an inset. Most images have one region that stands out, so a
# model could answer every point with this region; with an inset, only the point says which one is meant.
INSETS = 0.35
_INSET_SIDE = (0.4, 0.6)  # of an inset, as a share of the image's
# Factors of the IoU that the quality head learns. Anatomy of phantoms stays below the limit of a chosen mask
# (0.7). An unprompted segmenter therefore chooses a lesion if it finds any, and otherwise anatomy, as
# "relaxed".
WORTH, ANATOMY_WORTH = 1.0, 0.45
_ORGANS = ("left lung", "right lung", "brain")  # of interest in a phantom without a lesion


@dataclass(frozen=True, eq=False)
class Example:
    """An image with what its prompts may mean."""

    image: np.ndarray  # (H, W, 3) uint8
    plane: np.ndarray  # (H, W) uint8: labels, or bits of regions
    # Return the parts (H, W) bool with their worth, and the region of interest with its worth or None.
    split: Callable[[np.ndarray], tuple[list[tuple[np.ndarray, float]], tuple[np.ndarray, float] | None]]


@dataclass(frozen=True, eq=False)
class Batch:
    """B images of side S. Region 0 of an image is the region of interest, followed by its PARTS."""

    images: torch.Tensor  # (B, 3, S, S) float32 in [0, 1]
    regions: torch.Tensor  # (B, R, S, S) bool; all False where an image has fewer than R
    worth: torch.Tensor  # (B, R) float32; 0 for no region
    coords: tuple[torch.Tensor, ...]  # of each kind of prompt: (B, K, N, 2) float32, (x, y) in pixels of S
    labels: tuple[torch.Tensor, ...]  # (B, K, N) int64: 1 inside, 0 outside, 2 and 3 a box, -1 no point
    aims: tuple[torch.Tensor, ...]  # (B, K) int64: index of the region meant, -1 for none

    def to(self, device: str) -> Batch:
        """Move the batch to a device."""

        def moved(value: Any) -> Any:
            return tuple(map(moved, value)) if isinstance(value, tuple) else value.to(device)

        return Batch(*(moved(getattr(self, field.name)) for field in fields(self)))


class Batches(Dataset[Batch]):
    """The batches of a training. Seed and index determine a batch, in every process."""

    def __init__(self, pool: Pool, pairs: Pairs | None, seed: int, batch_size: int) -> None:
        self.pool, self.pairs, self.seed, self.batch_size = pool, pairs, seed, batch_size

    def __getitem__(self, index: int) -> Batch:
        """Warp and prompt ``batch_size`` images."""
        rows = []
        for number in range(index * self.batch_size, (index + 1) * self.batch_size):
            rng = np.random.default_rng([self.seed, number])
            example = self._draw(self.pool.order(self.seed, number), rng)
            has_inset = rng.random() < INSETS
            inset = self._draw(int(rng.integers(len(self.pool))), rng) if has_inset else None
            rows.append(sample(example, inset, rng))
        images, regions, worth, *prompts = (
            [torch.from_numpy(np.stack(column)) for column in zip(*kind, strict=True)]
            if isinstance(kind[0], tuple)
            else torch.from_numpy(np.stack(kind))
            for kind in zip(*rows, strict=True)
        )
        coords, labels, aims = zip(*prompts, strict=True)
        return Batch(images, regions, worth, coords, labels, aims)  # pyright: ignore[reportArgumentType]

    def _draw(self, phantom: int, rng: np.random.Generator) -> Example:
        """Return a pair, or this phantom."""
        if self.pairs is not None and rng.random() >= PHANTOM_SHARE:
            return of_pair(*(pair := self.pairs.draw(rng)).read(), pair.interest)
        return of_phantom(self.pool[phantom])


def of_phantom(drawn: Drawn) -> Example:
    """Convert a phantom: its region of interest is the lesion; if it has none, the lungs or the brain."""
    count = len(drawn.regions)
    organs = [i for i, name in enumerate(drawn.facts.regions) if name in _ORGANS]
    bits = np.uint8(1) << np.arange(count, dtype=np.uint8)

    def split(plane: np.ndarray) -> Any:
        regions = (plane & bits[:, None, None]).astype(bool)
        parts = [(region, ANATOMY_WORTH if i else WORTH) for i, region in enumerate(regions)]
        if regions[0].sum() >= LEAST_PIXELS or count == 1:
            return parts, parts[0]
        return parts, (regions[organs].any(0), ANATOMY_WORTH)

    plane = np.bitwise_or.reduce([region * bit for region, bit in zip(drawn.regions, bits, strict=True)])
    return Example(np.repeat(drawn.image[..., None], 3, 2), plane, split)


def of_pair(image: np.ndarray, labels: np.ndarray, interest: tuple[int, ...] | None) -> Example:
    """Convert a pair (H, W, 3), (H, W) uint8: its parts are the connected parts of each label."""

    def split(plane: np.ndarray) -> Any:
        parts = [
            (part, WORTH)
            for label in np.unique(plane[plane > 0])
            for part in components(plane == label, LEAST_PIXELS)
        ]
        region = plane > 0 if interest == () else np.isin(plane, interest or ())
        return parts, None if interest is None else (region, WORTH)

    return Example(image, labels, split)


def sample(example: Example, inset: Example | None, rng: np.random.Generator) -> tuple[Any, ...]:
    """Make one row of a ``Batch``: image, regions, worth, and the prompts by kind; see ``prompts``.

    An image with an inset has the parts of both, and no region of interest.
    """
    image, plane = warped(example, rng)
    parts, interest = example.split(plane)
    if inset is not None:
        image, parts, interest = *_with_inset(image, parts, inset, rng), None
    parts = [part for part in parts if part[0].sum() >= LEAST_PIXELS]
    if len(parts) > PARTS:  # large parts are likelier
        sizes = np.array([part.sum() for part, _ in parts], float) ** 0.5
        parts = [parts[i] for i in rng.choice(len(parts), PARTS, replace=False, p=sizes / sizes.sum())]
    regions = np.zeros((1 + PARTS, IMAGE_SIZE, IMAGE_SIZE), bool)
    worth = np.zeros(1 + PARTS, np.float32)
    if interest is not None and LEAST_PIXELS <= interest[0].sum() <= 0.9 * IMAGE_SIZE**2:
        regions[0], worth[0] = interest
    for i, (part, value) in enumerate(parts, 1):
        regions[i], worth[i] = part, value
    return toned(image, rng), regions, worth, *prompts(regions, worth, rng)


def _with_inset(
    image: np.ndarray, parts: list[tuple[np.ndarray, float]], inset: Example, rng: np.random.Generator
) -> tuple[np.ndarray, list[tuple[np.ndarray, float]]]:
    """Show an example in a square of an image (S, S, 3); return the image and the visible parts of both."""
    shown, plane = warped(inset, rng)
    side = int(rng.uniform(*_INSET_SIDE) * IMAGE_SIZE)
    top, left = rng.integers(0, IMAGE_SIZE - side + 1, 2)
    square = (slice(top, top + side), slice(left, left + side))
    image = image.copy()
    image[square] = np.asarray(Image.fromarray(shown).resize((side, side), Image.Resampling.BOX))
    small = np.asarray(Image.fromarray(plane).resize((side, side), Image.Resampling.NEAREST))
    visible = []
    for part, worth in parts:
        rest = part.copy()
        rest[square] = False
        visible.append((rest, worth))
    for part, worth in inset.split(small)[0]:
        whole = np.zeros((IMAGE_SIZE, IMAGE_SIZE), bool)
        whole[square] = part
        visible.append((whole, worth))
    return image, visible


def prompts(
    regions: np.ndarray, worth: np.ndarray, rng: np.random.Generator
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Draw the prompts of regions (R, S, S) by kind: coords (K, N, 2), labels (K, N) and aims (K,).

    The first kind has two points in parts, a point anywhere and no prompt; the second has two points or a
    box; the third has four points.
    """
    known = np.flatnonzero(worth[1:]) + 1
    lesions = regions[1:][worth[1:] == WORTH].any(0)
    shares = worth[known] ** 0.5 / max(1e-9, (worth[known] ** 0.5).sum())

    def aim() -> int:
        return int(rng.choice(known, p=shares)) if len(known) else -1

    def point(region: np.ndarray) -> np.ndarray:
        places = np.flatnonzero(region)
        if not len(places):
            return rng.uniform(0, IMAGE_SIZE, 2)
        place = rng.choice(places)
        return np.array([place % IMAGE_SIZE, place // IMAGE_SIZE]) + rng.uniform(0, 1, 2)

    def at_points(count: int) -> tuple[np.ndarray, np.ndarray, int]:
        meant = aim()
        if meant < 0:
            return rng.uniform(0, IMAGE_SIZE, (count, 2)), np.ones(count, int), -1
        region = regions[meant]
        inside = region & ~lesions if worth[meant] < WORTH else region  # anatomy outside of the lesions
        inside = inside if inside.any() else region
        labels = np.ones(count, int)
        labels[1:] = rng.random(count - 1) < 0.5
        near = _grown(region, int(rng.integers(4, 40))) & ~region if not labels.all() else region
        points = [point(inside if label else (near if near.any() else ~region)) for label in labels]
        return np.stack(points), labels, meant

    def in_box() -> tuple[np.ndarray, np.ndarray, int]:
        meant = aim()
        if meant < 0:
            return np.sort(rng.uniform(0, IMAGE_SIZE, (2, 2)), axis=0), np.array([2, 3]), -1
        rows, columns = (np.flatnonzero(regions[meant].any(axis)) for axis in (1, 0))
        corners = np.array([[columns[0], rows[0]], [columns[-1] + 1, rows[-1] + 1]], float)
        jitter = rng.normal(0, 0.08, (2, 2)) * (corners[1] - corners[0])
        return (corners + jitter.clip(-20, 20)).clip(0, IMAGE_SIZE), np.array([2, 3]), meant

    anywhere = rng.uniform(0, IMAGE_SIZE, (1, 2))
    x, y = anywhere[0].astype(int)
    here = np.flatnonzero(regions[1:, y, x]) + 1
    singles = [
        at_points(1),
        at_points(1),
        (anywhere, np.ones(1, int), int(here[0]) if len(here) else -1),
        (np.zeros((1, 2)), np.full(1, NO_PROMPT), 0 if worth[0] else -1),
    ]
    kinds = [singles, [at_points(2) if rng.random() < 0.5 else in_box()], [at_points(4)]]
    return [
        (
            np.stack([coords for coords, _, _ in kind]).astype(np.float32),
            np.stack([labels for _, labels, _ in kind]),
            np.array([meant for _, _, meant in kind]),
        )
        for kind in kinds
    ]


def _grown(region: np.ndarray, by: int) -> np.ndarray:
    """Grow a region (S, S) bool by about ``by`` pixels."""
    small = Image.fromarray(region.astype(np.uint8) * np.uint8(255)).reduce(4)
    grown = small.filter(ImageFilter.BoxBlur(by / 4))
    return np.asarray(grown.resize(region.shape[::-1])) > 0


def warped(example: Example, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Rotate, scale, shift and mirror an example to (S, S, 3) uint8 and its plane (S, S) uint8."""
    height, width = example.plane.shape
    angle = math.radians(rng.normal(0, 10))
    side = math.exp(rng.uniform(math.log(0.6), math.log(1.15)))  # share of the image that the model sees
    stretch = math.exp(rng.normal(0, 0.1))
    mirror = -1 if rng.random() < 0.5 else 1
    flip = -1 if rng.random() < 0.1 else 1
    sx, sy = width * side * stretch / IMAGE_SIZE, height * side / stretch / IMAGE_SIZE
    room_x, room_y = (1 - side * stretch) * width / 2, (1 - side / stretch) * height / 2
    cx = width / 2 + rng.uniform(-1, 1) * abs(room_x)
    cy = height / 2 + rng.uniform(-1, 1) * abs(room_y)
    cos, sin = math.cos(angle), math.sin(angle)
    a, b = sx * mirror * cos, -sx * flip * sin
    d, e = sy * mirror * sin, sy * flip * cos
    half = IMAGE_SIZE / 2
    matrix = (a, b, cx - (a + b) * half, d, e, cy - (d + e) * half)
    size, affine = (IMAGE_SIZE, IMAGE_SIZE), Image.Transform.AFFINE
    image = Image.fromarray(example.image).transform(size, affine, matrix, Image.Resampling.BILINEAR)
    plane = Image.fromarray(example.plane).transform(size, affine, matrix, Image.Resampling.NEAREST)
    return np.asarray(image), np.asarray(plane)


def toned(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Vary colour, exposure, sharpness and grain: (S, S, 3) uint8 -> (3, S, S) float32 in [0, 1]."""
    drawn = Image.fromarray(image)
    if rng.random() < 0.3:
        drawn = drawn.convert("L").convert("RGB")
    if rng.random() < 0.2:
        drawn = drawn.filter(ImageFilter.GaussianBlur(rng.uniform(0.4, 1.6)))
    tone = (np.asarray(drawn, np.float32) / 255) ** np.float32(math.exp(rng.normal(0, 0.3)))
    tone = (tone - 0.5) * np.float32(math.exp(rng.normal(0, 0.2))) + np.float32(0.5 + rng.normal(0, 0.07))
    grain = rng.standard_normal(tone.shape[:2], np.float32)[..., None]
    tone = tone + np.float32(rng.uniform(0, 0.04)) * grain
    return np.ascontiguousarray(tone.clip(0, 1).transpose(2, 0, 1))
