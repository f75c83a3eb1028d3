"""Claims about outlines along the image's edges and about the image features of SAM2."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage

from medfocus.masks.quality import innermost, iou
from medfocus.masks.sam2 import edges
from medfocus.masks.sam2.segmenter import Sam2Segmenter, load_sam2
from medfocus.masks.settings import Sam2Settings
from medfocus.pocket.pool import held_out

NOISE = np.random.default_rng(0)


def disc(height: int, width: int, y: float, x: float, radius: float) -> np.ndarray:
    """Return a disc (height, width) bool; centre and radius are in pixels."""
    rows, columns = np.mgrid[:height, :width] + 0.5
    return np.hypot(rows - y, columns - x) < radius


def test_the_guided_filter_is_the_mean_of_the_linear_fits_in_all_windows_around_a_pixel() -> None:
    grey, inside = NOISE.random((2, 24, 22))
    radius = edges.RADIUS
    padded = [np.pad(plane, 2 * radius, mode="edge") for plane in (grey, inside)]
    expected = np.zeros_like(grey)
    for y, x in np.ndindex(*grey.shape):
        values = []
        for v, u in np.ndindex(2 * radius + 1, 2 * radius + 1):
            window = slice(y + v, y + v + 2 * radius + 1), slice(x + u, x + u + 2 * radius + 1)
            i, p = (plane[window].ravel() for plane in padded)
            slope = np.cov(i, p, bias=True)[0, 1] / (i.var() + edges.FLATNESS)
            values.append(slope * grey[y, x] + p.mean() - slope * i.mean())
        expected[y, x] = np.mean(values)
    inner = slice(2 * radius, -2 * radius)  # what the padding of a padded plane does not reach
    found = edges.along_edges(inside, grey)
    np.testing.assert_allclose(found[inner, inner], expected[inner, inner], atol=1e-9)


def test_an_outline_moves_to_a_nearby_edge() -> None:
    truth = disc(64, 64, 32, 32, 18)
    grey = ndimage.gaussian_filter(0.3 + 0.4 * truth, 0.7) + 0.01 * NOISE.standard_normal((64, 64))
    loose = disc(64, 64, 32, 32, 20).astype(float)
    assert iou(edges.along_edges(loose, grey) > 0.5, truth) > iou(loose > 0.5, truth) + 0.1


def test_without_an_edge_an_outline_stays() -> None:
    region = disc(64, 64, 32, 32, 18)
    assert iou(edges.along_edges(region.astype(float), np.full((64, 64), 0.5)) > 0.5, region) > 0.93


@pytest.fixture(scope="module")
def segmenters() -> dict[bool, Sam2Segmenter]:
    return {
        on: load_sam2(
            Sam2Settings("pocket", "pocket", None, "grid", points_per_side=6, follow_edges=on), batch_size=3
        )
        for on in (False, True)
    }


def spot(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a dark image (H, W, 3) uint8 with a bright spot, and the spot (H, W) bool."""
    region = disc(height, width, 0.4 * height, 0.6 * width, 0.1 * min(height, width))
    grey = 60 + 110 * region + 6 * np.random.default_rng(1).standard_normal(region.shape)
    return _rgb(grey.clip(0, 255).astype(np.uint8)), region


def test_following_edges_improves_the_outlines_of_lesions(segmenters: dict[bool, Sam2Segmenter]) -> None:
    drawn = [held_out("brain_mri", label, n) for label in ("glioma", "meningioma") for n in range(5)]
    drawn += [held_out("breast_ultrasound", label, n) for label in ("benign", "cyst") for n in range(5)]
    before, after = (
        np.mean(
            [
                iou(
                    segmenters[on].at_points(_rgb(phantom.image), [innermost(phantom.region)])[0, 0],
                    phantom.region,
                )
                for phantom in drawn
            ]
        )
        for on in (False, True)
    )
    assert after > 0.7
    assert after > before


def _rgb(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, 2)


def test_a_mask_along_edges_does_not_depend_on_other_images_of_the_batch(
    segmenters: dict[bool, Sam2Segmenter],
) -> None:
    images = [spot(*size)[0] for size in ((96, 96), (160, 200), (120, 80), (64, 64))]
    together = segmenters[True].segment(images)
    for image, mask in zip(images, together, strict=True):
        (alone,) = segmenters[True].segment([image])
        assert mask.region.shape == image.shape[:2]
        assert mask.status == alone.status
        assert iou(mask.region, alone.region) > 0.99, "a matrix product rounds by the size of its batch"


def test_following_edges_changes_the_key(segmenters: dict[bool, Sam2Segmenter]) -> None:
    assert segmenters[False].key != segmenters[True].key


def test_an_image_is_described_by_two_levels_of_the_encoder_in_any_batch(
    segmenters: dict[bool, Sam2Segmenter],
) -> None:
    images = [spot(*size)[0] for size in ((96, 96), (160, 200), (120, 80), (64, 64))]
    described = segmenters[True].describe(images, 4)
    assert described.shape == (4, (128 + 128 // 4) * 4 * 4)
    assert not described.is_inference(), "a head that trains on it has to be able to"
    for image, one in zip(images, described, strict=True):
        assert torch.allclose(segmenters[False].describe([image], 4)[0], one, atol=1e-3)


def test_sam2s_generator_cannot_follow_edges() -> None:
    with pytest.raises(
        ValueError,
        match=r"follow_edges does not work with the strategy 'automatic'.* Set follow_edges to false",
    ):
        load_sam2(Sam2Settings("pocket", "random:0", 128, "automatic", follow_edges=True))
