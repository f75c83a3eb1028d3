"""The command ``medfocus``: what it writes can be run; what it says names the file, the fault and the fix."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from flows.cli import app
from flows.cli.init import readable
from flows.cli.modality import Look, guess
from flows.study import open_study
from medfocus.params import load_params

ROOT = Path(__file__).resolve().parents[1]
FILM, SLICE, COLOUR = Look(0.0, 0.05, 0.5), Look(0.0, 0.4, 0.2), Look(0.2, 0.0, 0.6)

Medfocus = Callable[..., Result]


@pytest.fixture
def medfocus() -> Medfocus:
    """The command, with its arguments as words."""
    return lambda *arguments: CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project as far as a params file needs one, as the working directory."""
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
    """A grey picture, as bright as a chest film."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(80, 180, (48, 48), dtype=np.uint8)
    Image.fromarray(noise).resize((96, 96)).save(path)
    return path


def draw_classes(folder: Path, **counts: int) -> Path:
    """class/N.png, no two alike."""
    for k, (label, count) in enumerate(counts.items()):
        for i in range(count):
            draw(folder / label / f"{i}.png", seed=1000 * k + i)
    return folder


def test_init_writes_a_params_file_that_a_study_can_be_opened_with(home: Path, medfocus: Medfocus) -> None:
    pictures = draw_classes(home / "cxr", pneumonia=12, normal=8)
    result = medfocus("init", pictures)
    assert result.exit_code == 0, result.output
    study = open_study(home / "studies" / "cxr.yaml")
    data = study.params.datasets["cxr"]
    assert study.root("cxr").resolve() == pictures
    assert (data.modality, data.flip) == ("chest_xray", False)
    assert data.names == {"pneumonia": "pneumonia", "normal": "normal"}
    assert study.params.phantoms == {}
    assert "A GUESS" in (home / "studies" / "cxr.yaml").read_text()


def test_every_percent_that_init_writes_leaves_each_class_a_picture(home: Path, medfocus: Medfocus) -> None:
    draw_classes(home / "scans", few=7, many=30)
    assert medfocus("init", "scans").exit_code == 0
    percents = load_params(home / "studies" / "scans.yaml").study.percents
    assert percents == (20, 50, 100)  # of 4 to train on: 5 % and 10 % would be none
    assert "Unequal classes" in (home / "studies" / "scans.yaml").read_text()


def test_init_reads_a_csv_with_its_patients(home: Path, medfocus: Medfocus) -> None:
    folder = draw_classes(home / "pictures", a=6, b=6)
    lines = [f"{label}/{i}.png,{label},p{i}" for label in "ab" for i in range(6)]
    (folder / "clinic a.csv").write_text("\n".join(["path,label,patient", *lines]))
    result = medfocus("init", folder / "clinic a.csv")
    assert result.exit_code == 0, result.output
    data = load_params(home / "studies" / "clinic-a.yaml").datasets["clinic-a"]
    assert data.manifest == "clinic a.csv"
    assert "known patient" not in result.output


def test_init_overwrites_nothing_unless_it_is_told_to(home: Path, medfocus: Medfocus) -> None:
    draw_classes(home / "scans", a=6, b=6)
    out = home / "mine.yaml"
    out.write_text("# edited\n")
    result = medfocus("init", "scans", "--out", out)
    assert (result.exit_code, out.read_text()) == (1, "# edited\n")
    assert f"{out} is there already" in result.output and "--force" in result.output
    assert medfocus("init", "scans", "--out", out, "--force").exit_code == 0
    assert load_params(out).study.name == "scans"


def test_the_params_file_names_no_file_for_that_may_name_a_patient(home: Path, medfocus: Medfocus) -> None:
    draw_classes(home / "scans", a=6, b=6)
    (home / "scans" / "a" / "Mueller_Eva.png").write_bytes(b"broken")
    shutil.copyfile(home / "scans" / "b" / "0.png", home / "scans" / "b" / "Mueller_Eva.png")
    result = medfocus("init", "scans")
    assert result.exit_code == 0
    assert "a/Mueller_Eva.png: is no picture in a format that is read" in result.output
    written = (home / "studies" / "scans.yaml").read_text()
    assert "Mueller" not in written and "1 file is left out" in written and "1 pair among 13" in written


@pytest.mark.parametrize("label", ["no", "null", "a: b", "1e3", "it's", "#x", "two\nlines", "é"])
def test_a_class_keeps_its_name_whatever_yaml_makes_of_it(home: Path, medfocus: Medfocus, label: str) -> None:
    draw_classes(home / "scans", **{label: 5, "other": 5})
    assert medfocus("init", "scans").exit_code == 0
    names = load_params(home / "studies" / "scans.yaml").datasets["scans"].names
    assert set(names) == {label, "other"}


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["init", "nowhere"], 1, "nowhere: no such folder or CSV; give the folder"),
        (["init", "one"], 1, "one class only, 'a'"),
        (["init", "two", "--modality", "knee"], 2, "'knee' is none of chest_xray, brain_mri"),
        (["init", "two", "--name", "a b"], 2, "'a-b' would do"),
        (["init", "two", "--root", "one"], 1, "--root is for a CSV"),
        (["init"], 2, "Missing argument"),
        (["study", "unheard-of"], 1, "no study 'unheard-of'"),
        (["run", "--params", "none.yaml"], 1, "none.yaml: no such params file"),
    ],
)
def test_wrong_usage_ends_with_2_and_a_fault_with_1_and_its_fix(
    home: Path, medfocus: Medfocus, arguments: list[str], code: int, told: str
) -> None:
    draw_classes(home / "one", a=3)
    draw_classes(home / "two", a=3, b=3)
    result = medfocus(*arguments)
    assert result.exit_code == code
    assert told in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("texts", "look", "modality"),
    [
        (["cxr", "normal"], FILM, "chest_xray"),
        (["Chest X-Ray", "Pneumonia"], FILM, "chest_xray"),
        (["chest_ct", "adenocarcinoma"], SLICE, "chest_ct"),
        (["brainTumor", "glioma"], SLICE, "brain_mri"),
        (["breast ultrasound"], Look(0.0, 0.05, 0.3), "breast_ultrasound"),
        (["cxr"], SLICE, "other"),  # the pictures contradict
        (["brain ct"], SLICE, "other"),
        (["breast mri"], SLICE, "other"),
        (["knee xray"], FILM, "other"),
        (["lung"], Look(0.0, 0.1, 0.3), "chest_xray"),
        (["chest", "benign"], COLOUR, "other"),
        (["study7", "positive"], FILM, "other"),
    ],
)
def test_a_modality_is_guessed_where_names_and_pictures_agree_and_else_is_other(
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
    assert "phantoms" in result.output and "phantom-chest" in result.output
    assert "speed is not a known field" in " ".join(result.output.split())


def test_help_is_quick_for_it_imports_nothing_heavy() -> None:
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


@pytest.mark.parametrize("command", ["init", "run", "study", "report"])
def test_every_command_shows_an_example(medfocus: Medfocus, command: str) -> None:
    result = medfocus(command, "--help")
    assert result.exit_code == 0
    assert f"  medfocus {command}" in result.output
