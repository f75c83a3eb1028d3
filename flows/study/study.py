"""A study is a folder with a params.yaml and a dvc.yaml. The project's root is the default study."""

from __future__ import annotations

import argparse
import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from flows.study.content import moved_paths, read_content
from flows.study.layout import Layout
from flows.study.params import Params, load_params
from flows.study.texts import names_file

CODE_HERE = "  - code: .\n"  # line of the project's dvc.yaml that locates the code of the stages
_GENERATED = "# Made from the project's dvc.yaml by `make run PARAMS=...`; edit that file instead.\n"


@dataclass(frozen=True)
class Study:
    """An opened study: its checked parameters and its folders."""

    folder: Path  # holds params.yaml, dvc.yaml, dvc.lock, data/ and reports/
    home: Path  # the project: its studies share .dvc/, .cache/ and MLflow's default database
    params: Params

    @property
    def paths(self) -> Layout:
        """Paths of the study's files."""
        return Layout(self.folder)

    def root(self, dataset: str) -> Path:
        """Return the folder of a data set's images."""
        return self.folder / self.params.datasets[dataset].root

    @property
    def stages(self) -> list[str]:
        """Names of the study's DVC stages, in the order in which the flow runs them."""
        each = ("ingest", "duplicates", "splits", "masks")
        return [
            *(f"phantoms@{modality}" for modality in self.params.phantoms),
            *(f"{stage}@{dataset}" for dataset in self.params.datasets for stage in each),
            "finetune",
            "evaluate",
        ]

    @property
    def cache(self) -> Path:
        """Cache of all studies, keyed by content; it may be deleted, and costs only time to rebuild."""
        return self.home / ".cache"

    def shared_cache(self, kind: str) -> str:
        """Return the folder or URL of the cache of a kind such as "masks", which machines may share."""
        return f"{self.params.scale.cache or self.cache}/{kind}"

    def cell_cache(self, key: str) -> Path:
        """Return the path of a cell's cached checkpoint, by the cell's key."""
        return self.cache / "cells" / key[:2] / f"{key}.safetensors"

    @cached_property
    def version(self) -> str:
        """sha256 hex of the parameters and manifests; if it changes, a worker opens the study again."""
        manifests = sorted(self.paths.manifest("x").parent.glob("*.csv"))
        content = b"\0".join(path.read_bytes() for path in manifests)
        return hashlib.sha256(repr(self.params).encode() + content).hexdigest()


def find_home(start: Path) -> Path:
    """Return the project around ``start``: the nearest folder, upwards, that contains .dvc/."""
    for folder in (start.resolve(), *start.resolve().parents):
        if (folder / ".dvc").is_dir():
            return folder
    raise FileNotFoundError(
        f"{start.resolve()} is not in a project. Change to one, or create one with `medfocus new FOLDER`."
    )


def params_files(home: Path) -> list[Path]:
    """Return the params files of a project's studies, the default study's first."""
    return [home / "params.yaml", *sorted((home / "studies").glob("*.yaml"))]


def here() -> Study:
    """Open the study of the working directory, as a stage does."""
    return study_in(Path.cwd())


def here_with(option: str, description: str | None, arguments: Sequence[str] | None) -> tuple[Study, Any]:
    """Open the study of the working directory; return it with the value of a stage's one option."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(option, required=True, dest="value")
    value = parser.parse_args(arguments).value
    return here(), value


def study_in(folder: Path) -> Study:
    """Open the study of a folder without changing its files."""
    return Study(folder, find_home(folder), load_params(folder / "params.yaml"))


def open_study(params_file: Path, home: Path | None = None) -> Study:
    """Open the study that a params file describes, and prepare its folder.

    A ``params.yaml`` inside the project makes its own folder a study. Any other file is copied to
    ``studies/<its name>/params.yaml``, with its paths rewritten to the same targets. A study outside the
    project's root gets a copy of the project's dvc.yaml.
    """
    params = load_params(params_file)
    home = home or find_home(Path.cwd())
    source = params_file.resolve()
    if source.name == "params.yaml" and source.is_relative_to(home):
        folder = source.parent
        written = yaml.safe_load(source.read_text(encoding="utf-8"))
        of_texts = any(map(names_file, written.get("methods", {}).values()))
        if "extends" in written or of_texts:
            other, field = ("a file of texts", "texts") if of_texts else ("another file", "extends")
            raise ValueError(
                f"{params_file}: names {other}, but DVC cannot follow `{field}` in a params.yaml. "
                "Rename the file, for example to study.yaml; its parameters are then copied to studies/."
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
    match = re.search(r"^  - code: (.+)\n", text, re.MULTILINE)
    if match is None:
        raise ValueError(f"{home / 'dvc.yaml'}: the line '- code: .' under vars is missing. Restore it.")
    if Path(match[1]).is_absolute():  # installed packages
        return _GENERATED + text
    code = Path(os.path.relpath(home / match[1], folder)).as_posix()
    return _GENERATED + text.replace(match[0], f"  - code: {code}\n", 1)


def _adopt(source: Path, folder: Path) -> None:
    content = moved_paths(read_content(source), source.parent, folder)
    head = f"# A copy of {source.name}; every run updates it.\n"
    folder.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    _write_if_changed(folder / "params.yaml", head + text)


def _write_if_changed(path: Path, text: str) -> None:
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")
