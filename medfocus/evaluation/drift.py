"""Are new images of the kind that a model was made with? Four comparisons of two sets, each with a p.

Arrays in, numbers out. A shift counts where its size is past a bound *and* chance does not explain it: with
many images every difference is significant, with few a large one may be none.
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
LEAST = 5  # images of each set, below which nothing is said of their distributions
MOST_BYTES = 1_000_000_000  # that the archive beside a model may unpack to; millions of images do
_FOLDS = 5


@dataclass(frozen=True)
class Images:
    """A set of N images as they are compared."""

    labels: np.ndarray  # (N,) str
    embeddings: np.ndarray  # (N, D) of the image encoder ``encoder``
    coverage: np.ndarray  # (N,) share of the image inside its mask
    statistics: np.ndarray  # (N, 5), see ``statistics``
    encoder: str  # the tower's key: embeddings of two towers do not compare


@dataclass(frozen=True)
class Known:
    """The images that a model was made with, as they are kept beside it."""

    names: frozenset[str]  # sha256 hex of each
    learnt: frozenset[str]  # of those that it was fitted on
    sample: Images  # of them all, or of a part

    def save(self, path: Path) -> None:
        """Write an ``.npz`` without pickles."""
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
        """Read what ``save`` wrote.

        Raises FileNotFoundError where there is none, and ValueError for an archive that unpacks to more than
        ``MOST_BYTES`` or holds a pickle.
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
            raise ValueError(f"unpacks to {size / 1e6:.0f} MB, and {MOST_BYTES / 1e6:.0f} are the most")
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"{path}: not the arrays that a model is kept with ({error}). It was refused; restore the "
            "model's artefacts or register it anew."
        ) from error


@dataclass(frozen=True)
class Shift:
    """One way in which new images differ from old ones."""

    name: str
    value: float  # NaN where nothing can be said
    bound: float
    p: float  # that chance alone does as much
    past: bool  # beyond the bound, and not by chance


def statistics(grey: np.ndarray) -> np.ndarray:
    """(H, W) float in [0, 1] -> (5,): mean, standard deviation, log variance of the Laplacian, log2 of W / H
    and of H W."""
    height, width = grey.shape
    sharpness = np.log10(ndimage.laplace(grey.astype(np.float64)).var() + 1e-8)
    return np.array(
        [grey.mean(), grey.std(), sharpness, np.log2(width / height), np.log2(height * width)], np.float64
    )


def measure(old: Images, new: Images, bounds: Mapping[str, float], p: float) -> list[Shift]:
    """How new images differ from old ones.

    ``embedding`` is the AUROC in [0.5, 1] with which a linear classifier tells the two sets apart out of fold
    (Lopez-Paz and Oquab, arXiv 1610.06545), ``coverage`` and ``statistics`` the largest distance of two
    cumulative distributions in [0, 1] (Kolmogorov and Smirnov; of the statistics the worst, its p times their
    number), ``classes`` the total variation of the class shares in [0, 1] (p by chi-square).

    Args:
        old: N images, what a model was made with.
        new: M others.
        bounds: A value for each of the four names, beyond which a shift counts ...
        p: ... if chance does as much with a smaller probability than this.
    """
    found = {
        "embedding": _embedding(old, new),
        "coverage": _distributions(old.coverage[:, None], new.coverage[:, None]),
        "classes": _classes(old.labels, new.labels),
        "statistics": _distributions(old.statistics, new.statistics),
    }
    return [
        Shift(name, value, bounds[name], chance, bool(value > bounds[name] and chance < p))
        for name, (value, chance) in found.items()
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
    """(N, S), (M, S) -> the largest Kolmogorov-Smirnov distance of the S columns, and its corrected p."""
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
