"""Claims about masks: how one is chosen, what SAM2 and Otsu make of an image, and how masks are kept."""

from __future__ import annotations

import csv
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from medfocus.datasets.records import Record
from medfocus.images import decode
from medfocus.masks import candidates, store
from medfocus.masks.candidates import Limits
from medfocus.masks.otsu import OtsuSegmenter, otsu_threshold
from medfocus.masks.sam2.model import _read_config, load_predictor
from medfocus.masks.sam2.segmenter import Prompts, Sam2Segmenter, box_prompt, grid_prompts, load_sam2
from medfocus.masks.segmenter import Mask, Segmenter, identity
from medfocus.masks.settings import OtsuSettings, Sam2Settings
from medfocus.masks.store import MaskStore, PublishedMasks, cache_masks, publish
from medfocus.storage import weights

LIMITS = Limits(min_area=0.01, max_area=0.70, min_iou=0.7, min_stability=0.85)
TINY = "configs/sam2.1/sam2.1_hiera_t.yaml"


def disc(y: float, x: float, radius: float, size: int = 64) -> np.ndarray:
    """A disc (size, size) bool; centre and radius as shares of the side."""
    rows, columns = (np.mgrid[:size, :size] + 0.5) / size
    return np.hypot(rows - y, columns - x) < radius


def pick(*regions: np.ndarray, iou: Sequence[float] | None = None, keep: int = 1) -> candidates.Choice | None:
    """Choose among regions of full stability, by default of the same predicted IoU."""
    quality = np.array(iou if iou is not None else [0.9] * len(regions))
    return candidates.choose(
        np.stack(regions), quality, np.ones(len(regions)), LIMITS, keep=keep, max_overlap=0.3
    )


# --- choosing


def test_stability_is_sam2s_own_score() -> None:
    from sam2.utils.amg import calculate_stability_score

    logits = np.random.default_rng(0).normal(size=(5, 20, 30)).astype(np.float32) * 3
    expected = calculate_stability_score(torch.from_numpy(logits), 0.0, 1.0).numpy()
    assert np.allclose(candidates.stability(logits), expected)


def test_a_candidate_without_a_pixel_has_no_stability_and_no_centre() -> None:
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


def test_border_share_counts_the_outermost_pixels_once() -> None:
    half = np.zeros((1, 10, 10), dtype=bool)
    half[0, :, :5] = True
    assert candidates.border_share(half) == pytest.approx(0.5)
    assert candidates.border_share(np.ones((1, 1, 7), dtype=bool)) == 1


def test_the_central_candidate_beats_the_same_one_in_the_corner() -> None:
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
def test_a_predicted_iou_that_is_no_number_never_wins(bad: float) -> None:
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


def test_areas_outside_of_the_limits_need_relaxed_ones() -> None:
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


def test_nothing_to_choose_from_is_no_choice() -> None:
    nothing = np.zeros((0, 8, 8), dtype=bool)
    assert candidates.choose(nothing, np.zeros(0), np.zeros(0), LIMITS, keep=2, max_overlap=0.3) is None


def test_holes_are_filled_and_far_smaller_islands_dropped() -> None:
    ring = disc(0.5, 0.5, 0.3) & ~disc(0.5, 0.5, 0.15)
    tidied = candidates.tidy(ring | disc(0.06, 0.06, 0.03))
    assert np.array_equal(tidied, disc(0.5, 0.5, 0.3))
    second = disc(0.15, 0.15, 0.1)  # an island of a ninth of the disc's area stays
    assert np.array_equal(candidates.tidy(ring | second), disc(0.5, 0.5, 0.3) | second)


def test_hole_filling_is_scipys() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        region = ndimage.gaussian_filter(rng.normal(size=(30, 40)), rng.uniform(0.5, 3)) > 0
        filled = np.asarray(ndimage.binary_fill_holes(region))
        labels, _ = candidates.connected(filled)
        sizes = np.bincount(labels.ravel())[1:]
        kept = 1 + np.flatnonzero(sizes >= candidates.ISLAND_SHARE * sizes.max())
        assert np.array_equal(candidates.tidy(region), np.isin(labels, kept))


def test_a_hole_that_fills_up_counts_as_area() -> None:
    rim = disc(0.5, 0.5, 0.499) & ~disc(0.5, 0.5, 0.4)  # 28 %, but 78 % filled
    choice = pick(rim)
    assert choice is not None
    assert choice.status == "relaxed"


# --- Otsu


def test_otsu_threshold_is_the_one_of_least_variance_within_the_classes() -> None:
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


def test_otsu_finds_two_dark_lungs_when_two_are_asked_for() -> None:
    truth = disc(0.5, 0.28, 0.17, 160) | disc(0.5, 0.72, 0.17, 160)
    image = np.where(truth[:, :, None], np.uint8(50), np.uint8(180)).repeat(3, 2)
    (mask,) = OtsuSegmenter(OtsuSettings(keep=2)).segment([image])
    assert (mask.region & truth).sum() / (mask.region | truth).sum() > 0.93


