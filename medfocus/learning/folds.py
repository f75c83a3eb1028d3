"""Cross-validation folds inside a support set."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.model_selection import StratifiedGroupKFold


def seed_of(generator: torch.Generator) -> int:
    """Return the seed of ``generator``, below 2**32 as scikit-learn requires."""
    return generator.initial_seed() % 2**32


def stratified_folds(
    labels: np.ndarray, groups: np.ndarray, folds: int, seed: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Split a support set into (fit, held-out) index pairs that keep classes balanced and groups whole.

    A fold is left out if its fitting part lacks a class, because such a fold cannot be scored. If a class has
    a single group, the list is empty and nothing can be validated.

    Args:
        labels: (N,) integer labels.
        groups: (N,) integers; images of one patient or of one group of duplicates share a number.
        folds: The wanted number of folds; reduced to the number of groups in the smallest class.
        seed: Seed of the shuffle.

    Returns:
        Index pairs, at most ``folds`` of them.
    """
    smallest = min(len(np.unique(groups[labels == k])) for k in np.unique(labels))
    if min(folds, smallest) < 2:
        return []
    splitter = StratifiedGroupKFold(min(folds, smallest), shuffle=True, random_state=seed)
    classes = set(labels.tolist())
    return [
        (fit, held)
        for fit, held in splitter.split(np.zeros((len(labels), 1)), labels, groups)
        if len(held) and set(labels[fit].tolist()) == classes
    ]
