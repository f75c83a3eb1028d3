"""Low-rank updates of both towers, and their methods CLIP-LoRA and MedFocusCLIP with tuning "lora"."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from medfocus.clip.encoder import ClipEncoder
from medfocus.clip.lora import LoraTowers
from medfocus.clip.prompts import class_embeddings
from medfocus.clip.towers.base import TowerError
from medfocus.clip.towers.low_rank import LoraAttention, LowRank
from medfocus.learning.method import Support
from medfocus.methods.clip_lora import ClipLora
from medfocus.methods.medfocusclip import MedFocusClip
from medfocus.storage import weights
from tests.towers import small_vit

CLASSES = ("red", "green", "blue")
PROMPTS = tuple((f"a photo of {name}", f"This is a scan of {name}") for name in CLASSES)
UPDATES: dict[str, Any] = {"rank": 2, "alpha": 1.0, "dropout": 0.25}
CLIP_LORA: dict[str, Any] = {
    **UPDATES, "steps_per_shot": 500, "max_steps": 12, "batch_size": 16, "lr": 1e-2, "weight_decay": 1e-2,
}  # fmt: skip
MEDFOCUSCLIP: dict[str, Any] = {
    "tuning": "lora", "fusion": "softmax-text", "head": "cosine", "contrastive_weights": (0.5,), "blocks": 0,
    "lora_rank": 2, "lora_alpha": 1.0, "lora_dropout": 0.25, "layers": (), "grid": 2, "segmenter_grid": 0,
    "hidden": 8, "epochs": 6, "max_steps": 99, "batch_size": 16, "lr": 5e-3, "weight_decay": 1e-2, "folds": 3,
    "text_prior": False, "augmented": None, "warmup": 0.0, "smoothing": 0.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def clip() -> ClipEncoder:
    return small_vit()


def coloured(count: int, seed: int = 0, channels: int = 3) -> tuple[Tensor, Tensor]:
    """Draw images (N, 96, 96, C) uint8 with the colour of their class, and labels (N,)."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % len(CLASSES)
    images = torch.randint(0, 120, (count, 96, 96, channels), generator=generator)
    images[torch.arange(count), :, :, labels] += 100
    return images.to(torch.uint8), labels


def support_of(clip: ClipEncoder, count: int = 24, views: int = 1) -> Support:
    images, labels = coloured(count)
    inputs = torch.stack([images + number for number in range(views)])
    text = class_embeddings(clip, PROMPTS)
    return Support(inputs, labels, torch.arange(count), text, CLASSES, PROMPTS)


def with_random_updates(clip: ClipEncoder, **changes: Any) -> LoraTowers:
    """Return towers with random updates: B is not zero."""
    torch.manual_seed(3)
    towers = LoraTowers(clip, **{**UPDATES, **changes})
    for update in towers.updates:
        nn.init.normal_(update.up, std=0.3)  # pyright: ignore[reportArgumentType]
    return towers.eval()


def merged(clip: ClipEncoder, towers: LoraTowers) -> ClipEncoder:
    """Return a CLIP with the weights W + (α/√r) B A in open_clip's own attention."""
    model = copy.deepcopy(clip.model)
    text = getattr(model, "text", model)
    blocks = [*model.visual.transformer.resblocks, *text.transformer.resblocks]  # pyright: ignore
    for block, update in zip(blocks, towers.updates, strict=True):
        for part, (a, b) in enumerate(zip(update.down, update.up, strict=True)):  # pyright: ignore
            rows = slice(part * len(b), (part + 1) * len(b))
            block.attn.in_proj_weight[rows] += 1.0 / 2**0.5 * b @ a
    return dataclasses.replace(clip, model=model)


