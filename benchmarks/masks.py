"""Seconds per mask, as ratios to SAM2's bare encoder and to its own generator in the same run.

Time is that of the full-size SAM2.1-tiny with random weights, on phantoms resized to 1024 and 512 px. Random
weights do not affect it, because no candidate is good enough to skip others. Every repetition times every row
in turn, so that a slower machine affects all rows; results are medians. `encoder` is the forward pass of the
sam2 package on a tensor in memory. `limit` is the time of its arithmetic at the rate of a large matrix
product. `generator` is one call of SAM2AutomaticMaskGenerator with its published settings. It takes minutes,
so it runs --generator-repeats times (once) on the first image only. On a shared machine, `--threads 1
--processor` measures CPU time instead of wall time.

Quality is that of the pocket weights on held-out phantoms of every class: mean IoU with the mask that is
chosen among the generator's proposals at 16 x 16 points, and with the known lesion. The table also shows the
cost of fewer points, because a small lesion can lie between 4 x 4 points, and of none (`interest`).

    python -m benchmarks.masks
    python -m benchmarks.masks --images 2 --repeats 5 --json
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from medfocus import phantoms
from medfocus.datasets.records import Record
from medfocus.masks.factory import build_sam2
from medfocus.masks.quality import iou
from medfocus.masks.sam2 import segmenter
from medfocus.masks.sam2.fast_segmenter import FastSegmenter
from medfocus.masks.sam2.segmenter import Sam2Segmenter
from medfocus.masks.settings import Sam2Settings
from medfocus.masks.store import MaskStore, cache_masks

FULL, POINTS = "sam2.1_hiera_t", 4  # POINTS a side, as in the studies of large images
DRAWN = 768  # pixels a side of the timed phantoms, which the model resizes
POCKET_POINTS = 8  # as in params.yaml
HELD_OUT = 3_000_000  # seed of phantoms.generator that the pocket models' training does not use
GEMM = 2048
MOST_RATIO, LEAST_16, LEAST_32, LEAST_512, LEAST_MIOU = 1.25, 9.0, 30.0, 30.0, 0.9
SLACK = 0.2  # a larger shortfall is a regression, not noise


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--images", type=int, default=1, help="timed images; also, for quality, of each class"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--generator-repeats", type=int, default=1, help="0 omits the generator")
    parser.add_argument("--size", choices=("all", "full", "pocket"), default="all", help="the networks")
    parser.add_argument("--files", type=int, default=8, help="image files for the share of the forward pass")
    parser.add_argument("--threads", type=int, help="threads of PyTorch")
    parser.add_argument("--processor", action="store_true", help="CPU time instead of wall time")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    now = time.process_time if options.processor else time.perf_counter
    result: dict[str, Any] = {
        "clock": now.__name__,
        "images": options.images,
        "threads": torch.get_num_threads(),
    }
    if options.size != "pocket":
        result |= clock(options.images, options.repeats, options.generator_repeats, now)
        result["forward_share"] = forward_share(options.files)
    if options.size != "full":
        result |= agreement(max(options.images, 4))
    verdicts(result)
    if options.json:
        print(json.dumps(result))


def clock(images: int, repeats: int, generator_repeats: int, now: Callable[[], float]) -> dict[str, Any]:
    """Return the seconds of every row by the clock ``now``, and their ratios."""
    shown = [drawn("chest_xray", "normal", number, DRAWN) for number in range(images)]
    shared: dict[str, Any] = {"config": FULL, "checkpoint": "random:0"}
    plain = segmenter.load_sam2(
        Sam2Settings(**shared, image_size=1024, strategy="grid", points_per_side=POINTS)
    )
    rows: dict[str, Callable[[np.ndarray], object]] = {}
    for size in (1024, 512):
        smaller = Sam2Settings(**shared, image_size=size, strategy="grid")
        model = plain.model if size == 1024 else segmenter.load_sam2(smaller).model
        ready = torch.rand(1, 3, size, size)
        rows[f"encoder, {size} px"] = lambda _, model=model, ready=ready: model.forward_image(ready)
        for name, strategy, points in (
            ("grid 4 x 4", "grid", POINTS), ("grid 8 x 8", "grid", 8), ("center", "center", 1),
            ("box", "box", 1),
        ):  # fmt: skip
            one = build_sam2(
                Sam2Settings(**shared, image_size=size, strategy=strategy, points_per_side=points)
            )
            rows[f"{name}, {size} px"] = lambda image, one=one: one.segment([image])
    rows["plain grid 4 x 4, 1024 px"] = lambda image: plain.segment([image])
    square = torch.rand(GEMM, GEMM)
    rows["product of matrices"] = lambda _: square @ square
    generators = {f"generator {side} x {side}, 1024 px": generator(plain, side) for side in (16, 32)}

    seconds: dict[str, list[float]] = defaultdict(list)
    with torch.inference_mode():
        for repeat in range(max(repeats, generator_repeats)):
            for number, image in enumerate(shown):
                timed = rows if repeat < repeats else {}
                if number == 0 and repeat < generator_repeats:
                    timed = timed | generators
                for name, run in timed.items():
                    began = now()
                    run(image)
                    seconds[name].append(now() - began)
                    print(f"{name}: {seconds[name][-1]:.2f} s", file=sys.stderr, flush=True)
        flops = {}
        for size in (1024, 512):
            with FlopCounterMode(display=False) as counter:
                rows[f"encoder, {size} px"](shown[0])
            flops[size] = counter.get_total_flops()
    median = {name: statistics.median(values) for name, values in seconds.items()}
    rate = 2 * GEMM**3 / median.pop("product of matrices")  # operations a second
    for size in (1024, 512):
        median[f"limit, {size} px"] = flops[size] / rate
    encoder, grid, small = (
        median[name] for name in ("encoder, 1024 px", "grid 4 x 4, 1024 px", "grid 4 x 4, 512 px")
    )
    print(f"{FULL}, random weights, {torch.get_num_threads()} threads, {rate / 1e9:.0f} Gflop/s")
    for name, value in sorted(median.items(), key=lambda item: -item[1]):
        times = len(seconds[name])
        spread = f"{min(seconds[name]):.2f} to {max(seconds[name]):.2f}, n = {times}" if times else "computed"
        print(f"{name:26} {value:8.3f} s per image ({spread}), {value / encoder:6.2f} times the encoder")
    ratios = {
        "ratio_to_encoder": grid / encoder,
        "ratio_to_encoder_8x8": median["grid 8 x 8, 1024 px"] / encoder,
        "ratio_to_encoder_512": small / median["encoder, 512 px"],
    }
    for side in (16, 32):
        took = median.get(f"generator {side} x {side}, 1024 px")
        if took is not None:
            ratios[f"speedup_vs_generator{side}"] = took / grid
            if side == 16:
                ratios["speedup_512_vs_generator16"] = took / small
    rounded = {name: round(value, 3) for name, value in ratios.items()}
    return {"seconds": {k: round(v, 4) for k, v in median.items()}, "gflops": round(rate / 1e9, 1), **rounded}


def forward_share(count: int) -> float:
    """Return the network's share of the wall time of ``cache_masks``, over image files at 512 px."""
    segmenter = build_sam2(Sam2Settings(FULL, "random:0", 512, "grid", points_per_side=POINTS), batch_size=2)
    assert isinstance(segmenter, FastSegmenter)
    forward = 0.0

    def counted(run: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            nonlocal forward
            began = time.perf_counter()
            result = run(*arguments)
            forward += time.perf_counter() - began
            return result

        return timed

    segmenter.encoder = counted(segmenter.encoder)  # pyright: ignore[reportAttributeAccessIssue]
    for name in ("scene", "answer", "logits"):
        setattr(segmenter.decoder, name, counted(getattr(segmenter.decoder, name)))
    with tempfile.TemporaryDirectory() as folder:
        pairs = []
        for number in range(count):
            path = Path(folder, f"{number}.{'png' if number % 2 else 'jpg'}")
            Image.fromarray(drawn("chest_xray", "normal", number, DRAWN)).save(path)
            sha = hashlib.sha256(path.read_bytes()).hexdigest()
            pairs.append((Record(path.name, sha, DRAWN, DRAWN, "RGB", "normal", "train", ""), path))
        began = time.perf_counter()
        cache_masks(pairs, segmenter, MaskStore(Path(folder, "masks")), batch_size=2)
        wall = time.perf_counter() - began
    share = 100 * forward / wall
    print(f"cache_masks over {count} files of {DRAWN} px: {wall:.1f} s, {share:.1f} % in the network")
    return round(forward / wall, 4)


def agreement(per_class: int) -> dict[str, Any]:
    """Return the pocket weights' mean IoU with the generator's chosen mask and with the lesion."""
    shared: dict[str, Any] = {"config": "pocket", "checkpoint": "pocket", "image_size": None}

    def grid(points: int, **settings: Any) -> Sam2Segmenter:
        return build_sam2(Sam2Settings(**shared, strategy="grid", points_per_side=points, **settings))

    segmenters = {
        "generator": build_sam2(Sam2Settings(**shared, strategy="automatic", points_per_side=16)),
        "grid": grid(POCKET_POINTS),
        "grid, 4 x 4": grid(4),
        "grid, 16 x 16": grid(16),
        "grid, edges": grid(POCKET_POINTS, follow_edges=True),
        "interest": build_sam2(Sam2Settings(**shared, strategy="interest")),
        "interest, edges": build_sam2(Sam2Settings(**shared, strategy="interest", follow_edges=True)),
        "center": build_sam2(Sam2Settings(**shared, strategy="center")),
        "box": build_sam2(Sam2Settings(**shared, strategy="box")),
    }
    with_generator: dict[str, list[float]] = defaultdict(list)
    with_truth: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in segmenters}
    seconds: dict[str, list[float]] = defaultdict(list)
    for modality, labels in phantoms.MODALITIES.items():
        for label in labels:
            for number in range(per_class):
                rng = phantoms.generator(HELD_OUT, modality, "test", label, number)
                phantom = phantoms.draw(modality, label, rng)
                image, masks = np.repeat(phantom.image[..., None], 3, 2), {}
                for name, each in segmenters.items():
                    began = time.perf_counter()
                    masks[name] = each.segment([image])[0].region
                    seconds[name].append(time.perf_counter() - began)
                for name, mask in masks.items():
                    with_generator[name].append(iou(mask, masks["generator"]))
                    if phantom.region.any():
                        with_truth[name][modality].append(iou(mask, phantom.region))
    print(f"pocket weights, {len(with_generator['grid'])} held-out phantoms of every class")
    table: dict[str, Any] = {}
    for name in segmenters:
        truth = {modality: mean(values) for modality, values in with_truth[name].items()}
        truth["all"] = mean([value for values in with_truth[name].values() for value in values])
        table[name] = {
            "seconds": round(statistics.median(seconds[name]), 4),
            "with_generator": mean(with_generator[name]),
            "with_truth": truth,
        }
        lesion = ", ".join(f"{modality} {value:.3f}" for modality, value in truth.items())
        took, agreed = table[name]["seconds"], table[name]["with_generator"]
        print(f"{name:18} {took:.3f} s, IoU with the generator's {agreed:.3f}; with the lesion: {lesion}")
    return {"miou_with_generator": table["grid"]["with_generator"], "masks": table}


