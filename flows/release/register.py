"""The best cell by validation -> the model registry; champion only through the gate."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from flows.release import cards
from flows.study import models
from flows.study.cells import Cell, best_cell, plan
from flows.study.dataset import EncodedDataset
from flows.study.params import DRIFT_BY
from flows.study.study import Study
from medfocus import phantoms
from medfocus.datasets.duplicates import groups, read_pairs
from medfocus.datasets.records import Record
from medfocus.datasets.splits import components
from medfocus.evaluation import drift, gate
from medfocus.images.geometry import grey
from medfocus.phantoms import png
from medfocus.reports.data_sheet import SHEET
from medfocus.reports.markdown import checks_table
from medfocus.reports.model_card import CARD
from medfocus.serving import checkpoint
from medfocus.serving.predictor import Predictor, save_model
from medfocus.storage import atomic
from medfocus.storage.fingerprint import fingerprint
from medfocus.tracking import registry, runs
from medfocus.tracking.provenance import made_from

_KNOWN = "images.npz"  # in the model's folder: what it was made with
_CHUNK = 16  # images at once; each prediction holds an overlay


@dataclass(frozen=True)
class Outcome:
    """What became of a data set's best cell."""

    registration: registry.Registration
    checks: tuple[gate.Check, ...]  # none where nothing had to be decided
    new: int | None  # images that the present champion was made without; None where it was not asked


def register_best(study: Study, dataset: str) -> Outcome:
    """Log and register a data set's best cell, chosen by validation inside its support.

    It becomes champion if the gate lets it: by ``params.gate`` it is held against the present champion on the
    test images that neither has learnt from, by ``params.drift`` the images that came since against those
    before.
    """
    with contextlib.chdir(study.folder):
        opened = EncodedDataset(study, dataset, models.build_encoder(study))
        challenger = _Challenger(opened, best_cell(study, dataset, plan(study.params)))
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
            said = f"{told(outcome)}\n\n{challenger.headline}"
            registry.describe(store, registration.name, registration.version, said, (CARD, SHEET))
    return outcome


