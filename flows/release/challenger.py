"""A fitted cell that may become champion: its model folder, its cards and the gate's decision."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path

import numpy as np

from flows.release import cards
from flows.stages.scoring import main_classifier, test_sets
from flows.study import models
from flows.study.cells import Cell
from flows.study.dataset import EncodedDataset
from flows.study.params import DRIFT_BY
from medfocus.datasets.duplicates import groups, read_pairs
from medfocus.datasets.records import Record
from medfocus.datasets.splits import components
from medfocus.evaluation import drift, gate
from medfocus.images.geometry import grey
from medfocus.reports import model_card
from medfocus.serving import checkpoint
from medfocus.serving.model_folder import load_model, save_model
from medfocus.serving.predictor import Predictor
from medfocus.storage import atomic
from medfocus.storage.fingerprint import fingerprint
from medfocus.tracking import registry

_KNOWN = "images.npz"  # file in the model folder that describes the images that the model was made with
_CHUNK = 16  # images at once; each prediction holds an overlay


class Challenger:
    """A fitted cell that may become champion.

    Attributes:
        checks: The gate's checks; empty before ``judge``.
        reason: The gate's decision in one line; empty before ``judge``.
        new: Number of images added since the present champion was made; None without a champion.
    """

    def __init__(self, dataset: EncodedDataset, cell: Cell) -> None:
        self.dataset, self.cell, self.study = dataset, cell, dataset.study
        self.checkpoint = dataset.paths.checkpoint(cell)
        self.header = checkpoint.read_header(self.checkpoint)
        self.test = [dataset.records[path] for path in dataset.splits.test]
        self.probabilities, self.labels = _predictions(dataset, cell)  # (N, K), (N,)
        self.checks: tuple[gate.Check, ...] = ()
        self.reason = ""
        self.new: int | None = None

    def judge(self, champion: registry.Champion | None) -> registry.Verdict:
        """Return the gate's decision and keep its checks."""
        params = self.study.params
        rival, shifts = None, []
        if champion is not None:
            with tempfile.TemporaryDirectory() as folder:
                rival, known = self._rival(champion, Path(folder))
            shifts = self._shifts(known)
        rules = gate.Rules(**{f.name: getattr(params.gate, f.name) for f in fields(gate.Rules)})
        decision = gate.judge(self.probabilities, self.labels, self.dataset.classes, rules, rival, shifts)
        self.checks, self.reason = decision.checks, decision.reason
        accuracy = float((self.probabilities.argmax(1) == self.labels).mean())
        return registry.Verdict(decision.promoted, decision.reason, {"accuracy": repr(accuracy)})

    def write_model(self, folder: Path) -> None:
        """Write the served model and a description of the images that it was made with."""
        study, name = self.study, self.dataset.name
        save_model(
            folder,
            checkpoint=self.checkpoint,
            encoder=models.build_encoder(study, self.header.focus),
            segmenter=models.build_segmenter(study, name),
            feather=study.params.views.feather,
            fill=study.params.views.fill,
        )
        records = self.dataset.records
        learnt = frozenset(records[path].sha256 for path in self.dataset.support_paths(self.cell))
        names = frozenset(record.sha256 for record in records.values())
        drift.Known(names, learnt, self._sample(records.values())).save(folder / _KNOWN)

    def cards(self, model_folder: Path) -> dict[str, str]:
        """Return the model card and the data sheet; call it after ``judge`` and ``write_model``."""
        return cards.of_version(self, model_folder)

    @property
    def headline(self) -> str:
        """The model card in one paragraph."""
        test_set = next(iter(test_sets(self.dataset)))
        return model_card.headline(test_set, self.probabilities, self.labels, self.dataset.classes)

    def _rival(self, champion: registry.Champion, folder: Path) -> tuple[gate.Champion, drift.Known]:
        """Return the champion with its predictions on the test images, and the images that it knows."""
        try:
            model = champion.model_folder(folder)
            known = drift.Known.load(model / _KNOWN)
            predictor = load_model(model)
            predicted = self._predicted(champion, predictor)
        except Exception as error:
            raise RuntimeError(
                f"{champion.name} version {champion.version}, the champion, cannot predict the present test "
                f"images ({error}). Restore its artifacts, return to the previous champion with `make "
                f"rollback`, or delete the alias {registry.CHAMPION!r} to start without a champion."
            ) from error
        fair = self._not_learnt(known.learnt)
        return gate.Champion(champion.version, predictor.classes, predicted, fair), known

    def _predicted(self, champion: registry.Champion, predictor: Predictor) -> np.ndarray:
        """Return the champion's predictions (N,) on the test images, cached by champion and test set."""
        test = [record.sha256 for record in self.test]
        key = fingerprint(Predictor, cell=champion.cell_key, test=test)
        path = self.study.cache / "champions" / f"{key}.npy"
        if atomic.is_sound(path):
            return np.load(path, allow_pickle=False)
        labels: list[str] = []
        for start in range(0, len(self.test), _CHUNK):
            images = [self.dataset.image(record) for record in self.test[start : start + _CHUNK]]
            labels += [prediction.label for prediction in predictor.predict_decoded(images)]
        with atomic.sealed_file(path) as file, file.open("wb") as stream:
            np.save(stream, np.array(labels), allow_pickle=False)
        return np.array(labels)

    def _not_learnt(self, learnt: Iterable[str]) -> np.ndarray:
        """Return (N,) bool: test images without a twin or an image of the same patient in ``learnt``."""
        records = list(self.dataset.records.values())
        pairs = read_pairs(self.dataset.paths.report(self.dataset.name, "duplicates.csv"))
        component = components(records, groups(records, pairs))
        learnt = frozenset(learnt)
        seen = {component[record.path] for record in records if record.sha256 in learnt}
        return np.array([component[record.path] not in seen for record in self.test], bool)

    def _shifts(self, known: drift.Known) -> list[drift.Shift]:
        """Compare the images that are new to the champion with the images that it knows."""
        new = [record for record in self.dataset.records.values() if record.sha256 not in known.names]
        self.new = len(new)
        if not new:
            return []
        limits = self.study.params.drift
        bounds = {name: getattr(limits, name) for name in ("embedding", "coverage", "classes", "statistics")}
        return drift.measure(known.sample, self._sample(new), bounds, limits.p)

    def _sample(self, records: Iterable[Record]) -> drift.Images:
        """Describe at most ``drift.images`` images; the choice depends only on the content of the images."""
        chosen = sorted(records, key=lambda record: record.sha256)[: self.study.params.drift.images]
        paths = [record.path for record in chosen]
        ((embeddings,),) = (self.dataset.encode((DRIFT_BY,), "none", paths, 1, "encode for drift"),)
        coverages = [self.dataset.masks.status[path].coverage for path in paths]
        numbers = [drift.statistics(grey(self.dataset.image(record))) for record in chosen]
        return drift.Images(
            labels=np.array([record.label for record in chosen]),
            embeddings=embeddings[:, 0].numpy(),
            coverage=np.array(coverages),
            statistics=np.stack(numbers),
            encoder=self.dataset.encoder.key,
        )


def _predictions(dataset: EncodedDataset, cell: Cell) -> tuple[np.ndarray, np.ndarray]:
    """Return the main classifier's probabilities (N, K) and the labels (N,) of the whole test set."""
    with np.load(dataset.paths.predictions(dataset.name), allow_pickle=False) as predictions:
        return main_classifier(predictions, cell), predictions["labels"]
