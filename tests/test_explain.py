"""Every kind of fitted method has an explanation, and its map shows the cause of the prediction."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

from medfocus.clip.build import build_clip
from medfocus.clip.encoder import ClipEncoder
from medfocus.explain.explain import explain
from medfocus.explain.maps import pointing_hit
from medfocus.learning.method import Support
from medfocus.methods import METHODS
from medfocus.methods.medfocusclip import MedFocusClip
from medfocus.serving import defaults
from tests.towers import small_vit

SIZE = 96


@pytest.fixture(scope="module")
def clip() -> ClipEncoder:
    return small_vit()


def cornered(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Draw grey noise (N, 96, 96, 3) with a disc at the upper left or the lower right, its class (N,)."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    noise = torch.randint(60, 90, (count, SIZE, SIZE, 1), generator=generator)
    images = noise.expand(-1, -1, -1, 3).clone()
    y, x = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    for image, label in zip(images, labels.tolist(), strict=True):
        middle = 24 if label == 0 else 72
        image[(y - middle) ** 2 + (x - middle) ** 2 < 100] = 230
    return images.to(torch.uint8), labels


def fitted(name: str, encoder: ClipEncoder, **settings: Any) -> Any:
    method = METHODS[name](encoder, **settings)
    images, labels = cornered(24)
    text = torch.eye(2, encoder.dim)
    support = Support(method.embed(images)[None], labels, torch.arange(24), text)
    return method.fit(support, torch.Generator().manual_seed(0))


def test_a_head_on_features_is_explained_by_gradient_attention(clip: ClipEncoder) -> None:
    method = fitted("clip-linear-probe", clip, folds=3)
    images, labels = cornered(4, seed=1)
    maps, way = explain(method, clip, images, labels)
    assert way == "gradient x attention"
    assert maps.shape == (4, SIZE, SIZE) and torch.allclose(maps.sum(dim=(1, 2)), torch.ones(4), atol=1e-4)


@pytest.fixture(scope="module")
def layered() -> tuple[MedFocusClip, Tensor, Tensor]:
    """Return MedFocusCLIP on the stages of the embedded CLIP, with further images and their classes."""
    settings = defaults.changed_settings("medfocusclip", "small", {"text_prior": False})
    return fitted("medfocusclip", build_clip("pocket", "pocket"), **settings), *cornered(6, seed=1)


def test_stages_of_a_convolutional_clip_are_explained_by_the_places_of_their_maps(
    layered: tuple[MedFocusClip, Tensor, Tensor],
) -> None:
    method, images, labels = layered
    assert (next(iter(method.logits(method.embed(images)).values())).argmax(1) == labels).all()
    maps, way = explain(method, method.encoder, images, labels)
    assert way == "HiResCAM" and torch.allclose(maps.sum(dim=(1, 2)), torch.ones(6), atol=1e-4)
    y, x = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    for heat, label in zip(maps, labels.tolist(), strict=True):
        middle = 24 if label == 0 else 72
        disc = (y - middle) ** 2 + (x - middle) ** 2 < 400
        assert float(heat[disc].sum()) > 2 * float(disc.float().mean())


def test_the_slopes_of_the_probe_are_its_derivatives(layered: tuple[MedFocusClip, Tensor, Tensor]) -> None:
    method, images, labels = layered
    inputs = method.embed(images[:2])
    slopes = method.slopes(inputs, labels[:2])
    step = 1e-2 * torch.randn(inputs.shape, generator=torch.Generator().manual_seed(0))

    def margin(at: Tensor) -> Tensor:
        logits = method.logits(at)["probe"]
        return (logits[[0, 1], labels[:2]] - logits[[0, 1], 1 - labels[:2]]).float()

    found = (margin(inputs + step) - margin(inputs - step)) / 2
    torch.testing.assert_close((slopes * step).sum(dim=1), found, rtol=0.02, atol=1e-3)


def test_the_whole_image_beside_a_crop_is_explained(layered: tuple[MedFocusClip, Tensor, Tensor]) -> None:
    method, images, labels = layered
    encoder = method.encoder.with_region("dual-crop", 0.0)
    both = MedFocusClip(
        encoder, **{f.name: getattr(method, f.name) for f in fields(method) if f.init and f.name != "encoder"}
    )
    views = torch.cat([images, images], dim=3)
    support = Support(both.embed(views)[None], labels, torch.arange(6), torch.eye(2, encoder.dim))
    both.fit(support, torch.Generator().manual_seed(0))
    maps, way = explain(both, encoder, views, labels)
    assert way == "HiResCAM" and maps.shape == (6, SIZE, SIZE)


class UpperLeft:
    """A classifier of the brightness of the upper left quarter, without a gradient."""

    embedding = "quarter"

    def embed(self, images: Tensor) -> Tensor:
        return images[:, : SIZE // 2, : SIZE // 2].double().mean(dim=(1, 2, 3))

    def logits(self, inputs: Tensor) -> dict[str, Tensor]:
        return {"head": torch.stack([torch.zeros_like(inputs), inputs - 90], dim=1)}


def test_a_method_without_gradient_is_explained_by_occlusion(clip: ClipEncoder) -> None:
    images, labels = cornered(2, seed=1)
    bright = images[labels == 0]  # the disc lies in the quarter that the method uses
    method: Any = UpperLeft()
    maps, way = explain(method, clip, bright, torch.ones(len(bright), dtype=torch.int64))
    assert way == "occlusion"
    disc = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    disc[14:34, 14:34] = True
    assert all(pointing_hit(heat, disc, 0.1) for heat in maps)
    assert all(float(heat[: SIZE // 2, : SIZE // 2].sum()) > 0.8 for heat in maps)


def test_a_method_on_the_region_dual_is_explained_by_occlusion(clip: ClipEncoder) -> None:
    regional = clip.with_region("dual", 0.0)
    method = fitted("clip-linear-probe", clip, folds=3)
    method.encoder = regional
    images, labels = cornered(2, seed=1)
    maps, way = explain(method, regional, torch.cat([images, images], dim=3), labels)
    assert way == "occlusion" and maps.shape == (2, SIZE, SIZE)


def test_occlusion_hides_a_square_in_the_focused_image_too(clip: ClipEncoder) -> None:
    class FocusedUpperLeft(UpperLeft):
        def embed(self, images: Tensor) -> Tensor:
            return super().embed(images[..., 3:])

    images, labels = cornered(2, seed=1)
    views = torch.cat([images, images], dim=3)[labels == 0]
    method: Any = FocusedUpperLeft()
    maps, _ = explain(method, clip.with_region("dual", 0.0), views, torch.ones(1, dtype=torch.int64))
    assert float(maps[0, : SIZE // 2, : SIZE // 2].sum()) > 0.8


def test_the_attention_bias_moves_the_map_towards_the_region(clip: ClipEncoder) -> None:
    method = fitted("clip-linear-probe", clip, folds=3)
    images, labels = cornered(4, seed=1)
    region = torch.zeros(4, SIZE, SIZE, 1, dtype=torch.uint8)
    region[:, 48:] = 255
    views = torch.cat([images, region], dim=3)
    shares = []
    for bias in (0.0, 20.0):
        regional = clip.with_region("attention", bias)
        method.encoder = regional
        maps, _ = explain(method, regional, views, labels)
        shares.append(float(maps[:, 48:].sum()))
    assert shares[1] > shares[0]


def test_a_convolutional_net_is_explained_by_grad_cam(clip: ClipEncoder) -> None:
    method = fitted(
        "resnet", clip, model="resnet10t", pretrained="", options={}, image_size=48, tuning="full", epochs=4,
        max_steps=20, batch_size=8, lr=3e-3, weight_decay=0.0,
    )  # fmt: skip
    images, labels = cornered(2, seed=1)
    maps, way = explain(method, clip, images, labels)
    assert way == "Grad-CAM"
    assert maps.shape == (2, SIZE, SIZE) and torch.allclose(maps.sum(dim=(1, 2)), torch.ones(2), atol=1e-4)
