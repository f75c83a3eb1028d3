"""CLAP against NumPy computations of its formulas."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from medfocus.learning.method import Support
from medfocus.methods.clap import LENGTH, Clap, multipliers, penalty
from tests.conftest import TinyClip

CLASSES, DIM = 3, 8
SETTINGS: dict[str, Any] = {
    "epochs": 6, "max_steps": None, "batch_size": 100, "lr": 0.1, "warmup": 1, "weight_decay": 0.0,
}  # fmt: skip


def unit(*shape: int, seed: int) -> Tensor:
    return normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def support_of(count: int, views: int = 1) -> Support:
    labels = torch.arange(count) % CLASSES
    return Support(unit(views, count, DIM, seed=0), labels, torch.arange(count), unit(CLASSES, DIM, seed=1))


def fit(support: Support, **changes: Any) -> Clap:
    method = Clap(TinyClip(), **{**SETTINGS, **changes})  # pyright: ignore[reportArgumentType]
    return method.fit(support, torch.Generator().manual_seed(0))


def shares(scores: np.ndarray) -> np.ndarray:
    powers = np.exp(scores - scores.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def test_a_class_is_penalised_by_its_own_zero_shot_probability() -> None:
    scores, labels = np.random.default_rng(0).normal(size=(7, CLASSES)), np.array([0, 0, 0, 1, 1, 2, 0])
    expected = [shares(scores)[labels == k, k].mean() for k in range(CLASSES)]
    ours = multipliers(torch.from_numpy(scores), torch.from_numpy(labels))
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-12)


def test_the_penalty_is_the_mean_over_classes_of_the_weighted_squared_distance_to_the_text() -> None:
    rng = np.random.default_rng(1)
    weight, text, strength = rng.normal(size=(3, 5)), rng.normal(size=(3, 5)), rng.random(3)
    expected = np.mean([strength[k] * ((weight[k] - text[k]) ** 2).sum() for k in range(3)])
    ours = penalty(torch.from_numpy(weight), torch.from_numpy(text), torch.from_numpy(strength))
    assert float(ours) == pytest.approx(expected, rel=1e-12)


def test_training_takes_the_gradient_steps_of_the_loss() -> None:
    """With one batch per epoch, random draws have no effect, so NumPy can repeat the steps."""
    support, s, epochs = support_of(10), TinyClip.logit_scale, 6
    features, labels = support.inputs[0].double().numpy(), support.labels.numpy()
    text = LENGTH * support.text_features.double().numpy()
    onehot = np.eye(CLASSES)[labels]
    zero_shot = shares(s * features @ text.T / LENGTH)
    strength = np.array([zero_shot[labels == k, k].mean() for k in range(CLASSES)])
    weight, velocity = text.copy(), np.zeros_like(text)
    for epoch in range(epochs):
        norms = np.linalg.norm(weight, axis=1, keepdims=True)
        units = weight / norms
        along = s * (shares(s * features @ units.T) - onehot).T @ features / len(features)  # by units
        gradient = (along - (along * units).sum(axis=1, keepdims=True) * units) / norms
        gradient += 2 * strength[:, None] * (weight - text) / CLASSES
        velocity = 0.9 * velocity + gradient
        weight -= (1e-5 if epoch == 0 else 0.1 * (1 + np.cos(np.pi * (epoch - 1) / epochs)) / 2) * velocity
    ours = fit(support)
    expected = weight / np.linalg.norm(weight, axis=1, keepdims=True)
    assert np.abs(expected - text / LENGTH).max() > 0.01
    np.testing.assert_allclose(ours.weight_.numpy(), expected, rtol=0, atol=2e-6)
    inputs = unit(4, DIM, seed=3)
    np.testing.assert_allclose(
        ours.logits(inputs)["probe"].numpy(), s * inputs.numpy() @ expected.T, rtol=0, atol=1e-4
    )


def test_without_training_it_is_zero_shot() -> None:
    support, inputs = support_of(9), unit(5, DIM, seed=3)
    still = fit(support, lr=1e-12, epochs=1, warmup=0)
    expected = TinyClip.logit_scale * inputs @ support.text_features.T
    torch.testing.assert_close(still.logits(inputs)["probe"], expected, rtol=0, atol=1e-5)


def test_every_view_counts() -> None:
    support = support_of(9, views=2)
    other = Support(support.inputs.flip(1), support.labels, support.groups, support.text_features)
    assert not torch.allclose(fit(support).weight_, fit(other).weight_, atol=1e-4)


def test_a_warm_up_as_long_as_the_training_is_refused() -> None:
    with pytest.raises(ValueError, match=r"clap: warmup is 6 epochs of 6\. Use 0 or more, and fewer than"):
        fit(support_of(9), warmup=6)
