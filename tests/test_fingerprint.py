"""A cache's key changes with every module and package behind its results, and with nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
from PIL import Image

from flows.study.dataset import cell_code, feature_key
from flows.study.methods import build_method
from flows.study.params import load_params
from medfocus.clip.build import build_clip
from medfocus.datasets.duplicates import find_duplicates
from medfocus.datasets.ingest import ingest
from medfocus.focus.view import view_key
from medfocus.masks.otsu import OtsuSegmenter
from medfocus.masks.sam2.adapter import adapter_key
from medfocus.masks.sam2.fast_segmenter import FastSegmenter
from medfocus.masks.sam2.model import load_predictor
from medfocus.masks.sam2.retrieval import RetrievalSegmenter, TextRank
from medfocus.masks.sam2.segmenter import Sam2Segmenter, load_sam2
from medfocus.masks.settings import Sam2Settings
from medfocus.storage import fingerprint
from medfocus.storage.fingerprint import closure, code_key
from tests.segmenters import hiera

ROOT = Path(__file__).resolve().parents[1]


def project(tmp_path: Path, **sources: str) -> Path:
    """Create a project from sources by module name, with __ for each dot."""
    for name, source in sources.items():
        file = tmp_path.joinpath(*name.split("__")).with_suffix(".py")
        file.parent.mkdir(parents=True, exist_ok=True)
        (file.parent / "__init__.py").touch()
        file.write_text(source, encoding="utf-8")
    return tmp_path


def names(files: list[Path], root: Path) -> set[str]:
    return {file.relative_to(root).with_suffix("").as_posix().replace("/", ".") for file in files}


def test_a_closure_follows_imports_in_functions_and_relative_imports(tmp_path: Path) -> None:
    root = project(
        tmp_path,
        medfocus__a="def f():\n    from medfocus.b import x\n    import medfocus.c\n",
        medfocus__b="from .d import y\nx = y\n",
        medfocus__c="import numpy\n",
        medfocus__d="from . import e\ny = e\n",
        medfocus__e="",
        medfocus__f="import medfocus.a\n",
    )
    assert names(closure(("medfocus.a",), root), root) == {f"medfocus.{name}" for name in "abcde"}


def test_imports_for_type_checkers_are_not_followed(tmp_path: Path) -> None:
    source = "if TYPE_CHECKING:\n    import medfocus.b\nelse:\n    import medfocus.c\n"
    root = project(tmp_path, medfocus__a=source, medfocus__b="", medfocus__c="")
    assert names(closure(("medfocus.a",), root), root) == {"medfocus.a", "medfocus.c"}


def test_a_package_counts_only_for_names_that_it_defines(tmp_path: Path) -> None:
    root = project(tmp_path, medfocus__room__b="", medfocus__a="from medfocus.room import b\n")
    assert names(closure(("medfocus.a",), root), root) == {"medfocus.a", "medfocus.room.b"}
    (root / "medfocus/a.py").write_text("from medfocus.room import CONSTANT\n", encoding="utf-8")
    assert names(closure(("medfocus.a",), root), root) == {"medfocus.a", "medfocus.room.__init__"}


def test_a_module_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no module medfocus\.nowhere; check the spelling"):
        closure(("medfocus.nowhere",), tmp_path)


def test_the_version_of_a_package_counts_where_it_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = project(tmp_path, medfocus__a="import open_clip\n", medfocus__b="import json\n")
    before = {module: code_key((module,), root) for module in ("medfocus.a", "medfocus.b")}
    monkeypatch.setattr(fingerprint, "version", lambda name: "another" if name == "timm" else "1")
    code_key.cache_clear()
    assert code_key(("medfocus.a",), root) != before["medfocus.a"]
    assert code_key(("medfocus.b",), root) == before["medfocus.b"]


def test_a_closure_holds_every_module_that_an_import_loads() -> None:
    program = "import sys, medfocus.clip.build; print(*(m for m in sys.modules if m.startswith('medfocus.')))"
    loaded = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    modules = {name for name in loaded.stdout.split() if not (ROOT / name.replace(".", "/")).is_dir()}
    assert len(modules) > 3
    assert modules <= names(closure(("medfocus.clip.build",)), ROOT)


# --- the caches


def facts_key(folder: Path) -> str:
    """Return the name of the folder in which ingestion caches facts about images."""
    for label in "ab":
        (folder / "images" / label).mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), ord(label)).save(folder / "images" / label / "x.png")
    ingest(folder / "images", cache=folder / "facts")
    (key,) = os.listdir(folder / "facts")
    shutil.rmtree(folder / "facts")
    return key


def thumbnails_key(folder: Path) -> str:
    """Return the name of the folder in which the search for duplicates caches thumbnails."""
    find_duplicates(ingest(folder / "images").records, folder / "images", cache=folder / "thumbnails")
    (key,) = os.listdir(folder / "thumbnails")
    shutil.rmtree(folder / "thumbnails")
    return key


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Callable[[], str]]:
    """Return cache -> function that computes its key from the project's present code."""
    folder = tmp_path_factory.mktemp("caches")
    encoder = build_clip("pocket", "pocket")
    method = build_method(load_params(ROOT / "params.yaml"), "coop", encoder)

    settings = Sam2Settings("pocket", "pocket", 128, "grid", points_per_side=2)
    predictor, model_key = load_predictor(settings.config, settings.checkpoint, settings.image_size)

    def plain() -> Sam2Segmenter:
        return Sam2Segmenter(predictor, model_key, settings)

    hiera_settings = Sam2Settings(hiera(folder), "random:0", 128, "grid")

    def view(focus: str) -> str:
        return view_key(focus=focus, frame=encoder.frame, feather=0.01)

    return {
        "facts": lambda: facts_key(folder),
        "thumbnails": lambda: thumbnails_key(folder),
        "otsu masks": lambda: OtsuSegmenter().key,
        "sam2 masks": lambda: plain().key,
        "sam2 features": lambda: plain().features_key,
        "fast masks": lambda: FastSegmenter(load_sam2(hiera_settings)).key,
        "adapters": lambda: adapter_key(plain(), "pairs", {}),
        "retrieved masks": lambda: RetrievalSegmenter(plain(), TextRank.of(encoder, ["a lesion"])).key,
        "views": lambda: view("multiply"),
        "region views": lambda: view("alpha"),
        "features": lambda: feature_key(method, encoder, view("multiply")),
        "cells": lambda: cell_code(type(method), encoder),
    }


