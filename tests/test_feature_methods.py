"""Few-shot methods on frozen features, and the pixel SVM, against NumPy computations of their formulas."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import pytest
import torch
from sklearn.svm import SVC
from torch import Tensor
from torch.nn import functional

from flows.study.cells import Cell, plan
from flows.study.methods import build_method
from flows.study.params import load_params
from medfocus.learning.folds import stratified_folds
from medfocus.learning.method import Support
from medfocus.learning.selection import Choice, candidates, choose
from medfocus.methods import METHODS
from medfocus.methods.clip import ClipLinearProbe
from medfocus.methods.clip_adapter import RATIO_WITHOUT_VALIDATION, Adapter
from medfocus.methods.lp_plus_plus import minimise, start, step_sizes
from medfocus.methods.pixels import RbfMachine
from medfocus.methods.ss_text import closed_form
from medfocus.methods.tip_adapter import ALPHA, BETA, Cache, cache_logits
from medfocus.serving import checkpoint
from tests.conftest import TinyClip
from tests.test_methods import SETTINGS, coloured_images, random_features, support_of

ROOT = Path(__file__).resolve().parents[1]
CLASSES, DIM, SCALE = 3, 8, TinyClip.logit_scale
ON_FEATURES = (
    "nearest-class-mean",
    "k-nn",
    "clip-adapter",
    "tip-adapter",
    "tip-adapter-f",
    "lp++",
    "ss-text",
    "clap",
)
NAMES = (*ON_FEATURES, "pixels-svm")


def clustered(count: int, seed: int = 0, noise: float = 0.6, views: int = 1, twins: int = 1) -> Support:
    """Return unit features around one direction per class; the text features deviate from it slightly."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) // twins % CLASSES
    centres = random_features(CLASSES, 77, DIM)

    def unit(around: Tensor, spread: float) -> Tensor:
        drawn = torch.randn(*around.shape, generator=generator, dtype=torch.float64) / DIM**0.5
        return functional.normalize(around + spread * drawn, dim=-1).float()

    inputs = unit(centres[labels].expand(views, -1, -1), noise)
    return Support(inputs, labels, torch.arange(count) // twins, unit(centres, 1.0))


def make(name: str, **settings: Any) -> Any:
    return METHODS[name](TinyClip(), **{**SETTINGS[name], **settings})  # pyright: ignore[reportArgumentType]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def only(logits: dict[str, Tensor]) -> np.ndarray:
    (values,) = logits.values()
    return values.detach().numpy()


def log_likelihood(logits: np.ndarray, labels: np.ndarray) -> float:
    return float(
        sum(
            row[y] - row.max() - np.log(np.exp(row - row.max()).sum())
            for row, y in zip(logits, labels, strict=True)
        )
    )


def fitted(name: str) -> tuple[Any, Tensor]:
    """Return a method fitted on twelve images, and inputs of other images."""
    method = make(name)
    if name == "pixels-svm":
        method.fit(support_of(method, *coloured_images(12)), seeded())
        return method, method.embed(coloured_images(9, seed=1)[0])
    return method.fit(clustered(12), seeded()), clustered(9, seed=1).inputs[0]


# --- the contract -------------------------------------------------------------------------------


@pytest.mark.parametrize("file", [ROOT / "params.yaml", *sorted(ROOT.glob("studies/*.yaml"))], ids=str)
def test_every_study_has_settings_of_every_method(file: Path) -> None:
    params = load_params(file)
    assert {params.method(name)[0] for name in params.methods} == set(METHODS)
    for name in params.methods:
        assert build_method(params, name, None).embedding
    assert plan(params)


@pytest.mark.parametrize("name", ON_FEATURES)
def test_methods_on_features_share_the_embedding_of_the_linear_probe(name: str, tiny_clip: TinyClip) -> None:
    images, _ = coloured_images(4)
    probe = ClipLinearProbe(tiny_clip, folds=3)  # pyright: ignore[reportArgumentType]
    assert make(name).embedding == probe.embedding
    assert torch.equal(make(name).embed(images), probe.embed(images))


@pytest.mark.parametrize("name", NAMES)
def test_one_image_per_class_is_enough(name: str) -> None:
    method = make(name)
    images, labels = coloured_images(CLASSES)
    support = support_of(method, images, labels) if name == "pixels-svm" else clustered(CLASSES, noise=0.1)
    logits = only(method.fit(support, seeded()).logits(support.inputs[0]))
    assert logits.shape == (CLASSES, CLASSES) and np.isfinite(logits).all()
    assert (logits.argmax(axis=1) == labels.numpy()).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_support_of_two_classes_is_enough(name: str) -> None:
    method = make(name)
    if name == "pixels-svm":
        images, labels = coloured_images(12)
        support = support_of(method, images, labels)
    else:
        support = clustered(12)
    support = support.subset(np.flatnonzero(support.labels.numpy() < 2))
    support = Support(support.inputs, support.labels, support.groups, support.text_features[:2])
    logits = only(method.fit(support, seeded()).logits(support.inputs[0]))
    assert logits.shape == (8, 2) and np.isfinite(logits).all()


@pytest.mark.parametrize("name", NAMES)
def test_the_logits_of_an_image_do_not_depend_on_its_batch(name: str) -> None:
    method, inputs = fitted(name)
    before = {key: value.clone() for key, value in method.state().items()}
    together = only(method.logits(inputs))
    alone = np.concatenate([only(method.logits(inputs[i : i + 1])) for i in range(len(inputs))])
    np.testing.assert_allclose(alone, together, atol=1e-5)
    assert all(torch.equal(value, before[key]) for key, value in method.state().items())


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_at_the_path_of_its_cell_predicts_the_same(
    name: str, tmp_path: Path, tiny_clip: TinyClip
) -> None:
    method, inputs = fitted(name)
    cell = Cell("d", name, "none", "5%", 0)
    path = tmp_path / cell.path
    settings = SETTINGS[name]
    checkpoint.save(
        method, checkpoint.Header(name, settings, ("a", "b", "c"), "none", "tiny", 0, 0, {}), path
    )
    assert path.name == f"{name}_none_5pc_0.safetensors"
    loaded, header = checkpoint.load(path, tiny_clip)  # pyright: ignore[reportArgumentType]
    assert header.method == name
    np.testing.assert_allclose(only(loaded.logits(inputs)), only(method.logits(inputs)), atol=1e-6)


@pytest.mark.parametrize("name", ["nearest-class-mean", "k-nn", "tip-adapter", "lp++", "ss-text"])
def test_a_rotation_of_features_and_texts_does_not_change_the_logits(name: str) -> None:
    turn = torch.linalg.qr(torch.randn(DIM, DIM, generator=seeded(3), dtype=torch.float64))[0].float()
    support, inputs = clustered(15), clustered(9, seed=1).inputs[0]
    turned = Support(support.inputs @ turn, support.labels, support.groups, support.text_features @ turn)
    straight = only(make(name).fit(support, seeded()).logits(inputs))
    np.testing.assert_allclose(
        only(make(name).fit(turned, seeded()).logits(inputs @ turn)), straight, atol=1e-4
    )


@pytest.mark.parametrize(
    ("name", "setting", "message"),
    [
        (
            "tip-adapter",
            {"alphas": (0.0, 1.0)},
            r"tip-adapter: alphas is \[0\.0, 1\.0\]; give one or more values",
        ),
        ("tip-adapter-f", {"betas": ()}, r"tip-adapter-f: betas is \[\]; give one or more values"),
        (
            "clip-adapter",
            {"ratios": (1.2,)},
            r"clip-adapter: ratios is \[1\.2\]; give one or more values of r",
        ),
        ("clip-adapter", {"reduction": 0}, "clip-adapter: reduction is 0; use 1 or more"),
        ("k-nn", {"neighbours": (0, 3)}, r"k-nn: neighbours is \[0, 3\]; give one or more values above 0"),
        (
            "pixels-svm",
            {"gammas": (-1.0,)},
            r"pixels-svm: gammas is \[-1\.0\]; give one or more values above 0",
        ),
    ],
)
def test_settings_out_of_range_name_the_field(name: str, setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(name, **setting)


# --- choices inside the support -----------------------------------------------------------------


def test_choose_takes_the_best_held_out_log_likelihood_and_keeps_groups_on_one_side() -> None:
    support = clustered(24, twins=2)
    sides: list[tuple[set[int], set[int]]] = []

    def held_out_logits(fit: Support, held: Support) -> Iterable[Tensor]:
        sides.append((set(fit.groups.tolist()), set(held.groups.tolist())))
        right = functional.one_hot(held.labels, CLASSES).float()
        yield from (sharpness * right for sharpness in (1.0, -1.0, 3.0))

    chosen = choose(["soft", "wrong", "sharp"], support, held_out_logits, folds=3, seed=0, otherwise="none")
    assert chosen == "sharp"
    assert len(sides) == 3 and set.union(*(held for _, held in sides)) == set(support.groups.tolist())
    assert not any(fit & held for fit, held in sides)  # a group stays on one side


def test_a_calibrated_choice_looks_past_overconfidence() -> None:
    support = clustered(90)

    def held_out_logits(fit: Support, held: Support) -> Iterable[Tensor]:
        for sharpness, period in ((30.0, 10), (3.0, 5)):  # every 10th and every 5th answer is wrong
            answers = held.labels.clone()
            answers[::period] = (answers[::period] + 1) % CLASSES
            yield sharpness * functional.one_hot(answers, CLASSES).float()

    for calibrated, best in ((True, "more accurate"), (False, "less confident")):
        chosen = choose(
            ["more accurate", "less confident"],
            support,
            held_out_logits,
            folds=3,
            seed=0,
            otherwise="none",
            calibrated=calibrated,
        )
        assert chosen == best


@dataclass
class Sharpened:
    """Predicts the label in the first feature; its learning rate scales the logits."""

    lr: float
    seen: ClassVar[list[int]] = []

    def fit(self, support: Support, generator: torch.Generator) -> Sharpened:
        self.seen.append(len(support.labels))
        return self

    def logits(self, inputs: Tensor) -> dict[str, Tensor]:
        return {"main": self.lr * functional.one_hot(inputs[:, 0].long(), CLASSES).float()}


def labelled(labels: Tensor) -> Support:
    inputs = labels.float()[None, :, None]
    return Support(inputs, labels, torch.arange(len(labels)), torch.zeros(CLASSES, DIM))


def test_the_learning_rate_does_best_on_held_out_images_of_a_part_of_the_support() -> None:
    support = labelled(torch.arange(90) % CLASSES)
    Sharpened.seen.clear()
    rates = Choice(candidates({"lr": (0.1, 5.0, 1.0)}), folds=2, images=30)
    chosen = rates.fit(Sharpened(0.7), support, seeded())  # pyright: ignore[reportArgumentType]
    assert cast("Any", chosen).lr == 5.0
    assert Sharpened.seen == [15] * 6 + [90]  # three rates on each half of 30, then the best rate on all


@pytest.mark.parametrize("counts", [(1, 60, 60), (2, 60, 60), (500, 2, 3)])
def test_the_learning_rate_is_chosen_for_any_class_sizes(counts: tuple[int, ...]) -> None:
    labels = torch.arange(CLASSES).repeat_interleave(torch.tensor(counts))
    rates = Choice(candidates({"lr": (0.1, 5.0)}), folds=2, images=20)
    chosen = rates.fit(Sharpened(0.7), labelled(labels), seeded())  # pyright: ignore[reportArgumentType]
    assert cast("Any", chosen).lr == (0.1 if min(counts) == 1 else 5.0)  # without a fold, the first rate


def test_the_candidates_are_all_combinations_of_the_listed_values() -> None:
    listed = {"tuning": ("adapter", "full"), "lr": [1, 2], "layers": (3, 4), "folds": 2}
    assert [tuple(one.values()) for one in candidates(listed)] == [
        ("adapter", 1), ("adapter", 2), ("full", 1), ("full", 2)
    ]  # fmt: skip
    assert candidates({"tuning": "full", "lr": 1}) == ({},)
    with pytest.raises(ValueError, match="lr is an empty list; give one value, or several"):
        candidates({"lr": ()})


def test_without_folds_the_published_value_is_used_and_one_candidate_needs_no_folds() -> None:
    one_each = clustered(CLASSES)

    def never(fit: Support, held: Support) -> Iterable[Tensor]:
        pytest.fail("no fold can be made")

    assert choose([1, 2], one_each, never, folds=3, seed=0, otherwise=7) == 7
    assert choose([1], clustered(12), never, folds=3, seed=0, otherwise=7) == 1
    for name in ("tip-adapter", "tip-adapter-f"):
        method = make(name).fit(one_each, seeded())
        assert (method.alpha_, method.beta_) == (ALPHA, BETA) == (1.0, 1.0)
    assert make("clip-adapter", ratios=(0.5, 0.9)).fit(one_each, seeded()).ratio_ == RATIO_WITHOUT_VALIDATION
    assert make("k-nn").fit(one_each, seeded()).neighbours_ == 1


# --- Tip-Adapter --------------------------------------------------------------------------------


def tip_by_hand(support: Support, inputs: np.ndarray, alpha: float, beta: float) -> np.ndarray:
    keys, text = support.inputs.double().mean(dim=0).numpy(), support.text_features.double().numpy()
    out = np.zeros((len(inputs), CLASSES))
    for i, f in enumerate(inputs):
        for k in range(CLASSES):
            out[i, k] = SCALE * f @ text[k]
            for key, label in zip(keys, support.labels.tolist(), strict=True):
                near = np.exp(-beta * (1 - f @ key / np.linalg.norm(key)))
                out[i, k] += alpha * near * (label == k)
    return out


def test_tip_adapter_matches_its_formula_with_the_mean_of_the_views_as_key() -> None:
    support, inputs = clustered(12, views=3), clustered(5, seed=1).inputs[0]
    method = make("tip-adapter", alphas=(2.5,), betas=(4.0,)).fit(support, seeded())
    by_hand = tip_by_hand(support, inputs.double().numpy(), 2.5, 4.0)
    np.testing.assert_allclose(only(method.logits(inputs)), by_hand, atol=1e-5)


def test_a_distant_key_has_no_vote_and_an_equal_key_has_one_vote() -> None:
    votes = cache_logits(torch.tensor([[1.0, 0.0, -1.0]]), torch.eye(3), beta=50.0)
    assert torch.allclose(votes, torch.tensor([[1.0, 0.0, 0.0]]))


def test_tip_adapter_chooses_alpha_and_beta_on_the_folds_of_its_support() -> None:
    support, grid = clustered(30, noise=1.2), (0.1, 1.0, 10.0)
    method = make("tip-adapter", alphas=grid, betas=grid).fit(support, seeded(4))
    scores: dict[tuple[float, float], float] = {}
    labels, groups = support.labels.numpy(), support.groups.numpy()
    for fit, held in stratified_folds(labels, groups, 3, seed=4):
        for alpha in grid:
            for beta in grid:
                images = support.inputs[0, held].double().numpy()
                logits = tip_by_hand(support.subset(fit), images, alpha, beta)
                score = log_likelihood(logits, labels[held])
                scores[alpha, beta] = scores.get((alpha, beta), 0.0) + score
    assert (method.alpha_, method.beta_) == max(scores, key=lambda pair: scores[pair])


def test_tip_adapter_f_with_a_learning_rate_of_0_is_tip_adapter() -> None:
    support, inputs = clustered(18, views=2), clustered(5, seed=1).inputs[0]
    plain = make("tip-adapter").fit(support, seeded())
    still = make("tip-adapter-f", lr=0.0).fit(support, seeded())
    assert (still.alpha_, still.beta_) == (plain.alpha_, plain.beta_)
    np.testing.assert_allclose(only(still.logits(inputs)), only(plain.logits(inputs)), atol=1e-12)


def test_tip_adapter_f_trains_only_its_keys_and_its_loss_falls() -> None:
    support = clustered(18, noise=1.2)
    method = make("tip-adapter-f", lr=1e-2, alphas=(ALPHA,), betas=(BETA,)).fit(support, seeded())
    cache = Cache.of(support, SCALE)
    assert not torch.equal(method.cache_.keys, cache.keys)
    assert torch.equal(method.cache_.values, cache.values)
    assert torch.equal(method.cache_.text_features, support.text_features)
    labels = support.labels.numpy()
    untrained = cache.logits(support.inputs[0], ALPHA, BETA).numpy()
    trained = only(method.logits(support.inputs[0]))
    assert log_likelihood(trained, labels) > log_likelihood(untrained, labels)


def test_tip_adapter_f_keeps_the_last_iterate_of_adamw() -> None:
    """With one batch per epoch, random draws have no effect, so NumPy can repeat the steps."""
    support, epochs = clustered(9), 5
    method = make("tip-adapter-f", epochs=epochs, alphas=(ALPHA,), betas=(BETA,)).fit(support, seeded())
    features, text = support.inputs[0].double(), support.text_features.double()
    onehot = functional.one_hot(support.labels, CLASSES).double()
    keys = features.clone().requires_grad_()
    first, second = torch.zeros_like(keys), torch.zeros_like(keys)
    for t in range(1, epochs + 1):
        logits = SCALE * features @ text.T + torch.exp(features @ keys.T - 1) @ onehot
        loss = -(logits.log_softmax(dim=1) * onehot).sum() / len(features)
        (gradient,) = torch.autograd.grad(loss, keys)
        lr = 1e-3 * (1 + np.cos(np.pi * (t - 1) / epochs)) / 2
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        step = first / (1 - 0.9**t) / ((second / (1 - 0.999**t)).sqrt() + 1e-8)
        keys = (keys * (1 - lr * 1e-2) - lr * step).detach().requires_grad_()
    np.testing.assert_allclose(method.cache_.keys.numpy(), keys.detach().numpy(), atol=1e-5)


# --- CLIP-Adapter -------------------------------------------------------------------------------


def test_clip_adapter_matches_its_formula() -> None:
    support, inputs = clustered(12), clustered(5, seed=1).inputs[0]
    method = make("clip-adapter", ratios=(0.3,), reduction=4).fit(support, seeded())
    w1, w2 = (method.state()[f"adapter.{name}.weight"].double().numpy() for name in ("down", "up"))
    assert w1.shape == (DIM // 4, DIM) and w2.shape == (DIM, DIM // 4)
    text = support.text_features.double().numpy()
    for i, f in enumerate(inputs.double().numpy()):
        adapted = 0.3 * np.maximum(w2 @ np.maximum(w1 @ f, 0), 0) + 0.7 * f
        adapted /= np.linalg.norm(adapted)
        np.testing.assert_allclose(method.encode(inputs)[i].numpy(), adapted, atol=1e-5)
        np.testing.assert_allclose(only(method.logits(inputs))[i], SCALE * text @ adapted, atol=1e-4)


def test_clip_adapter_with_a_ratio_of_0_is_clip_zero_shot() -> None:
    support, inputs = clustered(12), clustered(5, seed=1).inputs[0]
    logits = only(make("clip-adapter", ratios=(0.0,)).fit(support, seeded()).logits(inputs))
    zero_shot = make("clip-zero-shot").fit(support, seeded()).logits(inputs)
    np.testing.assert_allclose(logits, only(zero_shot), atol=1e-5)
    assert torch.allclose(Adapter(DIM, 4, 0.0)(inputs), inputs, atol=1e-6)


def test_the_ratio_of_clip_adapter_is_chosen_inside_the_support() -> None:
    support = clustered(24, noise=0.3)
    misleading = support.text_features.roll(1, dims=0)  # zero-shot predicts a wrong class for every image
    support = Support(support.inputs, support.labels, support.groups, misleading)
    assert make("clip-adapter", ratios=(0.0, 0.8)).fit(support, seeded()).ratio_ == 0.8


# --- LP++ ---------------------------------------------------------------------------------------


def test_lp_plus_plus_starts_at_class_sums_and_the_mean_cosine_to_the_text_of_the_class() -> None:
    support = clustered(10)  # classes of 4, 3 and 3 images
    features, text = support.inputs[0].double(), support.text_features.double()
    weight, alpha = start(features, functional.one_hot(support.labels, CLASSES).double(), text)
    own = [features[support.labels == k] for k in range(CLASSES)]
    np.testing.assert_allclose(weight.numpy(), np.stack([f.numpy().sum(axis=0) for f in own]), atol=1e-12)
    mean = np.mean([(f.numpy() @ t.numpy()).mean() for f, t in zip(own, text, strict=True)])
    np.testing.assert_allclose(alpha.numpy(), np.full(CLASSES, 250 * mean), atol=1e-9)


def test_the_step_sizes_of_lp_plus_plus_follow_from_bounds_on_the_curvature() -> None:
    support = clustered(20)
    features, text = support.inputs[0].double(), support.text_features.double()
    step_w, step_alpha = step_sizes(features, text)
    assert step_w == pytest.approx(4 * 20 / np.linalg.eigvalsh(features.numpy().T @ features.numpy())[-1])
    weight = torch.zeros(CLASSES, DIM, dtype=torch.float64)
    alpha = torch.zeros(CLASSES, dtype=torch.float64)

    def loss(weight: Tensor, alpha: Tensor) -> Tensor:
        return functional.cross_entropy(features @ (weight + alpha[:, None] * text).T, support.labels)

    for seed in range(5):  # the bounds hold at every point
        spread = random_features(CLASSES, seed, DIM) * seed
        of_w = torch.autograd.functional.hessian(lambda w: loss(w, alpha), weight + spread)
        one_class = of_w[0, :, 0]  # pyright: ignore[reportArgumentType, reportCallIssue]
        assert torch.linalg.eigvalsh(one_class)[-1] <= 1 / step_w + 1e-12
        whole = of_w.reshape(CLASSES * DIM, -1)  # pyright: ignore[reportAttributeAccessIssue]
        assert torch.linalg.eigvalsh(whole)[-1] <= 2 / step_w + 1e-12
        of_alpha = torch.autograd.functional.hessian(lambda a: loss(weight, a), alpha + spread[:, 0])
        assert torch.linalg.eigvalsh(of_alpha)[-1] <= 1 / (8 * step_alpha) + 1e-12  # pyright: ignore[reportArgumentType]


def test_lp_plus_plus_takes_the_gradient_steps_of_its_loss() -> None:
    """The reference steps use automatic differentiation of the cross-entropy."""
    support = clustered(14, noise=1.2)
    features, text = support.inputs[0].double(), support.text_features.double()
    weight, alpha = start(features, functional.one_hot(support.labels, CLASSES).double(), text)
    step_w, step_alpha = step_sizes(features, text)
    velocity = torch.zeros_like(weight)
    for step in range(25):
        weight, alpha = weight.detach().requires_grad_(), alpha.detach().requires_grad_()
        logits = torch.stack(
            [(features * (weight[k] + alpha[k] * text[k])).sum(1) for k in range(CLASSES)], 1
        )
        functional.cross_entropy(logits, support.labels).backward()
        assert weight.grad is not None and alpha.grad is not None
        velocity = 0.9 * velocity + weight.grad
        weight = weight - step_w * velocity
        alpha = alpha - step_alpha * alpha.grad if (step + 1) % 10 == 0 else alpha
    ours = minimise(features, support.labels, text, 25)
    np.testing.assert_allclose(ours[0].numpy(), weight.detach().numpy(), atol=1e-9)
    np.testing.assert_allclose(ours[1].numpy(), alpha.detach().numpy(), atol=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_the_steps_of_lp_plus_plus_stay_stable(seed: int) -> None:
    support = clustered(30, seed=seed, noise=3.0)
    features, text = support.inputs[0].double(), support.text_features.double()
    losses = []
    for steps in (0, 30, 300, 3000):
        weight, alpha = minimise(features, support.labels, text, steps)
        logits = features @ (weight + alpha[:, None] * text).T
        losses.append(float(functional.cross_entropy(logits, support.labels)))
    assert losses == sorted(losses, reverse=True)


# --- SS-Text ------------------------------------------------------------------------------------


def test_the_closed_form_of_ss_text_minimises_its_objective() -> None:
    support = clustered(11)
    features, text = support.inputs[0].double(), support.text_features.double()
    penalty = torch.tensor([0.1, 0.5, 2.0], dtype=torch.float64)
    weight = closed_form(features, support.labels, text, SCALE, penalty).requires_grad_()
    fit = -SCALE * (features * weight[support.labels]).sum(dim=1).mean()
    near = (penalty * (weight - text).square().sum(dim=1)).sum() / 2
    (gradient,) = torch.autograd.grad(fit + near, weight)
    assert gradient.abs().max() < 1e-12


def test_ss_text_is_text_plus_scaled_class_sums() -> None:
    support, inputs = clustered(11), clustered(5, seed=1).inputs[0]
    logits = only(make("ss-text").fit(support, seeded()).logits(inputs))
    features, text = support.inputs[0].double().numpy(), support.text_features.double().numpy()
    for k in range(CLASSES):
        w = text[k] + SCALE * features[support.labels.numpy() == k].sum(axis=0)  # λ = 1/N
        np.testing.assert_allclose(
            logits[:, k], SCALE * inputs.double().numpy() @ w / np.linalg.norm(w), atol=1e-6
        )


# --- nearest class mean, k nearest neighbours ---------------------------------------------------


def test_nearest_class_mean_is_the_cosine_to_the_class_means() -> None:
    support, inputs = clustered(11), clustered(5, seed=1).inputs[0]
    logits = only(make("nearest-class-mean").fit(support, seeded()).logits(inputs))
    features = support.inputs[0].double().numpy()
    for k in range(CLASSES):
        mean = features[support.labels.numpy() == k].mean(axis=0)
        cosine = inputs.double().numpy() @ mean / np.linalg.norm(mean)
        np.testing.assert_allclose(logits[:, k], SCALE * cosine, atol=1e-5)


def knn_by_hand(support: Support, inputs: np.ndarray, neighbours: int) -> np.ndarray:
    features, labels = support.inputs[0].double().numpy(), support.labels.numpy()
    out = np.full((len(inputs), CLASSES), 1 / CLASSES)
    for i, f in enumerate(inputs):
        order = np.argsort([-f @ g / np.linalg.norm(f) / np.linalg.norm(g) for g in features])
        for rank, j in enumerate(order[:neighbours], start=1):
            out[i, labels[j]] += 1 + 0.001 / rank
    return np.log(out / out.sum(axis=1, keepdims=True))


@pytest.mark.parametrize("neighbours", [1, 3, 7, 99])
def test_nearest_neighbours_matches_its_formula_and_gives_probabilities(
    neighbours: int,
) -> None:
    support, inputs = clustered(14, noise=1.2), clustered(6, seed=1).inputs[0]
    logits = only(make("k-nn", neighbours=(neighbours,)).fit(support, seeded()).logits(inputs))
    np.testing.assert_allclose(logits, knn_by_hand(support, inputs.double().numpy(), neighbours), atol=1e-9)
    np.testing.assert_allclose(np.exp(logits).sum(axis=1), 1, atol=1e-12)


def test_of_two_classes_with_equally_many_neighbours_the_nearer_class_wins() -> None:
    angles = torch.tensor([0.3, 0.1, 0.2, 0.4])  # to the test image
    features = torch.stack([angles.cos(), angles.sin()], dim=1)
    support = Support(features[None], torch.tensor([0, 1, 2, 0]), torch.arange(4), torch.eye(3, 2))
    logits = make("k-nn", neighbours=(3,)).fit(support, seeded()).logits(torch.tensor([[1.0, 0.0]]))
    assert only(logits).argmax() == 1


def test_the_number_of_neighbours_is_chosen_on_the_folds_of_the_support() -> None:
    support = clustered(30, noise=2.0)
    method = make("k-nn", neighbours=(1, 3, 5, 7)).fit(support, seeded(2))
    labels, groups = support.labels.numpy(), support.groups.numpy()
    scores = dict.fromkeys((1, 3, 5, 7), 0.0)
    for fit, held in stratified_folds(labels, groups, 3, seed=2):
        for neighbours in scores:
            shares = knn_by_hand(support.subset(fit), support.inputs[0, held].double().numpy(), neighbours)
            scores[neighbours] += float(shares[np.arange(len(held)), labels[held]].sum())
    assert method.neighbours_ == max(scores, key=lambda neighbours: scores[neighbours])


# --- the SVM on pixels --------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_the_svm_reproduces_the_decision_function_of_scikit_learn(classes: int, tiny_clip: TinyClip) -> None:
    rng = np.random.default_rng(0)
    labels = np.concatenate([np.arange(classes), rng.integers(0, classes, 50)])  # classes of unequal size
    thumbnails = rng.uniform(size=(len(labels), 16)).astype(np.float32)
    thumbnails[np.arange(len(labels)), labels] += 0.5
    support = Support(
        torch.from_numpy(thumbnails)[None],
        torch.from_numpy(labels),
        torch.arange(len(labels)),
        torch.eye(classes, 8),
    )
    settings = {"side": 4, "costs": (2.0,), "gammas": (0.7,), "folds": 3}
    method = METHODS["pixels-svm"](tiny_clip, **settings).fit(support, seeded())  # pyright: ignore[reportArgumentType, reportCallIssue]
    loaded = METHODS["pixels-svm"](tiny_clip, **settings).load(method.state())  # pyright: ignore[reportArgumentType, reportCallIssue]
    tested = rng.uniform(size=(40, 16)).astype(np.float32)
    deviation = np.maximum(thumbnails.astype(float).std(axis=0), 1e-3)
    scaled = [(x - thumbnails.astype(float).mean(axis=0)) / deviation / 4 for x in (thumbnails, tested)]
    reference = SVC(C=2.0, gamma=0.7, break_ties=True).fit(scaled[0], labels)  # pyright: ignore[reportArgumentType]
    theirs = reference.decision_function(scaled[1])
    for ours in (method, loaded):
        logits = only(ours.logits(torch.from_numpy(tested)))
        assert logits.shape == (40, classes)
        np.testing.assert_allclose(logits[:, 1] - logits[:, 0] if classes == 2 else logits, theirs, atol=1e-6)
        assert (logits.argmax(axis=1) == reference.predict(scaled[1])).all()


def test_the_svm_chooses_cost_and_gamma_on_the_folds_of_its_support() -> None:
    images, labels = coloured_images(30)
    method = make("pixels-svm", costs=(0.1, 10.0), gammas=(0.01, 1.0, 50.0))
    support = support_of(method, images, labels)
    method.fit(support, seeded(1))
    pixels, targets = support.inputs[0].double().numpy(), labels.numpy()
    scores: dict[tuple[float, float], float] = {}
    for fit, held in stratified_folds(targets, support.groups.numpy(), 3, seed=1):
        mean, scale = pixels[fit].mean(axis=0), 8 * np.maximum(pixels[fit].std(axis=0), 1e-3)
        for cost in (0.1, 10.0):
            for gamma in (0.01, 1.0, 50.0):
                model = SVC(C=cost, gamma=gamma).fit((pixels[fit] - mean) / scale, targets[fit])  # pyright: ignore[reportArgumentType]
                score = log_likelihood(model.decision_function((pixels[held] - mean) / scale), targets[held])
                scores[cost, gamma] = scores.get((cost, gamma), 0.0) + score
    assert (method.cost_, method.machine_.gamma) == max(scores, key=lambda pair: scores[pair])


def test_the_svm_separates_classes_that_no_line_separates() -> None:
    corners = np.array([[0, 0], [1, 1], [0, 1], [1, 0]], dtype=float) * 2 - 1
    labels = np.array([0, 0, 1, 1])
    machine, vectors = RbfMachine.fit(corners, labels, 10.0, 1.0)
    assert (machine.logits(corners).argmax(axis=1) == labels).all()
    assert sorted(vectors.tolist()) == [0, 1, 2, 3]
