"""CLIP's features from image files, compared with a bare loop over `encode_image`.

The pipeline reads and decodes files, makes views in threads, encodes and fills a cache. The reference runs
the same model on tensors in memory, in batches of the same size. Random weights do not affect the time. Both
alternate, so that a slower machine affects both. The ratio of the image rates is the median over repetitions,
with one thread of PyTorch. Views need a second core to be free; "on one core" is the ratio of the CPU times.

    python -m benchmarks.features
    python -m benchmarks.features --root data/covid19 --models ViT-B-32
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from medfocus import phantoms
from medfocus.clip import features
from medfocus.clip.build import build_clip
from medfocus.clip.encoder import ClipEncoder
from medfocus.focus.view import view
from medfocus.images import decode

LEAST = 0.9  # the target, times the bare loop's image rate
LOUD = 0.2  # a shortfall of this share is a regression
ROUNDS = {"pocket": 8}  # passes over all images in a repetition; 1 for the slower models


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, help="a folder of images; default: phantoms as JPEG")
    parser.add_argument("--size", type=int, default=512, help="pixels a side of the phantoms")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--workers", type=int, default=2, help="threads that make views")
    parser.add_argument("--models", nargs="+", default=["ViT-B-32", "ViT-B-16", "pocket"])
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    options = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, object] = {"images": options.images, "batch_size": options.batch_size}
    with tempfile.TemporaryDirectory() as folder:
        root = options.root or _draw(Path(folder, "images"), options.images, options.size)
        paths = _pick(root, options.images)
        for model in options.models:
            clip = build_clip(model, "random:0")
            ratio, measured = _compare(clip, paths, options, Path(folder, "cache"))
            name = model.lower().replace("-", "_")
            result |= {f"ratio_{name}": ratio, **{f"{key}_{name}": value for key, value in measured.items()}}
            print(
                f"{model}: {len(paths)} images, {measured['bare_ms']} ms per image in the bare loop, "
                f"{measured['job_ms']} ms from files, {measured['forward']:.0%} of them in forward; a view "
                f"takes {measured['view_ms']} ms of one thread\nratio {ratio:.3f} "
                f"({measured['one_core']} on one core), at least {LEAST}: {_verdict(ratio)}",
                flush=True,
            )
    if options.json:
        print(json.dumps(result))


def _compare(
    clip: ClipEncoder, paths: Sequence[Path], options: argparse.Namespace, cache: Path
) -> tuple[float, dict[str, float]]:
    """Return the ratio of the rates from files and in the bare loop, and its parts in ms per image."""
    rounds = ROUNDS.get(clip.name, 1)
    items = list(paths) * rounds
    forward = 0.0

    def made(path: Path) -> np.ndarray:
        return view(decode.read(path), None, focus="none", frame=clip.frame, feather=0.01)

    def encoded(pixels: torch.Tensor) -> torch.Tensor:
        nonlocal forward
        began = time.perf_counter()
        result = clip.encode_images(pixels)
        forward += time.perf_counter() - began
        return result

    def bare() -> None:
        for _ in range(rounds):
            for start in range(0, len(ready), options.batch_size):
                clip.encode_images(ready[start : start + options.batch_size])

    def job(settings: str) -> None:
        features.encode(
            items,
            [f"{i} {path}" for i, path in enumerate(items)],
            made,
            lambda views: encoded(clip.preprocess(views)),
            cache=cache,
            settings=settings,
            batch_size=options.batch_size,
            workers=options.workers,
        )

    began = time.process_time()
    ready = clip.preprocess(np.stack([made(path) for path in paths]))  # (N, 3, S, S)
    views = time.process_time() - began
    clip.encode_images(ready[: options.batch_size])  # the first pass plans
    seconds = []
    for repeat in range(options.repeats):
        clocks = [(time.perf_counter(), time.process_time())]
        bare()
        clocks.append((time.perf_counter(), time.process_time()))
        job(f"{clip.key} {repeat}")  # with an empty cache
        clocks.append((time.perf_counter(), time.process_time()))
        seconds.append(np.diff(clocks, axis=0))
    bare_s, job_s = np.moveaxis(np.array(seconds), 1, 0)  # (R, 2) each: wall and processor time
    ratio, one_core = np.median(bare_s / job_s, axis=0)
    milliseconds = [1e3 * float(np.median(part[:, 0])) / len(items) for part in (bare_s, job_s)]
    return round(float(ratio), 3), {
        "one_core": round(float(one_core), 3),
        "bare_ms": round(milliseconds[0], 2),
        "job_ms": round(milliseconds[1], 2),
        "view_ms": round(1e3 * views / len(paths), 2),
        "forward": round(forward / float(job_s[:, 0].sum()), 3),
    }


def _verdict(ratio: float) -> str:
    if ratio >= LEAST:
        return "reached"
    short = f"FALLS SHORT by {LEAST - ratio:.3f}"
    return f"{short}, MORE THAN {LOUD:.0%} BELOW ITS TARGET" if ratio < (1 - LOUD) * LEAST else short


def _draw(folder: Path, count: int, size: int) -> Path:
    folder.mkdir()
    for i in range(count):
        rng = phantoms.generator(0, "chest_xray", "train", "normal", i)
        image = phantoms.draw("chest_xray", "normal", rng, size).image
        Image.fromarray(image).save(folder / f"{i:05}.jpg", quality=90)
    return folder


def _pick(root: Path, count: int) -> list[Path]:
    """Return up to ``count`` images below a folder, evenly spaced."""
    suffixes = (".png", ".jpg", ".jpeg")
    images = sorted(p for p in root.rglob("*") if p.suffix.lower() in suffixes and "masks" not in p.parts)
    if not images:
        raise SystemExit(f"{root} has no PNG or JPEG. Give --root the folder of a data set.")
    return images[:: max(1, len(images) // count)][:count]


if __name__ == "__main__":
    main()
