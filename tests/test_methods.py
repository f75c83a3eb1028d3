"""The contract of every method, and MedFocusCLIP's equations against independent computations."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn import functional

from flows.stages.finetune import encoder_to_fit
from medfocus.clip.encoder import ClipEncoder
from medfocus.clip.prompts import class_embeddings
from medfocus.learning.calibration import fit_temperature
from medfocus.learning.fitting import calibration, fit, validate
from medfocus.learning.folds import stratified_folds
from medfocus.learning.method import Support
from medfocus.learning.probe import C_WITHOUT_VALIDATION, fit_probe
from medfocus.learning.training import Schedule, train
from medfocus.methods import METHODS
from medfocus.methods.clip import ClipFewShot
from medfocus.methods.fusion import FUSIONS, HEADS, Adapter, FusedClassifier, contrastive_loss
from medfocus.methods.medfocusclip import MedFocusClip
from medfocus.serving import checkpoint, defaults
from tests import towers
from tests.conftest import TinyClip

# Hyperparameters for a small encoder and few images; all others are those of params.yaml.
SMALL: dict[str, dict[str, Any]] = {
    "pixels": {"side": 8, "folds": 3},
    "pixels-svm": {"side": 8, "costs": (1.0, 10.0), "gammas": (0.3, 1.0), "folds": 3},
    "k-nn": {"neighbours": (1, 3, 5), "folds": 3},
    "clip-few-shot": {
        "blocks": 1,
        "epochs": 60,
        "max_steps": 1000,
        "batch_size": 8,
        "lr": 3e-2,
        "weight_decay": 1e-2,
    },
    "clip-adapter": {
        "ratios": (0.8,),
        "reduction": 1,
        "epochs": 100,
        "batch_size": 8,
        "lr": 3e-2,
        "weight_decay": 1e-2,
        "folds": 3,
    },
    "tip-adapter": {"alphas": (1.0, 10.0, 100.0), "betas": (1.0, 10.0, 100.0), "folds": 3},
    "tip-adapter-f": {
        "alphas": (1.0, 10.0, 100.0),
        "betas": (1.0, 10.0, 100.0),
        "epochs": 20,
        "batch_size": 256,
        "lr": 1e-3,
        "weight_decay": 1e-2,
        "folds": 3,
    },
    "resnet": {
        "model": "resnet10t",
        "pretrained": "",
        "options": {"layers": (1, 1, 1, 1), "channels": (16, 16, 32, 32)},
        "image_size": 32,
        "tuning": "full",
        "epochs": 12,
        "max_steps": 1000,
        "batch_size": 8,
        "lr": 2e-3,
        "weight_decay": 1e-2,
    },
    "clip-lora": {
        "rank": 2,
        "alpha": 1.0,
        "dropout": 0.25,
        "steps_per_shot": 500,
        "max_steps": 12,
        "batch_size": 24,
        "lr": 2e-2,
        "weight_decay": 1e-2,
    },
    "clip-svd": {"epochs": 4, "max_steps": None, "batch_size": 24, "lr": 0.1, "weight_decay": 0.0},
    "biomedcoop": {
        "texts": {},
        "consistency": 1.0,
        "distillation": 0.0,
        "tau": 1.5,
        "contexts": 16,
        "start": "",
        "epochs": 60,
        "max_steps": None,
        "batch_size": 24,
        "lr": 1.0,
        "warmup": 1,
        "weight_decay": 5e-4,
    },
    "coop": {
        "contexts": 4,
        "start": "a photo of a",
        "class_token": "end",
        "class_specific": True,
        "epochs": 40,
        "max_steps": 120,
        "batch_size": 24,
        "lr": 0.1,
        "warmup": 1,
        "weight_decay": 5e-4,
    },
    "cocoop": {
        "contexts": 4,
        "start": "a photo of a",
        "reduction": 8,
        "chunk": 8,
        "epochs": 40,
        "max_steps": 60,
        "batch_size": 24,
        "lr": 0.3,
        "warmup": 1,
        "weight_decay": 5e-4,
    },
    "slca": {
        "segmenter_grid": 4,
        "pool": 2,
        "reduction": 2,
        "epochs": 100,
        "batch_size": 8,
        "lr": 3e-2,
        "weight_decay": 1e-2,
    },
    "medfocusclip": {
        "tuning": "adapter",
        "fusion": "softmax-text",
        "head": "cosine",
        "contrastive_weights": (0.5,),
        "blocks": 0,
        "lora_rank": 2,
        "lora_alpha": 1.0,
        "lora_dropout": 0.25,
        "layers": (),
        "segmenter_grid": 0,
        "grid": 2,
        "hidden": 4,
        "epochs": 40,
        "augmented": None,
        "max_steps": 1000,
        "warmup": 0.0,
        "smoothing": 0.0,
        "batch_size": 8,
        "lr": 1e-2,
        "weight_decay": 1e-2,
        "folds": 3,
    },
}


def settings_of(name: str) -> dict[str, Any]:
    """A method's hyperparameters, with tuples in place of YAML's lists."""
    settings = {**defaults.method_settings(name, "small"), **SMALL.get(name, {})}
    return {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}


SETTINGS = {name: settings_of(name) for name in METHODS}
CLASSES = 3
TOWERS = (
    "clip-lora",
    "clip-svd",
    "coop",
    "cocoop",
    "biomedcoop",
)  # methods that need an encoder with a text tower
NAMES = ("red", "green", "blue")
PROMPTS = tuple((f"a photo of {name}",) for name in NAMES)


small_vit = cache(towers.small_vit)


def encoder_of(name: str, tiny: TinyClip) -> Any:
    return small_vit() if name in TOWERS else tiny


def images_of(name: str, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return ``coloured_images`` at the input size of the method's encoder."""
    images, labels = coloured_images(count, seed)
    if name in TOWERS:
        images = images.repeat_interleave(6, dim=1).repeat_interleave(6, dim=2)
    return images, labels