def custom_text_clip(clip: ClipEncoder) -> ClipEncoder:
    """Build a CLIP with a separate text tower, a CustomTextCLIP."""
    vision = {"image_size": 96, "patch_size": 24, "width": 64, "head_width": 32, "layers": 2}
    text = {"context_length": 32, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = open_clip.CustomTextCLIP(32, vision, text)  # pyright: ignore[reportArgumentType]
    return dataclasses.replace(clip, model=model.eval().requires_grad_(False), dim=32)


# --- the updates ----------------------------------------------------------------------------------


@pytest.mark.parametrize("custom", [False, True])
def test_training_starts_from_the_frozen_model(custom: bool, clip: ClipEncoder) -> None:
    clip = custom_text_clip(clip) if custom else clip
    towers = LoraTowers(clip, **UPDATES).train()  # dropout is on, but B is zero
    images, _ = coloured(3)
    texts = [prompt for ensemble in PROMPTS for prompt in ensemble]
    frozen = clip.encode_images(clip.preprocess(images))
    torch.testing.assert_close(towers(images), frozen, rtol=0, atol=1e-6)
    torch.testing.assert_close(towers.encode_texts(texts), clip.encode_texts(texts), rtol=0, atol=1e-6)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_with_updates_is_the_formula(causal: bool) -> None:
    torch.manual_seed(0)
    width, heads, length, rank, alpha = 12, 3, 5, 2, 3.0
    frozen = nn.MultiheadAttention(width, heads, batch_first=True).double()
    update = LowRank(width, rank=rank, alpha=alpha, dropout=0.0).double()
    for bias in (frozen.in_proj_bias, frozen.out_proj.bias, update.up):
        nn.init.normal_(bias)
    x = torch.randn(2, length, width, dtype=torch.float64)
    mask = torch.full((length, length), -torch.inf).triu(1).double() if causal else None
    ours, _ = LoraAttention(frozen, update)(x, x, x, attn_mask=mask)

    def numbers(tensor: Tensor) -> np.ndarray:
        return tensor.detach().numpy()

    w, b = numbers(frozen.in_proj_weight), numbers(frozen.in_proj_bias)
    down, up = numbers(update.down), numbers(update.up)
    expected = np.zeros((2, length, width))
    for i in range(2):
        q, k, v = (
            numbers(x[i]) @ (w[p * width : (p + 1) * width] + alpha / np.sqrt(rank) * up[p] @ down[p]).T
            + b[p * width : (p + 1) * width]
            for p in range(3)
        )
        for head in range(heads):
            part = slice(head * 4, (head + 1) * 4)
            scores = q[:, part] @ k[:, part].T / 2.0
            if causal:
                scores[np.triu_indices(length, 1)] = -np.inf
            share = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
            expected[i, :, part] = share @ v[:, part]
    expected = expected @ numbers(frozen.out_proj.weight).T + numbers(frozen.out_proj.bias)
    np.testing.assert_allclose(numbers(ours), expected, atol=1e-12)


@pytest.mark.parametrize("custom", [False, True])
def test_both_towers_equal_a_clip_with_merged_weights(custom: bool, clip: ClipEncoder) -> None:
    clip = custom_text_clip(clip) if custom else clip
    towers = with_random_updates(clip)
    plain = merged(clip, towers)
    images, _ = coloured(3)
    texts = [prompt for ensemble in PROMPTS for prompt in ensemble]
    with torch.no_grad():
        ours, ours_of_texts = towers(images), towers.encode_texts(texts)
    assert not torch.allclose(ours, clip.encode_images(clip.preprocess(images)), atol=1e-2)
    assert not torch.allclose(ours_of_texts, clip.encode_texts(texts), atol=1e-2)
    torch.testing.assert_close(ours, plain.encode_images(plain.preprocess(images)), rtol=0, atol=1e-5)
    torch.testing.assert_close(ours_of_texts, plain.encode_texts(texts), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("region", "channels"), [("alpha", 4), ("attention", 4), ("dual", 6)])
def test_regions_give_the_features_of_a_clip_with_merged_weights(
    region: str, channels: int, clip: ClipEncoder
) -> None:
    towers = with_random_updates(clip.with_region(region, 2.0))
    plain = merged(clip, towers).with_region(region, 2.0)
    images, _ = coloured(3, channels=channels)
    expected = plain.encode_images(plain.preprocess(images))
    with torch.no_grad():
        torch.testing.assert_close(towers(images), expected, rtol=0, atol=1e-5)


def test_dropout_affects_the_low_rank_path_only_and_differs_for_q_k_and_v() -> None:
    torch.manual_seed(0)
    update = LowRank(6, rank=2, alpha=2.0, dropout=0.5)
    with torch.no_grad():
        update.down.copy_(torch.ones(3, 2, 6))
        update.up.copy_(torch.ones(3, 6, 2))
    added = update.train()(torch.ones(1, 1, 6)).detach().reshape(3, 6) / (2.0 / 2**0.5 * 2)
    kept = added[:, 0] / 2  # six ones; dropout doubles those that it keeps
    assert torch.equal(kept, kept.round())
    assert len(kept.unique()) > 1
    torch.testing.assert_close(update.eval()(torch.ones(1, 1, 6)).flatten(), torch.full((18,), 2**0.5 * 12))


def test_a_state_holds_the_factors_without_the_towers(clip: ClipEncoder) -> None:
    towers = with_random_updates(clip)
    state = towers.state_dict()
    blocks = 4 + 3  # image encoder and text tower
    assert len(state) == 2 * blocks
    assert sum(value.numel() for value in state.values()) == blocks * 2 * 3 * 2 * 128
    assert {id(p) for p in towers.parameters()} == {
        id(p) for p in towers.encoder.model.parameters() if p.requires_grad
    }
    again = LoraTowers(clip, **UPDATES).eval()
    again.load_state_dict(state)
    images, _ = coloured(2)
    with torch.no_grad():
        assert torch.equal(again(images), towers(images))


def test_a_tower_without_projections_to_q_k_and_v_is_refused(clip: ClipEncoder) -> None:
    text = {"context_length": 32, "vocab_size": 2089, "width": 32, "heads": 2, "layers": 1}
    vision = {"image_size": 32, "layers": (1, 1, 1, 1), "width": 8, "head_width": 8}
    resnet = open_clip.CLIP(16, vision, text)  # pyright: ignore[reportArgumentType]
    with pytest.raises(
        TowerError,
        match=r"the image encoder of small_vit \(ModifiedResNet\) has no .* q, k and v\. Use clip-",
    ):
        LoraTowers(dataclasses.replace(clip, model=resnet), **UPDATES)

    class OtherText(nn.Module):
        """A text tower of no known kind."""

    foreign = custom_text_clip(clip).model
    foreign.text = OtherText()
    with pytest.raises(TowerError, match=r"the text tower of small_vit \(OtherText\) has no .* q, k and v"):
        LoraTowers(dataclasses.replace(clip, model=foreign), **UPDATES)


# --- the methods ----------------------------------------------------------------------------------

BUILDS: dict[str, Callable[..., Any]] = {
    "clip-lora": lambda clip, **changes: ClipLora(clip, **{**CLIP_LORA, **changes}),
    "medfocusclip": lambda clip, **changes: MedFocusClip(clip, **{**MEDFOCUSCLIP, **changes}),
}


@pytest.fixture(params=list(BUILDS))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def fitted(clip: ClipEncoder) -> dict[str, Any]:
    """Each method, fitted once on 24 images of two views."""
    support = support_of(clip, views=2)
    return {
        name: build(clip).fit(support, torch.Generator().manual_seed(0)) for name, build in BUILDS.items()
    }


def test_it_learns_from_images(name: str, fitted: dict[str, Any]) -> None:
    images, labels = coloured(18, seed=9)
    for logits in fitted[name].logits(images).values():
        assert logits.shape == (18, 3)
        assert float((logits.argmax(dim=1) == labels).double().mean()) > 0.8


def test_both_towers_train_and_the_encoder_does_not(name: str) -> None:
    clip = small_vit()
    before = weights.digest(clip.model.state_dict())
    modules = list(clip.model.modules())
    method = BUILDS[name](clip, **({"max_steps": 1} if name == "clip-lora" else {"epochs": 1}))
    method.fit(support_of(clip), torch.Generator().manual_seed(0))
    assert weights.digest(clip.model.state_dict()) == before
    assert all(old is new for old, new in zip(modules, clip.model.modules(), strict=True))
    assert not any(module.training for module in modules)
    assert not any(weight.requires_grad for weight in clip.model.parameters())
    moved = [value.abs().max() for key, value in method.state().items() if key.endswith(".up")]
    assert len(moved) == 7
    assert min(moved) > 0


def test_the_same_seed_fits_the_same_updates_without_the_global_generator(
    name: str, clip: ClipEncoder, fitted: dict[str, Any]
) -> None:
    torch.manual_seed(11)
    expected = torch.random.get_rng_state()
    again = BUILDS[name](clip).fit(support_of(clip, views=2), torch.Generator().manual_seed(0))
    assert torch.equal(torch.random.get_rng_state(), expected)
    state = fitted[name].state()
    assert all(torch.equal(state[key], value) for key, value in again.state().items())


def test_a_small_state_predicts_the_same(name: str, clip: ClipEncoder, fitted: dict[str, Any]) -> None:
    state = fitted[name].state()
    towers = sum(weight.numel() for weight in clip.model.parameters())
    assert sum(value.numel() for value in state.values()) < towers / 40
    again = BUILDS[name](clip).load(state)
    images, _ = coloured(70, seed=4)  # more than one pass of the tower
    for classifier, logits in fitted[name].logits(images).items():
        torch.testing.assert_close(again.logits(images)[classifier], logits, rtol=0, atol=1e-5)


def test_inputs_are_images(name: str, clip: ClipEncoder) -> None:
    method = BUILDS[name](clip)
    images, _ = coloured(2)
    assert method.embedding == "images"
    assert method.needs_towers
    assert method.takes_views
    assert torch.equal(method.embed(images), images)


def test_a_support_without_prompts_is_refused(name: str, clip: ClipEncoder) -> None:
    support = dataclasses.replace(support_of(clip), prompts=())
    with pytest.raises(ValueError, match=rf"{name}: .*trains the text tower, but support\.prompts is empty"):
        BUILDS[name](clip).fit(support, torch.Generator().manual_seed(0))


def test_steps_of_clip_lora_grow_with_the_shots(clip: ClipEncoder) -> None:
    method = ClipLora(clip, **{**CLIP_LORA, "steps_per_shot": 500, "batch_size": 32})
    assert method.epochs_for(12, 3) == 4 * 500  # 4 shots; an epoch has one step
    assert method.epochs_for(48, 3) == 16 * 500 // 2  # 16 shots; an epoch has two steps


def test_clip_lora_uses_the_first_template(clip: ClipEncoder, fitted: dict[str, Any]) -> None:
    method = fitted["clip-lora"]
    plain = merged(clip, method.towers_)
    expected = plain.encode_texts([ensemble[0] for ensemble in PROMPTS])
    torch.testing.assert_close(method.text_features_, expected, rtol=0, atol=1e-5)
    images, _ = coloured(4, seed=5)
    logits = clip.logit_scale * plain.encode_images(plain.preprocess(images)) @ expected.T
    torch.testing.assert_close(method.logits(images)["text"], logits, rtol=0, atol=1e-3)


def test_medfocusclip_averages_the_updated_text_features_of_all_templates(
    clip: ClipEncoder, fitted: dict[str, Any]
) -> None:
    method = fitted["medfocusclip"]
    expected = class_embeddings(merged(clip, method.classifier_.tower), PROMPTS)
    torch.testing.assert_close(method.text_features_, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(expected, class_embeddings(clip, PROMPTS), atol=1e-4)


def test_the_contrastive_term_alone_trains_both_towers(clip: ClipEncoder) -> None:
    classifier = MedFocusClip(clip, **MEDFOCUSCLIP)._untrained(class_embeddings(clip, PROMPTS), 0)
    images, labels = coloured(6)
    text = MedFocusClip._texts(classifier, support_of(clip))
    classifier.loss(images, torch.empty(6, 0), text, labels, 1.0).backward()
    gradients = [update.up.grad for update in classifier.tower.updates]  # pyright: ignore
    assert len(gradients) == 7
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)  # pyright: ignore


def test_medfocusclip_with_lora_chooses_its_weight_within_the_support(clip: ClipEncoder) -> None:
    changes = {"contrastive_weights": (0.0, 1.0), "head": "linear", "epochs": 1, "folds": 2}
    method = MedFocusClip(clip, **{**MEDFOCUSCLIP, **changes})
    method.fit(support_of(clip, 12), torch.Generator().manual_seed(0))
    assert method.contrastive_weight_ == 0.0  # at λ = 1 the linear head stays at zero: held-out loss ln 3


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rank": 0}, "the LoRA rank is 0. Use 1 or more"),
        ({"alpha": 0.0}, r"the LoRA alpha is 0\.0. Use a value above 0"),
        ({"dropout": 1.0}, r"the LoRA dropout is 1\.0. Use a share in \[0, 1\)"),
    ],
)
def test_settings_out_of_range_are_refused(name: str, changed: dict[str, Any], message: str) -> None:
    if name == "medfocusclip":
        changed = {f"lora_{field}": value for field, value in changed.items()}
    with pytest.raises(ValueError, match=f"{name}: {message}"):
        BUILDS[name](None, **changed)


