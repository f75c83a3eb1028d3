"""Claims about the command ``medfocus``: its files can be run, and its faults name file, fault and fix."""

from __future__ import annotations

import csv
import hashlib
import json
import pickle
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import constants
from PIL import Image
from typer.testing import CliRunner, Result

from flows.cli import app, archive, doctor
from flows.cli.init.dataset import readable
from flows.cli.init.modality import Look, guess
from flows.servers.processes import free_port
from flows.stages import dvc
from flows.stages import ingest as stage
from flows.study import models as study_models
from flows.study.params import SlicesParams, load_params
from flows.study.study import open_study
from medfocus.clip.build import build_clip
from medfocus.datasets.records import read_manifest
from medfocus.focus.view import view
from medfocus.images import decode
from medfocus.learning.calibration import Calibration
from medfocus.learning.method import Support
from medfocus.masks.otsu import OtsuSegmenter
from medfocus.methods.clip import ClipLinearProbe
from medfocus.serving import checkpoint
from medfocus.serving.model_folder import load_model, save_model
from tests.dicoms import dicom, nifti

ROOT = Path(__file__).resolve().parents[1]
FILM, SLICE, COLOUR = Look(0.0, 0.05, 0.5), Look(0.0, 0.4, 0.2), Look(0.2, 0.0, 0.6)

COMMANDS = ["new", "init", "run", "study", "report", "predict", "explain", "masks", "doctor"]
COMMANDS += ["convert medmnist", "convert coco", "app"]
COMMANDS += ["models card", "models fetch", "models export", "models import"]

Medfocus = Callable[..., Result]


@pytest.fixture
def medfocus() -> Medfocus:
    """A function that runs the command with these arguments."""
    return lambda *arguments: CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A minimal project for a params file, as the working directory."""
    folder = tmp_path / "project"
    (folder / ".dvc").mkdir(parents=True)
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copyfile(ROOT / name, folder / name)
    for name in ("MLFLOW_TRACKING_URI", "PREFECT_API_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PREFECT_HOME", str(folder / ".prefect"))
    monkeypatch.chdir(folder)
    return folder


def draw(path: Path, seed: int) -> Path:
    """Draw a grey image, as bright as a chest film."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(80, 180, (48, 48), dtype=np.uint8)
    Image.fromarray(noise).resize((96, 96)).save(path)
    return path


def draw_classes(folder: Path, **counts: int) -> Path:
    """Draw class/N.png for each class, all different."""
    for k, (label, count) in enumerate(counts.items()):
        for i in range(count):
            draw(folder / label / f"{i}.png", seed=1000 * k + i)
    return folder


