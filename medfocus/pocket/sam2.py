"""Training of the pocket SAM2 on real images with masks and on phantoms.

The network is the sam2 package's (arXiv 2408.00714) in the configuration "pocket", without the modules for
video. Its trunk starts from ImageNet weights, and the last stages of the trunk train with the rest. An image
has prompts of four kinds: one point; two points or a box; four points; and none at all, which asks for the
image's region of interest. SAM2's prompt encoder has an embedding for "not a point", which becomes the prompt
"none".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch.utils.data import Dataset

from medfocus.masks.sam2.model import IMAGE_MODULES, load_predictor
from medfocus.masks.sam2.segmenter import NO_PROMPT
from medfocus.pocket.loop import Settings, train_and_write
from medfocus.pocket.pairs import Pairs, components
from medfocus.pocket.pool import Drawn, Pool
from medfocus.storage.imagenet import imagenet_state

IMAGE_SIZE = 256  # pixels a side of the model's input
PARTS = 6  # most parts of an image that prompts may mean
LEAST_PIXELS = 24  # of a part or a region at IMAGE_SIZE; smaller ones are no target
PHANTOM_SHARE = 0.3  # of the images, if there are pairs
FROZEN_STAGES = 3  # of the trunk's seven; the ImageNet weights of its first stages stay
# Factors of the IoU that the quality head learns. Anatomy of phantoms stays below the limit of a chosen mask
# (0.7). An unprompted segmenter therefore chooses a lesion if it finds any, and otherwise anatomy, as
# "relaxed".
WORTH, ANATOMY_WORTH = 1.0, 0.45
# Factor of the mask logits. Stability compares logits > 1 with logits > -1, and at a quarter of the model's
# resolution much of a small lesion is rim. The factor changes no mask; as a power of two it keeps every digit.
STEEPNESS = 4.0
_ORGANS = ("left lung", "right lung", "brain")  # of interest in a phantom without a lesion
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # as SAM2's transforms


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
            if self.pairs is not None and rng.random() >= PHANTOM_SHARE:
                example = of_pair(*(pair := self.pairs.draw(rng)).read(), pair.interest)
            else:
                example = of_phantom(self.pool[self.pool.order(self.seed, number)])
            rows.append(sample(example, rng))
        images, regions, worth, *prompts = (
            [torch.from_numpy(np.stack(column)) for column in zip(*kind, strict=True)]
            if isinstance(kind[0], tuple)
            else torch.from_numpy(np.stack(kind))
            for kind in zip(*rows, strict=True)
        )
        coords, labels, aims = zip(*prompts, strict=True)
        return Batch(images, regions, worth, coords, labels, aims)  # pyright: ignore[reportArgumentType]


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


def sample(example: Example, rng: np.random.Generator) -> tuple[Any, ...]:
    """Make one row of a ``Batch``: image, regions, worth, and coords, labels and aims of each kind of prompt."""
    image, plane = warped(example, rng)
    parts, interest = example.split(plane)
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


def prompts(
    regions: np.ndarray, worth: np.ndarray, rng: np.random.Generator
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Draw the prompts of regions (R, S, S) by kind: coords (K, N, 2), labels (K, N) and aims (K,).

    The first kind has a point in a part, a point anywhere and no prompt; the second has two points or a box;
    the third has four points.
    """
    known = np.flatnonzero(worth[1:]) + 1
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
        inside = region & ~regions[1] if worth[meant] < WORTH else region  # anatomy outside of the lesion
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
    """Vary colour, exposure, contrast, sharpness and grain: (S, S, 3) uint8 -> (3, S, S) float32 in [0, 1]."""
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


