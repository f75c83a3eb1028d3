"""Claims about the fast segmenter of large images: it gives the plain segmenter's masks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from medfocus import phantoms
from medfocus.masks.factory import build_sam2
from medfocus.masks.sam2.fast_decoder import Answer
from medfocus.masks.sam2.fast_segmenter import LEAST_SIZE, FastSegmenter, fits
from medfocus.masks.sam2.model import load_predictor
from medfocus.masks.sam2.segmenter import PointPrompts, Sam2Segmenter, box_prompt, grid_prompts, load_sam2
from medfocus.masks.settings import Sam2Settings
from tests.segmenters import amplify, hiera

SIZE = 256  # pixels: fast segmenters serve larger images, but work at every size


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The configuration of a SAM2 with a small Hiera."""
    return hiera(tmp_path_factory.mktemp("hiera"))


@pytest.fixture(scope="module", params=["small", "sam2.1_hiera_t", "sam2.1_hiera_b+"])
def pair(request: pytest.FixtureRequest, small: str) -> tuple[Sam2Segmenter, FastSegmenter]:
    """A plain segmenter and the fast segmenter of the same model, with random weights."""
    config = small if request.param == "small" else request.param
    plain = amplified(config, SIZE, points_per_side=3, min_iou=0.1, min_stability=0.1)
    return plain, FastSegmenter(plain)


def amplified(config: str, size: int, **settings: Any) -> Sam2Segmenter:
    """Build a segmenter of random weights whose masks have edges."""
    predictor, key = load_predictor(config, "random:0", size)
    amplify(predictor.model)
    return Sam2Segmenter(predictor, key, Sam2Settings(config, "random:0", size, "grid", **settings))


def drawn(modality: str, label: str, seed: int = 0) -> np.ndarray:
    """Draw a phantom (192, 192, 3) uint8."""
    image = phantoms.draw(modality, label, np.random.default_rng(seed), 192).image
    return np.repeat(image[..., None], 3, 2)


def images() -> list[np.ndarray]:
    """Draw one phantom of every class."""
    return [drawn(modality, label) for modality, labels in phantoms.MODALITIES.items() for label in labels]


