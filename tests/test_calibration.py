"""Temperature and sets of classes, against scikit-learn and MAPIE."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from mapie.classification import SplitConformalClassifier
from scipy.special import softmax
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.calibration import CalibratedClassifierCV
from sklearn.frozen import FrozenEstimator

from flows.study.methods import build_method
from flows.study.params import load_params
from medfocus.evaluation.metrics import reliability
from medfocus.learning.calibration import (
    Calibration,
    calibrate,
    fit_temperature,
    images_needed,
    lac_threshold,
)


class Given(ClassifierMixin, BaseEstimator):
    """A fitted classifier of K classes whose input is its own output: logits or probabilities."""

    def __init__(self, classes: int = 3) -> None:
        self.classes = classes
        self.classes_ = np.arange(classes)
        self.is_fitted_ = True

    def fit(self, X: np.ndarray, y: np.ndarray) -> Given:
        return self

    def decision_function(self, X: np.ndarray) -> np.ndarray:
        return X

    def predict_proba(self, X: np.ndarray) -> np.ndarray:
        return X

    def predict(self, X: np.ndarray) -> np.ndarray:
        return X.argmax(axis=1)


def drawn(count: int, seed: int, scale: float = 1.0, classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Draw logits z, and labels from softmax(z); return ``scale`` z (N, K) and the labels (N,)."""
    rng = np.random.default_rng(seed)
    z = 2 * rng.standard_normal((count, classes))
    labels = (softmax(z, axis=1).cumsum(axis=1) < rng.random((count, 1))).sum(axis=1)
    return scale * z, labels


def test_on_many_images_the_temperature_is_that_of_scikit_learn() -> None:
    logits, labels = drawn(20_000, 0, scale=3)
    theirs = CalibratedClassifierCV(FrozenEstimator(Given()), method="temperature").fit(logits, labels)
    probabilities = Calibration(fit_temperature(logits, labels)).probabilities(logits)
    np.testing.assert_allclose(probabilities, theirs.predict_proba(logits), atol=1e-3)


@pytest.mark.parametrize("scale", [0.25, 1.0, 4.0])
def test_the_temperature_undoes_a_wrong_scale_of_the_logits(scale: float) -> None:
    assert fit_temperature(*drawn(20_000, 1, scale)) == pytest.approx(scale, rel=0.03)


def test_without_errors_out_of_fold_the_temperature_is_finite_and_falls_with_the_number_of_images() -> None:
    temperatures = []
    for each in (2, 8, 32):
        labels = np.arange(3 * each) % 3
        temperatures.append(fit_temperature(2 * np.eye(3)[labels], labels))
    assert 1 > temperatures[0] > temperatures[1] > temperatures[2] > 0.1


def test_a_few_images_without_information_keep_the_temperature_near_one() -> None:
    logits = np.random.default_rng(0).standard_normal((6, 3))
    assert 0.5 < fit_temperature(logits, np.array([0, 1, 2, 0, 1, 2])) < 2.5


def test_logits_that_say_nothing_keep_the_temperature_finite_and_the_order() -> None:
    rng = np.random.default_rng(2)
    logits, labels = rng.standard_normal((30, 4)), rng.integers(0, 4, 30)
    for wrong in (1e-6 * logits, 1e6 * logits):
        calibration = calibrate(wrong, labels, 0.9)
        assert 0.01 <= calibration.temperature <= 100
        order = calibration.probabilities(logits).argsort(axis=1)
        assert np.array_equal(order, logits.argsort(axis=1))


def test_a_temperature_from_few_images_lowers_the_calibration_error_of_an_overconfident_model() -> None:
    before, after = [], []
    for seed in range(20):
        logits, labels = drawn(24, seed, scale=4)
        new, truth = drawn(500, 100 + seed, scale=4)
        before.append(reliability(Calibration().probabilities(new), truth).ece)
        after.append(reliability(calibrate(logits, labels, 0.9).probabilities(new), truth).ece)
    assert np.mean(after) < 0.7 * np.mean(before)


def test_without_predictions_nothing_is_calibrated_and_there_is_no_set() -> None:
    calibration = calibrate(np.empty((0, 3)), np.empty(0, np.int64), 0.9)
    assert calibration == Calibration(temperature=1.0, threshold=None)
    assert calibration.sets(np.eye(3)) is None
    assert calibration.no_set == "no set: the model has no predictions out of fold"


def test_a_support_too_small_for_the_promise_gives_no_set_and_says_so() -> None:
    assert [images_needed(confidence) for confidence in (0.5, 0.8, 0.9, 0.95, 0.99)] == [1, 4, 9, 19, 99]
    logits, labels = drawn(9, 3)
    assert calibrate(logits, labels, 0.9).threshold is not None
    small = calibrate(logits[:6], labels[:6], 0.9)
    assert small.temperature != 1
    assert small.no_set == "no set: 6 labelled images cannot support a 90 % promise; 9 are needed"


@pytest.mark.parametrize(("count", "confidence"), [(10, 0.9), (37, 0.9), (120, 0.8)])
def test_the_sets_are_those_of_mapie(count: int, confidence: float) -> None:
    logits, labels = drawn(count, 4)
    new = softmax(drawn(300, 5)[0], axis=1)
    calibration = Calibration(1.0, lac_threshold(softmax(logits, axis=1), labels, confidence))
    theirs = SplitConformalClassifier(Given(), confidence, "lac", prefit=True)
    theirs.conformalize(softmax(logits, axis=1), labels)
    expected = theirs.predict_set(new)[1][:, :, 0]
    ours, empty = calibration.sets(new), ~expected.any(axis=1)
    assert ours is not None
    assert np.array_equal(ours[~empty], expected[~empty])
    assert ours[empty].all()  # unlike the support: any class


def test_sets_of_exchangeable_images_contain_the_true_class_as_promised() -> None:
    """The expected coverage is in [0.9, 0.9 + 1 / (M + 1)] without ties, if empty sets stay empty."""
    covered = []
    for seed in range(300):
        logits, labels = drawn(219, seed)
        probabilities = softmax(logits, axis=1)
        threshold = lac_threshold(probabilities[:19], labels[:19], 0.9)
        assert threshold is not None
        covered.append((probabilities[19:][np.arange(200), labels[19:]] >= threshold).mean())
    error = np.std(covered) / np.sqrt(len(covered))
    assert 0.9 - 3 * error < np.mean(covered) < 0.95 + 3 * error


def test_methods_on_cached_features_are_calibrated_in_every_cell_and_others_are_too_slow() -> None:
    params = load_params(Path(__file__).parents[1] / "params.yaml")
    slow = {name for name in params.methods if build_method(params, name, None).runs_encoder}
    assert slow >= {"clip-few-shot", "clip-lora", "coop", "cocoop", "resnet", "medfocusclip-lora"}
    assert not slow & {"pixels", "k-nn", "clip-linear-probe", "tip-adapter-f", "lp++", "slca", "medfocusclip"}


def test_serving_sets_of_classes_does_not_import_mapie() -> None:
    program = (
        "import sys, numpy, medfocus.serving.predictor as predictor;"
        "predictor.Calibration(2.0, 0.4).sets(numpy.eye(3)); print('mapie' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
