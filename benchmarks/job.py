"""Masks and features from image files, compared with the bare forward passes.

The job decodes files, segments, stores and publishes masks, makes views, and encodes them. The reference runs
the same networks with the same batches on tensors in memory. The architectures have full size and random
weights, which do not affect the time. Chunks of both alternate, so that a slower machine affects both.

    python -m benchmarks.job --root data/covid19 --images 317
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from medfocus.clip import features
from medfocus.clip.build import build_clip
from medfocus.datasets.ingest import ingest
from medfocus.focus.view import view
from medfocus.images import decode
from medfocus.masks.factory import build_sam2
from medfocus.masks.published import PublishedMasks, publish
from medfocus.masks.settings import Sam2Settings
from medfocus.masks.store import MaskStore, cache_masks

CHUNK = 32  # images before the other one runs
FEATHER = 0.01


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, required=True, help="a folder of split/class/*.png|jpg")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--image-size", type=int, default=512, help="pixels a side of SAM2's input")
    parser.add_argument("--strategy", default="grid")
    parser.add_argument("--points-per-side", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=4, help="of SAM2; a batch of CLIP is a chunk")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    arguments = parser.parse_args()

    records = ingest(arguments.root, manifest=None, patient_pattern=None).records
    step = max(1, len(records) // arguments.images)
    records = records[::step][: arguments.images]
    segmenter = build_sam2(
        Sam2Settings(
            "sam2.1_hiera_t",
            "random:0",
            arguments.image_size,
            arguments.strategy,
            points_per_side=arguments.points_per_side,
        ),
        batch_size=arguments.batch_size,
    )
    clip = build_clip("ViT-B-32", "random:0")
    seconds = {"encoder": 0.0, "decoder": 0.0, "clip": 0.0, "job masks": 0.0, "job features": 0.0}

    def bare(chunk: list[np.ndarray]) -> None:
        """Run the forward passes alone."""
        size, clip_size = arguments.image_size, clip.image_size
        for start in range(0, len(chunk), arguments.batch_size):
            count = len(chunk[start : start + arguments.batch_size])
            ready = torch.rand(count, 3, size, size)
            with torch.inference_mode():
                seconds["encoder"] += _timed(lambda ready=ready: segmenter.model.forward_image(ready))
                encoded = segmenter.encode(chunk[start : start + arguments.batch_size])  # not timed
                seconds["decoder"] += _timed(
                    lambda encoded=encoded, count=count: [
                        segmenter.decode(encoded, i, segmenter.prompts) for i in range(count)
                    ]
                )
        pixels = clip.preprocess(np.zeros((len(chunk), clip_size, clip_size, 3), np.uint8))
        seconds["clip"] += _timed(lambda: clip.encode_images(pixels))

    with tempfile.TemporaryDirectory() as folder:
        store = MaskStore(Path(folder, "masks"))
        for start in range(0, len(records), CHUNK):
            some = records[start : start + CHUNK]
            bare([decode.read(arguments.root / record.path) for record in some])
            began = time.perf_counter()
            pairs = [(record, arguments.root / record.path) for record in some]
            cache_masks(pairs, segmenter, store, batch_size=arguments.batch_size)
            publish(some, store, segmenter.key, Path(folder, "published"))
            seconds["job masks"] += time.perf_counter() - began
            masks = PublishedMasks(Path(folder, "published"))
            began = time.perf_counter()
            features.encode(
                some,
                [record.sha256 for record in some],
                lambda record, masks=masks: view(
                    decode.read(arguments.root / record.path),
                    masks[record.sha256],
                    focus="multiply",
                    frame=clip.frame,
                    feather=FEATHER,
                ),
                lambda views: clip.encode_images(clip.preprocess(views)),
                cache=Path(folder, "features"),
                settings=clip.key,
                batch_size=CHUNK,
            )
            seconds["job features"] += time.perf_counter() - began

    forward = seconds["encoder"] + seconds["decoder"] + seconds["clip"]
    job = seconds["job masks"] + seconds["job features"]
    count = len(records)
    print(f"{count} images, SAM2.1-tiny at {arguments.image_size} px, {arguments.strategy}, ViT-B-32")
    for name, value in seconds.items():
        print(f"{name:>14}: {value / count:.3f} s per image")
    print(f"bare forward passes {forward:.1f} s, job {job:.1f} s, ratio {job / forward:.3f}")
    if arguments.json:
        print(
            json.dumps({"images": count, "bare_s": forward, "job_s": job, "ratio": job / forward, **seconds})
        )


def _timed(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
