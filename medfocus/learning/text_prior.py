"""Logistic regression with the text classifier as its prior: with few labels the text weighs more.

With z = s I Tᵀ the zero-shot logits of an image and m its features, the class logits are z + V m, and

    V = argmin Σ_i -log softmax(z_i + V m_i)[y_i] + |V|² / (2 C).

For m = I this is a linear classifier with the weights W = s T + V. V is the most probable one under a normal
prior on W with mean s T and variance C (maximum a posteriori). At C = 0 the text decides alone, and the
larger C, the more the labels decide. LP++ (arXiv 2404.02285) adds up the same weights without a prior; CLAP
(arXiv 2312.12730) also penalises the distance to the zero-shot weights; SS-Text has a closed form.

There is no intercept, because an intercept without a penalty would change the answer of the text at C = 0.
"""

from __future__ import annotations

import numpy as np
from scipy import stats
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax

from medfocus.learning.folds import stratified_folds
from medfocus.learning.probe import in_span

# With features of length one, V m has a standard deviation of √C under the prior. At C = 1, the prior expects
# the labels to change the odds of two classes by a factor of about e.
DEFAULT_C = 1.0
C_GRID = (0.0, 1.0, 10.0, 100.0, 1000.0)
CONFIDENCE = 0.5  # factor of the zero-shot logits for the comparison with chance
SIGNIFICANCE = 0.05  # of the test that has to favour another C over the default


def beats_chance(zero_shot: np.ndarray, labels: np.ndarray) -> bool:
    """Return whether the text explains the labels better than the shares of the classes: (N, K), (N,).

    The text never saw a label, so its likelihood on the support is honest, even with one image per class. The
    text is taken at half its confidence, because CLIP is overconfident on images unlike its training images,
    and then a few confident errors would hide a text that is mostly right.
    """
    shares = np.bincount(labels) / len(labels)
    return bool(_log_likelihoods(CONFIDENCE * zero_shot, labels).sum() > np.log(shares[labels]).sum())


def fit_weights(features: np.ndarray, labels: np.ndarray, zero_shot: np.ndarray, c: float) -> np.ndarray:
    """Return V for features (N, D), labels (N,), zero-shot logits (N, K) and C, as (K, D) float64."""
    rotated, back = in_span(features)
    weights = _minimise(rotated, labels, zero_shot, c)
    return weights if back is None else np.ascontiguousarray(weights @ back)


def _minimise(
    features: np.ndarray, labels: np.ndarray, zero_shot: np.ndarray, c: float, start: np.ndarray | None = None
) -> np.ndarray:
    """Search V from ``start``, by default 0."""
    shape = (zero_shot.shape[1], features.shape[1])
    if c == 0:
        return np.zeros(shape)
    onehot = np.eye(shape[0])[labels]  # (N, K)

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights = flat.reshape(shape)
        logits = zero_shot + features @ weights.T
        value = (weights**2).sum() / (2 * c) - (onehot * log_softmax(logits, axis=1)).sum()
        return value, ((softmax(logits, axis=1) - onehot).T @ features + weights / c).ravel()

    first = np.zeros(shape) if start is None else start
    found = minimize(loss, first.ravel(), jac=True, method="L-BFGS-B", options={"maxiter": 1000})
    return found.x.reshape(shape)


def choose_c(
    features: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray,
    zero_shot: np.ndarray,
    *,
    folds: int,
    seed: int,
) -> float:
    """Choose C by cross-validated log-likelihood; without clear evidence, keep C = 1.

    A handful of held-out images favours extreme values of C by chance. So the best C has to exceed C = 1 in a
    one-sided paired t-test over the held-out images, at 5 %.

    Args:
        features: (N, D) features that no label has changed.
        labels: (N,) integers covering 0..K-1.
        groups: (N,) integers; see ``stratified_folds``.
        zero_shot: (N, K) zero-shot logits.
        folds: Number of cross-validation folds.
        seed: Seed of the folds' shuffle.
    """
    pairs = stratified_folds(labels, groups, folds, seed)
    features, _ = in_span(features)
    scores = np.full((len(C_GRID), len(labels)), np.nan)  # held-out log-likelihoods
    for fit, held in pairs:
        weights = None
        for row, c in zip(scores, C_GRID, strict=True):
            weights = _minimise(features[fit], labels[fit], zero_shot[fit], c, weights)
            row[held] = _log_likelihoods(zero_shot[held] + features[held] @ weights.T, labels[held])
    scores = scores[:, ~np.isnan(scores[0])]  # a fold may be left out
    count = scores.shape[1]
    if count < 2:
        return DEFAULT_C
    best = int(np.argmax(scores.sum(axis=1)))
    gain = scores[best] - scores[C_GRID.index(DEFAULT_C)]
    clear = gain.mean() > stats.t.ppf(1 - SIGNIFICANCE, count - 1) * stats.sem(gain)
    return C_GRID[best] if clear else DEFAULT_C


def _log_likelihoods(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return each image's log-likelihood, (N,)."""
    return log_softmax(logits, axis=1)[np.arange(len(labels)), labels]
