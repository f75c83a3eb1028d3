"""Stage: checkpoints -> scores. Only here are test images predicted; nothing is selected by their scores."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from flows.stages import scoring
from flows.study import costs, models
from flows.study.cells import Cell, best_cell, methods_of, plan
from flows.study.dataset import EncodedDataset
from flows.study.study import Study, here
from medfocus.evaluation import metrics
from medfocus.reports import tables
from medfocus.reports.figures import LIGHT, accuracy_figure, confusion_figure, reliability_panel
from medfocus.reports.rows import StudyRow, read_rows, write_results, write_study
from medfocus.serving import checkpoint
from medfocus.tracking import runs
from medfocus.tracking.provenance import made_from

INPUTS = ("params.yaml", "dvc.lock")  # with the commit, enough to reproduce a run
Probabilities = dict[str, np.ndarray]  # classifier -> (N, K) on the whole test set; the main one is first


def main(arguments: Sequence[str] | None = None) -> None:
    """Score every checkpoint on the official and the clean test set, and log one MLflow run per cell."""
    argparse.ArgumentParser(description=__doc__).parse_args(arguments)
    study = here()
    params = study.params
    encoder = models.build_encoder(study)
    cells = plan(params)
    study.paths.figures.mkdir(parents=True, exist_ok=True)
    store = runs.start(None, study.home, params.tracking.experiment)
    provenance = {
        "study": params.study.name,
        "study.folder": study.folder.relative_to(study.home).as_posix(),
        "mlflow.source.type": "LOCAL",
        "mlflow.source.name": "flows/stages/evaluate.py",
        **made_from(study.folder, params.study.seeds),
    }
    with (
        store.study(params.study.name, _settings(study), provenance) as run,
        tqdm(total=len(cells), desc="evaluate", unit="cell", disable=None) as bar,
    ):
        evaluation = _Evaluation(study, run, provenance, bar)
        for name, of_dataset in groupby(cells, key=lambda cell: cell.dataset):
            evaluation.add(EncodedDataset(study, name, encoder), list(of_dataset))
        evaluation.write()


def restore_study_csv(study: Study) -> None:
    """Write study.csv again after DVC restored the results from its cache without running the stage."""
    store = runs.start(None, study.home, study.params.tracking.experiment)
    _write_study_csv(study, store.runs_by_cell())


def _write_study_csv(study: Study, run_ids: dict[str, str]) -> None:
    rows = read_rows(study.paths.results)
    named = [dataclasses.replace(row, mlflow_run_id=run_ids.get(row.cell_key, "")) for row in rows]
    write_study(named, study.paths.study)


def _settings(study: Study) -> dict[str, object]:
    """Return the settings that all cells of a study share."""
    sections = {"clip": study.params.clip, "masks": study.params.masks, "views": study.params.views}
    settings = {
        f"{name}.{k}": v for name, section in sections.items() for k, v in dataclasses.asdict(section).items()
    }
    return {"schedule": study.params.study.schedule, **settings}


@dataclass(frozen=True)
class _Evaluation:
    """An open MLflow run of a study and the results of its cells so far."""

    study: Study
    run: runs.StudyRun
    provenance: dict[str, str]
    bar: tqdm[Any]
    rows: list[StudyRow] = field(default_factory=list)
    cost_rows: list[costs.CostRow] = field(default_factory=list)
    run_ids: dict[str, str] = field(default_factory=dict)  # cell key -> MLflow run
    best: dict[Cell, dict[str, float]] = field(default_factory=dict)  # each data set's best cell: its metrics

    def add(self, dataset: EncodedDataset, cells: Sequence[Cell]) -> None:
        """Score and log the cells of one data set, and save their predictions."""
        for focus in dict.fromkeys(cell.focus for cell in cells):
            methods = methods_of(cell for cell in cells if cell.focus == focus)
            dataset.embed(methods, focus, dataset.splits.test, 1, "encode test")
        predicted: dict[Cell, Probabilities] = {}
        measured: dict[Cell, dict[str, float]] = {}
        for _, of_system in groupby(cells, key=lambda cell: (cell.method, cell.focus)):
            main_rows = []  # of the main classifier on the whole test set
            for cell in of_system:
                predicted[cell], measured[cell], row = self._add_cell(dataset, cell)
                main_rows.append(row)
                self.bar.update()
            if not self.bar.disable:
                self.bar.write(tables.progress_line(main_rows), file=sys.stderr)
        _save_predictions(self.study.paths.predictions(dataset.name), dataset, predicted)
        best = best_cell(self.study, dataset.name, cells)
        self.best[best] = measured[best]
        self._log_figures(dataset, best, next(iter(predicted[best].values())))

    def _add_cell(
        self, dataset: EncodedDataset, cell: Cell
    ) -> tuple[Probabilities, dict[str, float], StudyRow]:
        """Return a cell's probabilities, its metrics, and its main classifier's row on the whole test set."""
        logits, header, rate = scoring.predict(dataset, cell, self.study.paths.checkpoint(cell))
        rows = scoring.score(dataset, cell, header, logits)
        probabilities = {
            name: calibration.probabilities(logits[name])
            for name, calibration in scoring.calibrations(header, logits).items()
        }
        measured, row = scoring.mlflow_metrics(header, rows), next(iter(rows.values()))
        self.rows.extend(rows.values())
        self.cost_rows.extend(_cost_rows(dataset, cell, row, rate))
        self.run_ids[row.cell_key] = self._log_cell(dataset, cell, header, measured)
        return probabilities, measured, row

    def _log_cell(
        self, dataset: EncodedDataset, cell: Cell, header: checkpoint.Header, measured: dict[str, float]
    ) -> str:
        """Log a cell as a child run of MLflow; return its id."""
        settings = {f"method.{name}": value for name, value in header.settings.items()}
        support, root = dataset.support_paths(cell), dataset.params.root
        return self.run.log_cell(
            name=cell.name,
            params={
                **cell._asdict(),
                "n_train": header.facts["n_train"],
                "schedule": self.study.params.study.schedule,
                **settings,
            },
            metrics=measured,
            tags={
                **self.provenance,
                **cell._asdict(),
                "test_set": next(iter(scoring.test_sets(dataset))),
                "cell_key": header.facts["key"],
            },
            datasets=[
                *([runs.DataInput(dataset.name, dataset.digest(support), root)] if support else []),
                runs.DataInput(dataset.name, dataset.test_digest, root, "testing"),
            ],
        )

    def _log_figures(self, dataset: EncodedDataset, best: Cell, probabilities: np.ndarray) -> None:
        """Draw the best cell's confusion matrix and reliability from (N, K), and log them with the masks."""
        paths, name = self.study.paths, dataset.name
        labels = dataset.labels(dataset.splits.test)
        counts = metrics.confusion(probabilities.argmax(axis=1), labels, len(dataset.classes))
        curve = metrics.reliability(probabilities, labels)
        figures = {
            "confusion": confusion_figure(counts, dataset.classes, best.name),
            "reliability": reliability_panel(curve, LIGHT, transparent=False),
        }
        for kind, figure in figures.items():
            (paths.figures / f"{kind}-{name}.png").write_bytes(figure)
            self.run.log_figure(f"{kind}-{name}", figure)
        text = f"The best cell of {name} by validation inside its support, scored on the test set."
        key = checkpoint.read_header(paths.checkpoint(best)).facts["key"]
        self.run.describe(text, figures, self.run_ids[key])
        self.run.log_figure(f"masks-{name}", paths.report(name, "masks.png").read_bytes())

    def write(self) -> None:
        """Write the outputs of the whole study and log them."""
        paths, run = self.study.paths, self.run
        accuracy = accuracy_figure(self.rows)
        (paths.figures / "accuracy.png").write_bytes(accuracy)
        run.log_figure("accuracy", accuracy)
        write_results(self.rows, paths.results)
        paths.plots.write_text(tables.plot_table(self.rows), encoding="utf-8")
        run.describe(_best_table(self.best), {"accuracy": accuracy})
        paths.metrics.write_text(_metrics_json(self.best), encoding="utf-8")
        costs.write_rows(self.cost_rows, paths.costs)
        _write_study_csv(self.study, self.run_ids)
        run.log_table("study", paths.study.read_text(encoding="utf-8"))
        for name in INPUTS:
            if (self.study.folder / name).exists():
                run.log_input(self.study.folder / name)


