"""Fit a whole method on its support set, and validate it out of fold."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from medfocus.learning.calibration import Calibration, calibrate
from medfocus.learning.folds import stratified_folds
from medfocus.learning.method import Method, Support
from medfocus.learning.selection import Choice


@dataclass(frozen=True, eq=False)
class Validation:
    """The main classifier's predictions out of fold; none if no fold could be made."""

    logits: Tensor  # (M, K), divided by the ``spread`` of the model that predicts
    labels: Tensor  # (M,)

    @property
    def correct(self) -> int:
        """Return the number of correct predictions."""
        return int((self.logits.argmax(dim=1) == self.labels).sum())

    @property
    def count(self) -> int:
        """Return the number of predictions."""
        return len(self.labels)


def fit(method: Method, support: Support, choice: Choice | None, seed: int) -> Method:
    """Return a fitted copy of ``method``. With ``choice``, it has the settings of the best candidate."""
    generator = torch.Generator().manual_seed(seed)
    if choice:
        return choice.fit(method, support, generator)
    return copy.copy(method).fit(support, generator)


def spread(method: Method, support: Support) -> float:
    """Return the root mean square of a fitted method's logits on its own images, centred for each image."""
    logits = next(iter(method.logits(support.inputs[0]).values())).double()  # (N, K)
    return max(float((logits - logits.mean(dim=1, keepdim=True)).square().mean().sqrt()), 1e-12)


def calibration(method: Method, support: Support, validation: Validation, confidence: float) -> Calibration:
    """Fit the temperature and the threshold of the sets for a method that was fitted on the whole support.

    The logits out of fold are brought to the spread of this method's own logits. Each fold chooses its own
    regularisation, so its logits may be many times larger or smaller than those of the whole support.
    """
    if not validation.count:
        return Calibration(confidence=confidence)
    logits = validation.logits * spread(method, support)
    return calibrate(logits.numpy(), validation.labels.numpy(), confidence)


def validate(method: Method, support: Support, choice: Choice | None, *, folds: int, seed: int) -> Validation:
    """Predict each fold by the main classifier of the method, fitted on the other folds.

    Each fit makes every choice (λ, C, the learning rate, frozen or tuned) again without the held-out images.
    No patient and no group of duplicates is in both parts. The accuracy is therefore an honest estimate, and
    the logits can calibrate the method's probabilities.

    Args:
        method: The unfitted method.
        support: The labelled images.
        choice: Candidate settings; None to keep the method's own.
        folds: The wanted number of folds; 0 skips the validation. Small classes allow fewer folds.
        seed: Seed of the folds and of every refit.
    """
    logits = [torch.empty(0, len(support.text_features), dtype=torch.float64)]
    labels = [support.labels[:0]]
    pairs = stratified_folds(support.labels.numpy(), support.groups.numpy(), folds, seed) if folds else []
    for rest, held in pairs:
        fitted = fit(method, support.subset(rest), choice, seed)
        held_out = support.subset(held)
        predicted = next(iter(fitted.logits(held_out.inputs[0]).values())).detach().cpu()  # (M', K)
        logits.append(predicted.double() / spread(fitted, support.subset(rest)))
        labels.append(held_out.labels)
    return Validation(torch.cat(logits), torch.cat(labels))
