"""Claims about Prefect, DVC and MLflow together: the flow and `dvc repro` run the same stages."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from flows.cli import app
from flows.pipeline import pipeline
from flows.stages import evaluate, finetune
from flows.stages.dvc import StageBusyError, reproduce
from flows.study import models
from flows.study.cells import Cell, best_cell
from flows.study.dataset import EncodedDataset
from flows.study.study import open_study
from medfocus.focus.controls import CONTROLS, focus_of, mask_source_of
from medfocus.focus.view import view_key
from medfocus.images.geometry import Frame
from medfocus.masks.quality import center_box
from medfocus.storage.redaction import RedactedError, unredacted
from medfocus.tracking.provenance import lock_digest
from tests.conftest import make_project, work_in


@pytest.fixture(scope="module", autouse=True)
def prefect_server() -> Iterator[None]:
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield


def dvc(*arguments: str) -> str:
    result = subprocess.run([sys.executable, "-m", "dvc", *arguments], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def edit_params(project: Path, section: str, **changes: Any) -> None:
    content = yaml.safe_load((project / "params.yaml").read_text())
    content[section] |= changes
    (project / "params.yaml").write_text(yaml.safe_dump(content))


def stale_stages(project: Path) -> set[str]:
    from dvc.repo import Repo

    with Repo(str(project)) as repo:
        return {name.removeprefix("dvc.yaml:") for name in repo.status()}


def run_flow() -> dict[str, str]:
    """Run the flow in the current folder; return stage -> "done" or "unchanged"."""
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        pipeline(Path("params.yaml"))
    lines = [line.split(": ") for line in stderr.getvalue().splitlines()]
    return {line[0]: line[1] for line in lines if len(line) == 2 and line[1] in ("done", "unchanged")}


def client() -> mlflow.MlflowClient:
    return mlflow.MlflowClient(f"sqlite:///{Path('mlflow.db').resolve()}")


def runs() -> list[Any]:
    experiments = [experiment.experiment_id for experiment in client().search_experiments()]
    return list(client().search_runs(experiments, max_results=1000))


def parent_runs() -> list[Any]:
    return [run for run in runs() if "mlflow.parentRunId" not in run.data.tags]


def cell_runs() -> dict[str, Any]:
    """Return id -> run of every cell."""
    return {run.info.run_id: run for run in runs() if "mlflow.parentRunId" in run.data.tags}


def table(path: str | Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# --- One finished run, which these tests share and leave unchanged


@pytest.fixture(scope="module")
def first_run(prefect_server: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """Run the flow in a new project; return the project and the state of each stage."""
    folder = tmp_path_factory.mktemp("finished")
    make_project(folder)
    with pytest.MonkeyPatch.context() as patch:
        work_in(folder, patch)
        return folder, run_flow()


@pytest.fixture
def finished(first_run: tuple[Path, dict[str, str]], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change to the project in which the flow has run."""
    work_in(first_run[0], monkeypatch)
    return first_run[0]


