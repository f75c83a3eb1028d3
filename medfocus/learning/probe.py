"""Logistic regression on frozen features; cross-validation inside the support set chooses C."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from medfocus.learning.folds import stratified_folds

C_GRID: tuple[float, ...] = tuple(float(c) for c in np.logspace(-2, 4, 7))
# Used if a class is too small for cross-validation. CLIP's 0.316 is for raw features of length about 10. All
# features here have length one; weights 10 times as large then give the same logits, and their penalty
# |w|² / 2C is the same at a C that is 10² times as large.
C_WITHOUT_VALIDATION = 31.6


@dataclass(frozen=True)
class Probe:
    """A fitted multinomial logistic regression: ``x @ coef.T + intercept``."""

    coef: np.ndarray  # (K, D) float64
    intercept: np.ndarray  # (K,) float64
    C: float  # inverse regularisation strength

    def logits(self, features: np.ndarray) -> np.ndarray:
        """Features (N, D) -> class logits (N, K)."""
        return np.asarray(features, dtype=np.float64) @ self.coef.T + self.intercept

    def state(self) -> dict[str, Tensor]:
        """Return the parameters by their names in a checkpoint."""
        return {
            "coef": torch.from_numpy(self.coef),
            "intercept": torch.from_numpy(self.intercept),
            "C": torch.tensor(self.C, dtype=torch.float64),
        }

    @classmethod
    def load(cls, state: Mapping[str, Tensor]) -> Self:
        """Return the probe with the parameters in ``state``; other names are ignored."""
        return cls(state["coef"].numpy(), state["intercept"].numpy(), float(state["C"]))


def fit_probe(
    features: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray,
    *,
    folds: int,
    seed: int,
    grid: Sequence[float] = C_GRID,
    without_validation: float = C_WITHOUT_VALIDATION,
) -> Probe:
    """Fit the probe, choosing C by cross-validated log-likelihood inside the support set.

    With a handful of images, accuracy is equal over most of the grid, so log-likelihood decides.

    Args:
        features: (N, D).
        labels: (N,) integers covering 0..K-1.
        groups: (N,) integers; see ``stratified_folds``.
        folds: Number of cross-validation folds.
        seed: Seed of the folds' shuffle.
        grid: Candidate values of C.
        without_validation: C if no fold can be made.

    Returns:
        The probe refitted on the whole support with the chosen C.
    """
    features, back = in_span(np.asarray(features, dtype=np.float64))
    pairs = stratified_folds(labels, groups, folds, seed)
    best = _best_c(features, labels, pairs, grid) if pairs else without_validation
    probe = _fit(features, labels, best)
    return probe if back is None else Probe(np.ascontiguousarray(probe.coef @ back), probe.intercept, best)


def _best_c(
    features: np.ndarray,
    labels: np.ndarray,
    pairs: list[tuple[np.ndarray, np.ndarray]],
    grid: Sequence[float],
) -> float:
    """Return the C with the highest held-out log-likelihood.

    The search tries C in ascending order and starts each fit at the previous solution. The likelihood has one
    maximum over C, so the search stops after two decreases and skips the slowest fits.
    """
    fits: list[Probe | None] = [None] * len(pairs)
    scores: list[float] = []
    for c in sorted(grid):
        fits = [
            _fit(features[fit], labels[fit], c, start) for (fit, _), start in zip(pairs, fits, strict=True)
        ]
        scores.append(
            sum(
                _log_likelihood(probe, features[held], labels[held])
                for probe, (_, held) in zip(fits, pairs, strict=True)
                if probe
            )
        )
        if len(scores) > 2 and scores[-1] < scores[-2] < scores[-3]:
            break
    return sorted(grid)[int(np.argmax(scores))]


def in_span(features: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Rotate features (N, D) into their span (N, N); also return the rotation back (N, D), or None if N >= D.

    L2-regularised logistic regression is invariant to rotation, and its weights lie in that span.
    """
    if len(features) >= features.shape[1]:
        return features, None
    left, sizes, back = np.linalg.svd(features, full_matrices=False)
    return left * sizes, back


def _fit(features: np.ndarray, labels: np.ndarray, c: float, start: Probe | None = None) -> Probe:
    model = LogisticRegression(C=c, solver="lbfgs", max_iter=1000, warm_start=start is not None)
    if start is not None:
        model.classes_ = np.unique(labels)
        two = len(start.coef) == 2  # scikit-learn keeps one row for two classes
        model.coef_ = start.coef[1:] - start.coef[:1] if two else start.coef.copy()
        model.intercept_ = start.intercept[1:] - start.intercept[:1] if two else start.intercept.copy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # expected at C = 1e4
        model.fit(features, labels)
    coef, intercept = np.ascontiguousarray(model.coef_), np.asarray(model.intercept_)
    if len(model.classes_) == 2:
        coef, intercept = np.vstack([-coef, coef]) / 2, np.concatenate([-intercept, intercept]) / 2
    return Probe(coef, intercept, c)


def _log_likelihood(probe: Probe, features: np.ndarray, labels: np.ndarray) -> float:
    logits = probe.logits(features)
    return float((logits[np.arange(len(labels)), labels] - np.logaddexp.reduce(logits, axis=1)).sum())
