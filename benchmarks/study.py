"""The cost of a study compared with one pass of its encoders: `python -m benchmarks.study [--json]`.

The study has every method with frozen encoders, five fractions, five draws and two focus modes, and an empty
cache in a temporary folder. The reference is a bare loop of the same encoders over the same views in memory.
CLIP's image encoder should see every view once for each focus mode, and `EncodedDataset.embed` should take at
most 1.5 times the bare passes. The time of the heads is additional: the output lists their milliseconds for a
fit on cached features.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import yaml

ROOT = Path(__file__).resolve().parents[1]
MOST = 1.5  # the limit of embedding, times the bare passes
FOCUSES = ("none", "multiply")
METHODS = (
    *("nearest-class-mean", "k-nn", "clip-zero-shot", "clip-linear-probe", "clip-few-shot", "clip-adapter"),
    *("tip-adapter", "tip-adapter-f", "lp++", "ss-text", "slca", "medfocusclip", "medfocusclip-full"),
)
FINE_TUNED = ("clip-few-shot", "medfocusclip-full")  # trains blocks of the encoder on its cached tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", type=int, default=40, help="training images of each of four classes")
    parser.add_argument("--threads", type=int, default=1, help="of torch, for the study and the bare loop")
    parser.add_argument("--json", action="store_true", help="print one object as the last line")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    os.environ |= {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        _write_study(Path(folder), arguments.train)
        result = _measure()
    print(f"{result['cells']} cells of {result['methods']} methods, focus {' and '.join(FOCUSES)}")
    for name in ("bare_clip_s", "bare_sam2_s", "embed_s", "fit_and_score_s"):
        print(f"{name:>18}: {result[name]:.1f} s")
    print(f"image encoder: {result['views_through_tower']} passes of {result['views']} views")
    print("milliseconds of a fit on cached features, mean over cells:")
    for name, value in result["fit_ms"].items():
        print(f"{name:>20}: {value:8.1f}")
    ratio = result["ratio"]
    verdict = "reached" if ratio <= MOST else f"FALLS SHORT by {ratio / MOST - 1:.0%}"
    print(f"embedding over bare passes: {ratio:.2f}, at most {MOST}: {verdict}")
    if arguments.json:
        print(json.dumps(result))


def _write_study(folder: Path, train: int) -> None:
    """Write a study of one data set of phantoms, and run the stages before fine-tuning."""
    content = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    content["study"] |= {
        "name": "costs",
        "methods": {name: list(FOCUSES) for name in METHODS},
        "percents": [5, 10, 20, 50, 100],
        "seeds": [0, 1, 2, 3, 4],
    }
    content["datasets"] = {"phantom-brain": content["datasets"]["phantom-brain"]}
    content["phantoms"] = {
        "brain_mri": {"seed": 0, "train_per_class": train, "test_per_class": train, "size": 192}
    }
    content["methods"]["medfocusclip"] |= {"segmenter_grid": 8}
    for name in FINE_TUNED:  # the time of their fit does not count here, only that of their embedding
        content["methods"][name] |= {"epochs": 1}
    (folder / "params.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    (folder / ".dvc").mkdir()  # marks the project's root

    from flows.stages import duplicates, ingest, masks, phantoms, splits

    phantoms.main(["--modality", "brain_mri"])
    for stage in (ingest, duplicates, splits, masks):
        stage.main(["--dataset", "phantom-brain"])


def _measure() -> dict[str, Any]:
    from flows.stages import evaluate, finetune
    from flows.study import costs, models
    from flows.study.cells import plan
    from flows.study.dataset import EncodedDataset
    from flows.study.study import here

    study = here()
    embed, spent = EncodedDataset.embed, {"embed": 0.0}

    def timed_embed(*arguments: Any, **options: Any) -> None:
        began = time.perf_counter()
        embed(*arguments, **options)
        spent["embed"] += time.perf_counter() - began

    began = time.perf_counter()
    with patch.object(EncodedDataset, "embed", timed_embed), _counted() as passed:
        finetune.main([])
        evaluate.main([])
    whole = time.perf_counter() - began

    encoder = models.build_encoder(study)
    dataset = EncodedDataset(study, "phantom-brain", encoder)
    views = {focus: _views(dataset, focus) for focus in FOCUSES}
    size = study.params.views.batch_size

    def clip(batch: torch.Tensor) -> object:
        return encoder.encode_images(encoder.preprocess(batch))

    def sam2(batch: torch.Tensor) -> object:
        return encoder.describe(batch, 8)

    bare = {
        name: sum(_seconds(lambda f=focus, p=part: [p(b) for b in views[f].split(size)]) for focus in FOCUSES)
        for name, part in (("clip", clip), ("sam2", sam2))
    }
    fits: dict[str, list[float]] = {}
    for line in costs.read_rows(here().paths.costs):
        name = line.system.split(" ")[0]
        if name not in FINE_TUNED:
            fits.setdefault(name, []).append(1000 * line.fit_seconds)
    return {
        "methods": len(METHODS),
        "cells": len(plan(study.params)),
        "views": sum(map(len, views.values())),
        "views_through_tower": passed[0],
        "bare_clip_s": bare["clip"],
        "bare_sam2_s": bare["sam2"],
        "embed_s": spent["embed"],
        "fit_and_score_s": whole - spent["embed"],
        "ratio": spent["embed"] / sum(bare.values()),
        "fit_ms": {name: float(np.mean(values)) for name, values in fits.items()},
    }


@contextlib.contextmanager
def _counted() -> Iterator[list[int]]:
    """Count the views that pass an image encoder in the block."""
    from medfocus.clip import build as builder

    passed = [0]
    build: Callable[..., Any] = builder.build_clip

    def counting(*arguments: Any, **options: Any) -> Any:
        encoder = build(*arguments, **options)

        def count(_: object, inputs: tuple[torch.Tensor, ...]) -> None:
            passed[0] += len(inputs[0])

        encoder.model.visual.conv1.register_forward_pre_hook(count)
        return encoder

    with patch.object(builder, "build_clip", counting):
        yield passed


def _views(dataset: Any, focus: str) -> torch.Tensor:
    """Return all views (N, S, S, 3) uint8 of a study: several of a training image, one of a test image."""
    augmented = dataset.study.params.views.augmented
    made = [
        dataset._view(dataset.records[path], number, focus)
        for paths, count in ((dataset.splits.train, 1 + augmented), (dataset.splits.test, 1))
        for path in paths
        for number in range(count)
    ]
    return torch.from_numpy(np.stack(made))


def _seconds(work: Callable[[], object], repeats: int = 3) -> float:
    """Return the median of some repetitions."""
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return float(np.median(seconds))


if __name__ == "__main__":
    main()