def test_a_project_can_be_created_anywhere_and_its_stages_run(
    tmp_path: Path, medfocus: Medfocus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert medfocus("new", "films").exit_code == 0
    again = medfocus("new", "films")
    assert again.exit_code == 1 and "films/params.yaml already exists." in again.output
    monkeypatch.chdir(tmp_path / "films")
    images = draw_classes(tmp_path / "images", normal=5, covid=5)
    assert medfocus("init", images, "--name", "own").exit_code == 0
    study = open_study(Path("studies/own.yaml"))
    assert study.home == Path.cwd() and f"- code: {ROOT.as_posix()}\n" in Path("dvc.yaml").read_text()
    for name in ("ingest@own", "duplicates@own", "splits@own"):
        assert dvc.reproduce(study.folder, name) and not dvc.reproduce(study.folder, name)
    assert len((study.folder / "data/manifests/own.csv").read_text().splitlines()) == 11


def test_init_writes_a_params_file_that_opens_as_a_study(home: Path, medfocus: Medfocus) -> None:
    images = draw_classes(home / "cxr", pneumonia=12, normal=8)
    result = medfocus("init", images)
    assert result.exit_code == 0, result.output
    study = open_study(home / "studies" / "cxr.yaml")
    data = study.params.datasets["cxr"]
    assert study.root("cxr").resolve() == images
    assert (data.modality, data.flip) == ("chest_xray", False)
    assert data.names == {"pneumonia": "pneumonia", "normal": "normal"}
    assert study.params.phantoms == {}
    assert "A GUESS" in (home / "studies" / "cxr.yaml").read_text()


def test_init_writes_the_schedule_for_the_clip_of_the_project(home: Path, medfocus: Medfocus) -> None:
    images = draw_classes(home / "cxr", pneumonia=4, normal=4)
    assert medfocus("init", images, "--name", "embedded").exit_code == 0
    assert load_params(home / "studies" / "embedded.yaml").study.schedule == "small"
    text = (home / "params.yaml").read_text()
    (home / "params.yaml").write_text(text.replace("  model: pocket\n", "  model: ViT-B-16\n"))
    assert medfocus("init", images, "--name", "full").exit_code == 0
    assert load_params(home / "studies" / "full.yaml").study.schedule == "published"


def test_every_percent_that_init_writes_leaves_each_class_an_image(home: Path, medfocus: Medfocus) -> None:
    draw_classes(home / "scans", few=7, many=30)
    assert medfocus("init", "scans").exit_code == 0
    percents = load_params(home / "studies" / "scans.yaml").study.percents
    assert percents == (20, 50, 100)  # 5 % and 10 % of 4 training images would be none
    assert "Unequal classes" in (home / "studies" / "scans.yaml").read_text()


def test_init_reads_a_csv_with_its_patients(home: Path, medfocus: Medfocus) -> None:
    folder = draw_classes(home / "images", a=6, b=6)
    lines = [f"{label}/{i}.png,{label},p{i}" for label in "ab" for i in range(6)]
    (folder / "clinic a.csv").write_text("\n".join(["path,label,patient", *lines]))
    result = medfocus("init", folder / "clinic a.csv")
    assert result.exit_code == 0, result.output
    data = load_params(home / "studies" / "clinic-a.yaml").datasets["clinic-a"]
    assert data.manifest == "clinic a.csv"
    assert "known patient" not in result.output


def test_init_guesses_the_columns_from_their_values(
    home: Path, medfocus: Medfocus, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = draw_classes(home / "images", a=6, b=6)
    lines = ["PID;Datei;Geschlecht;Diagnose;Menge"]
    for label in "ab":
        parts = ["train"] * 4 + ["test"] * 2
        lines += [f"{i};{label}/{i}.png;{'FM'[i % 2]};{label.upper()};{parts[i]}" for i in range(6)]
    (folder / "list.csv").write_text("\n".join(lines), encoding="utf-8")
    result = medfocus("init", folder / "list.csv")
    assert result.exit_code == 0, result.output
    columns = {"path": "Datei", "label": "Diagnose", "split": "Menge", "patient": "PID"}
    study = load_params(home / "studies" / "list.yaml").datasets["list"]
    assert study.columns == columns
    assert "columns: path is Datei, label is Diagnose" in result.output
    monkeypatch.chdir(open_study(home / "studies" / "list.yaml").folder)
    stage.main(["--dataset", "list"])
    records = read_manifest(Path("data/manifests/list.csv"))
    assert {(r.label, r.split, r.patient) for r in records} >= {("A", "train", "0"), ("B", "test", "5")}


def test_init_asks_if_two_columns_may_be_the_classes(home: Path, medfocus: Medfocus) -> None:
    folder = draw_classes(home / "images", a=6, b=6)
    draw_classes(folder, c=12)
    lines = [f"c/{i}.png,{'FM'[i % 2]},{40 + i},{'ab'[i % 2]}" for i in range(12)] * 2  # twelve ages
    (folder / "list.csv").write_text("\n".join(["Bild,Geschlecht,Alter,Gruppe", *lines]))
    result = medfocus("init", folder / "list.csv")
    assert result.exit_code == 1
    assert (
        "several columns may be the classes (Geschlecht, Gruppe). Name the column with --column"
        in result.output
    )
    assert medfocus("init", folder / "list.csv", "--column", "label=Gruppe").exit_code == 0
    columns = load_params(home / "studies" / "list.yaml").datasets["list"].columns
    assert columns == {"path": "Bild", "label": "Gruppe"}
    wrong = medfocus("init", folder / "list.csv", "--column", "labels=Gruppe")
    assert "--column 'labels=Gruppe' has the wrong form" in wrong.output


def test_init_reads_through_a_wrapping_folder_and_reports_it(home: Path, medfocus: Medfocus) -> None:
    draw_classes(home / "busi" / "Dataset_BUSI_with_GT", a=6, b=6)
    result = medfocus("init", "busi")
    assert result.exit_code == 0, result.output
    assert "(busi contains only this folder)" in result.output
    study = open_study(home / "studies" / "busi.yaml")
    assert study.root("busi").resolve() == home / "busi" / "Dataset_BUSI_with_GT"


def test_the_stage_reads_through_a_wrapping_folder_and_reports_it(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    content = yaml.safe_load((home / "params.yaml").read_text())
    content["datasets"]["phantom-breast"]["root"] = "archive"
    (home / "params.yaml").write_text(yaml.safe_dump(content))
    draw_classes(home / "archive" / "Dataset_BUSI_with_GT", a=3, b=3)
    monkeypatch.chdir(home)
    stage.main(["--dataset", "phantom-breast"])
    assert (
        "phantom-breast: archive only wraps Dataset_BUSI_with_GT, which is read instead"
        in capsys.readouterr().err
    )
    records = read_manifest(Path("data/manifests/phantom-breast.csv"))
    assert records[0].path == "Dataset_BUSI_with_GT/a/0.png" and len(records) == 6


def test_init_reads_patients_and_modality_from_dicom_headers(home: Path, medfocus: Medfocus) -> None:
    for label in "ab":
        (home / "scans" / label).mkdir(parents=True)
        for i in range(8):
            noise = np.random.default_rng(ord(label) * 9 + i).integers(0, 4096, (32, 32)).astype(np.uint16)
            tags: dict[str, Any] = {
                "Modality": "CT",
                "BodyPartExamined": "CHEST",
                "PatientID": f"MRN-{label}-{i // 2}",
            }
            (home / "scans" / label / f"IM{i}").write_bytes(
                dicom(noise, WindowCenter=9, WindowWidth=9, **tags)
            )
    result = medfocus("init", "scans")
    assert result.exit_code == 0, result.output
    assert "modality: chest_ct (by DICOM's Modality CT, BodyPartExamined CHEST)" in result.output
    text = (home / "studies" / "scans.yaml").read_text()
    assert "known patient" not in text and "The patient of every image is known" in text
    assert load_params(home / "studies" / "scans.yaml").datasets["scans"].slices == SlicesParams(2, 1)
    assert "MRN" not in text + result.output and (home / ".patient-salt").is_file()


def test_init_of_volumes_writes_the_slices_setting(home: Path, medfocus: Medfocus) -> None:
    for label in "ab":
        for i in range(4):
            noise = np.random.default_rng(ord(label) * 9 + i).integers(0, 400, (24, 24, 2)).astype(np.int16)
            nifti(home / "scans" / label / f"{i}.nii.gz", noise)
    assert medfocus("init", "scans").exit_code == 0
    text = (home / "studies" / "scans.yaml").read_text()
    assert "    slices: {axis: 2, every: 1}\n" in text


def test_init_overwrites_a_file_only_with_force(home: Path, medfocus: Medfocus) -> None:
    draw_classes(home / "scans", a=6, b=6)
    out = home / "mine.yaml"
    out.write_text("# edited\n")
    result = medfocus("init", "scans", "--out", out)
    assert (result.exit_code, out.read_text()) == (1, "# edited\n")
    assert f"{out} already exists" in result.output and "--force" in result.output
    assert medfocus("init", "scans", "--out", out, "--force").exit_code == 0
    assert load_params(out).study.name == "scans"


def test_the_params_file_contains_no_file_name_because_it_may_name_a_patient(
    home: Path, medfocus: Medfocus
) -> None:
    draw_classes(home / "scans", a=6, b=6)
    (home / "scans" / "a" / "Mueller_Eva.png").write_bytes(b"broken")
    shutil.copyfile(home / "scans" / "b" / "0.png", home / "scans" / "b" / "Mueller_Eva.png")
    result = medfocus("init", "scans")
    assert result.exit_code == 0
    assert "a/Mueller_Eva.png: is not in a supported image format" in result.output
    written = (home / "studies" / "scans.yaml").read_text()
    assert "Mueller" not in written and "1 file is left out" in written
    assert "1 pair shows the same image (1)" in written


@pytest.mark.parametrize("label", ["no", "null", "a: b", "1e3", "it's", "#x", "two\nlines", "é"])
def test_a_class_keeps_its_name_through_yaml(home: Path, medfocus: Medfocus, label: str) -> None:
    draw_classes(home / "scans", **{label: 5, "other": 5})
    assert medfocus("init", "scans").exit_code == 0
    names = load_params(home / "studies" / "scans.yaml").datasets["scans"].names
    assert set(names) == {label, "other"}


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["init", "nowhere"], 1, "nowhere: no such folder or table. Give the folder"),
        (["init", "one"], 1, "only one class, 'a'"),
        (["init", "two", "--modality", "knee"], 2, "'knee' is none of chest_xray, brain_mri"),
        (["init", "two", "--name", "a b"], 2, "Try 'a-b'"),
        (["init", "two", "--root", "one"], 1, "and --root is for a table"),
        (["init"], 2, "Missing argument"),
        (["study", "unheard-of"], 1, "no study 'unheard-of'"),
        (["run", "--params", "none.yaml"], 1, "none.yaml: no such params file"),
    ],
)
def test_wrong_usage_exits_with_2_and_a_fault_with_1_and_its_fix(
    home: Path, medfocus: Medfocus, arguments: list[str], code: int, message: str
) -> None:
    draw_classes(home / "one", a=3)
    draw_classes(home / "two", a=3, b=3)
    result = medfocus(*arguments)
    assert result.exit_code == code
    assert message in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("texts", "look", "modality"),
    [
        (["cxr", "normal"], FILM, "chest_xray"),
        (["Chest X-Ray", "Pneumonia"], FILM, "chest_xray"),
        (["chest_ct", "adenocarcinoma"], SLICE, "chest_ct"),
        (["brainTumor", "glioma"], SLICE, "brain_mri"),
        (["breast ultrasound"], Look(0.0, 0.05, 0.3), "breast_ultrasound"),
        (["cxr"], SLICE, "other"),  # the images contradict
        (["brain ct"], SLICE, "other"),
        (["breast mri"], SLICE, "other"),
        (["knee xray"], FILM, "other"),
        (["lung"], Look(0.0, 0.1, 0.3), "chest_xray"),
        (["chest", "benign"], COLOUR, "other"),
        (["study7", "positive"], FILM, "other"),
    ],
)
def test_the_modality_is_guessed_if_names_and_images_agree_and_is_other_otherwise(
    texts: list[str], look: Look, modality: str
) -> None:
    assert guess(texts, look).modality == modality


