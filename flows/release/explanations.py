"""Attribution of the page's systems: where each system looks in the test images."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from flows.study.cells import Cell
from flows.study.dataset import EncodedDataset
from medfocus.datasets.records import Record, spread_over_classes
from medfocus.explain.explain import explain_one, share_in_mask
from medfocus.explain.maps import pointing_hit
from medfocus.focus.controls import CONTROLS
from medfocus.focus.view import visible
from medfocus.masks.quality import known_region
from medfocus.reports.page_content import Example
from medfocus.reports.rows import system_name
from medfocus.serving import checkpoint
from medfocus.storage.tables import write_csv

_EXPLAINED = 24  # test images per data set and system
_SHOWN = 6  # of these in the gallery
_OTHERS = 2  # focus modes to explain in addition to the best cell's


@dataclasses.dataclass(frozen=True)
class Explained:
    """A row of attribution.csv: where a system looked in one test image."""

    dataset: str
    system: str
    image: str  # the first 12 hex digits of its sha256, because a file name may name a patient
    label: str
    predicted: str
    way: str  # of the attribution
    inside: float  # share of the attribution inside the mask
    covered: float  # share of the view inside the mask; a blind attribution has this share inside
    pointing: str  # "hit" or "miss" of the known region; empty if none is known


def explained_cells(best: Cell, cells: Iterable[Cell]) -> Iterator[Cell]:
    """Yield the best cell and the first cells that differ from it only in the focus mode."""
    others = (
        cell
        for cell in cells
        if cell._replace(focus=best.focus) == best and cell.focus not in {best.focus, *CONTROLS}
    )
    yield best
    yield from islice(others, _OTHERS)


def explain_cell(
    dataset: EncodedDataset, cell: Cell, probabilities: np.ndarray
) -> tuple[list[Explained], list[Example]]:
    """Explain a cell's answers on test images spread over the classes; return table rows and gallery images.

    ``probabilities`` (N, K) are the cell's answers on the whole test set.
    """
    method, _ = checkpoint.load(dataset.paths.checkpoint(cell), dataset.encoder_for(cell.focus))
    records = [dataset.records[path] for path in dataset.splits.test]
    labels = [record.label for record in records]
    shown = set(spread_over_classes(labels, _SHOWN))
    rows, gallery = [], []
    chosen = spread_over_classes(labels, _EXPLAINED)
    for i in tqdm(chosen, desc=f"explain {cell.name}", unit="image", disable=None, leave=False):
        view = dataset.shown(records[i], cell.focus)  # (S, S, C)
        heat, way = explain_one(method, view, int(probabilities[i].argmax()))
        row, example = _explained(dataset, cell, records[i], probabilities[i], view, heat, way)
        rows.append(row)
        if i in shown:
            gallery.append(example)
    return rows, gallery


def _explained(
    dataset: EncodedDataset,
    cell: Cell,
    record: Record,
    probabilities: np.ndarray,
    view: np.ndarray,
    heat: np.ndarray,
    way: str,
) -> tuple[Explained, Example]:
    """Compare an attribution with the mask and the known region, unless the view is a crop."""
    system = f"{system_name(cell.method, cell.focus)}, {cell.support} of train"
    label, image_id, target = record.label, record.sha256[:12], int(probabilities.argmax())
    image, mask = dataset.image(record), dataset.mask(record, cell.focus)
    frame = dataset.encoder.frame
    covered, pointing = float("nan"), ""
    share = None if mask is None else share_in_mask(heat, mask, cell.focus, frame)
    if cell.focus != "crop":
        if mask is not None:
            covered = float((frame.mask(mask) > 0.5).mean())
        region = known_region(dataset.root, record.path, *image.shape[:2])
        if region is not None:
            pointing = "hit" if pointing_hit(heat, frame.mask(region) > 0.5) else "miss"
    answer, probability = dataset.classes[target], float(probabilities[target])
    inside = float("nan") if share is None else share
    return (
        Explained(dataset.name, system, image_id, label, answer, way, inside, covered, pointing),
        Example(
            dataset.name,
            system,
            image_id,
            image,
            label,
            answer,
            probability,
            mask,
            visible(view),
            heat,
            share,
        ),
    )


def write_attribution(rows: Sequence[Explained], path: Path) -> None:
    """Write attribution.csv."""
    names = [f.name for f in dataclasses.fields(Explained)]
    write_csv(path, names, (dataclasses.astuple(row) for row in rows))


def sentences(rows: Sequence[Explained]) -> list[str]:
    """Return one sentence on the attribution of each system."""
    return [
        _sentence(dataset, system, [row for row in rows if (row.dataset, row.system) == (dataset, system)])
        for dataset, system in dict.fromkeys((row.dataset, row.system) for row in rows)
        if any(np.isfinite(row.inside) for row in rows if (row.dataset, row.system) == (dataset, system))
    ]


def _sentence(dataset: str, system: str, rows: Sequence[Explained]) -> str:
    inside = np.array([row.inside for row in rows])
    known = np.isfinite(inside)
    covered = np.array([row.covered for row in rows])[known].mean()
    sentence = (
        f"{dataset}, {system}: {100 * inside[known].mean():.0f} % of the attribution ({rows[0].way}) lies "
        f"inside the mask, which covers {100 * covered:.0f} % of the view ({known.sum()} test images)"
    )
    if pointed := [row.pointing for row in rows if row.pointing]:
        sentence += f"; its maximum hits the known region in {pointed.count('hit')} of {len(pointed)}"
    return f"{sentence}."