def verdicts(result: Mapping[str, Any]) -> None:
    """Print a line for each target, with a warning if it is missed by more than ``SLACK``."""
    targets = {
        "ratio_to_encoder": MOST_RATIO,
        "speedup_vs_generator16": LEAST_16,
        "speedup_vs_generator32": LEAST_32,
        "speedup_512_vs_generator16": LEAST_512,
    }
    for name, target in targets.items():
        if name not in result:
            continue
        most = name == "ratio_to_encoder"
        short = result[name] / target - 1 if most else 1 - result[name] / target
        verdict = "reached" if short <= 0 else f"FALLS SHORT by {100 * short:.0f} %"
        loud = "; a regression, not noise" if short > SLACK else ""
        print(f"{name}: {result[name]:.2f}, {'at most' if most else 'at least'} {target}: {verdict}{loud}")
    if "masks" in result:
        agreed, masks = result["miou_with_generator"], result["masks"]
        ours, theirs = (masks[name]["with_truth"]["all"] for name in ("interest, edges", "generator"))
        verdict = "reached" if agreed >= LEAST_MIOU or ours >= theirs else "FALLS SHORT"
        print(
            f"miou_with_generator: {agreed:.3f}, at least {LEAST_MIOU}, or IoU with the lesion no worse: "
            f"{ours:.3f} with edges, as in params.yaml, to the generator's {theirs:.3f}: {verdict}"
        )


def generator(plain: Sam2Segmenter, points_per_side: int) -> Callable[[np.ndarray], object]:
    """Return SAM2's own generator with its published settings, for the model of a segmenter."""
    from sam2.automatic_mask_generator import SAM2AutomaticMaskGenerator

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # its transforms call torch.jit.script
        made = SAM2AutomaticMaskGenerator(plain.model, points_per_side=points_per_side)
    made.predictor = plain.predictor
    return made.generate


def drawn(modality: str, label: str, number: int, size: int) -> np.ndarray:
    """A held-out phantom (size, size, 3) uint8."""
    rng = phantoms.generator(HELD_OUT, modality, "test", label, number)
    return np.repeat(phantoms.draw(modality, label, rng, size).image[..., None], 3, 2)


def mean(values: Sequence[float]) -> float:
    """Return the rounded mean."""
    return round(float(np.mean(values)), 4)


if __name__ == "__main__":
    main()
