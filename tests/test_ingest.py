"""Ingestion turns folders and manifests into records and reports all faults at once with their fixes."""

from __future__ import annotations

import csv
import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medfocus.datasets.faults import write_faults
from medfocus.datasets.ingest import Ingested, IngestError, ingest
from medfocus.images.decode import open_image


def image(path: Path, seed: int | None = None, mode: str = "L", size: tuple[int, int] = (12, 8)) -> Path:
    """Write noise that depends on the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    seed = int.from_bytes(hashlib.sha256(str(path).encode()).digest()[:4]) if seed is None else seed
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).convert(mode).save(path)
    return path


def two_classes(root: Path) -> Path:
    """Write a sound data set: two splits, two classes, two images each."""
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            for i in range(2):
                image(root / split / name / f"{i}.png")
    return root


def paths(ingested: Ingested) -> list[str]:
    return [record.path for record in ingested.records]


def test_split_and_class_folders_are_read(tmp_path: Path) -> None:
    image(tmp_path / "valid" / "cat" / "deep" / "er" / "x.JPG", mode="RGB")
    result = ingest(two_classes(tmp_path))
    assert not result.left_out
    assert not result.reported
    assert paths(result) == sorted(paths(result))
    record = next(record for record in result.records if record.path == "valid/cat/deep/er/x.JPG")
    assert (record.width, record.height, record.mode) == (12, 8, "RGB")
    assert (record.label, record.split, record.patient) == ("cat", "val", "")
    data = (tmp_path / record.path).read_bytes()
    assert record.sha256 == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize(("folder", "split"), [("", ""), ("all/", ""), ("Training/", "train")])
def test_class_folders_without_an_official_split(tmp_path: Path, folder: str, split: str) -> None:
    for name in ("cat", "dog"):
        image(tmp_path / f"{folder}{name}" / "x.png")
    assert [record.split for record in ingest(tmp_path).records] == [split, split]


def test_a_class_may_be_called_all(tmp_path: Path) -> None:
    for name in ("ALL", "AML"):
        image(tmp_path / name / "x.png")
    assert {record.label for record in ingest(tmp_path).records} == {"ALL", "AML"}


def test_masks_are_never_images(tmp_path: Path) -> None:
    two_classes(tmp_path)
    image(tmp_path / "masks" / "train" / "cat" / "0.png")
    for name in ("0_mask.png", "0_mask_1.png"):
        image(tmp_path / "train" / "cat" / name)
    image(tmp_path / "train" / "cat" / "alone_mask.png")  # an image, because no alone.png exists
    found = paths(ingest(tmp_path))
    assert "train/cat/alone_mask.png" in found
    assert len(found) == 9


def test_clutter_is_ignored_and_odd_names_are_read(tmp_path: Path) -> None:
    two_classes(tmp_path)
    for name in (".hidden.png", "Thumbs.db", ".DS_Store", "desktop.ini"):
        (tmp_path / "train" / "cat" / name).write_bytes(b"x")
    (tmp_path / "README.md").write_text("no image, in no class")
    odd = image(tmp_path / "train" / "cat" / "Röntgen (1) größe 肺.PNG")
    (tmp_path / "train" / "dog" / "link.png").symlink_to(image(tmp_path.parent / "elsewhere.png"))
    (tmp_path / "train" / "dog" / "circle").symlink_to(tmp_path / "train" / "dog")
    result = ingest(tmp_path)
    assert not result.left_out
    assert odd.relative_to(tmp_path).as_posix() in paths(result)
    assert "train/dog/link.png" in paths(result)
    assert len(result.records) == 10


def test_every_unusable_file_is_left_out_in_one_report(tmp_path: Path) -> None:
    two_classes(tmp_path)
    cat = tmp_path / "train" / "cat"
    whole = image(cat / "cut.png", size=(64, 64)).read_bytes()
    (cat / "cut.png").write_bytes(whole[: len(whole) // 2])
    (cat / "empty.png").touch()
    Image.fromarray(np.array([[0, np.nan]], dtype=np.float32)).save(cat / "nan.tif")
    (cat / "text.jpg").write_text("no image")
    (cat / "notes.txt").write_text("no image")
    (cat / "lost.png").symlink_to(tmp_path / "nowhere.png")
    image(tmp_path / "train" / "loose.png")
    image(tmp_path / "extra" / "cat" / "x.png")
    result = ingest(tmp_path)
    assert len(result.records) == 8
    faults = {fault.path: f"{fault.fault}. {fault.fix}" for fault in result.left_out}
    assert faults.keys() == {
        "extra", "train/loose.png", *(f"train/cat/{name}" for name in (
            "cut.png", "empty.png", "nan.tif", "text.jpg", "notes.txt", "lost.png"))
    }  # fmt: skip
    assert "cannot be decoded" in faults["train/cat/cut.png"]
    assert faults["train/cat/empty.png"] == "the file is empty (0 bytes). Copy it again or remove it."
    assert faults["train/cat/nan.tif"].startswith("holds values that are not finite. Replace them")
    assert faults["train/cat/text.jpg"].startswith("is not in a supported image format (PNG, JPEG, TIFF")
    assert faults["train/cat/notes.txt"].startswith(
        "does not have the suffix of a supported image format (png, jpg"
    )
    assert (
        faults["train/cat/lost.png"] == "cannot be read (No such file or directory). Copy or link it again."
    )
    assert (
        faults["train/loose.png"] == "lies outside the class folders. Move it into the folder of its class."
    )
    assert faults["extra"].startswith("holds 1 images, but is not a split folder like the others. To use")


def test_bombs_and_pipes_are_left_out_and_not_opened(tmp_path: Path) -> None:
    cat = two_classes(tmp_path) / "train" / "cat"
    Image.new("1", (9000, 9000)).save(cat / "bomb.png")
    os.mkfifo(cat / "pipe.png")
    result = ingest(tmp_path)
    assert len(result.records) == 8
    faults = {fault.path: fault.fault for fault in result.left_out}
    assert faults["train/cat/pipe.png"] == "is not a regular file"
    assert faults["train/cat/bomb.png"].startswith("has 9000 x 9000 pixels; the limit is 64 megapixels")


def test_left_out_files_are_written_as_csv(tmp_path: Path) -> None:
    data = two_classes(tmp_path / "data")
    (data / "train" / "cat" / "empty.png").touch()
    write_faults(ingest(data).left_out, tmp_path / "left_out.csv")
    with (tmp_path / "left_out.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    fault, fix = "the file is empty (0 bytes)", "Copy it again or remove it."
    assert rows == [{"path": "train/cat/empty.png", "kind": "empty file", "fault": fault, "fix": fix}]


def test_same_bytes_under_two_labels_are_both_left_out(tmp_path: Path) -> None:
    two_classes(tmp_path)
    image(tmp_path / "train" / "cat" / "twin.png", seed=1)
    image(tmp_path / "test" / "dog" / "twin.png", seed=1)
    result = ingest(tmp_path)
    assert len(result.records) == 8
    assert {fault.path: fault.fault for fault in result.left_out} == {
        "train/cat/twin.png": "holds the same bytes as test/dog/twin.png, but that has the label 'dog'",
        "test/dog/twin.png": "holds the same bytes as train/cat/twin.png, but that has the label 'cat'",
    }


def test_same_bytes_in_train_and_test_are_kept_and_reported(tmp_path: Path) -> None:
    two_classes(tmp_path)
    image(tmp_path / "train" / "cat" / "twin.png", seed=1)
    image(tmp_path / "test" / "cat" / "twin.png", seed=1)
    result = ingest(tmp_path)
    assert len(result.records) == 10
    (fault,) = result.reported
    assert fault.path == "test/cat/twin.png"
    assert fault.fault.startswith("holds the same bytes as train/cat/twin.png")


def test_all_fatal_faults_come_in_one_error_with_path_fault_and_fix(tmp_path: Path) -> None:
    two_classes(tmp_path)
    image(tmp_path / "train" / "Viral Pneumonia" / "x.png")
    image(tmp_path / "test" / "viral_pneumonia " / "x.png")
    (tmp_path / "train" / "fox").mkdir()
    (tmp_path / "train" / "owl").mkdir()
    (tmp_path / "train" / "owl" / "broken.png").touch()
    image(tmp_path / "test" / "elk" / "x.png")
    with pytest.raises(IngestError) as caught:
        ingest(tmp_path)
    text = str(caught.value)
    assert (
        "  Viral Pneumonia: the label is spelled in 2 ways: 'Viral Pneumonia' as in "
        "'train/Viral Pneumonia/x.png', 'viral_pneumonia ' as in 'test/viral_pneumonia /x.png'. "
        "Choose one spelling and rename the others." in text
    )
    assert "  fox: the class has no usable image. Add images, or remove the class." in text
    assert "  owl: the class has no usable image." in text
    assert "  elk: the class has test images but no training images." in text
    assert "left out:\n  train/owl/broken.png: the file is empty (0 bytes)." in text
    assert {fault.path for fault in caught.value.fatal} >= {"Viral Pneumonia", "fox", "owl", "elk"}


def test_one_class_or_none_is_fatal(tmp_path: Path) -> None:
    with pytest.raises(
        IngestError, match=r"no class folder was found\. Give a folder of split/class/\*\.png"
    ):
        ingest(tmp_path)
    image(tmp_path / "cat" / "x.png")
    with pytest.raises(IngestError, match=r"only one class, 'cat'\. Add another\."):
        ingest(tmp_path)


def test_all_next_to_train_is_fatal(tmp_path: Path) -> None:
    two_classes(tmp_path)
    image(tmp_path / "all" / "cat" / "x.png")
    with pytest.raises(
        IngestError, match=r"all: lies next to split folders \(all, test, train\)\. Keep either"
    ):
        ingest(tmp_path)


def test_missing_root_and_manifest_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        ingest(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"list\.csv: no such manifest; give the path of a CSV"):
        ingest(tmp_path, manifest="list.csv")


def test_class_that_is_absent_from_test_is_reported(tmp_path: Path) -> None:
    two_classes(tmp_path)
    image(tmp_path / "train" / "elk" / "x.png")
    (fault,) = ingest(tmp_path).reported
    assert (fault.path, fault.fault) == ("elk", "the class has no test image")


def test_tiff_with_several_frames_is_reported(tmp_path: Path) -> None:
    two_classes(tmp_path)
    first, second = (Image.new("L", (4, 4), value) for value in (10, 20))
    first.save(tmp_path / "train" / "cat" / "stack.tif", save_all=True, append_images=[second])
    (fault,) = ingest(tmp_path).reported
    assert fault.fault == "holds 2 images; only the first is used"


def manifest(root: Path, *lines: str) -> Path:
    (root / "lists").mkdir(parents=True)
    (root / "lists" / "all.csv").write_text("\n".join(lines) + "\n", encoding="utf-8-sig")
    return root


def test_manifest_paths_are_relative_to_its_own_folder(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        image(tmp_path / "raw" / f"{name}.png")
    manifest(
        tmp_path,
        "Path,label,split,patient,note",
        "../raw/a.png, cat ,train,p1,x",
        r"..\raw\b.png,dog,validation,p2,x",
        "../raw/c.png,dog,test,,x",
    )
    result = ingest(tmp_path, manifest="lists/all.csv", patient_pattern=r"raw/(\w)\.png")
    assert not result.left_out
    assert [(r.path, r.label, r.split, r.patient) for r in result.records[:2]] == [
        ("raw/a.png", "cat", "train", "p1"),
        ("raw/b.png", "dog", "val", "p2"),
    ]
    assert result.records[2].patient == "c", "the pattern applies where the manifest has no patient"


def test_every_bad_row_is_left_out_with_its_line(tmp_path: Path) -> None:
    for name in ("a", "b", "c", "d"):
        image(tmp_path / "data" / "lists" / f"{name}.png")
    image(tmp_path / "outside.png")
    data = tmp_path / "data"
    (data / "lists" / "all.csv").write_text(
        "path,label,split\na.png,cat,\nb.png,dog,\nnone.png,cat,\n../../outside.png,cat,\n,cat,\n"
        "c.png,,\nd.png,cat,holdout\na.png,cat,\n"
    )
    result = ingest(data, manifest="lists/all.csv")
    assert paths(result) == ["lists/a.png", "lists/b.png"]
    faults = {fault.path.removeprefix("lists/all.csv, "): fault.fault for fault in result.left_out}
    inside = f"no such file inside {data}"
    assert faults == {
        "line 4: none.png": inside,
        "line 5: ../../outside.png": f"leads out of {data}",
        "line 6: ": inside,
        "line 7: c.png": "the label is empty",
        "line 8: d.png": "the split 'holdout' is not train, val or test",
    }


def test_a_manifest_reads_nothing_outside_of_its_root(tmp_path: Path) -> None:
    outside, data = image(tmp_path / "outside.png"), tmp_path / "data"
    for name in ("a", "b"):
        image(data / f"{name}.png")
    (data / "link.png").symlink_to(outside)
    (data / "folder").symlink_to(tmp_path)
    (data / "inner.png").symlink_to(data / "a.png")
    (data / "circle.png").symlink_to(data / "circle.png")
    (tmp_path / "database").mkdir()
    image(tmp_path / "database" / "x.png")  # its path has the root as a prefix
    leading_out = [
        *("../outside.png", "../nowhere.png", "../data/../outside.png", "../database/x.png"),
        *(str(outside), "/etc/passwd", "link.png", "folder/outside.png", r"..\outside.png"),
    ]
    nowhere = ["nowhere.png", "circle.png", f"{'x' * 300}.png"]
    within = ["../data/a.png,cat", "inner.png,cat", f"{data / 'b.png'},dog"]
    lines = ["path,label", *within, *(f"{path},cat" for path in [*leading_out, *nowhere])]
    (tmp_path / "seen").symlink_to(tmp_path)  # the root may be behind a link
    for root in (data, tmp_path / "seen" / "data"):
        (data / "list.csv").write_text("\n".join(lines).replace(str(data / "b.png"), str(root / "b.png")))
        result = ingest(root, manifest="list.csv")
        assert paths(result) == ["a.png", "b.png", "inner.png"]
        faults = {fault.path.partition(": ")[2]: fault for fault in result.left_out}
        for path in leading_out:
            assert faults[path].fault == f"leads out of {root}", path
            assert faults[path].fix.startswith("Copy the image into that folder and correct the path")
        for path in nowhere:
            assert faults[path].fault == f"no such file inside {root}", path


def test_image_listed_under_two_labels_is_left_out(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        image(tmp_path / "lists" / f"{name}.png")
    (tmp_path / "lists" / "all.csv").write_text("path,label\na.png,cat\nb.png,dog\nc.png,cat\nc.png,dog\n")
    result = ingest(tmp_path, manifest="lists/all.csv")
    assert paths(result) == ["lists/a.png", "lists/b.png"]
    (fault,) = result.left_out
    assert fault.path == "lists/c.png"
    assert fault.fault == "is listed in lists/all.csv 2 times, with different labels, splits or patients"


def test_missing_columns_are_named(tmp_path: Path) -> None:
    manifest(tmp_path, "filename;cls", "a.png;cat")
    with pytest.raises(
        IngestError, match=r"has no column label and no column path \(its columns: filename, cls\)"
    ):
        ingest(tmp_path, manifest="lists/all.csv")


def test_manifest_with_a_split_in_some_rows_only_is_fatal(tmp_path: Path) -> None:
    manifest(tmp_path, "path,label,split", "a.png,cat,train", "b.png,dog,")
    for name in ("a", "b"):
        image(tmp_path / "lists" / f"{name}.png")
    with pytest.raises(IngestError, match=r"has no split for 1 of 2 images \(the first is 'lists/b\.png'\)"):
        ingest(tmp_path, manifest="lists/all.csv")


def test_manifest_that_is_not_utf8_is_fatal(tmp_path: Path) -> None:
    manifest(tmp_path, "path,label")
    (tmp_path / "lists" / "all.csv").write_bytes("path,label\nRöntgen.png,cat\n".encode("latin-1"))
    with pytest.raises(IngestError, match=r"lists/all\.csv: is not UTF-8 .*Save it again as UTF-8 CSV"):
        ingest(tmp_path, manifest="lists/all.csv")


def test_patient_pattern_finds_patients(tmp_path: Path) -> None:
    for name in ("cat/person7_1.png", "cat/person7_2.png", "dog/person12_1.png", "dog/other.png"):
        image(tmp_path / name)
    result = ingest(tmp_path, patient_pattern=r"person(\d+)_")
    assert [record.patient for record in result.records] == ["7", "7", "", "12"]
    (fault,) = result.reported
    assert "finds no patient in 1 images (the first is 'dog/other.png')" in fault.fault


@pytest.mark.parametrize(
    ("pattern", "fault"),
    [
        ("person(", "is not a regular expression"),
        (r"person\d+", "has 0 groups instead of one"),
        (r"(person)(\d+)", "has 2 groups instead of one"),
        (r"subject(\d+)", r"matches no image \(the first is 'test/cat/0.png'\)"),
    ],
)
def test_invalid_patient_pattern_is_fatal(tmp_path: Path, pattern: str, fault: str) -> None:
    with pytest.raises(IngestError, match=rf"patient_pattern: .*{fault}"):
        ingest(two_classes(tmp_path), patient_pattern=pattern)


def test_covid19_is_read_completely_and_its_six_leaked_test_files_are_reported(shared_data: Path) -> None:
    result = ingest(shared_data / "covid19")
    assert len(result.records) == 317
    assert not result.left_out
    assert len(result.reported) == 6
    assert all(fault.path.startswith("test/Covid/") for fault in result.reported)


def test_busi_has_one_pair_with_two_labels_and_no_mask_among_its_images(shared_data: Path) -> None:
    result = ingest(shared_data / "busi")
    assert len(result.records) == 778
    left_out = [fault.path for fault in result.left_out]
    assert left_out == ["all/benign/benign (433).jpg", "all/malignant/malignant (145).jpg"]


def test_pneumonia_file_names_contain_patients(shared_data: Path) -> None:
    result = ingest(shared_data / "pneumonia_cxr", patient_pattern=r"(person\d+_(?:bacteria|virus))")
    assert len(result.records) == 1074
    assert sum(bool(record.patient) for record in result.records) == 690


def test_data_set_without_images_is_refused(shared_data: Path) -> None:
    with pytest.raises(IngestError, match="no class folder was found"):
        ingest(shared_data / "pneumoniamnist")


def test_an_image_is_decoded_once_until_its_bytes_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second run gives the same records, faults and notes."""
    root, cache = two_classes(tmp_path / "set"), tmp_path / "cache"
    stack = [Image.fromarray(np.full((8, 12), value, dtype=np.uint8)) for value in (0, 255)]
    stack[0].save(root / "train" / "cat" / "stack.tif", save_all=True, append_images=stack[1:])
    (root / "train" / "cat" / "cut.png").write_bytes((root / "train" / "cat" / "0.png").read_bytes()[:60])
    decoded: list[str] = []

    def counted(data: bytes, name: str) -> Image.Image:
        decoded.append(name)
        return open_image(data, name)

    monkeypatch.setattr("medfocus.images.decode.open_image", counted)
    first = ingest(root, cache=cache)
    assert sorted(decoded) == sorted([*paths(first), "train/cat/cut.png"])
    decoded.clear()
    assert ingest(root, cache=cache) == first == ingest(root)
    assert decoded.count("train/cat/cut.png") == 2 and decoded.count("train/cat/0.png") == 1

    decoded.clear()
    image(root / "train" / "cat" / "0.png", seed=1, size=(9, 9))
    image(root / "train" / "cat" / "new.png")
    later = ingest(root, cache=cache)
    assert sorted(decoded) == ["train/cat/0.png", "train/cat/cut.png", "train/cat/new.png"]
    assert {(r.width, r.height) for r in later.records if r.path == "train/cat/0.png"} == {(9, 9)}
