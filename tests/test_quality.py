"""Claims about the comparison of masks with known regions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.quality import _images
from medfocus.masks import quality
from medfocus.masks.sam2.segmenter import PointPrompts, load_sam2
from medfocus.masks.settings import Sam2Settings


def disc(size: int, x: float, y: float, radius: float) -> np.ndarray:
    rows, columns = np.mgrid[:size, :size]
    return np.hypot(columns - x, rows - y) < radius


def test_iou_and_dice_follow_their_definitions() -> None:
    a, b = np.zeros((2, 4), bool), np.zeros((2, 4), bool)
    a[0], b[:, :2] = True, True
    assert quality.iou(a, b) == pytest.approx(2 / 6)
    assert quality.dice(a, b) == pytest.approx(4 / 8)
    assert quality.iou(a, ~a) == quality.dice(a, ~a) == 0
    nothing = np.zeros((2, 4), bool)
    assert quality.iou(nothing, nothing) == quality.dice(nothing, nothing) == 1


def test_the_centre_box_covers_half_of_the_image() -> None:
    region = quality.center_box(200, 300)
    assert region.mean() == pytest.approx(0.5, abs=0.01)
    assert np.array_equal(region, region[::-1, ::-1])


def test_the_innermost_point_of_a_disc_is_its_centre_and_the_images_border_is_an_edge() -> None:
    assert quality.innermost(disc(100, 30, 60, 12)) == pytest.approx((0.305, 0.605), abs=0.01)
    x, y = quality.innermost(np.ones((100, 100), bool))
    assert (x, y) == pytest.approx((0.5, 0.5), abs=0.02)


def test_two_lungs_are_two_parts_and_small_parts_are_dropped() -> None:
    lungs = disc(100, 25, 50, 15), disc(100, 75, 50, 12)
    found = quality.parts(lungs[0] | lungs[1] | disc(100, 50, 5, 3))
    assert len(found) == 2
    assert all(any(np.array_equal(lung, part) for part in found) for lung in lungs)
    assert quality.parts(np.zeros((9, 9), bool)) == []


def test_the_mask_at_points_is_the_union_of_the_masks_at_each() -> None:
    segmenter = load_sam2(Sam2Settings("pocket", "pocket", None, "grid"))
    discs = disc(96, 28, 48, 14), disc(96, 70, 50, 12)
    image = np.full((96, 96, 3), 40, np.uint8)
    image[discs[0] | discs[1]] = 190
    points = [quality.innermost(each) for each in discs]
    both, three = quality.masks_at_points(segmenter, image, points)
    alone = [quality.masks_at_points(segmenter, image, [point])[0] for point in points]
    assert np.array_equal(both, alone[0] | alone[1])
    assert three.shape == (3, 96, 96)
    assert quality.iou(both, discs[0] | discs[1]) > 0.5


def test_a_reader_corrects_the_larger_error_at_its_innermost_place() -> None:
    region, mask = disc(100, 40, 50, 20), disc(100, 70, 50, 8)
    x, y, inside = quality.correction(region, mask) or pytest.fail("no point")
    assert inside and (x, y) == pytest.approx((0.405, 0.505), abs=0.02)
    x, y, inside = quality.correction(mask, region) or pytest.fail("no point")
    assert not inside and (x, y) == pytest.approx((0.405, 0.505), abs=0.02)
    assert quality.correction(region, region) is None


def test_a_readers_prompts_lie_in_each_part_and_its_box_touches_the_part(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    segmenter = load_sam2(Sam2Settings("pocket", "random:0", 64, "grid"))
    region = disc(64, 16, 32, 8) | disc(64, 48, 32, 8)
    asked: list[PointPrompts] = []

    def best(encoded: object, index: int, prompt: PointPrompts) -> tuple[np.ndarray, float]:
        asked.append(prompt)
        return np.full((16, 16), -8.0, np.float32), 0.5

    monkeypatch.setattr(segmenter, "best", best)
    masks = quality.masks_of_a_reader(segmenter, np.zeros((64, 64, 3), np.uint8), region)
    assert list(masks) == ["one point", "two points", "box"] and not any(
        mask.any() for mask in masks.values()
    )
    assert [prompt.labels.tolist() for prompt in asked] == 2 * [[[1]], [[1, 1]], [[2, 3]]]
    for one, two, box, part in zip(*(asked[i::3] for i in range(3)), quality.parts(region), strict=True):
        x, y = (one.coords[0, 0] * 64).astype(int)
        assert part[y, x] and np.array_equal(two.coords[0, 0], one.coords[0, 0])
        (left, top), (right, bottom) = box.coords[0] * 64
        inside = part[int(top) : int(bottom), int(left) : int(right)]
        assert inside.sum() == part.sum() and all(inside.any(axis).all() for axis in (0, 1))


def test_the_regions_of_an_image_are_united_and_an_empty_region_is_none(tmp_path: Path) -> None:
    names = {"lesion (1).png": 1, "lesion (2).png": 2, "clean.png": 0}
    for name, count in names.items():
        place = tmp_path / "all" / "kind" / name
        truth = tmp_path / "masks" / "all" / "kind"
        place.parent.mkdir(parents=True, exist_ok=True)
        truth.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(place)
        for number in range(max(1, count)):
            region = disc(30, 8 + 10 * number, 8, 4)[:20] & bool(count)
            Image.fromarray(region).save(truth / f"{place.stem}_mask{f'_{number}' if number else ''}.png")
    found = _images(tmp_path, None)
    assert [label for label, _, _ in found] == ["kind", "kind"]
    assert [len(quality.parts(region)) for _, _, region in found] == [1, 2]
    with pytest.raises(SystemExit, match="no image has a region in"):
        _images(tmp_path / "masks", None)
