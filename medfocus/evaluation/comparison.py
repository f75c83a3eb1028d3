"""Is a system better than the baseline on the same test images? Paired by image, over all draws.

The unit is the image (or its patient), never the draw: all draws are tested on the same images, so their
discordant counts are not independent, and a sum or a combination of their p-values would count every image
several times. What is tested are the classifiers of the supports that were drawn, on new images of the same
kind; how much another support would change is what the interval over draws says.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

Cell = tuple[str, float]  # a system and its percent of train

_BLOCK = 2_000_000  # numbers of a block of resamples


@dataclass(frozen=True)
class Difference:
    """How much more accurate a system is than its baseline, as a mean over draws, in [-1, 1]."""

    mean: float
    low: float  # ends of the 95 % bootstrap interval over images
    high: float
    bootstrap_p: float  # two-sided
    p: float  # exact, two-sided; see ``sign_flip``
    adjusted_p: float  # Holm's, over every difference that was tested together; see ``compare``
    draws: int  # of the system
    images: int


@dataclass(frozen=True)
class Scored:
    """Every system on one test set."""

    correct: Mapping[Cell, np.ndarray]  # -> (R, N) bool: which of the N images each draw got right
    patients: np.ndarray | None = None  # (N,) equal for images of one patient; None: each its own


def compare(
    tests: Sequence[Scored], baseline: str, generator: np.random.Generator, resamples: int = 10_000
) -> list[dict[Cell, Difference]]:
    """Every system against the baseline at the same percent of train, with Holm's correction over all of it.

    A baseline that needs no training image, with a single cell at 0 %, is compared at every percent.
    Systems without the baseline beside them, and the baseline itself, are left out.

    Args:
        tests: One entry a test set.
        baseline: The system that the others are compared with.
        generator: Of the bootstrap.
        resamples: Of the bootstrap.

    Raises:
        ValueError: No test set has the baseline; shapes that do not fit; see ``bootstrap``.
    """
    known = {system for test in tests for system, _ in test.correct}
    if baseline not in known:
        names = ", ".join(sorted(known)) or "none"
        raise ValueError(f"compare: no result of the baseline '{baseline}'; there are {names}.")
    found: list[dict[Cell, Difference]] = []
    for test in tests:
        percents = {percent for system, percent in test.correct if system == baseline}
        level = 0.0 if percents == {0.0} else None
        found.append({})
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
            found[-1][system, percent] = Difference(mean, low, high, bootstrap_p, p, p, draws, images)
    adjusted = iter(holm([difference.p for block in found for difference in block.values()]))
    return [
        {cell: _adjusted(difference, float(next(adjusted))) for cell, difference in block.items()}
        for block in found
    ]


def paired_sums(
    ours: np.ndarray, theirs: np.ndarray, patients: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, int]:
    """What each patient (or image) says for us, as whole numbers, so that what follows can be exact.

    Args:
        ours: (R, N) bool, which images each of R draws got right.
        theirs: (S, N) bool, the baseline's; S may differ from R.
        patients: (N,) equal for images of one patient; None: each image is its own.

    Returns:
        sums (G,) int, sizes (G,) int and a scale: sums / scale is the difference of the mean number of right
        images, sizes the number of images.

    Raises ValueError where the numbers of images differ or there is no draw or image.
    """
    images = ours.shape[1]
    if theirs.shape[1] != images or (patients is not None and len(patients) != images):
        others = [theirs.shape[1], *([] if patients is None else [len(patients)])]
        raise ValueError(
            f"paired_sums: {images} images beside {' and '.join(map(str, others))}; "
            "give the same images in the same order."
        )
    if not (ours.size and theirs.size):
        raise ValueError(
            f"paired_sums: results of shape {ours.shape} and {theirs.shape}; "
            "give a draw and an image at least."
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
    """Paired bootstrap over patients (or images): a 95 % interval and a two-sided p of the mean difference.

    Percentile interval; p is twice the smaller share of resampled differences on either side of 0, each with
    one added to count and number so that it is never 0 (Davison and Hinkley, Bootstrap Methods and their
    Application, 1997, chapter 4; used so for paired systems in Koehn, EMNLP 2004). Few images that
    differ make it too small: ``sign_flip`` is the p to trust there. Equal patients are drawn together, as
    the counts of a multinomial: the same distribution, many times faster.

    Args:
        sums: (G,) difference of the mean number of right images, a patient.
        sizes: (G,) images per patient.
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
    means[np.abs(means) < 1e-12] = 0  # rounding would put a tie on one side of it
    low, high = np.quantile(means, [0.025, 0.975])
    sides = [(1 + (means <= 0).sum()) / (1 + resamples), (1 + (means >= 0).sum()) / (1 + resamples)]
    return float(low), float(high), float(min(1.0, 2 * min(sides)))


def sign_flip(sums: np.ndarray) -> float:
    """Exact two-sided randomisation test on whole paired differences (G,): Fisher and Pitman's, by image.

    Where the systems are equally good, each image might as well have had their results, those of all draws
    together, the other way round: every sign of a difference is as likely as the other. p is the share of
    all 2^G choices of signs whose sum is as far from 0 as the one seen or farther; counted by convolution,
    without sampling. With one draw and an image per patient this *is* McNemar's exact test; with several
    draws it is McNemar's test with the image as the unit. That an image's results may be swapped holds
    exactly where both systems have as many draws, and nearly so beside a baseline of one draw.

    Fisher, The Design of Experiments, 1935, section 21; Pitman, J. R. Stat. Soc. Suppl. 4, 1937; Yeh,
    COLING 2000, arXiv cs/0008005, for the accuracy of two systems.
    """
    weights, numbers = np.unique(np.abs(sums[sums != 0]), return_counts=True)
    if not len(weights):
        return 1.0
    divisor = int(np.gcd.reduce(weights))
    weights = weights // divisor
    chances = np.ones(1)  # [i]: that the positive differences sum to i
    for weight, number in zip(weights.tolist(), numbers.tolist(), strict=True):
        spread = np.zeros(weight * number + 1)
        spread[::weight] = stats.binom.pmf(np.arange(number + 1), number, 0.5)
        chances = np.convolve(chances, spread)
    most = len(chances) - 1  # the sum of all, were they positive
    away = np.abs(2 * np.arange(most + 1) - most)  # what the signed sum is then, in units of the divisor
    return float(min(1.0, chances[away >= abs(int(sums.sum())) // divisor].sum()))


def mcnemar(ours: np.ndarray, theirs: np.ndarray) -> tuple[int, int, float]:
    """McNemar's exact test of one draw (Psychometrika 12, 1947): (N,) bool and (N,) bool.

    Returns the images that only we got right, those that only they got right, and the two-sided p.
    """
    only_ours, only_theirs = int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
    discordant = only_ours + only_theirs
    p = float(stats.binomtest(only_ours, discordant).pvalue) if discordant else 1.0
    return only_ours, only_theirs, p


def holm(p: Sequence[float]) -> np.ndarray:
    """Holm's step-down adjusted p-values (M,), whatever their dependence (Scand. J. Stat. 6, 1979).

    Raises ValueError for a p outside of [0, 1].
    """
    values = np.asarray(p, dtype=float)
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError(f"holm: p-values from {values.min()} to {values.max()}; they lie in [0, 1].")
    order = np.argsort(values, kind="stable")
    stepped = np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1))
    adjusted = np.empty(len(values))
    adjusted[order] = np.minimum(stepped, 1)
    return adjusted


def _adjusted(difference: Difference, p: float) -> Difference:
    return Difference(**{**vars(difference), "adjusted_p": p})
