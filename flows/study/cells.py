"""The cells of a study, and the selection of the best one."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from flows.study.methods import build_method
from flows.study.params import OnlyParams, Params, StudyParams
from flows.study.study import Study
from medfocus.clip.regions import REGIONS
from medfocus.evaluation.metrics import wilson_lower
from medfocus.focus.controls import CONTROLS
from medfocus.focus.modes import FOCUS
from medfocus.methods import METHODS
from medfocus.serving import checkpoint

NOTHING = "0%"  # support of a method that does not learn


class Cell(NamedTuple):
    """One fit and its test. Each cell has one checkpoint and one child run of MLflow."""

    dataset: str
    method: str
    focus: str
    support: str  # "5%", "16-shot", or NOTHING
    seed: int

    @property
    def name(self) -> str:
        """Name in MLflow, predictions and reports."""
        return f"{self.dataset} {self.method} {self.focus} {self.support} seed {self.seed}"

    @property
    def path(self) -> Path:
        """Path of the checkpoint below data/checkpoints."""
        support = self.support.replace("%", "pc")
        return Path(self.dataset, f"{self.method}_{self.focus}_{support}_{self.seed}.safetensors")


def plan(params: Params) -> list[Cell]:
    """Return every cell of the study, in order.

    Raises ValueError for an unknown setting or focus of a method, so that a typo is found before any work.
    """
    known = (*FOCUS, *REGIONS, *CONTROLS)
    for name, modes in params.study.methods.items():
        build_method(params, name, None)
        if unknown := [focus for focus in modes if focus not in known]:
            raise ValueError(
                f"params.yaml: study.methods.{name} has the focus {unknown[0]!r}; "
                f"use one of {', '.join(known)}."
            )
    cells: list[Cell] = []
    for dataset in params.datasets:
        for method, modes in params.study.methods.items():
            part = params.study.only.get(method, params.study)
            supports, seeds = _supports(part), part.seeds
            if not METHODS[params.method(method)[0]].learns:
                supports, seeds = [NOTHING], params.study.seeds[:1]
            cells += [
                Cell(dataset, method, focus, support, seed)
                for focus in modes
                for support in supports
                for seed in seeds
            ]
    return cells


def methods_of(cells: Iterable[Cell]) -> list[str]:
    """Return the methods of cells, each once."""
    return list(dict.fromkeys(cell.method for cell in cells))


def _supports(part: StudyParams | OnlyParams) -> list[str]:
    return [*(f"{p:g}%" for p in part.percents), *(f"{n}-shot" for n in part.shots)]


def best_cell(study: Study, dataset: str, cells: Iterable[Cell]) -> Cell:
    """Return the cell with the best validation, by the lower bound of its out-of-fold accuracy's interval.

    Only cells at their draw's largest support can be the best. The test set is not used. Of equal cells, the
    first in the params file wins.

    Raises:
        ValueError: No cell of the data set was validated.
    """
    methods = study.params.validation.methods
    candidates = [
        cell
        for cell in cells
        if cell.dataset == dataset and cell.method in methods and cell.focus not in CONTROLS
    ]

    headers = {cell: checkpoint.read_header(study.paths.checkpoint(cell)) for cell in candidates}
    largest: dict[int, int] = {}  # seed -> images of its largest support
    for cell, header in headers.items():
        largest[cell.seed] = max(header.facts["n_train"], largest.get(cell.seed, 0))
    bounds = {
        cell: wilson_lower(header.validation_correct, header.validation_count)
        for cell, header in headers.items()
        if header.facts["n_train"] == largest[cell.seed]
    }
    best = max(bounds, key=bounds.__getitem__, default=None)
    if best is None or bounds[best] == 0:
        raise ValueError(
            f"params.yaml: no cell of {dataset} was validated, so none can be registered. Name a method of "
            "study.methods in validation.methods, and give every class at least two images in the largest "
            "support."
        )
    return best