def test_otsu_keeps_within_the_area_limits_on_real_images(shared_data: Path) -> None:
    paths = sorted((shared_data / "covid19" / "test").rglob("*.jpg"))[::8]
    masks = OtsuSegmenter(OtsuSettings(keep=2)).segment([decode.read(path) for path in paths])
    assert len(masks) >= 8
    for mask in masks:
        assert mask.status == "chosen"
        assert 0.01 <= mask.coverage <= 0.71  # enlarging moves the edge by part of a pixel


def shapes_that_break_things() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    flat = np.full((50, 40, 3), 90, dtype=np.uint8)
    grey = rng.integers(0, 256, (90, 60, 1), dtype=np.uint8).repeat(3, 2)
    others = [(8, 8), (1, 1), (400, 20), (15, 300), (33, 47)]
    read_only = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    read_only.flags.writeable = False
    return [flat, grey, read_only, *(rng.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in others)]


def assert_sound(masks: Sequence[Mask], images: Sequence[np.ndarray]) -> None:
    assert len(masks) == len(images)
    for mask, image in zip(masks, images, strict=True):
        assert mask.region.shape == image.shape[:2]
        assert mask.region.dtype == bool
        assert mask.region.any()
        assert 0 <= mask.score <= 1
        assert (mask.status == "identity") == (mask.score == 0)
        assert mask.status != "identity" or mask.region.all()


def test_otsu_takes_flat_grey_tiny_and_long_images() -> None:
    images = shapes_that_break_things()
    masks = OtsuSegmenter().segment(images)
    assert_sound(masks, images)
    assert masks[0].status == "identity"


@pytest.mark.parametrize(
    "image", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8)]
)
def test_what_is_no_image_is_refused_with_its_shape(image: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"An image has shape .* segmenters take \(H, W, 3\) uint8 RGB"):
        OtsuSegmenter().segment([image])


# --- SAM2


