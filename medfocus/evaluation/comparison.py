"""Compare systems with a baseline on the same test images, paired by image, over all draws.

The unit is the image (or its patient), never the draw. All draws are tested on the same images, so that their
discordant counts are not independent, and a sum or combination of their p-values would count every image
several times. The tests ask how the classifiers of the drawn supports differ on new images of the same kind.
The interval over draws (``metrics.mean_interval``) shows how much the choice of the support matters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

CurvePoint = tuple[str, float]  # a system, and the percent of train in its support

_BLOCK = 2_000_000  # numbers per block of resamples


@dataclass(frozen=True)
class Difference:
    """The accuracy of a system minus that of the baseline, a mean over draws, in [-1, 1]."""

    mean: float
    low: float  # ends of the 95 % bootstrap interval over images
    high: float
    bootstrap_p: float  # two-sided
    p: float  # exact, two-sided; see ``sign_flip``
    adjusted_p: float  # Holm's, over all differences of one ``compare``
    draws: int  # number of draws of the system
    images: int


@dataclass(frozen=True)
class Scored:
    """The results of all systems on one test set."""

    correct: Mapping[CurvePoint, np.ndarray]  # -> (R, N) bool: whether draw r classifies image n correctly
    patients: np.ndarray | None = None  # (N,) equal for images of one patient; None if each image has its own


def compare(
    tests: Sequence[Scored], baseline: str, generator: np.random.Generator, resamples: int = 10_000
) -> list[dict[CurvePoint, Difference]]:
    """Compare every system with the baseline at the same percent of train; correct all p-values by Holm.

    A baseline without training has results at 0 % only, and is compared at every percent. Results without a
    baseline at their percent are left out, and so is the baseline itself.

    Args:
        tests: One entry per test set.
        baseline: The system to compare with.
        generator: Random generator of the bootstrap.
        resamples: Number of bootstrap resamples.

    Raises:
        ValueError: No test set has the baseline, or shapes differ; see ``bootstrap``.
    """
    known = {system for test in tests for system, _ in test.correct}
    if baseline not in known:
        names = ", ".join(sorted(known)) or "none"
        raise ValueError(f"compare: no result of the baseline '{baseline}'; the systems are {names}.")
    differences: list[dict[CurvePoint, Difference]] = []
    for test in tests:
        percents = {percent for system, percent in test.correct if system == baseline}
        level = 0.0 if percents == {0.0} else None
        differences.append({})
        for (system, percent), correct in test.correct.items():
            at = percent if level is None else level
            if system == baseline or (baseline, at) not in test.correct:
                continue
            theirs = test.correct[baseline, at]
            sums, sizes, scale = paired_sums(correct, theirs, test.patients)
            low, high, bootstrap_p = bootstrap(sums / scale, sizes, generator, resamples)
            p = sign_flip(sums)
            mean = float(sums.sum() / scale / sizes.sum())
            draws, images = correct.shape
            differences[-1][system, percent] = Difference(mean, low, high, bootstrap_p, p, p, draws, images)
    adjusted = iter(holm([difference.p for block in differences for difference in block.values()]))
    return [
        {point: replace(difference, adjusted_p=float(next(adjusted))) for point, difference in block.items()}
        for block in differences
    ]


def paired_sums(
    ours: np.ndarray, theirs: np.ndarray, patients: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, int]:
    """Return the paired difference of each patient (or image) as an integer, so that tests can be exact.

    Args:
        ours: (R, N) bool, whether each of R draws classifies each image correctly.
        theirs: (S, N) bool, the same for the baseline; S may differ from R.
        patients: (N,) equal for images of one patient; None if each image has its own patient.

    Returns:
        sums (G,) int, sizes (G,) int and a scale. For each patient, sums / scale is the difference in the
        number of correct images, averaged over draws, and sizes is the number of images.

    Raises ValueError if the numbers of images differ, or without a draw or an image.
    """
    images = ours.shape[1]
    if theirs.shape[1] != images or (patients is not None and len(patients) != images):
        others = [theirs.shape[1], *([] if patients is None else [len(patients)])]
        raise ValueError(
            f"paired_sums: {images} images, but {' and '.join(map(str, others))} in the other arrays; "
            "give the same images in the same order."
        )
    if not (ours.size and theirs.size):
        raise ValueError(
            f"paired_sums: results of shape {ours.shape} and {theirs.shape}; "
            "give at least one draw and one image."
        )
    scale = math.lcm(len(ours), len(theirs))
    each = ours.sum(axis=0, dtype=np.int64) * (scale // len(ours))  # (N,)
    each -= theirs.sum(axis=0, dtype=np.int64) * (scale // len(theirs))
    if patients is None:
        return each, np.ones(images, dtype=np.int64), scale
    _, group = np.unique(patients, return_inverse=True)
    sums = np.zeros(int(group.max()) + 1, dtype=np.int64)
    np.add.at(sums, group, each)
    return sums, np.bincount(group), scale


def bootstrap(
    sums: np.ndarray, sizes: np.ndarray, generator: np.random.Generator, resamples: int
) -> tuple[float, float, float]:
    """Bootstrap the mean difference over patients (or images): a 95 % interval and a two-sided p.

    The interval is the percentile interval. p is twice the smaller share of resampled differences on either
    side of 0, with one added to both numbers of the share so that p is never 0 (Davison and Hinkley,
    Bootstrap Methods and their Application, 1997, chapter 4; for paired systems Koehn, EMNLP 2004). With few
    differing images p is too small; then use ``sign_flip``. Patients with equal differences are drawn
    together, as counts of a multinomial, which gives the same distribution many times faster.

    Args:
        sums: (G,) difference in the mean number of correct images, for each patient.
        sizes: (G,) number of images of each patient.
        generator: Two generators in the same state give the same result.
        resamples: 1 or more.

    Raises ValueError for no resamples.
    """
    if resamples < 1:
        raise ValueError(f"bootstrap: {resamples} resamples; 10000 are usual.")
    kinds, counts = np.unique(np.stack([sums, sizes], axis=1), axis=0, return_counts=True)  # (V, 2), (V,)
    parts = []
    step = max(1, _BLOCK // len(kinds))
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        drawn = generator.multinomial(counts.sum(), counts / counts.sum(), size=size)  # (B, V)
        total, images = (drawn @ kinds).T  # (B, V) @ (V, 2) -> (2, B)
        parts.append(total / images)
    means = np.concatenate(parts)  # (resamples,)
    means[np.abs(means) < 1e-12] = 0  # undo rounding, which moves ties off 0
    low, high = np.quantile(means, [0.025, 0.975])
    sides = [(1 + (means <= 0).sum()) / (1 + resamples), (1 + (means >= 0).sum()) / (1 + resamples)]
    return float(low), float(high), float(min(1.0, 2 * min(sides)))


def sign_flip(sums: np.ndarray) -> float:
    """Return the exact two-sided p of Fisher and Pitman's randomisation test on integer differences (G,).

    Under the null hypothesis, the two systems' results on an image over all draws can be exchanged, so both
    signs of a difference are equally likely. p is the share of all 2^G sign assignments with a sum at
    least as far from 0 as the observed sum; a convolution counts them without sampling. With one draw and one
    image per patient this is McNemar's exact test; with several draws it is McNemar's test with the image as
    the unit.
    p is exact if both systems have the same number of draws, and nearly exact if the baseline has one draw.

    Fisher, The Design of Experiments, 1935, section 21; Pitman, J. R. Stat. Soc. Suppl. 4, 1937; Yeh,
    COLING 2000, arXiv cs/0008005, for the accuracy of two systems.
    """
    weights, numbers = np.unique(np.abs(sums[sums != 0]), return_counts=True)
    if not len(weights):
        return 1.0
    divisor = int(np.gcd.reduce(weights))
    weights = weights // divisor
    chances = np.ones(1)  # [i]: probability that the positive differences sum to i
    for weight, number in zip(weights.tolist(), numbers.tolist(), strict=True):
        spread = np.zeros(weight * number + 1)
        spread[::weight] = stats.binom.pmf(np.arange(number + 1), number, 0.5)
        chances = np.convolve(chances, spread)
    most = len(chances) - 1  # the sum if all are positive
    away = np.abs(2 * np.arange(most + 1) - most)  # absolute signed sum, in units of the divisor
    return float(min(1.0, chances[away >= abs(int(sums.sum())) // divisor].sum()))


def mcnemar(ours: np.ndarray, theirs: np.ndarray) -> tuple[int, int, float]:
    """Apply McNemar's exact test to one draw (Psychometrika 12, 1947): (N,) bool and (N,) bool.

    Returns the number of images that only ``ours`` classifies correctly, the number that only ``theirs``
    does, and the two-sided p.
    """
    only_ours, only_theirs = int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
    discordant = only_ours + only_theirs
    p = float(stats.binomtest(only_ours, discordant).pvalue) if discordant else 1.0
    return only_ours, only_theirs, p


def holm(p: Sequence[float]) -> np.ndarray:
    """Return Holm's step-down adjusted p-values (M,), valid under any dependence (Scand. J. Stat. 6, 1979).

    Raises ValueError for a p outside of [0, 1].
    """
    values = np.asarray(p, dtype=float)
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError(f"holm: p-values from {values.min()} to {values.max()}; give values in [0, 1].")
    order = np.argsort(values, kind="stable")
    stepped = np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1))
    adjusted = np.empty(len(values))
    adjusted[order] = np.minimum(stepped, 1)
    return adjusted