def encode(model: Any, images: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Encode images (B, 3, S, S) in [0, 1]: embedding (B, d, S/16, S/16), finer levels at S/4 and S/8.

    This is ``SAM2ImagePredictor.set_image_batch`` with gradients.
    """
    mean, std = (torch.tensor(v, device=images.device)[:, None, None] for v in (_MEAN, _STD))
    pixels = ((images - mean) / std).contiguous(memory_format=torch.channels_last)  # (B, 3, S, S)
    _, levels, _, sizes = model._prepare_backbone_features(model.forward_image(pixels))
    levels[-1] = levels[-1] + model.no_mem_embed
    maps = [
        level.permute(1, 2, 0).reshape(len(images), -1, *size)
        for level, size in zip(levels, sizes, strict=True)
    ]
    return maps[-1], maps[:-1]


def decode(
    model: Any, features: tuple[torch.Tensor, list[torch.Tensor]], coords: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode K prompts for each of B images, with ``coords`` (B, K, N, 2) and ``labels`` (B, K, N).

    Returns logits (BK, 4, S/4, S/4) and predicted quality (BK, 4): the single mask, then the three masks for
    ambiguous prompts.
    """
    embedding, fine = features
    count = coords.shape[1]
    points = (coords.flatten(0, 1), labels.flatten(0, 1))  # (BK, N, 2), (BK, N)
    sparse, dense = model.sam_prompt_encoder(points=points, boxes=None, masks=None)
    logits, quality, _, _ = model.sam_mask_decoder.predict_masks(
        image_embeddings=embedding.repeat_interleave(count, 0),
        image_pe=model.sam_prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        repeat_image=False,
        high_res_features=[level.repeat_interleave(count, 0) for level in fine],
    )
    return logits, quality


def outline_loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return SAM's loss, 20 x focal + dice: logits (..., h, w), target (..., h, w) in [0, 1] -> (...)."""
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    inside = logits.sigmoid()
    missed = inside + target - 2 * inside * target  # 1 - probability of the truth
    share = 0.25 * target + 0.75 * (1 - target)
    focal = (share * missed.square() * entropy).mean((-2, -1))
    both = (inside * target).sum((-2, -1))
    dice = 1 - (2 * both + 1) / (inside.sum((-2, -1)) + target.sum((-2, -1)) + 1)
    return 20 * focal + dice


def true_quality(masks: torch.Tensor, regions: torch.Tensor, worth: torch.Tensor) -> torch.Tensor:
    """Return the best IoU x worth: masks (n, M, h, w), regions (n, R, h, w), worth (n, R) -> (n, M)."""
    a, b = masks.flatten(2).float(), regions.flatten(2).float()
    both = a @ b.mT  # (n, M, h·w) @ (n, h·w, R) -> (n, M, R)
    either = a.sum(2)[:, :, None] + b.sum(2)[:, None] - both
    return (both / either.clamp(min=1) * worth[:, None]).amax(2)


def loss(model: Any, batch: Batch) -> tuple[torch.Tensor, dict[str, float]]:
    """Return a batch's loss, and the values to watch.

    These are the outline loss and the error of the predicted quality over all prompts, and the true quality
    of the mask with the highest predicted quality: at a point on a lesion, and without a prompt.

    The outline loss trains the best of the three masks and, for prompts of several points, also the single
    mask. The quality loss trains all four masks. The true quality of a single point's mask is the best over
    all regions that contain the point.
    """
    features = encode(model, batch.images)
    half = F.avg_pool2d(batch.regions.float(), 2)  # (B, R, S/2, S/2)
    small = F.avg_pool2d(half, 2)  # (B, R, S/4, S/4)
    outlines, errors, watched = [], [], {}
    for coords, labels, aims in zip(batch.coords, batch.labels, batch.aims, strict=True):
        logits, predicted = decode(model, features, coords, labels)  # (n, 4, S/4, S/4), (n, 4)
        count, length = coords.shape[1:3]
        meant = aims.flatten()
        valid, rows = meant >= 0, torch.arange(len(meant), device=meant.device)
        image = rows // count
        worth = batch.worth[image] * valid[:, None]  # (n, R)
        chosen = F.one_hot(meant.clamp(min=0), worth.shape[1])
        if length == 1:
            x, y = coords.flatten(0, 1)[:, 0].long().clamp(0, IMAGE_SIZE - 1).unbind(1)
            at_point = batch.regions[image, :, y, x].clone()
            at_point[:, 0] = False
            is_point = (labels.flatten(0, 1)[:, :1] == 1)
            worth = worth * torch.where(is_point, at_point, chosen.bool())
        else:
            worth = worth * chosen
        with torch.no_grad():
            quality = true_quality(logits > 0, small[image] >= 0.5, worth)  # (n, 4)
            low = small[image, meant.clamp(min=0)][:, None]  # (n, 1, S/4, S/4)
            best = outline_loss(logits[:, 1:], low.expand(-1, 3, -1, -1)).argmin(1) + 1  # (n,)
        target = half[image, meant.clamp(min=0)][valid]  # (v, S/2, S/2)
        columns = [best] if length == 1 else [best, torch.zeros_like(best)]
        for column in columns:
            full = F.interpolate(logits[valid, column[valid]][:, None], target.shape[1:], mode="bilinear")[:, 0]
            outlines.append(outline_loss(full, target) / len(columns))
        errors.append((predicted - quality).abs().mean(1))
        picked = quality[:, 1:].gather(1, predicted[:, 1:].argmax(1, keepdim=True))[:, 0]
        if length == 1:
            for name, column in (("point", 0), ("none", 2)):
                watched[name] = float(picked.view(-1, count)[:, column][valid.view(-1, count)[:, column]].mean())
    outline, off = torch.cat(outlines).mean(), torch.cat(errors).mean()
    watched |= {"outline": float(outline.detach()), "off": float(off.detach())}
    return outline + 2 * off, watched


def train(
    pool: Pool,
    seed: int,
    out: Path,
    *,
    pairs: Pairs | None,
    steps: int,
    batch_size: int = 8,
    lr: float = 6e-4,
    warmup: int = 200,
    weight_decay: float = 0.02,
    workers: int = 0,
    device: str = "cpu",
    line: int = 0,
) -> None:
    """Train from ImageNet weights of the trunk and write the image modules to ``out``, safetensors, float16.

    Raises ValueError if an interrupted training has other settings; see ``loop.train_and_write``.
    """
    model = load_predictor("pocket", f"random:{seed}", IMAGE_SIZE, device=device)[0].model
    net = model.image_encoder.trunk.net
    state = imagenet_state()
    net.load_state_dict({name: state[name] for name in net.state_dict()})
    model.train()
    trained = {k: v for k, v in model.named_parameters() if k.startswith(IMAGE_MODULES)}
    frozen = tuple(
        f"image_encoder.trunk.net.{name}." for name in ("conv_stem", "bn1", *(f"blocks.{i}" for i in range(FROZEN_STAGES)))
    )
    trained = {k: v for k, v in trained.items() if not k.startswith(frozen)}
    for parameter in trained.values():
        parameter.requires_grad_(True)

    def finished() -> dict[str, torch.Tensor]:
        steepen(model, STEEPNESS)
        return {k: v for k, v in model.state_dict().items() if k.startswith(IMAGE_MODULES)}

    sources = sorted({row.source for row in pairs.rows}) if pairs else []
    train_and_write(
        "pocket SAM2",
        out,
        Settings(seed, len(pool), len(pairs.rows) if pairs else 0, steps, batch_size, lr, warmup, weight_decay, clip=0.1),
        f"{pool.name}; {len(sources)} sources of pairs" if pairs else pool.name,
        model,
        trained,
        Batches(pool, pairs, seed, batch_size),
        lambda batch: loss(model, batch.to(device)),
        finished,
        workers=workers,
        line=line,
    )


def steepen(model: Any, factor: float) -> None:
    """Multiply all mask logits of a model by ``factor``, through its last layers and in place."""
    with torch.no_grad():
        for network in model.sam_mask_decoder.output_hypernetworks_mlps:
            network.layers[-1].weight *= factor
            network.layers[-1].bias *= factor
