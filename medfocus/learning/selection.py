"""The choice of a hyperparameter inside a support set, by held-out log-likelihood."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, TypeVar

import numpy as np
import torch
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn import functional

from medfocus.learning.calibration import fit_temperature
from medfocus.learning.folds import seed_of, stratified_folds
from medfocus.learning.method import Method, Support

Candidate = TypeVar("Candidate")

CHOSEN = ("tuning", "lr")  # of a list of values, cross-validation inside the support selects one


@dataclass(frozen=True)
class Choice:
    """Candidate settings of a method, and the cross-validation that chooses among them."""

    candidates: tuple[Mapping[str, Any], ...]  # values for some of the method's hyperparameters
    folds: int  # wanted number of folds; small classes allow fewer
    images: int  # upper bound on the images used, because each fold trains every candidate

    def fit(self, method: Method, support: Support, generator: torch.Generator) -> Method:
        """Return a copy of ``method`` fitted with the candidate that does best inside the support.

        If no fold can be made, the first candidate is used.
        """
        seed = seed_of(generator)

        def held_out_logits(fit: Support, held: Support) -> Iterable[Tensor]:
            for settings in self.candidates:
                fitted = replace(method, **settings).fit(fit, torch.Generator().manual_seed(seed))
                yield next(iter(fitted.logits(held.inputs[0]).values()))

        part = _stratified_part(support, self.images, seed)
        first = self.candidates[0]
        best = choose(
            self.candidates,
            part,
            held_out_logits,
            folds=self.folds,
            seed=seed,
            otherwise=first,
            calibrated=True,
        )
        return replace(method, **best).fit(support, generator)


def candidates(settings: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """Return the combinations of values that ``settings`` list for the hyperparameters in CHOSEN.

    The first combination has the first value of each. Without a list, there is one combination. Raises
    ValueError for an empty list.
    """
    listed = {name: settings[name] for name in CHOSEN if isinstance(settings.get(name), list | tuple)}
    if empty := [name for name, values in listed.items() if not values]:
        raise ValueError(f"{empty[0]} is an empty list; give one value, or several to choose from.")
    return tuple(dict(zip(listed, values, strict=True)) for values in product(*listed.values()))


def _stratified_part(support: Support, images: int, seed: int) -> Support:
    """Return at most ``images`` images of a support, stratified by class; at least two images per class."""
    counts = support.labels.bincount()
    wanted = max(images, 2 * len(counts))
    if wanted + len(counts) > len(support.labels) or counts.min() < 2:
        return support
    index = np.arange(len(support.labels))
    part, _ = train_test_split(index, train_size=wanted, stratify=support.labels.numpy(), random_state=seed)
    return support.subset(np.sort(part))


def choose(
    candidates: Sequence[Candidate],
    support: Support,
    held_out_logits: Callable[[Support, Support], Iterable[Tensor]],
    *,
    folds: int,
    seed: int,
    otherwise: Candidate,
    calibrated: bool = False,
) -> Candidate:
    """Return the candidate with the highest log-likelihood on the held-out folds of the support.

    With a handful of images, accuracies are often equal, so log-likelihood decides. If candidates are equal,
    the first wins.

    Args:
        candidates: One or more; a single candidate is returned without cross-validation.
        support: The labelled images.
        held_out_logits: Maps the part to fit on and the held-out part (M images) to one tensor of logits
            (M, K) per candidate, in the order of the candidates. It runs once per fold, so that candidates
            can share computation.
        folds: The wanted number of folds; small classes allow fewer.
        seed: Seed of the folds' shuffle.
        otherwise: The value to return if no fold can be made.
        calibrated: Whether each candidate's logits are first divided by the temperature that fits them best.
            A tuned network is overconfident, which costs likelihood and which calibration repairs.
    """
    if len(candidates) == 1:
        return candidates[0]
    pairs = [
        (support.subset(fit), support.subset(held))
        for fit, held in stratified_folds(support.labels.numpy(), support.groups.numpy(), folds, seed)
    ]
    if not pairs:
        return otherwise
    labels = [held.labels for _, held in pairs]
    by_fold = [[logits.double() for logits in held_out_logits(fit, held)] for fit, held in pairs]
    scores = []
    for logits in zip(*by_fold, strict=True):  # one candidate's, of all folds
        scale = fit_temperature(torch.cat(logits).numpy(), torch.cat(labels).numpy()) if calibrated else 1.0
        losses = (
            functional.cross_entropy(of_fold / scale, truth, reduction="sum")
            for of_fold, truth in zip(logits, labels, strict=True)
        )
        scores.append(-sum(map(float, losses)))
    return candidates[int(np.argmax(scores))]