def coloured_images(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return images (N, 16, 16, 3) uint8 and labels (N,); the brightest channel of an image is its class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    images = torch.randint(0, 120, (count, 16, 16, 3), generator=generator)
    rows = torch.arange(16)[:, None] < 8  # brightness depends on the class too, for methods on grey pixels
    for i, k in enumerate(labels.tolist()):
        images[i, :, :, k] += 80
        images[i, rows.expand(16, 16)] += 18 * k
    return images.to(torch.uint8), labels


def support_of(method: Any, images: Tensor, labels: Tensor, text: Tensor | None = None) -> Support:
    inputs = method.embed(images)[None]
    if text is None and isinstance(method.encoder, ClipEncoder):
        text = class_embeddings(method.encoder, PROMPTS)
    if text is None:
        text = functional.normalize(
            torch.randn(CLASSES, 8, generator=torch.Generator().manual_seed(5)), dim=-1
        )
    return Support(inputs, labels, torch.arange(len(labels)), text, NAMES, PROMPTS)


@pytest.fixture(params=list(METHODS))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def fitted(name: str, clip: TinyClip, seed: int = 0, permute: bool = False) -> tuple[Any, Support]:
    method = METHODS[name](encoder_of(name, clip), **SETTINGS[name])
    support = support_of(method, *images_of(name, 24))
    if permute:
        order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
        support = replace(support, labels=support.labels[order])
    return method.fit(support, torch.Generator().manual_seed(seed)), support


def test_logits_have_one_column_a_class_for_each_classifier(name: str, tiny_clip: TinyClip) -> None:
    method, support = fitted(name, tiny_clip)
    for logits in method.logits(support.inputs[0]).values():
        assert logits.shape == (24, CLASSES)
        assert torch.isfinite(logits).all()


def test_the_same_seed_fits_the_same_method(name: str, tiny_clip: TinyClip) -> None:
    first, support = fitted(name, tiny_clip)
    second, _ = fitted(name, tiny_clip)
    for classifier, logits in first.logits(support.inputs[0]).items():
        assert torch.equal(logits, second.logits(support.inputs[0])[classifier])


def test_fitting_does_not_change_the_encoder(name: str, tiny_clip: TinyClip) -> None:
    encoder, (images, _) = encoder_of(name, tiny_clip), images_of(name, 6)
    before = encoder.encode_images(encoder.preprocess(images))
    fitted(name, tiny_clip)
    assert torch.equal(before, encoder.encode_images(encoder.preprocess(images)))


def test_a_method_learns_the_classes_of_its_support(name: str, tiny_clip: TinyClip) -> None:
    method, _ = fitted(name, tiny_clip)
    images, labels = images_of(name, 60, seed=9)
    accuracies = {
        classifier: float((logits.argmax(dim=1) == labels).double().mean())
        for classifier, logits in method.logits(method.embed(images)).items()
    }
    if name == "clip-zero-shot":  # its texts are random, and it learns nothing
        assert set(accuracies) == {"zero-shot"}
    else:
        assert min(accuracies.values()) > 0.8, accuracies


def test_a_saved_method_predicts_the_same_after_loading(
    name: str, tiny_clip: TinyClip, tmp_path: Path
) -> None:
    method, support = fitted(name, tiny_clip)
    header = checkpoint.Header(
        name, SETTINGS[name], ("a", "b", "c"), "none", method.encoder.key, 3, 4, {"seed": 0}
    )
    path = tmp_path / "cell.safetensors"
    checkpoint.save(method, header, path)
    first_bytes = path.read_bytes()
    checkpoint.save(method, header, path)
    assert path.read_bytes() == first_bytes
    loaded, loaded_header = checkpoint.load(path, encoder_of(name, tiny_clip))
    assert loaded_header.classes == ("a", "b", "c")
    kept = loaded.state()
    assert all(torch.equal(kept[name], value) for name, value in method.state().items())
    for classifier, logits in method.logits(support.inputs[0]).items():
        again = loaded.logits(support.inputs[0])[classifier]
        assert torch.allclose(logits, again, rtol=0, atol=1e-5), "rounding depends on memory layout"


@pytest.mark.parametrize(("region", "channels"), [(None, 3), ("attention", 4), ("dual", 6)])
def test_the_trained_blocks_of_the_encoder_suffice_to_fit(region: str | None, channels: int) -> None:
    encoder = small_vit().with_region(region, 2.0) if region else small_vit()
    method = ClipFewShot(encoder, **{**SETTINGS["clip-few-shot"], "epochs": 2})
    images, labels = images_of("clip-lora", 6)
    support = support_of(method, images.repeat(1, 1, 1, 2)[..., :channels], labels)
    whole = fit(method, support, None, seed=0).state()
    method.encoder = encoder_to_fit(method, encoder)
    assert len(pickle.dumps(method.encoder)) < len(pickle.dumps(encoder)) / 2
    part = fit(method, support, None, seed=0).state()
    assert all(torch.equal(part[name], value) for name, value in whole.items())


def test_a_checkpoint_refuses_other_clip_weights(tiny_clip: TinyClip, tmp_path: Path) -> None:
    method, _ = fitted("clip-linear-probe", tiny_clip)
    header = checkpoint.Header("clip-linear-probe", {"folds": 3}, ("a", "b", "c"), "none", "other", 0, 0, {})
    checkpoint.save(method, header, tmp_path / "cell.safetensors")
    with pytest.raises(ValueError, match=r"cell\.safetensors was fitted on CLIP weights other"):
        checkpoint.load(tmp_path / "cell.safetensors", tiny_clip)  # pyright: ignore[reportArgumentType]
    (tmp_path / "torn.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(ValueError, match="is not a MedFocusCLIP checkpoint"):
        checkpoint.load(tmp_path / "torn.safetensors", tiny_clip)  # pyright: ignore[reportArgumentType]


# --- MedFocusCLIP's equations -------------------------------------------------------------------


def random_features(rows: int, seed: int, dim: int = 8) -> Tensor:
    return functional.normalize(
        torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1
    )


def test_contrastive_loss_matches_a_numpy_computation() -> None:
    images, text = random_features(7, 0).numpy(), random_features(4, 1).numpy()
    labels, s = np.array([0, 0, 2, 3, 2, 0, 3]), 7.0  # class 1 is not in the batch
    present = [0, 2, 3]
    i2t = -np.mean(
        [
            s * images[i] @ text[y] - np.log(sum(np.exp(s * images[i] @ text[k]) for k in present))
            for i, y in enumerate(labels)
        ]
    )
    t2i = 0.0
    for k in present:
        scores = np.array([s * image @ text[k] for image in images])
        log_share = scores - np.log(np.exp(scores).sum())
        t2i -= np.mean([log_share[i] for i in range(7) if labels[i] == k]) / len(present)
    ours = contrastive_loss(torch.tensor(images), torch.tensor(text), torch.tensor(labels), s)
    assert float(ours) == pytest.approx((i2t + t2i) / 2, abs=1e-12)


def test_images_of_one_class_are_not_negatives_of_each_other() -> None:
    """With a perfect embedding i2t is 0, while the diagonal form stays at ln 2 or above."""
    text = torch.eye(3, 8, dtype=torch.float64)
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    t2i_floor = np.log(2) / 2  # two positives share each column, and t2i has weight ½
    assert float(contrastive_loss(text[labels], text, labels, 50.0)) == pytest.approx(t2i_floor, abs=1e-6)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_permuting_the_labels_leaves_the_fused_features_byte_identical(
    fusion: str, tiny_clip: TinyClip
) -> None:
    """F uses the texts of all classes and never the label, so M before training does not depend on labels."""
    classifier = FusedClassifier(8, 3, fusion=fusion, head="cosine", hidden=4, logit_scale=10.0)
    images, text = random_features(12, 0).float(), random_features(3, 1).float()
    labels = torch.arange(12) % 3
    none = torch.empty(12, 0)
    before = classifier.fuse(images, none, text)
    classifier.loss(images, none, text, labels.flip(0), 0.5)
    assert classifier.fuse(images, none, text).detach().numpy().tobytes() == before.detach().numpy().tobytes()


def test_on_random_labels_the_method_is_at_chance(tiny_clip: TinyClip) -> None:
    """Held-out accuracy on random labels is at chance, so no label leaks into M or C."""
    correct = count = 0
    for seed in range(6):
        method = MedFocusClip(tiny_clip, **SETTINGS["medfocusclip"])  # pyright: ignore[reportArgumentType]
        images, labels = coloured_images(60, seed)
        shuffled = labels[torch.randperm(60, generator=torch.Generator().manual_seed(seed))]
        support = support_of(method, images, shuffled)
        result = validate(method, support, None, folds=3, seed=seed)
        correct, count = correct + result.correct, count + result.count
    assert count == 360
    assert abs(correct / count - 1 / CLASSES) < 0.08  # three standard errors


def test_softmax_text_fusion_matches_its_formula() -> None:
    images, text, s, gamma = random_features(5, 0), random_features(3, 1), 6.0, 0.7
    fusion = FUSIONS["softmax-text"](8, 3).double()
    with torch.no_grad():
        fusion.gamma.fill_(gamma)  # pyright: ignore[reportCallIssue]
    scores = s * images.numpy() @ text.numpy().T
    a = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    m = images.numpy() + gamma * a @ text.numpy()
    m /= np.linalg.norm(m, axis=1, keepdims=True)
    np.testing.assert_allclose(fusion(images, text, s).detach().numpy(), m, atol=1e-12)


def test_fusion_and_adapters_start_as_the_identity_on_the_image_features() -> None:
    images, text = random_features(5, 0).float(), random_features(3, 1).float()
    assert torch.allclose(Adapter(8, 4)(images), images, atol=1e-6)
    assert torch.allclose(FUSIONS["softmax-text"](8, 3)(images, text, 6.0), images, atol=1e-6)


def test_the_contrastive_term_trains_the_adapters_but_not_the_head() -> None:
    classifier = FusedClassifier(8, 3, fusion="softmax-text", head="cosine", hidden=4, logit_scale=10.0)
    images, text, labels = random_features(6, 0).float(), random_features(3, 1).float(), torch.arange(6) % 3
    classifier.loss(images, torch.empty(6, 0), text, labels, 1.0).backward()
    gradient = classifier.image_adapter.up.weight.grad
    assert gradient is not None and gradient.abs().max() > 0
    assert classifier.head.weight.grad is None or classifier.head.weight.grad.abs().max() == 0


def test_lambda_is_chosen_inside_the_support(tiny_clip: TinyClip) -> None:
    settings = {**SETTINGS["medfocusclip"], "head": "linear", "contrastive_weights": (0.0, 1.0)}
    method = MedFocusClip(tiny_clip, **settings)  # pyright: ignore[reportArgumentType]
    method.fit(support_of(method, *coloured_images(24)), torch.Generator().manual_seed(0))
    assert method.contrastive_weight_ == 0.0  # at λ = 1 the head does not train


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("head", HEADS)
def test_every_fusion_and_head_learns(fusion: str, head: str, tiny_clip: TinyClip) -> None:
    settings = {**SETTINGS["medfocusclip"], "fusion": fusion, "head": head}
    method = MedFocusClip(tiny_clip, **settings)  # pyright: ignore[reportArgumentType]
    method.fit(support_of(method, *coloured_images(24)), torch.Generator().manual_seed(0))
    images, labels = coloured_images(60, seed=9)
    for logits in method.logits(method.embed(images)).values():
        assert float((logits.argmax(dim=1) == labels).double().mean()) > 0.8


def test_the_cosine_head_starts_at_the_class_means() -> None:
    fused, labels = random_features(9, 0), torch.arange(9) % 3
    head = HEADS["cosine"](8, 3, 10.0).double()
    head.imprint(fused, labels)
    means = np.stack([fused.numpy()[labels.numpy() == k].mean(axis=0) for k in range(3)])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    np.testing.assert_allclose(head(fused).detach().numpy(), 10 * fused.numpy() @ means.T, atol=1e-9)


def test_settings_out_of_range_name_the_field() -> None:
    settings = SETTINGS["medfocusclip"]
    with pytest.raises(
        ValueError, match="medfocusclip: fusion is 'sum'; use one of softmax-text, gated, concat"
    ):
        MedFocusClip(TinyClip(), **{**settings, "fusion": "sum"})  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"contrastive_weights is \[2\]; give one or more values"):
        MedFocusClip(TinyClip(), **{**settings, "contrastive_weights": (2,)})  # pyright: ignore[reportArgumentType]


# --- validation, the probe and the training loop ------------------------------------------------


def test_folds_keep_groups_whole_and_classes_present() -> None:
    labels = np.repeat([0, 1], 12)
    groups = np.arange(24) // 2  # two images per group
    pairs = stratified_folds(labels, groups, 3, seed=0)
    assert len(pairs) == 3
    assert sorted(np.concatenate([held for _, held in pairs]).tolist()) == list(range(24))
    for rest, held in pairs:
        assert not set(groups[rest]) & set(groups[held])
        assert set(labels[rest]) == {0, 1}


def test_without_folds_the_probe_is_the_published_one_on_features_of_length_ten() -> None:
    labels, groups = np.array([0, 0, 1, 2, 2]), np.array([0, 1, 2, 3, 3])
    assert stratified_folds(labels, groups, 3, seed=0) == []
    features = random_features(5, 0, dim=16).numpy()
    probe = fit_probe(features, labels, groups, folds=3, seed=0)
    assert probe.C == C_WITHOUT_VALIDATION
    published = LogisticRegression(C=0.316, tol=1e-8).fit(10 * features, labels)  # CLIP's raw features
    np.testing.assert_allclose(
        softmax(probe.logits(features), axis=1), published.predict_proba(10 * features), atol=1e-3
    )


def test_one_image_per_class_leaves_the_probabilities_of_pixels_close_to_even(tiny_clip: TinyClip) -> None:
    method = METHODS["pixels"](tiny_clip, **SETTINGS["pixels"])  # pyright: ignore[reportArgumentType]
    images, labels = coloured_images(30)
    method.fit(support_of(method, images[:3], labels[:3]), torch.Generator().manual_seed(0))
    confidence = next(iter(method.logits(method.embed(images[3:])).values())).softmax(dim=1).max(dim=1).values
    assert confidence.mean() < 0.6  # with C as for CLIP's features: above 0.9


def test_probe_on_two_classes_agrees_with_scikit_learn() -> None:
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 5)), np.arange(40) % 2
    probe = fit_probe(x, y, np.arange(40), folds=3, seed=0, grid=(1.0,))
    reference = LogisticRegression(C=1.0, max_iter=1000).fit(x, y)
    ours = probe.logits(x)
    assert ours.shape == (40, 2)
    np.testing.assert_allclose(ours[:, 1] - ours[:, 0], reference.decision_function(x), atol=1e-8)


