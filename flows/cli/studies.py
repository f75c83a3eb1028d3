"""The studies of a project: their list, and the run of one study."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from flows.study.layout import Layout
from flows.study.params import Params, load_params
from flows.study.study import params_files


class Row(NamedTuple):
    """A row of the list of studies."""

    name: str
    file: str
    datasets: str
    cells: str
    page: str  # path of the page of the last run; "" before the first run


def run(params: Path) -> None:
    """Run the flow on a params file, like ``make run``. A fault ends the program with its message."""
    load_params(params)  # reports a fault before the libraries load
    _check_git()
    from flows import pipeline

    pipeline.main(["--params", str(params)])


def params_file(home: Path, name: str) -> Path:
    """Return the params file of a study. Raises ValueError, with a list of the studies, if there is none."""
    files = {path.stem: path for path in params_files(home)}
    if name not in files:
        raise ValueError(f"no study {name!r} in {home / 'studies'}. Choose from {', '.join(files)}.")
    return files[name]


def rows(home: Path) -> Iterator[Row]:
    """Yield every study of a project. If its params file has a fault, the last column shows the fault."""
    for path in params_files(home):
        file = Path(os.path.relpath(path)).as_posix()
        try:
            params = load_params(path)
        except (ValueError, OSError) as error:
            yield Row(path.stem, file, "", "", " ".join(str(error).split()))
            continue
        folder = home if path.parent == home else path.parent / path.stem
        page = Layout(folder).page
        page_path = Path(os.path.relpath(page)).as_posix() if page.is_file() else ""
        yield Row(params.study.name, file, ", ".join(params.datasets), str(_cells(params)), page_path)


def _cells(params: Params) -> int:
    from flows.study.cells import plan  # takes seconds

    return len(plan(params))


def _check_git() -> None:
    from flows.study.study import find_home

    home = find_home(Path.cwd())
    if not (home / ".git").exists():
        raise ValueError(
            f"{home}: not a git repository, and DVC needs one. Run `git init` here, or clone the project."
        )
