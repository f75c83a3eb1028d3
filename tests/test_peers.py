"""Methods, encoders and statistics agree with independent computations of their published formulas.

The formulas of Tip-Adapter, CLIP-Adapter and SS-Text are in ``test_feature_methods``, and the attention of
CLIP-LoRA is in ``test_lora``. This file follows whole procedures from the same inputs to the last number.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from fractions import Fraction
from itertools import chain, combinations, pairwise
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from scipy import special
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate, normalize

from medfocus.clip.build import build_clip
from medfocus.clip.encoder import ClipEncoder
from medfocus.clip.lora import LoraTowers
from medfocus.clip.prompt_learning import ContextTower, write_texts
from medfocus.evaluation.comparison import holm, mcnemar
from medfocus.evaluation.metrics import mean_interval, reliability, wilson
from medfocus.learning.method import Support
from medfocus.masks.sam2.segmenter import grid_prompts, load_sam2
from medfocus.masks.settings import Sam2Settings
from medfocus.methods.cocoop import CoCoOp, ConditionalContexts
from medfocus.methods.coop import CoOp
from medfocus.methods.lp_plus_plus import LpPlusPlus
from tests.conftest import TinyClip
from tests.segmenters import noise
from tests.test_prompt_learning import COCOOP, COOP, NAMES, ends, randomly, support_of, walk, words
from tests.towers import small_vit

CLASSES, DIM = 4, 32


@pytest.fixture(scope="module")
def clip() -> ClipEncoder:
    return build_clip("pocket", "pocket")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def features_of(count: int, seed: int = 0) -> Support:
    """Draw float32 unit features around a direction for each class, with texts near these directions."""
    generator = seeded(seed)
    centres = torch.randn(CLASSES, DIM, generator=seeded(9))
    labels = torch.arange(count) % CLASSES
    features = centres[labels] + 1.5 * torch.randn(1, count, DIM, generator=generator)
    text = normalize(centres + torch.randn(CLASSES, DIM, generator=generator), dim=-1)
    return Support(normalize(features, dim=-1), labels, torch.arange(count), text)


# --- methods on features ----------------------------------------------------------------------------


def test_lp_plus_plus_equals_its_published_loop() -> None:
    """The reference is a linear layer without bias, under PyTorch's SGD."""
    support = features_of(24)
    features, labels, text = support.inputs[0].double(), support.labels, support.text_features.double()
    classifier = nn.Linear(DIM, CLASSES, bias=False).double()
    with torch.no_grad():
        classifier.weight.copy_(torch.stack([features[labels == k].sum(dim=0) for k in range(CLASSES)]))
    cosines = features @ text.T
    start = 250 * torch.stack([cosines[labels == k, k].mean() for k in range(CLASSES)]).mean()
    alpha = start.expand(CLASSES).clone().requires_grad_()
    largest = float(np.linalg.eigvalsh((features.T @ features).numpy())[-1])
    of_alpha = len(features) / (4 * float(cosines.square().sum(dim=0).max()))
    optimizer = torch.optim.SGD(classifier.parameters(), 4 * len(features) / largest, momentum=0.9)
    for step in range(1, 301):
        optimizer.zero_grad()
        alpha.grad = None
        cross_entropy(classifier(features) + alpha * cosines, labels).backward()
        optimizer.step()
        if step % 10 == 0:
            assert alpha.grad is not None
            alpha.data -= of_alpha * alpha.grad
    images = features_of(40, seed=1).inputs[0].double()
    expected = classifier(images) + alpha * (images @ text.T)
    method = LpPlusPlus(TinyClip(), steps=300).fit(support, seeded())  # pyright: ignore[reportArgumentType]
    ours = method.logits(images)["blend"]
    np.testing.assert_allclose(ours.numpy(), expected.detach().numpy(), rtol=0, atol=1e-7)


# --- learned contexts -------------------------------------------------------------------------------


def rows_of(clip: ClipEncoder, contexts: Tensor) -> list[Tensor]:
    """Embed start token, contexts (M, W), class name, full stop and end token of each class."""
    start, end = ends(clip)
    named = [words(clip, f"{name.replace('_', ' ')}.") for name in NAMES]
    return [torch.cat([start, contexts, name, end]) for name in named]


