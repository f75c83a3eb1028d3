"""Each method has its published schedule and a small one; one setting chooses, and a study says which ran."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.study.methods import build_method, schedule_warning
from flows.study.params import Params, load_params
from medfocus.learning.contexts import epochs_for
from medfocus.learning.schedules import SCHEDULES, extended, scheduled
from medfocus.reports.page import render
from medfocus.reports.page_content import PageContent
from medfocus.reports.rows import StudyRow
from medfocus.serving import defaults, parameters
from medfocus.serving.estimator import MedFocusCLIP

DEFAULT = Path(__file__).resolve().parents[1] / "params.yaml"
PAPERS: dict[str, dict[str, Any]] = {  # from the papers and their public code
    "clip-adapter": {"ratios": [0.2], "reduction": 4, "batch_size": 32},
    "clip-lora": {
        "rank": 2,
        "alpha": 1,
        "dropout": 0.25,
        "steps_per_shot": 500,
        "max_steps": 500 * 16,
        "batch_size": 32,
        "lr": 2e-4,
        "weight_decay": 0.01,
    },
    "coop": {
        "contexts": 16,
        "start": "",
        "class_token": "end",
        "class_specific": False,
        "epochs": [50, 100, 200],
        "max_steps": None,
        "batch_size": 32,
        "lr": 0.002,
        "warmup": 1,
        "weight_decay": 5e-4,
    },
    "cocoop": {
        "contexts": 4,
        "start": "a photo of a",
        "reduction": 16,
        "epochs": 10,
        "max_steps": None,
        "batch_size": 1,
        "lr": 0.002,
        "warmup": 1,
        "weight_decay": 5e-4,
    },
    "tip-adapter-f": {"epochs": 20, "batch_size": 256, "lr": 0.001, "weight_decay": 0.01},
    "lp++": {"steps": 300},
}
SMALL: dict[str, dict[str, Any]] = {  # with these values the phantoms' scores were measured
    "clip-lora": {"max_steps": 40, "lr": 0.002},
    "coop": {"epochs": 200, "max_steps": 200, "lr": [0.002, 0.02]},
    "coop-4": {"epochs": 200, "max_steps": 200, "lr": [0.002, 0.02], "contexts": 4},
    "cocoop": {"epochs": 10, "max_steps": 200, "lr": [0.002, 0.02]},
    "tip-adapter-f": {"epochs": 20, "lr": [0.001, 0.01]},
    "resnet": {"epochs": 30, "max_steps": 60},
    "swin": {"max_steps": 60, "lr": 0.0003},
    "medfocusclip-lora": {"epochs": 20, "lr": 0.001},
}


def with_schedule(schedule: str, params: Params | None = None) -> Params:
    params = params or load_params(DEFAULT)
    return replace(params, study=replace(params.study, schedule=schedule))  # pyright: ignore[reportArgumentType]


def write(path: Path, content: object) -> Path:
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", PAPERS)
def test_the_published_schedule_has_the_values_of_the_paper(name: str) -> None:
    settings = with_schedule("published").method(name)[1]
    assert {key: settings[key] for key in PAPERS[name]} == PAPERS[name]
    assert "small" not in settings


@pytest.mark.parametrize("name", SMALL)
def test_the_embedded_study_runs_the_small_schedule(name: str) -> None:
    params = load_params(DEFAULT)
    settings = params.method(name)[1]
    assert params.study.schedule == "small"
    assert {key: settings[key] for key in SMALL[name]} == SMALL[name]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_method_can_be_built_under_both_schedules(schedule: str) -> None:
    params = with_schedule(schedule)
    for name in params.methods:
        method = build_method(params, name, None)
        assert set(method.settings) == {*params.method(name)[1], "flip"}, "small adds no hyperparameter"


def test_a_small_value_replaces_the_published_one_only_under_the_small_schedule() -> None:
    section = {"steps": 300, "lr": 0.1, "small": {"steps": 5}}
    assert scheduled(section, "published") == {"steps": 300, "lr": 0.1}
    assert scheduled(section, "small") == {"steps": 5, "lr": 0.1}


def test_an_own_value_holds_for_both_schedules_unless_it_is_in_the_own_small() -> None:
    base = {"steps": 300, "lr": 0.1, "decay": 0.0, "small": {"steps": 5, "lr": 0.2}}
    assert scheduled(extended(base, {"lr": 7}), "small") == {"steps": 5, "lr": 7, "decay": 0.0}
    own = extended(base, {"lr": 7, "small": {"lr": 8, "decay": 1}})
    assert scheduled(own, "small") == {"steps": 5, "lr": 8, "decay": 1}
    assert scheduled(own, "published") == {"steps": 300, "lr": 7, "decay": 0.0}
    assert extended(base, {"steps": 1, "lr": 7}) == {"steps": 1, "lr": 7, "decay": 0.0}


def test_a_study_that_sets_a_value_gets_it_under_the_small_schedule_of_the_file_it_extends(
    tmp_path: Path,
) -> None:
    write(tmp_path / "params.yaml", yaml.safe_load(DEFAULT.read_text()))
    methods = {"coop": {"max_steps": 7}, "quick": {"like": "clip-lora", "lr": 0.5}}
    child = {"extends": "params.yaml", "methods": methods}
    params = load_params(write(tmp_path / "mine.yaml", child))
    assert params.method("coop")[1]["max_steps"] == 7
    assert params.method("coop")[1]["lr"] == [0.002, 0.02]
    assert params.method("coop-4")[1]["max_steps"] == 7
    quick = params.method("quick")[1]
    assert (quick["lr"], quick["max_steps"], quick["rank"]) == (0.5, 40, 2)


@pytest.mark.parametrize("small", [5, ["lr"], None])
def test_a_small_that_is_no_mapping_is_refused(tmp_path: Path, small: object) -> None:
    write(tmp_path / "params.yaml", yaml.safe_load(DEFAULT.read_text()))
    child = {"extends": "params.yaml", "methods": {"coop": {"small": small}}}
    with pytest.raises(ValueError, match=r"methods\.coop\.small is .*; give hyperparameters, or remove it"):
        load_params(write(tmp_path / "mine.yaml", child))


def test_an_unknown_schedule_is_refused(tmp_path: Path) -> None:
    content = yaml.safe_load(DEFAULT.read_text())
    content["study"]["schedule"] = "tiny"
    with pytest.raises(
        ValueError, match=r"study\.schedule is 'tiny': input should be 'published' or 'small'"
    ):
        load_params(write(tmp_path / "params.yaml", content))
    with pytest.raises(ValueError, match="schedule is 'tiny'; use one of published, small"):
        parameters.check(MedFocusCLIP(schedule="tiny"))


@pytest.mark.parametrize(("shots", "epochs"), [(1, 50), (1.5, 50), (2, 100), (4, 100), (8, 200), (300, 200)])
def test_the_published_epochs_of_coop_grow_with_the_shots(shots: float, epochs: int) -> None:
    assert epochs_for(shots, (50, 100, 200)) == epochs
    coop = build_method(with_schedule("published"), "coop", None)
    assert coop.schedule_for(round(10 * shots), 10).epochs == epochs  # pyright: ignore[reportAttributeAccessIssue]


def test_the_classifier_takes_its_defaults_from_its_schedule() -> None:
    assert defaults.method_settings("clip-lora", "published")["lr"] == PAPERS["clip-lora"]["lr"]
    assert parameters.check(MedFocusCLIP(method="clip-lora"))["max_steps"] == 40
    published = MedFocusCLIP(method="clip-lora", schedule="published", settings={"rank": 3})
    assert parameters.check(published) == {**PAPERS["clip-lora"], "rank": 3}


def test_a_schedule_that_hardly_fits_the_weights_is_named_with_its_methods() -> None:
    params = load_params(DEFAULT)
    assert schedule_warning(params) == ""  # no method of the embedded study has a small schedule
    methods = {"clip-linear-probe": ("none",), "coop-4": ("none",), "clip-lora": ("none",)}
    params = replace(params, study=replace(params.study, methods=methods))
    assert schedule_warning(params) == ""
    full = replace(params, clip=replace(params.clip, model="ViT-B-16", pretrained="openai"))
    assert schedule_warning(full) == (
        "params.yaml: study.schedule is small, for the embedded models, but clip.model is ViT-B-16. If this "
        "is a mistake, set it to published; it changes coop-4, clip-lora."
    )
    assert schedule_warning(with_schedule("published", full)) == ""
    assert "for full-size weights, but clip.model is pocket" in schedule_warning(
        with_schedule("published", params)
    )


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_page_says_which_schedule_ran(schedule: str) -> None:
    row = StudyRow(
        dataset="brain", method="coop", focus="none", percent_of_train=5.0, seed=0, accuracy=0.5,
        balanced_accuracy=0.5, macro_f1=0.5, auroc=0.5, ece=0.1, ece_uncalibrated=0.1, temperature=1.0,
        coverage=0.9, mean_set_size=1.0, test_set="official", n_train=6, n_test=30,
    )  # fmt: skip
    page = render(PageContent("study", rows=[row], schedule=schedule))
    assert f"<li>{schedule} schedule</li>" in page
    assert f"Methods ran with their {schedule} schedules" in page
