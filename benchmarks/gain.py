"""From which quality of the masks on does a focus pay?

Fits `medfocusclip` with and without a focus on a data set with known regions, and prints the difference of
the accuracies in points, with 95 % t-intervals over draws: for the known regions, for regions that are spoilt
step by step, and for the automatic masks. A third of the spoilt regions is eroded, a third dilated and a
third shifted, each until its Dice with the known region is that of the level. Only images with a region take
part. In every draw, 60 % of the images can be learnt from and the others are tested; duplicates stay on one
side.

    python -m benchmarks.gain --root data/busi --flip
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.ndimage import distance_transform_edt, shift
from tqdm import tqdm

from medfocus.clip import features
from medfocus.clip.build import build_clip
from medfocus.clip.encoder import ClipEncoder
from medfocus.clip.regions import REGIONS
from medfocus.datasets.duplicates import find_duplicates, groups
from medfocus.datasets.ingest import ingest
from medfocus.evaluation.metrics import mean_interval
from medfocus.focus.view import view
from medfocus.images import decode
from medfocus.learning.method import Support
from medfocus.masks.factory import build_sam2
from medfocus.masks.quality import dice, known_region
from medfocus.masks.settings import Sam2Settings
from medfocus.methods.medfocusclip import MedFocusClip
from medfocus.serving import defaults

LEVELS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)  # Dice
LEARNT = 0.6  # of the images of a draw
FEATHER = 0.01
BATCH = 16  # views


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, required=True, help="a data set with known regions in masks/")
    parser.add_argument("--focus", nargs="+", default=["multiply", "dual-crop"])
    parser.add_argument("--percents", nargs="+", type=float, default=[5, 10, 20])
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--keep", type=int, default=1, help="regions that an automatic mask unites")
    parser.add_argument("--flip", action="store_true", help="mirror images have the same class")
    options = parser.parse_args()
    records = ingest(options.root).records
    images, regions, labels, paths = [], [], [], []
    for record in records:
        image = decode.read(options.root / record.path)
        region = known_region(options.root, record.path, *image.shape[:2])
        if region is not None and region.any():
            images.append(image)
            regions.append(region)
            labels.append(record.label)
            paths.append(record.path)
    of_path = groups(records, find_duplicates(records, options.root))
    group = np.array([of_path[path] for path in paths])
    classes, label = np.unique(labels, return_inverse=True)
    segmenter = build_sam2(Sam2Settings("pocket", "pocket", None, "interest", keep=options.keep))
    automatic = [segmenter.segment([image])[0].region for image in tqdm(images, unit="mask", disable=None)]
    masks = {f"Dice {level}": list(_spoilt(regions, level)) for level in LEVELS} | {"automatic": automatic}

    encoder = build_clip("pocket", "pocket")
    method = _method(encoder, options.flip)
    whole = _embedded(method, images, regions, "none")
    draws = list(_draws(label, group, options.percents, options.draws))
    plain = [_accuracy(method, whole, label, *draw, len(classes)) for draw in draws]
    print(f"{len(images)} images of {', '.join(classes)}; accuracy without a focus:")
    shape = (options.draws, len(options.percents))
    base = np.reshape(plain, shape)
    print("  ", "  ".join(f"{p:g} %: {_text(base[:, i])}" for i, p in enumerate(options.percents)))
    found: dict[str, Any] = {"root": options.root.name, "none": base.mean(0).round(1).tolist()}
    for name, of_images in masks.items():
        quality = float(np.mean([dice(m, r) for m, r in zip(of_images, regions, strict=True)]))
        for focus in options.focus:
            seen = encoder.with_region(focus, 0.0) if focus in REGIONS else encoder
            focused = _method(seen, options.flip)
            shown = _embedded(focused, images, of_images, focus)
            scored = [_accuracy(focused, shown, label, *draw, len(classes)) for draw in draws]
            gain = np.reshape(scored, shape) - base
            texts = [f"{p:g} %: {_text(gain[:, i], '+')}" for i, p in enumerate(options.percents)]
            print(f"{name:10} (mean Dice {quality:.2f})  {focus:10} {'  '.join(texts)}", flush=True)
            found[f"{name}, {focus}"] = {"dice": round(quality, 2), "gain": gain.mean(0).round(1).tolist()}
    print(json.dumps(found))


def _spoilt(regions: Sequence[np.ndarray], level: float) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(0)
    for number, region in enumerate(regions):
        yield (_eroded, _dilated, _shifted)[number % 3](region, level, rng) if level < 1 else region


def _eroded(region: np.ndarray, level: float, _: np.random.Generator) -> np.ndarray:
    kept = max(1, round(region.sum() * level / (2 - level)))
    return _first(-_distance(region), kept)


def _dilated(region: np.ndarray, level: float, _: np.random.Generator) -> np.ndarray:
    return _first(_distance(~region), min(region.size, round(region.sum() * (2 - level) / level)))


def _shifted(region: np.ndarray, level: float, rng: np.random.Generator) -> np.ndarray:
    """Shift a region in a random direction that keeps it in the image."""
    angle = rng.uniform(0, 2 * np.pi)
    way = np.array([np.sin(angle), np.cos(angle)])
    centre = np.argwhere(region).mean(0) / region.shape
    way = np.where(centre > 0.5, -np.abs(way), np.abs(way))
    low, high = 0.0, float(max(region.shape))
    for _ in range(12):
        middle = (low + high) / 2
        moved = _moved(region, way * middle)
        low, high = (middle, high) if dice(moved, region) > level else (low, middle)
    moved = _moved(region, way * low)
    return moved if moved.any() else region


def _moved(region: np.ndarray, by: np.ndarray) -> np.ndarray:
    return np.asarray(shift(region.astype(np.uint8), by, order=0)) > 0


def _distance(region: np.ndarray) -> np.ndarray:
    found = distance_transform_edt(region)
    assert isinstance(found, np.ndarray)
    return found


def _first(order: np.ndarray, count: int) -> np.ndarray:
    """Return a mask of the ``count`` pixels with the lowest values."""
    mask = np.zeros(order.size, bool)
    mask[np.argsort(order, axis=None, kind="stable")[:count]] = True
    return mask.reshape(order.shape)


def _method(encoder: ClipEncoder, flip: bool) -> MedFocusClip:
    settings = defaults.changed_settings("medfocusclip", "small", {"text_prior": False})
    return MedFocusClip(encoder, flip=flip, **settings)


def _embedded(
    method: MedFocusClip, images: Sequence[np.ndarray], masks: Sequence[np.ndarray], focus: str
) -> torch.Tensor:
    """Return the inputs (N, ...) of a method."""
    frame = method.encoder.frame
    return features.encode(
        range(len(images)),
        [str(i) for i in range(len(images))],
        lambda i: view(images[i], masks[i], focus=focus, frame=frame, feather=FEATHER),
        method.embed,
        cache=None,
        settings="",
        batch_size=BATCH,
    )


def _draws(
    label: np.ndarray, group: np.ndarray, percents: Sequence[float], count: int
) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """Yield the indices to learn from and to test, and the seed, of each draw and percent."""
    for seed in range(count):
        rng = np.random.default_rng(seed)
        order = rng.permutation(np.unique(group))
        learnt = np.isin(group, order[: round(LEARNT * len(order))])
        pool = [rng.permutation(np.flatnonzero(learnt & (label == k))) for k in np.unique(label)]
        for percent in percents:
            support = np.concatenate([part[: max(1, round(percent / 100 * len(part)))] for part in pool])
            yield support, np.flatnonzero(~learnt), seed


def _accuracy(
    method: MedFocusClip,
    inputs: torch.Tensor,
    label: np.ndarray,
    support: np.ndarray,
    test: np.ndarray,
    seed: int,
    classes: int,
) -> float:
    text = torch.eye(classes, method.encoder.dim)  # no text takes part in the probe
    labels = torch.from_numpy(label[support])
    method.fit(
        Support(inputs[support][None], labels, torch.arange(len(support)), text),
        torch.Generator().manual_seed(seed),
    )
    answers = method.logits(inputs[test])["probe"].argmax(1).numpy()
    return 100 * float((answers == label[test]).mean())


def _text(values: np.ndarray, sign: str = "") -> str:
    interval = mean_interval(values.tolist())
    return f"{interval.mean:{sign}.1f} ± {interval.half_width:.1f}"


if __name__ == "__main__":
    main()