# Cache -> some modules that change its key, and some that do not.
COUNTS = {
    "facts": ("datasets.scan images.decode images.dicom images.gdcm_worker", "masks.otsu clip.encoder"),
    "thumbnails": ("datasets.duplicates images.nifti", "datasets.ingest masks.otsu"),
    "otsu masks": ("masks.otsu masks.candidates images.dicom", "masks.store masks.sam2.segmenter"),
    "sam2 masks": ("masks.sam2.segmenter masks.sam2.edges masks.candidates", "masks.sam2.adapter masks.otsu"),
    "sam2 features": ("masks.sam2.segmenter masks.sam2.trunk images.decode", "masks.sam2.adapter masks.otsu"),
    "fast masks": ("masks.sam2.fast_decoder masks.sam2.segmenter masks.candidates", "masks.sam2.adapter"),
    "adapters": ("masks.sam2.adapter masks.sam2.segmenter", "masks.sam2.retrieval masks.otsu"),
    "retrieved masks": (
        "masks.sam2.retrieval masks.sam2.segmenter clip.build",
        "masks.sam2.adapter",
    ),
    "views": (
        "focus.view focus.modes focus.marks focus.augment focus.crop images.geometry images.decode",
        "clip.encoder",
    ),
    "region views": ("focus.view focus.modes clip.regions", "masks.otsu clip.encoder focus.controls"),
    "features": (
        "learning.frozen clip.encoder clip.build clip.tail clip.towers.choose clip.regions masks.candidates",
        "learning.probe methods.slca",
    ),
    "cells": (
        "methods.coop clip.prompt_learning learning.fitting learning.calibration learning.selection "
        "clip.build",
        "methods.slca masks.otsu",
    ),
}


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Copy this project's sources, and take fingerprints of the copy."""
    for package in ("medfocus", "flows"):
        for file in (ROOT / package).rglob("*.py"):
            copied = tmp_path / file.relative_to(ROOT)
            copied.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copied)
    monkeypatch.setattr(fingerprint, "PROJECT", tmp_path)
    fingerprint.code_key.cache_clear()
    yield tmp_path
    fingerprint.code_key.cache_clear()


MODULES = sorted({module for counts in COUNTS.values() for part in counts for module in part.split()})


@pytest.mark.parametrize("module", MODULES)
def test_a_cache_s_key_changes_only_with_the_code_behind_it(
    module: str, copy: Path, caches: dict[str, Callable[[], str]]
) -> None:
    assert COUNTS.keys() == caches.keys()
    before = {name: key() for name, key in caches.items()}
    with (copy / "medfocus" / f"{module.replace('.', '/')}.py").open("a") as file:
        file.write("\nEDITED = True\n")
    fingerprint.code_key.cache_clear()
    changed = {name for name, key in caches.items() if key() != before[name]}
    assert changed >= {name for name, (inside, _) in COUNTS.items() if module in inside.split()}
    assert not changed & {name for name, (_, outside) in COUNTS.items() if module in outside.split()}


def test_another_open_clip_changes_the_keys_of_features_but_not_of_masks(
    copy: Path, caches: dict[str, Callable[[], str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {name: key() for name, key in caches.items()}
    installed = {"open_clip_torch": "0"}
    monkeypatch.setattr(fingerprint, "version", lambda name: installed.get(name) or version(name))
    fingerprint.code_key.cache_clear()
    changed = {name for name, key in caches.items() if key() != before[name]}
    assert changed >= {"features", "cells", "retrieved masks"}
    assert not changed & {"facts", "thumbnails", "otsu masks", "sam2 masks"}
