"""Fit a whole method on its support set, and validate it out of fold."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch

from medfocus.learning.folds import stratified_folds
from medfocus.learning.method import Method, Support
from medfocus.learning.selection import LearningRates


@dataclass(frozen=True)
class Validation:
    """The numbers of correct and of all out-of-fold predictions; both are 0 if no fold could be made."""

    correct: int
    count: int


def fit(method: Method, support: Support, rates: LearningRates | None, seed: int) -> Method:
    """Return a fitted copy of ``method``. With ``rates``, cross-validation in the support chooses ``lr``."""
    generator = torch.Generator().manual_seed(seed)
    if rates:
        return rates.fit(method, support, generator)
    return copy.copy(method).fit(support, generator)


def validate(
    method: Method, support: Support, rates: LearningRates | None, *, folds: int, seed: int
) -> Validation:
    """Predict each fold by the main classifier of the method, fitted on the other folds.

    Each fit makes every choice (λ, C, the learning rate) again without the held-out images. No patient and no
    group of duplicates is in both parts. The accuracy is therefore an honest estimate.

    Args:
        method: The unfitted method.
        support: The labelled images.
        rates: Candidate learning rates; None to keep the method's own.
        folds: The wanted number of folds; 0 skips the validation. Small classes allow fewer folds.
        seed: Seed of the folds and of every refit.
    """
    if folds == 0:
        return Validation(0, 0)
    correct = count = 0
    for rest, held in stratified_folds(support.labels.numpy(), support.groups.numpy(), folds, seed):
        fitted = fit(method, support.subset(rest), rates, seed)
        held_out = support.subset(held)
        logits = next(iter(fitted.logits(held_out.inputs[0]).values()))  # (M, K)
        correct += int((logits.argmax(dim=1) == held_out.labels).sum())
        count += len(held)
    return Validation(correct, count)
