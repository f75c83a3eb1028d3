"""How a method makes a choice inside its support: held-out log-likelihood decides, and test has no say."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

import numpy as np
import torch
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn import functional

from medfocus.learning.method import Method, Support
from medfocus.learning.probe import stratified_folds

Candidate = TypeVar("Candidate")


@dataclass(frozen=True)
class LearningRates:
    """Candidates for a method's ``lr``, and how one of them is chosen."""

    values: tuple[float, ...]
    folds: int  # of the cross-validation; small classes bound it
    images: int  # of the support that it sees at most: every candidate is trained anew on each fold

    def fit(self, method: Method, support: Support, generator: torch.Generator) -> Method:
        """A copy of an unfitted method, fitted with the rate that does best inside the support.

        Where no fold can be made the first rate stands.
        """
        seed = generator.initial_seed() % 2**32

        def held_out_logits(fit: Support, held: Support) -> Iterable[Tensor]:
            for rate in self.values:
                fitted = _with_rate(method, rate).fit(fit, torch.Generator().manual_seed(seed))
                yield next(iter(fitted.logits(held.inputs[0]).values()))

        part = _stratified_part(support, self.images, seed)
        chosen = choose(
            self.values, part, held_out_logits, folds=self.folds, seed=seed, otherwise=self.values[0]
        )
        return _with_rate(method, chosen).fit(support, generator)


def _with_rate(method: Method, rate: float) -> Method:
    return replace(cast("Any", method), lr=rate)


def _stratified_part(support: Support, images: int, seed: int) -> Support:
    """At most so many images of a support, in the classes' shares; never fewer than two a class."""
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
) -> Candidate:
    """The candidate that gives the held-out folds of the support the highest log-likelihood.

    Log-likelihood and not accuracy decides, as for the probe's C: with a handful of images accuracy
    ties. Among equals the first wins.

    Args:
        candidates: One or more; a single one is taken without a look at the folds.
        support: The labelled images.
        held_out_logits: Maps what is fitted and what is held out, M images, to logits (M, K), one for each
            candidate and in their order, so that what the candidates share is computed once a fold.
        folds: The wished number; small classes bound it.
        seed: Of the folds' shuffle.
        otherwise: The answer where no fold can be made.
    """
    if len(candidates) == 1:
        return candidates[0]
    scores = np.zeros(len(candidates))
    pairs = stratified_folds(support.labels.numpy(), support.groups.numpy(), folds, seed)
    for fit, held in pairs:
        out = support.subset(held)
        scores -= [
            float(functional.cross_entropy(logits.double(), out.labels, reduction="sum"))
            for logits in held_out_logits(support.subset(fit), out)
        ]
    return candidates[int(np.argmax(scores))] if pairs else otherwise