def test_class_names_become_words() -> None:
    words = {"large_cell-carcinoma": "large cell carcinoma", "notumor": "no tumor", "NORMAL": "normal"}
    words |= {"ViralPneumonia": "viral pneumonia", "TB": "tuberculosis", "Covid": "COVID-19"}
    assert readable(words) == words


def test_studies_are_listed_with_their_faults(home: Path, medfocus: Medfocus) -> None:
    (home / "studies").mkdir()
    (home / "studies" / "broken.yaml").write_text("extends: ../params.yaml\nspeed: fast\n")
    result = medfocus("study")
    assert result.exit_code == 0
    assert "embedded" in result.output and "phantom-chest" in result.output
    assert "speed is not a known field" in " ".join(result.output.split())


def test_help_imports_no_heavy_library() -> None:
    code = (
        "import sys; from flows.cli import app\n"
        "try: app(['init', '--help'])\n"
        "finally: print('modules', *sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    loaded = set(result.stdout.rpartition("modules ")[2].split())
    assert not {"torch", "numpy", "mlflow", "prefect", "dvc", "pandas", "medfocus"} & loaded


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_shows_an_example(medfocus: Medfocus, command: str) -> None:
    result = medfocus(*command.split(), "--help")
    assert result.exit_code == 0
    assert f"  medfocus {command}" in result.output


CLASSES = ("dark", "light")


def shade(path: Path, bright: int, seed: int) -> Path:
    """Draw a disc on a dark or a light background: the classes of ``model``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    y, x = np.mgrid[:90, :110]
    grey = np.where((y - 45) ** 2 + (x - 55) ** 2 < 400, 240, 40 + 120 * bright)
    noise = np.random.default_rng(seed).normal(0, 8, grey.shape)
    Image.fromarray(np.clip(grey + noise, 0, 255).astype(np.uint8)).save(path)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder: a linear probe on the embedded CLIP that separates dark from light."""
    folder = tmp_path_factory.mktemp("model")
    encoder, segmenter = build_clip("pocket", "pocket"), OtsuSegmenter()
    method = ClipLinearProbe(encoder, folds=3)
    images = [decode.read(shade(folder / f"{i}.png", i % 2, i)) for i in range(8)]
    masks = segmenter.segment(images)
    views = [
        view(image, mask.region, focus="multiply", frame=encoder.frame, feather=0.01)
        for image, mask in zip(images, masks, strict=True)
    ]
    features = method.embed(torch.from_numpy(np.stack(views)))
    labels, text = torch.tensor([0, 1] * 4), encoder.encode_texts(list(CLASSES))
    method.fit(Support(features[None], labels, torch.arange(8), text), torch.Generator().manual_seed(0))
    header = checkpoint.Header(
        "clip-linear-probe", {"folds": 3}, CLASSES, "multiply", encoder.key, 0, 0, facts={"key": "probe"},
        calibration=Calibration(temperature=1.5, threshold=0.3, confidence=0.9, images=8),
    )  # fmt: skip
    checkpoint.save(method, header, folder / "cell.safetensors")
    save_model(
        folder / "model",
        checkpoint=folder / "cell.safetensors",
        encoder=encoder,
        segmenter=segmenter,
        feather=0.01,
        fill="mean",
    )
    return folder / "model"


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_an_unreadable_file_is_one_line_and_the_other_files_are_read(
    home: Path, medfocus: Medfocus, model: Path
) -> None:
    shade(home / "in" / "a.png", 0, 50)
    (home / "in" / "broken.png").write_bytes(b"no image")
    shade(home / "in" / "more" / "a.png", 1, 51)
    result = medfocus("predict", "in", "gone.png", "--out", "out", "--model", model)
    assert result.exit_code == 1
    faults = [line for line in result.output.splitlines() if ".png" in line]
    assert [line.partition(": ")[2] for line in faults] == [
        "in/broken.png: is not in a supported image format (PNG, JPEG, TIFF, BMP, WEBP, DICOM, "
        "NIFTI). "
        "Export it again as PNG, or remove it.",
        "gone.png: cannot be read (No such file or directory). Correct the path, or copy the file again.",
    ]
    lines = rows(home / "out" / "predictions.csv")
    assert [(line["file"], line["overlay"]) for line in lines] == [
        ("in/a.png", "a_overlay.png"),
        ("in/more/a.png", "a_overlay_2.png"),
    ]


def test_predict_writes_the_model_s_predictions_and_draws_the_mask(
    home: Path, medfocus: Medfocus, model: Path
) -> None:
    files = [shade(home / f"{i}.png", i % 2, 60 + i) for i in range(3)]
    result = medfocus("predict", *files, "--out", "out", "--model", model)
    assert result.exit_code == 0, result.output
    expected = load_model(model).predict([file.read_bytes() for file in files])
    for line, prediction in zip(rows(home / "out" / "predictions.csv"), expected, strict=True):
        assert line["label"] == prediction.label
        assert float(line["probability_dark"]) == pytest.approx(prediction.probabilities["dark"], abs=1e-5)
        assert line["set"] == "; ".join(prediction.set) and prediction.label in prediction.set
        overlay = decode.read(home / "out" / line["overlay"])
        assert np.array_equal((overlay != decode.read(Path(line["file"]))).any(axis=2), prediction.mask)
    again = medfocus("predict", *files, "--out", "out", "--model", model)
    assert again.exit_code == 1 and "predictions.csv already exists" in again.output


def test_every_frame_of_a_file_gets_a_row_with_its_name(home: Path, medfocus: Medfocus, model: Path) -> None:
    images = [decode.read(shade(home / f"{i}.png", i % 2, 60 + i))[..., 0] for i in range(3)]
    (home / "in").mkdir()
    (home / "in" / "cine").write_bytes(dicom(np.stack(images), NumberOfFrames=3))
    volume = np.zeros((40, 30, 11), np.int16)
    volume[10:20, 10:20] = 90
    nifti(home / "in" / "head.nii.gz", volume)
    result = medfocus("predict", "in", "--out", "out", "--model", model)
    assert result.exit_code == 0, result.output
    lines = rows(home / "out" / "predictions.csv")
    slices = [f"in/head.nii.gz#z={z:02}" for z in range(11)]
    assert [line["file"] for line in lines] == ["in/cine#0", "in/cine#1", "in/cine#2", *slices]
    assert [line["overlay"] for line in lines[2:4]] == ["cine_2_overlay.png", "head_z=00_overlay.png"]
    expected = load_model(model).predict_decoded([np.stack([p] * 3, axis=2) for p in images])
    assert [line["label"] for line in lines[:3]] == [one.label for one in expected]
    assert medfocus("predict", "in/cine#1", "--out", "one", "--model", model).exit_code == 0
    assert [line["file"] for line in rows(home / "one" / "predictions.csv")] == ["in/cine#1"]


def test_explain_writes_a_sheet_and_a_row_for_each_image(home: Path, medfocus: Medfocus, model: Path) -> None:
    result = medfocus("explain", shade(home / "a.png", 0, 70), "--out", "why", "--model", model)
    assert result.exit_code == 0, result.output
    [line] = rows(home / "why" / "explanations.csv")
    assert line["way"] == "Grad-CAM" and 0 <= float(line["inside_mask"]) <= 1
    assert decode.read(home / "why" / line["sheet"]).shape[1] > 3 * 90


def test_masks_equal_those_of_the_study_s_segmenter_and_are_cached(home: Path, medfocus: Medfocus) -> None:
    text = (home / "params.yaml").read_text().replace("segmenter: sam2", "segmenter: otsu")
    (home / "params.yaml").write_text(text)
    image = shade(home / "a.png", 0, 80)
    for out in ("first", "second"):  # the second from the cache
        result = medfocus("masks", image, "--out", out)
        assert result.exit_code == 0, result.output
        [line] = rows(home / out / "masks.csv")
        segmenter = study_models.build_segmenter(open_study(home / "params.yaml"), "phantom-chest")
        [mask] = segmenter.segment([decode.read(image)])
        drawn = decode.read(home / out / line["mask"])[..., 0] > 0
        assert np.array_equal(drawn, mask.region) and line["status"] == mask.status
    assert medfocus("masks", image, "--out", "x", "--dataset", "knee").exit_code == 2


def test_an_exported_model_gives_the_same_predictions_after_the_import(
    home: Path, medfocus: Medfocus, model: Path
) -> None:
    exported = medfocus("models", "export", "probe.zip", "--model", model)
    assert exported.exit_code == 0, exported.output
    imported = medfocus("models", "import", "probe.zip", "--name", "there")
    assert imported.exit_code == 0, imported.output
    assert "there version 1: imported" in imported.output
    listed = medfocus("models")
    assert "imported, so the gate was not applied" in listed.output and "champion" not in listed.output
    image = shade(home / "a.png", 1, 90)
    assert medfocus("predict", image, "--out", "there").exit_code == 0  # the only registered model
    assert medfocus("predict", image, "--out", "here", "--model", model).exit_code == 0
    assert rows(home / "there" / "predictions.csv") == rows(home / "here" / "predictions.csv")
    wrong = medfocus("predict", image, "--out", "none", "--model", "there@7")
    assert wrong.exit_code == 1 and "there has no version '7'. Choose from there@1" in wrong.output


def rewrite(source: Path, target: Path, **changes: bytes | None) -> Path:
    """Copy an archive with members added, replaced or, for None, left out."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            if name not in changes:
                new.writestr(name, old.read(name))
        for name, data in changes.items():
            if data is not None:
                new.writestr(name, data)
    return target


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"../../outside.json": b"{}"}, "contains '../../outside.json', which is not part of a model"),
        ({"/tmp/outside.json": b"{}"}, "which is not part of a model"),
        ({"python_model.pkl": b"x"}, "contains 'python_model.pkl', which is not part of a model"),
        ({"cell.safetensors": b"x"}, "cell.safetensors has changed since the export (its sha256 differs)"),
        ({"cell.safetensors": None}, "cell.safetensors is either missing or not listed"),
        ({"contents.json": None}, "has no readable contents.json"),
        ({"contents.json": b'{"format": 2, "files": {}, "model": ""}'}, "of another format"),
        ({"serve.json": b" " * 10_000_001}, "serve.json unpacks to more than 10000000 bytes"),
    ],
)
def test_a_bad_archive_is_refused_with_the_reason_and_writes_nothing(
    home: Path, model: Path, tmp_path: Path, changes: dict[str, bytes | None], fault: str
) -> None:
    archive.export(home, str(model), home / "good.zip")
    bad = rewrite(home / "good.zip", home / "bad.zip", **changes)
    before = {path for path in tmp_path.rglob("*")}
    with pytest.raises(ValueError, match=f"bad.zip.*{re.escape(fault)}.*export the model again"):
        archive.import_model(home, bad, "there")
    assert {path for path in tmp_path.rglob("*")} == before


def test_a_pickle_instead_of_a_part_is_refused_and_its_code_never_runs(home: Path, model: Path) -> None:
    class Touch:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (home / "ran",)

    archive.export(home, str(model), home / "good.zip")
    data = pickle.dumps(Touch())
    contents = json.loads(zipfile.ZipFile(home / "good.zip").read("contents.json"))
    contents["files"]["cell.safetensors"] = hashlib.sha256(data).hexdigest()
    changes = {"cell.safetensors": data, "contents.json": json.dumps(contents).encode()}
    bad = rewrite(home / "good.zip", home / "bad.zip", **changes)
    with pytest.raises(
        ValueError, match=r"bad\.zip: the model cannot be loaded \(cell\.safetensors is not a"
    ):
        archive.import_model(home, bad, "there")
    assert not (home / "ran").exists() and not (home / "mlflow.db").exists()


def test_weights_that_cannot_be_fetched_are_named_with_the_download_command(
    home: Path, medfocus: Medfocus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    result = medfocus("models", "fetch", "facebook/sam2.1-hiera-tiny", "nonsense")
    assert result.exit_code == 1
    assert "hf download facebook/sam2.1-hiera-tiny sam2.1_hiera_tiny.pt" in result.output
    assert "'nonsense' does not name weights" in result.output
    assert "nothing to fetch" in medfocus("models", "fetch").output  # the embedded study needs no download


def test_weights_in_the_hub_cache_are_listed_as_cached(
    home: Path, medfocus: Medfocus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    hub = home / "hub" / "models--facebook--sam2.1-hiera-tiny"
    (hub / "refs").mkdir(parents=True)
    (hub / "refs" / "main").write_text("abc")
    (hub / "snapshots" / "abc").mkdir(parents=True)
    (hub / "snapshots" / "abc" / "sam2.1_hiera_tiny.pt").write_bytes(b"0" * 2_000_000)
    listed = {line.split()[0]: line for line in medfocus("models").output.splitlines() if "facebook" in line}
    assert "cached, 2 MB" in listed["facebook/sam2.1-hiera-tiny"]
    assert "medfocus models fetch" in listed["facebook/sam2.1-hiera-large"]


def findings(home: Path) -> dict[str, doctor.Finding]:
    """Return the last finding on each subject."""
    parts = (doctor.project(home), doctor.stores(home), doctor.servers(), doctor.disks(home))
    return {each.subject: each for part in parts for each in part}


def test_the_doctor_finds_no_fault_in_a_sound_project(home: Path, medfocus: Medfocus) -> None:
    (home / ".git").mkdir()
    result = medfocus("doctor")
    assert result.exit_code == 0, result.output
    assert result.output.rstrip().endswith("0 faults")


def test_the_doctor_warns_of_masks_far_from_sam2_s_size(home: Path) -> None:
    (home / "studies").mkdir()
    (home / "studies" / "small.yaml").write_text(
        "extends: ../params.yaml\n"
        "masks: {config: sam2.1_hiera_t, checkpoint: random:0, image_size: 128, strategy: grid}\n"
    )
    warning = findings(home)["study"]
    assert warning.state == "warning" and warning.fix.startswith("Set it to null in ")
    assert "small.yaml: masks.image_size is 128, but the weights" in warning.text
    assert "trained at 1024 px" in warning.text
    (home / "studies" / "small.yaml").write_text(
        "extends: ../params.yaml\nmasks: {config: sam2.1_hiera_t, checkpoint: random:0}\n"
    )
    fault = findings(home)["study"]
    assert fault.state == "fault" and "has not learnt to find a region without a prompt" in fault.text


def test_the_doctor_names_each_fault_with_its_fix(
    home: Path, medfocus: Medfocus, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "studies").mkdir()
    (home / "studies" / "bad.yaml").write_text("extends: ../params.yaml\nspeed: fast\n")
    (home / "mlflow.db").write_bytes(b"not a database" * 100)
    monkeypatch.setenv("PREFECT_API_URL", f"http://me:secret@127.0.0.1:{free_port()}/api")
    monkeypatch.setattr(doctor, "_SECONDS", 0.2)
    monkeypatch.setattr(doctor, "_LITTLE", 1e18)
    by_subject = findings(home)
    expected = {
        "project": "is not a git repository",
        "study": "speed is not a known field",
        "MLflow": "mlflow.db is damaged",
        "Prefect": "no server answers at http://127.0.0.1",
        "disk": "free at",
    }
    for subject, text in expected.items():
        assert (by_subject[subject].state, text in by_subject[subject].text) == ("fault", True)
        assert by_subject[subject].fix
    assert "secret" not in " ".join(each.text for each in by_subject.values())
    assert medfocus("doctor").exit_code == 1
