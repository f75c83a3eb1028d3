"""Alpha-CLIP's published weights under the focus alpha, against its forward pass in plain operations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from medfocus.clip.encoder import ClipEncoder
from medfocus.clip.prompts import class_embeddings
from medfocus.masks.otsu import OtsuSegmenter
from medfocus.methods.clip import ClipZeroShot
from medfocus.serving import checkpoint
from medfocus.serving.model_folder import load_model, save_model
from tests.towers import CLIP_TEXT, RESNET, SIZE, VIT, build

HEADS = VIT["width"] // VIT["head_width"]


def published(encoder: ClipEncoder) -> dict[str, Tensor]:
    """Draw an image encoder in Alpha-CLIP's layout: a linear layer for q, k, v, and one more convolution."""
    generator = torch.Generator().manual_seed(2)
    visual: Any = encoder.model.visual
    state = {
        name.replace("attn.in_proj_", "attn.in_proj."): value
        + 0.05 * torch.randn(value.shape, generator=generator)
        if value.is_floating_point()
        else value
        for name, value in visual.state_dict().items()
    }
    shape = visual.conv1.weight[:, :1].shape
    return {**state, "conv1_alpha.weight": 0.2 * torch.randn(shape, generator=generator)}


def alpha_clip(state: dict[str, Tensor], rgb: Tensor, region: Tensor) -> Tensor:
    """Encode RGB (B, 3, S, S) and a region (B, 1, S, S) in [0, 1] by Alpha-CLIP's weights, one by one."""
    size = VIT["patch_size"]
    alpha = (region - 0.5) / 0.26
    x = functional.conv2d(rgb, state["conv1.weight"], stride=size)
    x = x + functional.conv2d(alpha, state["conv1_alpha.weight"], stride=size)
    x = x.flatten(2).transpose(1, 2)  # (B, G * G, W)
    x = torch.cat([state["class_embedding"].expand(len(x), 1, -1), x], dim=1) + state["positional_embedding"]

    def norm(x: Tensor, name: str) -> Tensor:
        return functional.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    x = norm(x, "ln_pre")
    for number in range(VIT["layers"]):
        at = f"transformer.resblocks.{number}"
        q, k, v = (
            part.unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for part in linear(norm(x, f"{at}.ln_1"), f"{at}.attn.in_proj").chunk(3, dim=-1)
        )
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(dim=-1)
        x = x + linear((weights @ v).transpose(1, 2).flatten(2), f"{at}.attn.out_proj")
        hidden = linear(norm(x, f"{at}.ln_2"), f"{at}.mlp.c_fc")
        x = x + linear(hidden * torch.sigmoid(1.702 * hidden), f"{at}.mlp.c_proj")
    features = norm(x[:, 0], "ln_post") @ state["proj"]
    return features / features.norm(dim=1, keepdim=True)


@pytest.fixture(scope="module")
def openai(tmp_path_factory: pytest.TempPathFactory) -> ClipEncoder:
    """A CLIP with OpenAI's activation, on which Alpha-CLIP is trained."""
    return build(tmp_path_factory.mktemp("clip"), VIT, CLIP_TEXT, quick_gelu=True)


def views_of(count: int) -> Tensor:
    """Draw views (N, S, S, 4) uint8."""
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (count, SIZE, SIZE, 4), generator=generator).to(torch.uint8)


def test_published_weights_give_alpha_clip_s_own_features(openai: ClipEncoder, tmp_path: Path) -> None:
    state = published(openai)
    torch.save(state, tmp_path / "clip_b16_grit1m_fultune_8xe.pth")
    encoder = openai.with_region("alpha", 0.0, tmp_path / "clip_b16_grit1m_fultune_8xe.pth")
    views = views_of(3)
    x = encoder.preprocess(views)
    expected = alpha_clip(state, x[:, :3], views[..., 3].float()[:, None] / 255)
    torch.testing.assert_close(encoder.encode_images(x), expected, rtol=0, atol=1e-5)
    assert encoder.key not in (openai.key, openai.with_region("alpha", 0.0).key)
    assert not torch.allclose(openai.encode_images(x[:, :3]), expected, atol=1e-2)  # the base stays as it is
    texts = ["a lung"]
    assert torch.equal(encoder.encode_texts(texts), openai.encode_texts(texts))


def test_the_channel_of_a_modified_resnet_loads_in_the_published_layout(tmp_path: Path) -> None:
    plain = build(tmp_path / "clip", RESNET, CLIP_TEXT)
    state = published(plain)
    torch.save({f"visual.{name}": value for name, value in state.items()}, tmp_path / "alpha.pth")
    encoder = plain.with_region("alpha", 0.0, tmp_path / "alpha.pth")
    conv1: Any = encoder.model.visual.conv1  # pyright: ignore[reportAttributeAccessIssue]
    assert torch.equal(conv1.alpha.weight, state["conv1_alpha.weight"])
    assert torch.equal(conv1.conv.weight, state["conv1.weight"])


def test_a_served_model_keeps_the_published_channel(openai: ClipEncoder, tmp_path: Path) -> None:
    torch.save(published(openai), tmp_path / "alpha.pth")
    encoder = openai.with_region("alpha", 0.0, tmp_path / "alpha.pth")
    method = ClipZeroShot(encoder).load({"text_features": class_embeddings(encoder, [["a lung"], ["a rib"]])})
    header = checkpoint.Header("clip-zero-shot", {}, ("a", "b"), "alpha", encoder.key, 0, 0, {})
    checkpoint.save(method, header, tmp_path / "cell.safetensors")
    save_model(
        tmp_path / "model",
        checkpoint=tmp_path / "cell.safetensors",
        encoder=encoder,
        segmenter=OtsuSegmenter(),
        fill="mean",
        feather=0.01,
    )
    served = load_model(tmp_path / "model").method
    assert torch.equal(served.embed(views_of(2)), method.embed(views_of(2)))


def test_weights_of_another_architecture_or_without_a_channel_are_refused(
    openai: ClipEncoder, tmp_path: Path
) -> None:
    state = published(openai)
    faulty = {
        "no channel": {name: value for name, value in state.items() if name != "conv1_alpha.weight"},
        "fewer tensors": {name: value for name, value in state.items() if name != "proj"},
        "another width": {**state, "proj": state["proj"][:, :4]},
    }
    messages = {
        "no channel": r"clip\.alpha: the weights have no conv1_alpha\.weight\. Give a checkpoint of Alpha",
        "fewer tensors": r"clip\.alpha: the weights are of another architecture \(proj\)\. Set clip\.model",
        "another width": r"clip\.alpha: the weights are of another architecture \(proj\)",
    }
    for name, content in faulty.items():
        torch.save(content, tmp_path / "alpha.pth")
        with pytest.raises(ValueError, match=messages[name]):
            openai.with_region("alpha", 0.0, tmp_path / "alpha.pth")
    with pytest.raises(FileNotFoundError, match=r"clip\.alpha.*gone\.pth"):
        openai.with_region("alpha", 0.0, tmp_path / "gone.pth")
