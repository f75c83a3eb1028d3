"""May a challenger take the champion's place? Every condition is checked and told, met or not."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from medfocus.evaluation.comparison import mcnemar
from medfocus.evaluation.drift import Shift
from medfocus.evaluation.metrics import expected_calibration_error, per_class_recall


@dataclass(frozen=True)
class Rules:
    """What a challenger has to fulfil."""

    margin: float  # of accuracy, by which it has to be above the champion; below 0: may be so much worse
    p: float  # at most, McNemar's exact two-sided; 1 asks for no test
    images: int  # at least, on which both are compared: test images that the champion has not learnt from
    recall: Mapping[str, float]  # floor of a class; "all" for those that are not named
    calibration: float  # expected calibration error at most


@dataclass(frozen=True)
class Check:
    """One condition."""

    name: str
    passed: bool
    found: str
    asked: str


@dataclass(frozen=True)
class Champion:
    """The present champion on the challenger's test images."""

    version: str
    classes: tuple[str, ...]
    predicted: np.ndarray  # (N,) str, a class for each test image
    fair: np.ndarray  # (N,) bool: images that it has not learnt from, nor from a twin or the same patient


@dataclass(frozen=True)
class Decision:
    """Whether the challenger is promoted, and all that was looked at."""

    checks: tuple[Check, ...]

    @property
    def promoted(self) -> bool:
        """Every check is passed."""
        return all(check.passed for check in self.checks)

    @property
    def reason(self) -> str:
        """One line for a tag."""
        failed = [
            f"{check.name}: {check.found}, asked {check.asked}" for check in self.checks if not check.passed
        ]
        if failed:
            return "refused: " + "; ".join(failed)
        return "promoted: " + "; ".join(f"{check.name}: {check.found}" for check in self.checks)


def judge(
    probabilities: np.ndarray,
    labels: np.ndarray,
    classes: Sequence[str],
    rules: Rules,
    champion: Champion | None,
    shifts: Sequence[Shift] = (),
) -> Decision:
    """Hold a challenger against the rules and the present champion, if there is one.

    Args:
        probabilities: (N, K) of the challenger on its test images, which it has not learnt from.
        labels: (N,) integers in [0, K).
        classes: (K,) in the order of the columns.
        rules: The conditions.
        champion: None where there is none yet: then the challenger need not be better than anything.
        shifts: How the images that came since the champion differ from those before.
    """
    checks: list[Check] = []
    if champion is not None:
        checks += _against(champion, probabilities, labels, classes, rules)
    recalls = per_class_recall(probabilities, labels)  # (K,)
    for name, recall in zip(classes, recalls, strict=True):
        floor = rules.recall.get(name, rules.recall.get("all", 0.0))
        if floor > 0:
            found = "no test image" if math.isnan(recall) else f"{recall:.3f}"
            checks.append(Check(f"recall of {name}", bool(recall >= floor), found, f"{floor:g} at least"))
    ece = expected_calibration_error(probabilities, labels)
    asked = f"{rules.calibration:g} at most"
    checks.append(Check("calibration error", ece <= rules.calibration, f"{ece:.3f}", asked))
    for shift in shifts:
        found = "too few images to tell" if math.isnan(shift.value) else f"{shift.value:.3f}, p {shift.p:.2g}"
        checks.append(Check(f"drift of {shift.name}", not shift.past, found, f"{shift.bound:g} at most"))
    return Decision(tuple(checks))


def _against(
    champion: Champion, probabilities: np.ndarray, labels: np.ndarray, classes: Sequence[str], rules: Rules
) -> list[Check]:
    known = sorted(champion.classes)
    same = known == sorted(classes)
    found = "the same" if same else f"{', '.join(sorted(classes))}"
    checks = [Check("classes", same, found, f"those of version {champion.version}: {', '.join(known)}")]
    fair = int(champion.fair.sum())
    checks.append(
        Check("test images new to both", fair >= rules.images, str(fair), f"{rules.images} at least")
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
            f"{right.mean():.4f} to {theirs.mean():.4f} of version {champion.version}",
            f"above it by more than {rules.margin:g}",
        )
    )
    if rules.p < 1:
        found = f"p {p:.3g} ({ours_only} images for it, {theirs_only} against)"
        checks.append(Check("paired test", p <= rules.p, found, f"p {rules.p:g} at most"))
    return checks
