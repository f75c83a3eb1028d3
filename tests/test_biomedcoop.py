"""BiomedCoOp against NumPy computations of its losses, and the files of its texts."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor
from torch.nn.functional import normalize

from flows.study.params import load_params
from flows.study.study import open_study
from medfocus.clip.build import build_clip
from medfocus.clip.encoder import ClipEncoder
from medfocus.methods.biomedcoop import BiomedCoOp, consistency, distillation, selected, teacher
from tests.test_prompt_learning import NAMES, START, ends, seeded, support_of, walk, words

ROOT = Path(__file__).resolve().parents[1]
TEXTS = {
    "normal": ["a clear lung", "no lesion", "a healthy image"],
    "benign_mass": ["a smooth lesion", "a round mass", "a bright mass"],
    "malignant": ["a dark lesion", "an irregular mass", "a rough mass"],
}
SETTINGS: dict[str, Any] = {
    "texts": TEXTS, "consistency": 0.7, "distillation": 1.3, "tau": 1.0, "contexts": 4, "start": START,
    "epochs": 1, "max_steps": 1, "batch_size": 9, "lr": 1.0, "warmup": 0, "weight_decay": 0.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def clip() -> ClipEncoder:
    return build_clip("pocket", "pocket")


def unit(*shape: int, seed: int = 0) -> np.ndarray:
    drawn = np.random.default_rng(seed).normal(size=shape)
    return drawn / np.linalg.norm(drawn, axis=-1, keepdims=True)


def shares(scores: np.ndarray) -> np.ndarray:
    powers = np.exp(scores - scores.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def published_choice(scores: np.ndarray, tau: float) -> np.ndarray:
    """Select by the public code's steps: distance from the median, then standardised."""
    median = np.median(scores)
    z = (scores - median) / np.median(np.abs(scores - median))
    return np.abs((z - z.mean()) / z.std(ddof=1)) <= tau


def teacher_by_hand(features: np.ndarray, ensemble: np.ndarray, s: float, tau: float) -> np.ndarray:
    scores = np.array([(s * features @ texts.T).max(axis=1).mean() for texts in ensemble.swapaxes(0, 1)])
    means = ensemble[:, published_choice(scores, tau)].mean(axis=1)
    return s * features @ (means / np.linalg.norm(means, axis=1, keepdims=True)).T


# --- the losses -----------------------------------------------------------------------------------


def test_consistency_is_the_mean_squared_distance_to_the_normalised_mean_text() -> None:
    learnt, ensemble = unit(3, 6), unit(3, 5, 6, seed=1)
    means = ensemble.mean(axis=1)
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    ours = consistency(torch.from_numpy(learnt), torch.from_numpy(ensemble))
    assert float(ours) == pytest.approx(((learnt - means) ** 2).sum() / 18, rel=1e-12)


@pytest.mark.parametrize("tau", [1.0, 1.5, 2.0])
def test_texts_are_selected_as_in_the_public_code(tau: float) -> None:
    for seed in range(20):
        scores = np.random.default_rng(seed).normal(30, 2, size=12) ** 2
        ours = selected(torch.from_numpy(scores), tau).numpy()
        np.testing.assert_array_equal(ours, published_choice(scores, tau))
        assert ours.any()


@pytest.mark.parametrize("count", [1, 2, 4])
def test_with_up_to_four_texts_none_is_left_out(count: int) -> None:
    for seed in range(20):
        assert selected(torch.randn(count, generator=seeded(seed), dtype=torch.float64), 1.5).all()
    assert selected(torch.full((count,), 3.0), 1.5).all()


def test_the_teacher_is_zero_shot_with_the_mean_of_the_selected_texts() -> None:
    features, ensemble = unit(7, 6, seed=2), unit(3, 9, 6, seed=3)
    ours = teacher(torch.from_numpy(features), torch.from_numpy(ensemble), 20.0, 1.0)
    np.testing.assert_allclose(ours.numpy(), teacher_by_hand(features, ensemble, 20.0, 1.0), atol=1e-12)


def test_distillation_is_the_divergence_from_the_teacher_over_the_classes() -> None:
    rng = np.random.default_rng(4)
    student, by = rng.normal(size=(5, 3)), rng.normal(size=(5, 3))
    p, q = shares(by), shares(student)
    expected = (p * (np.log(p) - np.log(q))).sum() / 15
    assert float(distillation(torch.from_numpy(student), torch.from_numpy(by))) == pytest.approx(expected)
    assert float(distillation(torch.from_numpy(by), torch.from_numpy(by))) == pytest.approx(0, abs=1e-15)


def test_a_training_step_follows_the_gradient_of_the_three_losses(clip: ClipEncoder) -> None:
    """The reference encodes the learned prompts by the modules of the text tower, one by one."""
    support = support_of(clip, count=9, views=1)
    features, labels = support.inputs[0], support.labels
    start, end = ends(clip)
    contexts = words(clip, START).detach().requires_grad_()
    named = [words(clip, f"{name.replace('_', ' ')}.") for name in NAMES]
    learnt = walk(clip, [torch.cat([start, contexts, name, end]) for name in named])
    ensemble = np.stack([clip.encode_texts(TEXTS[name]).numpy() for name in NAMES]).astype(np.float64)
    by = torch.from_numpy(teacher_by_hand(features.double().numpy(), ensemble, clip.logit_scale, 1.0))
    logits = clip.logit_scale * features @ learnt.T
    means = normalize(torch.from_numpy(ensemble).mean(dim=1), dim=-1)
    share = by.softmax(dim=1)
    loss = -logits.log_softmax(dim=1)[torch.arange(9), labels].mean()
    loss = loss + 0.7 * (learnt - means).square().mean()
    loss = loss + 1.3 * (share * (share.log() - logits.log_softmax(dim=1))).mean()
    loss.backward()
    assert contexts.grad is not None
    moved = BiomedCoOp(clip, **SETTINGS).fit(support, seeded()).contexts_
    step, largest = contexts.detach() - moved, contexts.grad.abs().max()  # at a learning rate of 1
    torch.testing.assert_close(step / largest, contexts.grad / largest, rtol=0, atol=5e-6)


