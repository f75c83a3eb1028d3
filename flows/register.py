"""The best cell by validation -> the model registry, against the present champion on the same test split."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path

import numpy as np

from flows.cells import best_cell, plan
from flows.study import Study
from medfocus import checkpoint, phantoms, serve, tracking
from medfocus.encoders import build_clip
from medfocus.phantoms import png
from medfocus.records import read_manifest
from medfocus.splits import read_splits


def register_best(study: Study, dataset: str) -> tracking.Registration:
    """Log and register a data set's best cell; it becomes champion only if it beats the one there is.

    The best cell is chosen by validation inside the support. Champion and challenger are compared
    by accuracy on the whole test set.
    """
    with contextlib.chdir(study.folder):
        encoder = build_clip(study.params.clip.model, study.params.clip.pretrained)
        cell = best_cell(study.params, dataset, plan(study.params))
        path = Path("data/checkpoints", cell.path)
        header = checkpoint.read_header(path)
        records = {record.path: record for record in read_manifest(Path(f"data/manifests/{dataset}.csv"))}
        test = [records[p] for p in read_splits(Path(f"data/splits/{dataset}.json")).test]

        def rescore(model: Path) -> float:
            pictures = [(study.root(dataset) / record.path).read_bytes() for record in test]
            predictions = serve.Predictor.load(model).predict(pictures)
            return float(np.mean([p.label == r.label for p, r in zip(predictions, test, strict=True)]))

        with np.load(f"data/predictions/{dataset}.npz") as predictions:
            main = next(name for name in predictions.files if name.startswith(f"{cell.name} "))
            score = float((predictions[main].argmax(axis=1) == predictions["labels"]).mean())
        store = tracking.start(None, study.home, study.params.tracking.experiment)
        with tempfile.TemporaryDirectory() as folder:
            serve.save_model(
                Path(folder, "model"),
                checkpoint=path,
                encoder=encoder,
                segmenter=study.segmenter(dataset),
                segmenter_settings=study.segmenter_settings(dataset),
                feather=study.params.views.feather,
            )
            return store.register(
                f"medfocus-{dataset}",
                Path(folder, "model"),
                cell_key=header.facts["key"],
                score=score,
                test_digest=tracking.test_digest((record.sha256, record.label) for record in test),
                rescore=rescore,
                classes=header.classes,
                example=_example(study.params.datasets[dataset].modality),
                tags={
                    **cell._asdict(),
                    **tracking.provenance(study.folder, study.params.study.seeds),
                    "validation": f"{header.validation_correct} of {header.validation_count}",
                },
                run_id=store.runs_by_cell().get(header.facts["key"]),
            )


def _example(modality: str) -> bytes:
    """A picture to show the model's input by: a phantom, so no patient's."""
    drawn = modality if modality in phantoms.MODALITIES else "chest_xray"
    label = phantoms.MODALITIES[drawn][0]
    return png.encode(phantoms.draw(drawn, label, phantoms.generator(0, drawn, "test", label, 0)).picture)
