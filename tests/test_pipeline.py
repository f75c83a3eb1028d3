"""The contract between Prefect, DVC and MLflow: one definition of the stages, run by either."""

from __future__ import annotations

import csv
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
from flows.stages import finetune
from flows.stages.dvc import StageBusyError, reproduce
from flows.study import models
from flows.study.cells import Cell, best_cell
from flows.study.dataset import EncodedDataset
from flows.study.study import open_study
from medfocus.datasets.splits import read_splits
from medfocus.focus.controls import CONTROLS, focus_of, mask_source_of
from medfocus.focus.view import view_key
from medfocus.masks.quality import center_box
from medfocus.storage.redaction import RedactedError, unredacted
from medfocus.tracking.provenance import lock_digest


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


def run_flow(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """Run the flow here; stage -> "done" or "unchanged"."""
    capsys.readouterr()
    pipeline(Path("params.yaml"))
    lines = [line.split(": ") for line in capsys.readouterr().err.splitlines()]
    return {line[0]: line[1] for line in lines if len(line) == 2 and line[1] in ("done", "unchanged")}


def runs(project: Path) -> list[Any]:
    client = mlflow.MlflowClient(f"sqlite:///{project / 'mlflow.db'}")
    return list(client.search_runs([e.experiment_id for e in client.search_experiments()], max_results=1000))


def test_flow_and_repro_share_their_stages(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The main job and all that `make run`, `dvc status` and `dvc repro` promise of each other."""
    first = run_flow(capsys)
    assert set(first.values()) == {"done"}
    assert [name.split("@")[0] for name in first] == [
        *("phantoms", "ingest", "duplicates", "splits", "masks", "finetune", "evaluate")
    ]

    assert "up to date" in dvc("status")
    assert "Running stage" not in dvc("repro")
    second = run_flow(capsys)
    assert set(second.values()) == {"unchanged"}

    with open("reports/study.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [
        *(
            "dataset",
            "method",
            "focus",
            "percent_of_train",
            "seed",
            "accuracy",
            "balanced_accuracy",
            "macro_f1",
        ),
        *("auroc", "ece", "test_set", "n_train", "n_test", "mlflow_run_id"),
    ]
    cells = [run for run in runs(project) if "mlflow.parentRunId" in run.data.tags]
    assert len(cells) == 4 + 1 + 12  # pixels; zero-shot once; medfocusclip with three focus modes
    assert {run.info.run_id for run in cells} == {row["mlflow_run_id"] for row in rows}
    by_id = {run.info.run_id: run for run in cells}
    for row in rows:
        if row["method"] != "medfocusclip-head":
            assert by_id[row["mlflow_run_id"]].data.metrics["accuracy"] == pytest.approx(
                float(row["accuracy"]), abs=5e-5
            )
    assert {run.info.status for run in runs(project)} == {"FINISHED"}

    # One page says it all; an image of each class is explained for the best cell and its other focus.
    page = Path("reports/index.html").read_text(encoding="utf-8")
    assert "medfocusclip (multiply)" in page and 'id="reproduce"' in page and "<script" not in page
    with open("reports/attribution.csv", newline="") as file:
        explained = list(csv.DictReader(file))
    assert {line["label"] for line in explained} == {"benign", "cyst", "malignant"}
    assert {line["pointing"] for line in explained} <= {"hit", "miss"}
    assert all(0 <= float(line["inside"]) <= 1 for line in explained)
    assert len({line["system"] for line in explained}) == 2
    with open("reports/costs.csv", newline="") as file:
        costs = list(csv.DictReader(file))
    assert len(costs) == len(cells) and any(float(line["fit_seconds"]) > 0 for line in costs)
    plots = list(csv.DictReader(Path("reports/plots.csv").read_text().splitlines()))
    assert {line["percent_of_train"] for line in plots} == {"50", "100"}
    assert {line["test_set"] for line in plots} == {"phantom-breast, official"}
    (parent,) = (run.info.run_id for run in runs(project) if "mlflow.parentRunId" not in run.data.tags)

    client = mlflow.MlflowClient(f"sqlite:///{project / 'mlflow.db'}")
    assert str(client.get_model_version_by_alias("medfocus-phantom-breast", "champion").version) == "1"
    version = client.get_model_version("medfocus-phantom-breast", "1")
    assert version.run_id and version.description
    assert {"card.md", "datasheet.md"} <= {file.path for file in client.list_artifacts(version.run_id)}
    assert "[card.md](get-artifact?path=card.md&" in version.description
    metrics = by_id[version.run_id].data.metrics
    shown = CliRunner().invoke(app, ["models", "card", "medfocus-phantom-breast@1"]).output
    assert f"| accuracy | {100 * metrics['accuracy']:.1f} % [" in shown
    for name, metric in (("macro-F1", "macro_f1"), ("AUROC", "auroc"), ("calibration error", "ece")):
        assert f"| {name} | {metrics[metric]:.3f} |" in shown
    sheet = CliRunner().invoke(app, ["models", "card", "medfocus-phantom-breast", "--sheet"]).output
    assert "39 breast_ultrasound images in 3 classes" in sheet
    assert lock_digest(project) in sheet
    kept = {file.path for file in client.list_artifacts(parent)}
    assert {"index.html", "study.csv", "figures"} <= kept

    # Fine-tuning reads no test image: without them the checkpoints come out the same, byte by byte.
    def checkpoints() -> dict[str, bytes]:
        return {str(p): p.read_bytes() for p in sorted(Path("data/checkpoints").rglob("*.safetensors"))}

    fitted = checkpoints()
    assert len(fitted) == 17
    shutil.rmtree(".cache/cells")
    shutil.move("data/phantoms/breast_ultrasound/test", "hidden")
    finetune.main([])
    assert checkpoints() == fitted
    shutil.move("hidden", "data/phantoms/breast_ultrasound/test")

    # The report comes back where only DVC's outputs are left.
    before = Path("reports/study.csv").read_text()
    Path("reports/study.csv").unlink()
    run_flow(capsys)
    assert Path("reports/study.csv").read_text() == before


def test_a_changed_value_makes_only_what_depends_on_it_stale(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_flow(capsys)
    masks = Path("data/masks/phantom-breast/mask_status.csv").read_text()
    edit_params(project, "views", feather=0.02)
    assert stale_stages(project) == {"finetune", "evaluate"}
    edit_params(project, "views", feather=0.01)
    assert stale_stages(project) == set()
    edit_params(project, "masks", min_area=0.3)
    assert stale_stages(project) == {"masks@phantom-breast"}
    changed = run_flow(capsys)
    assert {name for name, state in changed.items() if state == "done"} == {
        "masks@phantom-breast",
        "finetune",
        "evaluate",
    }
    assert Path("data/masks/phantom-breast/mask_status.csv").read_text() != masks
    edit_params(project, "masks", min_area=0.01)
    run_flow(capsys)
    assert Path("data/masks/phantom-breast/mask_status.csv").read_text() == masks
    edit_params(project, "gate", margin=0.02)
    assert stale_stages(project) == set()


def reproduce_data(project: Path) -> None:
    """Run the stages before fine-tuning."""
    names = open_study(project / "params.yaml").stages
    for stage in names[: names.index("finetune")]:
        reproduce(project, stage)


def test_every_control_shows_another_view_and_a_shuffled_mask_is_another_image_s(project: Path) -> None:
    reproduce_data(project)
    study = open_study(Path("params.yaml"))
    dataset = EncodedDataset(study, "phantom-breast", models.build_encoder(study))
    shas = [record.sha256 for record in dataset.records.values()]
    masked_by = [dataset._partner[sha] for sha in shas]
    assert all(own != other for own, other in zip(shas, masked_by, strict=True))
    assert sorted(masked_by) == sorted(shas), "every mask is used once: none is lost that tells a class"
    for sha, other in zip(shas, masked_by, strict=True):
        assert np.array_equal(dataset._mask(sha, mask_source_of("multiply")), dataset.masks[sha])
        assert np.array_equal(dataset._mask(sha, mask_source_of("inverse")), dataset.masks[sha])
        assert np.array_equal(dataset._mask(sha, mask_source_of("shuffled")), dataset.masks[other])
        assert np.array_equal(dataset._mask(sha, mask_source_of("center-box")), center_box(96, 96))

    record, size, feather = next(iter(dataset.records.values())), 96, 0.01
    modes = ("none", "multiply", *CONTROLS)
    views = {dataset._view(record, 0, focus=mode, size=size, feather=feather).tobytes() for mode in modes}
    assert len(views) == len(modes)
    keys = {
        (dataset._view_name(record, mode, 0), view_key(focus=focus_of(mode), size=size, feather=feather))
        for mode in modes
    }
    assert len(keys) == len(modes), "each has its own place in the cache"


def fitted_cells(project: Path) -> dict[str, bytes]:
    """The name of every cell -> its checkpoint, all of them fitted anew."""
    shutil.rmtree(project / ".cache" / "cells", ignore_errors=True)
    finetune.main([])
    files = sorted(Path("data/checkpoints").rglob("*.safetensors"))
    return {file.name: file.read_bytes() for file in files}


def permute_labels(manifest: Path, paths: set[str]) -> None:
    """Give the images at ``paths`` the labels of one another, by a turn of one."""
    with manifest.open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    chosen = [line for line in lines if line["path"] in paths]
    labels = [line["label"] for line in chosen]
    for line, label in zip(chosen, [*labels[5:], *labels[:5]], strict=True):
        line["label"] = label
    with manifest.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


def test_permuting_the_labels_of_test_changes_no_choice_and_no_weight(project: Path) -> None:
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
    manifest, splits = Path("data/manifests/phantom-breast.csv"), Path("data/splits/phantom-breast.json")
    manifest.chmod(0o644)  # DVC guards what it made
    test, train = read_splits(splits).test, read_splits(splits).train
    before = fitted_cells(project)
    permute_labels(manifest, set(test))
    assert fitted_cells(project) == before
    permute_labels(manifest, set(train))  # what the check above would see, did a label of test get in
    after = fitted_cells(project)
    assert after.keys() == before.keys()
    assert all(after[name] != content for name, content in before.items())


def test_a_control_is_never_the_best_cell(project: Path) -> None:
    study = open_study(Path("params.yaml"))
    controls = [Cell("phantom-breast", "medfocusclip", focus, "100%", 0) for focus in CONTROLS]
    with pytest.raises(ValueError, match="no cell of phantom-breast could be validated"):
        best_cell(study, "phantom-breast", controls)  # their checkpoints, which are not there, stay unopened


def test_after_a_repro_the_flow_runs_nothing(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dvc("repro").count("Running stage") == 7
    assert set(run_flow(capsys).values()) == {"unchanged"}


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
    process.communicate(timeout=60)  # returns when its workers, too, have ended
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
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.stages import evaluate

    def breaks(*arguments: object) -> bytes:
        raise RuntimeError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(evaluate.tables, "accuracy_figure", breaks)
        with pytest.raises(
            RedactedError, match=r"^RuntimeError at flows\.evaluate:\d+; its text is on the"
        ) as told:
            pipeline(Path("params.yaml"))
    error = unredacted(told.value)
    assert str(error) == "the disk is full"
    assert any("in stage evaluate of" in note for note in error.__notes__)
    states = {run.info.status for run in runs(project) if "mlflow.parentRunId" not in run.data.tags}
    assert states == {"FAILED"}
    assert stale_stages(project) == {"evaluate"}


def test_a_stage_that_another_run_holds_is_busy_and_not_failed(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dvc.lock import LockError

    def held(*arguments: object, **kwargs: object) -> None:
        raise LockError("held by another")

    monkeypatch.setattr("flows.stages.dvc.Repo.reproduce", held)
    with pytest.raises(StageBusyError, match="stage finetune: held by another"):
        reproduce(project, "finetune")


def test_a_params_file_from_elsewhere_becomes_a_study_of_its_own(
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


def test_work_outside_of_a_project_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flows.study.study import find_home

    with pytest.raises(FileNotFoundError, match="is in no project; go into one, or begin one"):
        find_home(tmp_path)
