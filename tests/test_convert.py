"""Converters turn other formats into folders for ingestion, or refuse a file and leave nothing behind."""

from __future__ import annotations

import csv
import json
import sys
import types
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle
from typer.testing import CliRunner, Result

from flows.cli import app
from medfocus.datasets import coco, medmnist
from medfocus.datasets.ingest import ingest
from medfocus.masks.quality import known_region
from medfocus.storage import atomic

Medfocus = Callable[..., Result]


@pytest.fixture
def medfocus() -> Medfocus:
    """The command line, called with words."""
    return lambda *arguments: CliRunner().invoke(app, [str(a) for a in arguments])


def arrays(
    size: int = 28, colour: bool = False, other: Mapping[str, np.ndarray] | None = None
) -> dict[str, np.ndarray]:
    """The arrays of a MedMNIST file with two classes: 6, 2 and 4 images of noise."""
    rng, found = np.random.default_rng(size), dict[str, np.ndarray]()
    for split, count in (("train", 6), ("val", 2), ("test", 4)):
        shape = (count, size, size, 3) if colour else (count, size, size)
        found[f"{split}_images"] = rng.integers(0, 256, shape, dtype=np.uint8)
        found[f"{split}_labels"] = np.arange(count).reshape(-1, 1) % 2
    return found | dict(other or {})


def save(file: Path, arrays: dict[str, np.ndarray], compressed: bool = True) -> Path:
    (np.savez_compressed if compressed else np.savez)(file, allow_pickle=True, **arrays)
    return file


@pytest.mark.parametrize(("size", "colour"), [(28, False), (64, True)])
def test_medmnist_is_converted_without_loss(tmp_path: Path, size: int, colour: bool) -> None:
    held = arrays(size, colour)
    file = save(tmp_path / ("pneumoniamnist.npz" if size == 28 else f"pneumoniamnist_{size}.npz"), held)
    counts = medmnist.convert(file, tmp_path / "out")
    assert {split: dict(of) for split, of in counts.items()}["train"] == {"normal": 3, "pneumonia": 3}
    found = ingest(tmp_path / "out")
    assert len(found.records) == 12 and not found.left_out
    for record in found.records:
        place = int(Path(record.path).stem)
        pixels = held[f"{record.split}_images"][place]
        assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / record.path)), pixels)
        assert record.label == ("normal", "pneumonia")[place % 2]