def test_training_descends_and_keeps_the_last_iterate() -> None:
    weight = torch.nn.Parameter(torch.tensor([5.0]))
    history = train(
        [weight],
        lambda index, view: (weight**2).sum(),
        torch.zeros(4),
        Schedule(epochs=50, batch_size=2, lr=0.2, weight_decay=0.0),
        views=1,
        generator=torch.Generator().manual_seed(0),
    )
    assert len(history) == 50
    assert history[-1] < 0.05 < history[0]
    assert float(weight.detach() ** 2) <= history[-1]  # the parameter is the last iterate


def test_max_steps_bounds_the_epochs_but_one_epoch_always_runs() -> None:
    def epochs(images: int) -> int:
        weight = torch.nn.Parameter(torch.ones(()))
        history = train(
            [weight], lambda index, view: weight**2, torch.zeros(images),
            Schedule(epochs=30, batch_size=32, lr=0.1, weight_decay=0.0),
            views=1, generator=torch.Generator().manual_seed(0), max_steps=40,
        )  # fmt: skip
        return len(history)

    assert epochs(20) == 30  # one step per epoch
    assert epochs(60) == 20  # two steps per epoch
    assert epochs(32 * 50) == 1  # an epoch is longer than the bound


def test_validation_predicts_every_image_once_with_a_method_fitted_without_it(tiny_clip: TinyClip) -> None:
    seen: list[set[int]] = []

    class Remembers:
        """Predicts the labels of its training images, and 0 for all other images."""

        def fit(self, support: Support, generator: torch.Generator) -> Remembers:
            self.known = {float(x): int(y) for x, y in zip(support.inputs[0], support.labels, strict=True)}
            return self

        def logits(self, inputs: Tensor) -> dict[str, Tensor]:
            seen.append({float(x) for x in inputs} & set(self.known))  # pyright: ignore[reportArgumentType]
            answers = torch.tensor([self.known.get(float(x), 0) for x in inputs])
            return {"main": functional.one_hot(answers, 2).float()}

    labels = torch.arange(20) % 2
    support = Support(torch.arange(20.0)[None], labels, torch.arange(20), torch.zeros(2, 4))
    result = validate(Remembers(), support, None, folds=4, seed=0)  # pyright: ignore[reportArgumentType]
    assert (result.correct, result.count) == (10, 20)  # every held-out image gets class 0
    assert result.logits.shape == (20, 2) and sorted(result.labels.tolist()) == [0] * 10 + [1] * 10
    assert seen[::2] == [set()] * 4  # between them, each fold's model predicts its own images


