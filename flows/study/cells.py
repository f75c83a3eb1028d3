"""The cells of a study: which there are, and the best of them."""

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

NOTHING = "0%"  # the support of a method that learns nothing


class Cell(NamedTuple):
    """One fit and its test: what a child run of MLflow and a checkpoint stand for."""

    dataset: str
    method: str
    focus: str
    support: str  # "5%", "16-shot", or NOTHING
    seed: int

    @property
    def name(self) -> str:
        """As a run, a checkpoint and a log line call it."""
        return f"{self.dataset} {self.method} {self.focus} {self.support} seed {self.seed}"

    @property
    def path(self) -> Path:
        """Of the checkpoint, below data/checkpoints."""
        support = self.support.replace("%", "pc")
        return Path(self.dataset, f"{self.method}_{self.focus}_{support}_{self.seed}.safetensors")


def plan(params: Params) -> list[Cell]:
    """Return every cell of the study, in order.

    Raises ValueError for an unknown setting or focus of a method, so that a typo fails before any work.
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
            only = params.study.only.get(method, params.study)
            for focus in modes:
                if not METHODS[params.method(method)[0]].learns:
                    cells.append(Cell(dataset, method, focus, NOTHING, params.study.seeds[0]))
                    continue
                cells += [
                    Cell(dataset, method, focus, support, seed)
                    for support in _supports(only)
                    for seed in only.seeds
                ]
    return cells


def methods_of(cells: Iterable[Cell]) -> list[str]:
    """The methods of cells, each once: for ``EncodedDataset.embed``."""
    return list(dict.fromkeys(cell.method for cell in cells))


def _supports(of: StudyParams | OnlyParams) -> list[str]:
    return [*(f"{p:g}%" for p in of.percents), *(f"{n}-shot" for n in of.shots)]


def best_cell(study: Study, dataset: str, cells: Iterable[Cell]) -> Cell:
    """The cell with the best validation: the highest lower end of its out-of-fold accuracy's interval.

    The test split has no say. Among equals the first in the order of the params file wins.

    Raises:
        ValueError: No cell of the data set could be validated.
    """
    methods = study.params.validation.methods
    candidates = [
        cell
        for cell in cells
        if cell.dataset == dataset and cell.method in methods and cell.focus not in CONTROLS
    ]

    def worth(cell: Cell) -> float:
        header = checkpoint.read_header(study.paths.checkpoint(cell))
        return wilson_lower(header.validation_correct, header.validation_count)

    best = max(candidates, key=worth, default=None)
    if best is None or worth(best) == 0:
        raise ValueError(
            f"params.yaml: no cell of {dataset} could be validated, so none can be registered; name a "
            "method of study.methods in validation.methods, and give every class two images or more in "
            "the largest support."
        )
    return best
