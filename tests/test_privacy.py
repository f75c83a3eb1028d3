"""Patient names in paths, tables and image headers appear only next to the data and on the terminal.

A small study runs once into an error and once to its end. The test then searches every byte that would be
shown, shared or backed up: Prefect's database and logs, MLflow's database and artefacts, the reports, and
dvc.lock.
"""

from __future__ import annotations

import base64
import contextlib
import csv
import gzip
import io
import os
import re
import sqlite3
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import yaml
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from flows import pipeline
from flows.servers import prefect as prefect_servers
from flows.stages import finetune
from flows.study.dataset import EncodedDataset
from medfocus import phantoms
from tests.dicoms import dicom

FOLDER, FILE, PATIENT = "ROE_RICHARD_1961", "DOE_JANE_1970", "MRN_0815_4711"
TEXT, EXIF, LEFT_OUT = "DUPONT_MARIE_1955", "MUSTERMANN_ERIKA", "SMITH_JOHN_1948"
HEADER, NAME = "MRN_2718_2818", "ROSSI^MARIO"  # in DICOM headers
PLANTED = (FOLDER, FILE, PATIENT, TEXT, EXIF, LEFT_OUT, HEADER, NAME)
FOR_THE_OWNER = ("left_out.csv", "reported.csv", "duplicates.csv")  # they name files


@pytest.fixture
def clinic(project: Path) -> Path:
    """A project with a folder of images and a manifest, as from a hospital; return the folder."""
    content = yaml.safe_load((project / "params.yaml").read_text())
    content["datasets"]["phantom-breast"] |= {"root": "incoming", "manifest": "list.csv"}
    content["phantoms"] = {}
    content["study"] |= {"methods": {"pixels": ["none"]}, "percents": [50, 100], "seeds": [0]}
    content["validation"] |= {"methods": ["pixels"]}
    (project / "params.yaml").write_text(yaml.safe_dump(content))
    folder = project / "incoming" / FOLDER
    folder.mkdir(parents=True)
    lines = ["path,label,split,patient", f"{FOLDER}/{LEFT_OUT}.png,cyst,train,{PATIENT}_x"]
    (folder / f"{LEFT_OUT}.png").touch()
    for split, count in (("train", 6), ("test", 4)):
        for label in phantoms.MODALITIES["breast_ultrasound"]:
            for number in range(count):
                name = f"{FILE}_{split}_{label}_{number}.{('png', 'jpg', 'dcm')[number % 3]}"
                save(drawn(split, label, number), folder / name)
                own = "" if number % 3 == 2 else f"{PATIENT}_{split}_{label}_{number}"
                lines.append(f"{FOLDER}/{name},{label},{split},{own}")
    twin = folder / f"{FILE}_twin.png"  # a test image that is also in train
    twin.write_bytes((folder / f"{FILE}_train_cyst_0.png").read_bytes())
    lines.append(f"{FOLDER}/{twin.name},cyst,test,{PATIENT}_twin")
    (project / "incoming" / "list.csv").write_text("\n".join(lines) + "\n")
    return folder


def drawn(split: str, label: str, number: int) -> np.ndarray:
    rng = phantoms.generator(3, "breast_ultrasound", split, label, number)
    return phantoms.draw("breast_ultrasound", label, rng, 96).image


def save(image: np.ndarray, path: Path) -> None:
    """Save an image with a name in the text fields of its format."""
    if path.suffix == ".dcm":
        path.write_bytes(dicom(image, PatientID=f"{HEADER}_{path.stem}"[:64], PatientName=NAME))
        return
    text, exif = PngInfo(), Image.Exif()
    text.add_text("PatientName", TEXT)
    text.add_text("Comment", TEXT * 9, zip=True)
    exif[0x013B] = EXIF  # the artist
    options: dict[str, Any] = {"pnginfo": text} if path.suffix == ".png" else {"exif": exif, "quality": 95}
    Image.fromarray(image).save(path, **options)


