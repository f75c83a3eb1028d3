"""Claims about Otsu's threshold as a segmenter."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from medfocus.images import decode
from medfocus.masks.otsu import OtsuSegmenter, otsu_threshold
from medfocus.masks.settings import OtsuSettings
from tests.segmenters import assert_sound, awkward_images, disc


def test_otsus_threshold_minimises_the_variance_within_classes() -> None:
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(0.3, 0.05, 4000), rng.normal(0.7, 0.1, 1000)]).clip(0, 1)
    threshold, contrast = otsu_threshold(values)

    def within(t: float) -> float:
        below, above = values[values <= t], values[values > t]
        return (below.size * below.var() + above.size * above.var()) / values.size

    best = min((within(t / 256), t / 256) for t in range(60, 200))
    assert within(threshold) == pytest.approx(best[0], rel=1e-3)
    assert contrast == pytest.approx(1 - best[0] / values.var(), abs=0.01)


def test_otsu_outlines_a_bright_disc_on_noise() -> None:
    rng = np.random.default_rng(0)
    truth = disc(0.45, 0.55, 0.2, 200)
    image = (60 + 100 * truth[:, :, None] + rng.normal(0, 8, (200, 200, 1))).repeat(3, 2).astype(np.uint8)
    (mask,) = OtsuSegmenter().segment([image])
    assert mask.status == "chosen"
    assert (mask.region & truth).sum() / (mask.region | truth).sum() > 0.93
    assert mask.coverage == pytest.approx(truth.mean(), abs=0.01)
    assert 0 < mask.score <= 1


def test_otsu_keeps_two_dark_lungs() -> None:
    truth = disc(0.5, 0.28, 0.17, 160) | disc(0.5, 0.72, 0.17, 160)
    image = np.where(truth[:, :, None], np.uint8(50), np.uint8(180)).repeat(3, 2)
    (mask,) = OtsuSegmenter(OtsuSettings(keep=2)).segment([image])
    assert (mask.region & truth).sum() / (mask.region | truth).sum() > 0.93


def test_otsus_masks_of_real_images_keep_the_area_limits(shared_data: Path) -> None:
    paths = sorted((shared_data / "covid19" / "test").rglob("*.jpg"))[::8]
    masks = OtsuSegmenter(OtsuSettings(keep=2)).segment([decode.read(path) for path in paths])
    assert len(masks) >= 8
    for mask in masks:
        assert mask.status == "chosen"
        assert 0.01 <= mask.coverage <= 0.71  # enlarging moves the edge by part of a pixel


def test_otsu_segments_flat_grey_tiny_and_long_images() -> None:
    images = awkward_images()
    masks = OtsuSegmenter().segment(images)
    assert_sound(masks, images)
    assert masks[0].status == "identity"


@pytest.mark.parametrize(
    "image", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8)]
)
def test_an_array_that_is_no_image_is_refused_with_its_shape(image: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"An image has shape .* segmenters take \(H, W, 3\) uint8 RGB"):
        OtsuSegmenter().segment([image])