@pytest.fixture
def copied(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change to a copy of the finished project, which the test may change."""
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder, symlinks=True)
    work_in(folder, monkeypatch)
    return folder


@pytest.fixture
def champion(finished: Path) -> Any:
    """Return the registered version that is champion."""
    name = "medfocus-phantom-breast"
    version = client().get_model_version_by_alias(name, "champion").version
    return client().get_model_version(name, version)


def test_the_flow_runs_every_stage_in_order(first_run: tuple[Path, dict[str, str]]) -> None:
    states = first_run[1]
    assert set(states.values()) == {"done"}
    assert [name.split("@")[0] for name in states] == [
        *("phantoms", "ingest", "duplicates", "splits", "masks", "finetune", "evaluate")
    ]


def test_after_the_flow_dvc_has_nothing_to_do(finished: Path) -> None:
    assert "up to date" in dvc("status")
    assert "Running stage" not in dvc("repro")


def test_a_second_run_of_the_flow_runs_no_stage(finished: Path) -> None:
    assert set(run_flow().values()) == {"unchanged"}


def test_the_flow_restores_study_csv_from_the_outputs_of_dvc(finished: Path) -> None:
    path = Path("reports/study.csv")
    before = path.read_text()
    path.unlink()
    run_flow()
    assert path.read_text() == before


def test_study_csv_has_the_documented_columns(finished: Path) -> None:
    assert list(table("reports/study.csv")[0]) == [
        *("dataset", "method", "focus", "percent_of_train", "seed", "accuracy", "balanced_accuracy"),
        *("macro_f1", "auroc", "ece", "ece_uncalibrated", "temperature", "coverage", "mean_set_size"),
        *("test_set", "n_train", "n_test", "mlflow_run_id"),
    ]


def test_cells_are_calibrated_except_zero_shot_controls_and_heads(finished: Path) -> None:
    rows = table("reports/study.csv")
    plain = {"clip-zero-shot", "medfocusclip-head"}
    for row in rows:
        calibrated = row["method"] not in plain and row["focus"] != "shuffled"
        assert (row["temperature"] != "1.0000") == calibrated
        assert (row["coverage"] != "nan") == calibrated  # 12 and 24 images suffice for 90 %
        assert row["ece"] == row["ece_uncalibrated"] or calibrated
    assert any(row["ece"] != row["ece_uncalibrated"] for row in rows)


def test_the_best_cell_is_of_the_largest_support(finished: Path, champion: Any) -> None:
    assert cell_runs()[champion.run_id].data.params["support"] == "100%"


def test_every_cell_is_one_mlflow_run_that_study_csv_names(finished: Path) -> None:
    cells = cell_runs()
    assert len(cells) == 4 + 1 + 12  # pixels; zero-shot once; medfocusclip with three focus modes
    assert cells.keys() == {row["mlflow_run_id"] for row in table("reports/study.csv")}


def test_every_run_is_finished(finished: Path) -> None:
    assert {run.info.status for run in runs()} == {"FINISHED"}
    assert len(parent_runs()) == 1


def test_mlflow_and_study_csv_have_the_same_accuracy(finished: Path) -> None:
    cells = cell_runs()
    for row in table("reports/study.csv"):
        if row["method"] != "medfocusclip-head":
            accuracy = cells[row["mlflow_run_id"]].data.metrics["accuracy"]
            assert accuracy == pytest.approx(float(row["accuracy"]), abs=5e-5)


def test_metrics_json_has_the_champion_s_scores_with_4_decimals(finished: Path, champion: Any) -> None:
    best = json.loads(Path("reports/metrics.json").read_text())["phantom-breast"]
    run = cell_runs()[champion.run_id]
    assert best.pop("best") == run.info.run_name
    assert best == {name: round(run.data.metrics[name], 4) for name in best}
    assert {"accuracy", "macro_f1", "auroc", "ece", "validation_accuracy"} <= best.keys()
    assert {"ece_uncalibrated", "temperature", "coverage", "mean_set_size"} <= best.keys()


def test_predictions_are_probabilities_with_6_decimals(finished: Path) -> None:
    with np.load("data/predictions/phantom-breast.npz", allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files if name.startswith("phantom-breast ")}
    assert len(arrays) == 17 + 12  # medfocusclip has two classifiers
    for values in arrays.values():
        assert values.dtype == np.float32 and values.shape == (15, 3)
        assert np.array_equal(values, np.round(values.astype(np.float64), 6).astype(np.float32))
        np.testing.assert_allclose(values.sum(axis=1), 1, atol=3e-6)


def test_the_page_shows_the_study_without_scripts(finished: Path) -> None:
    page = Path("reports/index.html").read_text(encoding="utf-8")
    assert "medfocusclip (multiply)" in page and 'id="reproduce"' in page
    assert "<script" not in page


def test_attribution_explains_an_image_of_each_class_for_two_systems(finished: Path) -> None:
    lines = table("reports/attribution.csv")
    assert {line["label"] for line in lines} == {"benign", "cyst", "malignant"}
    assert len({line["system"] for line in lines}) == 2
    assert {line["pointing"] for line in lines} <= {"hit", "miss"}
    assert all(0 <= float(line["inside"]) <= 1 for line in lines)


def test_costs_csv_has_a_line_for_each_cell(finished: Path) -> None:
    lines = table("reports/costs.csv")
    assert len(lines) == len(cell_runs())
    assert any(float(line["fit_seconds"]) > 0 for line in lines)


def test_plots_csv_has_a_curve_over_the_percents(finished: Path) -> None:
    lines = table("reports/plots.csv")
    assert {line["percent_of_train"] for line in lines} == {"50", "100"}
    assert {line["test_set"] for line in lines} == {"phantom-breast, official"}


def test_the_first_version_becomes_champion_with_its_cards(finished: Path, champion: Any) -> None:
    assert str(champion.version) == "1"
    assert champion.run_id in cell_runs()
    assert {"card.md", "datasheet.md"} <= {file.path for file in client().list_artifacts(champion.run_id)}
    assert "[card.md](get-artifact?path=card.md&" in champion.description


def test_the_card_shows_the_metrics_of_the_run(finished: Path, champion: Any) -> None:
    metrics = cell_runs()[champion.run_id].data.metrics
    shown = CliRunner().invoke(app, ["models", "card", "medfocus-phantom-breast@1"]).output
    assert f"| accuracy | {100 * metrics['accuracy']:.1f} % [" in shown
    for name, metric in (("macro-F1", "macro_f1"), ("AUROC", "auroc"), ("calibration error", "ece")):
        assert f"| {name} | {metrics[metric]:.3f} |" in shown
    assert f"| calibration error without temperature | {metrics['ece_uncalibrated']:.3f} |" in shown
    assert f"| coverage | {100 * metrics['coverage']:.1f} % [" in shown


def test_the_data_sheet_names_the_images_and_the_data(finished: Path) -> None:
    sheet = CliRunner().invoke(app, ["models", "card", "medfocus-phantom-breast", "--sheet"]).output
    assert "39 breast_ultrasound images in 3 classes" in sheet
    assert lock_digest(finished) in sheet


def test_the_study_s_run_keeps_the_page_the_table_and_the_figures(finished: Path) -> None:
    (parent,) = parent_runs()
    files = {file.path for file in client().list_artifacts(parent.info.run_id)}
    assert {"index.html", "study.csv", "figures"} <= files


def checkpoints() -> dict[str, bytes]:
    """Return the name of every cell -> its checkpoint."""
    return {path.name: path.read_bytes() for path in sorted(Path("data/checkpoints").rglob("*.safetensors"))}


def fit_again() -> dict[str, bytes]:
    """Fit every cell without the cache; return the checkpoints."""
    shutil.rmtree(".cache/cells", ignore_errors=True)
    finetune.main([])
    return checkpoints()


def test_without_the_test_images_fine_tuning_gives_the_same_checkpoints(copied: Path) -> None:
    fitted = checkpoints()
    assert len(fitted) == 17
    shutil.rmtree("data/phantoms/breast_ultrasound/test")
    assert fit_again() == fitted


def test_a_shuffled_mask_is_another_image_s_and_each_mask_is_used_once(finished: Path) -> None:
    dataset = encoded()
    shas = [record.sha256 for record in dataset.records.values()]
    partners = [dataset._partner[sha] for sha in shas]
    assert all(sha != partner for sha, partner in zip(shas, partners, strict=True))
    assert sorted(partners) == sorted(shas)
    for sha, partner in zip(shas, partners, strict=True):
        assert np.array_equal(dataset._mask(sha, mask_source_of("shuffled")), dataset.masks[partner])


def test_a_control_without_shuffling_has_the_image_s_own_mask_or_the_center_box(finished: Path) -> None:
    dataset = encoded()
    for record in dataset.records.values():
        own = dataset.masks[record.sha256]
        assert np.array_equal(dataset._mask(record.sha256, mask_source_of("multiply")), own)
        assert np.array_equal(dataset._mask(record.sha256, mask_source_of("inverse")), own)
        assert np.array_equal(dataset._mask(record.sha256, mask_source_of("center-box")), center_box(96, 96))


def test_every_control_has_a_view_and_a_cache_entry_of_its_own(finished: Path) -> None:
    dataset = encoded()
    record, frame = next(iter(dataset.records.values())), Frame(96)
    modes = ("none", "multiply", *CONTROLS)
    views = {dataset._view(record, 0, mode).tobytes() for mode in modes}
    assert len(views) == len(modes)
    keys = {
        (dataset._view_name(record, mode, 0), view_key(focus=focus_of(mode), frame=frame, feather=0.01))
        for mode in modes
    }
    assert len(keys) == len(modes)


def encoded() -> EncodedDataset:
    study = open_study(Path("params.yaml"))
    return EncodedDataset(study, "phantom-breast", models.build_encoder(study))


# --- Tests that change a project


def test_a_changed_value_makes_only_dependent_stages_stale(project: Path) -> None:
    run_flow()
    masks = Path("data/masks/phantom-breast/mask_status.csv").read_text()
    edit_params(project, "views", feather=0.02)
    assert stale_stages(project) == {"finetune", "evaluate"}
    edit_params(project, "views", feather=0.01)
    assert stale_stages(project) == set()
    edit_params(project, "masks", min_area=0.3)
    assert stale_stages(project) == {"masks@phantom-breast"}
    changed = run_flow()
    assert {name for name, state in changed.items() if state == "done"} == {
        "masks@phantom-breast",
        "finetune",
        "evaluate",
    }
    assert Path("data/masks/phantom-breast/mask_status.csv").read_text() != masks
    edit_params(project, "masks", min_area=0.01)
    run_flow()
    assert Path("data/masks/phantom-breast/mask_status.csv").read_text() == masks
    edit_params(project, "gate", margin=0.02)
    assert stale_stages(project) == set()


def reproduce_data(project: Path) -> None:
    """Run the stages before fine-tuning."""
    names = open_study(project / "params.yaml").stages
    for stage in names[: names.index("finetune")]:
        reproduce(project, stage)


def permute_labels(manifest: Path, paths: set[str]) -> None:
    """Rotate the labels of the images at ``paths`` by five places."""
    lines = table(manifest)
    chosen = [line for line in lines if line["path"] in paths]
    labels = [line["label"] for line in chosen]
    for line, label in zip(chosen, [*labels[5:], *labels[:5]], strict=True):
        line["label"] = label
    with manifest.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


def test_permuting_the_labels_of_test_images_changes_no_checkpoint(project: Path) -> None:
    edit_params(
        project,
        "study",
        methods={
            "pixels": ["none"],
            "k-nn": ["none"],
            "clip-linear-probe": ["none"],
            "clip-adapter": ["none"],
            "tip-adapter-f": ["none"],
            "medfocusclip": ["multiply"],
        },
        seeds=[0],
    )
    methods = yaml.safe_load((project / "params.yaml").read_text())["methods"]
    methods["clip-adapter"] |= {"ratios": [0.2, 0.6], "lr": [0.001, 0.01], "epochs": 5}
    methods["medfocusclip"] |= {"contrastive_weights": [0.0, 0.5], "lr": [0.001, 0.003], "epochs": 3}
    edit_params(project, "methods", **methods)
    reproduce_data(project)
    manifest, splits = Path("data/manifests/phantom-breast.csv"), encoded().splits
    manifest.chmod(0o644)  # DVC write-protects its outputs
    before = fit_again()
    permute_labels(manifest, set(splits.test))
    assert fit_again() == before
    permute_labels(manifest, set(splits.train))  # the check above would detect labels of test images
    after = fit_again()
    assert after.keys() == before.keys()
    assert all(after[name] != content for name, content in before.items())


def test_a_control_is_never_the_best_cell(project: Path) -> None:
    study = open_study(Path("params.yaml"))
    controls = [Cell("phantom-breast", "medfocusclip", focus, "100%", 0) for focus in CONTROLS]
    with pytest.raises(ValueError, match="no cell of phantom-breast was validated"):
        best_cell(study, "phantom-breast", controls)  # their checkpoints do not exist and are not opened


def test_after_dvc_repro_the_flow_has_nothing_to_do(project: Path) -> None:
    assert dvc("repro").count("Running stage") == 7
    assert set(run_flow().values()) == {"unchanged"}


def start_flow(project: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "flows.pipeline"],
        cwd=project,
        env={**os.environ, "PREFECT_HOME": str(project / ".prefect")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_killed_flow_repeats_only_unfinished_cells(project: Path) -> None:
    process = start_flow(project)
    cells = project / ".cache/cells"
    end = time.monotonic() + 200
    while len(list(cells.glob("*/*.safetensors"))) < 3 and time.monotonic() < end and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)  # returns when its workers have ended, too
    finished = {path: path.stat().st_mtime_ns for path in cells.glob("*/*.safetensors")}
    assert len(finished) >= 3
    again = start_flow(project)
    output = again.communicate(timeout=400)
    assert again.returncode == 0, output
    assert "masks@phantom-breast: unchanged" in output[1]
    for path, written in finished.items():
        assert path.stat().st_mtime_ns == written
    assert "up to date" in dvc("status")


def test_a_failure_names_its_stage_and_leaves_no_run_running(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: object) -> bytes:
        raise RuntimeError("the disk is full")

    edit_params(copied, "tracking", experiment="another")
    monkeypatch.setattr(evaluate, "accuracy_figure", fails)
    place = r"^RuntimeError at flows\.stages\.evaluate:\d+; its text is on the"
    with pytest.raises(RedactedError, match=place) as caught:
        pipeline(Path("params.yaml"))
    error = unredacted(caught.value)
    assert str(error) == "the disk is full"
    assert any("in stage evaluate of" in note for note in error.__notes__)
    assert sorted(run.info.status for run in parent_runs()) == ["FAILED", "FINISHED"]
    assert stale_stages(copied) == {"evaluate"}


def test_a_stage_locked_by_another_run_is_busy(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dvc.lock import LockError

    def held(*arguments: object, **kwargs: object) -> None:
        raise LockError("held by another")

    monkeypatch.setattr("flows.stages.dvc.Repo.reproduce", held)
    with pytest.raises(StageBusyError, match="stage finetune: held by another"):
        reproduce(project, "finetune")


def test_a_params_file_outside_the_project_becomes_a_separate_study(
    project: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    content = yaml.safe_load((project / "params.yaml").read_text())
    content["datasets"]["phantom-breast"]["root"] = "images"
    (elsewhere / "mine.yaml").write_text(yaml.safe_dump(content))
    study = open_study(elsewhere / "mine.yaml")
    assert study.folder == project / "studies/mine"
    assert (study.folder / study.root("phantom-breast")).resolve() == elsewhere / "images"
    stage_file = (study.folder / "dvc.yaml").read_text()
    assert "- code: ../.." in stage_file
    assert (
        yaml.safe_load(stage_file)["stages"] == yaml.safe_load((project / "dvc.yaml").read_text())["stages"]
    )


def test_outside_a_project_the_error_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flows.study.study import find_home

    with pytest.raises(FileNotFoundError, match=r"is not in a project\. Change to one, or create one"):
        find_home(tmp_path)
