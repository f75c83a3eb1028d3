"""Compute metrics of predictions on a test set, and intervals over draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


def score(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Score predictions on one test set.

    Args:
        probabilities: (N, K); rows sum to 1.
        labels: (N,) integers in [0, K).

    Returns:
        accuracy, balanced_accuracy, macro_f1, auroc and ece, all in [0, 1]. balanced_accuracy and macro_f1
        are means over the classes with test images. See ``auroc`` and ``Reliability.ece``.
    """
    from sklearn.metrics import f1_score  # imported here, because the import takes a second

    predicted = probabilities.argmax(axis=1)
    present = np.unique(labels)
    return {
        "accuracy": float((predicted == labels).mean()),
        "balanced_accuracy": float(np.nanmean(per_class_recall(probabilities, labels))),
        "macro_f1": float(f1_score(labels, predicted, labels=present, average="macro")),
        "auroc": auroc(probabilities, labels),
        "ece": reliability(probabilities, labels).ece,
    }


def auroc(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Return the mean AUROC of each class against the rest, from (N, K), (N,); NaN if a class is absent."""
    from sklearn.metrics import roc_auc_score

    classes = probabilities.shape[1]
    if len(np.unique(labels)) < classes:
        return float("nan")
    if classes == 2:
        return float(roc_auc_score(labels, probabilities[:, 1]))
    onehot = np.eye(classes)[labels]  # (N, K)
    return float(roc_auc_score(onehot, probabilities, average="macro"))


@dataclass(frozen=True)
class Reliability:
    """Accuracy by confidence, in equal-width bins of confidence in [0, 1]."""

    confidence: np.ndarray  # (B,) mean confidence; NaN if the bin is empty
    accuracy: np.ndarray  # (B,) share of correct predictions; NaN if the bin is empty
    count: np.ndarray  # (B,) number of predictions

    @property
    def ece(self) -> float:
        """Expected calibration error: the mean gap between confidence and accuracy (arXiv 1706.04599)."""
        filled = self.count > 0
        gaps = np.abs(self.accuracy[filled] - self.confidence[filled])
        return float((gaps * self.count[filled]).sum() / self.count.sum())


def reliability(probabilities: np.ndarray, labels: np.ndarray, bins: int = 15) -> Reliability:
    """Return the reliability curve of predictions (N, K), (N,) (Guo et al., arXiv 1706.04599).

    A confidence at the edge of two bins belongs to the upper bin. Concatenated predictions of several draws
    give the expected curve of one draw. Raises ValueError if ``bins`` is below 1.
    """
    if bins < 1:
        raise ValueError(f"reliability: {bins} bins; use 10 to 15.")
    confidence = probabilities.max(axis=1)
    correct = probabilities.argmax(axis=1) == labels
    bin_of = np.minimum((confidence * bins).astype(int), bins - 1)
    count = np.bincount(bin_of, minlength=bins)  # (B,)

    def mean(values: np.ndarray) -> np.ndarray:
        total = np.bincount(bin_of, values, minlength=bins)
        return np.divide(total, count, out=np.full(bins, np.nan), where=count > 0)

    return Reliability(mean(confidence), mean(correct), count)


def coverage(sets: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Return the share of sets with the true class and the mean size, from (N, K) bool, (N,)."""
    return float(sets[np.arange(len(labels)), labels].mean()), float(sets.sum(axis=1).mean())


def per_class_recall(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the recall (K,) of every class from (N, K), (N,); NaN for a class without test images."""
    counts = confusion(probabilities.argmax(axis=1), labels, probabilities.shape[1])  # (K, K)
    true = counts.sum(axis=1)
    return np.divide(counts.diagonal(), true, out=np.full(len(true), np.nan), where=true > 0)


def confusion(predicted: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """Return counts (K, K) by true class (rows) and predicted class from (N,), (N,) integers in [0, K)."""
    from sklearn.metrics import confusion_matrix

    return confusion_matrix(labels, predicted, labels=list(range(classes)))


@dataclass(frozen=True)
class Interval:
    """The mean over draws and the half width of its 95 % t-interval (NaN for one draw)."""

    mean: float
    half_width: float
    draws: int


def mean_interval(values: Sequence[float]) -> Interval:
    """Return the mean and the 95 % t-interval over draws. Raises ValueError without values."""
    if not len(values):
        raise ValueError("mean_interval: no values; give at least one.")
    array = np.asarray(values, dtype=float)
    if len(array) == 1:
        return Interval(float(array[0]), float("nan"), 1)
    half = stats.t.ppf(0.975, len(array) - 1) * array.std(ddof=1) / np.sqrt(len(array))
    return Interval(float(array.mean()), float(half), len(array))


def wilson(correct: int, count: int) -> tuple[float, float]:
    """Return the 95 % Wilson interval of a share; (0, 1) for a count of 0."""
    if count == 0:
        return 0.0, 1.0
    interval = stats.binomtest(correct, count).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def wilson_lower(correct: int, count: int) -> float:
    """Return the lower end of the 95 % Wilson interval of a share, which ranks 5 of 5 below 230 of 251."""
    return wilson(correct, count)[0]
