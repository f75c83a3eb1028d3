"""Registration of the best cell by validation. The gate decides whether the cell becomes champion."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from flows.release.challenger import Challenger
from flows.study import models
from flows.study.cells import best_cell, plan
from flows.study.dataset import EncodedDataset
from flows.study.study import Study
from medfocus import phantoms
from medfocus.evaluation import gate
from medfocus.phantoms import png
from medfocus.reports.data_sheet import SHEET
from medfocus.reports.markdown import checks_table
from medfocus.reports.model_card import CARD
from medfocus.tracking import registry, runs
from medfocus.tracking.provenance import made_from


@dataclass(frozen=True)
class Outcome:
    """The registration of a data set's best cell and the gate's decision."""

    registration: registry.Registration
    checks: tuple[gate.Check, ...]  # empty if there was nothing to decide
    new: int | None  # images added since the present champion was made; None without a comparison

    @property
    def text(self) -> str:
        """The decision in Markdown, with a table of the checks."""
        registration = self.registration
        lines = [f"{registration.name} version {registration.version}: {registration.reason}"]
        if self.new is not None:
            lines += ["", f"{self.new} images are newer than the champion."]
        if self.checks:
            lines += ["", *checks_table(self.checks)]
        return "\n".join(lines)


def register_best(study: Study, dataset: str) -> Outcome:
    """Register a data set's best cell, chosen by validation inside its support.

    The cell becomes champion if it passes the gate: ``params.gate`` compares it with the present champion on
    the test images that neither has learnt from, and ``params.drift`` compares the new images with the old.
    """
    with contextlib.chdir(study.folder):
        opened = EncodedDataset(study, dataset, models.build_encoder(study))
        challenger = Challenger(opened, best_cell(study, dataset, plan(study.params)))
        header = challenger.header
        store = runs.start(None, study.home, study.params.tracking.experiment)
        run_id = store.runs_by_cell().get(header.facts["key"])
        registration = registry.register(
            store,
            f"medfocus-{dataset}",
            challenger.write_model,
            cell_key=header.facts["key"],
            judge=challenger.judge,
            classes=header.classes,
            example=_example(opened.params.modality),
            tags={
                **challenger.cell._asdict(),
                **made_from(study.folder, study.params.study.seeds),
                "validation": f"{header.validation_correct} of {header.validation_count}",
            },
            run_id=run_id,
            cards=challenger.cards,
        )
        outcome = Outcome(registration, challenger.checks, challenger.new)
        if outcome.checks:
            text = f"{outcome.text}\n\n{challenger.headline}"
            registry.describe(store, registration.name, registration.version, text, (CARD, SHEET))
    return outcome


def _example(modality: str) -> bytes:
    """Return an example of the model's input: a phantom, so no patient's image."""
    drawn = modality if modality in phantoms.MODALITIES else "chest_xray"
    label = phantoms.MODALITIES[drawn][0]
    return png.encode(phantoms.draw(drawn, label, phantoms.generator(0, drawn, "test", label, 0)).image)
