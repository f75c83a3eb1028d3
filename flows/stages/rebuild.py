"""Fit one cell of the current study again, without the cache of cells, and print its scores as JSON."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from flows.stages import finetune, scoring
from flows.study import models
from flows.study.cells import Cell
from flows.study.dataset import EncodedDataset
from flows.study.study import Study, here
from medfocus.images import decode


def main(arguments: Sequence[str] | None = None) -> None:
    """Rebuild the cell that the options name; print its metrics and key."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in Cell._fields:
        parser.add_argument(f"--{name}", required=True, type=int if name == "seed" else str)
    cell = Cell(**vars(parser.parse_args(arguments)))
    metrics, key = rebuild(here(), cell)
    print(json.dumps({"metrics": metrics, "cell_key": key}))


def rebuild(study: Study, cell: Cell) -> tuple[dict[str, float], str]:
    """Fit and score a cell from the study's splits and masks; return its metrics in MLflow and its key.

    Raises ValueError if an image has changed since ingestion.
    """
    dataset = EncodedDataset(study, cell.dataset, models.build_encoder(study))
    support, test = dataset.support_paths(cell), dataset.splits.test
    for path in (*support, *test):
        if decode.read_named(dataset.root / path)[0] != dataset.records[path].sha256:
            raise ValueError(f"{dataset.root / path}: the image has changed since the run. Restore it.")
    if support:
        dataset.embed([cell.method], cell.focus, support, dataset.views(cell), "encode")
    fitted = finetune.cached_path(dataset, cell)
    finetune.fit(finetune.prepare(dataset, cell, fitted))
    dataset.embed([cell.method], cell.focus, test, 1, "encode test")
    logits, header, _ = scoring.predict(dataset, cell, fitted)
    rows = scoring.score(dataset, cell, header, logits)
    return scoring.mlflow_metrics(header, rows), header.facts["key"]


if __name__ == "__main__":
    from flows.stages.rebuild import main as run

    run()