def speak_up(model: torch.nn.Module) -> None:
    """Raise the mask logits of random weights, so that masks have edges and are stable enough to choose."""
    with torch.no_grad():
        for mlp in model.sam_mask_decoder.output_hypernetworks_mlps:  # pyright: ignore
            mlp.layers[-1].weight.mul_(100)
            mlp.layers[-1].bias.mul_(100)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole SAM2.1-tiny, video modules included, with random weights, in the published format."""
    import sam2
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    config = OmegaConf.load(Path(str(sam2.__path__[0])) / TINY)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = instantiate(config.model, _recursive_=True)
    speak_up(model)
    path = tmp_path_factory.mktemp("sam2") / "sam2.1_hiera_tiny.pt"
    torch.save({"model": model.state_dict()}, path)
    return path


@pytest.fixture(scope="session")
def tiny(tiny_checkpoint: Path) -> Sam2Segmenter:
    """Full-size SAM2.1-tiny through the real loading path, at 256 px to be quick."""
    return load_sam2(
        Sam2Settings(
            TINY, str(tiny_checkpoint), 256, "grid", points_per_side=2, min_iou=0.1, min_stability=0.1
        )
    )


@pytest.fixture
def pocket() -> Callable[..., Sam2Segmenter]:
    """Makes pocket segmenters of random weights whose masks have edges."""

    def build(strategy: str = "grid", batch_size: int = 4) -> Sam2Segmenter:
        predictor, key = load_predictor("pocket", "random:0", 128)
        speak_up(predictor.model)
        settings = Sam2Settings(
            "pocket", "random:0", 128, strategy, points_per_side=3, min_iou=0.1, min_stability=0.1
        )
        return Sam2Segmenter(predictor, key, settings, batch_size)

    return build


def noise(h: int, w: int, seed: int = 0) -> np.ndarray:
    """Smooth random colours (h, w, 3) uint8."""
    field = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=(h, w, 3)), (h / 9, w / 9, 0))
    return ((field - field.min()) / np.ptp(field) * 255).astype(np.uint8)


def test_full_size_sam2_loads_from_the_published_format_and_segments_every_shape(tiny: Sam2Segmenter) -> None:
    images = shapes_that_break_things()
    masks = tiny.segment(images)
    assert_sound(masks, images)
    assert {mask.status for mask in masks} >= {"chosen"}


def test_decoding_all_points_at_once_gives_the_predictors_own_logits(tiny: Sam2Segmenter) -> None:
    image = noise(120, 200)
    prompts = grid_prompts(2)
    logits, iou = tiny.decode(tiny.encode([noise(50, 50, 1), image]), 1, prompts)
    assert logits.shape == (12, 64, 64)
    assert iou.shape == (12,)
    tiny.predictor.set_image(image)
    for point in range(4):
        expected_masks, expected_iou, expected = tiny.predictor.predict(
            prompts.coords[point] * (200, 120),
            prompts.labels[point],
            multimask_output=True,
            return_logits=True,
        )
        mine = slice(3 * point, 3 * point + 3)
        assert np.allclose(np.clip(logits[mine], -32, 32), expected, atol=1e-3)
        assert np.allclose(iou[mine], expected_iou, atol=1e-5)
        full = torch.nn.functional.interpolate(
            torch.from_numpy(logits[mine])[None], (120, 200), mode="bilinear"
        )
        assert np.allclose(full[0].numpy(), expected_masks, atol=2e-3)


def test_box_prompt_is_the_predictors_own_box(tiny: Sam2Segmenter) -> None:
    image = noise(100, 60)
    logits, _ = tiny.decode(tiny.encode([image]), 0, box_prompt(0.5))
    tiny.predictor.set_image(image)
    _, _, expected = tiny.predictor.predict(box=np.array([15, 25, 45, 75]), multimask_output=True)
    assert np.allclose(np.clip(logits, -32, 32), expected, atol=1e-3)


def test_decoding_in_chunks_changes_nothing(tiny: Sam2Segmenter, monkeypatch: pytest.MonkeyPatch) -> None:
    features = tiny.encode([noise(64, 64)])
    whole, iou = tiny.decode(features, 0, tiny.prompts)
    monkeypatch.setattr("medfocus.masks.sam2.segmenter._DECODE_BYTES", 1)  # one point at a time
    chunked, chunked_iou = tiny.decode(features, 0, tiny.prompts)
    assert np.allclose(whole, chunked, atol=1e-3)
    assert np.allclose(iou, chunked_iou, atol=1e-5)


def test_a_mask_does_not_depend_on_the_images_beside_it(tiny: Sam2Segmenter) -> None:
    images = [noise(60, 80, seed) for seed in range(5)]
    together = tiny.segment(images)
    backwards = tiny.segment(images[::-1])[::-1]
    for a, b in zip(together, backwards, strict=True):
        assert (a.region != b.region).mean() < 0.001
        assert a.score == pytest.approx(b.score, abs=1e-4)


def test_the_images_aspect_does_not_move_the_mask(tiny: Sam2Segmenter) -> None:
    square = noise(256, 256)
    a, b = tiny.segment([square, square.repeat(2, axis=1)])
    widened = a.region.repeat(2, axis=1)
    assert (widened & b.region).sum() / (widened | b.region).sum() > 0.9


@pytest.mark.parametrize("strategy", ["automatic", "grid", "center", "box"])
def test_every_strategy_gives_one_sound_mask_per_image(
    pocket: Callable[..., Sam2Segmenter], strategy: str
) -> None:
    images = shapes_that_break_things()
    assert_sound(pocket(strategy).segment(images), images)


@pytest.mark.parametrize("strategy", ["automatic", "grid"])
def test_weights_without_a_stable_mask_end_on_the_last_rung(strategy: str) -> None:
    segmenter = load_sam2(Sam2Settings("pocket", "random:0", 128, strategy, points_per_side=2))
    (mask,) = segmenter.segment([noise(40, 40)])
    assert mask.status == "identity"
    assert mask.score == 0
    assert mask.coverage == 1


def test_automatic_chooses_among_sam2s_own_proposals(pocket: Callable[..., Sam2Segmenter]) -> None:
    from sam2.automatic_mask_generator import SAM2AutomaticMaskGenerator

    segmenter, image = pocket("automatic"), noise(96, 128)
    (mask,) = segmenter.segment([image])
    with pytest.warns(FutureWarning, match="script"):
        generator = SAM2AutomaticMaskGenerator(
            segmenter.model, points_per_side=3, pred_iou_thresh=0.1, stability_score_thresh=0.1
        )
    generator.predictor = segmenter.predictor  # at 128 px; the generator's own is made for 1024
    proposals = [candidates.tidy(one["segmentation"]) for one in generator.generate(image)]
    assert mask.status == "chosen"
    assert any(np.array_equal(mask.region, proposal) for proposal in proposals)


def test_center_is_a_grid_of_one_point() -> None:
    prompts = grid_prompts(1)
    assert prompts.coords.tolist() == [[[0.5, 0.5]]]
    assert grid_prompts(4).coords.shape == (16, 1, 2)
    assert grid_prompts(2).coords[:, 0].tolist() == [[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75]]


def scripted(segmenter: Sam2Segmenter, answers: list[tuple[np.ndarray, np.ndarray]]) -> list[Prompts]:
    """Let ``decode`` give ``answers`` in turn; returns the list of the prompts that it was asked."""
    asked: list[Prompts] = []

    def decode(features: object, index: int, prompts: Prompts) -> tuple[np.ndarray, np.ndarray]:
        asked.append(prompts)
        return answers[len(asked) - 1]

    segmenter.decode = decode  # pyright: ignore
    return asked


def as_logits(*regions: np.ndarray) -> np.ndarray:
    return np.where(np.stack(regions), 8.0, -8.0).astype(np.float32)


def test_the_ladder_goes_from_chosen_by_relaxed_and_the_box_to_identity(
    pocket: Callable[..., Sam2Segmenter],
) -> None:
    good, poor = np.array([0.9]), np.array([0.05])
    region, nothing = as_logits(disc(0.5, 0.5, 0.2, 32)), as_logits(np.zeros((32, 32), dtype=bool))
    rungs = {
        "chosen": [(region, good)],
        "relaxed": [(region, poor)],
        "box": [(nothing, good), (region, good)],
        "identity": [(nothing, good), (nothing, good)],
    }
    for status, answers in rungs.items():
        segmenter = pocket()
        asked = scripted(segmenter, answers)
        (mask,) = segmenter.segment([noise(64, 64)])
        assert mask.status == status
        assert len(asked) == len(answers)
        if len(asked) == 2:
            assert asked[1].coords.tolist() == [[[0, 0], [1, 1]]]
            assert asked[1].labels.tolist() == [[2, 3]]
        if status != "identity":
            truth = disc(0.5, 0.5, 0.2)
            assert (mask.region & truth).sum() / (mask.region | truth).sum() > 0.9


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_never_win(pocket: Callable[..., Sam2Segmenter], bad: float) -> None:
    broken, sound = as_logits(disc(0.5, 0.5, 0.2, 32)), as_logits(disc(0.3, 0.3, 0.2, 32))
    broken[0, 16, 16] = bad
    segmenter = pocket()
    scripted(segmenter, [(np.concatenate([broken, sound]), np.array([1.0, 0.8]))])
    (mask,) = segmenter.segment([noise(64, 64)])
    truth = disc(0.3, 0.3, 0.2)
    assert (mask.region & truth).sum() / (mask.region | truth).sum() > 0.9


@pytest.mark.parametrize("strategy", ["automatic", "grid"])
def test_weights_that_are_no_numbers_give_the_whole_image(
    pocket: Callable[..., Sam2Segmenter], strategy: str
) -> None:
    segmenter = pocket(strategy)
    with torch.no_grad():
        segmenter.model.sam_mask_decoder.iou_token.weight.fill_(float("nan"))
    (mask,) = segmenter.segment([noise(32, 32)])
    assert mask.status == "identity"


def test_a_region_smaller_than_a_pixel_of_the_image_falls_down_the_ladder(
    pocket: Callable[..., Sam2Segmenter],
) -> None:
    segmenter = pocket()
    speck = as_logits(disc(0.52, 0.52, 0.06, 32))
    nothing = as_logits(np.zeros((32, 32), dtype=bool))
    scripted(segmenter, [(speck, np.array([0.9])), (nothing, np.array([0.9]))])
    (mask,) = segmenter.segment([noise(2, 2)])
    assert mask.status == "identity"


def test_video_modules_may_be_absent_and_do_not_count_in_the_key(
    tiny_checkpoint: Path, tiny: Sam2Segmenter, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    state = weights.load(tiny_checkpoint)
    video = ("memory_", "maskmem_", "no_mem_pos", "no_obj", "obj_ptr", "mask_downsample")
    image_modules = {k: v for k, v in state.items() if not k.startswith(video)}
    assert len(image_modules) < len(state)
    save_file(image_modules, tmp_path / "image.safetensors")
    fast = load_sam2(
        Sam2Settings(
            "sam2.1_hiera_tiny",
            str(tmp_path / "image.safetensors"),
            256,
            "grid",
            points_per_side=2,
            min_iou=0.1,
            min_stability=0.1,
        )
    )
    assert fast.key == tiny.key
    images = [noise(70, 50)] * 4
    assert np.array_equal(fast.segment(images)[0].region, tiny.segment(images)[0].region)


def test_a_checkpoint_that_lacks_part_of_the_image_path_is_refused(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    state = weights.load(tiny_checkpoint)
    del state["sam_mask_decoder.iou_token.weight"]
    torch.save({"model": state}, tmp_path / "half.pt")
    message = (
        r"SAM2 checkpoint .*half.pt does not fit the config 'sam2.1_hiera_t': 1 of \d+ tensors differ "
        r"\(sam_mask_decoder.iou_token.weight is missing\). Name the config that the weights were made for."
    )
    with pytest.raises(ValueError, match=message):
        load_predictor("sam2.1_hiera_t", str(tmp_path / "half.pt"), 256)


def test_a_checkpoint_of_another_size_is_refused(tiny_checkpoint: Path) -> None:
    with pytest.raises(ValueError, match=r"does not fit the config 'pocket': \d+ of \d+ tensors differ"):
        load_predictor("pocket", str(tiny_checkpoint), 128)


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"masks.checkpoint \(SAM2\).*nowhere.pt"):
        load_predictor("pocket", str(tmp_path / "nowhere.pt"), 128)


def test_the_pocket_config_has_three_million_parameters_and_no_video() -> None:
    predictor, _ = load_predictor("pocket", "random:0", 128)
    names = [name for name, _ in predictor.model.named_parameters()]
    assert 2.5e6 < sum(parameter.numel() for parameter in predictor.model.parameters()) < 3.5e6
    assert not [name for name in names if name.startswith(("memory_", "obj_ptr", "mask_downsample"))]


def test_random_weights_come_from_their_seed_and_leave_the_callers_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    (_, a), (_, b), (_, c) = (load_predictor("pocket", f"random:{seed}", 128) for seed in (0, 0, 1))
    assert torch.equal(torch.rand(3), expected)
    assert a == b != c


def test_the_key_tells_weights_configs_and_settings_apart() -> None:
    def key(batch_size: int = 4, **changed: object) -> str:
        settings = {"config": "pocket", "checkpoint": "random:0", "image_size": 128, "strategy": "grid"}
        made = Sam2Settings(**{**settings, **changed})  # pyright: ignore[reportArgumentType]
        return load_sam2(made, batch_size=batch_size).key

    changes: list[dict[str, object]] = [
        {},
        {"checkpoint": "random:1"},
        {"image_size": 256},
        {"strategy": "center"},
        {"points_per_side": 5},
        {"keep": 2},
        {"min_area": 0.02},
        {"max_area": 0.6},
        {"min_iou": 0.6},
        {"min_stability": 0.6},
        {"max_overlap": 0.2},
        {"box_side": 0.8},
    ]
    keys = [key(**change) for change in changes]
    assert len(set(keys)) == len(keys)
    assert keys[0] == key(batch_size=1)
    assert OtsuSegmenter().key not in keys
    assert OtsuSegmenter().key != OtsuSegmenter(OtsuSettings(keep=2)).key


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 130}, "image_size is 130; SAM2 takes multiples of 32 pixels, 128 for one."),
        ({"checkpoint": "random:x"}, "checkpoint is 'random:x'; random weights are spelt random:0"),
        ({"strategy": "points"}, "Unknown mask strategy 'points'; known: automatic, grid, center, box."),
        ({"keep": 0}, "keep is 0; use 1 or more."),
        ({"box_side": 1.5}, r"box_side is 1.5; use a share of the image in \(0, 1\]."),
    ],
)
def test_a_setting_out_of_range_is_named_with_what_may_stand_there(
    settings: dict[str, object], message: str
) -> None:
    usual = {"config": "pocket", "checkpoint": "random:0", "image_size": 128, "strategy": "grid"}
    with pytest.raises(ValueError, match=message):
        load_sam2(Sam2Settings(**{**usual, **settings}))  # pyright: ignore[reportArgumentType]


def test_an_unknown_config_lists_the_known_ones() -> None:
    with pytest.raises(FileNotFoundError, match=r"SAM2 config 'sam3'.*Known: pocket, .*sam2.1_hiera_t"):
        load_predictor("sam3", "random:0", 128)


def test_a_yaml_without_a_model_is_refused_and_one_with_a_model_is_taken(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("trainer: {}\n")
    with pytest.raises(ValueError, match=r"empty.yaml': it has no section 'model' with a '_target_'"):
        load_predictor(str(tmp_path / "empty.yaml"), "random:0", 128)
    shipped = Path(candidates.__file__).parents[1] / "configs" / "sam2_pocket.yaml"
    shutil.copy(shipped, tmp_path / "mine.yaml")
    _, mine = load_predictor(str(tmp_path / "mine.yaml"), "random:0", 128)
    assert mine == load_predictor("pocket", "random:0", 128)[1]


@pytest.mark.parametrize(
    "asked",
    [
        "{_target_: os.system, _args_: ['touch ran']}",
        "{_target_: sam2.build_sam.os.system, _args_: ['touch ran']}",  # what a file of sam2 has imported
        "{_target_: sam2.build_sam.build_sam2, config_file: x}",
        "{_target_: sam2.modeling.sam2_base.trunc_normal_}",
        "[{deeper: [{_target_: os.system, _args_: ['touch ran']}]}]",
        "'${oc.create:{_target_:os.system,_args_:[touch ran]}}'",
        "'\\${oc.create:{_target_:os.system,_args_:[touch ran]}}'",  # of which one look leaves the call
    ],
)
def test_a_config_builds_sam2s_own_modules_and_calls_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = Path(candidates.__file__).parents[1] / "configs" / "sam2_pocket.yaml"
    (tmp_path / "mine.yaml").write_text(f"{shipped.read_text()}  extra: {asked}\n")
    refused = (
        r"SAM2 config .*asks to build .*which is no module of sam2\.modeling.*it was refused\. Start from"
    )
    with pytest.raises(ValueError, match=refused):
        load_predictor(str(tmp_path / "mine.yaml"), "random:0", 128)
    assert not (tmp_path / "ran").exists()


def test_every_config_of_the_sam2_package_is_one_of_sam2s_own_modules() -> None:
    import sam2

    configs = sorted(Path(str(sam2.__path__[0])).glob("configs/sam2*/sam2*_hiera_*.yaml"))
    configs = [config for config in configs if "training" not in str(config)]
    assert len(configs) == 8
    assert all(_read_config(str(config), 128) for config in configs)


def test_a_mask_that_promises_a_bomb_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    data = store.encode_mask(identity(40, 40))
    monkeypatch.setattr(decode, "MOST_PIXELS", 1000)
    with pytest.raises(ValueError, match="mask: has 40 x 40 pixels"):
        store.decode_mask(data)


# --- the cache


class Counting:
    """A segmenter that keeps the brighter half and remembers what it saw."""

    key, settings, sam2 = "counting", OtsuSettings(), None

    def __init__(self, fail_at: int | None = None) -> None:
        self.batches: list[int] = []
        self.fail_at = fail_at

    def segment(self, images: Sequence[np.ndarray]) -> list[Mask]:
        if len(self.batches) == self.fail_at:
            raise RuntimeError("the machine is switched off")
        self.batches.append(len(images))
        return [Mask(image[:, :, 0] > 127, 0.5, "chosen") for image in images]


SHA = hashlib.sha256(b"an image").hexdigest()


def write_images(folder: Path, count: int, size: int = 24) -> list[tuple[Record, Path]]:
    """Different images as PNG, labelled "even" and "odd" in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    images = []
    for i in range(count):
        path = folder / f"{i:04d}.png"
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (size, size + 5, 3), dtype=np.uint8)).save(
            path
        )
        sha = hashlib.sha256(path.read_bytes()).hexdigest()
        label = "odd" if i % 2 else "even"
        images.append((Record(path.name, sha, size + 5, size, "RGB", label, "train", ""), path))
    return images


