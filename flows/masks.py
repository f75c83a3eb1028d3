"""Stage: one mask a picture, cached by content; the output holds exactly this manifest's masks."""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from flows.study import here
from medfocus import images
from medfocus.masks.store import MaskStore, PublishedMasks, cache_masks, publish
from medfocus.quality import iou, known_region
from medfocus.records import Record, read_manifest
from medfocus.report import mask_sheet

_SHEET_PICTURES = 24


def main(arguments: Sequence[str] | None = None) -> None:
    """Segment what the cache lacks, publish, and show coverage, scores and fallbacks a class."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", required=True)
    dataset = parser.parse_args(arguments).dataset
    study = here()
    params, root = study.params.masks, study.root(dataset)
    records = read_manifest(Path(f"data/manifests/{dataset}.csv"))
    segmenter = study.segmenter(dataset)
    store = MaskStore(study.cache / "masks")
    with tqdm(total=len(records), desc=f"masks {dataset}", unit="picture", disable=None) as bar:
        pictures = ((record, root / record.path) for record in records)
        cache_masks(pictures, segmenter, store, batch_size=params.batch_size, progress=bar.update)
    folder = Path("data/masks", dataset)
    publish(records, store, segmenter.key, folder)

    masks, reports = PublishedMasks(folder), Path("reports/data", dataset)
    reports.mkdir(parents=True, exist_ok=True)
    _write_summary(masks, _truths(records, root, masks), reports / "masks.csv")
    shown = _spread_over_classes(records)
    (reports / "masks.png").write_bytes(
        mask_sheet(
            [images.read(root / record.path) for record in shown],
            [masks[record.sha256] for record in shown],
            [f"{record.label}: {masks.status[record.path].status}" for record in shown],
        )
    )


def _truths(records: Sequence[Record], root: Path, masks: PublishedMasks) -> dict[str, list[float]]:
    """Label -> IoU of each mask with the known region, where root/masks has one. It measures and no more."""
    found: dict[str, list[float]] = {}
    for record in records:
        mask = masks[record.sha256]
        region = known_region(root, record.path, *mask.shape)
        if region is not None:
            found.setdefault(record.label, []).append(iou(mask, region))
    return found


def _write_summary(masks: PublishedMasks, truths: dict[str, list[float]], path: Path) -> None:
    lines = masks.summary()
    if truths:
        for line in lines:
            values = truths.get(str(line["label"]), [])
            line |= {"regions": len(values), "iou": float(np.mean(values)) if values else ""}
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


def _spread_over_classes(records: Sequence[Record]) -> list[Record]:
    """Up to ``_SHEET_PICTURES`` records, as many of each class, spread over its pictures."""
    labels = sorted({record.label for record in records})
    chosen: list[Record] = []
    for label in labels:
        members = [record for record in records if record.label == label]
        count = min(len(members), max(1, _SHEET_PICTURES // len(labels)))
        chosen += [members[i] for i in np.linspace(0, len(members) - 1, count).astype(int)]
    return chosen


if __name__ == "__main__":
    main()