@pytest.mark.parametrize("scale", [0.01, 100.0])
def test_the_temperature_does_not_depend_on_the_scale_that_a_fold_chooses(scale: float) -> None:
    """Each class has its own mean; the model of fewer than 24 images has logits of another scale."""
    rng = np.random.default_rng(0)
    labels = torch.arange(24) % 3
    inputs = functional.one_hot(labels, 3).double() + torch.from_numpy(rng.standard_normal((24, 3)))
    support = Support(inputs[None], labels, torch.arange(24), torch.zeros(3, 4))

    class Identity:
        """Returns its inputs, scaled."""

        learned = 1.0

        def fit(self, support: Support, generator: torch.Generator) -> Identity:
            self.learned = 1.0 if len(support.labels) == 24 else scale
            return self

        def logits(self, inputs: Tensor) -> dict[str, Tensor]:
            return {"main": self.learned * inputs}

    method: Any = Identity()
    validation = validate(method, support, None, folds=4, seed=0)
    fitted = fit(method, support, None, seed=0)
    assert calibration(fitted, support, validation, 0.9).temperature == pytest.approx(
        fit_temperature(inputs.numpy(), labels.numpy()), rel=0.1
    )


def test_validation_is_empty_if_a_class_has_one_image_or_without_folds() -> None:
    support = Support(torch.zeros(1, 3, 2), torch.tensor([0, 0, 1]), torch.arange(3), torch.zeros(2, 4))
    never: Any = None  # because nothing is fitted
    for folds in (3, 0):
        result = validate(never, support, None, folds=folds, seed=0)
        assert (result.correct, result.count, result.logits.shape) == (0, 0, (0, 2))


