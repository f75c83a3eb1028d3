"""Claims about SAM2 with adapters trained on known regions."""

from __future__ import annotations

import csv
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from scipy.special import erf
from torch import Tensor

from flows.stages import masks as stage
from flows.study import models
from flows.study.study import find_home, here
from medfocus.datasets.records import Record, write_manifest
from medfocus.datasets.splits import Splits, write_splits
from medfocus.masks.published import PublishedMasks
from medfocus.masks.quality import iou, known_region
from medfocus.masks.sam2 import adapter
from medfocus.masks.sam2.adapter import (
    AdapterSegmenter,
    EncoderAdapters,
    high_frequencies,
    outline_loss,
    segment_pixels,
    train_adapter,
    with_adapters,
)
from medfocus.masks.sam2.model import load_predictor
from medfocus.masks.sam2.segmenter import Sam2Segmenter, load_sam2
from medfocus.masks.settings import Sam2Settings
from tests.segmenters import hiera

ROOT = Path(__file__).resolve().parents[1]
TEACHING: dict[str, Any] = {"batch_size": 4, "lr": 1e-3, "weight_decay": 0.01, "reduction": 4, "seed": 0}
INNER = [8, 4, 6, 10, 20, 28, 48]  # of the seven stages of the pocket's trunk


@pytest.fixture(scope="module")
def plain() -> Sam2Segmenter:
    return load_sam2(Sam2Settings("pocket", "pocket", 128, "box"), batch_size=4)


@pytest.fixture(scope="module")
def state(plain: Sam2Segmenter) -> dict[str, Tensor]:
    """The state after 30 training steps with the dark disc of two discs as region."""
    return train_adapter([two_discs(i) for i in range(16)], plain, steps=30, **TEACHING)


def two_discs(seed: int, size: int = 96) -> tuple[np.ndarray, np.ndarray]:
    """Draw a bright and a dark disc on noise (size, size, 3) uint8; the region is the dark disc."""
    rng = np.random.default_rng(seed)
    rows, columns = (np.mgrid[:size, :size] + 0.5) / size
    side = rng.permutation([0.27, 0.73])
    bright = np.hypot(rows - rng.uniform(0.3, 0.7), columns - side[0]) < rng.uniform(0.14, 0.2)
    dark = np.hypot(rows - rng.uniform(0.3, 0.7), columns - side[1]) < rng.uniform(0.14, 0.2)
    image = 110 + 90 * bright - 70 * dark + rng.normal(0, 8, (size, size))
    return image.clip(0, 255).astype(np.uint8)[:, :, None].repeat(3, 2), dark


def untrained(plain: Sam2Segmenter) -> dict[str, Tensor]:
    model = with_adapters(plain.model, INNER)
    parts = {"adapters": model.image_encoder.trunk.adapters, "decoder": model.sam_mask_decoder}
    return {f"{part}.{k}": v for part, module in parts.items() for k, v in module.state_dict().items()}


def mean_iou(segmenter: AdapterSegmenter) -> float:
    pairs = [two_discs(seed) for seed in range(100, 112)]
    masks = segmenter.segment([image for image, _ in pairs])
    return float(np.mean([iou(mask.region, region) for mask, (_, region) in zip(masks, pairs, strict=True)]))


# --- the adapters


@pytest.fixture(params=["convolutional", "Hiera"])
def encoder(request: pytest.FixtureRequest, plain: Sam2Segmenter, tmp_path: Path) -> tuple[Any, list[int]]:
    """A SAM2 with each kind of trunk, and the channels of its adapters."""
    if request.param == "convolutional":
        return plain.model, INNER
    return load_predictor(hiera(tmp_path), "random:0", 128)[0].model, [8, 16, 32]


