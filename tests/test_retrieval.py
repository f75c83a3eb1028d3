"""Claims about the retrieval of masks among SAM2's proposals by a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from flows.study import models
from flows.study.params import DatasetParams, load_params
from flows.study.study import Study
from medfocus.clip.build import build_clip
from medfocus.datasets.records import Record, write_manifest
from medfocus.images.geometry import Frame
from medfocus.masks.candidates import Limits
from medfocus.masks.sam2.retrieval import (
    RetrievalSegmenter,
    TextRank,
    crop,
    distinct,
    retrieve,
)
from medfocus.masks.sam2.segmenter import PointPrompts, Sam2Segmenter, load_sam2
from medfocus.masks.settings import Sam2Settings

ROOT = Path(__file__).resolve().parents[1]
LIMITS = Limits(min_area=0.01, max_area=0.70, min_iou=0.7, min_stability=0.85)


def disc(y: float, x: float, radius: float, size: int = 32) -> np.ndarray:
    """Return a disc (size, size) bool; centre and radius are shares of the side."""
    rows, columns = (np.mgrid[:size, :size] + 0.5) / size
    return np.hypot(rows - y, columns - x) < radius


LEFT, RIGHT, SMALL = disc(0.5, 0.28, 0.18), disc(0.5, 0.72, 0.18), disc(0.15, 0.5, 0.1)


def painted() -> np.ndarray:
    """Draw an image (64, 64, 3) uint8 with a left, right and small disc of brightness 60, 120 and 240."""
    image = np.full((64, 64, 3), 10, dtype=np.uint8)
    for region, tone in ((LEFT, 60), (RIGHT, 120), (SMALL, 240)):
        image[region.repeat(2, 0).repeat(2, 1)] = tone
    return image


class Tone:
    """Ranks crops by the distance of their brightest pixel to a tone, and records them."""

    def __init__(self, tone: int) -> None:
        self.tone, self.key = tone, f"tone {tone}"
        self.shown: list[np.ndarray] = []

    def __call__(self, images: Sequence[np.ndarray]) -> np.ndarray:
        self.shown += images
        return np.array([-abs(int(image.max()) - self.tone) for image in images], dtype=float)


@pytest.fixture(scope="module")
def pocket() -> Sam2Segmenter:
    return load_sam2(Sam2Settings("pocket", "random:0", 128, "grid", points_per_side=2, min_iou=0.1))


def proposing(*regions: np.ndarray, iou: float = 0.9, keep: int = 1) -> Sam2Segmenter:
    """Build a segmenter with a scripted decoder that returns these regions for every prompt."""
    logits = np.where(np.stack(regions), 8.0, -8.0).astype(np.float32)
    scripted = load_sam2(Sam2Settings("pocket", "random:0", 128, "grid", points_per_side=2, keep=keep))

    def decode(features: object, index: int, prompts: PointPrompts) -> tuple[np.ndarray, np.ndarray]:
        return logits, np.full(len(logits), iou)

    scripted.decode = decode  # pyright: ignore[reportAttributeAccessIssue]
    return scripted


def agreement(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / (a | b).sum())


@pytest.mark.parametrize(("tone", "region"), [(60, LEFT), (120, RIGHT), (240, SMALL)])
def test_the_best_ranked_proposal_is_the_mask(tone: int, region: np.ndarray) -> None:
    rank = Tone(tone)
    (mask,) = RetrievalSegmenter(proposing(LEFT, RIGHT, SMALL), rank).segment([painted()])
    assert mask.status == "chosen"
    assert agreement(mask.region, region.repeat(2, 0).repeat(2, 1)) > 0.9
    assert len(rank.shown) == 3


def test_with_keep_two_the_best_two_proposals_are_united() -> None:
    segmenter = RetrievalSegmenter(proposing(LEFT, RIGHT, SMALL, keep=2), Tone(90))
    (mask,) = segmenter.segment([painted()])
    assert agreement(mask.region, (LEFT | RIGHT).repeat(2, 0).repeat(2, 1)) > 0.9


def test_the_fallback_ladder_is_that_of_sam2() -> None:
    nothing, flood = np.zeros_like(LEFT), np.ones_like(LEFT)
    for regions, iou, status in (
        ((LEFT, RIGHT), 0.3, "relaxed"),
        ((LEFT, flood), 0.9, "chosen"),
        ((nothing, flood), 0.9, "identity"),
    ):
        rank = Tone(10)  # the background: the flood would win if it were shown
        (mask,) = RetrievalSegmenter(proposing(*regions, iou=iou), rank).segment([painted()])
        assert mask.status == status
        assert all(shown.shape[0] < 64 for shown in rank.shown)
        assert (mask.score == 0) == (status == "identity")


def test_the_score_of_a_mask_is_that_of_sam2() -> None:
    plain = proposing(LEFT)
    (own,) = plain.segment([painted()])
    (retrieved,) = RetrievalSegmenter(plain, Tone(0)).segment([painted()])
    assert retrieved.score == pytest.approx(own.score)
    assert np.array_equal(retrieved.region, own.region)


def test_a_region_found_by_several_points_is_ranked_once() -> None:
    almost = disc(0.5, 0.29, 0.18)
    regions = np.stack([almost, LEFT, RIGHT, SMALL])
    indices, scores = distinct(regions, np.array([0.8, 0.9, 0.8, 0.75]), np.ones(4), LIMITS)
    assert sorted(indices) == [1, 2, 3]
    assert list(scores) == sorted(scores, reverse=True)


def test_overlapping_or_too_large_proposals_are_not_united() -> None:
    whole, part, far, large = disc(0.5, 0.3, 0.2), disc(0.5, 0.35, 0.1), SMALL, disc(0.6, 0.75, 0.24)
    regions = np.stack([whole, part, far, large])
    liking = np.array([4.0, 3.0, 1.0, 2.0])
    both = (whole | far).mean()
    assert retrieve(regions, liking, max_area=both + 0.01, keep=2, max_overlap=0.3) == [0, 2]
    assert retrieve(regions, liking, max_area=0.9, keep=3, max_overlap=0.3) == [0, 3, 2]
    assert retrieve(regions, np.array([np.nan, 1, 2, 0]), max_area=0.9, keep=1, max_overlap=0.3) == [2]


def test_a_crop_is_the_regions_box_with_black_outside_the_region() -> None:
    image = np.random.default_rng(0).integers(1, 255, (60, 80, 3), dtype=np.uint8)
    region = np.zeros((6, 8), dtype=bool)
    region[1:3, 2:5] = True
    region[1, 2] = False
    shown = crop(image, region)
    expected = image[10:30, 20:50].copy()
    expected[:10, :10] = 0
    assert np.array_equal(shown, expected)
    assert crop(image, np.zeros((6, 8), dtype=bool)) is image


def test_a_rank_with_a_missing_score_is_refused() -> None:
    class Lazy(Tone):
        def __call__(self, images: Sequence[np.ndarray]) -> np.ndarray:
            return np.zeros(1)

    with pytest.raises(
        ValueError, match=r"The rank returned scores of shape \(1,\) for 2 crops\. Return one"
    ):
        RetrievalSegmenter(proposing(LEFT, RIGHT), Lazy(0)).segment([painted()])


def test_retrieval_needs_the_strategy_grid() -> None:
    boxed = load_sam2(Sam2Settings("pocket", "random:0", 128, "box"))
    with pytest.raises(ValueError, match="needs SAM2 with the strategy 'grid', not 'box'"):
        RetrievalSegmenter(boxed, Tone(0))


def test_rank_and_proposals_change_the_key_but_not_the_features_key(pocket: Sam2Segmenter) -> None:
    other = load_sam2(Sam2Settings("pocket", "random:0", 128, "grid", points_per_side=3, min_iou=0.1))
    made = [RetrievalSegmenter(p, Tone(t)) for p, t in ((pocket, 1), (pocket, 2), (other, 1), (pocket, 1))]
    keys = [segmenter.key for segmenter in made]
    assert len({*keys, pocket.key, other.key}) == 5
    assert keys[0] == keys[3]
    assert {segmenter.sam2.features_key for segmenter in made} == {pocket.features_key}


class Halves:
    """A CLIP of two dimensions, the brightness and darkness of an image, with texts "bright" and "dark"."""

    key = "halves"
    frame = Frame(8)

    def preprocess(self, views: np.ndarray) -> Tensor:
        assert views.shape[1:] == (8, 8, 3)
        return torch.from_numpy(views).permute(0, 3, 1, 2).float() / 255

    def encode_images(self, pixels: Tensor) -> Tensor:
        bright = pixels.amax((1, 2, 3))
        return torch.nn.functional.normalize(torch.stack([bright, 1 - bright], 1), dim=1)

    def encode_texts(self, texts: list[str]) -> Tensor:
        return torch.tensor([[1.0, 0.0] if text == "bright" else [0.0, 1.0] for text in texts])


def test_a_text_retrieves_the_crop_that_it_describes() -> None:
    for text, region in (("bright", SMALL), ("dark", LEFT)):
        segmenter = RetrievalSegmenter(proposing(LEFT, RIGHT, SMALL), TextRank.of(Halves(), [text]))
        (mask,) = segmenter.segment([painted()])
        assert agreement(mask.region, region.repeat(2, 0).repeat(2, 1)) > 0.9


def test_several_texts_rank_by_their_mean() -> None:
    crops = [np.full((4, 6, 3), tone, dtype=np.uint8) for tone in (0, 128, 255)]
    scores = TextRank.of(Halves(), ["bright", "dark"])(crops)
    assert scores.argmax() == 1
    assert scores[0] == pytest.approx(0.5**0.5, abs=1e-5)
    assert TextRank.of(Halves(), ["bright"]).key != TextRank.of(Halves(), ["dark"]).key
    with pytest.raises(ValueError, match=r"No text to rank proposals by\. Give at least one"):
        TextRank.of(Halves(), [])


def study(folder: Path, anatomy: dict[str, list[str]], **described: object) -> Study:
    """Build a study of one ultrasound data set with the strategy "retrieved"."""
    content = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    content["masks"] |= {"segmenter": "sam2", "strategy": "retrieved", "anatomy": anatomy}
    (folder / "params.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    params = load_params(folder / "params.yaml")
    dataset = replace(params.datasets["phantom-breast"], **described)  # pyright: ignore[reportArgumentType]
    assert isinstance(dataset, DatasetParams)
    return Study(folder, folder, replace(params, datasets={"scans": dataset}))


@pytest.mark.parametrize("text", ["malignant", "Malignant", "a malignant mass", "Solid_Tumour, seen here"])
def test_a_text_that_names_a_class_is_refused(tmp_path: Path, text: str) -> None:
    named = study(tmp_path, {"breast_ultrasound": ["a lesion", text]}, names={"malignant": "solid tumour"})
    with pytest.raises(
        ValueError, match=r"masks\.anatomy\.breast_ultrasound has the text .* names the class"
    ):
        models.build_segmenter(named, "scans")


def test_a_text_that_names_a_class_of_the_manifest_is_refused(tmp_path: Path) -> None:
    record = Record("cyst/1.png", "0" * 64, 4, 4, "L", "simple_cyst", "train", "")
    (tmp_path / "data" / "manifests").mkdir(parents=True)
    write_manifest([record], tmp_path / "data" / "manifests" / "scans.csv")
    with pytest.raises(ValueError, match="has the text 'a simple cyst', which names the class 'simple_cyst'"):
        models.build_segmenter(study(tmp_path, {"breast_ultrasound": ["a simple cyst"]}), "scans")
    assert models.anatomy_texts(study(tmp_path, {"breast_ultrasound": ["a cyst"]}), "scans") == ("a cyst",)


def test_a_modality_without_a_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"masks\.anatomy has no text for breast_ultrasound, the modality of"
    ):
        models.build_segmenter(study(tmp_path, {"chest_xray": ["the lungs"]}), "scans")


def test_a_study_ranks_with_its_clip(tmp_path: Path) -> None:
    named = study(tmp_path, {"breast_ultrasound": ["a lesion"]})
    segmenter = models.build_segmenter(named, "scans")
    assert isinstance(segmenter, RetrievalSegmenter)
    clip = build_clip("pocket", "pocket")
    assert segmenter.rank.key == TextRank.of(clip, ["a lesion"]).key
    assert segmenter.sam2.features_key == models.build_sam2(named, "scans").features_key
    (mask,) = segmenter.segment([painted()])
    assert mask.region.shape == (64, 64)
    assert mask.status in ("chosen", "relaxed")
