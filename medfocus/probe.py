"""Logistic regression on frozen features, with every choice made inside the support set."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold

C_GRID: tuple[float, ...] = tuple(float(c) for c in np.logspace(-2, 4, 7))
C_WITHOUT_VALIDATION = 0.316  # CLIP's published value, where a class is too small to hold one out


@dataclass(frozen=True)
class Probe:
    """A fitted multinomial logistic regression: ``x @ coef.T + intercept``."""

    coef: np.ndarray  # (K, D) float64
    intercept: np.ndarray  # (K,) float64
    C: float  # inverse regularisation strength

    def logits(self, features: np.ndarray) -> np.ndarray:
        """Features (N, D) -> class logits (N, K)."""
        return np.asarray(features, dtype=np.float64) @ self.coef.T + self.intercept


def stratified_folds(
    labels: np.ndarray, groups: np.ndarray, folds: int, seed: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Split a support set into (fit, held-out) index pairs that keep classes balanced and groups whole.

    A fold whose fitting part lacks a class cannot be scored and is left out, so the list is
    empty where a class has a single group: then nothing can be validated.

    Args:
        labels: (N,) integer labels.
        groups: (N,) integers; pictures of a patient or a group of duplicates share one.
        folds: The wished number; the smallest class bounds it.
        seed: Of the shuffle.

    Returns:
        Index pairs, at most ``folds`` of them.
    """
    smallest = min(len(np.unique(groups[labels == k])) for k in np.unique(labels))
    if min(folds, smallest) < 2:
        return []
    splitter = StratifiedGroupKFold(min(folds, smallest), shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        # Groups may make a class smaller than the fold count inside scikit-learn's own bookkeeping.
        warnings.filterwarnings("ignore", message="The least populated class", category=UserWarning)
        pairs = list(splitter.split(np.zeros((len(labels), 1)), labels, groups))
    classes = set(labels.tolist())
    return [(fit, held) for fit, held in pairs if len(held) and set(labels[fit].tolist()) == classes]


def fit_probe(
    features: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray,
    *,
    folds: int,
    seed: int,
    grid: Sequence[float] = C_GRID,
) -> Probe:
    """Fit the probe, choosing C by cross-validated log-likelihood inside the support set.

    Log-likelihood and not accuracy decides: with a handful of pictures accuracy ties over
    most of the grid. Where no fold can be made, C is 0.316.

    Args:
        features: (N, D).
        labels: (N,) integers covering 0..K-1.
        groups: (N,) integers; see ``stratified_folds``.
        folds: Of the cross-validation.
        seed: Of the folds' shuffle.
        grid: Candidate values of C.

    Returns:
        The probe refitted on the whole support with the chosen C.
    """
    features = np.asarray(features, dtype=np.float64)
    pairs = stratified_folds(labels, groups, folds, seed)
    best = C_WITHOUT_VALIDATION
    if pairs:
        scores = [
            sum(_log_likelihood(_fit(features[fit], labels[fit], c), features[held], labels[held])
                for fit, held in pairs)
            for c in grid
        ]  # fmt: skip
        best = grid[int(np.argmax(scores))]
    return _fit(features, labels, best)


def _fit(features: np.ndarray, labels: np.ndarray, c: float) -> Probe:
    model = LogisticRegression(C=c, solver="lbfgs", max_iter=1000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # at C = 1e4 separable data has no optimum
        model.fit(features, labels)
    coef, intercept = np.asarray(model.coef_), np.asarray(model.intercept_)
    if len(model.classes_) == 2:  # scikit-learn keeps one row for two classes
        coef, intercept = np.vstack([-coef, coef]) / 2, np.concatenate([-intercept, intercept]) / 2
    return Probe(coef, intercept, c)


def _log_likelihood(probe: Probe, features: np.ndarray, labels: np.ndarray) -> float:
    logits = probe.logits(features)
    return float((logits[np.arange(len(labels)), labels] - np.logaddexp.reduce(logits, axis=1)).sum())
