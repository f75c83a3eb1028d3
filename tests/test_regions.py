"""Regions inside the encoder: alpha, attention and dual use a region in addition to the image."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from medfocus.clip.build import build_clip
from medfocus.clip.encoder import ClipEncoder
from medfocus.clip.regions import REGIONS
from medfocus.focus.augment import augmentation
from medfocus.focus.view import view
from medfocus.images.geometry import Frame
from tests.towers import small_vit

SIZE = 96


@pytest.fixture(scope="module")
def clip() -> ClipEncoder:
    return small_vit()


def images_and_masks(count: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, 80, 120, 3), dtype=np.uint8)
    masks = np.zeros((count, 80, 120), dtype=bool)
    masks[:, 10:50, 30:70] = True
    return images, masks


def batch(mode: str, count: int = 3) -> Tensor:
    images, masks = images_and_masks(count)
    views = [
        view(image, mask, focus=mode, frame=Frame(SIZE), feather=0.01)
        for image, mask in zip(images, masks, strict=True)
    ]
    return torch.from_numpy(np.stack(views))


def encode(clip: ClipEncoder, views: Tensor) -> Tensor:
    return clip.encode_images(clip.preprocess(views))


@pytest.mark.parametrize("mode", ["alpha", "attention"])
def test_the_fourth_channel_is_the_mask_in_the_frame_of_the_image(mode: str) -> None:
    images, masks = images_and_masks(1)
    shown = view(images[0], masks[0], focus=mode, frame=Frame(SIZE), feather=0.01)
    assert shown.shape == (SIZE, SIZE, 4)
    raw = view(images[0], None, focus="none", frame=Frame(SIZE), feather=0.01)
    assert (shown[..., :3] == raw).all()
    painted = np.where(masks[0][..., None], np.uint8(255), np.uint8(0)).repeat(3, axis=2)
    inside = view(painted, None, focus="none", frame=Frame(SIZE), feather=0.0)[..., 0] > 127
    assert ((shown[..., 3] > 127) == inside)[17:79].mean() > 0.99  # without the padding
    assert not shown[:15, :, 3].any()


def test_image_and_region_are_changed_together_and_every_view_shows_the_region() -> None:
    images, masks = images_and_masks(1)
    images[0][masks[0]] = 255
    images[0][~masks[0]] = 0
    for number in range(1, 8):
        change = augmentation("ab" * 32, number, mirror=True)
        shown = view(images[0], masks[0], focus="attention", frame=Frame(SIZE), feather=0.0, change=change)
        shown = shown[17:79]  # without the padding
        region = shown[..., 3] > 127
        assert region.any()
        assert shown[region][:, 0].mean() > 240 and shown[~region][:, 0].mean() < 30


@pytest.mark.parametrize(("mode", "focused"), [("dual", "multiply"), ("dual-crop", "crop")])
def test_dual_shows_the_image_and_the_focused_image(mode: str, focused: str) -> None:
    images, masks = images_and_masks(1)
    shown = view(images[0], masks[0], focus=mode, frame=Frame(SIZE), feather=0.01)
    assert (shown[..., :3] == view(images[0], None, focus="none", frame=Frame(SIZE), feather=0.01)).all()
    assert (shown[..., 3:] == view(images[0], masks[0], focus=focused, frame=Frame(SIZE), feather=0.01)).all()


def test_attention_without_a_bias_changes_no_bit(clip: ClipEncoder) -> None:
    views = batch("attention")
    plain = encode(clip, views[..., :3])
    regional = clip.with_region("attention", 0.0)
    assert torch.equal(encode(regional, views), plain)
    pixels, raw = regional.preprocess(views), clip.preprocess(views[..., :3])
    assert torch.equal(regional.trunk(pixels, 1), clip.trunk(raw, 1))
    assert torch.equal(regional.encode_layers(pixels, (1,), 4), clip.encode_layers(raw, (1,), 4))


def test_attention_moves_the_class_token_towards_the_region(clip: ClipEncoder) -> None:
    views = batch("attention")
    strong = clip.with_region("attention", 50.0)
    other = views.clone()
    other[..., :3][views[..., 3] == 0] = 255  # another image outside the region
    with_bias = (encode(strong, views) * encode(strong, other)).sum(dim=1)
    without = (encode(clip, views[..., :3]) * encode(clip, other[..., :3])).sum(dim=1)
    assert (with_bias > without).all()


def test_the_attention_bias_matches_a_computation_in_numpy(clip: ClipEncoder) -> None:
    """One block against softmax(q kᵀ / √d + β m) v in NumPy."""
    visual: Any = clip.model.visual
    block = visual.transformer.resblocks[0]
    attention, heads = block.attn, block.attn.num_heads
    tokens = torch.randn(2, 65, 128, generator=torch.Generator().manual_seed(0))
    coverage = torch.rand(2, 64, generator=torch.Generator().manual_seed(1))
    got = clip.tower.block(1, tokens, clip.tower.bias(pad(coverage, (1, 0)), 3.0))
    x = block.ln_1(tokens).detach().numpy().astype(np.float64)
    weight = attention.in_proj_weight.detach().numpy().astype(np.float64)
    q, k, v = np.split(x @ weight.T + attention.in_proj_bias.detach().numpy(), 3, axis=2)
    q, k, v = (part.reshape(2, 65, heads, -1).transpose(0, 2, 1, 3) for part in (q, k, v))
    logits = q @ k.transpose(0, 1, 3, 2) / np.sqrt(q.shape[-1])  # (B, heads, L, L)
    logits[:, :, 0, 1:] += 3.0 * coverage.numpy()[:, None]
    shares = np.exp(logits - logits.max(axis=-1, keepdims=True))
    shares /= shares.sum(axis=-1, keepdims=True)
    out = (shares @ v).transpose(0, 2, 1, 3).reshape(2, 65, 128)
    out = out @ attention.out_proj.weight.detach().numpy().T + attention.out_proj.bias.detach().numpy()
    after = tokens + torch.from_numpy(out).float()
    expected = after + block.mlp(block.ln_2(after))
    assert torch.allclose(got, expected, atol=1e-4)


def test_alpha_changes_no_feature_until_its_channel_is_trained(clip: ClipEncoder) -> None:
    views = batch("alpha")
    regional = clip.with_region("alpha", 2.0)
    assert torch.equal(encode(regional, views), encode(clip, views[..., :3]))
    visual: Any = regional.model.visual
    weight = visual.conv1.alpha.weight
    weight.data += torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    assert not torch.allclose(encode(regional, views), encode(clip, views[..., :3]), atol=1e-3)
    assert torch.equal(encode(clip, views[..., :3]), encode(replace(clip), views[..., :3]))


def test_dual_adds_the_features_of_both_images(clip: ClipEncoder) -> None:
    views = batch("dual")
    both = encode(clip, views[..., :3]) + encode(clip, views[..., 3:])
    expected = both / both.norm(dim=1, keepdim=True)
    assert torch.allclose(encode(clip.with_region("dual", 2.0), views), expected, atol=1e-6)


@pytest.mark.parametrize("mode", REGIONS)
@pytest.mark.parametrize("blocks", [1, 3])
def test_trunk_and_tail_equal_the_image_encoder(clip: ClipEncoder, mode: str, blocks: int) -> None:
    regional = clip.with_region(mode, 2.0)
    pixels = regional.preprocess(batch(mode))
    features = regional.tail(blocks)(regional.trunk(pixels, blocks))
    assert torch.allclose(features, regional.encode_images(pixels), atol=1e-5)
    layers = regional.encode_layers(pixels, (0, 2), 4)
    images = 2 if mode.startswith("dual") else 1
    assert layers.shape == (3, 128 + images * 2 * 16 * 128)
    assert torch.allclose(layers[:, :128], regional.encode_images(pixels), atol=1e-5)


def test_each_region_has_its_own_key(clip: ClipEncoder) -> None:
    regions = [("alpha", 2.0), ("attention", 2.0), ("attention", 3.0), ("dual", 2.0), ("dual-crop", 2.0)]
    keys = {clip.key, *(clip.with_region(mode, bias).key for mode, bias in regions)}
    assert len(keys) == 6
    assert (
        clip.with_region("dual", 1.0).key == clip.with_region("dual", 2.0).key
    )  # only attention uses the bias


def test_the_coverage_is_the_share_of_each_patch_and_passes_with_the_tokens(clip: ClipEncoder) -> None:
    pixels = torch.zeros(2, 4, SIZE, SIZE)
    pixels[0, 3, :12, :6] = 1.0
    coverage = clip.tower.coverage(pixels[:, 3:])
    assert coverage.shape == (2, 1 + 64)  # the class token has no patch
    assert coverage[0, 1] == 0.5 and coverage.sum() == 0.5
    region = REGIONS["attention"](2.0)
    tokens = torch.randn(2, 65, 8)
    (back,), bias = region.unpack(region.pack([tokens], clip.tower, pixels), clip.tower)
    assert torch.equal(back, tokens) and bias is not None
    assert bias[0, 0, 1] == 1.0 and bias.sum() == 1.0 * 4  # heads


def test_unknown_regions_other_encoders_and_absent_masks_are_refused(clip: ClipEncoder) -> None:
    with pytest.raises(ValueError, match=r"region 'beta' is not known\. Use one of alpha, attention, dual"):
        clip.with_region("beta", 1.0)
    resnet = build_clip("RN50", "random:0")
    with pytest.raises(
        ValueError, match=r"^the focus 'attention': .*RN50 \(ModifiedResNet\).* Use the focus alpha, dual"
    ):
        resnet.with_region("attention", 1.0)
    images, _ = images_and_masks(1)
    with pytest.raises(ValueError, match="focus 'alpha' needs a mask"):
        view(images[0], None, focus="alpha", frame=Frame(SIZE), feather=0.0)
