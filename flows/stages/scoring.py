"""Score checkpoints on the test sets of their data set."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from flows.study.cells import Cell
from flows.study.dataset import EncodedDataset
from medfocus.evaluation import metrics
from medfocus.learning.calibration import Calibration
from medfocus.reports.rows import StudyRow
from medfocus.serving import checkpoint

METRICS = ("accuracy", "balanced_accuracy", "macro_f1", "auroc", "ece")
CALIBRATION = ("ece_uncalibrated", "temperature", "coverage", "mean_set_size")


def predict(
    dataset: EncodedDataset, cell: Cell, path: Path
) -> tuple[dict[str, np.ndarray], checkpoint.Header, float]:
    """Load the checkpoint at ``path`` and predict the whole test set, which is embedded already.

    Returns:
        Each classifier's logits (N, K), the checkpoint's header, and the images per second that the method's
        own part predicts.
    """
    method, header = checkpoint.load(path, dataset.encoder_for(cell.focus))
    inputs = dataset.inputs(method, cell.focus, dataset.splits.test, 1)[0]  # (N, ...)
    start = time.perf_counter()
    logits = method.logits(inputs)
    images_per_second = len(inputs) / (time.perf_counter() - start)
    return {name: values.double().numpy() for name, values in logits.items()}, header, images_per_second


def calibrations(header: checkpoint.Header, classifiers: Iterable[str]) -> dict[str, Calibration]:
    """Return the calibration of each classifier, the main one first; only the main one is served."""
    main, *others = classifiers
    return {main: header.calibration} | dict.fromkeys(others, Calibration())


def main_classifier(predictions: np.lib.npyio.NpzFile, cell: Cell) -> np.ndarray:
    """Return the probabilities (N, K) of a cell's main classifier on the whole test set."""
    return predictions[next(name for name in predictions.files if name.startswith(f"{cell.name} "))]


def score(
    dataset: EncodedDataset, cell: Cell, header: checkpoint.Header, logits: dict[str, np.ndarray]
) -> dict[tuple[str, str], StudyRow]:
    """Return one row for each (classifier, test set); the first classifier is the method's main one."""
    test, labels = dataset.splits.test, dataset.labels(dataset.splits.test)
    main_classifier = next(iter(logits))
    rows = {}
    for classifier, calibration in calibrations(header, logits).items():
        before = Calibration().probabilities(logits[classifier])
        after = calibration.probabilities(logits[classifier])
        sets = calibration.sets(after)
        for test_set, members in test_sets(dataset).items():
            at = np.isin(test, members)
            coverage, size = (math.nan, math.nan) if sets is None else metrics.coverage(sets[at], labels[at])
            rows[classifier, test_set] = StudyRow(
                dataset=dataset.name,
                method=cell.method if classifier == main_classifier else f"{cell.method}-{classifier}",
                focus=cell.focus,
                percent_of_train=dataset.percent_of_train(cell),
                seed=cell.seed,
                **metrics.score(after[at], labels[at]),
                ece_uncalibrated=metrics.reliability(before[at], labels[at]).ece,
                temperature=calibration.temperature,
                coverage=coverage,
                mean_set_size=size,
                test_set=test_set,
                n_train=header.facts["n_train"],
                n_test=len(members),
                cell_key=header.facts["key"],
                mlflow_run_id="",
            )
    return rows


def test_sets(dataset: EncodedDataset) -> dict[str, list[str]]:
    """Return the paths of each test set: "official", and "clean" if some official images have twins in train.

    A test set that the study draws itself has no twins in train: it is "clean", and the only one.
    """
    splits = dataset.splits
    if all(record.split != "test" for record in dataset.records.values()):
        return {"clean": splits.test}
    clean = {} if splits.clean_test == splits.test else {"clean": splits.clean_test}
    return {"official": splits.test} | clean


def mlflow_metrics(header: checkpoint.Header, rows: dict[tuple[str, str], StudyRow]) -> dict[str, float]:
    """Return a cell's finite metrics under their names in MLflow, such as "accuracy" or "clean.accuracy"."""
    main_classifier, main_set = next(iter(rows))
    values: dict[str, float] = {}
    for (classifier, test_set), row in rows.items():
        prefix = "" if classifier == main_classifier else f"{classifier}."
        prefix += "" if test_set == main_set else f"{test_set}."
        names = (*METRICS, *CALIBRATION) if classifier == main_classifier else METRICS
        values |= {prefix + name: getattr(row, name) for name in names}
    if header.validation_count:
        values["validation_accuracy"] = header.validation_correct / header.validation_count
    return {name: value for name, value in values.items() if np.isfinite(value)}
