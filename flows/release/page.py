"""Everything a study found -> reports/index.html: one file to read and to send. Nothing is fitted here."""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import io
import tempfile
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from flows.stages.evaluate import test_sets
from flows.study import costs, models
from flows.study.cells import Cell, best_cell, plan
from flows.study.dataset import EncodedDataset
from flows.study.study import Study, open_study
from medfocus.datasets.duplicates import read_pairs
from medfocus.datasets.records import spread_over_classes
from medfocus.evaluation import metrics
from medfocus.evaluation.comparison import Scored, compare
from medfocus.explain.explain import explain
from medfocus.explain.maps import inside_share, pointing_hit
from medfocus.focus.controls import CONTROLS
from medfocus.images.geometry import letterbox_mask
from medfocus.masks.quality import known_region
from medfocus.reports.data_warnings import data_warnings
from medfocus.reports.page import (
    Calibration,
    Confusion,
    Cost,
    Example,
    Provenance,
    Recalls,
    Report,
    render,
)
from medfocus.reports.tables import StudyRow, read_published, read_study_csv, system_name
from medfocus.serving import checkpoint
from medfocus.storage import atomic
from medfocus.tracking import runs
from medfocus.tracking.provenance import made_from

_EXPLAINED = 24  # test images per data set and system
_SHOWN = 6  # of them in the gallery, for each system
_OTHERS = 2  # focus modes explained beside the best cell's


@dataclasses.dataclass(frozen=True)
class Explained:
    """A line of attribution.csv: two numbers that say where a system looked in a test image."""

    dataset: str
    system: str
    image: str  # the first 12 hex digits of its sha256: the file's name may name a patient
    label: str
    predicted: str
    way: str  # of the attribution
    inside: float  # share of the attribution inside the mask
    covered: float  # share of the view that the mask covers: what blind attribution would have inside
    pointing: str  # "hit" or "miss" of the known region; empty where none is known


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the page of a study that was run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--params", type=Path, default=Path("params.yaml"), help="a study's params.yaml")
    print(write_page(open_study(parser.parse_args(arguments).params)))


def write_page(study: Study) -> Path:
    """Write reports/index.html and reports/attribution.csv of an evaluated study; the page's path.

    The page is kept in MLflow as well, with the study's run.
    """
    paths = study.paths
    with contextlib.chdir(study.folder):
        rows = read_study_csv(paths.study if paths.study.exists() else paths.results)
        cells = plan(study.params)
        encoder = models.build_encoder(study)
        page = Report(study.params.study.name, rows=rows, baseline=study.params.report.baseline)
        parts = _Parts()
        for name in study.params.datasets:
            dataset = EncodedDataset(study, name, encoder)
            parts.add(dataset, [cell for cell in cells if cell.dataset == name])
        if parts.lines:
            table = io.StringIO()
            names = [f.name for f in dataclasses.fields(Explained)]
            writer = csv.DictWriter(table, names, lineterminator="\n")
            writer.writeheader()
            writer.writerows(dataclasses.asdict(line) for line in parts.lines)
            atomic.write(paths.attribution, table.getvalue())
        differences = compare(parts.tests, page.baseline, np.random.default_rng(0))
        published = study.params.report.published
        page = dataclasses.replace(
            page,
            differences=dict(zip(parts.blocks, differences, strict=True)),
            published=read_published(study.folder / published) if published else (),
            verdicts=_attribution_sentences(parts.lines),
            gallery=parts.gallery,
            confusions=parts.confusions,
            calibrations=parts.calibrations,
            recalls=parts.recalls,
            masks=parts.masks,
            warnings=parts.warnings,
            costs=_costs(study, rows),
            provenance=_provenance(study),
        )
        store = runs.start(None, study.home, study.params.tracking.experiment)
        with tempfile.TemporaryDirectory() as folder:
            written = Path(folder, paths.page.name)
            written.write_text(render(page), encoding="utf-8")
            store.log_page(rows[0].mlflow_run_id, written)
            atomic.write(paths.page, written.read_bytes())  # last: where it stands all of this is done
    return paths.page


