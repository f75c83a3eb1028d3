"""Maps of attribution against NumPy and closed forms, and their two measures."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import timm
import torch
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from medfocus.clip.build import build_clip
from medfocus.clip.encoder import ClipEncoder
from medfocus.clip.lora import LoraTowers
from medfocus.clip.towers.base import TowerError
from medfocus.clip.towers.choose import image_tower
from medfocus.clip.towers.vision_transformers import OpenClipViT
from medfocus.explain.grad_cam import grad_cam, tower_grad_cam
from medfocus.explain.maps import inside_share, pointing_hit, to_maps
from medfocus.explain.occlusion import occlusion
from medfocus.explain.transformer import gradient_attention
from tests.towers import small_vit

ENCODERS = ("small_vit", "ViT-B-32")


@pytest.fixture(scope="module")
def encoders() -> dict[str, ClipEncoder]:
    return {"small_vit": small_vit(), "ViT-B-32": build_clip("ViT-B-32", "random:0")}


def noise(count: int, size: int, channels: int = 3, seed: int = 0) -> Tensor:
    """Images (N, S, S, C) uint8 of coarse noise, so that patches differ."""
    coarse = torch.rand(count, channels, 8, 8, generator=torch.Generator().manual_seed(seed))
    return (255 * nn.functional.interpolate(coarse, size)).permute(0, 2, 3, 1).to(torch.uint8).contiguous()


def gaussian(count: int, size: int) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def tower(layers: int = 2, **settings: Any) -> VisionTransformer:
    """A ViT of 2 x 2 patches, width 8, two heads, 6 features; with weights large enough to matter."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        visual = VisionTransformer(8, 4, 8, layers, 2, 4.0, output_dim=6, **settings).double().eval()
        for parameter in visual.parameters():
            nn.init.normal_(parameter, std=0.6)
    return visual.requires_grad_(False)


def quadrant(size: int) -> np.ndarray:
    """The upper right quarter of the image."""
    mask = np.zeros((size, size), bool)
    mask[: size // 2, size // 2 :] = True
    return mask


def assert_maps(maps: Tensor, count: int, size: int) -> None:
    assert maps.shape == (count, size, size) and maps.dtype == torch.float32
    assert maps.min() >= 0
    np.testing.assert_allclose(maps.double().sum(dim=(1, 2)), 1, rtol=1e-5)


# --- the forward --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ENCODERS)
def test_features_with_kept_attention_equal_those_of_the_encoder(
    encoders: dict[str, ClipEncoder], name: str
) -> None:
    encoder = encoders[name]
    pixels = encoder.preprocess(noise(2, encoder.image_size))
    kept = encoder.tower.attended(pixels)
    assert torch.allclose(kept.features, encoder.encode_images(pixels), atol=1e-5)
    assert len(kept.blocks) == encoder.tower.depth
    assert all(torch.allclose(attention.sum(dim=-1), torch.ones(())) for attention in kept.blocks)


def test_the_attention_mask_of_a_region_gives_the_features_of_its_encoder(
    encoders: dict[str, ClipEncoder],
) -> None:
    encoder = encoders["small_vit"]
    regional = encoder.with_region("attention", 3.0)
    pixels = regional.preprocess(torch.cat([noise(2, 96), 255 * (noise(2, 96, 1, seed=1) > 99)], dim=-1))
    tower = encoder.tower
    features = tower.attended(pixels[:, :3], regional.region.bias(tower, pixels)).features
    assert torch.allclose(features, regional.encode_images(pixels), atol=1e-5)
    assert not torch.allclose(features, encoder.encode_images(pixels[:, :3]), atol=1e-3)


def test_low_rank_updates_count(encoders: dict[str, ClipEncoder]) -> None:
    encoder = encoders["small_vit"]
    towers = LoraTowers(encoder, rank=2, alpha=1.0, dropout=0.0).eval()
    for parameter in towers.parameters():
        nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(0))
    images = noise(2, encoder.image_size)
    with torch.no_grad():
        features = towers.encoder.tower.attended(encoder.preprocess(images)).features
        assert torch.allclose(features, towers(images), atol=1e-5)
    assert not torch.allclose(features, encoder.encode_images(encoder.preprocess(images)), atol=1e-3)


# --- gradient x attention -----------------------------------------------------------------------


