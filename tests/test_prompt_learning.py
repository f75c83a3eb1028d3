"""Learned contexts in the text tower, and their methods CoOp and CoCoOp."""

from __future__ import annotations

import dataclasses
import itertools
import weakref
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from medfocus.clip.build import build_clip
from medfocus.clip.encoder import ClipEncoder
from medfocus.clip.prompt_learning import ContextTower, EmbeddedTexts, start_contexts, write_texts
from medfocus.clip.towers.base import TowerError
from medfocus.learning.contexts import SgdSchedule, learning_rate, train_sgd
from medfocus.learning.method import Support
from medfocus.methods.cocoop import CoCoOp, ConditionalContexts
from medfocus.methods.coop import CoOp
from medfocus.storage import weights

NAMES = ("normal", "benign_mass", "malignant")
START = "a photo of a"
TEXTS = [f"{START} {name.replace('_', ' ')}." for name in NAMES]
SHARED: dict[str, Any] = {
    "contexts": 4, "start": START, "epochs": 20, "max_steps": 100, "batch_size": 16, "lr": 2e-2, "warmup": 1,
    "weight_decay": 5e-4,
}  # fmt: skip
COOP: dict[str, Any] = {**SHARED, "class_token": "end", "class_specific": False}
COCOOP: dict[str, Any] = {**SHARED, "reduction": 16, "chunk": 4, "batch_size": 4, "max_steps": 60, "lr": 0.3}
BUILDS: dict[str, Any] = {
    "coop": lambda clip, **changes: CoOp(clip, **{**COOP, **changes}),
    "cocoop": lambda clip, **changes: CoCoOp(clip, **{**COCOOP, **changes}),
}
UNTRAINED: dict[str, Any] = {"lr": 0.0, "warmup": 0, "epochs": 1, "max_steps": 1}


@pytest.fixture(scope="module")
def clip() -> ClipEncoder:
    return build_clip("pocket", "pocket")


@pytest.fixture(scope="module")
def published() -> ClipEncoder:
    return build_clip("ViT-B-32", "random:0")


def custom_text_clip(clip: ClipEncoder, **changes: Any) -> ClipEncoder:
    """Build a CLIP with a separate text tower, a CustomTextCLIP."""
    vision = {"image_size": 96, "patch_size": 24, "width": 64, "head_width": 32, "layers": 1}
    text = {"context_length": 32, "vocab_size": 2089, "width": 64, "heads": 2, "layers": 2, **changes}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = open_clip.CustomTextCLIP(32, vision, text)  # pyright: ignore[reportArgumentType]
    return dataclasses.replace(clip, name="custom", model=model.eval().requires_grad_(False), dim=32)


