"""The zero-shot classifier as the prior of MedFocusCLIP's probe."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression
from torch.nn import functional

from medfocus.learning.method import Support
from medfocus.learning.text_prior import C_GRID, DEFAULT_C, beats_chance, choose_c, fit_weights
from medfocus.methods.medfocusclip import MedFocusClip
from tests.conftest import TinyClip
from tests.test_methods import NAMES, PROMPTS, SETTINGS, coloured_images, images_of
from tests.towers import small_vit

LORA: dict[str, Any] = {"tuning": "lora", "epochs": 2, "lr": 1e-2}
FULL: dict[str, Any] = {"tuning": "full", "blocks": 1, "epochs": 2}


def blobs(count: int, seed: int = 0, noise: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    """Draw features (N, 6) of length one around the direction of their class, and labels (N,)."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    features = np.eye(3, 6)[labels] + noise * rng.standard_normal((count, 6))
    return features / np.linalg.norm(features, axis=1, keepdims=True), labels


def method_of(encoder: Any, **changed: Any) -> MedFocusClip:
    return MedFocusClip(encoder, **{**SETTINGS["medfocusclip"], **changed})


def support_of(method: MedFocusClip, count: int, *, wrong: int = 0) -> Support:
    """Return a support whose texts are the class means of the features, ``wrong`` classes further on."""
    pocket_size = not isinstance(method.encoder, TinyClip)
    images, labels = images_of("clip-lora", count) if pocket_size else coloured_images(count)
    features = method.encoder.encode_images(method.encoder.preprocess(images))
    mean = features.mean(dim=0)
    text = torch.stack([features[labels == k].mean(dim=0) - mean for k in range(3)])
    text = functional.normalize(text, dim=-1).roll(wrong, dims=0)
    inputs = method.embed(images)[None]
    return Support(inputs, labels, torch.arange(count), text, NAMES, PROMPTS)


@pytest.mark.parametrize("count", [4, 30])  # fewer images than features, and more
def test_the_weights_are_the_most_probable_ones_under_the_prior(count: int) -> None:
    """At the optimum the gradient of the prior cancels that of the likelihood: V / C = Σ (y_i - p_i) m_iᵀ."""
    features, labels = blobs(count)
    zero_shot = 3 * np.random.default_rng(1).standard_normal((count, 3))
    weights = fit_weights(features, labels, zero_shot, c=2.0)
    residual = np.eye(3)[labels] - softmax(zero_shot + features @ weights.T, axis=1)
    np.testing.assert_allclose(weights / 2, residual.T @ features, atol=1e-4)


def test_without_a_text_the_weights_are_scikit_learn_s_logistic_regression() -> None:
    features, labels = blobs(30)
    ours = fit_weights(features, labels, np.zeros((30, 3)), c=10.0)
    theirs = LogisticRegression(C=10.0, fit_intercept=False, tol=1e-8).fit(features, labels)
    np.testing.assert_allclose(ours, theirs.coef_, atol=1e-3)


def test_the_text_decides_alone_at_c_zero_and_the_labels_at_a_large_c() -> None:
    features, labels = blobs(30, noise=0.1)
    misleading = 2 * np.eye(3)[(labels + 1) % 3]
    assert not fit_weights(features, labels, misleading, c=0.0).any()
    learned = misleading + features @ fit_weights(features, labels, misleading, c=1000.0).T
    assert (learned.argmax(axis=1) == labels).all()


def test_one_image_per_class_shows_whether_the_text_beats_chance() -> None:
    labels = np.arange(3)
    assert beats_chance(2 * np.eye(3), labels)
    assert not beats_chance(2 * np.eye(3)[[1, 2, 0]], labels)
    assert not beats_chance(np.zeros((3, 3)), labels)


def test_c_leaves_its_default_only_for_clear_evidence() -> None:
    features, labels = blobs(6)
    weak = 0.3 * np.eye(3)[labels]
    alone = np.arange(6) // 3  # each class has one patient, so no fold can be made
    assert choose_c(features, labels, alone[labels], weak, folds=3, seed=0) == DEFAULT_C
    weak = 0.5 * np.eye(3)[labels] + np.random.default_rng(0).standard_normal((6, 3))
    few = [choose_c(blobs(6, seed)[0], labels, np.arange(6), weak, folds=3, seed=0) for seed in range(20)]
    assert few.count(DEFAULT_C) > 12
    features, labels = blobs(90, noise=0.2)
    weak = 0.3 * np.eye(3)[labels]
    assert choose_c(features, labels, np.arange(90), weak, folds=3, seed=0) > DEFAULT_C
    noise = np.random.default_rng(0).standard_normal((90, 60))
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    strong = 4 * np.eye(3)[labels]
    assert choose_c(noise, labels, np.arange(90), strong, folds=3, seed=0) in C_GRID[:2]


