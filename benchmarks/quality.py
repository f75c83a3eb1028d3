"""The quality of masks on a data set with known regions: SAM2, Otsu, and a box in the centre.

Prints the mean Dice and IoU with 95 % intervals (bootstrap over images), by class and over all images, of

    interest     the automatic mask of the strategy "interest", if the model has learnt it
    grid         the automatic mask of the strategy "grid"
    one point    the union of the masks of the innermost point of each connected part of the region
    two points   the same with a second point, innermost in the larger of two areas: the area that the first
                 mask misses (inside the region), and the area that it has too much of (outside)
    box          the union of the masks of the bounding box of each connected part
    otsu         the segmenter without weights
    centre box   the box in the centre with half of the image's area

    python -m benchmarks.quality --root data/tb_cxr --keep 2
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from medfocus.images import decode
from medfocus.masks.factory import build_sam2
from medfocus.masks.otsu import OtsuSegmenter
from medfocus.masks.quality import center_box, dice, iou, known_region, masks_of_a_reader
from medfocus.masks.sam2.model import learns_interest
from medfocus.masks.settings import OtsuSettings, Sam2Settings


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, required=True, help="all|split/class/*.jpg|png, and masks/")
    parser.add_argument("--keep", type=int, default=1, help="regions that a mask unites; 2 for two lungs")
    parser.add_argument("--config", default="pocket")
    parser.add_argument("--checkpoint", default="pocket")
    parser.add_argument("--image-size", type=int, help="default: that of the configuration")
    parser.add_argument("--points-per-side", type=int, default=8)
    parser.add_argument("--follow-edges", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--per-class", type=int, help="largest number of images of a class")
    options = parser.parse_args()
    segmenters = {
        strategy: build_sam2(
            Sam2Settings(
                options.config, options.checkpoint, options.image_size, strategy,
                points_per_side=options.points_per_side, keep=options.keep, follow_edges=options.follow_edges,
            )
        )
        for strategy in (["interest"] if learns_interest(options.config) else []) + ["grid"]
    }  # fmt: skip
    otsu = OtsuSegmenter(OtsuSettings(options.keep))
    scores: dict[str, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for label, image, region in tqdm(_images(options.root, options.per_class), unit="image", disable=None):
        masks = {
            **{name: sam2.segment([image])[0].region for name, sam2 in segmenters.items()},
            **masks_of_a_reader(segmenters["grid"], image, region),
            "otsu": otsu.segment([image])[0].region,
            "centre box": center_box(*region.shape),
        }
        for name, mask in masks.items():
            pair = dice(mask, region), iou(mask, region)
            scores[label][name].append(pair)
            scores["all"][name].append(pair)
    table = {}
    for label, by_name in scores.items():
        for name, pairs in by_name.items():
            d, i = (_interval(values) for values in zip(*pairs, strict=True))
            table[f"{label}, {name}"] = {"images": len(pairs), "dice": d, "iou": i}
            print(f"{label:14} {name:11} {len(pairs):4} images  Dice {_text(d)}  IoU {_text(i)}")
    print(json.dumps({"root": options.root.name, **table}))


def _images(root: Path, per_class: int | None) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Return label, image (H, W, 3) uint8 and region (H, W) bool of every image with a region."""
    examples: dict[str, list[tuple[str, np.ndarray, np.ndarray]]] = defaultdict(list)
    for path in sorted(p for p in root.rglob("*") if p.suffix.lower() in (".jpg", ".png")):
        inside = path.relative_to(root)
        if inside.parts[0] == "masks" or len(examples[path.parent.name]) == per_class:
            continue
        image = decode.read(path)
        region = known_region(root, str(inside), *image.shape[:2])
        if region is not None:
            examples[path.parent.name].append((path.parent.name, image, region))
    if not any(examples.values()):
        raise SystemExit(f"{root}: no image has a region in {root / 'masks'}.")
    return [each for members in examples.values() for each in members]


def _interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean and its 95 % percentile bootstrap interval over images."""
    rng = np.random.default_rng(0)
    means = rng.choice(np.asarray(values), (2000, len(values))).mean(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return round(float(np.mean(values)), 3), round(float(low), 3), round(float(high), 3)


def _text(interval: tuple[float, float, float]) -> str:
    mean, low, high = interval
    return f"{mean:.3f} [{low:.3f}, {high:.3f}]"


if __name__ == "__main__":
    main()
