"""Train the pocket SAM2 on drawn pictures: points and boxes in lesions and anatomy -> their outlines.

The network is the sam2 package's own (arXiv 2408.00714), as ``medfocus.masks.sam2`` builds it from the
configuration "pocket". It sees phantoms alone, each drawn once, from a seed that no data set uses.

``python -m medfocus.pocket --seed 0 --steps 3000 --out FILE`` trains; ``--measure N`` measures the weights
of ``--out`` on N held-out pictures a class; ``--sheet PNG`` shows the masks that they choose unprompted.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save
from scipy import ndimage
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from medfocus import phantoms
from medfocus.masks.sam2 import _PICTURE_PATH, Prompts, Sam2Segmenter, build_segmenter, load_predictor
from medfocus.report import mask_sheet

IMAGE_SIZE = 128  # pixels a side that the model sees
DRAWN_SIZE = 160  # pixels a side as drawn, from which crops are taken
TRAIN_SEED, HELD_OUT_SEED = 1_000_000, 2_000_000  # of phantoms.generator; data sets use small ones
MOST_REGIONS = 4  # the lesion first, then the anatomy
POINTS, BOXES = 6, 2  # prompts a picture: they share its encoding

# The quality head learns IoU x this. Anatomy stays under the least quality of a chosen mask (0.7), so an
# unprompted choice takes a lesion wherever it finds one, and anatomy, as "relaxed", only where it does not.
LESION_WORTH, ANATOMY_WORTH = 1.0, 0.6

# Stability compares logits > 1 with logits > -1. SAM2's masks have 256 px a side, these 32: most of a lesion
# is rim. Logits this much steeper leave every mask as it is; a power of two also every digit of a weight.
STEEPNESS = 4.0

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # as SAM2's transforms
_SAVE_EVERY = 60.0  # seconds
_SHEET_COLOURS = 32


@dataclass(frozen=True, eq=False)
class Batch:
    """B pictures of side S with their regions and prompts; R regions, P points and Q boxes a picture."""

    pictures: torch.Tensor  # (B, S, S) float32 in [0, 1]
    regions: torch.Tensor  # (B, R, S, S) bool; all False where a picture has fewer than R
    worth: torch.Tensor  # (B, R) float32: LESION_WORTH, ANATOMY_WORTH, or 0 for no region
    points: torch.Tensor  # (B, P, 1, 2) float32, (x, y) in pixels of S
    point_targets: torch.Tensor  # (B, P) int64: index of the region meant, -1 for none
    boxes: torch.Tensor  # (B, Q, 2, 2) float32: top left and bottom right, (x, y) in pixels of S
    box_targets: torch.Tensor  # (B, Q) int64


class PhantomBatches(Dataset[Batch]):
    """Batch n of the stream that ``seed`` names. The same n gives the same batch in every process."""

    def __init__(self, seed: int, batch_size: int) -> None:
        self.seed, self.batch_size = seed, batch_size
        self.classes = [(name, label) for name, labels in phantoms.MODALITIES.items() for label in labels]

    def __getitem__(self, index: int) -> Batch:
        """Draw, crop, flip and prompt ``batch_size`` pictures, modalities and classes in turn."""
        rows = []
        for number in range(index * self.batch_size, (index + 1) * self.batch_size):
            modality, label = self.classes[number % len(self.classes)]
            rng = phantoms.generator(TRAIN_SEED + self.seed, modality, "pocket", label, number)
            rows.append(_sample(phantoms.draw(modality, label, rng, DRAWN_SIZE), rng))
        return Batch(*(torch.from_numpy(np.stack(column)) for column in zip(*rows, strict=True)))


def _sample(phantom: phantoms.Phantom, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """One row of a ``Batch``."""
    size, drawn = IMAGE_SIZE, len(phantom.picture)
    side = drawn if rng.random() < 0.5 else int(rng.uniform(0.7, 1.0) * drawn)
    left, top = (int(v) for v in rng.integers(0, drawn - side + 1, 2))
    turn = slice(None, None, -1 if rng.random() < 0.5 else 1)

    def view(plane: np.ndarray) -> np.ndarray:
        image = Image.fromarray(plane[top : top + side, left : left + side])
        resized = image.resize((size, size), Image.Resampling.BILINEAR)
        return np.asarray(resized, np.float32)[:, turn] / 255

    tone = view(phantom.picture) ** np.exp(rng.normal(0, 0.25))
    tone = (tone - 0.5) * np.exp(rng.normal(0, 0.15)) + 0.5 + rng.normal(0, 0.05)
    tone = tone + rng.uniform(0, 0.03) * rng.standard_normal(tone.shape)
    regions = np.zeros((MOST_REGIONS, size, size), bool)
    worth = np.zeros(MOST_REGIONS, np.float32)
    for i, plane in enumerate([phantom.region, *phantom.parts.values()][:MOST_REGIONS]):
        region = view(plane.astype(np.uint8) * np.uint8(255)) > 0.5
        if region.sum() >= 32:  # what a crop leaves of less is no region
            regions[i], worth[i] = region, ANATOMY_WORTH if i else LESION_WORTH

    points = rng.uniform(0, size, (POINTS, 1, 2)).astype(np.float32)
    point_targets = np.zeros(POINTS, np.int64)
    for k in range(POINTS):
        meant = _meant(worth, rng) if k < POINTS - 2 else -1  # the last two fall anywhere
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
    """The region of a prompt: the lesion as often as all anatomy together; -1 where there is nothing."""
    anatomy = np.flatnonzero(worth[1:]) + 1
    if worth[0] and (not len(anatomy) or rng.random() < 0.5):
        return 0
    return int(rng.choice(anatomy)) if len(anatomy) else -1


def encode(model: Any, pictures: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Pictures (B, S, S) in [0, 1] -> embedding (B, d, S/16, S/16), finer levels at S/4 and S/8.

    As ``SAM2ImagePredictor.set_image_batch`` does, but with gradients.
    """
    mean, std = (torch.tensor(v)[:, None, None] for v in (_MEAN, _STD))
    pixels = ((pictures[:, None] - mean) / std).contiguous(memory_format=torch.channels_last)  # (B, 3, S, S)
    _, levels, _, sizes = model._prepare_backbone_features(model.forward_image(pixels))
    levels[-1] = levels[-1] + model.no_mem_embed
    maps = [
        level.permute(1, 2, 0).reshape(len(pictures), -1, *size)
        for level, size in zip(levels, sizes, strict=True)
    ]
    return maps[-1], maps[:-1]