@pytest.mark.parametrize("shape", [(1, 1), (7, 13), (64, 65)])
@pytest.mark.parametrize("status", ["chosen", "relaxed", "box", "identity"])
def test_a_mask_comes_back_from_the_store_as_it_went_in(
    tmp_path: Path, shape: tuple[int, int], status: str
) -> None:
    region = np.random.default_rng(0).random(shape) < 0.5
    kept = MaskStore(tmp_path)
    assert kept.get(SHA, "key") is None
    kept.put({SHA: Mask(region, 0.1 + 0.2, status)}, "key")
    mask = kept.get(SHA, "key")
    assert mask is not None
    assert np.array_equal(mask.region, region)
    assert mask.region.dtype == bool
    assert (mask.score, mask.status) == (0.1 + 0.2, status)
    assert kept.get(SHA, "another segmenter") is None
    assert kept.get(SHA[::-1], "key") is None


def test_a_mask_is_an_image_in_a_zip_named_by_its_images_sha256(tmp_path: Path) -> None:
    MaskStore(tmp_path).put({SHA: identity(5, 6)}, "key")
    (path,) = tmp_path.rglob("*.zip")
    with zipfile.ZipFile(path) as shard, Image.open(shard.open(f"{SHA}.png")) as image:
        assert (image.mode, image.size, image.info["status"]) == ("1", (6, 5), "identity")