class Brightness:
    """A segmenter with the mean brightness of ``grid`` x ``grid`` cells as image features."""

    features_key = "mean brightness"

    def describe(self, images: Sequence[np.ndarray], grid: int) -> Tensor:
        grey = torch.from_numpy(np.stack(images)).float().mean(3)[:, None]
        return functional.adaptive_avg_pool2d(grey, grid).flatten(1)


@pytest.mark.parametrize(
    "changed",
    [
        {"layers": (1, 4)},
        {"segmenter_grid": 4},
        {"layers": (2,), "segmenter_grid": 3},
        {"tuning": "full", "blocks": 2, "epochs": 3},
    ],
)
def test_the_state_holds_patch_statistics_and_trained_blocks(changed: dict[str, Any], tmp_path: Path) -> None:
    encoder = small_vit().with_segmenter(Brightness())
    settings = {**SETTINGS["medfocusclip"], **changed}
    method = MedFocusClip(encoder, **settings)  # pyright: ignore[reportArgumentType]
    images, labels = coloured_images(12)
    images = images.repeat_interleave(6, 1).repeat_interleave(6, 2)  # (N, 96, 96, 3)
    text = functional.normalize(torch.randn(CLASSES, encoder.dim), dim=-1)
    support = support_of(method, images, labels, text)
    method.fit(support, torch.Generator().manual_seed(0))
    loaded = MedFocusClip(encoder, **settings).load(method.state())  # pyright: ignore[reportArgumentType]
    for name, logits in method.logits(support.inputs[0]).items():
        assert torch.allclose(loaded.logits(support.inputs[0])[name], logits, rtol=0, atol=1e-5)
    if "blocks" in changed:
        assert "classifier.tower.visual.proj" in method.state()
        assert not torch.equal(method.state()["classifier.tower.visual.proj"], encoder.model.visual.proj)  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    else:
        fused = method.encode(support.inputs[0])  # pyright: ignore[reportAttributeAccessIssue]
        patches = fused[:, encoder.dim :]
        of_blocks = len(settings["layers"]) * settings["grid"] ** 2 * 128
        assert patches.shape[1] == of_blocks + settings["segmenter_grid"] ** 2
        assert torch.allclose(patches.mean(0), torch.zeros(patches.shape[1]), atol=1e-4)
        assert 0.5 < patches.square().sum(1).mean() < 1.1  # about the length of I


def test_segmenter_features_need_a_segmenter_and_change_the_key_of_the_encoder() -> None:
    encoder = small_vit()
    assert encoder.with_segmenter(Brightness()).key != encoder.key
    method = MedFocusClip(encoder, **{**SETTINGS["medfocusclip"], "segmenter_grid": 4})  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"no segmenter with image features.*Set masks\.segmenter to sam2"):
        method.embed(torch.zeros(1, 96, 96, 3, dtype=torch.uint8))


def test_a_probe_on_more_features_than_images_matches_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    features, labels = rng.standard_normal((20, 60)), np.arange(20) % 3
    features[np.arange(20), labels] += 2
    ours = fit_probe(features, labels, np.arange(20), folds=3, seed=0, grid=(0.1,))
    theirs = LogisticRegression(C=0.1, max_iter=1000, tol=1e-8).fit(features, labels)
    np.testing.assert_allclose(ours.coef, theirs.coef_, atol=1e-3)
    assert ours.coef.shape == (3, 60)