def test_coop_has_the_logits_and_the_gradient_of_its_formula(clip: ClipEncoder) -> None:
    support = support_of(clip, count=9, views=1)
    features, labels = support.inputs[0], support.labels
    contexts = words(clip, COOP["start"]).detach().requires_grad_()
    logits = clip.logit_scale * features @ walk(clip, rows_of(clip, contexts)).T
    cross_entropy(logits, labels).backward()
    assert contexts.grad is not None
    # One step from the start, at a rate of 1 and without weight decay, is the gradient.
    one_step = {"epochs": 1, "max_steps": 1, "warmup": 0, "weight_decay": 0.0, "batch_size": 9, "lr": 1.0}
    moved = CoOp(clip, **{**COOP, **one_step}).fit(support, seeded()).contexts_[0]
    gradient, largest = contexts.detach() - moved, contexts.grad.abs().max()
    still = CoOp(clip, **{**COOP, **one_step, "lr": 1e-12}).fit(support, seeded())
    scale = float(logits.detach().abs().max())
    torch.testing.assert_close(still.logits(features)["text"] / scale, logits / scale, rtol=0, atol=3e-6)
    torch.testing.assert_close(gradient / largest, contexts.grad / largest, rtol=0, atol=2e-6)


def test_cocoop_has_the_logits_and_the_gradients_of_its_formula(clip: ClipEncoder) -> None:
    support = support_of(clip, count=6, views=1)
    features, labels = support.inputs[0], support.labels
    cocoop = CoCoOp(clip, **{**COCOOP, "chunk": 2})
    cocoop.tower_ = ContextTower(clip, write_texts("cocoop", clip, NAMES, 4))
    torch.manual_seed(0)
    cocoop.network_ = ConditionalContexts(randomly((4, 128)), clip.dim, 16)
    theirs = copy.deepcopy(cocoop.network_)
    logits = []
    for image in features:
        shift = theirs.shift[2](theirs.shift[0](image).clamp(min=0))
        rows = rows_of(clip, theirs.contexts + shift)
        logits.append(clip.logit_scale * walk(clip, rows) @ image)
    expected = torch.stack(logits)
    cross_entropy(expected, labels).backward()
    cocoop.accumulate(features, labels)
    scale = float(expected.detach().abs().max())
    torch.testing.assert_close(cocoop.logits(features)["text"] / scale, expected / scale, rtol=0, atol=3e-6)
    for ours, reference in zip(cocoop.network_.parameters(), theirs.parameters(), strict=True):
        assert ours.grad is not None and reference.grad is not None
        largest = reference.grad.abs().max()
        torch.testing.assert_close(ours.grad / largest, reference.grad / largest, rtol=0, atol=2e-6)


# --- encoders ---------------------------------------------------------------------------------------


def test_clip_lora_is_a_clip_with_merged_weights_in_double_precision() -> None:
    clip = small_vit()
    model = copy.deepcopy(clip.model).double()
    double = dataclasses.replace(clip, model=model)
    towers = LoraTowers(double, rank=3, alpha=2.0, dropout=0.25).eval()
    generator = seeded()
    for update in towers.updates:
        nn.init.normal_(update.up, std=0.3, generator=generator)  # pyright: ignore[reportArgumentType]
    plain: Any = copy.deepcopy(model)
    blocks = [*plain.visual.transformer.resblocks, *plain.transformer.resblocks]
    with torch.no_grad():
        for block, update in zip(blocks, towers.updates, strict=True):
            changes = [b @ a for a, b in zip(update.down, update.up, strict=True)]  # pyright: ignore
            block.attn.in_proj_weight += 2.0 / math.sqrt(3) * torch.cat(changes)
        pixels = torch.randn(2, 3, 96, 96, generator=generator, dtype=torch.float64)
        ours = towers.encoder.image_features(pixels)
        expected = plain.encode_image(pixels, normalize=True)
        texts = ["a lesion", "the lungs"]
        expected_texts = plain.encode_text(clip.tokenizer(texts), normalize=True)
        assert float((expected - model.encode_image(pixels, normalize=True)).abs().max()) > 1e-2  # pyright: ignore
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(towers.encode_texts(texts), expected_texts, rtol=0, atol=1e-12)


def test_embeddings_are_those_of_open_clip() -> None:
    encoder = build_clip("ViT-B-32", "random:0")
    reference: Any = open_clip.create_model("ViT-B-32").eval().requires_grad_(False)
    reference.load_state_dict(encoder.model.state_dict())
    pixels = torch.randn(2, 3, 224, 224, generator=seeded())
    texts = ["a chest X-ray of a patient", "the lungs"]
    with torch.no_grad():
        images = reference.encode_image(pixels, normalize=True)
        tokens = open_clip.get_tokenizer("ViT-B-32")(texts)
        expected = reference.encode_text(tokens, normalize=True)
    torch.testing.assert_close(encoder.encode_images(pixels), images, rtol=0, atol=6e-8)
    torch.testing.assert_close(encoder.encode_texts(texts), expected, rtol=0, atol=6e-8)


