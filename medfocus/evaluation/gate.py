"""Decide whether a challenger replaces the champion, and report the check of every condition."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from medfocus.evaluation.comparison import mcnemar
from medfocus.evaluation.drift import Shift
from medfocus.evaluation.metrics import per_class_recall, reliability


@dataclass(frozen=True)
class Rules:
    """The conditions for a challenger."""

    margin: float  # minimal gain in accuracy over the champion; a negative margin allows a loss
    p: float  # maximal two-sided p of McNemar's exact test; 1 disables the test
    images: int  # minimal number of test images that the champion was not trained on
    recall: Mapping[str, float]  # minimal recall of a class; "all" for classes without their own
    calibration: float  # maximal expected calibration error


@dataclass(frozen=True)
class Check:
    """The result of one condition."""

    name: str
    passed: bool
    value: str
    required: str
    is_drift: bool = False


@dataclass(frozen=True)
class Champion:
    """The present champion on the challenger's test images."""

    version: str
    classes: tuple[str, ...]
    predicted: np.ndarray  # (N,) str, the predicted class of each test image
    fair: np.ndarray  # (N,) bool: the training set had neither the image, nor a twin, nor its patient


@dataclass(frozen=True)
class Decision:
    """Whether the challenger is promoted, with all checks."""

    checks: tuple[Check, ...]

    @property
    def promoted(self) -> bool:
        """Whether all checks passed."""
        return all(check.passed for check in self.checks)

    @property
    def reason(self) -> str:
        """The decision in one line."""
        failed = [check for check in self.checks if not check.passed]
        if failed:
            return "refused: " + "; ".join(f"{c.name}: {c.value}, required {c.required}" for c in failed)
        return "promoted: " + "; ".join(f"{check.name}: {check.value}" for check in self.checks)


def judge(
    probabilities: np.ndarray,
    labels: np.ndarray,
    classes: Sequence[str],
    rules: Rules,
    champion: Champion | None,
    shifts: Sequence[Shift] = (),
) -> Decision:
    """Check a challenger against the rules and the present champion, if there is one.

    Args:
        probabilities: (N, K) of the challenger on its test images, none of which it was trained on.
        labels: (N,) integers in [0, K).
        classes: (K,) in the order of the columns.
        rules: The conditions.
        champion: The present champion; with None, the challenger is not compared.
        shifts: Differences between new images and the images of the champion.
    """
    checks: list[Check] = []
    if champion is not None:
        checks += _against(champion, probabilities, labels, classes, rules)
    recalls = per_class_recall(probabilities, labels)  # (K,)
    for name, recall in zip(classes, recalls, strict=True):
        floor = rules.recall.get(name, rules.recall.get("all", 0.0))
        if floor > 0:
            value = "no test image" if math.isnan(recall) else f"{recall:.3f}"
            checks.append(Check(f"recall of {name}", bool(recall >= floor), value, f"at least {floor:g}"))
    ece = reliability(probabilities, labels).ece
    required = f"at most {rules.calibration:g}"
    checks.append(Check("calibration error", ece <= rules.calibration, f"{ece:.3f}", required))
    for shift in shifts:
        value = "too few images" if math.isnan(shift.value) else f"{shift.value:.3f}, p {shift.p:.2g}"
        required = f"at most {shift.bound:g}"
        checks.append(Check(f"drift of {shift.name}", not shift.past, value, required, is_drift=True))
    return Decision(tuple(checks))


def _against(
    champion: Champion, probabilities: np.ndarray, labels: np.ndarray, classes: Sequence[str], rules: Rules
) -> list[Check]:
    known = sorted(champion.classes)
    same = known == sorted(classes)
    value = "the same" if same else ", ".join(sorted(classes))
    checks = [Check("classes", same, value, f"as in version {champion.version}: {', '.join(known)}")]
    fair = int(champion.fair.sum())
    checks.append(
        Check("test images new to both", fair >= rules.images, str(fair), f"at least {rules.images}")
    )
    if not fair:
        return checks
    names = np.asarray(classes)
    right = (probabilities.argmax(1) == labels)[champion.fair]
    theirs = (champion.predicted == names[labels])[champion.fair]
    ours_only, theirs_only, p = mcnemar(right, theirs)
    above = right.mean() - theirs.mean()
    checks.append(
        Check(
            "accuracy",
            bool(above > rules.margin),
            f"{right.mean():.4f}; version {champion.version} has {theirs.mean():.4f}",
            f"a difference above {rules.margin:g}",
        )
    )
    if rules.p < 1:
        value = f"p {p:.3g} ({ours_only} images better, {theirs_only} worse)"
        checks.append(Check("paired test", p <= rules.p, value, f"p at most {rules.p:g}"))
    return checks