def test_a_damaged_mask_is_made_again_and_the_others_are_not(tmp_path: Path) -> None:
    images = write_images(tmp_path / "in", 6)
    kept = MaskStore(tmp_path / "cache")
    cache_masks(images, Counting(), kept, batch_size=2)
    (path,) = (tmp_path / "cache").rglob("*.zip")
    data = path.read_bytes()
    at = data.index(b"IHDR", data.index(f"{images[3][0].sha256}.png".encode())) + 9
    path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    for one in (kept, MaskStore(tmp_path / "cache")):
        assert cache_masks(images, Counting(), one, batch_size=2).computed == (1 if one is kept else 0)
    publish([record for record, _ in images], kept, "counting", tmp_path / "masks")
    masks = PublishedMasks(tmp_path / "masks")
    for record, image in images:
        assert np.array_equal(masks[record.sha256], decode.read(image)[:, :, 0] > 127)


def test_masks_are_computed_once_and_only_what_is_missing(tmp_path: Path) -> None:
    images = write_images(tmp_path / "in", 10)
    kept, segmenter, finished = MaskStore(tmp_path / "cache"), Counting(), []
    assert cache_masks(images[:6], segmenter, kept, batch_size=4) == store.Cached(6, 0)
    assert cache_masks(images, segmenter, kept, batch_size=4, progress=finished.append) == store.Cached(4, 6)
    assert cache_masks(images, segmenter, kept, batch_size=4) == store.Cached(0, 10)
    assert sum(finished) == 10
    for record, path in images:
        mask = kept.get(record.sha256, segmenter.key)
        assert mask is not None
        assert np.array_equal(mask.region, decode.read(path)[:, :, 0] > 127)


