"""Measure whether new images differ from the images of a model: four comparisons, each with a p-value.

A shift counts if its size exceeds a bound *and* it is significant: with many images every difference is
significant, and with few images a large difference may be chance.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import ndimage, stats

STATISTICS = ("brightness", "contrast", "sharpness", "aspect", "pixels")
LEAST = 5  # images per set; smaller sets are not compared
MOST_BYTES = 1_000_000_000  # of an unpacked file of ``Known``; enough for millions of images
_FOLDS = 5


@dataclass(frozen=True)
class Images:
    """The properties of N images, for comparison with other images."""

    labels: np.ndarray  # (N,) str
    embeddings: np.ndarray  # (N, D), image features of ``encoder``
    coverage: np.ndarray  # (N,) mask area / image area
    statistics: np.ndarray  # (N, 5), see ``statistics``
    encoder: str  # key of the image encoder; only embeddings of the same encoder are comparable


@dataclass(frozen=True)
class Known:
    """The images known when a model was made, stored with the model."""

    names: frozenset[str]  # sha256 hex of each image
    learnt: frozenset[str]  # the names of the training images
    sample: Images  # all of these images, or some

    def save(self, path: Path) -> None:
        """Write an ``.npz`` file without pickles."""
        names = sorted(self.names)
        np.savez_compressed(
            path,
            allow_pickle=False,
            names=np.array([list(bytes.fromhex(name)) for name in names], np.uint8).reshape(-1, 32),
            learnt=np.array([name in self.learnt for name in names], bool),
            labels=self.sample.labels.astype(str),
            embeddings=self.sample.embeddings.astype(np.float16),
            coverage=self.sample.coverage,
            statistics=self.sample.statistics,
            encoder=np.array(self.sample.encoder),
        )

    @classmethod
    def load(cls, path: Path) -> Known:
        """Read a file that ``save`` wrote.

        Raises FileNotFoundError, or ValueError if the file is damaged, unpacks to more than ``MOST_BYTES`` or
        holds a pickle.
        """
        file = _read_arrays(path)
        names = [row.tobytes().hex() for row in file["names"]]
        sample = Images(
            file["labels"],
            file["embeddings"].astype(np.float32),
            file["coverage"],
            file["statistics"],
            str(file["encoder"]),
        )
        learnt = (name for name, at in zip(names, file["learnt"], strict=True) if at)
        return cls(frozenset(names), frozenset(learnt), sample)


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(item.file_size for item in archive.infolist())
        if size > MOST_BYTES:
            raise ValueError(f"unpacks to {size / 1e6:.0f} MB; the limit is {MOST_BYTES / 1e6:.0f} MB")
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"{path}: does not hold the arrays of a model's images ({error}). Restore the artefacts of the "
            "model, or register it again."
        ) from error


@dataclass(frozen=True)
class Shift:
    """One difference between new and old images."""

    name: str
    value: float  # NaN if the sets are too small
    bound: float
    p: float  # probability of such a difference by chance
    past: bool  # above the bound and significant


def statistics(grey: np.ndarray) -> np.ndarray:
    """Compute STATISTICS of a grey image (H, W) float in [0, 1].

    Returns (5,): mean, standard deviation, log variance of the Laplacian, log2 of W / H and log2 of H W.
    """
    height, width = grey.shape
    sharpness = np.log10(ndimage.laplace(grey.astype(np.float64)).var() + 1e-8)
    return np.array(
        [grey.mean(), grey.std(), sharpness, np.log2(width / height), np.log2(height * width)], np.float64
    )


def measure(old: Images, new: Images, bounds: Mapping[str, float], p: float) -> list[Shift]:
    """Measure how new images differ from old images.

    ``embedding`` is the out-of-fold AUROC in [0.5, 1] of a linear classifier of old against new images
    (Lopez-Paz and Oquab, arXiv 1610.06545). ``coverage`` and ``statistics`` are the Kolmogorov-Smirnov
    distances in [0, 1]. The largest distance of a statistic counts, with p times the number of statistics.
    ``classes`` is the total variation of the class shares in [0, 1], with the p of a chi-square test.

    Args:
        old: The N images of a model.
        new: M other images.
        bounds: For each of the four names, the value above which a shift counts.
        p: A shift counts only if its p is below this.
    """
    results = {
        "embedding": _embedding(old, new),
        "coverage": _distributions(old.coverage[:, None], new.coverage[:, None]),
        "classes": _classes(old.labels, new.labels),
        "statistics": _distributions(old.statistics, new.statistics),
    }
    return [
        Shift(name, value, bounds[name], chance, bool(value > bounds[name] and chance < p))
        for name, (value, chance) in results.items()
    ]


def _embedding(old: Images, new: Images) -> tuple[float, float]:
    smaller = min(len(old.labels), len(new.labels))
    if smaller < LEAST or old.encoder != new.encoder:
        return float("nan"), 1.0
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    features = np.concatenate([old.embeddings, new.embeddings])  # (N + M, D)
    is_new = np.repeat([0, 1], [len(old.labels), len(new.labels)])
    classifier = make_pipeline(
        StandardScaler(), LogisticRegression(C=0.01, class_weight="balanced", max_iter=1000)
    )
    folds = StratifiedKFold(min(_FOLDS, smaller), shuffle=True, random_state=0)
    scores = cross_val_predict(classifier, features, is_new, cv=folds, method="decision_function")
    chance = stats.mannwhitneyu(scores[is_new == 1], scores[is_new == 0], alternative="greater").pvalue
    return max(0.5, float(roc_auc_score(is_new, scores))), float(chance)


def _distributions(old: np.ndarray, new: np.ndarray) -> tuple[float, float]:
    """Return the largest Kolmogorov-Smirnov distance of columns (N, S), (M, S), and its corrected p."""
    if min(len(old), len(new)) < LEAST:
        return float("nan"), 1.0
    tests = [stats.ks_2samp(a, b) for a, b in zip(old.T, new.T, strict=True)]
    worst = max(tests, key=lambda test: test.statistic)  # pyright: ignore[reportAttributeAccessIssue]
    return float(worst.statistic), min(1.0, float(worst.pvalue) * len(tests))  # pyright: ignore


def _classes(old: Sequence[str] | np.ndarray, new: Sequence[str] | np.ndarray) -> tuple[float, float]:
    names = sorted({*old, *new})
    counts = np.array([[np.sum(np.asarray(side) == name) for name in names] for side in (old, new)])  # (2, K)
    if counts.sum(1).min() == 0 or len(names) < 2:
        return float("nan"), 1.0
    shares = counts / counts.sum(1, keepdims=True)
    chance = stats.chi2_contingency(counts).pvalue  # pyright: ignore[reportAttributeAccessIssue]
    return float(np.abs(shares[0] - shares[1]).sum() / 2), float(chance)