def test_the_masks_of_points_are_those_of_sam2s_predictor() -> None:
    segmenter = load_sam2(Sam2Settings("pocket", "pocket", 128, "grid", points_per_side=3))
    image = noise(90, 140)
    prompts = grid_prompts(3)
    with torch.inference_mode():
        logits, iou = segmenter.decode(segmenter.encode([image]), 0, prompts)
    ours = interpolate(torch.from_numpy(logits)[None], (90, 140), mode="bilinear")[0].numpy() > 0
    segmenter.predictor.set_image(image)
    for point in range(9):
        masks, expected_iou, _ = segmenter.predictor.predict(
            prompts.coords[point] * (140, 90), prompts.labels[point], multimask_output=True
        )
        mine = slice(3 * point, 3 * point + 3)
        np.testing.assert_array_equal(ours[mine], masks.astype(bool))
        np.testing.assert_allclose(iou[mine], expected_iou, rtol=0, atol=1e-5)


# --- statistics -------------------------------------------------------------------------------------


def test_the_expected_calibration_error_is_its_sum_over_bins() -> None:
    rng = np.random.default_rng(0)
    probabilities = torch.from_numpy(rng.dirichlet([0.5] * 4, 700)).float()  # float32, as a peer has them
    confidences, predicted = probabilities.max(dim=1)
    right_by_chance = rng.random(700) < 0.7  # too modest in the lower bins, too sure in the upper ones
    labels = np.where(right_by_chance, predicted.numpy(), (predicted.numpy() + 1) % 4)
    error = torch.zeros(())
    for low, high in pairwise(torch.linspace(0, 1, 16).tolist()):
        inside = (confidences > low) & (confidences <= high)
        if inside.any():
            right = (predicted[inside] == torch.from_numpy(labels)[inside]).float().mean()
            error += inside.float().mean() * (right - confidences[inside].mean()).abs()
    assert reliability(probabilities.double().numpy(), labels).ece == pytest.approx(float(error), abs=5e-7)


def test_holms_p_values_are_those_of_the_closed_test_of_all_intersections() -> None:
    """The adjusted p of a hypothesis is the largest Bonferroni p of a set of hypotheses with it."""
    p = np.random.default_rng(1).random(7) ** 3
    sets = chain.from_iterable(combinations(range(7), size) for size in range(1, 8))
    bonferroni = {members: min(1.0, len(members) * min(p[list(members)])) for members in sets}
    expected = [max(value for members, value in bonferroni.items() if i in members) for i in range(7)]
    np.testing.assert_array_equal(holm(p.tolist()), expected)


@pytest.mark.parametrize(("ours", "theirs"), [(9, 2), (0, 6), (5, 5), (31, 12)])
def test_mcnemars_p_is_the_exact_binomial_sum(ours: int, theirs: int) -> None:
    correct = np.array([True] * ours + [False] * theirs + [True] * 8)
    baseline = np.array([False] * ours + [True] * theirs + [True] * 8)
    count = ours + theirs
    tail = sum(math.comb(count, k) for k in range(min(ours, theirs) + 1))
    expected = min(Fraction(1), Fraction(2 * tail, 2**count))
    assert mcnemar(correct, baseline) == (ours, theirs, pytest.approx(float(expected), rel=1e-12))


@pytest.mark.parametrize(("correct", "count"), [(0, 9), (5, 5), (17, 24), (230, 251)])
def test_the_ends_of_wilsons_interval_solve_its_score_equation(correct: int, count: int) -> None:
    """(share - p)² = z² p (1 - p) / n at both ends (Wilson, J. Am. Stat. Assoc. 22, 1927)."""
    share, z2 = correct / count, special.ndtri(0.975) ** 2
    roots = np.roots([1 + z2 / count, -(2 * share + z2 / count), share**2]).real
    np.testing.assert_allclose(wilson(correct, count), np.sort(roots), rtol=0, atol=1e-12)


def test_the_interval_over_draws_is_students() -> None:
    values = [0.71, 0.64, 0.77, 0.70, 0.81]
    mean = sum(values) / 5
    error = math.sqrt(sum((value - mean) ** 2 for value in values) / 4 / 5)
    interval = mean_interval(values)
    assert interval.mean == pytest.approx(mean, rel=1e-12)
    assert interval.half_width == pytest.approx(special.stdtrit(4, 0.975) * error, rel=1e-12)