def support_of(clip: ClipEncoder, count: int = 24, views: int = 2, seed: int = 0) -> Support:
    """Draw features around a direction for each class."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(3, clip.dim, generator=torch.Generator().manual_seed(7))
    labels = torch.arange(count) % 3
    features = centres[labels] + 0.3 * torch.randn(views, count, clip.dim, generator=generator)
    text = torch.zeros(3, clip.dim)
    return Support(normalize(features, dim=-1), labels, torch.arange(count), text, NAMES)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randomly(size: tuple[int, ...], seed: int = 0) -> Tensor:
    return 0.3 * torch.randn(size, generator=seeded(seed))


def walk(clip: ClipEncoder, rows: list[Tensor]) -> Tensor:
    """Encode embeddings (l, W) of each text, end token last, by the modules of the text tower one by one.

    It does not use open_clip's mask, padding, pooling or attention.
    """
    tower: Any = getattr(clip.model, "text", clip.model)
    features = []
    for row in rows:
        x = row + tower.positional_embedding[: len(row)]
        hidden = torch.full((len(x), len(x)), -torch.inf).triu(1)
        for block in tower.transformer.resblocks:
            heads, width = block.attn.num_heads, x.shape[1]
            y = block.ln_1(x) @ block.attn.in_proj_weight.T + block.attn.in_proj_bias
            q, k, v = (part.reshape(len(x), heads, width // heads) for part in y.split(width, dim=1))
            scores = torch.einsum("qhd,khd->hqk", q, k) / (width // heads) ** 0.5 + hidden
            seen = torch.einsum("hqk,khd->qhd", scores.softmax(dim=-1), v).reshape(len(x), width)
            x = x + seen @ block.attn.out_proj.weight.T + block.attn.out_proj.bias
            x = x + block.mlp.c_proj(block.mlp.gelu(block.mlp.c_fc(block.ln_2(x))))
        end = tower.ln_final(x[-1]) @ tower.text_projection
        features.append(end / end.norm())
    return torch.stack(features)


def words(clip: ClipEncoder, text: str) -> Tensor:
    """Return the token embeddings (l, W) of a text without start and end token."""
    tower: Any = getattr(clip.model, "text", clip.model)
    return tower.token_embedding(torch.tensor(clip.tokenizer.encode(text)))


def ends(clip: ClipEncoder) -> tuple[Tensor, Tensor]:
    """Return the embeddings (1, W) of the start token and of the end token."""
    tower: Any = getattr(clip.model, "text", clip.model)
    ids = torch.tensor([[clip.tokenizer.sot_token_id], [clip.tokenizer.eot_token_id]])
    start, end = tower.token_embedding(ids)
    return start, end


# --- the text tower -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pocket", "published", "custom", "both ways", "class token"])
def test_embedded_texts_get_the_features_of_their_tokens(
    kind: str, clip: ClipEncoder, published: ClipEncoder
) -> None:
    changes = {
        "custom": {},
        "both ways": {"no_causal_mask": True},
        "class token": {"embed_cls": True},
    }
    encoder = {"pocket": clip, "published": published}.get(kind) or custom_text_clip(clip, **changes[kind])
    tower = EmbeddedTexts(encoder)
    tokens = encoder.tokenizer(TEXTS)
    features = tower(tower.embed(tokens), tokens)
    torch.testing.assert_close(features, encoder.encode_texts(TEXTS), rtol=0, atol=1e-6)
    # ... and so does the tower for the length of the longest text, with words as contexts
    contexts = start_contexts("coop", encoder, 4, START, seeded())
    texts = write_texts("coop", encoder, NAMES, 4)
    cut = kind not in ("both ways", "class token")
    assert (texts.tokens.shape[1] < tokens.shape[1]) == cut
    features = ContextTower(encoder, texts)(contexts[None, None])[0]
    torch.testing.assert_close(features, encoder.encode_texts(TEXTS), rtol=0, atol=1e-6)


@pytest.mark.parametrize("custom", [False, True])
@pytest.mark.parametrize("class_token", ["end", "middle", "front"])
def test_features_of_learned_contexts_match_the_tower_s_modules_one_by_one(
    class_token: str, custom: bool, clip: ClipEncoder
) -> None:
    clip = custom_text_clip(clip) if custom else clip
    start, end = ends(clip)
    contexts = randomly((5, start.shape[1]))
    rows = []
    for name in NAMES:
        class_words, stop = words(clip, name.replace("_", " ")), words(clip, ".")
        inner = {
            "end": [contexts, class_words],
            "middle": [contexts[:2], class_words, contexts[2:]],
            "front": [class_words, contexts],
        }[class_token]
        rows.append(torch.cat([start, *inner, stop, end]))
    assert len({len(row) for row in rows}) > 1  # some names have several tokens
    tower = ContextTower(clip, write_texts("coop", clip, NAMES, 5, class_token))
    embedded = tower.embedded(contexts[None, None])[0]  # (K, L, W)
    for ours, row in zip(embedded, rows, strict=True):
        assert torch.equal(ours[: len(row)], row)
    torch.testing.assert_close(tower(contexts[None, None])[0], walk(clip, rows), rtol=0, atol=1e-5)


def test_only_the_contexts_have_a_gradient(clip: ClipEncoder) -> None:
    contexts = randomly((1, 3, 4, 128)).requires_grad_(True)
    features = ContextTower(clip, write_texts("coop", clip, NAMES, 4))(contexts)
    features[0, 1].sum().backward()
    assert contexts.grad is not None
    assert contexts.grad[0, 1].abs().min(dim=1).values.gt(0).all()
    assert contexts.grad[0, [0, 2]].abs().max() == 0  # another class's contexts
    assert all(weight.grad is None for weight in clip.model.parameters())


def test_the_tower_shares_the_weights_and_keeps_no_graph(clip: ClipEncoder) -> None:
    owned = {tensor.data_ptr() for tensor in clip.model.state_dict().values()}
    tower = EmbeddedTexts(clip)
    assert {tensor.data_ptr() for tensor in tower._model.state_dict().values()} <= owned
    tokens = clip.tokenizer(TEXTS)
    embedded = tower.embed(tokens)
    held = weakref.ref(embedded)
    tower(embedded, tokens)
    del embedded
    assert held() is None


def test_a_text_longer_than_the_context_is_refused_with_its_class(clip: ClipEncoder) -> None:
    assert write_texts("coop", clip, NAMES, 32 - 5).tokens.shape[1] == 32
    with pytest.raises(
        ValueError,
        match=r"coop: the text of class 'benign_mass' with 28 contexts has 33 tokens, but the text tower of "
        r"pocket reads 32\. Lower contexts or shorten",
    ):
        write_texts("coop", clip, NAMES, 28)
    with pytest.raises(
        ValueError, match="coop: the text of class 'benign_mass' with 100 contexts has 105 tokens"
    ):
        write_texts("coop", clip, NAMES, 100)


def test_a_start_of_another_length_is_refused_with_both_lengths(clip: ClipEncoder) -> None:
    with pytest.raises(
        ValueError,
        match=r"cocoop: start is 'a photo of a', which has 4 tokens, but contexts is 16\. Set contexts to 4",
    ):
        start_contexts("cocoop", clip, 16, START, seeded())


def test_contexts_start_as_small_noise_or_as_words(clip: ClipEncoder) -> None:
    noise = start_contexts("coop", clip, 16, "", seeded())
    assert noise.shape == (16, 128)
    assert float(noise.std()) == pytest.approx(0.02, rel=0.1)
    assert torch.equal(start_contexts("coop", clip, 4, START, seeded()), words(clip, START))


def test_a_text_tower_of_an_unknown_kind_is_refused(clip: ClipEncoder) -> None:
    class OtherText(nn.Module):
        """A text tower with its token embedding in another attribute."""

    foreign = custom_text_clip(clip)
    foreign.model.text = OtherText()
    with pytest.raises(TowerError, match=r"the text tower of custom \(OtherText\) has no token embeddings"):
        EmbeddedTexts(foreign)
    with pytest.raises(TowerError, match=r"^coop: .*Use clip-adapter"):
        write_texts("coop", foreign, NAMES, 4)


def test_a_tokenizer_with_several_tokens_for_a_letter_is_refused(clip: ClipEncoder) -> None:
    def bytes_only(texts: list[str], context_length: int) -> Tensor:
        rows = [[*text.encode(), *[0] * context_length][:context_length] for text in texts]
        return torch.tensor(rows)

    foreign = dataclasses.replace(clip, tokenizer=bytes_only)
    with pytest.raises(
        ValueError, match=r"coop: the tokenizer of pocket \(function\) does not write at most one"
    ):
        write_texts("coop", foreign, NAMES, 4)


# --- the loop -------------------------------------------------------------------------------------


@pytest.mark.parametrize("warmup", [0, 1, 3])
def test_the_learning_rate_warms_up_and_falls_by_a_cosine(warmup: int) -> None:
    rates = [learning_rate(epoch, epochs=50, lr=2e-3, warmup=warmup) for epoch in range(50)]
    # PyTorch's cosine, which the public code starts after the epochs at 1e-5
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50)
    expected = []
    for _ in range(50 - warmup):
        expected.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([1e-5] * warmup + expected)


def test_training_is_sgd_with_momentum_and_weight_decay() -> None:
    """Steps by hand on (w - t)²/2, with one batch per epoch."""
    start, target, lr, decay, epochs = np.array([1.0, -2.0]), np.array([3.0, 0.5]), 0.1, 0.3, 6
    weight = nn.Parameter(torch.tensor(start))

    def accumulate(index: Tensor, view: Tensor) -> None:
        ((weight - torch.from_numpy(target)).square().sum() / 2).backward()

    schedule = SgdSchedule(epochs=epochs, max_steps=100, batch_size=4, lr=lr, warmup=1, weight_decay=decay)
    train_sgd([weight], accumulate, 4, schedule, views=1, generator=seeded())
    expected, velocity = start.copy(), np.zeros(2)
    for epoch in range(epochs):
        velocity = 0.9 * velocity + (expected - target) + decay * expected
        rate = 1e-5 if epoch == 0 else lr * (1 + np.cos(np.pi * (epoch - 1) / epochs)) / 2
        expected = expected - rate * velocity
    np.testing.assert_allclose(weight.detach().numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize(("max_steps", "steps"), [(1000, 15), (7, 7)])
def test_max_steps_keeps_all_images_and_the_whole_schedule(max_steps: int, steps: int) -> None:
    weight, seen, rates = nn.Parameter(torch.zeros(())), [], []

    def accumulate(index: Tensor, view: Tensor) -> None:
        assert set(view.tolist()) <= {0, 1}
        seen.append(index)
        weight.grad = torch.ones(())
        rates.append(float(weight.detach()))

    schedule = SgdSchedule(epochs=5, max_steps=max_steps, batch_size=4, lr=1.0, warmup=1, weight_decay=0.0)
    train_sgd([weight], accumulate, 10, schedule, views=2, generator=seeded())
    assert len(seen) == steps
    assert [len(index) for index in seen[:3]] == [4, 4, 2]
    assert sorted(torch.cat(seen[:3]).tolist()) == list(range(10))
    moved = [before - after for before, after in itertools.pairwise(rates)]
    assert moved[0] == pytest.approx(1e-5)  # the warm-up takes the first epoch's share ...
    warm = sum(step * 5 // steps == 0 for step in range(steps))
    assert moved[warm] > 0.5  # ... and then the cosine starts


# --- the methods ----------------------------------------------------------------------------------


@pytest.fixture(params=list(BUILDS))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def fitted(clip: ClipEncoder) -> dict[str, Any]:
    """Each method, fitted once on 24 images of two views."""
    return {name: build(clip).fit(support_of(clip), seeded()) for name, build in BUILDS.items()}


def test_untrained_contexts_that_start_at_words_are_zero_shot(clip: ClipEncoder) -> None:
    features = support_of(clip).inputs[0]
    expected = clip.logit_scale * features @ clip.encode_texts(TEXTS).T
    coop = CoOp(clip, **{**COOP, **UNTRAINED}).fit(support_of(clip), seeded())
    torch.testing.assert_close(coop.logits(features)["text"], expected, rtol=0, atol=1e-4)


def test_it_learns_from_the_support(name: str, clip: ClipEncoder, fitted: dict[str, Any]) -> None:
    support, held_out = support_of(clip), support_of(clip, count=30, views=1, seed=5)
    untrained = BUILDS[name](clip, **UNTRAINED).fit(support, seeded())

    def loss(method: Any) -> float:
        return float(cross_entropy(method.logits(held_out.inputs[0])["text"], held_out.labels))

    assert loss(fitted[name]) < loss(untrained) - 0.2


def test_cocoop_with_constant_contexts_is_coop(clip: ClipEncoder) -> None:
    contexts = randomly((4, 128))
    texts = write_texts("cocoop", clip, NAMES, 4)
    cocoop = CoCoOp(clip, **COCOOP)
    cocoop.tower_, cocoop.network_ = ContextTower(clip, texts), ConditionalContexts(contexts, clip.dim, 16)
    for weight in cocoop.network_.shift[2].parameters():
        nn.init.zeros_(weight)
    coop = CoOp(clip, **COOP).load(
        {"contexts": contexts[None], "text_features": ContextTower(clip, texts)(contexts[None, None])[0]}
    )
    features = support_of(clip, count=30).inputs[0]
    torch.testing.assert_close(
        cocoop.logits(features)["text"], coop.logits(features)["text"], rtol=0, atol=1e-4
    )


def test_cocoop_encodes_texts_with_the_contexts_of_each_image(
    clip: ClipEncoder, fitted: dict[str, Any]
) -> None:
    cocoop, features = fitted["cocoop"], support_of(clip, count=3).inputs[0]
    state = cocoop.state()
    start, end = ends(clip)
    expected = []
    for f in features:
        hidden = (state["network.shift.0.weight"] @ f + state["network.shift.0.bias"]).clamp(min=0)
        moved = state["network.contexts"] + (
            state["network.shift.2.weight"] @ hidden + state["network.shift.2.bias"]
        )
        class_words = [words(clip, f"{name.replace('_', ' ')}.") for name in NAMES]
        rows = [torch.cat([start, moved, each, end]) for each in class_words]
        expected.append(clip.logit_scale * walk(clip, rows) @ f)
    torch.testing.assert_close(cocoop.logits(features)["text"], torch.stack(expected), rtol=0, atol=1e-3)


def test_chunks_add_up_to_the_gradient_of_the_batch(clip: ClipEncoder) -> None:
    support = support_of(clip, count=7)
    features, labels = support.inputs[0], support.labels
    gradients = []
    for chunk in (1, 3, 7):
        cocoop = CoCoOp(clip, **{**COCOOP, "chunk": chunk})
        cocoop.tower_ = ContextTower(clip, write_texts("cocoop", clip, NAMES, 4))
        torch.manual_seed(0)
        cocoop.network_ = ConditionalContexts(randomly((4, 128)), clip.dim, 16)
        cocoop.accumulate(features, labels)
        gradients.append([p.grad for p in cocoop.network_.parameters()])
        assert all(weight.grad is None for weight in clip.model.parameters())
    for parts in zip(*gradients, strict=True):
        assert parts[-1] is not None and parts[-1].abs().max() > 0
        for part in parts[:-1]:
            torch.testing.assert_close(part, parts[-1], rtol=1e-4, atol=1e-5)


def test_class_specific_contexts_differ_after_training(clip: ClipEncoder, fitted: dict[str, Any]) -> None:
    assert fitted["coop"].contexts_.shape == (1, 4, 128)
    apart = CoOp(clip, **{**COOP, "class_specific": True}).fit(support_of(clip), seeded())
    assert apart.contexts_.shape == (3, 4, 128)
    start = words(clip, START)
    moved = (apart.contexts_ - start).norm(dim=(1, 2))
    assert moved.min() > 0
    assert not torch.allclose(apart.contexts_[0], apart.contexts_[1], atol=1e-4)
    assert not torch.allclose(apart.text_features_, fitted["coop"].text_features_, atol=1e-4)


def test_class_specific_contexts_start_from_different_noise(clip: ClipEncoder) -> None:
    settings = {**COOP, **UNTRAINED, "class_specific": True}
    noise = CoOp(clip, **{**settings, "start": ""}).fit(support_of(clip), seeded()).contexts_
    assert float(torch.corrcoef(noise.flatten(1)).fill_diagonal_(0).abs().max()) < 0.2
    started = CoOp(clip, **settings).fit(support_of(clip), seeded()).contexts_
    assert torch.equal(started, words(clip, START).expand(3, -1, -1))


@pytest.mark.parametrize("view", [0, 1])
def test_training_uses_every_view(name: str, view: int, clip: ClipEncoder) -> None:
    support = support_of(clip)
    inputs = support.inputs.clone()
    inputs[view] = inputs[view].flip(0)  # features of other images
    once, other = (
        BUILDS[name](clip, max_steps=4).fit(dataclasses.replace(support, inputs=seen), seeded()).state()
        for seen in (support.inputs, inputs)
    )
    assert not all(torch.equal(once[key], other[key]) for key in once)


def test_fitting_does_not_change_the_encoder(name: str) -> None:
    clip = build_clip("pocket", "random:0")
    before, modules = weights.digest(clip.model.state_dict()), list(clip.model.modules())
    BUILDS[name](clip, max_steps=2).fit(support_of(clip), seeded())
    assert weights.digest(clip.model.state_dict()) == before
    assert all(old is new for old, new in zip(modules, clip.model.modules(), strict=True))
    assert all(weight.grad is None and not weight.requires_grad for weight in clip.model.parameters())
    assert not any(module.training for module in modules)


def test_the_same_seed_fits_the_same_without_the_global_generator(
    name: str, clip: ClipEncoder, fitted: dict[str, Any]
) -> None:
    torch.manual_seed(11)
    expected = torch.random.get_rng_state()
    again = BUILDS[name](clip).fit(support_of(clip), seeded())
    other = BUILDS[name](clip).fit(support_of(clip), seeded(1))
    assert torch.equal(torch.random.get_rng_state(), expected)
    state = fitted[name].state()
    assert all(torch.equal(state[key], value) for key, value in again.state().items())
    assert not all(torch.equal(state[key], value) for key, value in other.state().items())


def test_a_state_predicts_without_tokenizer_and_class_names(
    name: str, clip: ClipEncoder, fitted: dict[str, Any]
) -> None:
    features = support_of(clip, count=50, seed=3).inputs[0]  # more than one pass of the tower
    again = BUILDS[name](dataclasses.replace(clip, tokenizer=None)).load(fitted[name].state())
    torch.testing.assert_close(
        again.logits(features)["text"], fitted[name].logits(features)["text"], rtol=0, atol=1e-5
    )
    assert again.logits(features)["text"].shape == (50, 3)


def test_inputs_are_frozen_features_of_several_views(name: str, clip: ClipEncoder) -> None:
    method = BUILDS[name](clip)
    assert method.embedding == "features"
    assert method.takes_views and method.needs_towers
    images = torch.randint(0, 256, (2, 96, 96, 3), dtype=torch.uint8, generator=seeded())
    assert torch.equal(method.embed(images), clip.encode_images(clip.preprocess(images)))


def test_a_support_without_class_names_is_refused(name: str, clip: ClipEncoder) -> None:
    support = dataclasses.replace(support_of(clip), class_names=())
    with pytest.raises(ValueError, match=rf"{name}: support\.class_names is empty, .*Give the class names"):
        BUILDS[name](clip).fit(support, seeded())


def test_settings_that_train_nothing_are_refused(clip: ClipEncoder) -> None:
    with pytest.raises(ValueError, match=r"coop: contexts is 0\. Use 1 or more\."):
        CoOp(clip, **{**COOP, "contexts": 0})
    with pytest.raises(ValueError, match=r"cocoop: chunk is 0\. Use 1 or more\."):
        CoCoOp(clip, **{**COCOOP, "chunk": 0})
    for warmup in (-1, 20):
        with pytest.raises(
            ValueError, match=rf"cocoop: warmup is {warmup} epochs of 20\. Use 0 or more, and fewer"
        ):
            CoCoOp(clip, **{**COCOOP, "warmup": warmup})
    with pytest.raises(
        ValueError, match="coop: class_token 'back' is not known; use one of end, middle, front"
    ):
        CoOp(clip, **{**COOP, "class_token": "back"})
