"""Out-of-fold validation of a whole method inside its support set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from medfocus.learning.method import Method, Support
from medfocus.learning.probe import stratified_folds


@dataclass(frozen=True)
class Validation:
    """How many of the held-out predictions were right; the count is 0 where nothing could be held out."""

    correct: int
    count: int


def out_of_fold(
    fit: Callable[[Support, torch.Generator], Method], support: Support, *, folds: int, seed: int
) -> Validation:
    """Refit the method on each fold's rest and predict the fold by its main classifier.

    Every choice (λ, C, the learning rate) is made anew without the held-out images, so the
    count is an honest estimate; patients and duplicates are never on both sides.

    Args:
        fit: Makes a fitted method of some of the images.
        support: The labelled images.
        folds: The wished number of folds; small classes bound it.
        seed: Of the folds and of every refit.
    """
    correct = count = 0
    for rest, held in stratified_folds(support.labels.numpy(), support.groups.numpy(), folds, seed):
        method = fit(support.subset(rest), torch.Generator().manual_seed(seed))
        out = support.subset(held)
        logits = next(iter(method.logits(out.inputs[0]).values()))  # (M, K)
        correct += int((logits.argmax(dim=1) == out.labels).sum())
        count += len(held)
    return Validation(correct, count)
