"""Spatially localized channel attention against NumPy, and on SAM2's image features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from medfocus import phantoms
from medfocus.learning.method import Support
from medfocus.masks.sam2.segmenter import load_sam2
from medfocus.masks.settings import Sam2Settings
from medfocus.methods.slca import Attention, Slca
from tests.towers import small_vit

SETTINGS: dict[str, Any] = {
    "segmenter_grid": 4, "pool": 2, "reduction": 2,
    "epochs": 60, "batch_size": 8, "lr": 0.03, "weight_decay": 0.01,
}  # fmt: skip
CHANNELS, GRID = 6, 4


class Described:
    """A stand-in for an encoder with a segmenter: describes cells by the means of RGB and of its squares."""

    def describe(self, views: Tensor, grid: int) -> Tensor:
        pixels = views.permute(0, 3, 1, 2).double() / 255
        return functional.adaptive_avg_pool2d(torch.cat([pixels, pixels**2], 1), grid).flatten(1)


DESCRIBED = Described()


def make(encoder: Any = DESCRIBED, **settings: Any) -> Slca:
    return Slca(encoder, **{**SETTINGS, **settings})


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def attention(channels: int = CHANNELS, pool: int = 2, reduction: int = 2) -> Attention:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Attention(channels, pool, reduction)


def features(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, CHANNELS, GRID, GRID, generator=seeded(seed))


def blobs(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return noise (N, 16, 16, 3) uint8 with a red (class 0) or green (class 1) patch, and labels (N,)."""
    rng = np.random.default_rng(seed)
    images, labels = rng.integers(40, 120, (count, 16, 16, 3), np.uint8), np.arange(count) % 2
    for image, label, (y, x) in zip(images, labels, rng.integers(0, 11, (count, 2)), strict=True):
        image[y : y + 5, x : x + 5, label] = 240
    return torch.from_numpy(images), torch.from_numpy(labels)


def support_of(method: Slca, images: Sequence[Tensor], labels: Tensor) -> Support:
    """Return a support with one set of images per view."""
    inputs = torch.stack([method.embed(view) for view in images])
    return Support(inputs, labels, torch.arange(len(labels)), torch.zeros(2, 8))


def fitted(seed: int = 0, **settings: Any) -> tuple[Slca, Support]:
    method = make(**settings)
    images, labels = blobs(24)
    support = support_of(method, [images, images.flip(2)], labels)
    return method.fit(support, seeded(seed)), support


