"""Stage: checkpoints -> test scores. Only here are test images predicted, and nothing is chosen here."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
from tqdm import tqdm

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

INPUTS = ("params.yaml", "dvc.lock")  # with the commit all that it takes to have a run again


def main(arguments: Sequence[str] | None = None) -> None:
    """Score every checkpoint on the official and the clean test set; one MLflow run a cell."""
    argparse.ArgumentParser(description=__doc__).parse_args(arguments)
    study = here()
    params, paths = study.params, study.paths
    encoder = models.build_encoder(study)
    cells = plan(params)
    paths.figures.mkdir(parents=True, exist_ok=True)
    store = runs.start(None, study.home, params.tracking.experiment)
    provenance = {
        "study": params.study.name,
        "study.folder": study.folder.relative_to(study.home).as_posix(),
        "mlflow.source.type": "LOCAL",
        "mlflow.source.name": "flows/stages/evaluate.py",
        **made_from(study.folder, params.study.seeds),
    }
    rows: list[StudyRow] = []  # by cell key
    run_ids: dict[str, str] = {}
    spent: list[costs.CostRow] = []
    headline: dict[str, dict[str, object]] = {}  # by data set
    with (
        store.study(params.study.name, _settings(study), provenance) as run,
        tqdm(total=len(cells), desc="evaluate", unit="cell", disable=None) as bar,
    ):
        for name, own in groupby(cells, key=lambda cell: cell.dataset):
            dataset = EncodedDataset(study, name, encoder)
            own = list(own)
            for focus in dict.fromkeys(cell.focus for cell in own):
                methods = methods_of(cell for cell in own if cell.focus == focus)
                dataset.embed(methods, focus, dataset.splits.test, 1, "encode test")
            predicted: dict[Cell, dict[str, np.ndarray]] = {}  # -> classifier -> (N, K) probabilities
            measured: dict[Cell, dict[str, float]] = {}
            for _, of_system in groupby(own, key=lambda cell: (cell.method, cell.focus)):
                first: list[StudyRow] = []  # of each cell: its own classifier on the whole test set
                for cell in of_system:
                    fitted = paths.checkpoint(cell)
                    predicted[cell], header, rate = predict(dataset, cell, fitted)
                    scored = score(dataset, cell, header, predicted[cell])
                    measured[cell] = numbers(header, scored)
                    first.append(next(iter(scored.values())))
                    spent += _cost(dataset, cell, header, first[-1], rate)
                    key = header.facts["key"]
                    run_ids[key] = _log(run, dataset, cell, header, measured[cell], provenance)
                    rows += scored.values()
                    bar.update()
                if not bar.disable:
                    bar.write(tables.progress_line(first), file=sys.stderr)
            _save_predictions(paths.predictions(name), dataset, predicted)
            best = best_cell(study, name, predicted)
            headline[name] = {"best": best.name, **measured[best]}
            values = next(iter(predicted[best].values()))  # (N, K) of its own classifier
            drawn = _figures_of(dataset, best, values)
            for kind, figure in drawn.items():
                (paths.figures / f"{kind}-{name}.png").write_bytes(figure)
                run.log_figure(f"{kind}-{name}", figure)
            best_run = run_ids[checkpoint.read_header(paths.checkpoint(best)).facts["key"]]
            told = f"The cell of {name} that validation inside its support chose, on the test set."
            run.describe(told, drawn, best_run)
            run.log_figure(f"masks-{name}", paths.report(name, "masks.png").read_bytes())
        accuracy = accuracy_figure(rows)
        (paths.figures / "accuracy.png").write_bytes(accuracy)
        run.log_figure("accuracy", accuracy)
        write_results(rows, paths.results)
        paths.plots.write_text(tables.plot_table(rows), encoding="utf-8")
        run.describe(_described(headline), {"accuracy": accuracy})
        paths.metrics.write_text(json.dumps(headline, indent=2) + "\n", encoding="utf-8")
        costs.write_lines(spent, paths.costs)
        _write_study_csv(study, run_ids)
        run.log_table("study", paths.study.read_text(encoding="utf-8"))
        for name in INPUTS:
            if (study.folder / name).exists():
                run.log_input(study.folder / name)


def restore_study_csv(study: Study) -> None:
    """Write study.csv anew where DVC brought the results back from its cache and nothing was run."""
    store = runs.start(None, study.home, study.params.tracking.experiment)
    _write_study_csv(study, store.runs_by_cell())


def _write_study_csv(study: Study, run_ids: dict[str, str]) -> None:
    rows = read_rows(study.paths.results)
    named = [dataclasses.replace(row, mlflow_run_id=run_ids.get(row.cell_key, "")) for row in rows]
    write_study(named, study.paths.study)


def _settings(study: Study) -> dict[str, object]:
    """The sections that all cells share, flat, as MLflow's parameters."""
    sections = {"clip": study.params.clip, "masks": study.params.masks, "views": study.params.views}
    return {
        f"{name}.{k}": v for name, section in sections.items() for k, v in dataclasses.asdict(section).items()
    }


def _cost(
    dataset: EncodedDataset, cell: Cell, header: checkpoint.Header, row: StudyRow, rate: float
) -> list[costs.CostRow]:
    """What a cell cost; nothing where its checkpoint came out of DVC's cache and not of a fit here."""
    key = header.facts["key"]
    fit = costs.read(dataset.study.cell_cache(key))
    if fit is None:
        return []
    percent, seconds = row.percent_of_train, round(fit.seconds, 3)
    return [
        costs.CostRow(
            cell.dataset, row.system, percent, cell.seed, seconds, fit.peak_mib, fit.learnt, rate, fit.note
        )
    ]


