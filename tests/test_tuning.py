"""MedFocusCLIP with trained blocks: frozen features beside them, mirror images, and the choice to train."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from flows.stages.finetune import encoder_to_fit
from medfocus.clip.encoder import ClipEncoder
from medfocus.learning.method import Support
from medfocus.learning.selection import Choice, candidates
from medfocus.learning.training import Schedule, train
from medfocus.methods.medfocusclip import MedFocusClip
from medfocus.serving import checkpoint, defaults
from tests.towers import SIZE, build_kind

SETTINGS = {
    **defaults.method_settings("medfocusclip", "small"),
    **{"tuning": "full", "blocks": 2, "layers": (2, 3), "grid": 1, "epochs": 3, "max_steps": 50, "lr": 1e-2},
    **{"contrastive_weights": (0.0,), "text_prior": False, "folds": 2, "batch_size": 8},
}
# A block is a stage of the one, and a transformer block of the other.
LAYERS = {"ModifiedResNet": (2, 3), "ViT of open_clip": (1, 3)}


@pytest.fixture(params=list(LAYERS))
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def encoder(kind: str, tmp_path: Path) -> ClipEncoder:
    return build_kind(kind, tmp_path)


def method_of(encoder: ClipEncoder, kind: str, **changed: Any) -> MedFocusClip:
    return MedFocusClip(encoder, **{**SETTINGS, "layers": LAYERS[kind], **changed})


def images_of(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Draw images (N, S, S, 3) uint8 of two classes: bright above or below, whatever is left and right."""
    images = torch.randint(0, 150, (count, SIZE, SIZE, 3), generator=torch.Generator().manual_seed(seed))
    labels = torch.arange(count) % 2
    images[labels == 0, : SIZE // 2] += 100
    images[labels == 1, SIZE // 2 :] += 100
    return images.to(torch.uint8), labels


def support_of(method: MedFocusClip, count: int = 16, views: int = 2) -> Support:
    images, labels = images_of(count)
    inputs = torch.stack([method.embed(images.roll(view, dims=1)) for view in range(views)])
    text = functional.normalize(torch.randn(2, method.encoder.dim, generator=seeded()), dim=-1)
    return Support(inputs, labels, torch.arange(count), text)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_the_features_beside_trained_blocks_are_those_of_the_frozen_encoder(
    encoder: ClipEncoder, kind: str
) -> None:
    method = method_of(encoder, kind)
    images, _ = images_of(16)
    frozen = encoder.encode_layers(encoder.preprocess(images), LAYERS[kind], 1)
    split = method._split(method.embed(images)[None])
    torch.testing.assert_close(split.patches[0], frozen[:, encoder.dim :], rtol=0, atol=1e-5)
    image = method_of(encoder, kind, tuning="adapter")._split(method.embed(images)[None]).tower[0]
    torch.testing.assert_close(image, frozen[:, : encoder.dim], rtol=0, atol=1e-5)
    method.fit(support_of(method), seeded())
    again = method._split(method.embed(images)[None])
    assert torch.equal(again.patches, split.patches)


def test_training_changes_the_blocks_and_the_frozen_form_does_not(encoder: ClipEncoder, kind: str) -> None:
    images, _ = images_of(6, seed=3)
    tuned, frozen = (method_of(encoder, kind, tuning=tuning, layers=()) for tuning in ("full", "adapter"))
    for method in (tuned, frozen):
        method.fit(support_of(method), seeded())
    features = [
        method.classifier_.tower(method._split(method.embed(images)[None]).tower[0])
        for method in (tuned, frozen)
    ]
    plain = encoder.encode_images(encoder.preprocess(images))
    torch.testing.assert_close(features[1], plain, rtol=0, atol=1e-5)
    assert not torch.allclose(features[0], plain, atol=1e-3)
    assert (tuned.note, frozen.note) == ("tuned", "frozen")


def test_in_a_worker_the_tail_alone_gives_the_same_fit(encoder: ClipEncoder, kind: str) -> None:
    here = method_of(encoder, kind)
    support = support_of(here)
    there = dataclasses.replace(here, encoder=encoder_to_fit(here, encoder))
    logits = [method.fit(support, seeded()).logits(support.inputs[0])["probe"] for method in (here, there)]
    assert torch.equal(*logits)


def test_layers_before_the_first_trained_block_are_refused(encoder: ClipEncoder, kind: str) -> None:
    first = encoder.tower.depth - 1
    with pytest.raises(
        ValueError, match=rf"^row: layers is \[1\], but the last 1 blocks begin after layer {first}"
    ):
        method_of(encoder, kind, blocks=1, layers=(1,)).check_towers("row")
    method_of(encoder, kind, blocks=1, layers=(first,)).check_towers("row")


@pytest.mark.parametrize("tuning", ["adapter", "full"])
def test_with_flips_an_image_and_its_mirror_image_get_the_same_prediction(
    tuning: str, encoder: ClipEncoder, kind: str, tmp_path: Path
) -> None:
    images, _ = images_of(5, seed=7)
    method = method_of(encoder, kind, flip=True, tuning=tuning)
    method.fit(support_of(method), seeded())
    straight, mirrored = (method.logits(method.embed(side))["probe"] for side in (images, images.flip(2)))
    torch.testing.assert_close(straight, mirrored, rtol=0, atol=1e-5)
    without = method_of(encoder, kind, tuning=tuning)
    without.fit(support_of(without), seeded())
    one, other = (without.logits(without.embed(side))["probe"] for side in (images, images.flip(2)))
    assert not torch.allclose(one, other, atol=1e-3)
    header = checkpoint.Header("medfocusclip", method.settings, ("a", "b"), "none", encoder.key, 0, 0, {})
    checkpoint.save(method, header, tmp_path / "cell.safetensors")
    loaded, _ = checkpoint.load(tmp_path / "cell.safetensors", encoder)
    again = loaded.logits(loaded.embed(images))["probe"]
    torch.testing.assert_close(again, straight, rtol=0, atol=1e-5)


def test_m_is_the_mean_over_the_image_and_its_mirror_image(encoder: ClipEncoder, kind: str) -> None:
    images, _ = images_of(5, seed=7)
    method = method_of(encoder, kind, flip=True)
    method.fit(support_of(method), seeded())
    both = method.embed(images)  # (N, 2, ...)
    alone = [method.encode(torch.stack([both[:, side]] * 2, dim=1)) for side in (0, 1)]
    torch.testing.assert_close(method.encode(both), (alone[0] + alone[1]) / 2, rtol=0, atol=1e-5)


def test_a_support_never_has_more_views_than_the_training_passes_over_it() -> None:
    settings = {**SETTINGS, "augmented": 12, "epochs": 40, "max_steps": 100, "batch_size": 10}
    plain, mirrored = (MedFocusClip(None, **settings, flip=flip) for flip in (False, True))  # pyright: ignore[reportArgumentType]
    assert [plain.views(images, 2) for images in (20, 100, 500, 5000)] == [13, 11, 3, 2]
    assert [mirrored.views(images, 2) for images in (20, 100, 500, 5000)] == [7, 6, 2, 1]
    usual = MedFocusClip(None, **{**settings, "augmented": None})  # pyright: ignore[reportArgumentType]
    assert usual.views(20, 2) == 3


def test_frozen_or_tuned_is_chosen_inside_the_support(encoder: ClipEncoder, kind: str) -> None:
    method = method_of(encoder, kind, tuning="adapter")
    support = support_of(method)
    choice = Choice(candidates({"tuning": ("adapter", "full")}), folds=2, images=100)
    chosen: Any = choice.fit(method, support, seeded())
    scores = {}
    for tuning in ("adapter", "full"):
        one = Choice(({"tuning": tuning},), folds=2, images=100).fit(method, support, seeded())
        scores[tuning] = one.logits(support.inputs[0])["probe"]
    assert torch.equal(chosen.logits(support.inputs[0])["probe"], scores[chosen.tuning])
    one_each = support.subset(torch.arange(2).numpy())
    assert choice.fit(method, one_each, seeded()).note == "frozen"  # no fold can be made


def test_the_learning_rate_rises_and_then_falls_to_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    step = torch.optim.AdamW.step

    def recorded(self: Any, *more: Any, **options: Any) -> Any:
        rates.append(self.param_groups[0]["lr"])
        return step(self, *more, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", recorded)
    weight = torch.nn.Parameter(torch.zeros(1))
    schedule = Schedule(epochs=20, batch_size=1, lr=1.0, weight_decay=0.0)
    labels = torch.zeros(1, dtype=torch.int64)
    train([weight], lambda *_: weight.sum(), labels, schedule, views=1, generator=seeded(), warmup=0.2)
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert 0 < rates[-1] < 0.02


def test_label_smoothing_is_part_of_the_heads_loss_alone(encoder: ClipEncoder, kind: str) -> None:
    method = method_of(encoder, kind)
    support = support_of(method)
    classifier = method._untrained(support.text_features, 0)
    batch = support.inputs[0], torch.empty(16, 0), support.text_features, support.labels
    image, text = classifier.adapt(batch[0], batch[2])
    expected = functional.cross_entropy(
        classifier.head(classifier.merge(image, text, batch[1])), support.labels, label_smoothing=0.2
    )
    assert classifier.loss(*batch, 0.0, 0.2).item() == pytest.approx(expected.item(), rel=1e-5)
    assert classifier.loss(*batch, 1.0, 0.2).item() == pytest.approx(classifier.loss(*batch, 1.0).item())