@dataclasses.dataclass
class _Parts:
    """What the page shows of each data set, gathered one after the other."""

    blocks: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    tests: list[Scored] = dataclasses.field(default_factory=list)
    gallery: list[Example] = dataclasses.field(default_factory=list)
    confusions: list[Confusion] = dataclasses.field(default_factory=list)
    calibrations: list[Calibration] = dataclasses.field(default_factory=list)
    recalls: list[Recalls] = dataclasses.field(default_factory=list)
    masks: dict[str, list[dict[str, str]]] = dataclasses.field(default_factory=dict)
    warnings: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    lines: list[Explained] = dataclasses.field(default_factory=list)

    def add(self, dataset: EncodedDataset, cells: Sequence[Cell]) -> None:
        """Gather a data set's parts from what the stages made of it."""
        name, splits = dataset.name, dataset.splits
        with dataset.paths.report(name, "masks.csv").open(newline="", encoding="utf-8") as file:
            self.masks[name] = [dict(line) for line in csv.DictReader(file)]
        pairs = read_pairs(dataset.paths.report(name, "duplicates.csv"))
        self.warnings[name] = data_warnings(dataset.records.values(), splits, pairs)
        labels = dataset.labels(splits.test)
        with np.load(dataset.paths.predictions(name), allow_pickle=False) as file:
            predicted = {cell: _main_classifier(file, cell) for cell in cells}
        draws: dict[tuple[str, float], list[np.ndarray]] = {}  # (system, percent) -> a draw's (N, K) each
        for cell, values in predicted.items():
            system = system_name(cell.method, cell.focus)
            draws.setdefault((system, dataset.percent_of_train(cell)), []).append(values)
        for test_set, members in test_sets(dataset).items():
            at = np.isin(splits.test, members)
            patients = np.array([dataset.records[path].patient or path for path in splits.test])[at]
            correct = {
                of: np.stack([values[at].argmax(axis=1) == labels[at] for values in each])
                for of, each in draws.items()
            }
            self.blocks.append((name, test_set))
            self.tests.append(Scored(correct, patients))
        largest = max(percent for _, percent in draws)
        with contextlib.suppress(ValueError):  # nothing could be validated: no system is the best
            best = best_cell(dataset.study, name, cells)
            counts = metrics.confusion(predicted[best].argmax(axis=1), labels, len(dataset.classes))
            self.confusions.append(Confusion(name, best.name, dataset.classes, counts))
            for cell in _explained_cells(best, cells):
                self._explain(dataset, cell, predicted[cell])
        for system in dict.fromkeys([dataset.study.params.report.baseline, *_calibrated(draws, largest)]):
            for percent in (0.0, largest):
                if (system, percent) in draws:
                    each = draws[system, percent]
                    curve = metrics.reliability(np.concatenate(each), np.tile(labels, len(each)))
                    self.calibrations.append(Calibration(name, f"{system}, {percent:g} % of train", curve))
        middle = sorted({percent for _, percent in draws if percent})[0]
        self.recalls.append(
            Recalls(
                name,
                f"{middle:g} % of train, whole test set",
                dataset.classes,
                tuple(np.bincount(labels, minlength=len(dataset.classes)).tolist()),
                {
                    system: np.stack([metrics.per_class_recall(values, labels) for values in each])
                    for (system, percent), each in draws.items()
                    if percent == middle
                },
            )
        )

    def _explain(self, dataset: EncodedDataset, cell: Cell, predicted: np.ndarray) -> None:
        """Attribution of one cell on test images spread over the classes; the first go to the gallery."""
        encoder = dataset.encoder_for(cell.focus)
        method, _ = checkpoint.load(dataset.paths.checkpoint(cell), encoder)
        test = dataset.splits.test
        system = f"{system_name(cell.method, cell.focus)}, {cell.support} of train"
        labels = [dataset.records[path].label for path in test]
        chosen = spread_over_classes(labels, _EXPLAINED)
        shown = set(spread_over_classes(labels, _SHOWN))
        for i in tqdm(chosen, desc=f"explain {cell.name}", unit="image", disable=None, leave=False):
            record = dataset.records[test[i]]
            view = dataset.shown(record, cell.focus)  # (S, S, C)
            target = int(predicted[i].argmax())
            maps, way = explain(method, encoder, torch.from_numpy(view)[None], torch.tensor([target]))
            heat = maps[0].numpy()
            image, mask = dataset.image(record), dataset.mask(record, cell.focus)
            framed = None
            if cell.focus != "crop" and mask is not None:
                framed = letterbox_mask(mask, len(view)) > 0.5
            inside = inside_share(heat, framed) if framed is not None and framed.any() else float("nan")
            region = known_region(dataset.root, record.path, *image.shape[:2])
            pointing = ""
            if region is not None and cell.focus != "crop":
                pointing = "hit" if pointing_hit(heat, letterbox_mask(region, len(view)) > 0.5) else "miss"
            covered = float(framed.mean()) if framed is not None else float("nan")
            label, answer, image_id = record.label, dataset.classes[target], record.sha256[:12]
            self.lines.append(
                Explained(dataset.name, system, image_id, label, answer, way, inside, covered, pointing)
            )
            if i in shown:
                self.gallery.append(
                    Example(
                        dataset.name,
                        system,
                        image_id,
                        image,
                        label,
                        answer,
                        float(predicted[i, target]),
                        mask,
                        view[..., -3:] if view.shape[2] == 6 else view[..., :3],
                        heat,
                        None if np.isnan(inside) else inside,
                    )
                )


