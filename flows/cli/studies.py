"""The studies of a project: which there are, and one run by the flow."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from flows.study.layout import Layout
from flows.study.params import Params, load_params
from flows.study.study import params_files


class Listed(NamedTuple):
    """A line of the list of studies."""

    name: str
    file: str
    datasets: str
    cells: str
    page: str  # of the last run; "" before


def run(params: Path) -> None:
    """Run the flow on a params file, as ``make run`` does. A fault ends the program with its sentence."""
    load_params(params)  # a fault is said before the libraries are loaded
    _must_be_a_clone()
    from flows import pipeline

    pipeline.main(["--params", str(params)])


def named(home: Path, name: str) -> Path:
    """The params file of a study by its name. Raises ValueError, which lists those that there are."""
    files = {path.stem: path for path in params_files(home)}
    if name not in files:
        raise ValueError(f"no study {name!r} in {home / 'studies'}; there are {', '.join(files)}.")
    return files[name]


def listed(home: Path) -> Iterator[Listed]:
    """Every study of a project; one whose file has a fault says so."""
    for path in params_files(home):
        file = Path(os.path.relpath(path)).as_posix()
        try:
            params = load_params(path)
        except (ValueError, OSError) as error:
            yield Listed(path.stem, file, "", "", " ".join(str(error).split()))
            continue
        folder = home if path.parent == home else path.parent / path.stem
        page = Layout(folder).page
        shown = Path(os.path.relpath(page)).as_posix() if page.is_file() else ""
        yield Listed(params.study.name, file, ", ".join(params.datasets), str(_cells(params)), shown)


def _cells(params: Params) -> int:
    from flows.study.cells import plan  # takes seconds

    return len(plan(params))


def _must_be_a_clone() -> None:
    from flows.study.study import find_home

    home = find_home(Path.cwd())
    if not (home / ".git").exists():
        raise ValueError(
            f"{home}: this folder is no git clone, and DVC needs one. Run `git init` here, or clone the "
            "project."
        )