class _Challenger:
    """A fitted cell on its way through the gate."""

    def __init__(self, dataset: EncodedDataset, cell: Cell) -> None:
        self.dataset, self.cell, self.study = dataset, cell, dataset.study
        self.checkpoint = dataset.paths.checkpoint(cell)
        self.header = checkpoint.read_header(self.checkpoint)
        self.test = [dataset.records[path] for path in dataset.splits.test]
        self.checks: tuple[gate.Check, ...] = ()
        self.reason = ""
        self.new: int | None = None

    def judge(self, champion: registry.Champion | None) -> registry.Verdict:
        """The gate's decision, and every check of it kept in ``checks``."""
        params = self.study.params
        probabilities, labels = _predictions(self.dataset, self.cell)
        held, shifts = None, []
        if champion is not None:
            with tempfile.TemporaryDirectory() as folder:
                held, known = self._champion(champion, Path(folder))
            shifts = self._shifts(known)
        rules = gate.Rules(**{f.name: getattr(params.gate, f.name) for f in fields(gate.Rules)})
        decision = gate.judge(probabilities, labels, self.dataset.classes, rules, held, shifts)
        self.checks, self.reason = decision.checks, decision.reason
        accuracy = float((probabilities.argmax(1) == labels).mean())
        return registry.Verdict(decision.promoted, decision.reason, {"accuracy": repr(accuracy)})

    def write_model(self, folder: Path) -> None:
        """The served model, and beside it which images it was made with and what they are like."""
        study, name = self.study, self.dataset.name
        save_model(
            folder,
            checkpoint=self.checkpoint,
            encoder=models.build_encoder(study, self.header.focus),
            segmenter=models.build_segmenter(study, name),
            feather=study.params.views.feather,
        )
        records = self.dataset.records
        learnt = frozenset(records[path].sha256 for path in self.dataset.support_paths(self.cell))
        names = frozenset(record.sha256 for record in records.values())
        drift.Known(names, learnt, self._sample(records.values())).save(folder / _KNOWN)

    def cards(self, served: Path) -> dict[str, str]:
        """The model card and the data sheet, after ``judge`` and ``write_model``."""
        return cards.of_version(
            self.dataset,
            self.cell,
            self.header,
            _predictions(self.dataset, self.cell)[0],
            served,
            reason=self.reason,
            checks=self.checks,
            new=self.new,
        )

    @property
    def headline(self) -> str:
        """The card in one paragraph."""
        return cards.headline(self.dataset, _predictions(self.dataset, self.cell)[0])

    def _champion(self, champion: registry.Champion, folder: Path) -> tuple[gate.Champion, drift.Known]:
        """The present champion on the test images, and what it was made with."""
        try:
            model = champion.model_folder(folder)
            known = drift.Known.load(model / _KNOWN)
            predictor = Predictor.load(model)
            predicted = self._predicted(champion, predictor)
        except Exception as error:
            raise RuntimeError(
                f"{champion.name} version {champion.version}, the champion, cannot be tried on the present "
                f"test images ({error}). Restore its artefacts, go back by `make rollback`, or delete the "
                f"alias {registry.CHAMPION!r} to start anew."
            ) from error
        fair = self._not_learnt(known.learnt)
        return gate.Champion(champion.version, predictor.classes, predicted, fair), known

    def _predicted(self, champion: registry.Champion, predictor: Predictor) -> np.ndarray:
        """(N,) the champion's label for every test image; computed once for a champion and a test set."""
        tested = [record.sha256 for record in self.test]
        key = fingerprint(Predictor, cell=champion.cell_key, test=tested)
        path = self.study.cache / "champions" / f"{key}.npy"
        if atomic.is_sound(path):
            return np.load(path, allow_pickle=False)
        labels: list[str] = []
        for start in range(0, len(self.test), _CHUNK):
            some = self.test[start : start + _CHUNK]
            images = [self.dataset.image(record) for record in some]
            labels += [said.label for said in predictor.predict_decoded(images)]
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(f".{id(self)}.npy")
        np.save(beside, np.array(labels), allow_pickle=False)
        atomic.seal(beside, path)
        return np.array(labels)

    def _not_learnt(self, learnt: Iterable[str]) -> np.ndarray:
        """(N,) bool: test images that are not among ``learnt``, nor their twins or their patients'."""
        records = list(self.dataset.records.values())
        pairs = read_pairs(self.dataset.paths.report(self.dataset.name, "duplicates.csv"))
        component = components(records, groups(records, pairs))
        learnt = frozenset(learnt)
        taken = {component[record.path] for record in records if record.sha256 in learnt}
        return np.array([component[record.path] not in taken for record in self.test], bool)

    def _shifts(self, known: drift.Known) -> list[drift.Shift]:
        """How images that the champion was made without differ from those it was made with."""
        new = [record for record in self.dataset.records.values() if record.sha256 not in known.names]
        self.new = len(new)
        if not new:
            return []
        limits = self.study.params.drift
        bounds = {name: getattr(limits, name) for name in ("embedding", "coverage", "classes", "statistics")}
        return drift.measure(known.sample, self._sample(new), bounds, limits.p)

    def _sample(self, records: Iterable[Record]) -> drift.Images:
        """What drift compares, of ``drift.images`` at most, the same ones for the same images."""
        chosen = sorted(records, key=lambda record: record.sha256)[: self.study.params.drift.images]
        paths = [record.path for record in chosen]
        ((embeddings,),) = (self.dataset.encode((DRIFT_BY,), "none", paths, 1, "encode for drift"),)
        masks = [self.dataset.masks.status[path].coverage for path in paths]
        numbers = [drift.statistics(grey(self.dataset.image(record))) for record in chosen]
        return drift.Images(
            labels=np.array([record.label for record in chosen]),
            embeddings=embeddings[:, 0].numpy(),
            coverage=np.array(masks),
            statistics=np.stack(numbers),
            encoder=self.dataset.encoder.key,
        )


def _predictions(dataset: EncodedDataset, cell: Cell) -> tuple[np.ndarray, np.ndarray]:
    """(N, K) probabilities of the cell's main classifier on the whole test set, and the labels (N,)."""
    with np.load(dataset.paths.predictions(dataset.name), allow_pickle=False) as predictions:
        main = next(name for name in predictions.files if name.startswith(f"{cell.name} "))
        return predictions[main], predictions["labels"]


def told(outcome: Outcome) -> str:
    """The decision in Markdown, every check a line."""
    made = outcome.registration
    lines = [f"{made.name} version {made.version}: {made.reason}"]
    if outcome.new is not None:
        lines += ["", f"{outcome.new} images came since the champion was made."]
    if outcome.checks:
        lines += ["", *checks_table(outcome.checks)]
    return "\n".join(lines)


def _example(modality: str) -> bytes:
    """An image to show the model's input by: a phantom, so no patient's."""
    drawn = modality if modality in phantoms.MODALITIES else "chest_xray"
    label = phantoms.MODALITIES[drawn][0]
    return png.encode(phantoms.draw(drawn, label, phantoms.generator(0, drawn, "test", label, 0)).image)