def _cost_rows(dataset: EncodedDataset, cell: Cell, row: StudyRow, rate: float) -> list[costs.CostRow]:
    """Return a cell's cost; nothing if DVC's cache, and no fit on this machine, gave its checkpoint."""
    fit = costs.read(dataset.study.cell_cache(row.cell_key))
    if fit is None:
        return []
    percent, seconds = row.percent_of_train, round(fit.seconds, 3)
    return [
        costs.CostRow(
            cell.dataset, row.system, percent, cell.seed, seconds, fit.peak_mib, fit.learnt, rate, fit.note
        )
    ]


def _save_predictions(path: Path, dataset: EncodedDataset, predicted: dict[Cell, Probabilities]) -> None:
    """Save the paths and labels of the test images, and every classifier's probabilities with 6 decimals.

    The last digits of a probability differ between CPUs.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    test = dataset.splits.test
    arrays = {"paths": np.array(test), "labels": dataset.labels(test), "classes": np.array(dataset.classes)}
    for cell, classifiers in predicted.items():
        for name, values in classifiers.items():
            arrays[f"{cell.name} {name}"] = np.round(values, 6).astype(np.float32)
    np.savez_compressed(path, allow_pickle=False, **arrays)


def _best_table(best: dict[Cell, dict[str, float]]) -> str:
    """Return a Markdown table of the best cells."""
    columns = ("best by validation", *scoring.METRICS)
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for cell, measured in best.items():
        values = [f"{measured[name]:.3f}" if name in measured else "–" for name in scoring.METRICS]
        lines.append(f"| {cell.name} | {' | '.join(values)} |")
    return "\n".join(lines)


def _metrics_json(best: dict[Cell, dict[str, float]]) -> str:
    """Return the best cells' metrics as JSON, with 4 decimals as in results.csv."""
    content = {
        cell.dataset: {"best": cell.name, **{name: round(value, 4) for name, value in measured.items()}}
        for cell, measured in best.items()
    }
    return json.dumps(content, indent=2) + "\n"


if __name__ == "__main__":
    main()
