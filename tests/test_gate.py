"""Each condition of the gate alone stops a challenger and gives its reason."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from medfocus.evaluation.drift import Shift
from medfocus.evaluation.gate import Champion, Decision, Rules, judge

CLASSES = ("benign", "malignant")
RULES = Rules(margin=0.0, p=0.05, images=20, recall={"all": 0.5}, calibration=0.2)
LABELS = np.repeat([0, 1], 30)  # (60,)


def probabilities(wrong: int, confidence: float = 0.95) -> np.ndarray:
    """(60, 2): correct except for ``wrong`` images of the first class."""
    predicted = LABELS.copy()
    predicted[:wrong] = 1
    return np.where(np.eye(2, dtype=bool)[predicted], confidence, 1 - confidence)


def champion(wrong: int, **changed: Any) -> Champion:
    predicted = np.array(CLASSES)[LABELS]
    predicted[:wrong] = CLASSES[1]
    return replace(Champion("3", CLASSES, predicted, np.ones(60, bool)), **changed)


def failed(decision: Decision) -> list[str]:
    return [check.name for check in decision.checks if not check.passed]


def test_a_significantly_better_challenger_is_promoted_with_every_number_in_the_reason() -> None:
    decision = judge(probabilities(2), LABELS, CLASSES, RULES, champion(12))
    assert decision.promoted
    assert decision.reason.startswith("promoted: classes: the same; test images new to both: 60; ")
    assert "accuracy: 0.9667; version 3 has 0.8000" in decision.reason
    assert "paired test: p 0.00195 (10 images better, 0 worse)" in decision.reason


def test_without_a_champion_only_recall_and_calibration_are_checked() -> None:
    decision = judge(probabilities(2), LABELS, CLASSES, RULES, None)
    assert [check.name for check in decision.checks] == [
        "recall of benign", "recall of malignant", "calibration error"
    ]  # fmt: skip
    assert decision.promoted


@pytest.mark.parametrize(
    ("wrong", "theirs", "rules", "conditions"),
    [
        (2, 5, RULES, ["paired test"]),  # better by chance
        (5, 5, RULES, ["accuracy", "paired test"]),
        (12, 2, RULES, ["accuracy"]),  # significantly worse
        (2, 12, replace(RULES, margin=0.2), ["accuracy"]),
        (5, 5, replace(RULES, margin=-0.02, p=1), []),  # equal, with a negative margin
        (7, 5, replace(RULES, margin=-0.02, p=1), ["accuracy"]),
        (16, 29, RULES, ["recall of benign", "calibration error"]),
        (2, 12, replace(RULES, recall={"malignant": 1.0, "all": 0.95}), ["recall of benign"]),
        (2, 12, replace(RULES, recall={"malignant": 1.0}), []),
    ],
)
def test_each_condition_alone_stops_a_challenger(
    wrong: int, theirs: int, rules: Rules, conditions: list[str]
) -> None:
    assert failed(judge(probabilities(wrong), LABELS, CLASSES, rules, champion(theirs))) == conditions


def test_an_overconfident_challenger_is_refused() -> None:
    rules = replace(RULES, calibration=0.1)
    assert not failed(judge(probabilities(2, 0.95), LABELS, CLASSES, rules, None))
    assert failed(judge(probabilities(9, 0.999), LABELS, CLASSES, rules, None)) == ["calibration error"]


def test_different_classes_stop_promotion() -> None:
    decision = judge(probabilities(2), LABELS, CLASSES, RULES, champion(12, classes=("benign", "cyst")))
    assert "classes: benign, malignant, required as in version 3: benign, cyst" in decision.reason


def test_only_images_outside_the_champions_training_set_are_compared() -> None:
    fair = np.ones(60, bool)
    fair[:12] = False  # they were in its training set
    decision = judge(probabilities(12), LABELS, CLASSES, replace(RULES, p=1), champion(0, fair=fair))
    assert "accuracy: 1.0000; version 3 has 1.0000" in decision.reason
    few = champion(12, fair=np.arange(60) < 10)
    assert "test images new to both" in failed(judge(probabilities(0), LABELS, CLASSES, RULES, few))
    none = champion(12, fair=np.zeros(60, bool))
    assert failed(judge(probabilities(0), LABELS, CLASSES, RULES, none)) == ["test images new to both"]


def test_a_drift_above_its_bound_stops_promotion() -> None:
    shifts = [
        Shift("embedding", 0.7, 0.85, 0.001, past=False),
        Shift("classes", 0.5, 0.3, 1e-6, past=True),
        Shift("coverage", float("nan"), 0.4, 1.0, past=False),
    ]
    decision = judge(probabilities(2), LABELS, CLASSES, RULES, champion(12), shifts)
    assert failed(decision) == ["drift of classes"]
    assert decision.reason == "refused: drift of classes: 0.500, p 1e-06, required at most 0.3"
    assert decision.checks[-1].value == "too few images"


def test_a_class_without_a_test_image_fails_its_recall_check() -> None:
    decision = judge(probabilities(0)[:30], LABELS[:30], CLASSES, RULES, None)
    assert failed(decision) == ["recall of malignant"]
    assert "recall of malignant: no test image" in decision.reason
