"""Calibrated probabilities and sets of classes, from predictions out of fold inside the support.

Both are fitted on the predictions of ``fitting.validate``, which are for images that the predicting model has
not learned from. They are applied to the model of the whole support. This model has learned from more images
than the folds' models, so it is usually a little better than their predictions promise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import optimize, special

LARGEST_TEMPERATURE = 100.0  # T is in [1/100, 100], so that softmax(z / T) keeps the order of all logits
PRIOR_WIDTH = 0.25  # σ of log T; 0.5 follows the noise of a dozen images


@dataclass(frozen=True)
class Calibration:
    """The way from a fitted model's logits to probabilities and to sets of classes.

    The default leaves the probabilities as they are and gives no sets.
    """

    temperature: float = 1.0  # T
    threshold: float | None = None  # least probability of a class in a set; None: no sets
    confidence: float = 0.9  # share of images whose set has to contain the true class
    images: int = 0  # number of predictions out of fold behind T and the threshold

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """Return softmax(z / T): logits (N, K) -> (N, K). The order of the classes does not change."""
        return special.softmax(np.asarray(logits, dtype=np.float64) / self.temperature, axis=1)

    def sets(self, probabilities: np.ndarray) -> np.ndarray | None:
        """Return the classes that reach the threshold: calibrated (N, K) -> (N, K) bool; None without one.

        If no class of an image reaches the threshold, no class fits the image as the true classes of the
        support's images fit theirs. The image is then unlike the support, and its set has all classes. With
        only the most probable class, the least certain images would have the smallest sets.
        """
        if self.threshold is None:
            return None
        reached = probabilities >= self.threshold
        return reached | ~reached.any(axis=1, keepdims=True)

    @property
    def no_set(self) -> str:
        """The reason for which there are no sets; empty if there are sets."""
        if self.threshold is not None:
            return ""
        if not self.images:
            return "no set: the model has no predictions out of fold"
        return (
            f"no set: {self.images} labelled images cannot support a {100 * self.confidence:g} % promise; "
            f"{images_needed(self.confidence)} are needed"
        )


def calibrate(logits: np.ndarray, labels: np.ndarray, confidence: float) -> Calibration:
    """Fit a temperature, then the threshold of the sets, on predictions out of fold (M, K), (M,).

    Without predictions, the probabilities stay as they are and there are no sets.
    """
    if not len(labels):
        return Calibration(confidence=confidence)
    scaled = Calibration(fit_temperature(logits, labels), None, confidence, len(labels))
    threshold = lac_threshold(scaled.probabilities(logits), labels, confidence)
    return Calibration(scaled.temperature, threshold, confidence, len(labels))


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """Return the T that minimises the cross-entropy of softmax(z / T) (Guo et al., arXiv 1706.04599).

    The sum over the images has the further term (log T)² / 2σ²: the prior that T is between 0.6 and 1.6 with
    95 %. With a handful of images, the cross-entropy alone gives T = 0 if no prediction out of fold is
    wrong, and an arbitrarily large T if most are; with many images, the prior has no influence. A method
    whose regularisation cross-validation has chosen is near T = 1 already.

    Args:
        logits: (M, K) of images that the predicting model has not learned from.
        labels: (M,) integers in [0, K).
    """
    truth = np.eye(logits.shape[1])[labels]  # (M, K)

    def loss(log_temperature: float) -> float:
        log_p = special.log_softmax(logits / np.exp(log_temperature), axis=1)
        return float(-(truth * log_p).sum() + 0.5 * (log_temperature / PRIOR_WIDTH) ** 2)

    bound = math.log(LARGEST_TEMPERATURE)
    found = optimize.minimize_scalar(loss, bounds=(-bound, bound), options={"xatol": 1e-6})
    return float(np.exp(found.x))


def images_needed(confidence: float) -> int:
    """Return the least number of images for sets: with fewer, the quantile lies above all their scores."""
    return math.ceil(round(1 / (1 - confidence), 9)) - 1


def lac_threshold(probabilities: np.ndarray, labels: np.ndarray, confidence: float) -> float | None:
    """Return the least probability of a class in a set, by conformal prediction; None with too few images.

    The score of an image is 1 - p of its true class (LAC: Sadinle, Lei, Wasserman, JASA 2019). The threshold
    is 1 - q, where q is the ⌈(M + 1) confidence⌉-th smallest score. Of all sets with the same coverage, these
    have the smallest mean size if the probabilities are right.

    If the M images and a future image are exchangeable and the scored model is the predicting one, the set
    contains the true class with at least the probability ``confidence``. Scores of several folds weaken this:
    the guarantee of cross-conformal sets is 2 ``confidence`` - 1 (Barber et al., arXiv 1905.02928), and it
    needs the folds' models. The model of the whole support is stable or better in practice, not by a theorem.

    Args:
        probabilities: (M, K) of images that the predicting model has not learned from.
        labels: (M,) integers in [0, K).
        confidence: Wanted share of sets with the true class.
    """
    if len(labels) < images_needed(confidence):
        return None
    from mapie.conformity_scores import LACConformityScore  # only a fit needs it

    lac = LACConformityScore()
    scores = lac.get_conformity_scores(labels, probabilities, y_enc=labels)
    (quantile,) = lac.get_conformity_score_quantiles(scores, np.array([1 - confidence]), cv="prefit")
    return float(1 - quantile)