def test_the_segmenter_always_gets_whole_batches(tmp_path: Path) -> None:
    segmenter = Counting()
    cache_masks(write_images(tmp_path / "in", 6), segmenter, MaskStore(tmp_path / "c"), batch_size=4)
    assert segmenter.batches == [4, 4]


def test_identical_bytes_are_segmented_once(tmp_path: Path) -> None:
    images = write_images(tmp_path / "in", 1)
    record, path = images[0]
    copies = [(replace(record, path=f"copy{i}.png"), path) for i in range(9)]
    done = cache_masks(images + copies, Counting(), MaskStore(tmp_path / "c"), batch_size=2)
    assert done == store.Cached(computed=1, reused=9)


def test_images_are_decoded_at_most_two_batches_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = 0
    read = decode.decode

    def counted(data: bytes, name: str) -> np.ndarray:
        nonlocal decoded
        decoded += 1
        return read(data, name)

    monkeypatch.setattr(decode, "decode", counted)

    class Watching(Counting):
        ahead = 0

        def segment(self, images: Sequence[np.ndarray]) -> list[Mask]:
            time.sleep(0.01)  # time to decode too much
            self.ahead = max(self.ahead, decoded - sum(self.batches))
            return super().segment(images)

    segmenter = Watching()
    cache_masks(write_images(tmp_path / "in", 40), segmenter, MaskStore(tmp_path / "c"), batch_size=4)
    assert 4 < segmenter.ahead <= 8