def by_hand(block: Attention, seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compute gates (B, C, G/k, G/k) and X' (B, C, G, G) window by window, without a convolution."""
    w1, b1, w2, b2 = (
        value.detach().double().numpy().squeeze()
        for value in (block.down.weight, block.down.bias, block.up.weight, block.up.bias)
        if value is not None
    )
    k, windows = block.pool, seen.shape[2] // block.pool
    gates, gated = np.empty((*seen.shape[:2], windows, windows)), np.empty_like(seen)
    for b, i, j in np.ndindex(len(seen), windows, windows):
        window = np.s_[b, :, i * k : (i + 1) * k, j * k : (j + 1) * k]
        z = seen[window].mean(axis=(1, 2))
        a = 1 / (1 + np.exp(-(w2 @ np.maximum(w1 @ z + b1, 0) + b2)))
        gates[b, :, i, j] = a
        gated[window] = seen[window] * a[:, None, None]
    return gates, gated


# --- the equations ------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", [1, 2, 4])
def test_attention_matches_its_equations(pool: int) -> None:
    block, seen = attention(pool=pool), features(3)
    gates, gated = by_hand(block, seen.double().numpy())
    with torch.no_grad():
        np.testing.assert_allclose(block.gates(seen).numpy(), gates, atol=1e-6)
        np.testing.assert_allclose(block(seen).numpy(), gated, atol=1e-6)


def test_logits_are_a_linear_head_on_the_average_of_gated_standardised_features() -> None:
    method, support = fitted()
    seen = support.inputs[0].double().numpy().reshape(24, CHANNELS, GRID, GRID)
    mean, std = (one(seen, axis=(0, 2, 3), keepdims=True) for one in (np.mean, np.std))
    _, gated = by_hand(method.classifier_.attention, (seen - mean) / std)
    weight, bias = (value.detach().double().numpy() for value in method.classifier_.head.parameters())
    expected = gated.mean(axis=(2, 3)) @ weight.T + bias
    np.testing.assert_allclose(method.logits(support.inputs[0])["head"].numpy(), expected, atol=1e-4)


def test_a_cell_changes_only_the_gates_of_its_window() -> None:
    block, seen = attention(), features(1)
    other = seen.clone()
    other[0, :, 1, 2] += 3  # in the window of row 0 and column 1
    with torch.no_grad():
        moved = (block.gates(other) != block.gates(seen)).any(dim=1)[0]
    assert moved.tolist() == [[False, True], [False, False]]


def test_few_channels_keep_a_bottleneck_of_one() -> None:
    assert attention(channels=3, reduction=16).down.weight.shape == (1, 3, 1, 1)


# --- the method ---------------------------------------------------------------------------------


def test_its_inputs_are_the_image_features_of_the_segmenter() -> None:
    embedded = make().embed(blobs(3)[0])
    assert embedded.dtype == torch.float32 and embedded.shape == (3, CHANNELS * GRID**2)
    assert make().embedding == "segmenter-4" != make(segmenter_grid=8).embedding


def test_it_learns_classes_that_differ_in_colour_and_not_in_position() -> None:
    method, _ = fitted()
    images, labels = blobs(60, seed=9)
    accuracy = (method.logits(method.embed(images))["head"].argmax(1) == labels).double().mean()
    assert accuracy > 0.9


def test_attention_and_head_train() -> None:
    short, long = fitted(epochs=1, lr=1e-9)[0].state(), fitted()[0].state()
    moved = {name for name, value in short.items() if not torch.allclose(long[name], value, atol=1e-3)}
    assert {f"classifier.attention.{name}.weight" for name in ("down", "up")} < moved
    assert "classifier.head.weight" in moved


def test_statistics_come_from_unaugmented_images_and_a_constant_channel_is_allowed() -> None:
    images, labels = blobs(12)
    images[..., 2] = 77
    method = make()
    support = support_of(method, [images, torch.zeros_like(images)], labels)
    state = method.fit(support, seeded()).state()
    seen = support.inputs[0].double().reshape(12, CHANNELS, -1)
    np.testing.assert_allclose(state["classifier.mean"], seen.mean(dim=(0, 2)), atol=1e-6)
    std = seen.numpy().std(axis=(0, 2))
    std[[2, 5]] = 1
    np.testing.assert_allclose(state["classifier.std"], std, atol=1e-6)
    assert torch.isfinite(method.logits(support.inputs[0])["head"]).all()


def test_a_loaded_method_predicts_the_same() -> None:
    method, support = fitted()
    again = make().load(method.state())
    assert torch.equal(again.logits(support.inputs[0])["head"], method.logits(support.inputs[0])["head"])


def test_the_same_seed_gives_the_same_fit_and_the_global_generator_is_restored() -> None:
    before = torch.random.get_rng_state()
    first, second, other = (fitted(seed)[0].state() for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert not torch.equal(first["classifier.head.weight"], other["classifier.head.weight"])


def test_the_logits_of_an_image_do_not_depend_on_its_batch() -> None:
    method, support = fitted()
    together = method.logits(support.inputs[0])["head"]
    alone = torch.cat([method.logits(one[None])["head"] for one in support.inputs[0]])
    assert torch.allclose(alone, together, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"segmenter_grid": 0}, r"slca: segmenter_grid is 0; use 1 or more"),
        ({"pool": 3}, r"slca: pool is 3 and segmenter_grid 4; .* Set pool to a divisor of segmenter_grid"),
        ({"pool": 0}, r"slca: pool is 0 and segmenter_grid 4; .* Set pool to a divisor of segmenter_grid"),
        ({"pool": 8}, r"slca: pool is 8 and segmenter_grid 4; .* Set pool to a divisor of segmenter_grid"),
        ({"reduction": 0}, r"slca: reduction is 0; use 1 or more"),
    ],
)
def test_settings_out_of_range_name_the_field(settings: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        make(**settings)


# --- with SAM2 ----------------------------------------------------------------------------------


def test_an_encoder_without_segmenter_is_an_error_that_names_the_setting() -> None:
    method = make(small_vit())
    with pytest.raises(ValueError, match=r"no segmenter with image features.*Set masks\.segmenter to sam2"):
        method.embed(torch.zeros(1, 96, 96, 3, dtype=torch.uint8))


def test_features_of_sam2_are_channel_major_and_then_row_major() -> None:
    segmenter = load_sam2(Sam2Settings("pocket", "pocket", 128, "grid", points_per_side=2))
    method = make(small_vit().with_segmenter(segmenter), epochs=2)
    drawn = [
        phantoms.draw("breast_ultrasound", label, np.random.default_rng(7), 128).image
        for label in phantoms.MODALITIES["breast_ultrasound"][:2]
    ]
    plain = torch.from_numpy(np.stack(drawn))[..., None].expand(-1, -1, -1, 3).contiguous()
    marked = plain.clone()
    marked[:, 4:28, 100:124] = 255  # in the top right cell of 4 x 4
    support = support_of(method, [plain, marked], torch.tensor([0, 1]))
    classifier = method.fit(support, seeded()).classifier_
    before, after = (classifier.cells(view) for view in support.inputs)
    width = segmenter.model.sam_mask_decoder.transformer_dim
    assert before.shape == (2, width + width // 4, GRID, GRID)
    for level in (slice(width), slice(width, None)):
        changed = (after - before)[:, level].norm(dim=1)  # (2, G, G)
        assert changed.flatten(1).argmax(dim=1).tolist() == [3, 3]
        assert (changed[:, 0, 3] > 2 * changed.flatten(1).median(dim=1).values).all()
    with torch.inference_mode():
        encoded = segmenter.encode(list(plain.numpy()))
    deep = functional.adaptive_avg_pool2d(encoded.embedding, GRID)
    assert torch.allclose(before[:, :width], deep, atol=1e-4)
    assert torch.isfinite(method.logits(support.inputs[0])["head"]).all()
