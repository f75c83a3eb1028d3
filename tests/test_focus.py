"""Visual prompts: the effect of a mask on an image."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from medfocus.focus.marks import MARK_COLOUR
from medfocus.focus.modes import FOCUS, SEGMENT_COLOURS, focus, soft_edge
from medfocus.images.geometry import CLIP_MEAN

MODES = list(FOCUS)
MARKS = ["contour", "circle", "box", "arrow"]
FEATHER = 0.05


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (120, 160, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def mask() -> np.ndarray:
    """Two discs, the larger on the left."""
    y, x = np.mgrid[:120, :160]
    return (np.hypot(y - 60, x - 50) < 25) | (np.hypot(y - 60, x - 120) < 14)


def box_of(top: int, left: int, h: int, w: int) -> np.ndarray:
    region = np.zeros((120, 160), dtype=bool)
    region[top : top + h, left : left + w] = True
    return region


def mark_of(mask: np.ndarray, mode: str) -> np.ndarray:
    """Return the pixels of a mark, (H, W) bool."""
    drawn = focus(np.zeros((*mask.shape, 3), dtype=np.uint8), mask, mode, feather=0)
    return (drawn == MARK_COLOUR).all(axis=2)


def far_outside(mask: np.ndarray, feather: float) -> np.ndarray:
    return soft_edge(mask, feather) == 0


@pytest.mark.parametrize("mode", ["none", "multiply", "crop", "blur", *MARKS])
def test_full_mask_leaves_the_image_unchanged(image: np.ndarray, mode: str) -> None:
    full = np.ones(image.shape[:2], dtype=bool)
    assert np.array_equal(focus(image, full, mode, feather=FEATHER), image)


@pytest.mark.parametrize("mode", MODES)
def test_empty_mask_stands_for_the_whole_image(image: np.ndarray, mode: str) -> None:
    empty, full = np.zeros(image.shape[:2], dtype=bool), np.ones(image.shape[:2], dtype=bool)
    assert np.array_equal(
        focus(image, empty, mode, feather=FEATHER), focus(image, full, mode, feather=FEATHER)
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("feather", [0.0, 0.02, 0.5])
def test_every_mode_keeps_dtype_and_shape_and_does_not_modify_its_input(
    image: np.ndarray, mask: np.ndarray, mode: str, feather: float
) -> None:
    before, region = image.copy(), mask.copy()
    image.flags.writeable = mask.flags.writeable = False
    focused = focus(image, mask, mode, feather=feather)
    image.flags.writeable = mask.flags.writeable = True
    assert focused.dtype == np.uint8
    assert focused.shape[2] == 3
    assert mode == "crop" or focused.shape == image.shape
    assert np.array_equal(image, before)
    assert np.array_equal(mask, region)


@pytest.mark.parametrize("mode", MODES)
def test_transposing_image_and_mask_transposes_the_focus(
    image: np.ndarray, mask: np.ndarray, mode: str
) -> None:
    upright = focus(image, mask, mode, feather=FEATHER)
    lying = focus(
        np.ascontiguousarray(image.transpose(1, 0, 2)), np.ascontiguousarray(mask.T), mode, feather=FEATHER
    )
    rounding = 2 if mode == "blur" else 0  # Pillow's blur rounds between its passes
    assert np.abs(upright.transpose(1, 0, 2).astype(int) - lying).max() <= rounding


@pytest.mark.parametrize("mode", ["multiply", "blur", *MARKS])
def test_the_region_does_not_change(image: np.ndarray, mask: np.ndarray, mode: str) -> None:
    assert np.array_equal(focus(image, mask, mode, feather=FEATHER)[mask], image[mask])


def test_multiplied_image_is_clips_mean_colour_outside_away_from_the_feather(
    image: np.ndarray, mask: np.ndarray
) -> None:
    outside = far_outside(mask, FEATHER)
    assert 0.3 < outside.mean() < 0.9
    assert (focus(image, mask, "multiply", feather=FEATHER)[outside] == CLIP_MEAN).all()
    assert np.allclose(np.array(CLIP_MEAN) / 255, (0.48145466, 0.4578275, 0.40821073), atol=0.5 / 255)


def test_without_feather_a_multiplied_image_is_the_equation(image: np.ndarray, mask: np.ndarray) -> None:
    expected = np.where(mask[:, :, None], image, np.array(CLIP_MEAN, dtype=np.uint8))
    assert np.array_equal(focus(image, mask, "multiply", feather=0), expected)


def test_the_inverse_of_a_full_mask_is_an_image_of_clips_mean_colour(image: np.ndarray) -> None:
    full = np.ones(image.shape[:2], dtype=bool)
    assert (focus(image, full, "inverse", feather=FEATHER) == CLIP_MEAN).all()


def test_inverse_hides_the_region_and_leaves_the_background_away_from_the_feather(
    image: np.ndarray, mask: np.ndarray
) -> None:
    background = focus(image, mask, "inverse", feather=FEATHER)
    assert (background[mask] == CLIP_MEAN).all()
    outside = far_outside(mask, FEATHER)
    assert np.array_equal(background[outside], image[outside])


def test_multiply_and_inverse_together_show_the_whole_image(image: np.ndarray, mask: np.ndarray) -> None:
    region = focus(image, mask, "multiply", feather=FEATHER).astype(int)
    background = focus(image, mask, "inverse", feather=FEATHER).astype(int)
    assert np.abs(region + background - CLIP_MEAN - image).max() <= 1  # each is rounded


def test_the_soft_edge_falls_to_zero_over_the_feather() -> None:
    mask = np.zeros((101, 201), dtype=bool)
    mask[:, :100] = True
    across = soft_edge(mask, 10 / 201)[50].astype(int)  # a straight edge, 10 pixels wide
    assert (across[:100] == 255).all()
    assert (across[110:] == 0).all()
    assert (np.diff(across[99:111]) < 0).all()
    assert abs(across[104] - 128) < 20


def test_mask_at_the_images_border_gets_no_soft_edge_there() -> None:
    mask = np.zeros((60, 60), dtype=bool)
    mask[:, :30] = True
    rows = soft_edge(mask, 0.1)
    assert (rows == rows[30]).all()


def test_blur_removes_detail_outside_and_keeps_the_brightness(image: np.ndarray, mask: np.ndarray) -> None:
    outside = far_outside(mask, FEATHER)
    blurred = focus(image, mask, "blur", feather=FEATHER)[outside].astype(float)
    original = image[outside].astype(float)
    assert blurred.std() < 0.2 * original.std()
    assert abs(blurred.mean() - original.mean()) < 3


def test_overlay_tints_each_segment_in_its_own_colour(image: np.ndarray, mask: np.ndarray) -> None:
    tinted = focus(image, mask, "overlay", feather=FEATHER)
    assert np.array_equal(tinted[~mask], image[~mask])
    grey = np.full_like(image, 128)
    tinted = focus(grey, mask, "overlay", feather=FEATHER).astype(int)
    for (y, x), colour in zip(
        [(60, 50), (60, 120)], SEGMENT_COLOURS, strict=False
    ):  # the larger segment first
        shift = tinted[y, x] - 128
        assert np.array_equal(np.sign(shift), np.sign(np.array(colour) - 128))
    assert len({tuple(pixel) for pixel in tinted[mask]}) == 2


def test_more_segments_than_colours_repeat_the_colours() -> None:
    mask = np.zeros((8, 64), dtype=bool)
    mask[2:6, 1::4] = True
    assert mask[3].sum() > len(SEGMENT_COLOURS)
    tinted = focus(np.full((8, 64, 3), 128, dtype=np.uint8), mask, "overlay", feather=0)
    assert len({tuple(pixel) for pixel in tinted[mask]}) == len(SEGMENT_COLOURS)


def test_overlay_keeps_the_texture_under_the_tint(image: np.ndarray, mask: np.ndarray) -> None:
    one_segment = mask & (np.arange(160) < 85)
    tinted = focus(image, mask, "overlay", feather=FEATHER)[one_segment].astype(float)
    for channel in range(3):
        assert np.corrcoef(tinted[:, channel], image[one_segment][:, channel])[0, 1] > 0.99


def test_binary_shows_the_mask_without_the_image(image: np.ndarray, mask: np.ndarray) -> None:
    silhouette = focus(image, mask, "binary", feather=FEATHER)
    assert np.array_equal(silhouette, focus(255 - image, mask, "binary", feather=FEATHER))
    assert (silhouette[mask] == 255).all()
    assert (silhouette[far_outside(mask, FEATHER)] == 0).all()


@pytest.mark.parametrize(("top", "left", "h", "w"), [(40, 60, 5, 4), (0, 0, 90, 30), (100, 150, 20, 10)])
def test_crop_holds_the_masks_whole_box_and_at_least_two_fifths_of_the_image_around_it(
    image: np.ndarray, top: int, left: int, h: int, w: int
) -> None:
    mask = np.zeros(image.shape[:2], dtype=bool)
    mask[top : top + h, left : left + w] = True
    coordinates = np.stack([*np.mgrid[:120, :160], np.zeros((120, 160))], axis=-1).astype(np.uint8)
    cropped = focus(coordinates, mask, "crop", feather=FEATHER)
    rows, columns = cropped[:, 0, 0].astype(int), cropped[0, :, 1].astype(int)
    assert rows[0] <= top
    assert rows[-1] >= top + h - 1
    assert columns[0] <= left
    assert columns[-1] >= left + w - 1
    half = max(h / 2, w / 2, 0.2 * 120, 0.2 * 160)
    assert rows[0] == max(0, np.floor(top + h / 2 - half))
    assert rows[-1] == min(120, np.ceil(top + h / 2 + half)) - 1
    assert columns[0] == max(0, np.floor(left + w / 2 - half))
    assert columns[-1] == min(160, np.ceil(left + w / 2 + half)) - 1


@pytest.mark.parametrize("mode", MARKS)
def test_a_mark_changes_only_red_pixels_outside_the_mask(
    image: np.ndarray, mask: np.ndarray, mode: str
) -> None:
    drawn = focus(image, mask, mode, feather=FEATHER)
    changed = (drawn != image).any(axis=2)
    assert changed.any()
    assert (drawn[changed] == MARK_COLOUR).all()
    assert np.array_equal(changed, mark_of(mask, mode))
    assert not (changed & mask).any()


def test_contour_is_a_thin_line_around_the_mask(mask: np.ndarray) -> None:
    width = 3 / 224 * 160
    near = soft_edge(mask, (width + 1) / 160) > 0
    assert not (mark_of(mask, "contour") & ~near).any()


@pytest.mark.parametrize("mode", ["contour", "circle", "box"])
@pytest.mark.parametrize("turn", [np.fliplr, np.flipud, np.rot90])
def test_a_mirrored_or_rotated_image_has_a_mirrored_or_rotated_mark(
    image: np.ndarray, mask: np.ndarray, mode: str, turn: Callable[[np.ndarray], np.ndarray]
) -> None:
    turned = focus(turn(image), turn(mask), mode, feather=FEATHER)
    assert np.array_equal(turned, turn(focus(image, mask, mode, feather=FEATHER)))


def test_a_mirrored_image_has_a_mirrored_arrow_if_one_side_has_most_space() -> None:
    region = box_of(30, 20, 21, 31)
    mark = mark_of(region, "arrow")
    assert np.array_equal(mark_of(np.fliplr(region), "arrow"), np.fliplr(mark))
    assert np.array_equal(mark_of(np.flipud(region), "arrow"), np.flipud(mark))


def test_box_is_a_line_of_constant_width_around_the_bounding_box() -> None:
    mark = mark_of(box_of(40, 60, 20, 30) & ~box_of(40, 60, 10, 15), "box")
    assert np.flatnonzero(mark[50]).tolist() == [58, 59, 90, 91]
    assert np.flatnonzero(mark[:, 75]).tolist() == [38, 39, 60, 61]
    assert not mark[40:60, 60:90].any()


def test_circle_hugs_an_ellipse_and_goes_through_the_corners_of_a_rectangle() -> None:
    y, x = np.mgrid[:120, :160]
    ellipse = ((y - 60) / 20) ** 2 + ((x - 80) / 40) ** 2 < 1
    near = soft_edge(ellipse, 5 / 160) > 0
    assert not (mark_of(ellipse, "circle") & ~near).any()
    mark = mark_of(box_of(40, 60, 40, 40), "circle")  # half the diagonal is 28.3
    radii = np.hypot(*(np.argwhere(mark) + 0.5 - (60, 80)).T)
    assert 27.5 < radii.min() < 29.5 < radii.max() < 31.5


@pytest.mark.parametrize(
    ("place", "from_side"),
    [((50, 10, 20, 20), "right"), ((50, 130, 20, 20), "left"), ((5, 75, 10, 10), "below")],
)
def test_arrow_lies_on_the_side_with_most_space_and_touches_the_region(
    place: tuple[int, int, int, int], from_side: str
) -> None:
    top, left, h, w = place
    region = box_of(*place)
    mark = mark_of(region, "arrow")
    ys, xs = np.nonzero(mark)
    where = {"right": xs.min() == left + w, "left": xs.max() == left - 1, "below": ys.min() == top + h}
    assert where[from_side]
    lengths = {"right": np.ptp(xs), "left": np.ptp(xs), "below": np.ptp(ys)}
    assert lengths[from_side] + 1 == pytest.approx(36 * 160 / 224, abs=1)
    axis = np.median(ys) if from_side != "below" else np.median(xs)
    assert axis == pytest.approx(top + h / 2 if from_side != "below" else left + w / 2, abs=1)


@pytest.mark.parametrize("top", [0, 59, 119])
@pytest.mark.parametrize("left", [0, 79, 159])
def test_arrow_to_a_single_pixel_is_whole_wherever_it_lies(top: int, left: int) -> None:
    region = box_of(top, left, 1, 1)
    mark = mark_of(region, "arrow")
    width = 3 / 224 * 160
    head, shaft = 4 * width * 4 * width / 2, 8 * width * width
    assert (
        0.9 < mark.sum() / (head + shaft) < 1.3
    )  # rounding to pixels changes the area, but half an arrow would fail
    ys, xs = np.nonzero(mark)
    assert max(abs(ys - top).min(), abs(xs - left).min()) <= 1  # the tip touches the pixel


def test_arrow_is_smaller_if_there_is_less_space() -> None:
    counts = [mark_of(box_of(r, r, 120 - 2 * r, 160 - 2 * r), "arrow").sum() for r in (0, 3, 8, 15, 40)]
    assert counts[0] == 0
    assert counts == sorted(counts)
    assert len(set(counts)) == len(counts)


@pytest.mark.parametrize("mode", ["contour", "circle", "box"])
@pytest.mark.parametrize("place", [(0, 0, 1, 1), (0, 40, 30, 50), (100, 130, 20, 30), (1, 1, 118, 158)])
def test_a_mark_at_the_image_s_border_is_cut_off_there(mode: str, place: tuple[int, int, int, int]) -> None:
    region = box_of(*place)
    mark = mark_of(region, mode)
    assert mark.any()
    within = np.pad(region, 40)
    whole = np.zeros((*within.shape, 3), dtype=np.uint8)
    whole = (focus(whole, within, mode, feather=0) == MARK_COLOUR).all(axis=2)[40:-40, 40:-40]
    assert not (mark & ~whole).any()  # the same place; a larger image has a broader line


@pytest.mark.parametrize("size", [8, 28, 224, 1000])
def test_contour_is_drawn_in_tiny_and_large_images(size: int) -> None:
    mask = np.zeros((size, size), dtype=bool)
    mask[size // 4 : size // 2, size // 4 : size // 2] = True
    drawn = focus(np.zeros((size, size, 3), dtype=np.uint8), mask, "contour", feather=0)
    width = np.count_nonzero(drawn[size // 3, : size // 4, 0])
    assert width == max(1, int(3 / 224 * size))


def test_a_single_row_of_pixels_can_be_focused() -> None:
    image = np.arange(90, dtype=np.uint8).reshape(1, 30, 3)
    mask = np.zeros((1, 30), dtype=bool)
    mask[0, 10:15] = True
    for mode in MODES:
        focused = focus(image, mask, mode, feather=0.1)
        assert focused.dtype == np.uint8
        assert focused.size > 0


def test_an_unknown_mode_fails_with_the_known_modes(image: np.ndarray, mask: np.ndarray) -> None:
    with pytest.raises(ValueError, match=rf"focus 'multipy' is not known\. Use one of {', '.join(FOCUS)}\."):
        focus(image, mask, "multipy", feather=0)


def test_a_mask_of_another_image_or_kind_is_refused(image: np.ndarray, mask: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"mask is bool \(160, 120\)\. Pass bool \(120, 160\)"):
        focus(image, mask.T, "multiply", feather=0)
    with pytest.raises(ValueError, match=r"mask is uint8 \(120, 160\)"):
        focus(image, mask.astype(np.uint8), "multiply", feather=0)
    with pytest.raises(ValueError, match=r"image is float64 \(120, 160, 3\)\. Pass"):
        focus(image / 255, mask, "multiply", feather=0)
    with pytest.raises(ValueError, match=r"feather is 3\. Use a share of the longest side in \[0, 0.5\]"):
        focus(image, mask, "multiply", feather=3)
