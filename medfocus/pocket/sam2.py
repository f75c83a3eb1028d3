"""Training of the pocket SAM2: points and boxes prompt it for the outlines of lesions and anatomy.

The network is the sam2 package's (arXiv 2408.00714) in the configuration "pocket", without the modules for
video.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import Dataset

from medfocus.masks.sam2.model import IMAGE_MODULES, load_predictor
from medfocus.pocket.loop import Settings, train_and_write
from medfocus.pocket.pool import MOST_REGIONS, Drawn, Pool

IMAGE_SIZE = 128  # pixels a side of the model's input
POINTS, BOXES = 4, 1  # prompts per image, which share its encoding
LESION_SHARE = 0.65  # of the prompts with a region; anatomy is easier to learn
# Factors of the IoU that the quality head learns. Anatomy stays below the limit of a chosen mask (0.7). An
# unprompted segmenter therefore chooses a lesion if it finds any, and otherwise anatomy, as "relaxed".
LESION_WORTH, ANATOMY_WORTH = 1.0, 0.45
# Factor of the mask logits. Stability compares logits > 1 with logits > -1, and at 32 px a side (SAM2: 256)
# most of a lesion is rim. The factor changes no mask; as a power of two it keeps every digit of a weight.
STEEPNESS = 4.0
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # as SAM2's transforms


@dataclass(frozen=True, eq=False)
class Batch:
    """B images of side S with their regions and prompts; R regions, P points and Q boxes per image."""

    images: torch.Tensor  # (B, S, S) float32 in [0, 1]
    regions: torch.Tensor  # (B, R, S, S) bool; all False where an image has fewer than R
    worth: torch.Tensor  # (B, R) float32: LESION_WORTH, ANATOMY_WORTH, or 0 for no region
    points: torch.Tensor  # (B, P, 1, 2) float32, (x, y) in pixels of S
    point_targets: torch.Tensor  # (B, P) int64: index of the region meant, -1 for none
    boxes: torch.Tensor  # (B, Q, 2, 2) float32: top left and bottom right, (x, y) in pixels of S
    box_targets: torch.Tensor  # (B, Q) int64

    def to(self, device: str) -> Batch:
        """Move the batch to a device."""
        return Batch(*(getattr(self, field.name).to(device) for field in fields(self)))


class Batches(Dataset[Batch]):
    """The batches of a training. Seed and index determine a batch, in every process."""

    def __init__(self, pool: Pool, seed: int, batch_size: int) -> None:
        self.pool, self.seed, self.batch_size = pool, seed, batch_size

    def __getitem__(self, index: int) -> Batch:
        """Crop, flip and prompt ``batch_size`` images."""
        rows = []
        for number in range(index * self.batch_size, (index + 1) * self.batch_size):
            rng = np.random.default_rng([self.seed, number])
            rows.append(sample(self.pool[self.pool.order(self.seed, number)], rng))
        return Batch(*(torch.from_numpy(np.stack(column)) for column in zip(*rows, strict=True)))


def sample(drawn: Drawn, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Make one row of a ``Batch``."""
    size, whole = IMAGE_SIZE, len(drawn.image)
    side = whole if rng.random() < 0.5 else int(rng.uniform(0.7, 1.0) * whole)
    left, top = (int(v) for v in rng.integers(0, whole - side + 1, 2))
    turn = slice(None, None, -1 if rng.random() < 0.5 else 1)

    def view(plane: np.ndarray) -> np.ndarray:
        image = Image.fromarray(plane[top : top + side, left : left + side])
        resized = image.resize((size, size), Image.Resampling.BILINEAR)
        return np.asarray(resized, np.float32)[:, turn] / 255

    tone = view(drawn.image) ** np.exp(rng.normal(0, 0.25))
    tone = (tone - 0.5) * np.exp(rng.normal(0, 0.15)) + 0.5 + rng.normal(0, 0.05)
    tone = tone + rng.uniform(0, 0.03) * rng.standard_normal(tone.shape)
    regions = np.zeros((MOST_REGIONS, size, size), bool)
    worth = np.zeros(MOST_REGIONS, np.float32)
    for i, plane in enumerate(drawn.regions):
        region = view(plane.astype(np.uint8) * np.uint8(255)) > 0.5
        if region.sum() >= 32:  # a crop may leave a few pixels, which are no region
            regions[i], worth[i] = region, ANATOMY_WORTH if i else LESION_WORTH

    points = rng.uniform(0, size, (POINTS, 1, 2)).astype(np.float32)
    point_targets = np.zeros(POINTS, np.int64)
    for k in range(POINTS):
        meant = _meant(worth, rng) if k < POINTS - 1 else -1  # the last point is anywhere
        inside = regions[meant] & ~regions[0] if meant > 0 else regions[meant]
        if meant >= 0 and inside.any():
            place = rng.choice(np.flatnonzero(inside))
            points[k, 0] = np.array([place % size, place // size]) + rng.uniform(0, 1, 2)
        x, y = points[k, 0].astype(int).clip(0, size - 1)
        here = np.flatnonzero(regions[:, y, x])
        point_targets[k] = here[0] if len(here) else -1

    boxes = np.zeros((BOXES, 2, 2), np.float32)
    box_targets = np.array([_meant(worth, rng) for _ in range(BOXES)], np.int64)
    for k, meant in enumerate(box_targets):
        if meant < 0:
            boxes[k] = np.sort(rng.uniform(0, size, (2, 2)), axis=0)
            continue
        rows, columns = (np.flatnonzero(regions[meant].any(axis)) for axis in (1, 0))
        corners = np.array([[columns[0], rows[0]], [columns[-1] + 1, rows[-1] + 1]], np.float32)
        jitter = rng.normal(0, 0.08, (2, 2)) * (corners[1] - corners[0])
        boxes[k] = (corners + jitter.clip(-12, 12)).clip(0, size)
    return tone.clip(0, 1).astype(np.float32), regions, worth, points, point_targets, boxes, box_targets


def _meant(worth: np.ndarray, rng: np.random.Generator) -> int:
    """Draw the region of a prompt, or return -1 if there is no region.

    In an image with a lesion and anatomy, the lesion has the probability ``LESION_SHARE``.
    """
    anatomy = np.flatnonzero(worth[1:]) + 1
    if worth[0] and (not len(anatomy) or rng.random() < LESION_SHARE):
        return 0
    return int(rng.choice(anatomy)) if len(anatomy) else -1


def encode(model: Any, images: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Encode images (B, S, S) in [0, 1]: embedding (B, d, S/16, S/16), finer levels at S/4 and S/8.

    This is ``SAM2ImagePredictor.set_image_batch`` with gradients.
    """
    mean, std = (torch.tensor(v, device=images.device)[:, None, None] for v in (_MEAN, _STD))
    pixels = ((images[:, None] - mean) / std).contiguous(memory_format=torch.channels_last)  # (B, 3, S, S)
    _, levels, _, sizes = model._prepare_backbone_features(model.forward_image(pixels))
    levels[-1] = levels[-1] + model.no_mem_embed
    maps = [
        level.permute(1, 2, 0).reshape(len(images), -1, *size)
        for level, size in zip(levels, sizes, strict=True)
    ]
    return maps[-1], maps[:-1]


def decode(
    model: Any, features: tuple[torch.Tensor, list[torch.Tensor]], coords: torch.Tensor, labels: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode K prompts for each of B images, with ``coords`` (B, K, N, 2) and ``labels`` of their N points.

    Returns logits (BK, 4, S/4, S/4) and predicted quality (BK, 4): the single mask, then the three masks for
    ambiguous prompts.
    """
    embedding, fine = features
    count = coords.shape[1]
    coords = coords.flatten(0, 1)  # (BK, N, 2)
    points = (coords, torch.tensor(labels, device=coords.device).expand(len(coords), -1))
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
    """Return a batch's loss, and the values to watch: "outline", "off", "best" and "picked".

    These are the outline loss, the error of the predicted quality, and the true quality of the best mask and
    of the mask with the highest predicted quality.

    The outline loss trains the best of the three masks and, for boxes, the single mask. The quality loss
    trains all four masks. The true quality of a point's mask is the best over all regions that contain the
    point.
    """
    features = encode(model, batch.images)
    halves = F.avg_pool2d(batch.regions.float(), 2) >= 0.5  # (B, R, S/2, S/2)
    total, watched = torch.zeros((), device=batch.images.device), {}
    prompts = ((batch.points, batch.point_targets, (1,)), (batch.boxes, batch.box_targets, (2, 3)))
    for coords, targets, labels in prompts:
        logits, predicted = decode(model, features, coords, labels)  # (n, 4, S/4, S/4), (n, 4)
        count, aims = coords.shape[1], targets.flatten()
        valid = aims >= 0
        regions = batch.regions.repeat_interleave(count, 0)  # (n, R, S, S)
        target = regions[torch.arange(len(aims), device=aims.device), aims.clamp(min=0)].float()  # (n, S, S)
        chosen = F.one_hot(aims.clamp(min=0), MOST_REGIONS)
        worth = batch.worth.repeat_interleave(count, 0) * valid[:, None]  # (n, R)
        if len(labels) == 1:
            x, y = coords.flatten(0, 1)[:, 0].long().clamp(0, IMAGE_SIZE - 1).unbind(1)
            worth = worth * regions[torch.arange(len(aims), device=aims.device), :, y, x]
        else:
            worth = worth * chosen

        with torch.no_grad():
            half = F.interpolate(logits, scale_factor=2, mode="bilinear") > 0  # (n, 4, S/2, S/2)
            quality = true_quality(half, halves.repeat_interleave(count, 0), worth)  # (n, 4)
            small = F.avg_pool2d(target[:, None], 4)  # (n, 1, S/4, S/4)
            best = outline_loss(logits[:, 1:], small.expand(-1, 3, -1, -1)).argmin(1) + 1  # (n,)
        columns = [best] if len(labels) == 1 else [best, torch.zeros_like(best)]
        rows = valid.nonzero()[:, 0]
        outline = torch.zeros_like(total)
        for column in columns:
            full = F.interpolate(logits[rows, column[rows]][:, None], target.shape[1:], mode="bilinear")[:, 0]
            outline = outline + outline_loss(full, target[rows]).sum() / len(columns)
        share = count / (POINTS + BOXES)
        outline = outline / max(1, len(rows))
        off = (predicted - quality).abs().mean()
        total = total + share * (outline + 2 * off)

        if len(labels) == 1:
            lesion = valid & (aims == 0)
            picked = quality[:, 1:].gather(1, predicted[:, 1:].argmax(1, keepdim=True))[:, 0]
            watched = {
                "outline": float(outline.detach()),
                "off": float(off.detach()),
                "best": float(quality[lesion, 1:].amax(1).mean()),
                "picked": float(picked[lesion].mean()),
            }
    return total, watched


def train(
    pool: Pool,
    seed: int,
    out: Path,
    *,
    steps: int,
    batch_size: int = 8,
    lr: float = 8e-4,
    warmup: int = 200,
    weight_decay: float = 0.02,
    workers: int = 0,
    device: str = "cpu",
    line: int = 0,
) -> None:
    """Train from random weights and write the image modules to ``out`` as safetensors, float16.

    Raises ValueError if an interrupted training has other settings; see ``loop.train_and_write``.
    """
    model = load_predictor("pocket", f"random:{seed}", IMAGE_SIZE, device=device)[0].model.train()
    trained = {k: v for k, v in model.named_parameters() if k.startswith(IMAGE_MODULES)}
    for parameter in trained.values():
        parameter.requires_grad_(True)

    def finished() -> dict[str, torch.Tensor]:
        steepen(model, STEEPNESS)
        return {k: v for k, v in model.state_dict().items() if k.startswith(IMAGE_MODULES)}

    train_and_write(
        "pocket SAM2",
        out,
        Settings(seed, len(pool), steps, batch_size, lr, warmup, weight_decay, clip=0.1),
        pool.name,
        model,
        trained,
        Batches(pool, seed, batch_size),
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
