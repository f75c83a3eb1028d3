"""Claims about the training of the pocket models and about the packaged weights."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from medfocus import phantoms
from medfocus.clip.build import build_clip
from medfocus.masks.quality import iou
from medfocus.masks.sam2.model import load_predictor
from medfocus.masks.sam2.segmenter import PointPrompts, Sam2Segmenter, load_sam2
from medfocus.masks.settings import Sam2Settings
from medfocus.pocket import clip, loop, measure, pool, sam2
from medfocus.storage import weights

DATA = Path(measure.__file__).parents[1] / "data"
SAM2, CLIP = DATA / "sam2_pocket.safetensors", DATA / "clip_pocket.safetensors"
FEW = 6  # images per class
SLACK = 0.12  # the noise of a few images
RECIPE = pool.RECIPES["sam2"]
TURN = len(pool.classes(RECIPE))


@pytest.fixture(scope="module")
def packaged() -> Sam2Segmenter:
    return load_sam2(Sam2Settings("pocket", "pocket", 128, "grid", points_per_side=8), batch_size=16)


@pytest.fixture(scope="module")
def drawn_pool(tmp_path_factory: pytest.TempPathFactory) -> pool.Pool:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool, "SHARD", TURN)
        folder = tmp_path_factory.mktemp("pool") / "0"
        folder.mkdir()
        pool._draw_shard((folder, RECIPE, 0, 0))
    return pool.Pool(folder, TURN)  # one turn


@pytest.fixture(scope="module")
def batch(drawn_pool: pool.Pool) -> sam2.Batch:
    return sam2.Batches(drawn_pool, 0, TURN)[0]


def test_the_name_pocket_loads_the_packaged_weights() -> None:
    assert load_predictor("pocket", "pocket", 128)[1] == load_predictor("pocket", str(SAM2), 128)[1]
    assert load_predictor("pocket", "random:0", 128)[1] != load_predictor("pocket", "pocket", 128)[1]
    assert build_clip("pocket", "pocket").key == build_clip("pocket", str(CLIP)).key
    assert build_clip("pocket", "random:0").key != build_clip("pocket", "pocket").key


def test_the_packaged_weights_are_small_float16_and_trained_on_phantoms() -> None:
    assert SAM2.stat().st_size + CLIP.stat().st_size < 16e6
    for file in (SAM2, CLIP):
        assert {v.dtype for v in weights.load(file).values()} == {torch.float16}
        with safe_open(file, "pt") as opened:
            assert opened.metadata()["data"] == "phantoms, generator seed 1000000, name 'pocket'"
    parts = {name.partition(".")[0] for name in weights.load(SAM2)}
    assert parts == {"image_encoder", "sam_prompt_encoder", "sam_mask_decoder", "no_mem_embed"}


def test_the_pocket_sam2_fits_only_its_configuration() -> None:
    with pytest.raises(ValueError, match=r"SAM2 checkpoint pocket does not fit the config 'sam2.1_hiera_t'"):
        load_predictor("sam2.1_hiera_t", "pocket", None)


def test_open_clip_loads_the_pocket_clip() -> None:
    build_clip("pocket", "pocket")  # registers the configuration
    bare: Any = open_clip.create_model("clip_pocket", pretrained=str(CLIP)).eval()
    ours: Any = build_clip("pocket", "pocket").model
    with torch.inference_mode():
        pixels = torch.randn(2, 3, 96, 96)
        assert torch.equal(bare.encode_image(pixels), ours.encode_image(pixels))
    assert float(bare.logit_scale.exp().detach()) != pytest.approx(1 / 0.07, rel=1e-2), "it is learnt"


def test_a_few_held_out_images_confirm_the_packaged_figures() -> None:
    known = json.loads((DATA / "pocket.json").read_text())
    found = measure.measure_masks(SAM2, FEW)
    for modality in phantoms.MODALITIES:
        ill = [key for key, row in found.items() if key.startswith(modality) and "point" in row]
        for name in ("point", "unprompted"):
            now, before = (np.mean([of[key][name] for key in ill]) for of in (found, known["sam2_pocket"]))
            assert now > before - SLACK, (modality, name)
    for modality, row in measure.measure_zero_shot(CLIP, SAM2, FEW).items():
        for focus in ("multiply", "crop"):
            assert row[focus] > known["clip_pocket"][modality][focus] - 2 * SLACK, (modality, focus)
            assert row[focus] > row["chance"] + SLACK, (modality, focus)


def test_the_cards_contain_the_packaged_figures() -> None:
    known = json.loads((DATA / "pocket.json").read_text())
    for file in (SAM2, CLIP):
        text = measure.card(file.stem, file, known[file.stem], known["per_class"])
        assert file.with_suffix(".md").read_text() == text
        assert "Not for clinical use" in text


def test_figures_that_differ_by_more_than_the_tolerance_are_listed() -> None:
    before = {"a": {"x": 0.5, "y": 0.5}}
    assert measure.differences({"a": {"x": 0.58, "y": 0.42}}, before) == []
    apart = measure.differences({"a": {"x": 0.61, "y": 0.5}}, before)
    assert apart == ["a x: 0.61, packaged: 0.5"]
    new = measure.differences({"a": {"z": 0.5}}, before)
    assert new == ["a z: not among the packaged figures"]


def test_without_a_lesion_the_mask_is_anatomy_with_status_relaxed(
    packaged: Sam2Segmenter,
) -> None:
    healthy = [pool.held_out("brain_mri", "no tumor", n) for n in range(8)]
    masks = packaged.segment([np.repeat(p.image[..., None], 3, 2) for p in healthy])
    relaxed = [(m, p) for m, p in zip(masks, healthy, strict=True) if m.status == "relaxed"]
    assert len(relaxed) >= 6
    best = [max(iou(m.region, part) for part in p.parts.values()) for m, p in relaxed]
    assert np.mean(best) > 0.6


def test_seed_and_index_determine_a_batch(drawn_pool: pool.Pool, batch: sam2.Batch) -> None:
    again, other = sam2.Batches(drawn_pool, 0, TURN)[0], sam2.Batches(drawn_pool, 1, TURN)[0]
    assert all(torch.equal(getattr(batch, name), getattr(again, name)) for name in vars(batch))
    assert not torch.equal(batch.images, other.images)


def test_the_pool_returns_images_and_regions_unchanged(drawn_pool: pool.Pool) -> None:
    for number in (0, 5, TURN - 1):
        kept, fresh = drawn_pool[number], pool.draw_one(RECIPE, 0, number)
        assert np.array_equal(kept.image, fresh.image) and np.array_equal(kept.regions, fresh.regions)
        assert kept.facts == fresh.facts


def test_each_epoch_is_the_whole_pool_in_another_order(drawn_pool: pool.Pool) -> None:
    first, second = ([drawn_pool.order(0, n + at) for n in range(TURN)] for at in (0, TURN))
    assert sorted(first) == sorted(second) == list(range(TURN))
    assert first != second


def test_training_uses_a_seed_of_no_data_set() -> None:
    seen = {pool.draw_one(RECIPE, 0, n).image.tobytes() for n in range(TURN)}
    for modality, label in set(pool.classes(RECIPE)):
        for seed, split in ((0, "train"), (0, "test"), (pool.HELD_OUT_SEED, "held-out")):
            rng = phantoms.generator(seed, modality, split, label, 0)
            assert phantoms.draw(modality, label, rng, RECIPE.size).image.tobytes() not in seen


def test_a_point_lies_in_its_region(batch: sam2.Batch) -> None:
    named = set()
    for b, k in np.ndindex(*batch.point_targets.shape):
        x, y = (int(v) for v in batch.points[b, k, 0].clamp(0, 127))
        meant = int(batch.point_targets[b, k])
        named.add(meant)
        inside = batch.regions[b, :, y, x]
        assert bool(inside[meant]) if meant >= 0 else not inside.any()
        assert meant <= 0 or not inside[0], "a point in a lesion means the lesion"
    assert named >= {-1, 0, 1}


def test_a_box_encloses_its_region_up_to_jitter(batch: sam2.Batch) -> None:
    seen = 0
    for b, k in np.ndindex(*batch.box_targets.shape):
        meant = int(batch.box_targets[b, k])
        if meant < 0:
            continue
        rows, columns = np.nonzero(batch.regions[b, meant].numpy())
        truth = np.array([[columns.min(), rows.min()], [columns.max() + 1, rows.max() + 1]])
        assert np.abs(batch.boxes[b, k].numpy() - truth).max() <= 12
        seen += 1
    assert seen > 8


def test_the_outline_loss_is_twenty_times_focal_plus_dice() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 8, 8, generator=generator)
    target = (torch.rand(3, 8, 8, generator=generator) > 0.6).float()
    focal = sigmoid_focal_loss(logits, target, alpha=0.25, gamma=2, reduction="none").mean((1, 2))
    inside = logits.sigmoid()
    dice = 1 - (2 * (inside * target).sum((1, 2)) + 1) / (inside.sum((1, 2)) + target.sum((1, 2)) + 1)
    assert torch.allclose(sam2.outline_loss(logits, target), 20 * focal + dice, atol=1e-5)
    assert sam2.outline_loss(40 * target - 20, target).max() < 1e-3


def test_quality_is_iou_with_the_best_region_and_anatomy_counts_less() -> None:
    left, both = torch.zeros(4, 4, dtype=torch.bool), torch.ones(4, 4, dtype=torch.bool)
    left[:, :2] = True
    masks = torch.stack([left, both, ~left, left & ~left])[None]
    worth = torch.tensor([[sam2.LESION_WORTH, sam2.ANATOMY_WORTH]])
    quality = sam2.true_quality(masks, torch.stack([left, both])[None], worth)
    assert quality[0].tolist() == pytest.approx([1.0, 0.5, 0.5 * sam2.ANATOMY_WORTH, 0.0])


def test_training_and_segmenter_encode_and_decode_alike(packaged: Sam2Segmenter) -> None:
    image = pool.held_out("brain_mri", "glioma", 0).image
    features = packaged.encode([np.repeat(image[..., None], 3, 2)])
    small = F.interpolate(
        torch.from_numpy(image)[None, None].float() / 255, (128, 128), mode="bilinear", antialias=True
    )
    point = np.array([[[0.3, 0.6]]], np.float32)
    with torch.inference_mode():
        ours = sam2.encode(packaged.model, small[0])
        assert torch.allclose(ours[0], features.embedding, atol=1e-3)
        logits, quality = sam2.decode(packaged.model, ours, torch.from_numpy(point[None]) * 128, (1,))
        theirs = packaged.decode(features, 0, PointPrompts(point, np.ones((1, 1), np.int32)))
    np.testing.assert_allclose(logits[0, 1:].numpy(), theirs[0], atol=2e-2)
    np.testing.assert_allclose(quality[0, 1:].numpy(), theirs[1], atol=1e-3)


def test_steeper_logits_are_more_stable_and_give_the_same_masks() -> None:
    predictor, _ = load_predictor("pocket", "random:0", 128)
    images, point = torch.rand(1, 128, 128), torch.tensor([[[[40.0, 70.0]]]])
    with torch.inference_mode():
        features = sam2.encode(predictor.model, images)
        before, quality = sam2.decode(predictor.model, features, point, (1,))
        sam2.steepen(predictor.model, 4)
        after, same_quality = sam2.decode(predictor.model, features, point, (1,))
    assert torch.allclose(after, 4 * before, rtol=1e-4, atol=1e-5)
    assert torch.equal(quality, same_quality)


def test_a_caption_is_a_positive_for_every_image_with_its_facts() -> None:
    facts = torch.tensor([[1, 7, 30], [1, 7, 40], [2, 7, 30]])
    named = torch.tensor([[1, 7, -1], [1, -1, 40], [-1, 7, 30]])
    expected = torch.tensor([[1, 0, 1], [1, 1, 0], [0, 0, 1]], dtype=torch.bool)
    assert torch.equal(clip.positives(facts, named), expected)


def test_with_one_positive_each_the_caption_loss_equals_clips() -> None:
    images, texts = (F.normalize(torch.randn(5, 8), dim=1) for _ in range(2))
    theirs = open_clip.ClipLoss()(images, texts, torch.tensor(9.0))
    assert clip.caption_loss(images, texts, torch.eye(5) > 0, torch.tensor(9.0)) == pytest.approx(
        float(theirs)
    )


def test_the_caption_loss_does_not_separate_images_with_a_shared_caption() -> None:
    images = F.normalize(torch.tensor([[1.0, 0], [1.0, 0], [0, 1.0]]), dim=1)
    texts, scale = images[[0, 2]], torch.tensor(50.0)
    true = torch.tensor([[True, False], [True, False], [False, True]])
    images_apart = -torch.log(torch.tensor(0.5)) / 4  # the minimum, because two images share their caption
    assert clip.caption_loss(images, texts, true, scale) == pytest.approx(float(images_apart), abs=1e-4)


def test_captions_are_true_and_cover_every_field(drawn_pool: pool.Pool) -> None:
    named = set()
    for number in range(TURN):
        drawn = drawn_pool[number]
        true = clip.truths(drawn, mirrored=False)
        for draw in range(20):
            said, text = clip.caption(true, np.random.default_rng([number, draw]))
            assert said.items() <= true.items()
            assert all(value in text for name, value in said.items() if name not in ("modality", "side"))
            named |= set(said)
    assert named == set(clip.FIELDS)


def test_the_caption_of_a_mirrored_image_exchanges_left_and_right(drawn_pool: pool.Pool) -> None:
    sides = [
        (clip.truths(drawn_pool[n], False).get("side"), clip.truths(drawn_pool[n], True).get("side"))
        for n in range(TURN)
    ]
    assert {("left", "right"), ("right", "left")} & set(sides)
    assert all(a == b for a, b in sides if a in (None, "middle"))


@pytest.mark.parametrize("focus", ["none", "crop"])
def test_the_outlines_in_training_are_those_of_the_view(
    focus: str, drawn_pool: pool.Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clip, "FOCUSED", {} if focus == "none" else {focus: 1.0})
    monkeypatch.setattr(clip, "attended", lambda drawn, rng: corner)
    corner = np.zeros((RECIPE.size, RECIPE.size), bool)
    corner[: RECIPE.size // 2, : RECIPE.size // 2] = True  # a crop to this region shows nothing else
    shown = RECIPE.size if focus == "none" else RECIPE.size // 2
    whole = clip.Crop(0, 0, 1, 1, False)
    for number in range(TURN):
        drawn = drawn_pool[number]
        view, outlines = clip.show(drawn, whole, np.random.default_rng(number), 96, 8)
        assert view.shape == (96, 96, 3)
        side = shown // 8
        share = drawn.regions[0, :shown, :shown].reshape(8, side, 8, side).mean((1, 3))
        assert np.abs(outlines[0] - share).max() < 0.15


def sam2_loss(pool: pool.Pool) -> tuple[Any, Any]:
    model = load_predictor("pocket", "random:0", 128)[0].model.train().requires_grad_(True)
    seen = sam2.Batches(pool, 0, 2)[0]
    return model, lambda: sam2.loss(model, seen)[0]


def clip_loss(pool: pool.Pool) -> tuple[Any, Any]:
    encoder = build_clip("pocket", "random:0")
    pupil = clip.Pupil(encoder.model.train().requires_grad_(True))
    seen = clip.Batches(pool, 0, 8, encoder)[0]
    return pupil, lambda: clip.loss(pupil, encoder, seen)[0]


@pytest.mark.parametrize("make", [sam2_loss, clip_loss])
def test_the_loss_of_a_repeated_batch_falls(make: Any, drawn_pool: pool.Pool) -> None:
    model, loss = make(drawn_pool)
    optimizer = torch.optim.AdamW(model.parameters(), lr=8e-4)
    losses = []
    for _ in range(10):
        total = loss()
        losses.append(float(total.detach()))
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]


class Line(torch.utils.data.Dataset[Tensor]):
    """Points on a straight line."""

    stop: int | None = None

    def __getitem__(self, index: int) -> Tensor:
        if index == self.stop:
            raise KeyboardInterrupt
        return torch.randn(4, generator=torch.Generator().manual_seed(index))


def test_a_resumed_training_ends_with_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = loop.Settings(
        seed=0, images=0, steps=6, batch_size=4, lr=0.1, warmup=2, weight_decay=0.1, clip=1.0
    )

    def train(out: Path, batches: Line, **changed: Any) -> Tensor:
        model = torch.nn.Linear(1, 1)
        torch.nn.init.ones_(model.weight)
        torch.nn.init.zeros_(model.bias)

        def loss(x: Tensor) -> tuple[Tensor, dict[str, float]]:
            return (model(x[:, None])[:, 0] - 3 * x).square().mean(), {}

        trained = dict(model.named_parameters())
        loop.train_and_write(
            *("line", out, replace(settings, **changed), "numbers", model, trained, batches, loss),
            model.state_dict,
            workers=0,
        )
        return weights.load(out)["weight"]

    whole = train(tmp_path / "whole.safetensors", Line())
    monkeypatch.setattr(loop, "_SAVE_EVERY", 0.0)
    broken = Line()
    broken.stop = 4
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "broken.safetensors", broken)
    with pytest.raises(
        ValueError,
        match=r"state belongs to a training with .*'steps': 6.* Delete it, or train with its settings.",
    ):
        train(tmp_path / "broken.safetensors", Line(), steps=7)
    assert not (tmp_path / "broken.safetensors").exists()
    assert torch.equal(train(tmp_path / "broken.safetensors", Line()), whole)
    assert {path.name for path in tmp_path.iterdir()} == {"whole.safetensors", "broken.safetensors"}


@pytest.mark.parametrize("train", [sam2.train, clip.train])
def test_a_training_writes_a_file_that_its_loader_accepts(
    train: Any, drawn_pool: pool.Pool, tmp_path: Path
) -> None:
    out = tmp_path / "out.safetensors"
    train(drawn_pool, 0, out, steps=2, batch_size=2, warmup=1)
    if train is sam2.train:
        assert load_predictor("pocket", str(out), 128)[1] != load_predictor("pocket", "random:0", 128)[1]
    else:
        assert build_clip("pocket", str(out)).key != build_clip("pocket", "random:0").key
    with safe_open(out, "pt") as file:
        assert (file.metadata()["steps"], file.metadata()["seed"]) == ("2", "0")


def test_the_learning_rate_rises_and_then_falls_to_zero() -> None:
    rates = [loop.schedule(step, 100, 10) for step in range(101)]
    assert rates[0] == 0.1 and rates[9] == 1 and max(rates) == 1
    assert all(a >= b for a, b in pairwise(rates[10:]))
    assert rates[100] == pytest.approx(0)