def decode(
    model: Any, features: tuple[torch.Tensor, list[torch.Tensor]], coords: torch.Tensor, labels: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """K prompts of each of B pictures, ``coords`` (B, K, N, 2) and ``labels`` of their N points.

    Returns logits (BK, 4, S/4, S/4) and predicted quality (BK, 4): the mask for unambiguous prompts, then
    the three for ambiguous ones.
    """
    embedding, fine = features
    count = coords.shape[1]
    coords = coords.flatten(0, 1)  # (BK, N, 2)
    points = (coords, torch.tensor(labels).expand(len(coords), -1))
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
    """20 x focal + dice, SAM's loss. logits (..., h, w), target (..., h, w) in [0, 1] -> (...)."""
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    inside = logits.sigmoid()
    missed = inside + target - 2 * inside * target  # 1 - the probability of the truth
    share = 0.25 * target + 0.75 * (1 - target)
    focal = (share * missed.square() * entropy).mean((-2, -1))
    both = (inside * target).sum((-2, -1))
    dice = 1 - (2 * both + 1) / (inside.sum((-2, -1)) + target.sum((-2, -1)) + 1)
    return 20 * focal + dice


def true_quality(masks: torch.Tensor, regions: torch.Tensor, worth: torch.Tensor) -> torch.Tensor:
    """The best IoU x worth over regions. masks (n, M, h, w), regions (n, R, h, w), worth (n, R) -> (n, M)."""
    a, b = masks.flatten(2).float(), regions.flatten(2).float()
    both = a @ b.mT  # (n, M, h·w) @ (n, h·w, R) -> (n, M, R)
    either = a.sum(2)[:, :, None] + b.sum(2)[:, None] - both
    return (both / either.clamp(min=1) * worth[:, None]).amax(2)


def loss(model: Any, batch: Batch) -> tuple[torch.Tensor, dict[str, float]]:
    """Loss of a batch and what to watch: outline and quality loss, quality of the best and the picked mask.

    The outline of the best of the three masks is trained (and, for boxes, the single mask too); the quality
    of all four. A prompt is credited with every region that it lies in, one in none has a quality of 0.
    """
    features = encode(model, batch.pictures)
    halves = F.avg_pool2d(batch.regions.float(), 2) >= 0.5  # (B, R, S/2, S/2)
    total, watched = torch.zeros(()), {}
    prompts = ((batch.points, batch.point_targets, (1,)), (batch.boxes, batch.box_targets, (2, 3)))
    for coords, targets, labels in prompts:
        logits, predicted = decode(model, features, coords, labels)  # (n, 4, S/4, S/4), (n, 4)
        count, aims = coords.shape[1], targets.flatten()
        valid = aims >= 0
        regions = batch.regions.repeat_interleave(count, 0)  # (n, R, S, S)
        target = regions[torch.arange(len(aims)), aims.clamp(min=0)].float()  # (n, S, S)
        chosen = F.one_hot(aims.clamp(min=0), MOST_REGIONS)
        worth = batch.worth.repeat_interleave(count, 0) * valid[:, None]  # (n, R)
        if len(labels) == 1:
            x, y = coords.flatten(0, 1)[:, 0].long().clamp(0, IMAGE_SIZE - 1).unbind(1)
            worth = worth * regions[torch.arange(len(aims)), :, y, x]
        else:
            worth = worth * chosen

        with torch.no_grad():
            half = F.interpolate(logits, scale_factor=2, mode="bilinear") > 0  # (n, 4, S/2, S/2)
            quality = true_quality(half, halves.repeat_interleave(count, 0), worth)  # (n, 4)
            small = F.avg_pool2d(target[:, None], 4)  # (n, 1, S/4, S/4)
            best = outline_loss(logits[:, 1:], small.expand(-1, 3, -1, -1)).argmin(1) + 1  # (n,)
        columns = [best] if len(labels) == 1 else [best, torch.zeros_like(best)]
        rows = valid.nonzero()[:, 0]
        outline = torch.zeros(())
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
    seed: int,
    steps: int,
    out: Path,
    *,
    batch_size: int = 8,
    lr: float = 8e-4,
    warmup: int = 200,
    weight_decay: float = 0.02,
    workers: int = 1,
) -> None:
    """Train from random weights and write the picture path to ``out`` as safetensors, float16.

    Every minute the state goes to ``out`` + ".state"; started again with the same settings, training goes on
    from there. Raises ValueError where the state there is of other settings.
    """
    settings = {
        "seed": seed,
        "steps": steps,
        "batch_size": batch_size,
        "lr": lr,
        "warmup": warmup,
        "weight_decay": weight_decay,
    }
    model = load_predictor("pocket", f"random:{seed}", IMAGE_SIZE)[0].model.train()
    trained = {k: v.requires_grad_() for k, v in model.named_parameters() if k.startswith(_PICTURE_PATH)}
    groups = [
        {"params": [v for v in trained.values() if v.ndim > 1]},
        {"params": [v for v in trained.values() if v.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay)
    state_file = out.with_name(out.name + ".state")
    start, seconds = 0, 0.0
    if state_file.is_file():
        kept = torch.load(state_file, weights_only=True)
        if kept["settings"] != settings:
            raise ValueError(
                f"{state_file}: is of a training with {kept['settings']}, not {settings}. "
                "Delete it, or train with its settings."
            )
        model.load_state_dict(kept["model"])
        optimizer.load_state_dict(kept["optimizer"])
        start, seconds = kept["step"], kept["seconds"]

    batches: DataLoader[Batch] = DataLoader(
        PhantomBatches(seed, batch_size),
        batch_size=None,
        sampler=range(start, steps),
        num_workers=workers,
        prefetch_factor=8 if workers else None,
    )
    began = saved = time.monotonic()
    running: dict[str, float] = {}
    with tqdm(total=steps, initial=start, desc="pocket SAM2", unit="step", mininterval=5) as bar:
        for step, batch in enumerate(batches, start):
            for group in optimizer.param_groups:
                group["lr"] = lr * _schedule(step, steps, warmup)
            total, watched = loss(model, batch)
            optimizer.zero_grad(set_to_none=True)
            total.backward()
            torch.nn.utils.clip_grad_norm_(trained.values(), 0.1)
            optimizer.step()
            running = {k: 0.98 * running.get(k, v) + 0.02 * v for k, v in watched.items() if v == v} | {
                k: running[k] for k in running if watched[k] != watched[k]
            }
            bar.update()
            bar.set_postfix({k: f"{v:.3f}" for k, v in running.items()}, refresh=False)
            if time.monotonic() - saved > _SAVE_EVERY:
                saved = time.monotonic()
                kept = {"settings": settings, "step": step + 1, "seconds": seconds + saved - began}
                kept |= {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                _replace(state_file, lambda file, kept=kept: torch.save(kept, file))
    steepen(model, STEEPNESS)
    path = {k: v.detach().half().contiguous() for k, v in model.state_dict().items()}
    path = {k: v for k, v in path.items() if k.startswith(_PICTURE_PATH)}
    notes = {k: str(v) for k, v in settings.items()} | {
        "seconds": f"{seconds + time.monotonic() - began:.0f}",
        "data": f"phantoms, generator seed {TRAIN_SEED + seed}, name 'pocket'",
    }
    _replace(out, lambda file: file.write_bytes(save(path, notes)))
    state_file.unlink(missing_ok=True)


def steepen(model: Any, factor: float) -> None:
    """Multiply all mask logits of a model by ``factor``, in place: the last layers that make them."""
    with torch.no_grad():
        for network in model.sam_mask_decoder.output_hypernetworks_mlps:
            network.layers[-1].weight *= factor
            network.layers[-1].bias *= factor


def _schedule(step: int, steps: int, warmup: int) -> float:
    """Share of the learning rate: a linear rise over ``warmup`` steps, then a cosine to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))


def _replace(path: Path, write: Any) -> None:
    """Write a file beside ``path`` and move it there when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def measure(
    weights_file: Path, per_class: int, *, points_per_side: Sequence[int] = (4, 6, 8)
) -> dict[str, Any]:
    """Mean IoU with the lesion on held-out phantoms of 192 px, by modality; and how often a mask falls back.

    "point": of the mask that the quality head picks for one point inside, anywhere ("random") or deepest
    ("innermost"), and of the best of the three. "grid N": of the mask chosen without a prompt from
    outside from N x N points, over the pictures with a lesion, and the share of each status.
    """
    grids = {side: _segmenter(weights_file, side) for side in points_per_side}
    one = next(iter(grids.values()))
    found: dict[str, Any] = {}
    for modality, labels in phantoms.MODALITIES.items():
        held_out = [held_out_phantom(modality, label, n) for label in labels for n in range(per_class)]
        pictures = [np.repeat(p.picture[..., None], 3, 2) for p in held_out]
        ill = [i for i, p in enumerate(held_out) if p.region.any()]
        ious: dict[str, list[float]] = defaultdict(list)
        rng = np.random.default_rng(0)
        with torch.inference_mode():
            for i in ill:
                region, features = held_out[i].region, one.encode([pictures[i]])
                places = {"random": int(rng.choice(np.flatnonzero(region))), "innermost": _innermost(region)}
                for name, place in places.items():
                    xy = (np.array([place % len(region), place // len(region)]) + 0.5) / len(region)
                    point = Prompts(xy.astype(np.float32)[None, None], np.ones((1, 1), np.int32))
                    logits, quality = one.decode(features, 0, point)  # (3, S/4, S/4), (3,)
                    full = F.interpolate(torch.from_numpy(logits)[None], region.shape, mode="bilinear")[0]
                    each = [iou(mask, region) for mask in (full > 0).numpy()]
                    ious[name].append(each[int(quality.argmax())])
                    ious[f"{name}, best of three"].append(max(each))
        found[modality] = {"point": {name: _mean(values) for name, values in ious.items()}}
        well = [i for i in range(len(pictures)) if i not in ill]
        for side, segmenter in grids.items():
            masks = segmenter.segment(pictures)
            found[modality][f"grid {side}"] = {
                "iou": _mean([iou(masks[i].region, held_out[i].region) for i in ill]),
                "with a lesion": _shares([masks[i].status for i in ill]),
                "without": _shares([masks[i].status for i in well]),
            }
    return found


def sheet(weights_file: Path, points_per_side: int, per_modality: int, columns: int) -> bytes:
    """PNG of held-out phantoms with the outline of the mask chosen without a prompt from outside."""
    held_out = [
        held_out_phantom(modality, labels[n % len(labels)], 10_000 + n)
        for modality, labels in phantoms.MODALITIES.items()
        for n in range(per_modality)
    ]
    pictures = [np.repeat(p.picture[..., None], 3, 2) for p in held_out]
    masks = _segmenter(weights_file, points_per_side).segment(pictures)
    captions = [f"{p.label}: {mask.status}" for p, mask in zip(held_out, masks, strict=True)]
    png = mask_sheet(pictures, [mask.region for mask in masks], captions, columns)
    few = Image.open(io.BytesIO(png)).quantize(
        _SHEET_COLOURS, dither=Image.Dither.NONE
    )  # a third of the size
    file = io.BytesIO()
    few.save(file, "PNG", optimize=True)
    return file.getvalue()


def held_out_phantom(modality: str, label: str, index: int) -> phantoms.Phantom:
    """A picture of 192 px that neither training nor any data set uses."""
    rng = phantoms.generator(HELD_OUT_SEED, modality, "held-out", label, index)
    return phantoms.draw(modality, label, rng, 192)


def iou(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two regions (H, W) bool; 1 where both are empty."""
    return float((a & b).sum() / max(1, (a | b).sum())) if a.any() or b.any() else 1.0


def _innermost(region: np.ndarray) -> int:
    """Flat index of the pixel of a region (H, W) bool that lies deepest in it."""
    depth = np.zeros(region.shape)
    ndimage.distance_transform_edt(region, distances=depth)
    return int(depth.argmax())


def _mean(values: Sequence[float]) -> float:
    return round(float(np.mean(values)), 3)


def _shares(words: Sequence[str]) -> dict[str, float]:
    return {word: round(words.count(word) / len(words), 3) for word in sorted(set(words))}


def _segmenter(weights_file: Path, points_per_side: int) -> Sam2Segmenter:
    return build_segmenter(
        "pocket", str(weights_file), IMAGE_SIZE, "grid", points_per_side=points_per_side, batch_size=16
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Train into ``--out``; with ``--measure`` or ``--sheet``, look at the weights that are there instead."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--out", type=Path, required=True, help="safetensors")
    parser.add_argument("--workers", type=int, default=1, help="processes that draw ahead")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--measure", type=int, metavar="N", help="held-out pictures a class; prints JSON")
    parser.add_argument("--sheet", type=Path, metavar="PNG", help="contact sheet of unprompted masks")
    parser.add_argument("--points-per-side", type=int, default=8, help="of the contact sheet")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.measure is None and options.sheet is None:
        train(options.seed, options.steps, options.out, workers=options.workers)
    if options.measure is not None:
        print(json.dumps(measure(options.out, options.measure), indent=1))
    if options.sheet is not None:
        png = sheet(options.out, options.points_per_side, per_modality=12, columns=6)
        _replace(options.sheet, lambda file: file.write_bytes(png))


if __name__ == "__main__":
    main()