def test_a_fit_without_steps_is_refused() -> None:
    for field in ("steps_per_shot", "max_steps"):
        with pytest.raises(ValueError, match=f"clip-lora: {field} is 0; use 1 or more"):
            ClipLora(None, **{**CLIP_LORA, field: 0})  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tuning": "adapters"}, "tuning is 'adapters'; use one of adapter, lora, full"),
        ({"tuning": "full"}, "tuning is 'full' and blocks 0. Set blocks to 1 or more with 'full'"),
        ({"tuning": "adapter", "blocks": -1}, "tuning is 'adapter' and blocks -1"),
        ({"blocks": 2}, "tuning is 'lora', blocks 2, .*'lora' updates the whole encoder. Set blocks and"),
        ({"layers": (2,)}, r"tuning is 'lora', blocks 0, layers \[2\] .*and layers to \[\]"),
        ({"segmenter_grid": 4}, r"tuning is 'lora', .* and segmenter_grid 4; .*Set blocks and"),
        (
            {"tuning": "full", "blocks": 1, "segmenter_grid": 4},
            "blocks is 1 and segmenter_grid 4; SAM2's features need tuning 'adapter' without blocks",
        ),
        ({"warmup": 1.0}, r"warmup is 1\.0; use a share in \[0, 1\)"),
        ({"smoothing": -0.1}, r"smoothing is -0\.1; use a share in \[0, 1\)"),
    ],
)
def test_unknown_tunings_and_settings_of_other_tunings_are_refused(
    changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"medfocusclip: {message}"):
        BUILDS["medfocusclip"](None, **changed)