class PlainTower:
    """A VisionTransformer's blocks and head in NumPy; a number can be added to any entry of attention."""

    def __init__(self, visual: VisionTransformer) -> None:
        self.weights = {name: value.numpy() for name, value in visual.state_dict().items()}
        self.blocks, self.heads = len(visual.transformer.resblocks), 2

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        return scaled * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def linear(self, x: np.ndarray, name: str) -> np.ndarray:
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def features(self, x: np.ndarray, nudge: tuple[int, int, int, int, float] | None = None) -> Any:
        """Tokens (L, W) -> features (D,) and attention (blocks, H, L, L)."""
        kept = []
        for block in range(self.blocks):
            at = f"transformer.resblocks.{block}"
            seen = self.norm(x, f"{at}.ln_1")
            weight, bias = (self.weights[f"{at}.attn.in_proj_{part}"] for part in ("weight", "bias"))
            packed = (seen @ weight.T + bias).reshape(len(x), 3, self.heads, -1)
            q, k, v = packed.transpose(1, 2, 0, 3)  # (H, L, W / H) each
            logits = np.exp(q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1]))
            attention = logits / logits.sum(-1, keepdims=True)  # (H, L, L)
            kept.append(attention.copy())
            if nudge is not None and nudge[0] == block:
                attention[nudge[1:4]] += nudge[4]
            x = x + self.linear((attention @ v).swapaxes(0, 1).reshape(len(x), -1), f"{at}.attn.out_proj")
            hidden = self.linear(self.norm(x, f"{at}.ln_2"), f"{at}.mlp.c_fc")
            gelu = hidden * (1 + np.vectorize(math.erf)(hidden / np.sqrt(2))) / 2
            x = x + self.linear(gelu, f"{at}.mlp.c_proj")
        pooled = self.norm(x, "ln_post")[0] @ self.weights["proj"]
        return pooled / np.linalg.norm(pooled), np.stack(kept)


def test_gradient_attention_matches_central_differences_in_numpy() -> None:
    visual, direction = tower(), np.array([1.0, -2.0, 0.5, 3.0, 0.0, 1.0])
    pixels = gaussian(1, 8).double()
    plain, tokens = PlainTower(visual), visual._embeds(pixels)[0].numpy()
    _, attention = plain.features(tokens)
    slope, step = np.zeros_like(attention), 1e-6
    for at in np.ndindex(*attention.shape):
        above, below = (plain.features(tokens, (*at, sign * step))[0] @ direction for sign in (1, -1))  # pyright: ignore[reportArgumentType]
        slope[at] = (above - below) / (2 * step)
    joint = np.eye(5)
    for block in range(2):
        joint = joint + np.maximum(slope[block] * attention[block], 0).mean(0) @ joint
    expected = to_maps(torch.tensor(joint[0, 1:].reshape(1, 2, 2)), 8)

    maps = gradient_attention(
        OpenClipViT(visual), pixels, lambda features: features @ torch.tensor(direction)
    )
    np.testing.assert_allclose(maps, expected, rtol=1e-4)
    assert maps.std() > 0.1 / 64


@pytest.mark.parametrize("name", ENCODERS)
def test_maps_of_a_frozen_clip_are_distributions_and_do_not_change_it(
    encoders: dict[str, ClipEncoder], name: str
) -> None:
    encoder = encoders[name]
    visual: Any = encoder.model.visual
    before = {key: value.clone() for key, value in visual.state_dict().items()}
    pixels = encoder.preprocess(noise(3, encoder.image_size))
    texts = encoder.encode_texts(["a nodule", "a clear lung"])

    with torch.no_grad():
        maps = gradient_attention(encoder.tower, pixels, lambda features: features @ texts[0])
    assert_maps(maps, 3, encoder.image_size)
    alone = gradient_attention(encoder.tower, pixels[1:2], lambda features: features @ texts[0])
    np.testing.assert_allclose(maps[1:2], alone, rtol=1e-3, atol=1e-7)
    of_other_class = gradient_attention(encoder.tower, pixels, lambda features: features @ texts[1])
    assert ((maps - of_other_class).abs().sum(dim=(1, 2)) > 0.01).all()
    assert all(torch.equal(value, before[key]) for key, value in visual.state_dict().items())
    assert not pixels.requires_grad and all(weight.grad is None for weight in visual.parameters())


# --- Grad-CAM -----------------------------------------------------------------------------------


