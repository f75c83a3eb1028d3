"""Stage: one mask a picture, cached by content; the output holds exactly this manifest's masks."""

from __future__ import annotations

import argparse
import csv
import hashlib
import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from flows.study import ADAPTER, Study, here
from medfocus import images
from medfocus.masks.store import MaskStore, PublishedMasks, cache_masks, publish
from medfocus.quality import iou, known_region
from medfocus.records import Record, read_manifest, spread_over_classes
from medfocus.report import mask_sheet
from medfocus.splits import read_splits

if TYPE_CHECKING:
    from torch import Tensor

    from medfocus.masks.sam2 import Sam2Segmenter

_SHEET_PICTURES = 24


def main(arguments: Sequence[str] | None = None) -> None:
    """Segment what the cache lacks, publish, and show coverage, scores and fallbacks a class."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", required=True)
    dataset = parser.parse_args(arguments).dataset
    study = here()
    params, root = study.params.masks, study.root(dataset)
    records = read_manifest(Path(f"data/manifests/{dataset}.csv"))
    taught, state = Taught((), root), None
    if params.segmenter == "sam2" and params.strategy == "adapter":
        from medfocus.masks.informed.adapter import AdapterSegmenter  # takes seconds

        plain = study.sam2(dataset)
        taught = Taught.of(records, set(read_splits(Path(f"data/splits/{dataset}.json")).train), root)
        state = _adapter(study, dataset, plain, taught)
        segmenter = AdapterSegmenter(plain, state)
    else:
        segmenter = study.segmenter(dataset)
    store = MaskStore(study.cache / "masks")
    with tqdm(total=len(records), desc=f"masks {dataset}", unit="picture", disable=None) as bar:
        pictures = ((record, root / record.path) for record in records)
        cache_masks(pictures, segmenter, store, batch_size=params.batch_size, progress=bar.update)
    folder = Path("data/masks", dataset)
    publish(records, store, segmenter.key, folder)
    if state is not None:
        from safetensors.torch import save_file

        save_file(state, folder / ADAPTER)

    masks, reports = PublishedMasks(folder), Path("reports/data", dataset)
    reports.mkdir(parents=True, exist_ok=True)
    known = set(taught.records)  # an adapter's masks of these would flatter it
    measured = [record for record in records if record not in known]
    _write_summary(masks, _truths(measured, root, masks), reports / "masks.csv")
    shown = [records[i] for i in spread_over_classes([r.label for r in records], _SHEET_PICTURES)]
    (reports / "masks.png").write_bytes(
        mask_sheet(
            [images.read(root / record.path) for record in shown],
            [masks[record.sha256] for record in shown],
            [f"{record.label}: {masks.status[record.path].status}" for record in shown],
        )
    )


@dataclass(frozen=True)
class Taught:
    """Training pictures (H, W, 3) uint8 and their known regions (H, W) bool, read when they are asked for.

    Few-shot cells see masks by an adapter that was taught on all training pictures: it knows more regions,
    though no more labels, than their support.
    """

    records: tuple[Record, ...]
    root: Path

    @classmethod
    def of(cls, records: Iterable[Record], train: Collection[str], root: Path) -> Taught:
        """Those of the paths ``train`` that have a region; no file of another picture's region is opened.

        A blank region counts as none: where only one class has blank ones, they would tell it.
        """
        found = (record for record in records if record.path in train)
        return cls(tuple(r for r in found if known_region(root, r.path, r.height, r.width) is not None), root)

    @property
    def digest(self) -> str:
        """sha256 hex over pictures and regions."""
        sha = hashlib.sha256()
        for i, record in enumerate(self.records):
            sha.update(record.sha256.encode() + np.packbits(self[i][1]).tobytes())
        return sha.hexdigest()

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int, /) -> tuple[np.ndarray, np.ndarray]:
        record = self.records[index]
        region = known_region(self.root, record.path, record.height, record.width)
        assert region is not None  # of() lets no other in
        return images.read(self.root / record.path), region


def _adapter(study: Study, dataset: str, plain: Sam2Segmenter, taught: Taught) -> dict[str, Tensor]:
    """The taught adapter's tensors, out of the cache where the same was taught before."""
    from safetensors.torch import load_file, save_file

    from medfocus.masks.informed.adapter import adapter_key, train_adapter

    params = study.params.masks.adapter
    settings = asdict(params)
    path = study.cache / "adapters" / f"{adapter_key(plain, taught.digest, settings)}.safetensors"
    if path.is_file():
        return load_file(path)
    with tqdm(total=params.steps, desc=f"adapter {dataset}", unit="step", disable=None) as bar:
        state = train_adapter(taught, plain, **settings, progress=bar.update)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(f".{os.getpid()}")
    save_file(state, beside)
    beside.replace(path)
    return state


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


if __name__ == "__main__":
    main()
