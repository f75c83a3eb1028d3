"""Data sets as they arrive: unpacked public archives, and tables from clinics."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from medfocus.datasets.ingest import IngestError, ingest
from medfocus.datasets.listing import unwrapped
from medfocus.datasets.records import Record
from medfocus.masks.quality import known_region


def draw(path: Path, value: int | None = None) -> Path:
    """Write a small image: noise that depends on the path, or constant grey."""
    path.parent.mkdir(parents=True, exist_ok=True)
    seed = int.from_bytes(hashlib.sha256(str(path).encode()).digest()[:4])
    noise = np.random.default_rng(seed).integers(0, 256, (8, 12), dtype=np.uint8)
    Image.fromarray(noise if value is None else np.full((8, 12), value, np.uint8)).save(path)
    return path


def counts(records: list[Record]) -> dict[tuple[str, str], int]:
    """Images by split and label."""
    found: dict[tuple[str, str], int] = {}
    for record in records:
        found[record.split, record.label] = found.get((record.split, record.label), 0) + 1
    return found


Archive = Callable[[Path], dict[tuple[str, str], int]]

COVID = ("Covid", "Normal", "Viral Pneumonia")
TUMOURS = ("glioma", "meningioma", "notumor", "pituitary")
LUNGS = ("Bacterial Pneumonia", "Corona Virus Disease", "Normal", "Tuberculosis", "Viral Pneumonia")


def covid19(root: Path) -> dict[tuple[str, str], int]:
    for label in COVID:
        draw(root / "Covid19-dataset" / "train" / label / "01.jpeg")
        draw(root / "Covid19-dataset" / "train" / label / "COVID-00003b.jpg")
        draw(root / "Covid19-dataset" / "test" / label / "0100.jpeg")
    return {("train", label): 2 for label in COVID} | {("test", label): 1 for label in COVID}


def brain_tumor(root: Path) -> dict[tuple[str, str], int]:
    for label in TUMOURS:
        draw(root / "Training" / label / f"Tr-{label[:2]}_0010.jpg")
        draw(root / "Testing" / label / f"Te-{label[:2]}_0010.jpg")
    return {(split, label): 1 for split in ("train", "test") for label in TUMOURS}


def lungs(root: Path) -> dict[tuple[str, str], int]:
    for split in ("train", "test", "val"):
        for label in LUNGS:
            draw(root / "Lung Disease Dataset" / split / label / "person1000_bacteria_2931.jpeg")
    return {(split, label): 1 for split in ("train", "test", "val") for label in LUNGS}


def breast(root: Path) -> dict[tuple[str, str], int]:
    for label in ("benign", "malignant", "normal"):
        for i in (1, 4):
            draw(root / "Dataset_BUSI_with_GT" / label / f"{label} ({i}).png")
            draw(root / "Dataset_BUSI_with_GT" / label / f"{label} ({i})_mask.png", 0)
    draw(root / "Dataset_BUSI_with_GT" / "benign" / "benign (4)_mask_1.png", 0)
    return {("", label): 2 for label in ("benign", "malignant", "normal")}


def pneumonia(root: Path) -> dict[tuple[str, str], int]:
    expected: dict[tuple[str, str], int] = {}
    for split in ("train", "test", "val"):
        for label, name in (("NORMAL", "IM-0115-0001.jpeg"), ("PNEUMONIA", "person1_virus_6.jpeg")):
            film = draw(root / "chest_xray" / split / label / name)
            copy = root / "chest_xray" / "chest_xray" / split / label / name
            copy.parent.mkdir(parents=True)
            copy.write_bytes(film.read_bytes())
            clutter = root / "chest_xray" / "__MACOSX" / "chest_xray" / split / label / f"._{name}"
            clutter.parent.mkdir(parents=True)
            clutter.write_bytes(b"Mac OS X")
            expected[split, label] = 1
    (root / "chest_xray" / ".DS_Store").write_bytes(b"x")
    return expected


@pytest.mark.parametrize("archive", [covid19, brain_tumor, lungs, breast])
def test_an_unpacked_archive_is_read_completely(tmp_path: Path, archive: Archive) -> None:
    expected = archive(tmp_path)
    found = ingest(tmp_path)
    assert counts(found.records) == expected
    assert found.left_out == found.reported == []


def test_the_doubled_folder_of_the_pneumonia_archive_is_read_once_and_reported(tmp_path: Path) -> None:
    expected = pneumonia(tmp_path)
    found = ingest(tmp_path)
    assert counts(found.records) == expected
    (copy,) = found.left_out
    assert copy.path == "chest_xray/chest_xray"
    assert copy.fault == "holds 6 images with the same paths as in the split folders"
    assert all(record.path.startswith("chest_xray/t") or "/val/" in record.path for record in found.records)


def test_nested_wrappers_are_skipped_and_data_sets_are_not(tmp_path: Path) -> None:
    for label in ("cat", "dog"):
        draw(tmp_path / "a" / "b" / label / "x.png")
    (tmp_path / "a" / "README.md").write_text("no image")
    assert unwrapped(tmp_path) == tmp_path / "a" / "b"
    assert [record.path for record in ingest(tmp_path).records] == ["a/b/cat/x.png", "a/b/dog/x.png"]
    assert unwrapped(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    draw(tmp_path / "loose.png")
    assert unwrapped(tmp_path) == tmp_path
    draw(tmp_path / "set" / "Training" / "cat" / "x.png")
    assert unwrapped(tmp_path / "set") == tmp_path / "set"


def test_masks_next_to_an_image_are_united_to_its_known_region(tmp_path: Path) -> None:
    breast(tmp_path)
    folder = tmp_path / "Dataset_BUSI_with_GT" / "benign"
    left, right = np.zeros((2, 8, 12), np.uint8)
    left[:, :3], right[:, 9:] = 255, 255
    Image.fromarray(left).save(folder / "benign (4)_mask.png")
    Image.fromarray(right).save(folder / "benign (4)_mask_1.png")
    region = known_region(tmp_path, "Dataset_BUSI_with_GT/benign/benign (4).png", 8, 12)
    assert region is not None and np.array_equal(region, (left | right) > 0)
    assert known_region(tmp_path, "Dataset_BUSI_with_GT/benign/benign (1).png", 8, 12) is None, (
        "the mask is blank"
    )


def test_the_masks_folder_is_found_inside_a_wrapper(tmp_path: Path) -> None:
    for label in ("cat", "dog"):
        draw(tmp_path / "set" / label / "x.png")
    draw(tmp_path / "set" / "masks" / "cat" / "x.png", 255)
    region = known_region(tmp_path, "set/cat/x.png", 8, 12)
    assert region is not None and region.all()
    assert known_region(tmp_path, "set/dog/x.png", 8, 12) is None
    assert known_region(tmp_path / "set", "cat/x.png", 8, 12) is not None
    assert len(ingest(tmp_path).records) == 2


@pytest.fixture
def four(tmp_path: Path) -> Path:
    """A folder with a.png to d.png."""
    for name in "abcd":
        draw(tmp_path / f"{name}.png")
    return tmp_path


def rows(root: Path, manifest: str, **columns: str) -> list[tuple[str, str, str, str]]:
    found = ingest(root, manifest=manifest, columns=columns)
    return [(r.path, r.label, r.split, r.patient) for r in found.records]


def left_out(root: Path, manifest: str) -> dict[str, str]:
    return {fault.path: f"{fault.fault}. {fault.fix}" for fault in ingest(root, manifest=manifest).left_out}


@pytest.mark.parametrize("before", ["", "sep=;\r\n"])
def test_tables_with_semicolons_are_read(four: Path, before: str) -> None:
    lines = ["Label; Path ;Note", 'cat;a.png;"1,5"', "dog;b.png;2,5", ";;", "hen;;3"]
    (four / "list.csv").write_bytes((before + "\r\n".join(lines)).encode("utf-8-sig"))
    assert rows(four, "list.csv") == [("a.png", "cat", "", ""), ("b.png", "dog", "", "")]
    (fault,) = left_out(four, "list.csv")
    assert fault == f"list.csv, line {6 if before else 5}: "


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_tables_with_tabs_are_read(four: Path, encoding: str) -> None:
    text = "path\tlabel\tpatient\na.png\tRöntgen, alt\tp1\nb.png\tneu\tp2\n"
    (four / "list.txt").write_bytes(text.encode(encoding))
    assert rows(four, "list.txt") == [("a.png", "Röntgen, alt", "", "p1"), ("b.png", "neu", "", "p2")]


def test_commas_inside_a_heading_with_semicolons_are_no_separators(four: Path) -> None:
    (four / "list.csv").write_text("Name, Vorname;path;label\nA, B;a.png;cat\nC, D;b.png;dog\n")
    assert rows(four, "list.csv") == [("a.png", "cat", "", ""), ("b.png", "dog", "", "")]


def test_a_row_with_more_cells_than_the_heading_is_left_out(four: Path) -> None:
    (four / "list.csv").write_text("path,label\na.png,tumour, benign\nb.png,cat\nc.png,dog,\n")
    assert [row[0] for row in rows(four, "list.csv")] == ["b.png", "c.png"]
    ((path, message),) = left_out(four, "list.csv").items()
    assert path == "list.csv, line 2: a.png"
    assert message == "has 3 cells, but the heading has 2. Quote cells that contain the separator."


def test_parquet_tables_with_numbers_categories_and_nulls_are_read(four: Path) -> None:
    frame = pd.DataFrame(
        {
            "Path": ["a.png", "b.png", "c.png", None],
            "label": [1.0, 2.0, None, 1.0],  # pandas stores integers with nulls as floats
            "patient": pd.Series([7, 8, 9, 9], dtype="int64"),
            "split": pd.Categorical(["train", "training", "train", "test"]),
            "pixels": [b"x"] * 4,
        }
    )
    frame.to_parquet(four / "list.parquet")
    assert rows(four, "list.parquet") == [("a.png", "1", "train", "7"), ("b.png", "2", "train", "8")]
    assert left_out(four, "list.parquet") == {
        "list.parquet, row 3: c.png": "the label is empty. Fill it in or remove the row.",
        "list.parquet, row 4: ": f"no such file inside {four}. Correct the path, relative to the manifest, "
        "or remove the row.",
    }


def test_a_parquet_file_with_embedded_images_is_refused(four: Path) -> None:
    images = [{"bytes": b"x", "path": "a.png"}]
    pq.write_table(pa.table({"path": pa.array(images), "label": ["cat"]}), four / "list.parquet")
    with pytest.raises(IngestError, match=r"a column 'path' of type struct<.*Write the images to files"):
        ingest(four, manifest="list.parquet")
    whole = (four / "list.parquet").read_bytes()
    (four / "list.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(IngestError, match=r"list\.parquet: is not a valid Parquet file .*Write it again"):
        ingest(four, manifest="list.parquet")


@pytest.mark.parametrize("start", [b"PK\x03\x04", b"\xd0\xcf\x11\xe0"])
def test_a_spreadsheet_is_refused_with_its_fix(four: Path, start: bytes) -> None:
    (four / "list.xlsx").write_bytes(start + bytes(100))
    with pytest.raises(IngestError, match=r"list\.xlsx: is a spreadsheet .* save it as CSV UTF-8"):
        ingest(four, manifest="list.xlsx")


def test_columns_with_other_names_are_read_through_a_mapping(four: Path) -> None:
    text = "PID;File;Diagnosis;label\n7;a.png;cat;x\n8;b.png;dog;x\n"
    (four / "list.csv").write_text(text)
    found = rows(four, "list.csv", path="file", label="Diagnosis", patient=" pid")
    assert found == [("a.png", "cat", "", "7"), ("b.png", "dog", "", "8")]


@pytest.mark.parametrize(
    ("heading", "columns", "message"),
    [
        (
            "File;label",
            {},
            r"has no column path \(its columns: File, label\)\. Rename the columns to path, label",
        ),
        ("File;label", {"path": "Datei"}, r"no column 'Datei', set as columns\.path \(its columns: F"),
        ("path;Label;label", {}, r"has 2 columns for label \(its columns: path, Label, label\)\. Rename all"),
    ],
)
def test_missing_and_repeated_columns_are_named(
    four: Path, heading: str, columns: dict[str, str], message: str
) -> None:
    (four / "list.csv").write_text(f"{heading}\na.png;cat;cat\n")
    with pytest.raises(IngestError, match=rf"list\.csv: .*{message}"):
        ingest(four, manifest="list.csv", columns=columns)


def test_a_listed_mask_is_left_out(four: Path) -> None:
    draw(four / "a_mask.png", 255)
    (four / "list.csv").write_text("path,label\na.png,cat\na_mask.png,cat\nb.png,dog\nc.png,cat\n")
    assert [row[0] for row in rows(four, "list.csv")] == ["a.png", "b.png", "c.png"]
    assert left_out(four, "list.csv")["a_mask.png"].startswith(
        "is listed in list.csv, but its name marks it as the known region of a.png. Remove the row, or rename"
    )


def test_a_file_that_is_not_a_table_is_refused(four: Path) -> None:
    (four / "list.csv").write_text('path,label\na.png,"' + "x" * 200_000)
    with pytest.raises(IngestError, match=r"does not hold separated values \(field larger than field limit"):
        ingest(four, manifest="list.csv")
    (four / "list.csv").write_text("")
    with pytest.raises(IngestError, match="has no column label and no column path"):
        ingest(four, manifest="list.csv")


def test_a_table_above_the_limit_is_refused(four: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = 10_000
    pd.DataFrame({"path": ["a.png"] * rows, "label": ["cat"] * rows, "n": range(rows)}).to_parquet(
        four / "l.pq"
    )
    (four / "list.csv").write_text("path,label\na.png,cat\n" * 10_000)
    monkeypatch.setattr("medfocus.storage.tables.MOST_BYTES", 80_000)
    with pytest.raises(IngestError, match=r"list\.csv: has 0\.0 GB; the limit is .* Divide it"):
        ingest(four, manifest="list.csv")
    assert (four / "l.pq").stat().st_size < 80_000, "the unpacked size is above the limit, the file is not"
    with pytest.raises(IngestError, match=r"l\.pq: unpacks to .* GB in 10000 rows"):
        ingest(four, manifest="l.pq")