class SmallNet(nn.Module):
    """A convolution, ReLU, the mean over places and a linear head, for which Grad-CAM equals CAM."""

    def __init__(self, window: np.ndarray | None = None) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.conv, self.act, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(True), nn.Linear(4, 2)
        self.head.weight.data = torch.tensor([[1.0, -0.5, 0.5, 1.0], [-0.5, 1.0, 1.5, -0.5]])
        self.window = torch.ones(()) if window is None else torch.from_numpy(window).float()
        self.eval().requires_grad_(False)

    def forward_features(self, pixels: Tensor) -> Tensor:
        return self.act(self.conv(pixels)) * self.window

    def forward_head(self, features: Tensor) -> Tensor:
        return self.head(features.mean(dim=(2, 3)))


def column(target: int) -> Any:
    return lambda logits: logits[:, target]


@pytest.mark.parametrize("target", [0, 1])
def test_grad_cam_of_a_linear_head_is_the_class_activation_map(target: int) -> None:
    net = SmallNet()
    pixels = gaussian(2, 6)
    features = net.forward_features(pixels).numpy()
    cam = np.maximum(np.einsum("k,bkij->bij", net.head.weight[target].numpy(), features), 0)
    cam /= cam.sum(axis=(1, 2), keepdims=True)
    assert cam.std() > 0
    np.testing.assert_allclose(grad_cam(net, pixels, column(target)), cam, atol=1e-6)


SMALL_SWIN = {"embed_dim": 24, "depths": (1, 1), "num_heads": (1, 2), "img_size": 64, "window_size": 4}
BACKBONES = {"resnet18": {}, "res2net50_26w_4s": {}, "swin_tiny_patch4_window7_224": SMALL_SWIN}