def test_a_failure_keeps_what_was_finished_and_a_second_run_does_the_rest(tmp_path: Path) -> None:
    images = write_images(tmp_path / "in", 12)
    kept = MaskStore(tmp_path / "cache")
    with pytest.raises(RuntimeError, match="switched off"):
        cache_masks(images, Counting(fail_at=2), kept, batch_size=3)
    segmenter = Counting()
    assert cache_masks(images, segmenter, kept, batch_size=3) == store.Cached(computed=6, reused=6)


KILLED = """
import sys, time
from pathlib import Path
import numpy as np
from medfocus.masks.segmenter import Mask
from medfocus.masks.store import MaskStore, cache_masks
from medfocus.datasets.records import read_manifest

class Slow:
    key = "slow"
    def segment(self, images):
        time.sleep(0.3)
        with open(sys.argv[2], "a") as log:
            log.write("%d\\n" % len(images))
        return [Mask(image[:, :, 0] > 127, 0.5, "chosen") for image in images]

folder = Path(sys.argv[1])
images = ((record, folder / record.path) for record in read_manifest(folder / "manifest.csv"))
done = cache_masks(images, Slow(), MaskStore(folder / "cache"), batch_size=2)
print(done.computed, done.reused)
"""


def test_a_killed_and_restarted_run_neither_loses_nor_repeats_a_finished_mask(tmp_path: Path) -> None:
    from medfocus.datasets.records import write_manifest

    images = write_images(tmp_path, 60)
    write_manifest([record for record, _ in images], tmp_path / "manifest.csv")
    log = tmp_path / "log"
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(log)]
    environment = {**os.environ, "PYTHONPATH": str(Path(candidates.__file__).parents[2])}
    first = subprocess.Popen(command, env=environment)
    deadline = time.monotonic() + 60
    while not (log.exists() and len(log.read_text().split()) >= 7):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.wait()
    kept = MaskStore(tmp_path / "cache")
    survived = len(dict(kept.encoded((record.sha256 for record, _ in images), "slow")))
    segmented = sum(map(int, log.read_text().split()))
    assert 6 <= survived <= 40
    assert segmented - survived <= 2 * 3  # the batch in work, and those of half a second
    second = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert second.stdout.split() == [str(60 - survived), str(survived)]


def test_an_image_that_changed_after_the_manifest_is_refused(tmp_path: Path) -> None:
    ((record, path),) = write_images(tmp_path, 1)
    Image.new("RGB", (4, 4)).save(path)
    with pytest.raises(ValueError, match=r"0000.png: its bytes are not the manifest's \(sha256 differs\)"):
        cache_masks([(record, path)], Counting(), MaskStore(tmp_path / "c"), batch_size=1)


def test_a_segmenter_that_changes_the_size_is_refused(tmp_path: Path) -> None:
    class Careless(Counting):
        def segment(self, images: Sequence[np.ndarray]) -> list[Mask]:
            return [identity(3, 3) for _ in images]

    with pytest.raises(
        ValueError, match=r"0000.png: the segmenter gave a mask of \(3, 3\) for an image of \(24"
    ):
        cache_masks(write_images(tmp_path, 1), Careless(), MaskStore(tmp_path / "c"), batch_size=1)


