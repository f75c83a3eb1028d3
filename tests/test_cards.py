"""The model card and the data sheet: their numbers and intervals, and no names of patients."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from medfocus.datasets.duplicates import Pair
from medfocus.datasets.records import Record
from medfocus.datasets.splits import Splits
from medfocus.evaluation import metrics
from medfocus.evaluation.gate import Check
from medfocus.reports.data_sheet import DatasetFacts, data_sheet
from medfocus.reports.model_card import ModelFacts, headline, model_card

PATIENT, FILE = "MRN_0815_4711", "DOE_JANE_1970"
CLASSES = ("cyst", "solid")


def record(number: int, label: str, split: str) -> Record:
    width = 96 if number % 3 else 128
    path = f"{split}/{label}/{FILE}_{number}.png"
    return Record(path, f"{number:064x}", width, 96, "L", label, split, f"{PATIENT}_{number}")


TRAIN = [record(i, CLASSES[i % 2], "train") for i in range(30)]
TEST = [record(100 + i, CLASSES[i % 2], "test") for i in range(60)]
PATHS = [each.path for each in TEST]
LABELS = np.array([i % 2 for i in range(60)])
# 10 of 30 images of "solid" are predicted as "cyst"; among the first 40 images, 10 of 20.
WRONG = [i for i in range(40) if i % 2][:10]
PROBABILITIES = np.eye(2)[[1 - label if i in WRONG else label for i, label in enumerate(LABELS)]] * 0.8 + 0.1

# The last 20 images have both classes, so their sets contain the true class.
SETS = np.where(np.arange(60)[:, None] < 40, PROBABILITIES > 0.5, True)


@pytest.fixture
def data() -> DatasetFacts:
    twins = Pair(TRAIN[0].path, PATHS[59], "re-encoded", 0.95, "train", "test", "cyst", "solid")
    splits = Splits(
        classes=list(CLASSES),
        train=[each.path for each in TRAIN],
        test=PATHS,
        clean_test=PATHS[:40],
        conflicting=[PATHS[59]],
        straddling_twins=[PATHS[59]],
        straddling_patients=[f"{PATIENT}_3"],
        groups={},
        supports={},
    )
    return DatasetFacts(
        name="clinic",
        modality="breast_ultrasound",
        licence="",
        records=[*TRAIN, *TEST],
        splits=splits,
        pairs=[twins],
        left_out=["empty file", "same bytes under two labels"],
        reported=["test image with the same bytes in train"],
        statuses={path: "relaxed" if i < 6 else "chosen" for i, path in enumerate(PATHS)},
        coverage={path: i / 100 for i, path in enumerate(PATHS)},
        mask_lines=[{"label": "cyst", "images": "45", "coverage": "0.25", "iou": ""}],
        segmenter="Otsu's threshold",
        drift=[],
        new=None,
        provenance={"git.commit": "0a1b", "dvc.lock.sha256": "2c3d"},
    )


@pytest.fixture
def model() -> ModelFacts:
    return ModelFacts(
        name="medfocus-clinic",
        method="medfocusclip",
        focus="crop",
        support="20%",
        seed=3,
        schedule="published",
        learned_from={"cyst": 3, "solid": 25},
        settings={"epochs": 5},
        parts={"CLIP": "pocket; sha256 aa"},
        pocket=True,
        validation="17 of 28",
        probabilities=PROBABILITIES,
        labels=LABELS,
        classes=CLASSES,
        test_sets={"official": PATHS, "clean": PATHS[:40]},
        checks=[Check("recall of solid", False, "0.667", "at least 0.7")],
        reason="refused: recall of solid: 0.667, required at least 0.7",
        temperature=1.75,
        ece_uncalibrated={"official": 0.25, "clean": 0.125},
        confidence=0.9,
        sets=SETS,
        no_set="",
    )


def rows(text: str) -> dict[str, list[str]]:
    """Return the lines of all tables by their first cell."""
    cells = [re.split(r" ?\| ?", line.strip("|")) for line in text.splitlines() if line.startswith("| ")]
    return {first.strip(): [each.strip() for each in others] for first, *others in cells}


def test_the_card_names_the_schedule_and_shortens_a_long_hyperparameter(
    model: ModelFacts, data: DatasetFacts
) -> None:
    texts = {"cyst": ["a round lesion"] * 50}
    table = rows(model_card(replace(model, settings={"epochs": 5, "texts": texts}), data))
    assert table["schedule"] == ["published"]
    assert table["`epochs`"] == ["`5`"]
    assert table["`texts`"][0].startswith("`{'cyst': ['a round lesion'") and len(table["`texts`"][0]) < 210


def test_every_test_set_has_its_scores_with_wilson_intervals(model: ModelFacts, data: DatasetFacts) -> None:
    table = rows(model_card(model, data))
    low, high = (100 * end for end in metrics.wilson(50, 60))
    assert table["accuracy"] == [f"83.3 % [{low:.1f}, {high:.1f}], 50 of 60", "75.0 % [59.8, 85.8], 30 of 40"]
    assert table["solid"][:2] == ["66.7 % [48.8, 80.8], 20 of 30", "50.0 % [29.9, 70.1], 10 of 20"]
    assert table["balanced accuracy"] == ["0.833", "0.750"]
    expected = metrics.score(PROBABILITIES, LABELS)
    assert table["AUROC"][0] == f"{expected['auroc']:.3f}"
    assert table["calibration error"][0] == f"{expected['ece']:.3f}"


def test_the_sets_of_classes_have_their_promise_coverage_and_size(
    model: ModelFacts, data: DatasetFacts
) -> None:
    card = model_card(model, data)
    table = rows(card)
    assert "true class in 90 % of cases" in card
    assert table["temperature"] == ["1.750"]
    assert table["calibration error without temperature"] == ["0.250", "0.125"]
    assert table["coverage"][0].endswith("50 of 60") and table["coverage"][1].endswith("30 of 40")
    assert table["mean set size"] == ["1.33", "1.00"]
    assert table["one class"][0].endswith("40 of 60")
    assert table["right if one class"][0].endswith("30 of 40")
    assert table["coverage of solid"][1].endswith("10 of 20")
    none = replace(model, sets=None, no_set="no set: 6 labelled images cannot support a 90 % promise")
    assert "No set: 6 labelled images cannot support a 90 % promise." in model_card(none, data)


def test_failures_are_grouped_by_mask_size_and_mode_and_small_groups_are_marked(
    model: ModelFacts, data: DatasetFacts
) -> None:
    card = model_card(model, data)
    table = rows(card)
    assert table["solid predicted as cyst"] == ["33.3 % [19.2, 51.2], 10 of 30"]
    assert table["mask relaxed"] == ["50.0 % [18.8, 81.2], 3 of 6", "fewer than 20 images"]
    assert table["mask chosen"][1] == ""
    thirds = [table[f"mask covers {group}"] for group in ("up to 19.7 %", "19.7 % to 39.3 %", "above 39.3 %")]
    assert [each[0].rpartition(", ")[2] for each in thirds] == ["10 of 20", "20 of 20", "20 of 20"]
    assert {"size 128 x 96", "size 96 x 96"} <= set(table)
    assert "The same for all test images: mode." in card


def test_a_class_without_a_test_image_has_no_recall_and_no_auroc(
    model: ModelFacts, data: DatasetFacts
) -> None:
    named = ("cyst", "scar", "solid")
    spread = np.insert(PROBABILITIES, 1, 0.0, axis=1)
    without = replace(
        model,
        classes=named,
        probabilities=spread,
        labels=LABELS * 2,
        learned_from={name: 1 for name in named},
        sets=None,
        no_set="no set: too few images",
    )
    table = rows(model_card(without, data))
    assert table["scar"] == ["no image", "no image"] and table["AUROC"][0] == "not defined"
    assert "weakest class solid, recall 66.7 %" in headline("official", spread, LABELS * 2, named)


def test_the_card_states_intended_use_and_its_limits(model: ModelFacts, data: DatasetFacts) -> None:
    card = model_card(model, data)
    for line in (
        "**Not for clinical use**",
        "refused: recall of solid: 0.667, required at least 0.7",
        "| recall of solid | 0.667 | at least 0.7 | **not met** |",
        "1 of 60 test images are also in train",
        "1 patient has images in train and in test",
        "CLIP's texts know only phantoms",
        "ingestion found 1 files with contradicting labels",
        "Fewer than 20 training images: cyst (3)",
        "17 of 28 correct, out of fold",
    ):
        assert line in card
    elsewhere = replace(model, pocket=False, validation="0 of 0", learned_from={"cyst": 20, "solid": 20})
    assert not re.search("phantoms|training images: |0 of 0", model_card(elsewhere, data))


def test_the_sheet_counts_images_faults_twins_and_patients(data: DatasetFacts) -> None:
    sheet = data_sheet(data)
    for line in (
        "90 breast_ultrasound images in 2 classes. The test set is the official one.",
        "| cyst | 15 | 30 | 20 |",
        "Patients: 90 are known, for 90 of 90 images.",
        "Sizes: 2, sides of 96 to 128 pixels. Modes: L (90). Files: png (90).",
        "- left out: 1, empty file\n- left out: 1, same bytes under two labels",
        "- kept, but reported: 1, test image with the same bytes",
        "| re-encoded | 1 | 1 |",
        "| cyst | 45 | 0.250 |",
        "Licence: not stated.",
        "| git.commit | 0a1b |",
        "There was no champion",
    ):
        assert line in sheet
    drift = Check("drift of coverage", False, "0.510, p 1e-05", "at most 0.4")
    later = data_sheet(replace(data, licence="CC BY 4.0", new=12, drift=[drift]))
    assert "Licence: CC BY 4.0." in later and "12 images were added since the present champion" in later
    assert "| drift of coverage | 0.510, p 1e-05 | at most 0.4 | **not met** |" in later


def test_the_sheet_states_a_drawn_test_set_and_unknown_patients(data: DatasetFacts) -> None:
    records = [replace(each, split="", patient="") for each in data.records]
    sheet = data_sheet(replace(data, records=records))
    assert "There is no official test set. One was drawn" in sheet and "Patients: none is known." in sheet


def test_card_and_sheet_name_no_file_and_no_patient_and_are_deterministic(
    model: ModelFacts, data: DatasetFacts
) -> None:
    odd = replace(data.records[0], path=f"x/1.{FILE}")  # the suffix is a name
    planted = replace(data, records=[odd, *data.records[1:]], pairs=[], splits=replace(data.splits, train=[]))
    texts = [model_card(model, data), data_sheet(data), data_sheet(planted)]
    assert not re.search(f"{PATIENT}|{FILE}|{FILE.lower()}", "".join(texts))
    assert texts[:2] == [model_card(model, data), data_sheet(data)]