@pytest.mark.parametrize("name", BACKBONES)
def test_grad_cam_of_timms_backbones_is_their_class_activation_map(name: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net: Any = timm.create_model(name, num_classes=3, **BACKBONES[name]).eval()
        nn.init.uniform_(net.get_classifier().weight)  # so that a ResNet's map is not zero
    pixels = gaussian(2, 64)
    features = net.forward_features(pixels).detach()
    if name.startswith("swin"):  # (B, G, G, C)
        features = features.permute(0, 3, 1, 2)
    weight = net.get_classifier().weight[2].detach()
    cam = torch.einsum("k,bkij->bij", weight, features).clamp(min=0)
    maps = grad_cam(net, pixels, column(2))
    assert_maps(maps, 2, 64)
    np.testing.assert_allclose(maps, to_maps(cam, 64), rtol=1e-3, atol=1e-6)
    assert maps.std() > 0 and all(weight.grad is None for weight in net.parameters())


# --- a classifier that looks at one quadrant ----------------------------------------------------


def test_a_class_token_that_attends_to_one_quadrant_is_explained_by_it() -> None:
    visual = tower(layers=1)
    pixels = gaussian(2, 8).double()
    unseen = torch.zeros(2 * 2, 5, 5, dtype=torch.float64)  # (B * heads, L, L)
    unseen[:, 0] = torch.tensor([0.0, -1e4, 0.0, -1e4, -1e4])
    only = to_maps(torch.tensor([[[0.0, 1.0], [0.0, 0.0]]]), 8)[0]  # the upper right patch, upsampled
    # The patch lowers a feature or its negative, so one of the two scores rises.
    by_score = [
        gradient_attention(OpenClipViT(visual), pixels, lambda f, sign=sign: sign * f[:, 0], unseen)
        for sign in (1, -1)
    ]
    for i in range(2):
        sharper = max((maps[i] for maps in by_score), key=lambda heat: float(heat.std()))
        np.testing.assert_allclose(sharper, only, atol=1e-6)
        assert inside_share(sharper, quadrant(8)) > 0.75 and pointing_hit(sharper, quadrant(8), 0.0)


def test_grad_cam_of_a_net_that_uses_one_quadrant_lies_in_it() -> None:
    net, mask = SmallNet(quadrant(12)), quadrant(12)
    pixels = gaussian(3, 12)
    for heat in grad_cam(net, pixels, column(0)):
        assert inside_share(heat, mask) == pytest.approx(1) and pointing_hit(heat, mask, 0.0)


def brightness_of_quadrant(images: Tensor) -> Tensor:
    """A classifier that looks at the upper right quarter alone: (N, S, S, 3) -> (N, 2)."""
    mean = images[:, : images.shape[1] // 2, images.shape[2] // 2 :].float().mean(dim=(1, 2, 3)) / 255
    return torch.stack([1 - mean, mean], dim=1)


def test_occlusion_of_a_classifier_that_uses_one_quadrant_lies_in_it() -> None:
    image = torch.full((32, 32, 3), 200, dtype=torch.uint8)
    mask = quadrant(32)
    exact = occlusion(brightness_of_quadrant, image, 1, patch=8, stride=8, fill=0)
    assert_maps(exact, 1, 32)
    np.testing.assert_allclose(exact[0], mask / mask.sum(), atol=1e-7)
    assert pointing_hit(exact[0], mask, 0.0)
    # A square across the quadrant's edge puts heat just outside the quadrant.
    overlapping = occlusion(brightness_of_quadrant, image, 1, patch=8, stride=4, fill=0)
    assert 0.8 < inside_share(overlapping[0], mask) < 1
    # A part that raises the prediction when hidden gets no heat.
    other = occlusion(brightness_of_quadrant, image, 0, patch=8, stride=8, fill=0)
    assert torch.equal(other, torch.full((1, 32, 32), 1 / 32**2))


def test_occlusion_hides_every_pixel_and_matches_a_plain_loop() -> None:
    image = noise(1, 20)[0]
    fill = (10, 200, 30)

    def predict(images: Tensor) -> Tensor:
        weight = torch.arange(20 * 20 * 3).reshape(20, 20, 3) % 7 / 7e4
        return torch.stack([(images * weight).sum(dim=(1, 2, 3)), torch.ones(len(images))], dim=1)

    heat, count = np.zeros((20, 20)), np.zeros((20, 20))
    whole = float(predict(image[None])[0, 0])
    for top in (0, 4, 8, 12, 14):  # the last square ends at the edge
        for left in (0, 4, 8, 12, 14):
            hidden = image.clone()
            hidden[top : top + 6, left : left + 6] = torch.tensor(fill, dtype=torch.uint8)
            heat[top : top + 6, left : left + 6] += max(0.0, whole - float(predict(hidden[None])[0, 0]))
            count[top : top + 6, left : left + 6] += 1
    heat /= count
    maps = occlusion(predict, image, 0, patch=6, stride=4, fill=fill)
    np.testing.assert_allclose(maps[0], heat / heat.sum(), rtol=1e-3, atol=1e-6)


# --- maps and numbers ---------------------------------------------------------------------------


def test_a_map_without_heat_is_uniform() -> None:
    heat = torch.tensor([[[0.0, 0.0], [-1.0, 0.0]], [[0.0, 3.0], [0.0, 1e-30]]])
    maps = to_maps(heat, 4)
    assert_maps(maps, 2, 4)
    assert torch.equal(maps[0], torch.full((4, 4), 1 / 16))
    assert inside_share(maps[0], quadrant(4)) == 0.25
    assert maps[1].argmax() == 3


def test_the_share_inside_matches_values_by_hand() -> None:
    heat = np.array([[1.0, 2.0], [3.0, 4.0]])
    assert inside_share(heat, np.array([[False, True], [False, True]])) == pytest.approx(0.6)
    corner = torch.tensor([[True, False], [False, False]])
    assert inside_share(torch.tensor(heat), corner) == pytest.approx(0.1)
    assert inside_share(heat, np.ones((2, 2), bool)) == 1


def test_the_pointing_game_allows_a_share_of_the_side() -> None:
    heat, region = np.zeros((100, 100)), np.zeros((100, 100), bool)
    region[40:60, 40:60] = True
    heat[50, 62] = 1.0  # three pixels to the right of the region
    assert pointing_hit(heat, region, 0.03)
    assert not pointing_hit(heat, region, 0.029)
    assert pointing_hit(heat, region)  # 15 px of 500
    heat[50, 45] = 2.0
    assert pointing_hit(heat, region, 0.0)
    heat[5, 5] = 3.0
    assert not pointing_hit(heat, region)


def test_a_plateau_points_from_its_centre_and_a_uniform_map_misses() -> None:
    heat, region = np.zeros((20, 20)), np.zeros((20, 20), bool)
    heat[2:9, 2:9] = 1.0
    region[5, 5] = True
    assert pointing_hit(heat, region, 0.0)
    assert not pointing_hit(np.ones((20, 20)), np.ones((20, 20), bool))


# --- errors -------------------------------------------------------------------------------------


def test_image_encoders_without_attention_matrices_are_refused() -> None:
    pixels = torch.zeros(1, 3, 8, 8, dtype=torch.float64)
    settings: list[dict[str, Any]] = [
        {"qk_norm": True},
        {"attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 4},
    ]
    for visual in (SmallNet(), *(tower(**changes) for changes in settings)):
        with pytest.raises(
            TowerError, match=rf"\({type(visual).__name__}\) has no attention matrices.*occlusion"
        ):
            gradient_attention(image_tower(visual), pixels, lambda features: features[:, 0])
    with pytest.raises(TowerError, match=r"Grad-CAM: .*VisionTransformer\) has no maps of a conv"):
        tower_grad_cam(OpenClipViT(tower()), pixels, lambda features: features[:, 0])


def test_scores_without_a_gradient_are_refused() -> None:
    visual, pixels = OpenClipViT(tower()), torch.zeros(2, 3, 8, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"score: its result has no gradient .* or use occlusion"):
        gradient_attention(visual, pixels, lambda features: features.detach()[:, 0])
    free = torch.zeros(2, requires_grad=True)
    with pytest.raises(ValueError, match="score: its result has no gradient"):
        gradient_attention(visual, pixels, lambda features: free * 2)
    with pytest.raises(ValueError, match=r"score: its result has shape \(2, 6\) for 2 images\. .* \(2,\)\."):
        gradient_attention(visual, pixels, lambda features: features)
    with pytest.raises(ValueError, match="NaN or infinite"):
        gradient_attention(visual, pixels, lambda features: features[:, 0] * torch.nan)


def test_grad_cam_refuses_a_model_without_feature_maps() -> None:
    net, pixels = SmallNet(), torch.zeros(1, 3, 6, 6)
    with pytest.raises(ValueError, match=r"training mode.*Call eval\(\) first"):
        grad_cam(SmallNet().train(), pixels, column(0))
    net.forward_features = lambda pixels: torch.zeros(1, 2)
    with pytest.raises(ValueError, match=r"the features are \(1, 2\), not maps of channels\. Use occlusion"):
        grad_cam(net, pixels, column(0))
    with pytest.raises(ValueError, match=r"Sequential has no forward_features.*Use occlusion"):
        grad_cam(nn.Sequential(net).eval(), pixels, column(0))


def test_occlusion_refuses_other_images_squares_and_targets() -> None:
    image = torch.zeros(8, 8, 3, dtype=torch.uint8)
    for bad in (image[None], image.float(), image[..., :1]):
        with pytest.raises(ValueError, match=r"occlusion: the image is .*\. Pass \(S, S, 3\) uint8"):
            occlusion(brightness_of_quadrant, bad, 0, patch=2, stride=2, fill=0)
    for patch, stride in ((9, 1), (0, 1), (4, 5), (4, 0)):
        with pytest.raises(ValueError, match=f"squares of {patch} px, {stride} px apart, on 8 x 8 px"):
            occlusion(brightness_of_quadrant, image, 0, patch=patch, stride=stride, fill=0)
    with pytest.raises(ValueError, match=r"on 4 x 8 px\. Use a square view"):
        occlusion(brightness_of_quadrant, image[:4], 0, patch=2, stride=2, fill=0)
    with pytest.raises(ValueError, match=r"target 2 is not a column of the prediction \(1, 2\)"):
        occlusion(brightness_of_quadrant, image, 2, patch=2, stride=2, fill=0)


@pytest.mark.parametrize("number", [inside_share, pointing_hit])
def test_both_measures_refuse_invalid_maps_and_masks(number: Any) -> None:
    heat, mask = np.ones((4, 4)), np.ones((4, 4), bool)
    name = number.__name__
    with pytest.raises(ValueError, match=rf"{name}: the attribution is \(4, 4\) and the mask \(4, 5\)"):
        number(heat, np.ones((4, 5), bool))
    with pytest.raises(ValueError, match=r"the attribution is \(1, 4, 4\)"):
        number(heat[None], mask[None])
    with pytest.raises(ValueError, match=r"the mask is uint8\. Pass True inside .*mask > 0"):
        number(heat, 255 * mask.astype(np.uint8))
    with pytest.raises(ValueError, match="the mask is empty"):
        number(heat, ~mask)
    for bad in (-heat, 0 * heat, heat * np.nan):
        with pytest.raises(ValueError, match="negative, infinite or only zero values"):
            number(bad, mask)


def test_a_tolerance_out_of_range_is_refused() -> None:
    heat, mask = np.ones((4, 4)), np.ones((4, 4), bool)
    with pytest.raises(ValueError, match=r"the tolerance is 15\. Use a share of the side in \[0, 1\)"):
        pointing_hit(heat, mask, 15)