def test_no_patient_name_reaches_prefect_mlflow_or_shared_files(
    project: Path, clinic: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = clinic / f"{FILE}_test_benign_0.png"
    whole, embed = broken.read_bytes(), EncodedDataset.embed

    def breaks(
        dataset: EncodedDataset,
        methods: Iterable[str],
        focus: str,
        paths: list[str],
        *more: Any,
    ) -> None:
        if paths == dataset.splits.test:  # during the evaluation, with an open run of MLflow
            broken.write_bytes(whole[:300])
        embed(dataset, methods, focus, paths, *more)

    monkeypatch.setattr(os, "cpu_count", lambda: 1)  # fit in this process; workers take longer to start
    monkeypatch.setattr(finetune, "_end_with_parent", lambda: None)
    monkeypatch.setattr(prefect_servers, "prefect_answers", lambda: False)  # start a server for this project
    with prefect_servers.prefect_api():
        with monkeypatch.context() as patch:
            patch.setattr(EncodedDataset, "embed", breaks)
            with pytest.raises(SystemExit) as ended:
                pipeline.main([])
        broken.write_bytes(whole)
        printed = capsys.readouterr().err
        pipeline.main([])

    # The terminal names the file twice: at the error and at the end.
    assert str(ended.value).startswith(f"medfocus: ImageError: {broken}: cannot be decoded")
    assert f"ImageError: {broken}: cannot be decoded" in printed and "in stage evaluate" in printed
    # Both runs stored data: the type and place of the error, and images by their digest.
    prefect, home = project / ".prefect", f"sqlite:///{project / 'mlflow.db'}"
    assert any("ImageError at medfocus.images.decode:" in text for _, text in rows_of(prefect / "prefect.db"))
    runs = mlflow.MlflowClient(home).search_runs(["1"], "attributes.status = 'FAILED'")
    assert [run.data.tags["error"].partition(":")[0] for run in runs] == [
        "ImageError at medfocus.images.decode"
    ]
    with Path("reports/attribution.csv").open(newline="") as file:
        shown = {line["image"] for line in csv.DictReader(file)}
    with Path("data/manifests/phantom-breast.csv").open(newline="") as file:
        assert shown <= {line["sha256"][:12] for line in csv.DictReader(file)}
    page = Path("reports/index.html").read_text(encoding="utf-8")
    assert any(name in page for name in shown)

    owners = [path for path in Path("reports").rglob("*.csv") if path.name in FOR_THE_OWNER]
    assert planted_in([Path("incoming"), Path("data/manifests"), *owners]) == set(PLANTED), (
        "the search finds all names"
    )
    assert not planted_in([Path("data"), *owners, Path(".cache")]) & {HEADER, NAME}, "not even to the owner"
    assert len(owners) == 3 and planted_in([Path("reports/data/phantom-breast/left_out.csv")]) == {
        FOLDER,
        LEFT_OUT,
    }
    (sheet,) = Path("mlruns/models").rglob("datasheet.md")
    assert "- left out: 1, empty file" in sheet.read_text()
    assert "- kept, but reported: 1, test image with the same bytes in train" in sheet.read_text()
    shared = [path for path in Path("reports").rglob("*") if path.is_file() and path not in owners]
    databases = list(project.glob("mlflow.db*"))
    assert databases and (project / "mlruns").is_dir()
    assert planted_in([*databases, project / "mlruns", prefect, *shared, Path("dvc.lock")]) == set()


@pytest.mark.parametrize("form", ["text", "base64", "npz", "gzip", "PNG in HTML", "file name", "database"])
def test_the_search_looks_into_packed_data(tmp_path: Path, form: str) -> None:
    file = tmp_path / (f"{FILE.lower()}.txt" if form == "file name" else "file")
    content = f"x {FILE} y".encode()
    if form == "npz":
        np.savez_compressed(file, paths=np.array([FILE]))
    elif form == "PNG in HTML":
        save(np.zeros((4, 4), np.uint8), tmp_path / "x.png")
        data = (tmp_path / "x.png").read_bytes()
        (tmp_path / "x.png").unlink()
        file.write_bytes(b'<img src="data:image/png;base64,' + base64.b64encode(data) + b'">')
        assert planted_in([tmp_path]) == {TEXT}
        return
    elif form == "database":
        with contextlib.closing(sqlite3.connect(file)) as database, database:
            database.execute("CREATE TABLE logs (text)")
            database.execute(
                "INSERT INTO logs VALUES (?)", ["-" * 4080 + FILE]
            )  # across a page of the database
    else:
        packed = {"base64": base64.encodebytes, "gzip": gzip.compress}.get(form, bytes)
        file.write_bytes(b"" if form == "file name" else packed(content * 4))
    assert planted_in([tmp_path]) == {FILE}


def planted_in(places: Iterable[Path]) -> set[str]:
    """Return the names of PLANTED in files, in file names or in packed data."""
    found: set[str] = set()
    for place in places:
        for file in [place, *place.rglob("*")]:
            found |= {name for name in PLANTED if name.lower() in file.name.lower()}
            if file.is_file():
                for piece in pieces(file.read_bytes()):
                    found |= {name for name in PLANTED if name.lower().encode() in piece.lower()}
                found |= {name for name in PLANTED for _, text in rows_of(file) if name in text}
    return found


def pieces(data: bytes, depth: int = 3) -> Iterator[bytes]:
    """Yield bytes and the data packed in them: zip, gzip, base64 in one or more lines, the texts of a PNG.

    Also yield the bytes without zeros, because NumPy stores texts with four bytes per letter.
    """
    yield data
    yield data.replace(b"\0", b"")
    packed: list[bytes] = []
    if zipfile.is_zipfile(io.BytesIO(data)):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            packed += [archive.read(name) for name in archive.namelist()]
    if data[:2] == b"\x1f\x8b":
        packed.append(gzip.decompress(data))
    if data[:4] == b"\x89PNG":
        yield repr(Image.open(io.BytesIO(data)).info).encode()
    for text in re.findall(rb"[A-Za-z0-9+/\n]{32,}", data) if depth else []:
        text = text.replace(b"\n", b"")
        for start in range(4):  # the base64 text may begin at another offset
            packed.append(base64.b64decode(text[start : start + (len(text) - start) // 4 * 4]))
    for piece in packed:
        yield from pieces(piece, depth - 1)


def rows_of(file: Path) -> Iterator[tuple[str, str]]:
    """Yield the rows of a database; in its bytes, a page break may divide them."""
    if file.read_bytes()[:16] != b"SQLite format 3\0":
        return
    with contextlib.closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as database:
        for line in database.iterdump():
            yield file.name, line
