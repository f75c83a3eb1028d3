"""Views follow the checkpoint's preprocessing: frame, interpolation, colours, masks with their images."""

from __future__ import annotations

from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from medfocus.clip import build
from medfocus.clip.build import build_clip
from medfocus.explain.explain import on_image, share_in_mask
from medfocus.focus.view import view
from medfocus.images.geometry import BLACK, Frame, Resize

SIZE = 96
RESIZES: tuple[Resize, ...] = ("longest", "shortest", "squash")
SHAPES = [(300, 400), (400, 300), (224, 224), (96, 96), (61, 217), (40, 33), (97, 96)]


def drawn(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * width).integers(0, 256, (height, width, 3), np.uint8)


def disc(height: int, width: int, y: float, x: float, radius: float) -> np.ndarray:
    """A disc at a place in shares of the sides, with a radius in pixels."""
    ys, xs = np.mgrid[:height, :width]
    return np.hypot(ys - y * height, xs - x * width) < radius


def preprocessing(**changes: Any) -> dict[str, Any]:
    return {**vars(PreprocessCfg(size=SIZE)), **changes}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "random"])
@pytest.mark.parametrize("resize_mode", RESIZES)
def test_the_published_frame_equals_open_clip_s_transform(
    resize_mode: str, interpolation: str, shape: tuple[int, int]
) -> None:
    settings = preprocessing(resize_mode=resize_mode, interpolation=interpolation, fill_color=77)
    image = drawn(*shape)
    transform: Any = image_transform_v2(PreprocessCfg(**settings), is_train=False)
    framed = build._frame(SIZE, settings, "published").image(image)
    pixels = (
        torch.from_numpy(framed).permute(2, 0, 1) / 255 - torch.tensor(settings["mean"]).view(3, 1, 1)
    ) / (torch.tensor(settings["std"]).view(3, 1, 1))
    assert torch.equal(pixels, transform(Image.fromarray(image)))


def test_an_encoder_s_pixels_equal_open_clip_s_for_an_image_that_is_not_square() -> None:
    encoder = build_clip("pocket", "random:0", resize="published")
    settings = encoder.config["preprocess_cfg"]
    transform: Any = image_transform_v2(PreprocessCfg(**settings), is_train=False)
    image = drawn(300, 400)
    pixels = encoder.preprocess(view(image, None, focus="none", frame=encoder.frame, feather=0)[None])
    assert torch.allclose(pixels[0], transform(Image.fromarray(image)), atol=1e-6)


@pytest.mark.parametrize("shape", [(300, 400), (61, 217), (96, 96)])
@pytest.mark.parametrize("resize", RESIZES)
def test_a_mask_is_transformed_with_its_image(resize: Resize, shape: tuple[int, int]) -> None:
    region = disc(*shape, 0.45, 0.55, 20)
    frame = Frame(SIZE, resize, "bilinear", padding=BLACK)
    shown = frame.image(np.repeat(region[..., None], 3, 2).astype(np.uint8) * np.uint8(255))
    assert np.abs(shown[..., 0] - 255 * frame.mask(region)).max() <= 1
    view_ = view(drawn(*shape), region, focus="alpha", frame=frame, feather=0)
    assert np.abs(view_[..., 3].astype(float) - shown[..., 0]).max() <= 1


@pytest.mark.parametrize("shape", [(300, 400), (400, 300), (96, 96)])
@pytest.mark.parametrize("resize", RESIZES)
def test_attribution_maps_from_every_frame_back_to_the_image(resize: Resize, shape: tuple[int, int]) -> None:
    frame = Frame(SIZE, resize)
    region = disc(*shape, 0.5, 0.4, 25)
    heat = frame.mask(region)
    placed = on_image(heat, np.ones(shape, bool), "multiply", frame)
    assert placed.shape == shape and placed.sum() == pytest.approx(1, abs=1e-3)
    assert placed[region].sum() > 0.9
    share = share_in_mask(heat, region, "multiply", frame)
    assert share is not None and share > 0.9


def test_attribution_is_zero_where_the_frame_cuts_the_image_off() -> None:
    frame = Frame(SIZE, "shortest")
    placed = on_image(np.ones((SIZE, SIZE), np.float32), np.ones((100, 300), bool), "none", frame)
    assert placed[:, :99].max() == placed[:, 201:].max() == 0
    assert placed[:, 102:198].min() > 0


@pytest.mark.parametrize("focus_", ["multiply", "alpha", "attention", "dual", "blur", "contour"])
def test_a_region_that_the_frame_cuts_off_stands_for_the_whole_image(focus_: str) -> None:
    image, frame = drawn(100, 300), Frame(SIZE, "shortest")
    outside = disc(100, 300, 0.5, 0.1, 10)
    whole = view(image, np.ones((100, 300), bool), focus=focus_, frame=frame, feather=0)
    assert np.array_equal(view(image, outside, focus=focus_, frame=frame, feather=0), whole)
    letterboxed = view(image, outside, focus=focus_, frame=Frame(SIZE), feather=0)
    assert not np.array_equal(letterboxed, view(image, ~outside, focus=focus_, frame=Frame(SIZE), feather=0))


def test_with_fill_black_multiply_is_the_product_of_image_and_mask() -> None:
    image, region, frame = drawn(SIZE, SIZE), disc(SIZE, SIZE, 0.5, 0.5, 30), Frame(SIZE)
    product = view(image, region, focus="multiply", frame=frame, feather=0, fill="black")
    assert np.array_equal(product, image * region[..., None])
    rest = view(image, region, focus="inverse", frame=frame, feather=0, fill="black")
    assert np.array_equal(rest, image * ~region[..., None])
    both = view(image, region, focus="dual", frame=frame, feather=0, fill="black")
    assert np.array_equal(both, np.concatenate([image, product], axis=2))
    with pytest.raises(ValueError, match=r"fill is 'white'\. Use one of mean, black\."):
        view(image, region, focus="multiply", frame=frame, feather=0, fill="white")


def test_fill_and_padding_have_the_checkpoint_s_mean_colour() -> None:
    settings = preprocessing(mean=(0.5, 0.25, 0.0), resize_mode="squash")
    frame = build._frame(SIZE, settings, "letterbox")
    assert frame == Frame(SIZE, "longest", "bicubic", (128, 64, 0), (128, 64, 0))
    shown = view(drawn(50, 96), disc(50, 96, 0.5, 0.5, 9), focus="multiply", frame=frame, feather=0)
    assert (shown[0] == (128, 64, 0)).all() and (shown[48, 0] == (128, 64, 0)).all()


def test_the_pocket_model_has_the_usual_frame() -> None:
    grey = (128, 128, 128)
    assert build_clip("pocket", "random:0").frame == Frame(160, "longest", "bicubic", grey, grey)
    with pytest.raises(ValueError, match=r"resize is 'crop'\. Use one of letterbox, published\."):
        build_clip("pocket", "random:0", resize="crop")


def test_every_tag_of_open_clip_has_a_frame() -> None:
    modes: set[tuple[str, str]] = set()
    for model, tag in open_clip.list_pretrained():
        settings = {**preprocessing(), **open_clip.get_pretrained_cfg(model, tag)}
        frame = build._frame(224, settings, "published")
        modes.add((frame.resize, frame.interpolation))
        assert frame.resize == settings["resize_mode"]
    assert {("shortest", "bicubic"), ("squash", "bicubic"), ("squash", "bilinear")} <= modes
