"""The model card and the data sheet of a registered version, from the outputs of the stages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.stages.scoring import test_sets
from medfocus.datasets.duplicates import read_pairs
from medfocus.masks.sam2.model import trained_size
from medfocus.reports import data_sheet, model_card
from medfocus.reports.rows import read_rows
from medfocus.storage import atomic
from medfocus.storage.tables import read_csv
from medfocus.tracking.provenance import made_from

if TYPE_CHECKING:
    from flows.release.challenger import Challenger


def of_version(challenger: Challenger, model_folder: Path) -> dict[str, str]:
    """Return the texts of a version's cards by file name, after the gate has judged ``challenger``.

    ``model_folder`` is the version's model folder. The working directory must be the study's folder.
    """
    dataset, cell, header = challenger.dataset, challenger.cell, challenger.header
    served: dict[str, Any] = json.loads((model_folder / "serve.json").read_text(encoding="utf-8"))
    data = _data(challenger, served)
    params = dataset.study.params
    clip = f"{params.clip.model}, {params.clip.pretrained or 'no tag'}"
    learnt = [dataset.records[path].label for path in dataset.support_paths(cell)]
    model = model_card.ModelFacts(
        name=f"medfocus-{dataset.name}",
        method=cell.method,
        focus=cell.focus,
        support=cell.support,
        seed=cell.seed,
        schedule=params.study.schedule,
        learned_from={name: learnt.count(name) for name in dataset.classes},
        settings=header.settings,
        parts={
            "CLIP": f"{clip}; sha256 {served['clip_key']}",
            "segmenter": f"{data.segmenter}; sha256 {served['segmenter_key']}",
            "checkpoint": f"sha256 {atomic.digest(model_folder / 'cell.safetensors')}",
            "versions": ", ".join(f"{name} {number}" for name, number in served["versions"].items()),
        },
        pocket="pocket" in (params.clip.pretrained, params.masks.checkpoint),
        validation=f"{header.validation_correct} of {header.validation_count}",
        probabilities=challenger.probabilities,
        labels=challenger.labels,
        classes=dataset.classes,
        test_sets=test_sets(dataset),
        checks=challenger.checks,
        reason=challenger.reason,
        temperature=header.calibration.temperature,
        ece_uncalibrated={
            row.test_set: row.ece_uncalibrated
            for row in read_rows(dataset.paths.results)
            if (row.cell_key, row.method) == (header.facts["key"], cell.method)
        },
        confidence=header.calibration.confidence,
        sets=header.calibration.sets(challenger.probabilities),
        no_set=header.calibration.no_set,
    )
    return {
        model_card.CARD: model_card.model_card(model, data),
        data_sheet.SHEET: data_sheet.data_sheet(data),
    }


def _data(challenger: Challenger, served: dict[str, Any]) -> data_sheet.DatasetFacts:
    dataset, study, name = challenger.dataset, challenger.study, challenger.dataset.name
    masks = study.params.masks
    size = masks.image_size or trained_size(masks.config)
    sam2 = f"SAM2 ({masks.config}, {masks.checkpoint}), {masks.strategy} at {size} px"
    made = made_from(study.folder, study.params.study.seeds)
    return data_sheet.DatasetFacts(
        name=name,
        modality=dataset.params.modality,
        licence=dataset.params.licence,
        records=list(dataset.records.values()),
        splits=dataset.splits,
        pairs=read_pairs(study.paths.report(name, "duplicates.csv")),
        left_out=[line["kind"] for line in read_csv(study.paths.report(name, "left_out.csv"))],
        reported=[line["kind"] for line in read_csv(study.paths.report(name, "reported.csv"))],
        statuses={path: line.status for path, line in dataset.masks.status.items()},
        coverage={path: line.coverage for path, line in dataset.masks.status.items()},
        mask_lines=read_csv(study.paths.report(name, "masks.csv")),
        segmenter=sam2 if served["segmenter"] == "sam2" else "Otsu's threshold",
        drift=[check for check in challenger.checks if check.is_drift],
        new=challenger.new,
        provenance={name: made[name] for name in ("git.commit", "git.dirty", "dvc.lock.sha256", "seeds")}
        | {"params.yaml": f"sha256 {atomic.digest(study.paths.params)}"},
    )
