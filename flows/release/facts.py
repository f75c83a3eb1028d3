"""The facts that the page shows of each data set: scores, errors, calibration, masks, explanations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from flows.release.explanations import Explained, explain_cell, explained_cells
from flows.stages.scoring import main_classifier, test_sets
from flows.study.cells import Cell, best_cell
from flows.study.dataset import EncodedDataset
from medfocus.datasets.duplicates import read_pairs
from medfocus.evaluation import metrics
from medfocus.evaluation.comparison import Scored
from medfocus.reports.data_warnings import data_warnings
from medfocus.reports.page_content import Calibration, Confusion, Example, Recalls, Sets
from medfocus.reports.rows import system_name
from medfocus.serving import checkpoint
from medfocus.storage.tables import read_csv

_CALIBRATED = 4  # variants of MedFocusCLIP with a reliability curve, in addition to the baseline

Draws = dict[tuple[str, float], list[np.ndarray]]  # (system, percent of train) -> (N, K) for each draw


@dataclass
class Facts:
    """The page's facts. ``add`` collects the facts of one data set after the other."""

    blocks: list[tuple[str, str]] = field(default_factory=list)  # (data set, test set)
    tests: list[Scored] = field(default_factory=list)  # one for each block
    gallery: list[Example] = field(default_factory=list)
    confusions: list[Confusion] = field(default_factory=list)
    calibrations: list[Calibration] = field(default_factory=list)
    sets: list[Sets] = field(default_factory=list)
    recalls: list[Recalls] = field(default_factory=list)
    masks: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    warnings: dict[str, list[str]] = field(default_factory=dict)
    explained: list[Explained] = field(default_factory=list)

    def add(self, dataset: EncodedDataset, cells: Sequence[Cell]) -> None:
        """Collect a data set's facts from the outputs of its stages."""
        name = dataset.name
        self.masks[name] = read_csv(dataset.paths.report(name, "masks.csv"))
        pairs = read_pairs(dataset.paths.report(name, "duplicates.csv"))
        self.warnings[name] = data_warnings(dataset.records.values(), dataset.splits, pairs)
        with np.load(dataset.paths.predictions(name), allow_pickle=False) as file:
            predicted = {cell: main_classifier(file, cell).astype(np.float64) for cell in cells}
        draws: Draws = {}
        for cell, probabilities in predicted.items():
            system = system_name(cell.method, cell.focus)
            draws.setdefault((system, dataset.percent_of_train(cell)), []).append(probabilities)
        labels = dataset.labels(dataset.splits.test)
        self._add_tests(dataset, draws, labels)
        self._add_best(dataset, predicted, labels)
        self._add_calibrations(dataset, draws, labels)
        self.recalls.append(_recalls(dataset, draws, labels))

    def _add_best(
        self, dataset: EncodedDataset, predicted: dict[Cell, np.ndarray], labels: np.ndarray
    ) -> None:
        """Add the confusion matrix and the sets of the best cell, and explain ``explained_cells``."""
        try:
            best = best_cell(dataset.study, dataset.name, predicted)
        except ValueError:  # no cell could be validated
            return
        counts = metrics.confusion(predicted[best].argmax(axis=1), labels, len(dataset.classes))
        self.confusions.append(Confusion(dataset.name, best.name, dataset.classes, counts))
        calibration = checkpoint.read_header(dataset.paths.checkpoint(best)).calibration
        self.sets.append(
            Sets(
                dataset.name,
                best.name,
                dataset.classes,
                calibration.confidence,
                calibration.sets(predicted[best]),
                labels,
                calibration.no_set,
            )
        )
        for cell in explained_cells(best, predicted):
            rows, examples = explain_cell(dataset, cell, predicted[cell])
            self.explained += rows
            self.gallery += examples

    def _add_tests(self, dataset: EncodedDataset, draws: Draws, labels: np.ndarray) -> None:
        """Add the correct answers of all systems on each test set."""
        test = dataset.splits.test
        for test_set, members in test_sets(dataset).items():
            at = np.isin(test, members)
            patients = np.array([dataset.records[path].patient or path for path in test])[at]
            correct = {
                key: np.stack([probabilities[at].argmax(axis=1) == labels[at] for probabilities in each])
                for key, each in draws.items()
            }
            self.blocks.append((dataset.name, test_set))
            self.tests.append(Scored(correct, patients))

    def _add_calibrations(self, dataset: EncodedDataset, draws: Draws, labels: np.ndarray) -> None:
        """Add reliability curves of the baseline and MedFocusCLIP, zero-shot and at the largest support."""
        largest = max(percent for _, percent in draws)
        medfocus = [name for name, at in draws if at == largest and name.startswith("medfocusclip")]
        for system in dict.fromkeys([dataset.study.params.report.baseline, *medfocus[:_CALIBRATED]]):
            for percent in (0.0, largest):
                if (system, percent) in draws:
                    each = draws[system, percent]
                    curve = metrics.reliability(np.concatenate(each), np.tile(labels, len(each)))
                    title = f"{system}, {percent:g} % of train"
                    self.calibrations.append(Calibration(dataset.name, title, curve))


def _recalls(dataset: EncodedDataset, draws: Draws, labels: np.ndarray) -> Recalls:
    """Return each class's recall at the smallest support; at 0 % if no method learns."""
    smallest = min((percent for _, percent in draws if percent), default=0.0)
    return Recalls(
        dataset.name,
        f"{smallest:g} % of train, whole test set",
        dataset.classes,
        tuple(np.bincount(labels, minlength=len(dataset.classes)).tolist()),
        {
            system: np.stack([metrics.per_class_recall(probabilities, labels) for probabilities in each])
            for (system, percent), each in draws.items()
            if percent == smallest
        },
    )