def predict(
    dataset: EncodedDataset, cell: Cell, fitted: Path
) -> tuple[dict[str, np.ndarray], checkpoint.Header, float]:
    """Probabilities (N, K) of every classifier of a checkpoint on the whole test set, in its order.

    The last is the rate, in images per second, at which its own part predicted them.
    """
    method, header = checkpoint.load(fitted, dataset.encoder_for(cell.focus))
    inputs = dataset.inputs(method, cell.focus, dataset.splits.test, 1)[0]  # (N, ...)
    began = time.perf_counter()
    logits = method.logits(inputs)
    rate = len(inputs) / (time.perf_counter() - began)
    probabilities = {name: metrics.softmax(values.double().numpy()) for name, values in logits.items()}
    return probabilities, header, rate


def score(
    dataset: EncodedDataset, cell: Cell, header: checkpoint.Header, probabilities: dict[str, np.ndarray]
) -> dict[tuple[str, str], StudyRow]:
    """(classifier, test set) -> its row. The first classifier is the method's own, others have their name."""
    splits = dataset.splits
    labels = dataset.labels(splits.test)
    rows = {}
    for place, (classifier, values) in enumerate(probabilities.items()):
        for test_set, members in test_sets(dataset).items():
            at = np.isin(splits.test, members)
            rows[classifier, test_set] = StudyRow(
                dataset=dataset.name,
                method=cell.method if place == 0 else f"{cell.method}-{classifier}",
                focus=cell.focus,
                percent_of_train=dataset.percent_of_train(cell),
                seed=cell.seed,
                **metrics.score(values[at], labels[at]),
                test_set=test_set,
                n_train=header.facts["n_train"],
                n_test=len(members),
                cell_key=header.facts["key"],
                mlflow_run_id="",
            )
    return rows


def test_sets(dataset: EncodedDataset) -> dict[str, list[str]]:
    """Name -> test images: the official ones and, where some of them have twins in train, those without.

    A test set drawn here has no twins in train by its making: it is "clean" and there is no other.
    """
    splits = dataset.splits
    if all(record.split != "test" for record in dataset.records.values()):
        return {"clean": splits.test}
    return {"official": splits.test} | (
        {} if splits.clean_test == splits.test else {"clean": splits.clean_test}
    )


def numbers(header: checkpoint.Header, rows: dict[tuple[str, str], StudyRow]) -> dict[str, float]:
    """A cell's metrics by MLflow's names, the same for every cell, without those that are not finite."""
    main_classifier, main_set = next(iter(rows))
    found: dict[str, float] = {}
    for (classifier, test_set), row in rows.items():
        prefix = "" if classifier == main_classifier else f"{classifier}."
        prefix += "" if test_set == main_set else f"{test_set}."
        for name in ("accuracy", "balanced_accuracy", "macro_f1", "auroc", "ece"):
            found[prefix + name] = getattr(row, name)
    if header.validation_count:
        found["validation_accuracy"] = header.validation_correct / header.validation_count
    return {name: value for name, value in found.items() if np.isfinite(value)}


def _log(
    run: runs.StudyRun,
    dataset: EncodedDataset,
    cell: Cell,
    header: checkpoint.Header,
    measured: dict[str, float],
    provenance: dict[str, str],
) -> str:
    """One child run of MLflow."""
    settings = {f"method.{name}": value for name, value in header.settings.items()}
    support, root = dataset.support_paths(cell), dataset.params.root
    return run.log_cell(
        name=cell.name,
        params={**cell._asdict(), "n_train": header.facts["n_train"], **settings},
        metrics=measured,
        tags={
            **provenance,
            **cell._asdict(),
            "test_set": next(iter(test_sets(dataset))),
            "cell_key": header.facts["key"],
        },
        datasets=[
            *([runs.DataInput(dataset.name, dataset.digest(support), root, "training")] if support else []),
            runs.DataInput(dataset.name, dataset.test_digest, root, "testing"),
        ],
    )


def _described(headline: dict[str, dict[str, object]]) -> str:
    """The cell of each data set that validation chose, in Markdown."""
    names = ("accuracy", "balanced_accuracy", "macro_f1", "auroc", "ece")
    lines = [f"| chosen by validation | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]
    for measured in headline.values():
        values = [f"{measured[name]:.3f}" if name in measured else "–" for name in names]
        lines.append(f"| {measured['best']} | {' | '.join(values)} |")
    return "\n".join(lines)


def _save_predictions(
    path: Path, dataset: EncodedDataset, predicted: dict[Cell, dict[str, np.ndarray]]
) -> None:
    """Every classifier's probabilities beside the test images' paths and labels, for paired comparisons."""
    path.parent.mkdir(parents=True, exist_ok=True)
    test = dataset.splits.test
    arrays = {"paths": np.array(test), "labels": dataset.labels(test), "classes": np.array(dataset.classes)}
    for cell, classifiers in predicted.items():
        arrays |= {f"{cell.name} {name}": values.astype(np.float32) for name, values in classifiers.items()}
    np.savez_compressed(path, allow_pickle=False, **arrays)


def _figures_of(dataset: EncodedDataset, cell: Cell, probabilities: np.ndarray) -> dict[str, bytes]:
    """A cell's confusion matrix and reliability curve, (N, K) on the whole test set, as PNGs."""
    labels = dataset.labels(dataset.splits.test)
    counts = metrics.confusion(probabilities.argmax(axis=1), labels, len(dataset.classes))
    curve = metrics.reliability(probabilities, labels)
    return {
        "confusion": confusion_figure(counts, dataset.classes, cell.name),
        "reliability": reliability_panel(curve, LIGHT, transparent=False),
    }


if __name__ == "__main__":
    main()