def test_untrained_adapters_leave_the_encoder_unchanged(encoder: tuple[Any, list[int]]) -> None:
    plain, inner = encoder
    pixels = torch.randn(2, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    model = with_adapters(plain, inner)
    with torch.no_grad():
        expected = plain.forward_image(pixels)["backbone_fpn"]
        found = model.forward_image(pixels)["backbone_fpn"]
        assert len(found) == 3
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        model.image_encoder.trunk.adapters.up[2].bias.fill_(0.1)
        assert not torch.equal(model.forward_image(pixels)["backbone_fpn"][2], expected[2])


def test_only_adapters_and_mask_decoder_have_gradients(encoder: tuple[Any, list[int]]) -> None:
    plain, inner = encoder
    model = with_adapters(plain, inner)
    with torch.no_grad():
        for up in model.image_encoder.trunk.adapters.up:
            up.weight.fill_(0.01)  # at 0 nothing behind it would have one yet
    logits, predicted = segment_pixels(model, torch.randn(2, 3, 128, 128))
    outline_loss(logits, predicted, torch.rand(2, 128, 128)).backward()
    touched = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    allowed = ("image_encoder.trunk.adapters.", "sam_mask_decoder.")
    assert all(name.startswith(allowed) for name in touched)
    owed = {n for n, _ in model.named_parameters() if n.startswith("image_encoder.trunk.adapters.")}
    assert owed <= touched
    assert {p.requires_grad for p in plain.parameters()} == {False}


def test_a_prompt_is_mlp_up_of_gelu_of_the_blocks_mlp() -> None:
    torch.manual_seed(0)
    adapters = EncoderAdapters([(4, 4), (4, 4), (8, 8)], [2, 3])
    for up in adapters.up:
        torch.nn.init.normal_(up.weight)  # pyright: ignore[reportArgumentType]
    weights = {name: value.numpy().astype(np.float64) for name, value in adapters.state_dict().items()}
    for block, stage_, width in ((0, 0, 2), (1, 0, 2), (2, 1, 3)):
        features = torch.randn(1, 5, 5, width)
        hidden = features.numpy() @ weights[f"tune.{block}.weight"].T + weights[f"tune.{block}.bias"]
        hidden = hidden * (1 + erf(hidden / 2**0.5)) / 2
        expected = hidden @ weights[f"up.{stage_}.weight"].T + weights[f"up.{stage_}.bias"]
        assert np.allclose(adapters.prompt(block, features).detach().numpy(), expected, atol=1e-5)


def test_the_pyramid_has_the_resolutions_of_the_stages() -> None:
    inputs = [(32, 4), (32, 4), (64, 8), (96, 8), (128, 16)]
    levels = EncoderAdapters(inputs, [8, 16, 9, 32]).pyramid(torch.randn(2, 3, 96, 96))
    sizes = [(2, 24, 24, 8), (2, 12, 12, 16), (2, 12, 12, 9), (2, 6, 6, 32)]
    assert [tuple(level.shape) for level in levels] == sizes


def test_high_frequencies_equal_those_of_numpy() -> None:
    plane = np.random.default_rng(0).normal(size=(32, 48))
    rows, columns = np.fft.fftfreq(32, 1 / 32), np.fft.fftfreq(48, 1 / 48)
    half = int((32 * 48 / 4) ** 0.5 // 2)
    low = np.outer((rows >= -half) & (rows < half), (columns >= -half) & (columns < half))
    expected = np.abs(np.fft.ifft2(np.fft.fft2(plane) * ~low).real)
    found = high_frequencies(torch.from_numpy(plane)[None, None])[0, 0].numpy()
    assert np.allclose(found, expected)
    assert np.allclose(high_frequencies(torch.ones(1, 3, 32, 32)).numpy(), 0, atol=1e-6)


# --- teaching


def test_training_on_discs_raises_the_iou(plain: Sam2Segmenter, state: dict[str, Tensor]) -> None:
    before, after = (mean_iou(AdapterSegmenter(plain, taught)) for taught in (untrained(plain), state))
    assert after > before + 0.05
    assert after > 0.85


def test_training_leaves_sam2_unchanged_and_is_repeatable(plain: Sam2Segmenter) -> None:
    before = {name: value.clone() for name, value in plain.model.state_dict().items()}
    pairs, seen = [two_discs(i) for i in range(3)], list[int]()
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    first = train_adapter(pairs, plain, steps=2, progress=seen.append, **TEACHING)
    assert torch.equal(torch.rand(2), expected)  # the caller's generator is left alone
    second = train_adapter(pairs, plain, steps=2, **TEACHING)
    other = train_adapter(pairs, plain, steps=2, **{**TEACHING, "seed": 1})
    assert seen == [1, 1]
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    assert all(torch.equal(value, before[name]) for name, value in plain.model.state_dict().items())


def test_unusable_training_data_and_settings_are_refused(plain: Sam2Segmenter) -> None:
    image, region = two_discs(0)
    for pairs, settings, message in (
        ([], {}, "adapter: no image has a known region. Put some under masks/"),
        ([(image, region & False)], {}, r"of an image of \(96, 96\) is empty\. .* blank masks can reveal"),
        ([(image, region[:5])], {}, r"region of an image of \(96, 96\) has shape \(5, 96\)\. Use regions"),
        ([(image, region)], {"lr": 0, "steps": 0}, "adapter: steps is 0, lr is 0; use numbers above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            train_adapter(pairs, plain, **{"steps": 1, **TEACHING, **settings})


# --- the segmenter


def test_every_image_gets_one_sound_mask(plain: Sam2Segmenter, state: dict[str, Tensor]) -> None:
    rng = np.random.default_rng(0)
    shapes = [(8, 8), (1, 1), (200, 20), (33, 47), (64, 64)]
    images = [rng.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in shapes]
    images.append(np.full((50, 40, 3), 90, dtype=np.uint8))
    masks = AdapterSegmenter(plain, state).segment(images)
    for mask, image in zip(masks, images, strict=True):
        assert mask.region.shape == image.shape[:2]
        assert mask.region.any()
        assert (mask.status == "identity") == (mask.score == 0)


def test_a_mask_does_not_depend_on_other_images_of_the_batch(
    plain: Sam2Segmenter, state: dict[str, Tensor]
) -> None:
    images = [two_discs(seed)[0] for seed in range(5)]
    segmenter = AdapterSegmenter(plain, state)
    for a, b in zip(segmenter.segment(images), segmenter.segment(images[::-1])[::-1], strict=True):
        assert (a.region != b.region).mean() < 0.001


def test_the_ladder_falls_back_to_the_box_of_plain_sam2(
    plain: Sam2Segmenter, state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    segmenter, (image, dark) = AdapterSegmenter(plain, state), two_discs(0, 128)
    small = torch.from_numpy(dark[2::4, 2::4].copy())

    def answering(logits: Tensor, quality: float) -> str:
        def scripted(model: object, pixels: Tensor) -> tuple[Tensor, Tensor]:
            return logits.expand(len(pixels), -1, -1), torch.full((len(pixels),), quality)

        monkeypatch.setattr(adapter, "segment_pixels", scripted)
        (mask,) = segmenter.segment([image])
        if mask.status in ("chosen", "relaxed"):
            assert iou(mask.region, dark) > 0.9
        return mask.status

    good = torch.where(small, 8.0, -8.0)
    assert answering(good, 0.9) == "chosen"
    assert answering(good, 0.3) == "relaxed"
    (boxed,) = load_sam2(Sam2Settings("pocket", "pocket", 128, "box")).segment([image])
    for bad in (torch.full_like(good, -8.0), torch.full_like(good, 8.0), good * float("nan")):
        expected = "identity" if boxed.status == "identity" else "box"
        assert answering(bad, 0.9) == expected


def test_the_trained_weights_change_the_key_but_not_the_features_key(
    plain: Sam2Segmenter, state: dict[str, Tensor]
) -> None:
    nudged = {**state, "adapters.up.0.bias": state["adapters.up.0.bias"] + 1e-3}
    stricter = load_sam2(Sam2Settings("pocket", "pocket", 128, "box", min_area=0.05))
    made = [AdapterSegmenter(p, s) for p, s in ((plain, state), (plain, nudged), (stricter, state))]
    assert len({plain.key, *(segmenter.key for segmenter in made)}) == 4
    assert AdapterSegmenter(plain, dict(state)).key == made[0].key
    assert {segmenter.sam2.features_key for segmenter in made} == {plain.features_key}
    assert all(torch.equal(made[0].state[name], value) for name, value in state.items())


def test_a_state_of_another_sam2_is_refused(plain: Sam2Segmenter, state: dict[str, Tensor]) -> None:
    half = {name: value for name, value in state.items() if not name.startswith("decoder.iou")}
    with pytest.raises(
        ValueError, match=r"The adapter's \d+ tensors belong to another SAM2 \(.*Run the masks"
    ):
        AdapterSegmenter(plain, half)
    narrow = {name: value for name, value in state.items() if not name.startswith("adapters.up.2")}
    with pytest.raises(ValueError, match="tensors belong to another SAM2"):
        AdapterSegmenter(plain, narrow)


# --- the stage


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A study of six training images, two without and one with a blank region, and three test images."""
    records = []
    for i in range(9):
        split, label = ("test", "a") if i >= 6 else ("train", "b" if i < 3 else "a")
        path = tmp_path / "scans" / label / f"{i}.png"
        truth = tmp_path / "scans" / "masks" / label / f"{i}.png"
        for place in (path, truth):
            place.parent.mkdir(parents=True, exist_ok=True)
        image, region = two_discs(i, 64)
        Image.fromarray(image).save(path)
        if i not in (0, 1):
            Image.fromarray(region & (i != 2)).save(truth)
        sha = hashlib.sha256(path.read_bytes()).hexdigest()
        records.append(Record(f"{label}/{i}.png", sha, 64, 64, "RGB", label, split, ""))
    paths = {s: [r.path for r in records if r.split == s] for s in ("train", "test")}
    splits = Splits(["a", "b"], sorted(paths["train"]), paths["test"], paths["test"], [], [], [], {}, {})
    for name in (".dvc", "data/manifests", "data/splits"):
        (tmp_path / name).mkdir(parents=True)
    write_manifest(records, tmp_path / "data/manifests/scans.csv")
    write_splits(splits, tmp_path / "data/splits/scans.json")
    content = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    content["datasets"] = {"scans": content["datasets"]["phantom-breast"] | {"root": "scans"}}
    content["masks"] |= {
        "segmenter": "sam2", "config": "pocket", "checkpoint": "pocket", "image_size": 128,
        "strategy": "adapter", "adapter": {"steps": 2, **TEACHING}, "batch_size": 4,
    }  # fmt: skip
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert find_home(tmp_path) == tmp_path
    return tmp_path


def test_the_stage_trains_on_training_images_with_a_region_and_segments_all_images(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    trained: list[int] = []

    def watched(root: Path, path: str, height: int, width: int) -> np.ndarray | None:
        opened.append(path)
        return known_region(root, path, height, width)

    def train(pairs: stage.AdapterExamples, *arguments: Any, **settings: Any) -> dict[str, Tensor]:
        trained.append(len(pairs))
        state = train_adapter(pairs, *arguments, **settings)
        assert set(opened) <= {f"b/{i}.png" for i in range(3)} | {f"a/{i}.png" for i in range(3, 6)}
        return state

    monkeypatch.setattr(stage, "known_region", watched)
    monkeypatch.setattr(adapter, "train_adapter", train)
    stage.main(["--dataset", "scans"])
    assert trained == [3]
    masks = PublishedMasks(folder / "data/masks/scans")
    assert len(masks.status) == 9
    with (folder / "reports/data/scans/masks.csv").open(newline="") as file:
        regions = {row["label"]: row["regions"] for row in csv.DictReader(file)}
    assert regions == {"a": "3", "b": "0"}  # measured on images outside the training set

    again = models.build_segmenter(here(), "scans")
    (mask,) = again.segment([np.asarray(Image.open(folder / "scans/a/7.png"))])
    assert iou(mask.region, masks[hashlib.sha256((folder / "scans/a/7.png").read_bytes()).hexdigest()]) > 0.99
    published = here().paths.adapter("scans").read_bytes()
    stage.main(["--dataset", "scans"])
    assert trained == [3]  # from the cache
    assert here().paths.adapter("scans").read_bytes() == published
    assert models.build_segmenter(here(), "scans").key == again.key


def test_without_a_trained_adapter_the_error_names_the_stage(folder: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"adapter.safetensors: there is no adapter\. Run the masks stage"
    ):
        models.build_segmenter(here(), "scans")
