"""What a cell scores on a test set, and what several draws say together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats
from sklearn.metrics import (
    confusion_matrix,
    f1_score,
    roc_auc_score,
)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Class logits (N, K) -> probabilities (N, K), rows summing to 1."""
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


def score(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Score predictions on one test set.

    Args:
        probabilities: (N, K), rows summing to 1.
        labels: (N,) integers in [0, K).

    Returns:
        accuracy, balanced_accuracy, macro_f1 (both means over the classes that have test
        pictures), auroc (one against the rest, macro mean; NaN where a class has no test
        picture) and ece, all in [0, 1].
    """
    predicted = probabilities.argmax(axis=1)
    present = np.unique(labels)
    return {
        "accuracy": float((predicted == labels).mean()),
        "balanced_accuracy": float(np.nanmean(per_class_recall(probabilities, labels))),
        "macro_f1": float(f1_score(labels, predicted, labels=present, average="macro")),
        "auroc": auroc(probabilities, labels),
        "ece": expected_calibration_error(probabilities, labels),
    }


def auroc(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """One-against-the-rest AUROC, macro mean over classes; NaN where a class is absent. (N, K), (N,)."""
    classes = probabilities.shape[1]
    if len(np.unique(labels)) < classes:
        return float("nan")
    if classes == 2:
        return float(roc_auc_score(labels, probabilities[:, 1]))
    onehot = np.eye(classes)[labels]  # (N, K)
    return float(roc_auc_score(onehot, probabilities, average="macro"))


def expected_calibration_error(probabilities: np.ndarray, labels: np.ndarray, bins: int = 15) -> float:
    """Mean gap between confidence and accuracy over equal-width bins (Guo et al., arXiv 1706.04599)."""
    confidence = probabilities.max(axis=1)
    correct = probabilities.argmax(axis=1) == labels
    bin_of = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = [
        abs(correct[bin_of == b].mean() - confidence[bin_of == b].mean()) * (bin_of == b).mean()
        for b in np.unique(bin_of)
    ]
    return float(sum(gaps))


def per_class_recall(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Recall of every class, (N, K), (N,) -> (K,); NaN where a class has no test picture."""
    counts = confusion(probabilities.argmax(axis=1), labels, probabilities.shape[1])  # (K, K)
    true = counts.sum(axis=1)
    return np.divide(counts.diagonal(), true, out=np.full(len(true), np.nan), where=true > 0)


def confusion(predicted: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """Counts (K, K), rows the true class, columns the predicted; from (N,), (N,) integers in [0, K)."""
    return confusion_matrix(labels, predicted, labels=list(range(classes)))


@dataclass(frozen=True)
class Interval:
    """The mean of several draws and the half width of its 95 % t-interval (NaN for one draw)."""

    mean: float
    half_width: float
    draws: int


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean and 95 % t-interval over draws. Raises ValueError when there is no value."""
    if not len(values):
        raise ValueError("mean_interval: no draws to average; give at least one value.")
    array = np.asarray(values, dtype=float)
    if len(array) == 1:
        return Interval(float(array[0]), float("nan"), 1)
    half = stats.t.ppf(0.975, len(array) - 1) * array.std(ddof=1) / np.sqrt(len(array))
    return Interval(float(array.mean()), float(half), len(array))


def wilson_lower(correct: int, count: int) -> float:
    """Lower end of the 95 % Wilson interval of a share: 5 of 5 is worth less than 230 of 251."""
    if count == 0:
        return 0.0
    return float(stats.binomtest(correct, count).proportion_ci(method="wilson").low)
