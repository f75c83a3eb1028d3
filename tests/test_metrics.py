"""Scores of predictions and intervals over draws."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import softmax
from sklearn.calibration import calibration_curve

from medfocus.evaluation.metrics import (
    coverage,
    mean_interval,
    per_class_recall,
    reliability,
    score,
    wilson_lower,
)


def test_coverage_is_the_share_of_sets_with_the_true_class_and_has_the_mean_size() -> None:
    sets = np.array([[1, 0, 0], [1, 1, 0], [1, 1, 1], [0, 1, 1]], bool)
    assert coverage(sets, np.array([0, 2, 1, 0])) == (0.5, 2.0)


def test_perfect_and_confident_predictions_score_one_without_calibration_error() -> None:
    labels = np.array([0, 1, 2, 1])
    scores = score(np.eye(3)[labels], labels)
    assert scores == {"accuracy": 1, "balanced_accuracy": 1, "macro_f1": 1, "auroc": 1, "ece": 0}


def test_balanced_accuracy_weighs_a_rare_class_equally() -> None:
    labels = np.array([0] * 9 + [1])
    always_zero = np.tile([0.9, 0.1], (10, 1))
    scores = score(always_zero, labels)
    assert scores["accuracy"] == pytest.approx(0.9)
    assert scores["balanced_accuracy"] == pytest.approx(0.5)
    assert scores["auroc"] == pytest.approx(0.5)


def test_auroc_is_undefined_if_a_class_has_no_test_image() -> None:
    assert np.isnan(score(np.full((4, 3), 1 / 3), np.array([0, 1, 0, 1]))["auroc"])


def test_calibration_error_is_the_gap_between_confidence_and_accuracy() -> None:
    labels = np.array([0] * 7 + [1] * 3)
    assert reliability(np.tile([0.95, 0.05], (10, 1)), labels).ece == pytest.approx(0.25)
    assert reliability(np.tile([0.7, 0.3], (10, 1)), labels).ece == pytest.approx(0.0, abs=1e-12)


def test_reliability_is_confidence_and_accuracy_bin_by_bin() -> None:
    confidence = np.array([0.52, 0.58, 0.5, 0.91, 0.99, 1.0])
    right = np.array([1, 0, 0, 1, 1, 0], dtype=bool)
    curve = reliability(np.stack([confidence, 1 - confidence], axis=1), np.where(right, 0, 1), bins=10)
    assert curve.count.tolist() == [0, 0, 0, 0, 0, 3, 0, 0, 0, 3]
    assert np.isnan(curve.confidence[:5]).all() and np.isnan(curve.accuracy[6:9]).all()
    assert curve.confidence[[5, 9]] == pytest.approx([1.6 / 3, 2.9 / 3])
    assert curve.accuracy[[5, 9]] == pytest.approx([1 / 3, 2 / 3])
    assert curve.ece == pytest.approx((0.6 + 0.9) / 6)
    with pytest.raises(ValueError, match="0 bins; use 10 to 15"):
        reliability(np.eye(2), np.array([0, 1]), bins=0)


def test_reliability_agrees_with_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    probabilities = softmax(2 * rng.standard_normal((500, 3)), axis=1)
    labels = rng.integers(0, 3, 500)
    curve = reliability(probabilities, labels, bins=12)
    right = probabilities.argmax(axis=1) == labels
    accuracy, confidence = calibration_curve(right, probabilities.max(axis=1), n_bins=12)
    filled = curve.count > 0
    np.testing.assert_allclose(curve.accuracy[filled], accuracy)
    np.testing.assert_allclose(curve.confidence[filled], confidence)
    assert curve.count.sum() == 500


def test_recall_of_an_absent_class_is_undefined() -> None:
    recall = per_class_recall(np.eye(3)[[0, 0, 1]], np.array([0, 1, 1]))
    np.testing.assert_allclose(recall[:2], [1, 0.5])
    assert np.isnan(recall[2])


def test_interval_matches_the_t_table() -> None:
    interval = mean_interval([0.70, 0.72, 0.74, 0.76, 0.78])
    assert interval.mean == pytest.approx(0.74)
    assert interval.half_width == pytest.approx(2.776 * 0.0316228 / np.sqrt(5), rel=1e-3)
    assert np.isnan(mean_interval([0.5]).half_width)
    with pytest.raises(ValueError, match="no values; give at least one"):
        mean_interval([])


def test_wilson_ranks_five_of_five_below_230_of_251() -> None:
    assert wilson_lower(5, 5) < wilson_lower(230, 251)
    assert wilson_lower(0, 0) == 0