def test_real_segmenters_fit_the_cache(tmp_path: Path, pocket: Callable[..., Sam2Segmenter]) -> None:
    images = write_images(tmp_path / "in", 5)
    segmenters: list[Segmenter] = [OtsuSegmenter(), pocket(batch_size=2)]
    for segmenter in segmenters:
        done = cache_masks(images, segmenter, MaskStore(tmp_path / "cache"), batch_size=2)
        assert done == store.Cached(5, 0)


# --- the published view


def published(tmp_path: Path, images: Sequence[tuple[Record, Path]], name: str = "masks") -> Path:
    kept = MaskStore(tmp_path / "cache")
    cache_masks(images, Counting(), kept, batch_size=4)
    publish([record for record, _ in images], kept, "counting", tmp_path / "data" / name)
    return tmp_path / "data" / name


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_published_masks_are_those_of_the_manifest_and_no_others(tmp_path: Path) -> None:
    images = write_images(tmp_path / "in", 8)
    published(tmp_path, images)
    masks = PublishedMasks(published(tmp_path, images[:3]))
    assert set(masks.status) == {record.path for record, _ in images[:3]}
    for record, path in images[:3]:
        assert np.array_equal(masks[record.sha256], decode.read(path)[:, :, 0] > 127)
    with pytest.raises(KeyError, match="no mask of an image with sha256"):
        masks[images[5][0].sha256]
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["masks"]


def test_the_same_masks_are_published_as_the_same_bytes(tmp_path: Path) -> None:
    images = write_images(tmp_path / "in", 8)
    first = contents(published(tmp_path, images, "first"))
    second = contents(published(tmp_path, images[::-1], "second"))
    assert first == second
    assert set(first) == {"masks.zip", "mask_status.csv"}


def test_shards_stay_small_and_a_new_image_changes_only_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "SHARD_SIZE", 5)
    images = write_images(tmp_path / "in", 33)
    before = contents(published(tmp_path, images[:-1], "before"))
    folder = published(tmp_path, images, "after")
    after = contents(folder)
    shards = [name for name in after if name.endswith(".zip")]
    assert len(shards) > 5
    changed = [name for name in shards if before.get(name) != after[name]]
    assert len(changed) == 1
    masks = PublishedMasks(folder)
    for record, path in images:
        assert np.array_equal(masks[record.sha256], decode.read(path)[:, :, 0] > 127)


def test_a_shard_is_a_plain_zip_of_images(tmp_path: Path) -> None:
    images = write_images(tmp_path / "in", 3)
    with zipfile.ZipFile(published(tmp_path, images) / "masks.zip") as shard:
        assert shard.testzip() is None
        assert shard.namelist() == sorted(f"{record.sha256}.png" for record, _ in images)


def test_mask_status_says_every_images_rung_score_and_coverage(tmp_path: Path) -> None:
    images = write_images(tmp_path / "in", 2)
    with (published(tmp_path, images) / "mask_status.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    coverage = (decode.read(images[0][1])[:, :, 0] > 127).mean()
    assert rows[0] == {
        "path": "0000.png",
        "label": "even",
        "status": "chosen",
        "score": "0.500000",
        "coverage": f"{coverage:.6f}",
    }


def test_a_fallback_that_goes_with_a_class_shows_in_the_summary(tmp_path: Path) -> None:
    images = write_images(tmp_path / "in", 8)
    kept = MaskStore(tmp_path / "cache")
    for record, _ in images:
        fails = record.label == "odd"
        mask = identity(24, 29) if fails else Mask(np.arange(24 * 29).reshape(24, 29) % 4 == 0, 0.8, "chosen")
        kept.put({record.sha256: mask}, "key")
    publish([record for record, _ in images], kept, "key", tmp_path / "masks")
    even, odd = PublishedMasks(tmp_path / "masks").summary()
    assert even == {
        "label": "even", "images": 4, "coverage": pytest.approx(0.25), "score": pytest.approx(0.8),
        "chosen": 1.0, "relaxed": 0.0, "box": 0.0, "identity": 0.0,
    }  # fmt: skip
    assert (odd["identity"], odd["chosen"], odd["coverage"], odd["score"]) == (1.0, 0.0, 1.0, 0.0)


def test_a_failed_publication_leaves_the_old_one_in_place(tmp_path: Path) -> None:
    images = write_images(tmp_path / "in", 4)
    before = contents(published(tmp_path, images[:2]))
    kept = MaskStore(tmp_path / "cache")
    message = r"0002.png: the cache .* lacks its mask by this segmenter, and those of 1 more. Run cache_masks"
    with pytest.raises(ValueError, match=message):
        publish([record for record, _ in images], kept, "counting", tmp_path / "data" / "masks")
    assert contents(tmp_path / "data" / "masks") == before
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["masks"]


def test_a_folder_without_published_masks_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no mask_status.csv in it; run the masks stage"):
        PublishedMasks(tmp_path)


def test_keeping_masks_needs_no_torch() -> None:
    modules = "medfocus.masks.store, medfocus.masks.otsu, medfocus.focus.modes"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(Path(candidates.__file__).parents[2])}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0