def test_the_weights_keep_the_texts_near_the_ensemble_and_the_logits_near_the_teacher(
    clip: ClipEncoder,
) -> None:
    support = support_of(clip)
    features = support.inputs[0]

    def distances(**changes: Any) -> tuple[float, float]:
        settings = {**SETTINGS, "epochs": 40, "max_steps": None, "batch_size": 24, "lr": 0.05, **changes}
        fitted = BiomedCoOp(clip, **settings).fit(support, seeded())
        ensemble = fitted.ensemble(support)
        by = teacher(features, ensemble, clip.logit_scale, fitted.tau)
        logits = fitted.logits(features)["text"]
        return float(consistency(fitted.text_features_, ensemble)), float(distillation(logits, by))

    free = distances(consistency=0.0, distillation=0.0)
    assert distances(consistency=100.0, distillation=0.0)[0] < free[0]
    assert distances(consistency=0.0, distillation=30.0)[1] < free[1]


# --- the texts ------------------------------------------------------------------------------------


def test_without_texts_the_prompts_of_the_templates_are_the_ensemble(clip: ClipEncoder) -> None:
    prompts = tuple((f"a scan of {name}", f"a photo of {name}") for name in NAMES)
    support = dataclasses.replace(support_of(clip), prompts=prompts)
    method = BiomedCoOp(clip, **{**SETTINGS, "texts": {}})
    expected: Tensor = torch.stack([clip.encode_texts(list(of_class)) for of_class in prompts])
    torch.testing.assert_close(method.ensemble(support), expected, rtol=0, atol=1e-6)
    assert method.note == "texts: class templates"
    assert BiomedCoOp(clip, **SETTINGS).note == "texts: given"


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (
            {"normal": ["a"]},
            r"texts has no texts for the class 'benign_mass'. Name it as in text",
        ),
        ({**TEXTS, "normal": ["a"]}, r"the classes have 1, 3 texts. Give all the same number"),
        ({name: [] for name in NAMES}, r"the classes have 0 texts. Give all the same number"),
        ({}, r"the classes have no texts"),
    ],
)
def test_texts_that_do_not_fit_the_classes_are_refused(
    texts: dict[str, list[str]], message: str, clip: ClipEncoder
) -> None:
    with pytest.raises(ValueError, match=f"biomedcoop: {message}"):
        BiomedCoOp(clip, **{**SETTINGS, "texts": texts}).fit(support_of(clip), seeded())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tau": 0.5}, r"tau is 0\.5. Use 1 or more"),
        ({"consistency": -1}, "consistency is -1. Use 0 or more"),
        ({"distillation": -0.1}, r"distillation is -0\.1. Use 0 or more"),
        ({"texts": ["a"]}, r"texts is \['a'\]. Give a list of texts for each class"),
    ],
)
def test_settings_out_of_range_are_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"biomedcoop: {message}"):
        BiomedCoOp(None, **{**SETTINGS, **changed})  # pyright: ignore[reportArgumentType]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / ".dvc").mkdir()
    (tmp_path / "dvc.yaml").write_text((ROOT / "dvc.yaml").read_text(encoding="utf-8"))
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text(encoding="utf-8"))
    return tmp_path


def study_with(home: Path, name: str, texts: object) -> Path:
    path = home / name
    path.write_text(yaml.safe_dump({"extends": "params.yaml", "methods": {"biomedcoop": {"texts": texts}}}))
    return path


@pytest.mark.parametrize("name", ["texts.yaml", "texts.json"])
def test_a_study_holds_the_content_of_the_file_of_texts_that_it_names(home: Path, name: str) -> None:
    import json

    (home / "words").mkdir()
    written = json.dumps(TEXTS) if name.endswith("json") else yaml.safe_dump(TEXTS)
    (home / "words" / name).write_text(written)
    file = study_with(home, "mine.yaml", f"words/{name}")
    assert load_params(file).method("biomedcoop")[1]["texts"] == TEXTS
    study = open_study(file, home)  # DVC reads the copy, so a change of the texts reruns the fits
    assert (
        yaml.safe_load((study.folder / "params.yaml").read_text())["methods"]["biomedcoop"]["texts"] == TEXTS
    )


def test_a_params_yaml_that_dvc_reads_may_not_name_a_file_of_texts(home: Path) -> None:
    content = yaml.safe_load((home / "params.yaml").read_text())
    content["methods"]["biomedcoop"]["texts"] = "texts.yaml"
    (home / "texts.yaml").write_text(yaml.safe_dump(TEXTS))
    (home / "params.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=r"names a file of texts, but DVC cannot follow `texts` in a params"):
        open_study(home / "params.yaml", home)


@pytest.mark.parametrize("content", ["[a, b]", "normal: text", "normal: [1]", "normal: ["])
def test_a_damaged_file_of_texts_is_named(home: Path, content: str) -> None:
    (home / "texts.yaml").write_text(content)
    with pytest.raises(ValueError, match=r"texts\.yaml: not "):
        load_params(study_with(home, "mine.yaml", "texts.yaml"))
    with pytest.raises(FileNotFoundError, match=r"none\.yaml: no such file of texts"):
        load_params(study_with(home, "other.yaml", "none.yaml"))
