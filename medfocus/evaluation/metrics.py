"""What a cell scores on a test set, and what several draws say together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


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
        images), auroc (one against the rest, macro mean; NaN where a class has no test
        image) and ece, all in [0, 1].
    """
    from sklearn.metrics import f1_score  # a second of every run that scores nothing

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
    """How often predictions of a confidence are right, by equal-width bins of confidence in [0, 1]."""

    confidence: np.ndarray  # (B,) mean of the bin; NaN where it is empty
    accuracy: np.ndarray  # (B,) share of right predictions; NaN where it is empty
    count: np.ndarray  # (B,) predictions

    @property
    def ece(self) -> float:
        """Expected calibration error: the mean gap over predictions (Guo et al., arXiv 1706.04599)."""
        filled = self.count > 0
        gaps = np.abs(self.accuracy[filled] - self.confidence[filled])
        return float((gaps * self.count[filled]).sum() / self.count.sum())


def reliability(probabilities: np.ndarray, labels: np.ndarray, bins: int = 15) -> Reliability:
    """Reliability curve of the predicted classes (Guo et al., arXiv 1706.04599); (N, K), (N,).

    A confidence on the edge of two bins is in the upper one. Predictions of several draws may be
    concatenated: the curve is then that of a draw chosen at random. Raises ValueError for no bins.
    """
    if bins < 1:
        raise ValueError(f"reliability: {bins} bins; 10 to 15 are usual.")
    confidence = probabilities.max(axis=1)
    correct = probabilities.argmax(axis=1) == labels
    bin_of = np.minimum((confidence * bins).astype(int), bins - 1)
    count = np.bincount(bin_of, minlength=bins)  # (B,)

    def mean(values: np.ndarray) -> np.ndarray:
        total = np.bincount(bin_of, values, minlength=bins)
        return np.divide(total, count, out=np.full(bins, np.nan), where=count > 0)

    return Reliability(mean(confidence), mean(correct), count)


def expected_calibration_error(probabilities: np.ndarray, labels: np.ndarray, bins: int = 15) -> float:
    """Mean gap between confidence and accuracy over equal-width bins (Guo et al., arXiv 1706.04599)."""
    return reliability(probabilities, labels, bins).ece


def per_class_recall(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Recall of every class, (N, K), (N,) -> (K,); NaN where a class has no test image."""
    counts = confusion(probabilities.argmax(axis=1), labels, probabilities.shape[1])  # (K, K)
    true = counts.sum(axis=1)
    return np.divide(counts.diagonal(), true, out=np.full(len(true), np.nan), where=true > 0)


def confusion(predicted: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """Counts (K, K), rows the true class, columns the predicted; from (N,), (N,) integers in [0, K)."""
    from sklearn.metrics import confusion_matrix

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


def wilson(correct: int, count: int) -> tuple[float, float]:
    """95 % Wilson interval of a share; (0, 1) where nothing was counted."""
    if count == 0:
        return 0.0, 1.0
    interval = stats.binomtest(correct, count).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def wilson_lower(correct: int, count: int) -> float:
    """Lower end of the 95 % Wilson interval of a share: 5 of 5 is worth less than 230 of 251."""
    return wilson(correct, count)[0]
