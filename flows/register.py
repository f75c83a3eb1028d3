"""The best cell by validation -> the model registry, against the present champion on the same test split."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np

from flows.cells import Cell, best_cell, plan
from flows.study import Study
from medfocus import checkpoint, phantoms, serve, tracking
from medfocus.phantoms import png
from medfocus.provenance import made_from
from medfocus.records import read_manifest
from medfocus.splits import read_splits

_CHUNK = 64  # pictures served at once when a champion is scored anew; each prediction holds an overlay


def register_best(study: Study, dataset: str) -> tracking.Registration:
    """Log and register a data set's best cell; it becomes champion only if it beats the one there is.

    The best cell is chosen by validation inside the support. Champion and challenger are compared
    by accuracy on the whole test set.
    """
    with contextlib.chdir(study.folder):
        cell = best_cell(study.params, dataset, plan(study.params))
        path = Path("data/checkpoints", cell.path)
        header = checkpoint.read_header(path)
        records = {record.path: record for record in read_manifest(Path(f"data/manifests/{dataset}.csv"))}
        test = [records[p] for p in read_splits(Path(f"data/splits/{dataset}.json")).test]

        def write_model(folder: Path) -> None:
            serve.save_model(
                folder,
                checkpoint=path,
                encoder=study.encoder(header.focus),
                segmenter=study.segmenter(dataset),
                segmenter_settings=study.segmenter_settings(dataset),
                feather=study.params.views.feather,
            )

        def rescore(model: Path) -> float:
            predictor = serve.Predictor.load(model)
            right = 0
            for start in range(0, len(test), _CHUNK):
                some = test[start : start + _CHUNK]
                predictions = predictor.predict([(study.root(dataset) / r.path).read_bytes() for r in some])
                right += sum(p.label == r.label for p, r in zip(predictions, some, strict=True))
            return right / len(test)

        store = tracking.start(None, study.home, study.params.tracking.experiment)
        return store.register(
            f"medfocus-{dataset}",
            write_model,
            cell_key=header.facts["key"],
            score=_test_accuracy(dataset, cell),
            test_digest=tracking.test_digest((record.sha256, record.label) for record in test),
            rescore=rescore,
            classes=header.classes,
            example=_example(study.params.datasets[dataset].modality),
            tags={
                **cell._asdict(),
                **made_from(study.folder, study.params.study.seeds),
                "validation": f"{header.validation_correct} of {header.validation_count}",
            },
            run_id=store.runs_by_cell().get(header.facts["key"]),
        )


def _test_accuracy(dataset: str, cell: Cell) -> float:
    """Of the cell's main classifier, from the evaluation's predictions."""
    with np.load(f"data/predictions/{dataset}.npz") as predictions:
        main = next(name for name in predictions.files if name.startswith(f"{cell.name} "))
        return float((predictions[main].argmax(axis=1) == predictions["labels"]).mean())


def _example(modality: str) -> bytes:
    """A picture to show the model's input by: a phantom, so no patient's."""
    drawn = modality if modality in phantoms.MODALITIES else "chest_xray"
    label = phantoms.MODALITIES[drawn][0]
    return png.encode(phantoms.draw(drawn, label, phantoms.generator(0, drawn, "test", label, 0)).picture)