def test_with_one_image_per_class_a_good_text_outweighs_the_labels(tiny_clip: TinyClip) -> None:
    text = torch.eye(3, 6)
    correct: dict[str, list[float]] = {"zero-shot": [], "text prior": [], "paper": []}
    for seed in range(4):
        features, labels = (torch.from_numpy(array) for array in blobs(150, seed))
        one_each = Support(features[None, :3].float(), labels[:3], torch.arange(3), text)
        logits = {"zero-shot": features @ text.double().T}
        for name, text_prior in (("text prior", True), ("paper", False)):
            method = method_of(tiny_clip, text_prior=text_prior)
            method.fit(one_each, torch.Generator().manual_seed(seed))
            logits[name] = method.logits(features.float())["probe"]
        for name, values in logits.items():
            correct[name].append(float((values.argmax(dim=1) == labels).double().mean()))
    accuracy = {name: np.mean(values) for name, values in correct.items()}
    assert accuracy["text prior"] > accuracy["paper"] + 0.02
    assert accuracy["text prior"] > accuracy["zero-shot"] - 0.02


def test_c_is_chosen_on_features_that_no_label_has_changed(
    tiny_clip: TinyClip, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[np.ndarray] = []

    def remember(features: np.ndarray, *more: Any, **settings: Any) -> float:
        seen.append(features)
        return DEFAULT_C

    monkeypatch.setattr("medfocus.methods.medfocusclip.choose_c", remember)
    method = method_of(tiny_clip)
    support = support_of(method, 12)
    method.fit(support, torch.Generator().manual_seed(0))
    np.testing.assert_allclose(seen[0], support.inputs[0], atol=1e-6)
    assert not np.allclose(method.encode(support.inputs[0]), support.inputs[0], atol=1e-3)


def test_a_text_no_better_than_chance_leaves_the_form_of_the_paper(tiny_clip: TinyClip) -> None:
    misled = support_of(method_of(tiny_clip), 24, wrong=1)
    ours = method_of(tiny_clip).fit(misled, torch.Generator().manual_seed(0))
    paper = method_of(tiny_clip, text_prior=False).fit(misled, torch.Generator().manual_seed(0))
    assert ours.note == "text no better than chance" and not paper.note
    for name, logits in paper.logits(misled.inputs[0]).items():
        assert torch.equal(ours.logits(misled.inputs[0])[name], logits)


@pytest.mark.parametrize("changed", [{}, LORA, FULL], ids=["adapter", "lora", "full"])
def test_the_prior_is_the_zero_shot_classifier_of_every_tuning(changed: dict[str, Any]) -> None:
    encoder = small_vit()
    method = method_of(encoder, **changed)
    support = support_of(method, 12)
    method.fit(support, torch.Generator().manual_seed(0))
    images, _ = images_of("clip-lora", 12)
    features = encoder.encode_images(encoder.preprocess(images))
    expected = encoder.logit_scale * features @ support.text_features.T
    torch.testing.assert_close(method._zero_shot(method._split(support.inputs)), expected, rtol=0, atol=1e-4)
    loaded = method_of(encoder, **changed).load(method.state())
    for name, logits in method.logits(support.inputs[0]).items():
        torch.testing.assert_close(loaded.logits(support.inputs[0])[name], logits, rtol=0, atol=1e-4)
    assert loaded.note == method.note != ""


def test_labels_never_reach_the_prior(tiny_clip: TinyClip) -> None:
    method = method_of(tiny_clip)
    support = support_of(method, 24)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    prior = []
    for labels in (support.labels, support.labels[order]):
        method.fit(replace(support, labels=labels), torch.Generator().manual_seed(0))
        prior.append(method._zero_shot(method._split(support.inputs)).numpy().tobytes())
    assert prior[0] == prior[1]
