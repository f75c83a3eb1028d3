"""Every path of a study, below its folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flows.study.cells import Cell


class Layout:
    """The paths that a study's stages read and write; ``dvc.yaml`` names the same paths."""

    def __init__(self, folder: Path) -> None:
        """Lay out the folder, which holds params.yaml, dvc.yaml, dvc.lock, data/ and reports/."""
        self.params = folder / "params.yaml"
        self.data = folder / "data"  # outputs for later stages
        self.checkpoints = self.data / "checkpoints"
        self.reports = folder / "reports"  # outputs for people
        self.results = self.reports / "results.csv"  # scores by cell key: equal in every run
        self.study = self.reports / "study.csv"  # the same scores by this machine's MLflow runs
        self.plots = self.reports / "plots.csv"  # points of ``dvc plots``
        self.metrics = self.reports / "metrics.json"  # scores of the best cells, for ``dvc exp show``
        self.figures = self.reports / "figures"
        self.costs = self.reports / "costs.csv"
        self.attribution = self.reports / "attribution.csv"
        self.page = self.reports / "index.html"

    def phantoms(self, modality: str) -> Path:
        """Return the folder of a procedural data set."""
        return self.data / "phantoms" / modality

    def manifest(self, dataset: str) -> Path:
        """Return the manifest of a data set."""
        return self.data / "manifests" / f"{dataset}.csv"

    def splits(self, dataset: str) -> Path:
        """Return the file of a data set's test sets and supports."""
        return self.data / "splits" / f"{dataset}.json"

    def masks(self, dataset: str) -> Path:
        """Return the folder of a data set's published masks."""
        return self.data / "masks" / dataset

    def adapter(self, dataset: str) -> Path:
        """Return the adapter behind a data set's masks; it exists if the strategy is "adapter"."""
        return self.masks(dataset) / "adapter.safetensors"

    def checkpoint(self, cell: Cell) -> Path:
        """Return a cell's checkpoint."""
        return self.checkpoints / cell.path

    def predictions(self, dataset: str) -> Path:
        """Return the file of every cell's probabilities for a data set's test images."""
        return self.data / "predictions" / f"{dataset}.npz"

    def report(self, dataset: str, name: str) -> Path:
        """Return a report on a data set: left_out, reported, duplicates or masks (.csv), or masks.png."""
        return self.reports / "data" / dataset / name
