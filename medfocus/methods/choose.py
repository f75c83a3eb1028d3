"""How a method makes a choice inside its support: held-out log-likelihood decides, and test has no say."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import numpy as np
from torch import Tensor
from torch.nn import functional

from medfocus.methods.protocol import Support
from medfocus.probe import stratified_folds

Candidate = TypeVar("Candidate")


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

    Log-likelihood and not accuracy decides, as for the probe's C: with a handful of pictures accuracy
    ties. Among equals the first wins.

    Args:
        candidates: One or more; a single one is taken without a look at the folds.
        support: The labelled pictures.
        held_out_logits: Maps what is fitted and what is held out, M pictures, to logits (M, K), one for each
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
