"""CLIP-SVD: its weights are U diag(s) Vᵀ with trained s, and nothing else changes."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from medfocus.clip.encoder import ClipEncoder
from medfocus.clip.svd import SingularValues, SvdTowers
from medfocus.clip.towers.base import TowerError
from medfocus.methods.clip_svd import ClipSvd
from medfocus.storage import weights
from tests.test_lora import PROMPTS, coloured, custom_text_clip, support_of
from tests.towers import small_vit

SETTINGS: dict[str, Any] = {
    "epochs": 3, "max_steps": None, "batch_size": 24, "lr": 5e-2, "weight_decay": 0.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def clip() -> ClipEncoder:
    return small_vit()


@pytest.fixture(scope="module")
def fitted(clip: ClipEncoder) -> ClipSvd:
    return fit(clip)


def fit(clip: ClipEncoder, **changes: Any) -> ClipSvd:
    method = ClipSvd(clip, **{**SETTINGS, **changes})
    return method.fit(support_of(clip), torch.Generator().manual_seed(0))


def merged(clip: ClipEncoder, towers: SvdTowers) -> ClipEncoder:
    """Return a CLIP whose weights NumPy composed of the singular vectors and the trained values."""
    model: Any = copy.deepcopy(clip.model)
    values = iter(towers.matrices)

    def compose(weight: Tensor) -> None:
        trained = next(values).values.detach().double().numpy()  # pyright: ignore
        parts = np.split(weight.double().numpy(), len(trained))
        for part, s in zip(parts, trained, strict=True):
            left, _, right = np.linalg.svd(part, full_matrices=False)
            part[:] = left @ np.diag(s) @ right
        weight.copy_(torch.from_numpy(np.concatenate(parts)))

    with torch.no_grad():
        for tower in (model.visual, getattr(model, "text", model)):
            for block in tower.transformer.resblocks:
                for layer in (block.attn.out_proj, block.mlp.c_fc, block.mlp.c_proj):
                    assert layer.weight.ndim == 2
                compose(block.attn.in_proj_weight)
                for layer in (block.attn.out_proj, block.mlp.c_fc, block.mlp.c_proj):
                    compose(layer.weight)
    return dataclasses.replace(clip, model=model)


@pytest.mark.parametrize(("rows", "columns", "parts"), [(5, 5, 1), (12, 4, 3), (9, 4, 1), (4, 9, 1)])
def test_a_weight_with_trained_values_is_u_diag_s_v(rows: int, columns: int, parts: int) -> None:
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(rows, columns))
    layer = SingularValues(torch.from_numpy(weight).unflatten(0, (parts, -1)))
    trained = rng.random((parts, min(rows // parts, columns)))
    with torch.no_grad():
        assert torch.equal(layer(torch.from_numpy(weight)), torch.from_numpy(weight)), "starts at W exactly"
        layer.values.copy_(torch.from_numpy(trained))
        ours = layer(torch.from_numpy(weight)).numpy()
    expected = []
    for part, s in zip(np.split(weight, parts), trained, strict=True):
        left, _, right = np.linalg.svd(part, full_matrices=False)
        expected.append(left @ np.diag(s) @ right)
    np.testing.assert_allclose(ours, np.concatenate(expected), rtol=0, atol=1e-12)


def test_the_gradient_of_a_singular_value_is_u_g_v() -> None:
    """∂L/∂s_j = u_jᵀ G v_j for G = ∂L/∂W."""
    rng = np.random.default_rng(1)
    weight, gradient = rng.normal(size=(6, 4)), rng.normal(size=(6, 4))
    layer = SingularValues(torch.from_numpy(weight)[None])
    (layer(torch.from_numpy(weight)) * torch.from_numpy(gradient)).sum().backward()
    left, _, right = np.linalg.svd(weight, full_matrices=False)
    assert layer.values.grad is not None
    np.testing.assert_allclose(layer.values.grad[0].numpy(), np.diag(left.T @ gradient @ right.T), atol=1e-12)


@pytest.mark.parametrize("custom", [False, True])
def test_both_towers_equal_a_clip_with_composed_weights(custom: bool, clip: ClipEncoder) -> None:
    clip = custom_text_clip(clip) if custom else clip
    towers = SvdTowers(clip)
    torch.manual_seed(2)
    for matrix in towers.matrices:
        with torch.no_grad():
            matrix.values.mul_(1 + 0.5 * torch.rand_like(matrix.values))  # pyright: ignore
    images, _ = coloured(3)
    texts = [prompt for ensemble in PROMPTS for prompt in ensemble]
    plain = merged(clip, towers)
    with torch.no_grad():
        ours, ours_of_texts = towers(images), towers.encode_texts(texts)
    assert not torch.allclose(ours, clip.encode_images(clip.preprocess(images)), atol=1e-2)
    torch.testing.assert_close(ours, plain.encode_images(plain.preprocess(images)), rtol=0, atol=1e-5)
    torch.testing.assert_close(ours_of_texts, plain.encode_texts(texts), rtol=0, atol=1e-5)


def test_training_starts_from_the_frozen_model_and_trains_every_singular_value(clip: ClipEncoder) -> None:
    towers, (images, labels) = SvdTowers(clip), coloured(9)
    texts = [ensemble[0] for ensemble in PROMPTS]
    features = towers(images)
    torch.testing.assert_close(features, clip.encode_images(clip.preprocess(images)), rtol=0, atol=1e-6)
    cross_entropy(clip.logit_scale * features @ towers.encode_texts(texts).T, labels).backward()
    named = dict(towers.named_parameters())
    model: Any = clip.model
    each = [
        6 * transformer.width * transformer.layers
        for transformer in (model.visual.transformer, model.transformer)
    ]
    assert sum(p.numel() for p in named.values()) == sum(each)
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in named.values())


def test_fitting_lowers_the_loss_and_changes_nothing_of_the_encoder(
    clip: ClipEncoder, fitted: ClipSvd
) -> None:
    before, modules = weights.digest(clip.model.state_dict()), list(clip.model.modules())
    support = support_of(clip)

    def loss(method: ClipSvd) -> float:
        return float(cross_entropy(method.logits(support.inputs[0])["text"], support.labels))

    assert loss(fitted) < loss(fit(clip, epochs=1, lr=1e-9)) - 0.1
    assert weights.digest(clip.model.state_dict()) == before
    assert all(old is new for old, new in zip(modules, clip.model.modules(), strict=True))
    assert not any(weight.requires_grad for weight in clip.model.parameters())


def test_max_steps_bounds_the_training(clip: ClipEncoder) -> None:
    bounded, short = fit(clip, epochs=9, max_steps=2).state(), fit(clip, epochs=2).state()  # a step per epoch
    assert all(torch.equal(bounded[name], value) for name, value in short.items())


def test_a_state_holds_the_values_alone_and_predicts_the_same(clip: ClipEncoder, fitted: ClipSvd) -> None:
    state = fitted.state()
    assert {key.rpartition(".")[2] for key in state} == {"text_features", "values"}
    towers = sum(weight.numel() for weight in clip.model.parameters())
    assert sum(value.numel() for value in state.values()) < towers / 40
    again = ClipSvd(clip, **SETTINGS).load(state)
    images, _ = coloured(70, seed=4)  # more than one pass of the towers
    torch.testing.assert_close(again.logits(images)["text"], fitted.logits(images)["text"], rtol=0, atol=1e-5)


def test_the_channel_of_the_region_alpha_trains_with_the_values(clip: ClipEncoder) -> None:
    regional = clip.with_region("alpha", 0.0)
    images, _ = coloured(24, channels=4)
    support = dataclasses.replace(support_of(clip), inputs=images[None])
    state = ClipSvd(regional, **SETTINGS).fit(support, torch.Generator().manual_seed(0)).state()
    (moved,) = [value for value in state.values() if value.ndim == 4]
    assert moved.abs().max() > 0


def test_a_tower_of_another_kind_and_settings_out_of_range_are_refused(clip: ClipEncoder) -> None:
    convolutional: Any = open_clip.CLIP(
        64,
        {"image_size": 96, "layers": (1, 1, 1, 1), "width": 16},  # pyright: ignore[reportArgumentType]
        {"context_length": 32, "vocab_size": 2089, "width": 64, "heads": 2, "layers": 1},  # pyright: ignore
    )
    assert not isinstance(convolutional.visual, nn.MultiheadAttention)
    with pytest.raises(TowerError, match=r"the image encoder of RN \(ModifiedResNet\) has no .* q, k and v"):
        SvdTowers(dataclasses.replace(clip, name="RN", model=convolutional))
    for name in ("epochs", "max_steps", "batch_size"):
        with pytest.raises(ValueError, match=f"clip-svd: {name} is 0; use 1 or more"):
            ClipSvd(clip, **{**SETTINGS, name: 0})