def test_only_low_rank_updates_run_the_towers_in_fit() -> None:
    adapter = BUILDS["medfocusclip"](None, tuning="adapter")
    full = BUILDS["medfocusclip"](None, tuning="full", blocks=2)
    assert not adapter.needs_towers
    assert not full.needs_towers
    assert (adapter.embedding, full.embedding) == ("features", "tokens-2")


def test_untrained_updates_predict_like_untrained_adapters(clip: ClipEncoder) -> None:
    """Before training, both tunings compute M: one from the images and one from their features."""
    support = support_of(clip, 6)
    text = support.text_features
    lora = MedFocusClip(clip, **MEDFOCUSCLIP)
    adapter = MedFocusClip(clip, **{**MEDFOCUSCLIP, "tuning": "adapter"})
    fused = lora._fused(lora._untrained(text, 0), lora._split(support.inputs), text)
    features = adapter._split(adapter.embed(support.inputs[0])[None])
    torch.testing.assert_close(
        fused, adapter._fused(adapter._untrained(text, 0), features, text), rtol=0, atol=1e-5
    )
    torch.testing.assert_close(functional.normalize(fused, dim=-1), fused, rtol=0, atol=1e-6)


def test_the_channel_of_the_region_alpha_trains_with_the_updates(clip: ClipEncoder) -> None:
    regional = clip.with_region("alpha", 0.0)
    images, labels = coloured(24, channels=4)
    images[..., 3] = 0
    images[torch.arange(24), :, :, 3] = (labels * 120).to(torch.uint8)[:, None, None]
    support = dataclasses.replace(support_of(clip), inputs=images[None])
    fitted = ClipLora(regional, **CLIP_LORA).fit(support, torch.Generator().manual_seed(0))
    state = fitted.state()
    moved = [name for name in state if "alpha" in name and state[name].ndim == 4]
    assert len(moved) == 1 and state[moved[0]].abs().max() > 0
    visual: Any = regional.model.visual
    assert not visual.conv1.alpha.weight.any()
    again = ClipLora(regional, **CLIP_LORA).load(state)
    assert torch.equal(again.logits(images)["text"], fitted.logits(images)["text"])
