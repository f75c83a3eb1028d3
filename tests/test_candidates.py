"""Claims about the choice of a mask among candidate regions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from scipy import ndimage

from medfocus.masks import candidates
from medfocus.masks.candidates import Limits
from tests.segmenters import disc

LIMITS = Limits(min_area=0.01, max_area=0.70, min_iou=0.7, min_stability=0.85)


def pick(*regions: np.ndarray, iou: Sequence[float] | None = None, keep: int = 1) -> candidates.Choice | None:
    """Choose among regions of full stability and, by default, equal predicted IoU."""
    quality = np.array(iou if iou is not None else [0.9] * len(regions))
    return candidates.choose(
        np.stack(regions), quality, np.ones(len(regions)), LIMITS, keep=keep, max_overlap=0.3
    )


def test_stability_is_sam2s_own_score() -> None:
    from sam2.utils.amg import calculate_stability_score

    logits = np.random.default_rng(0).normal(size=(5, 20, 30)).astype(np.float32) * 3
    expected = calculate_stability_score(torch.from_numpy(logits), 0.0, 1.0).numpy()
    assert np.allclose(candidates.stability(logits), expected)


def test_an_empty_candidate_has_stability_and_centrality_zero() -> None:
    assert candidates.stability(np.full((1, 4, 4), -5.0)) == 0
    assert candidates.centrality(np.zeros((1, 4, 4), dtype=bool)) == 0


def test_centrality_is_one_in_the_centre_and_falls_to_zero_in_a_corner() -> None:
    corner = np.zeros((400, 400), dtype=bool)
    corner[0, 0] = True
    central, aside, cornered = candidates.centrality(
        np.stack([disc(0.5, 0.5, 0.1, 400), disc(0.5, 0.7, 0.1, 400), corner])
    )
    assert central == pytest.approx(1)
    assert aside == pytest.approx(1 - 0.2 / np.sqrt(0.5), abs=1e-3)
    assert cornered == pytest.approx(0, abs=0.01)


def test_border_share_counts_each_outermost_pixel_once() -> None:
    half = np.zeros((1, 10, 10), dtype=bool)
    half[0, :, :5] = True
    assert candidates.border_share(half) == pytest.approx(0.5)
    assert candidates.border_share(np.ones((1, 1, 7), dtype=bool)) == 1


def test_a_central_candidate_beats_the_same_candidate_in_a_corner() -> None:
    choice = pick(disc(0.2, 0.2, 0.15), disc(0.5, 0.5, 0.15))
    assert choice is not None
    assert choice.indices == (1,)
    assert choice.status == "chosen"


def test_a_region_inside_beats_a_frame_along_the_border() -> None:
    frame = ~disc(0.5, 0.5, 0.45)
    choice = pick(frame, disc(0.5, 0.6, 0.3))
    assert choice is not None
    assert choice.indices == (1,)


def test_score_is_the_product_of_its_four_parts() -> None:
    region = disc(0.4, 0.6, 0.2)[None]
    expected = 0.8 * 0.9 * candidates.centrality(region) * (1 - candidates.border_share(region))
    assert candidates.scores(region, np.array([0.8]), np.array([0.9])) == pytest.approx(expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_predicted_iou_that_is_not_finite_never_wins(bad: float) -> None:
    choice = pick(disc(0.5, 0.5, 0.2), disc(0.3, 0.3, 0.1), iou=[bad, 0.7])
    assert choice is not None
    assert choice.indices == (1,)


def test_both_lungs_are_kept_and_not_one_lung_twice() -> None:
    left, right = disc(0.5, 0.28, 0.18), disc(0.5, 0.72, 0.18)
    almost_left = disc(0.5, 0.29, 0.17)
    choice = pick(left, almost_left, right, iou=[0.95, 0.85, 0.8], keep=2)
    assert choice is not None
    assert choice.indices == (0, 2)
    united = candidates.unite(np.stack([left, right]))
    assert np.array_equal(united, left | right)


def test_a_part_of_the_best_candidate_is_not_distinct_from_it() -> None:
    whole, part = disc(0.5, 0.5, 0.3), disc(0.5, 0.5, 0.1)
    assert candidates.overlap(whole, part) == 1
    choice = pick(whole, part, keep=2)
    assert choice is not None
    assert len(choice.indices) == 1


def test_a_region_and_its_background_are_never_united() -> None:
    choice = pick(disc(0.5, 0.5, 0.4), ~disc(0.5, 0.5, 0.4), keep=2)
    assert choice is not None
    assert choice.indices == (0,)


def test_areas_outside_the_limits_need_relaxed_limits() -> None:
    speck, flood = disc(0.5, 0.5, 0.05), ~disc(0.5, 0.0, 0.25)  # 0.8 % and 90 % or so
    large = disc(0.5, 0.5, 0.48)  # 72 %
    assert pick(disc(0.5, 0.5, 0.01), flood) is None
    for region in (speck, large):
        relaxed = pick(region)
        assert relaxed is not None
        assert relaxed.status == "relaxed"


def test_low_quality_needs_relaxed_thresholds_and_never_displaces_high_quality() -> None:
    poor = pick(disc(0.5, 0.5, 0.2), iou=[0.3])
    assert poor is not None
    assert poor.status == "relaxed"
    assert poor.score < 0.31
    both = pick(disc(0.5, 0.5, 0.2), disc(0.1, 0.1, 0.1), iou=[0.69, 0.7])
    assert both is not None
    assert both.indices == (1,)
    assert both.status == "chosen"


def test_no_candidates_give_no_choice() -> None:
    nothing = np.zeros((0, 8, 8), dtype=bool)
    assert candidates.choose(nothing, np.zeros(0), np.zeros(0), LIMITS, keep=2, max_overlap=0.3) is None


def test_holes_are_filled_and_small_islands_are_dropped() -> None:
    ring = disc(0.5, 0.5, 0.3) & ~disc(0.5, 0.5, 0.15)
    tidied = candidates.tidy(ring | disc(0.06, 0.06, 0.03))
    assert np.array_equal(tidied, disc(0.5, 0.5, 0.3))
    second = disc(0.15, 0.15, 0.1)  # an island of a ninth of the disc's area stays
    assert np.array_equal(candidates.tidy(ring | second), disc(0.5, 0.5, 0.3) | second)


def test_hole_filling_equals_scipys() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        region = ndimage.gaussian_filter(rng.normal(size=(30, 40)), rng.uniform(0.5, 3)) > 0
        filled = np.asarray(ndimage.binary_fill_holes(region))
        labels, _ = candidates.connected(filled)
        sizes = np.bincount(labels.ravel())[1:]
        kept = 1 + np.flatnonzero(sizes >= candidates.ISLAND_SHARE * sizes.max())
        assert np.array_equal(candidates.tidy(region), np.isin(labels, kept))


def test_a_filled_hole_counts_as_area() -> None:
    rim = disc(0.5, 0.5, 0.499) & ~disc(0.5, 0.5, 0.4)  # 28 %, but 78 % filled
    choice = pick(rim)
    assert choice is not None
    assert choice.status == "relaxed"