def test_a_file_with_an_unknown_name_has_numbered_classes(tmp_path: Path, medfocus: Medfocus) -> None:
    result = medfocus("convert", "medmnist", save(tmp_path / "mine.npz", arrays()), tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert {path.name for path in (tmp_path / "out" / "val").iterdir()} == {"class_0", "class_1"}
    assert "mine.npz: the name is no MedMNIST data set" in result.output
    assert f"Next: medfocus init {tmp_path / 'out'}" in result.output


def test_a_split_has_no_folder_for_a_class_without_images(tmp_path: Path) -> None:
    held = arrays(other={"val_labels": np.zeros((2, 1), np.uint8)})
    medmnist.convert(save(tmp_path / "pneumoniamnist.npz", held), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out" / "val").iterdir()] == ["normal"]


@pytest.mark.parametrize(
    ("name", "other", "message"),
    [
        ("chestmnist", {}, "its images have several labels"),
        ("organmnist3d", {}, "holds volumes, but only images are supported"),
        ("x", {"train_images": np.zeros((6, 8, 8, 8), np.uint8)}, "train_images is 6 x 8 x 8 x 8: volumes"),
        ("x", {"test_labels": np.zeros((4, 14), int)}, "test_labels has 14 labels per image instead of one"),
        ("x", {"train_images": np.zeros((6, 8, 8))}, "train_images holds float64, not uint8. Scale"),
        ("x", {"val_labels": np.zeros((3, 1), int)}, "has 2 val_images but 3 val_labels"),
        ("x", {"val_labels": np.zeros((2, 1))}, "val_labels holds float64, not integers"),
        ("x", {"test_labels": np.full((4, 1), None)}, "test_labels.npy holds Python objects, which are not"),
        ("pneumoniamnist", {"test_labels": np.full((4, 1), 2)}, "has a label 2, but pneumoniamnist has the"),
    ],
)
def test_arrays_other_than_images_with_one_class_each_are_refused(
    tmp_path: Path, name: str, other: dict[str, np.ndarray], message: str
) -> None:
    file = save(tmp_path / f"{name}.npz", arrays(other=other))
    with pytest.raises(ValueError, match=name) as caught:
        medmnist.convert(file, tmp_path / "out")
    assert message in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_a_damaged_or_truncated_file_leaves_nothing(tmp_path: Path) -> None:
    file = save(tmp_path / "x.npz", arrays(), compressed=False)
    whole = file.read_bytes()
    place = whole.index(arrays()["train_images"].tobytes()) + 1000
    file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    with pytest.raises(ValueError, match=r"train_images is damaged .*Download it again"):
        medmnist.convert(file, tmp_path / "out")
    file.write_bytes(whole[:500])
    with pytest.raises(ValueError, match=r"x\.npz: is not a valid \.npz file"):
        medmnist.convert(file, tmp_path / "out")
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("train_images.npy", b"import os")
    with pytest.raises(ValueError, match="is not a NumPy array"):
        medmnist.convert(file, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_a_new_folder_is_complete_or_missing_and_remains_of_killed_processes_are_removed(
    tmp_path: Path,
) -> None:
    dead = tmp_path / ".out.999999999.part"
    dead.mkdir()
    with pytest.raises(ZeroDivisionError), atomic.new_folder(tmp_path / "out") as folder:
        (folder / str(1 // len(list(folder.iterdir())))).touch()
    assert list(tmp_path.iterdir()) == []
    with atomic.new_folder(tmp_path / "out") as folder:
        (folder / "x").touch()
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out" / "x").exists()
    with pytest.raises(FileExistsError, match="out already exists and is not overwritten"):
        atomic.new_folder(tmp_path / "out").__enter__()


def test_a_data_set_is_downloaded_by_name_or_the_error_names_the_fix(
    tmp_path: Path, medfocus: Medfocus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fake package has the file in its cache, or has no network."""

    class PneumoniaMNIST:
        def __init__(self, split: str, download: bool, size: int) -> None:
            assert (split, download) == ("test", True)
            if size != 64:
                raise RuntimeError("Something went wrong when downloading!")
            save(tmp_path / "pneumoniamnist_64.npz", arrays(64))
            self.root = str(tmp_path)

    package: Any = types.ModuleType("medmnist")
    package.INFO = {"pneumoniamnist": {"python_class": "PneumoniaMNIST"}}
    package.PneumoniaMNIST = PneumoniaMNIST
    words = ("convert", "medmnist", "pneumoniamnist", tmp_path / "out", "--size")
    monkeypatch.setitem(sys.modules, "medmnist", None)
    assert "Install medfocusclip[medmnist], or download pneumoniamnist_64.npz" in medfocus(*words, 64).output
    monkeypatch.setitem(sys.modules, "medmnist", package)
    assert "cannot be downloaded (RuntimeError). Check the network" in medfocus(*words, 28).output
    assert "--size is 32; use one of 28, 64, 128, 224" in medfocus(*words, 32).output
    assert "is neither a file nor a data set of MedMNIST; use one of pathmnist" in medfocus(
        "convert", "medmnist", "mnist", tmp_path / "out"
    ).output  # fmt: skip
    assert medfocus(*words, 64).exit_code == 0
    assert len(ingest(tmp_path / "out").records) == 12


def test_the_real_pneumoniamnist_is_converted_completely(shared_data: Path, tmp_path: Path) -> None:
    file = shared_data / "pneumoniamnist" / "pneumoniamnist.npz"
    counts = medmnist.convert(file, tmp_path / "out")
    assert {split: dict(of) for split, of in counts.items()} == {
        "train": {"normal": 388, "pneumonia": 3494},
        "val": {"normal": 135, "pneumonia": 389},
        "test": {"normal": 234, "pneumonia": 390},
    }


SQUARE = [2, 1, 6, 1, 6, 5, 2, 5]  # x from 2 to 6, y from 1 to 5


def entry(number: int, image: int, segmentation: object, category: int = 1) -> dict[str, object]:
    return {"id": number, "image_id": image, "category_id": category, "segmentation": segmentation}


@pytest.fixture
def lesions(tmp_path: Path) -> dict[str, Any]:
    """Three images of 8 x 12, one in a folder, and the content of a COCO file for them."""
    (tmp_path / "raw" / "b").mkdir(parents=True)
    names = ("a.png", "b/a.png", "c.jpg")
    for value, name in enumerate(names):
        Image.fromarray(np.full((8, 12), 50 * value, np.uint8)).save(tmp_path / "raw" / name)
    return {
        "images": [{"id": i, "file_name": name, "width": 12, "height": 8} for i, name in enumerate(names)],
        "annotations": [entry(1, 0, [SQUARE]), entry(2, 1, [SQUARE], category=2)],
        "categories": [
            {"id": 1, "name": "benign", "supercategory": "lesion"},
            {"id": 2, "name": "malignant", "supercategory": "lesion"},
        ],
    }


def converted(folder: Path, content: dict[str, Any], **settings: Any) -> tuple[coco.Converted, Path]:
    (folder / "instances.json").write_text(json.dumps(content))
    done = coco.convert(folder / "instances.json", folder / "out", folder / "raw", **settings)
    return done, folder / "out"


def labels(out: Path) -> dict[str, str]:
    with (out / "list.csv").open(newline="", encoding="utf-8") as file:
        return {row["path"]: row["label"] for row in csv.DictReader(file)}


def test_instances_become_known_regions_and_labels(tmp_path: Path, lesions: dict[str, Any]) -> None:
    runs = np.zeros((8, 12), np.uint8, order="F")
    runs[6:, 10:] = 1
    code: Any = rle.encode(runs)
    lesions["annotations"] += [
        entry(3, 0, {"size": [8, 12], "counts": code["counts"].decode()}),
        entry(4, 1, {"size": [8, 12], "counts": [0, 8, 88]}, category=2),
    ]
    done, out = converted(tmp_path, lesions)
    assert done.regions == 2 and done.labels == {"benign": 1, "malignant": 1, "": 1}
    assert labels(out) == {"images/a.png": "benign", "images/b/a.png": "malignant", "images/c.jpg": ""}
    (fault,) = done.faults
    assert (fault.path, fault.fault) == ("c.jpg", "has no class, so it has no label")
    found = ingest(out, manifest="list.csv")
    assert [record.path for record in found.records] == ["images/a.png", "images/b/a.png"]
    assert [fault.fault for fault in found.left_out] == ["the label is empty"]
    square = np.zeros((8, 12), bool)
    square[1:5, 2:6] = True
    first, second = (known_region(out, record.path, 8, 12) for record in found.records)
    assert first is not None and np.array_equal(first, square | (runs > 0))
    column = square.copy()
    column[:, 0] = True
    assert second is not None and np.array_equal(second, column)
    assert known_region(out, "images/c.jpg", 8, 12) is None


@pytest.mark.parametrize(
    ("label_from", "expected"),
    [
        ("category", ["", "malignant", ""]),
        ("supercategory", ["lesion", "lesion", ""]),
        ("folder", ["", "b", ""]),
    ],
)
def test_an_image_has_the_label_that_all_its_instances_share(
    tmp_path: Path, lesions: dict[str, Any], label_from: str, expected: list[str]
) -> None:
    lesions["annotations"].append(entry(3, 0, [SQUARE], category=2))
    done, out = converted(tmp_path, lesions, label_from=label_from)
    assert list(labels(out).values()) == expected
    if label_from == "category":
        assert done.faults[0].fault == "has several classes (benign, malignant), so it has no label"


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ([[1, 1, 5, 5]], "has a polygon of 4 values; it needs x and y of three points or more"),
        ([[1, 1, 5, 5, 1, 5, 2]], "has a polygon of 7 values"),
        ([[1, 1, 5, 5, 1, "x"]], "has a polygon with values that are not numbers"),
        ([[1, 1, 5, 5, 1, float("nan")]], "has a polygon with values that are not numbers"),
        ([[1, 1, 5, 5, 1e12, 5]], "has a polygon that lies far outside of 12 x 8"),
        ([[1, 1, 1, 1, 1, 1]], "covers no pixel"),
        ([], "has a box but no outline"),
        ({"size": [12, 8], "counts": [96]}, "size [12, 8], but the image is [8, 12]"),
        ({"size": [8, 12], "counts": [90, 5]}, "has a run-length code of 95 pixels; the image has 96"),
        ({"size": [8, 12], "counts": "zzzz99"}, "has a broken run-length code"),
        ({"size": [8, 12]}, "has a run-length code without counts"),
        ("x", "is not an outline"),
    ],
)
def test_a_broken_outline_is_reported_by_its_id_and_the_others_are_used(
    tmp_path: Path, lesions: dict[str, Any], segmentation: object, message: str
) -> None:
    lesions["annotations"] += [entry(77, 0, segmentation)]
    done, out = converted(tmp_path, lesions)
    assert done.faults[0].path == "annotation 77 of a.png"
    assert message in done.faults[0].fault
    region = known_region(out, "images/a.png", 8, 12)
    assert region is not None and region.sum() == 16


def test_a_coco_file_reads_no_file_outside_its_folder_and_mismatches_are_reported(
    tmp_path: Path, lesions: dict[str, Any]
) -> None:
    Image.fromarray(np.zeros((8, 12), np.uint8)).save(tmp_path / "outside.png")
    (tmp_path / "raw" / "broken.png").write_bytes(b"x")
    size = {"width": 12, "height": 8}
    lesions["images"][2] = {"id": 2, "file_name": "c.jpg", "width": 8, "height": 12}
    lesions["images"] += [
        {"id": 3, "file_name": "../outside.png", **size},
        {"id": 4, "file_name": "nowhere.png", **size},
        {"id": 5, "file_name": "a.png", **size},
        {"id": 6, "file_name": "broken.png", **size},
        {"id": 7, **size},
    ]
    lesions["annotations"] += [entry(9, 99, [SQUARE])]
    done, out = converted(tmp_path, lesions)
    assert set(labels(out)) == {"images/a.png", "images/b/a.png"}
    faults = {fault.path: fault.fault for fault in done.faults}
    assert faults["image 3: ../outside.png"] == f"leads out of {tmp_path / 'raw'}"
    assert faults["image 4: nowhere.png"] == f"no such file inside {tmp_path / 'raw'}"
    assert faults["image 5: a.png"].startswith("has the name of a.png except for the suffix")
    assert faults["broken.png"].startswith("is not in a supported image format")
    assert faults["c.jpg"] == "has 12 x 8 pixels, but 8 x 12 in the file"
    assert faults["image 7: None"] == "has no file name, width and height"
    assert faults["image 99"] == "has annotations, but is not in the list of images"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "has no list 'images' of entries"),
        ('{"images": [], "annotations": [1], "categories": []}', "has no list 'annotations' of entries"),
        ('{"images": [], "annotations": [], "categories": []}', "no image can be used (it lists none)"),
    ],
)
def test_an_invalid_coco_file_leaves_nothing(
    tmp_path: Path, medfocus: Medfocus, text: str, message: str
) -> None:
    (tmp_path / "x.json").write_text(text)
    result = medfocus("convert", "coco", tmp_path / "x.json", tmp_path / "out")
    assert result.exit_code == 1 and message in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_the_command_writes_the_faults_next_to_the_table(
    tmp_path: Path, lesions: dict[str, Any], medfocus: Medfocus
) -> None:
    (tmp_path / "x.json").write_text(json.dumps(lesions))
    words = ("convert", "coco", tmp_path / "x.json", tmp_path / "out", "--images", tmp_path / "raw")
    assert medfocus(*words, "--label-from", "colour").exit_code == 2
    result = medfocus(*words)
    assert result.exit_code == 0, result.output
    assert "1 faults" in result.output and "2 known regions" in result.output
    assert "has no class" in (tmp_path / "out" / "faults.csv").read_text()
