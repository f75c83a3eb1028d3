"""The time of a click on the page of ``medfocus app``, compared with the first reading of the image.

`open` reads a phantom for the first time: decoding, SAM2's encoding, its mask, the prediction, the layers of
the page. `click` adds a point: prompt encoder, mask decoder, and the whole prediction again. `encoding` and
`points` are SAM2's parts of the two. Every repetition times every row in turn. The medians are wall times, so
on a shared machine the ratios are more reliable than the milliseconds. --full adds the parts of SAM2.1-tiny
at 1024 px with random weights, which do not affect the time.

Quality is the mean IoU with the known lesion of held-out phantoms, of the first mask and of one point's mask.

    python -m benchmarks.clicks --model medfocus-phantom-brain
    python -m benchmarks.clicks --model FOLDER --repeats 20 --full
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from flows.cli import workstation
from medfocus import phantoms
from medfocus.app import clicks
from medfocus.app.reading import Reader
from medfocus.masks.factory import build_sam2
from medfocus.masks.quality import iou
from medfocus.masks.sam2.segmenter import Sam2Segmenter
from medfocus.masks.settings import Sam2Settings
from medfocus.phantoms.phantom import Phantom

HELD_OUT = 3_000_000  # seed of phantoms.generator that the pocket models' training does not use
FULL = "sam2.1_hiera_t"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="as for medfocus app")
    parser.add_argument("--modality", default="brain_mri", choices=phantoms.MODALITIES)
    parser.add_argument("--images", type=int, default=6, help="images of each class with a lesion")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--full", action="store_true", help="SAM2.1-tiny at 1024 px, too")
    options = parser.parse_args()
    reader, about = workstation.load(Path.cwd(), options.model)
    segmenter = reader.predictor.segmenter.sam2
    if segmenter is None:
        parser.error(f"--model {about.model}: its segmenter is not SAM2. Give another model.")
    drawn = [
        phantom
        for label in phantoms.MODALITIES[options.modality]
        for i in range(options.images)
        if (phantom := draw(options.modality, label, i)).region.any()
    ]
    print(f"{about.model} {about.version}, {torch.get_num_threads()} threads, median of {options.repeats}")
    show(timed(steps(reader, segmenter, drawn[0]), options.repeats))
    if options.full:
        print(f"{FULL} at 1024 px, random weights")
        full = build_sam2(Sam2Settings(FULL, "random:0", 1024, "grid", points_per_side=4))
        show(timed(parts(full, rgb(drawn[0]), clicks.deepest(drawn[0].region)), options.repeats))
    first, after = quality(segmenter, drawn)
    print(f"IoU with the lesion, {len(drawn)} phantoms: first mask {first:.3f}, one point in it {after:.3f}")


def draw(modality: str, label: str, number: int) -> Phantom:
    return phantoms.draw(modality, label, phantoms.generator(HELD_OUT, modality, "test", label, number))


def rgb(phantom: Phantom) -> np.ndarray:
    return np.repeat(phantom.image[..., None], 3, axis=2)


Steps = dict[str, Callable[[], object]]


def steps(reader: Reader, segmenter: Sam2Segmenter, phantom: Phantom) -> Steps:
    """Return the steps that the page waits for."""
    buffer = io.BytesIO()
    Image.fromarray(phantom.image).save(buffer, "PNG")
    opened = reader.open(buffer.getvalue(), "a phantom")
    point = clicks.deepest(phantom.region)
    whole: Steps = {
        "open": lambda: reader.open(buffer.getvalue(), "a phantom"),
        "click": lambda: reader.edit(opened, [point]),
    }
    return whole | parts(segmenter, opened.pixels, point)


def parts(segmenter: Sam2Segmenter, image: np.ndarray, point: clicks.Point) -> Steps:
    """Return SAM2's steps."""
    features = clicks.encode(segmenter, image)
    return {
        "encoding": lambda: clicks.encode(segmenter, image),
        "points": lambda: clicks.mask_at(segmenter, image, features, [point]),
    }


def timed(work: Steps, repeats: int) -> dict[str, float]:
    """Return the median milliseconds of each step, after one untimed round."""
    taken: dict[str, list[float]] = defaultdict(list)
    for number in range(repeats + 1):
        for name, step in work.items():
            start = time.perf_counter()
            with contextlib.suppress(clicks.NoRegionError):  # random weights may find nothing
                step()
            if number:
                taken[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in taken.items()}


def show(taken: dict[str, float]) -> None:
    print("  ".join(f"{name} {value:.1f} ms" for name, value in taken.items()))
    for part, whole in (("click", "open"), ("points", "encoding")):
        if part in taken:
            print(f"  {part} / {whole}: {taken[part] / taken[whole]:.2f}")


def quality(segmenter: Sam2Segmenter, drawn: list[Phantom]) -> tuple[float, float]:
    """Return the mean IoU with the lesion of the first mask and of the mask at its deepest point."""
    scores: list[tuple[float, float]] = []
    for phantom in drawn:
        image = rgb(phantom)
        features = clicks.encode(segmenter, image)
        mask = clicks.mask_at(segmenter, image, features, [clicks.deepest(phantom.region)])
        [first] = segmenter.segment([image])
        scores.append((iou(first.region, phantom.region), iou(mask.region, phantom.region)))
    first, after = np.mean(scores, axis=0).tolist()
    return first, after


if __name__ == "__main__":
    main()