@pytest.mark.parametrize("prompts", [grid_prompts(3), box_prompt(0.5)], ids=["points", "box"])
def test_the_fast_decoder_returns_the_same_logits(
    pair: tuple[Sam2Segmenter, FastSegmenter], prompts: PointPrompts
) -> None:
    plain, fast = pair
    features = plain.encode(images()[:2])
    with torch.inference_mode():
        expected, expected_iou = plain.decode(features, 1, prompts)
        logits, iou = fast.decode(features, 1, prompts)
    assert logits.shape == (3 * len(prompts.coords), SIZE // 4, SIZE // 4)
    assert np.allclose(logits, expected, atol=1e-5 * np.abs(expected).max())
    assert np.allclose(iou, expected_iou, atol=1e-5)


def test_the_fast_encoder_returns_the_same_features(pair: tuple[Sam2Segmenter, FastSegmenter]) -> None:
    plain, fast = pair
    expected, features = (one.encode(images()[:2]) for one in pair)
    levels = zip((features.embedding, *features.fine), (expected.embedding, *expected.fine), strict=True)
    for level, other in levels:
        assert level.shape == other.shape
        assert torch.allclose(level, other, atol=1e-5 * float(other.abs().max()))
    described, other = (one.describe(images()[:1], 2) for one in (fast, plain))
    assert torch.allclose(described, other, atol=1e-4)


def test_the_logits_of_a_prompt_do_not_depend_on_other_prompts(
    pair: tuple[Sam2Segmenter, FastSegmenter],
) -> None:
    _, fast = pair
    features = fast.encode(images()[:1])
    whole, iou = fast.decode(features, 0, grid_prompts(3))
    middle, middle_iou = fast.decode(features, 0, grid_prompts(1))
    assert np.allclose(whole[12:15], middle, atol=1e-5 * np.abs(middle).max())
    assert np.allclose(iou[12:15], middle_iou, atol=1e-5)


@pytest.mark.parametrize("keep", [1, 2, 3])
@pytest.mark.parametrize(("min_iou", "min_stability"), [(0.1, 0.1), (0.7, 0.85), (2.0, 0.1)])
def test_skipping_masks_that_cannot_win_changes_no_choice(
    small: str, keep: int, min_iou: float, min_stability: float
) -> None:
    plain = amplified(small, 128, points_per_side=6, keep=keep, min_iou=min_iou, min_stability=min_stability)
    fast = FastSegmenter(plain)
    for one, other in zip(fast.segment(images()), plain.segment(images()), strict=True):
        assert one.status == other.status
        assert one.score == pytest.approx(other.score, abs=1e-5)
        assert (one.region != other.region).mean() < 1e-3


def test_after_a_good_region_few_points_are_decoded(small: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = amplified(small, 128, points_per_side=8, min_iou=0.1, min_stability=0.1)
    fast, count, answers = FastSegmenter(plain), 0, list[Answer]()
    monkeypatch.setattr(
        "medfocus.masks.sam2.fast_decoder._CHUNK_BYTES", 1
    )  # one point at a time, as at 1024 px
    answer, draw = fast.decoder.answer, fast.decoder.logits

    def good_first(*given: Any) -> Answer:
        """Predict an IoU of 1 at the first point, and of 0.15 elsewhere."""
        answers.append(answer(*given))
        iou = torch.full_like(answers[-1].predicted_iou, 0.15 if len(answers) > 1 else 1.0)
        return replace(answers[-1], predicted_iou=iou)

    monkeypatch.setattr(fast.decoder, "answer", good_first)

    def counted(scene: Any, answer: Any) -> Tensor:
        nonlocal count
        count += len(answer.positions)
        return draw(scene, answer)

    monkeypatch.setattr(fast.decoder, "logits", counted)
    (mask,) = fast.segment([drawn("breast_ultrasound", "benign")])
    assert mask.status == "chosen"
    assert len(answers) == 64 and count < 48


def test_nan_logits_never_win(small: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = FastSegmenter(amplified(small, 128, points_per_side=2, min_iou=0.1, min_stability=0.1))
    draw = fast.decoder.logits
    monkeypatch.setattr(fast.decoder, "logits", lambda *given: draw(*given) * float("nan"))
    (mask,) = fast.segment([drawn("breast_ultrasound", "benign")])
    assert mask.status == "identity"


def test_small_images_sam2s_generator_and_the_pocket_use_the_plain_segmenter(small: str) -> None:
    for config, size, strategy in (
        (small, 128, "grid"), (small, 256, "box"), (small, LEAST_SIZE, "automatic"),
        ("pocket", LEAST_SIZE, "grid"), ("pocket", LEAST_SIZE, "interest"),
    ):  # fmt: skip
        plain = load_sam2(Sam2Settings(config, "random:0", size, strategy))
        built = build_sam2(Sam2Settings(config, "random:0", size, strategy))
        assert type(built) is Sam2Segmenter
        assert (built.key, built.features_key) == (plain.key, plain.features_key)


def test_every_setting_and_the_fast_segmenter_change_the_key(small: str) -> None:
    def built(batch_size: int = 4, **changed: Any) -> Sam2Segmenter:
        settings = {"image_size": LEAST_SIZE, "strategy": "grid", **changed}
        return build_sam2(Sam2Settings(small, "random:0", **settings), batch_size=batch_size)

    changes: list[dict[str, Any]] = [
        {}, {"image_size": 1024}, {"strategy": "box"}, {"strategy": "box", "box_side": 0.5},
        {"points_per_side": 5}, {"keep": 2}, {"min_area": 0.02}, {"follow_edges": True},
    ]  # fmt: skip
    segmenters = [built(**change) for change in changes]
    assert all(isinstance(one, FastSegmenter) for one in segmenters)
    plain = load_sam2(Sam2Settings(small, "random:0", LEAST_SIZE, "grid"))
    assert len({plain.key, *(one.key for one in segmenters)}) == len(changes) + 1
    assert segmenters[0].features_key == segmenters[4].features_key != plain.features_key
    assert built(batch_size=1).key == segmenters[0].key


def test_the_fast_segmenter_uses_the_same_box(small: str) -> None:
    plain = load_sam2(Sam2Settings(small, "random:0", 128, "box", box_side=0.4))
    image = drawn("brain_mri", "glioma")
    one, other = (each.segment([image])[0] for each in (FastSegmenter(plain), plain))
    assert (one.status, one.score) == (other.status, pytest.approx(other.score, abs=1e-5))


def test_an_unsupported_model_is_refused_with_the_fix(small: str) -> None:
    plain = load_sam2(Sam2Settings(small, "random:0", 128, "grid"))
    assert fits(plain) and not fits(load_sam2(Sam2Settings("pocket", "random:0", 128, "grid")))
    plain.model.image_encoder.neck.fpn_top_down_levels = [0, 1, 2, 3]  # pyright: ignore
    assert not fits(plain)
    with pytest.raises(ValueError, match=r"FastSegmenter supports neither .* Use Sam2Segmenter"):
        FastSegmenter(plain)
