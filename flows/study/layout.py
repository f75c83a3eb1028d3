"""Every path of a study, below its folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flows.study.cells import Cell


@dataclass(frozen=True)
class Layout:
    """Where a study's stages read and write; ``dvc.yaml`` names the same places."""

    folder: Path  # holds params.yaml, dvc.yaml, dvc.lock, data/ and reports/

    @property
    def params(self) -> Path:
        """The checked parameters."""
        return self.folder / "params.yaml"

    @property
    def data(self) -> Path:
        """The outputs of the stages that later stages read."""
        return self.folder / "data"

    @property
    def reports(self) -> Path:
        """The outputs that people read."""
        return self.folder / "reports"

    # data/, by data set

    def phantoms(self, modality: str) -> Path:
        """An embedded data set's images."""
        return self.data / "phantoms" / modality

    def manifest(self, dataset: str) -> Path:
        """The records of a data set's images."""
        return self.data / "manifests" / f"{dataset}.csv"

    def splits(self, dataset: str) -> Path:
        """The test sets and supports of a data set."""
        return self.data / "splits" / f"{dataset}.json"

    def masks(self, dataset: str) -> Path:
        """The folder of a data set's published masks."""
        return self.data / "masks" / dataset

    def adapter(self, dataset: str) -> Path:
        """The adapter that made a data set's masks, if the strategy is "adapter"."""
        return self.masks(dataset) / "adapter.safetensors"

    @property
    def checkpoints(self) -> Path:
        """The folder of the fitted cells."""
        return self.data / "checkpoints"

    def checkpoint(self, cell: Cell) -> Path:
        """A fitted cell."""
        return self.checkpoints / cell.path

    def predictions(self, dataset: str) -> Path:
        """Every cell's probabilities for a data set's test images."""
        return self.data / "predictions" / f"{dataset}.npz"

    # reports/data/, by data set

    def report(self, dataset: str, name: str) -> Path:
        """One of a data set's reports: left_out, reported, duplicates or masks (.csv), or masks.png."""
        return self.reports / "data" / dataset / name

    # reports/, of the whole study

    @property
    def results(self) -> Path:
        """The scores by cell key: an output of DVC, which a rerun repeats exactly."""
        return self.reports / "results.csv"

    @property
    def study(self) -> Path:
        """The same scores by the ids of this machine's MLflow runs."""
        return self.reports / "study.csv"

    @property
    def plots(self) -> Path:
        """The points of ``dvc plots``."""
        return self.reports / "plots.csv"

    @property
    def metrics(self) -> Path:
        """The scores of each data set's best cell by validation, for ``dvc exp show``."""
        return self.reports / "metrics.json"

    @property
    def figures(self) -> Path:
        """The folder of the figures."""
        return self.reports / "figures"

    @property
    def costs(self) -> Path:
        """What each fit and prediction cost."""
        return self.reports / "costs.csv"

    @property
    def attribution(self) -> Path:
        """Where systems looked in test images, as numbers."""
        return self.reports / "attribution.csv"

    @property
    def page(self) -> Path:
        """The whole study as one page."""
        return self.reports / "index.html"