def _main_classifier(file: np.lib.npyio.NpzFile, cell: Cell) -> np.ndarray:
    """(N, K) probabilities of a cell's own classifier on the whole test set."""
    return file[next(name for name in file.files if name.startswith(f"{cell.name} "))].astype(np.float64)


def _explained_cells(best: Cell, cells: Sequence[Cell]) -> Iterator[Cell]:
    """The best cell, and of those that differ from it in their focus alone the first."""
    others = (
        cell
        for cell in cells
        if cell._replace(focus=best.focus) == best and cell.focus not in {best.focus, *CONTROLS}
    )
    yield best
    yield from islice(others, _OTHERS)


def _calibrated(draws: dict[tuple[str, float], list[np.ndarray]], percent: float) -> list[str]:
    """MedFocusCLIP and its kin, where they were run at ``percent``."""
    return [system for system, at in draws if at == percent and system.startswith("medfocusclip")][:4]


def _attribution_sentences(lines: Sequence[Explained]) -> list[str]:
    """What attribution says of each system, in a sentence each."""
    said = []
    for dataset, system in dict.fromkeys((line.dataset, line.system) for line in lines):
        own = [line for line in lines if (line.dataset, line.system) == (dataset, system)]
        inside = np.array([line.inside for line in own])
        known = np.isfinite(inside)
        if not known.any():
            continue
        covered = np.array([line.covered for line in own])[known].mean()
        sentence = (
            f"{dataset}, {system}: {100 * inside[known].mean():.0f} % of the attribution ({own[0].way}) lies "
            f"inside the mask, which covers {100 * covered:.0f} % of the view ({known.sum()} test images)"
        )
        pointed = [line.pointing for line in own if line.pointing]
        if pointed:
            sentence += f"; its maximum hits the known region in {pointed.count('hit')} of {len(pointed)}"
        said.append(f"{sentence}.")
    return said


def _costs(study: Study, rows: Sequence[StudyRow]) -> list[Cost]:
    """Means over a system's cells at its largest support, in the order of the table."""
    lines = costs.read_lines(study.paths.costs)
    found = []
    for system in dict.fromkeys(row.system for row in rows):
        own = [line for line in lines if line.system == system]
        if not own:
            continue
        largest = max(line.percent_of_train for line in own)
        own = [line for line in own if line.percent_of_train == largest]
        peaks = [line.peak_mib for line in own if line.peak_mib is not None]
        note = own[0].note
        found.append(
            Cost(
                f"{system} ({note})" if note else system,
                float(np.mean([line.fit_seconds for line in own])),
                float(np.mean([line.images_per_second for line in own])),
                max(peaks) if peaks else None,
                own[0].learnt,
            )
        )
    return found


def _provenance(study: Study) -> Provenance:
    where = Path(study.folder).resolve().relative_to(study.home.resolve())
    command = "make run" if where == Path() else f"make run PARAMS={(where / 'params.yaml').as_posix()}"
    facts = made_from(study.folder, study.params.study.seeds)
    return Provenance(command, facts, Path("params.yaml").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
