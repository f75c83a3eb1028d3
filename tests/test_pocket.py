"""Claims about the pocket SAM2: how it is trained, and that the weights in the package see."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torchvision.ops import sigmoid_focal_loss

from medfocus import phantoms, pocket, weights
from medfocus.masks.sam2 import Prompts, Sam2Segmenter, build_segmenter, load_predictor

PACKAGED = Path(pocket.__file__).parent / "data" / "sam2_pocket.safetensors"
# Least IoU for a point inside and for no prompt at all: the card, less the noise of a few pictures
FLOORS = {"chest_xray": (0.4, 0.15), "brain_mri": (0.5, 0.4), "breast_ultrasound": (0.75, 0.65)}


@pytest.fixture(scope="module")
def packaged() -> Sam2Segmenter:
    return build_segmenter("pocket", "pocket", 128, "grid", points_per_side=8, batch_size=16)


@pytest.fixture(scope="module")
def batch() -> pocket.Batch:
    return pocket.PhantomBatches(0, 11)[0]  # every class once


def test_the_name_pocket_stands_for_the_packaged_weights(packaged: Sam2Segmenter) -> None:
    same = load_predictor("pocket", str(PACKAGED), 128)[1]
    assert load_predictor("pocket", "pocket", 128)[1] == same
    assert load_predictor("pocket", "random:0", 128)[1] != same
    kept = weights.load(PACKAGED)["sam_mask_decoder.iou_token.weight"]
    assert torch.equal(packaged.model.sam_mask_decoder.iou_token.weight, kept.float())


def test_the_packaged_weights_are_small_and_hold_what_a_picture_needs() -> None:
    assert PACKAGED.stat().st_size < 8e6
    state = weights.load(PACKAGED)
    assert {v.dtype for v in state.values()} == {torch.float16}
    parts = {name.partition(".")[0] for name in state}
    assert parts == {"image_encoder", "sam_prompt_encoder", "sam_mask_decoder", "no_mem_embed"}
    with safe_open(PACKAGED, "pt") as file:
        assert file.metadata()["data"] == "phantoms, generator seed 1000000, name 'pocket'"


def test_the_pocket_model_is_for_its_own_configuration() -> None:
    with pytest.raises(ValueError, match=r"SAM2 checkpoint pocket does not fit the config 'sam2.1_hiera_t'"):
        load_predictor("sam2.1_hiera_t", "pocket", 128)


def test_a_point_in_a_lesion_finds_its_outline() -> None:
    found = pocket.measure(PACKAGED, 4, points_per_side=(8,))
    for modality, figures in found.items():
        assert figures["point"]["innermost"] > FLOORS[modality][0], modality
        assert figures["grid 8"]["iou"] > FLOORS[modality][1], modality


def test_without_a_lesion_the_choice_is_anatomy_and_says_that_limits_were_relaxed(
    packaged: Sam2Segmenter,
) -> None:
    healthy = [pocket.held_out_phantom("brain_mri", "no tumor", n) for n in range(8)]
    masks = packaged.segment([np.repeat(p.picture[..., None], 3, 2) for p in healthy])
    relaxed = [(m, p) for m, p in zip(masks, healthy, strict=True) if m.status == "relaxed"]
    assert len(relaxed) >= 6
    assert np.mean([pocket.iou(m.region, p.parts["brain"]) for m, p in relaxed]) > 0.8


def test_a_batch_has_a_number_and_no_memory(batch: pocket.Batch) -> None:
    again, other = pocket.PhantomBatches(0, 11)[0], pocket.PhantomBatches(1, 11)[0]
    assert all(torch.equal(getattr(batch, name), getattr(again, name)) for name in vars(batch))
    assert not torch.equal(batch.pictures, other.pictures)


def test_training_draws_from_a_seed_that_no_data_set_uses() -> None:
    classes = [(name, label) for name, labels in phantoms.MODALITIES.items() for label in labels]
    seen = {draw(pocket.TRAIN_SEED, name, "pocket", label) for name, label in classes}
    for seed, split in ((0, "train"), (0, "test"), (pocket.HELD_OUT_SEED, "held-out")):
        assert seen.isdisjoint(draw(seed, name, split, label) for name, label in classes)


def draw(seed: int, modality: str, split: str, label: str) -> bytes:
    return phantoms.draw(
        modality, label, phantoms.generator(seed, modality, split, label, 0), 64
    ).picture.tobytes()


def test_a_point_lies_in_the_region_that_it_means(batch: pocket.Batch) -> None:
    named = set()
    for b, k in np.ndindex(*batch.point_targets.shape):
        x, y = (int(v) for v in batch.points[b, k, 0].clamp(0, 127))
        meant = int(batch.point_targets[b, k])
        named.add(meant)
        inside = batch.regions[b, :, y, x]
        assert bool(inside[meant]) if meant >= 0 else not inside.any()
        assert meant <= 0 or not inside[0], "a point in a lesion means the lesion"
    assert named >= {-1, 0, 1}


def test_a_box_encloses_its_region_but_for_its_jitter(batch: pocket.Batch) -> None:
    for b, k in np.ndindex(*batch.box_targets.shape):
        rows, columns = np.nonzero(batch.regions[b, int(batch.box_targets[b, k])].numpy())
        truth = np.array([[columns.min(), rows.min()], [columns.max() + 1, rows.max() + 1]])
        assert np.abs(batch.boxes[b, k].numpy() - truth).max() <= 12


def test_the_outline_loss_is_twenty_times_focal_plus_dice() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 8, 8, generator=generator)
    target = (torch.rand(3, 8, 8, generator=generator) > 0.6).float()
    focal = sigmoid_focal_loss(logits, target, alpha=0.25, gamma=2, reduction="none").mean((1, 2))
    inside = logits.sigmoid()
    dice = 1 - (2 * (inside * target).sum((1, 2)) + 1) / (inside.sum((1, 2)) + target.sum((1, 2)) + 1)
    assert torch.allclose(pocket.outline_loss(logits, target), 20 * focal + dice, atol=1e-5)
    assert pocket.outline_loss(40 * target - 20, target).max() < 1e-3


def test_quality_is_iou_with_the_best_region_and_anatomy_counts_less() -> None:
    left, both = torch.zeros(4, 4, dtype=torch.bool), torch.ones(4, 4, dtype=torch.bool)
    left[:, :2] = True
    masks = torch.stack([left, both, ~left, left & ~left])[None]
    worth = torch.tensor([[pocket.LESION_WORTH, pocket.ANATOMY_WORTH]])
    quality = pocket.true_quality(masks, torch.stack([left, both])[None], worth)
    assert quality[0].tolist() == pytest.approx([1.0, 0.6, 0.3, 0.0])


def test_training_encodes_and_decodes_as_the_segmenter_does(packaged: Sam2Segmenter) -> None:
    picture = pocket.held_out_phantom("brain_mri", "glioma", 0).picture
    features = packaged.encode([np.repeat(picture[..., None], 3, 2)])
    small = F.interpolate(
        torch.from_numpy(picture)[None, None].float() / 255, (128, 128), mode="bilinear", antialias=True
    )
    point = np.array([[[0.3, 0.6]]], np.float32)
    with torch.inference_mode():
        ours = pocket.encode(packaged.model, small[0])
        assert torch.allclose(ours[0], features.embedding, atol=1e-3)
        logits, quality = pocket.decode(packaged.model, ours, torch.from_numpy(point[None]) * 128, (1,))
        theirs = packaged.decode(features, 0, Prompts(point, np.ones((1, 1), np.int32)))
    np.testing.assert_allclose(logits[0, 1:].numpy(), theirs[0], atol=1e-2)
    np.testing.assert_allclose(quality[0, 1:].numpy(), theirs[1], atol=1e-3)


def test_the_loss_falls_on_a_batch_seen_again() -> None:
    model = load_predictor("pocket", "random:0", 128)[0].model.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=8e-4)
    seen, losses = pocket.PhantomBatches(0, 2)[0], []
    for _ in range(8):
        total, _ = pocket.loss(model, seen)
        losses.append(float(total.detach()))
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]


def test_training_taken_up_again_ends_with_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = tmp_path / "whole.safetensors", tmp_path / "broken.safetensors"
    settings = {"batch_size": 2, "warmup": 1, "workers": 0}
    pocket.train(0, 3, whole, **settings)
    monkeypatch.setattr(pocket, "_SAVE_EVERY", 0.0)
    drawn = pocket.PhantomBatches.__getitem__

    def fail_at_two(batches: pocket.PhantomBatches, index: int) -> pocket.Batch:
        if index == 2:
            raise KeyboardInterrupt
        return drawn(batches, index)

    with monkeypatch.context() as patch:
        patch.setattr(pocket.PhantomBatches, "__getitem__", fail_at_two)
        with pytest.raises(KeyboardInterrupt):
            pocket.train(0, 3, broken, **settings)
    assert not broken.exists()
    with pytest.raises(
        ValueError,
        match=r"broken.safetensors.state: is of a training with .*'steps': 3.* "
        r"Delete it, or train with its settings.",
    ):
        pocket.train(0, 4, broken, **settings)
    pocket.train(0, 3, broken, **settings)
    assert weights.digest(broken) == weights.digest(whole)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken.safetensors", "whole.safetensors"]


def test_steeper_logits_are_steadier_and_bound_the_same_masks() -> None:
    predictor, _ = load_predictor("pocket", "random:0", 128)
    pictures, point = torch.rand(1, 128, 128), torch.tensor([[[[40.0, 70.0]]]])
    with torch.inference_mode():
        features = pocket.encode(predictor.model, pictures)
        before, quality = pocket.decode(predictor.model, features, point, (1,))
        pocket.steepen(predictor.model, 4)
        after, same_quality = pocket.decode(predictor.model, features, point, (1,))
    assert torch.allclose(after, 4 * before, rtol=1e-4, atol=1e-5)
    assert torch.equal(quality, same_quality)


def test_the_learning_rate_rises_then_falls_to_nothing() -> None:
    rates = [pocket._schedule(step, 100, 10) for step in range(101)]
    assert rates[0] == 0.1 and rates[9] == 1 and max(rates) == 1
    assert all(a >= b for a, b in pairwise(rates[10:]))
    assert rates[100] == pytest.approx(0)
