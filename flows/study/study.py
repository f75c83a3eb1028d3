"""A study is a folder with a params.yaml and a dvc.yaml; the project's root is the default one."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from flows.study.layout import Layout
from flows.study.params import Params, load_params, moved_paths, read_content

CODE_HERE = "  - code: .\n"  # the line of the project's dvc.yaml that says where the code of the stages is
_GENERATED = "# Made from the project's dvc.yaml by `make run PARAMS=...`; change that one.\n"


@dataclass(frozen=True)
class Study:
    """An opened study: its checked parameters and where its files live."""

    folder: Path  # holds params.yaml, dvc.yaml, dvc.lock, data/ and reports/
    home: Path  # the project: .dvc/, .cache/ and MLflow's default database, shared by its studies
    params: Params

    @property
    def paths(self) -> Layout:
        """Where the study's stages read and write."""
        return Layout(self.folder)

    def root(self, dataset: str) -> Path:
        """The folder of a data set's images."""
        return self.folder / self.params.datasets[dataset].root

    @property
    def stages(self) -> list[str]:
        """The names of the study's DVC stages, in the order in which the flow runs them."""
        each = ("ingest", "duplicates", "splits", "masks")
        return [
            *(f"phantoms@{modality}" for modality in self.params.phantoms),
            *(f"{stage}@{dataset}" for dataset in self.params.datasets for stage in each),
            "finetune",
            "evaluate",
        ]

    @property
    def cache(self) -> Path:
        """Content-keyed scratch space, shared by all studies; deleting it costs time and nothing else."""
        return self.home / ".cache"

    def shared_cache(self, kind: str) -> str:
        """The folder or URL for "masks" or "features", which machines may share."""
        return f"{self.params.scale.cache or self.cache}/{kind}"

    def cell_cache(self, key: str) -> Path:
        """The cached checkpoint of a cell, by its key."""
        return self.cache / "cells" / key[:2] / f"{key}.safetensors"

    @cached_property
    def version(self) -> str:
        """sha256 hex over the parameters and the manifests: what a process that lives on may not mix up."""
        manifests = sorted(self.paths.manifest("x").parent.glob("*.csv"))
        content = b"\0".join(path.read_bytes() for path in manifests)
        return hashlib.sha256(repr(self.params).encode() + content).hexdigest()


def find_home(start: Path) -> Path:
    """The project around ``start``: the nearest folder upwards that DVC was initialised in."""
    for folder in (start.resolve(), *start.resolve().parents):
        if (folder / ".dvc").is_dir():
            return folder
    raise FileNotFoundError(
        f"{start.resolve()} is in no project; go into one, or begin one with `medfocus new FOLDER`."
    )


def params_files(home: Path) -> list[Path]:
    """The params files of a project's studies, the embedded one first."""
    return [home / "params.yaml", *sorted((home / "studies").glob("*.yaml"))]


def here() -> Study:
    """The study of the working directory, as the stages see it."""
    return study_in(Path.cwd())


def study_in(folder: Path) -> Study:
    """The study of a folder, as it stands."""
    return Study(folder, find_home(folder), load_params(folder / "params.yaml"))


def open_study(params_file: Path, home: Path | None = None) -> Study:
    """Make ready the study that a params file describes.

    A ``params.yaml`` inside the project is a study where it stands. Any other file is copied to
    ``studies/<its name>/params.yaml``, the paths in it kept pointing to what they pointed to. A
    study folder without a current dvc.yaml gets the project's.
    """
    params = load_params(params_file)
    home = home or find_home(Path.cwd())
    source = params_file.resolve()
    if source.name == "params.yaml" and source.is_relative_to(home):
        folder = source.parent
        if "extends" in yaml.safe_load(source.read_text(encoding="utf-8")):
            raise ValueError(
                f"{params_file}: extends another file, but DVC reads a study's params.yaml as it stands. "
                "Give it another name, such as study.yaml: it is then copied, whole, to a study of its own."
            )
    else:
        folder = home / "studies" / (source.parent.name if source.name == "params.yaml" else source.stem)
        _adopt(source, folder)
        params = load_params(folder / "params.yaml")
    if folder != home:
        _write_if_changed(folder / "dvc.yaml", _stages_for(home, folder))
    return Study(folder, home, params)


def _stages_for(home: Path, folder: Path) -> str:
    text = (home / "dvc.yaml").read_text(encoding="utf-8")
    found = re.search(r"^  - code: (.+)\n", text, re.MULTILINE)
    if found is None:
        raise ValueError(f"{home / 'dvc.yaml'}: the line '- code: .' under vars is gone; put it back.")
    if Path(found[1]).is_absolute():  # of packages that are installed
        return _GENERATED + text
    there = Path(os.path.relpath(home / found[1], folder)).as_posix()
    return _GENERATED + text.replace(found[0], f"  - code: {there}\n", 1)


def _adopt(source: Path, folder: Path) -> None:
    content = moved_paths(read_content(source), source.parent, folder)
    head = f"# A copy of {source.name}, brought up to date from it at every run.\n"
    folder.mkdir(parents=True, exist_ok=True)
    _write_if_changed(folder / "params.yaml", head + _dump(content))


def _dump(content: dict[str, Any]) -> str:
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def _write_if_changed(path: Path, text: str) -> None:
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")
