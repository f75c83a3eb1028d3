"""Stage: one mask per image, cached by content; the output holds exactly this manifest's masks."""

from __future__ import annotations

import argparse
import csv
import hashlib
import os
import shutil
import threading
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from flows.study import models
from flows.study.study import Study, here, study_in
from medfocus.datasets.records import Record, chunks, read_manifest, spread_over_classes
from medfocus.datasets.splits import read_splits
from medfocus.images import decode
from medfocus.masks.quality import iou, known_region
from medfocus.masks.store import MaskStore, PublishedMasks, cache_masks, publish
from medfocus.reports.figures import mask_sheet
from medfocus.storage import atomic

if TYPE_CHECKING:
    from medfocus.masks.segmenter import Segmenter

_SHEET_IMAGES = 24


def main(arguments: Sequence[str] | None = None) -> None:
    """Segment what the cache lacks, publish, and show coverage, scores and fallbacks a class."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", required=True)
    dataset = parser.parse_args(arguments).dataset
    study = here()
    params, scale, root = study.params.masks, study.params.scale, study.root(dataset)
    records = read_manifest(study.paths.manifest(dataset))
    taught, adapter = AdapterExamples((), root), None
    if params.segmenter == "sam2" and params.strategy == "adapter":
        taught = AdapterExamples.of(records, set(read_splits(study.paths.splits(dataset)).train), root)
        adapter = _adapter(study, dataset, taught)
    segmenter = models.build_segmenter(study, dataset, adapter)
    store = MaskStore(study.shared_cache("masks"))
    with tqdm(total=len(records), desc=f"masks {dataset}", unit="image", disable=None) as bar:
        if scale.runner != "here":
            from flows.study.runners import by_shards  # imports Prefect

            jobs = [
                MaskShard(study.folder, study.version, dataset, tuple(part), adapter)
                for part in chunks(_lacking(records, store, segmenter.key), scale.images)
            ]
            by_shards(mask_shard, jobs, scale, bar.update)
            bar.reset()
        images = ((record, root / record.path) for record in records)
        cache_masks(images, segmenter, store, batch_size=params.batch_size, progress=bar.update)
    folder = study.paths.masks(dataset)
    for left in folder.parent.glob(f".{dataset}.????????*"):  # by a killed run; DVC would take it for masks
        shutil.rmtree(left)
    publish(records, store, segmenter.key, folder)
    if adapter:
        shutil.copyfile(adapter, study.paths.adapter(dataset))

    masks, sheet = PublishedMasks(folder), study.paths.report(dataset, "masks.png")
    sheet.parent.mkdir(parents=True, exist_ok=True)
    known = set(taught.records)  # an adapter's masks of these would flatter it
    measured = [record for record in records if record not in known]
    _write_summary(masks, _truths(measured, root, masks), sheet.with_suffix(".csv"))
    shown = [records[i] for i in spread_over_classes([r.label for r in records], _SHEET_IMAGES)]
    sheet.write_bytes(
        mask_sheet(
            [decode.read(root / record.path) for record in shown],
            [masks[record.sha256] for record in shown],
            [f"{record.label}: {masks.status[record.path].status}" for record in shown],
        )
    )


@dataclass(frozen=True)
class AdapterExamples:
    """Training images (H, W, 3) uint8 and their known regions (H, W) bool, read when they are asked for.

    Few-shot cells see masks by an adapter that was taught on all training images: it knows more regions,
    though no more labels, than their support.
    """

    records: tuple[Record, ...]
    root: Path

    @classmethod
    def of(cls, records: Iterable[Record], train: Collection[str], root: Path) -> AdapterExamples:
        """Those of the paths ``train`` that have a region; no file of another image's region is opened.

        A blank region counts as none: where only one class has blank ones, they would tell it.
        """
        found = (record for record in records if record.path in train)
        return cls(tuple(r for r in found if known_region(root, r.path, r.height, r.width) is not None), root)

    @property
    def digest(self) -> str:
        """sha256 hex over images and regions."""
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
        return decode.read(self.root / record.path), region


def _adapter(study: Study, dataset: str, taught: AdapterExamples) -> Path:
    """The file of the taught adapter, out of the cache where the same was taught before."""
    from safetensors.torch import save_file

    from medfocus.masks.sam2.adapter import adapter_key, train_adapter  # takes seconds

    params, plain = study.params.masks.adapter, models.build_sam2(study, dataset)
    settings = asdict(params)
    path = study.cache / "adapters" / f"{adapter_key(plain, taught.digest, settings)}.safetensors"
    if atomic.is_sound(path):
        return path
    with tqdm(total=params.steps, desc=f"adapter {dataset}", unit="step", disable=None) as bar:
        state = train_adapter(taught, plain, **settings, progress=bar.update)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(f".{os.getpid()}")
    save_file(state, beside)
    atomic.seal(beside, path)
    return path


@dataclass(frozen=True)
class MaskShard:
    """Some images of a data set whose masks a worker is to put into the cache."""

    folder: Path  # of the study
    version: str  # see ``Study.version``
    dataset: str
    records: tuple[Record, ...]
    adapter: Path | None


def mask_shard(shard: MaskShard) -> int:
    """Have the cache hold a shard's masks; in a worker of ``flows.study.runners``."""
    study, segmenter = _segmenter_of_thread(
        shard.folder, shard.version, shard.dataset, shard.adapter, threading.get_ident()
    )
    root = study.root(shard.dataset)
    cache_masks(
        ((record, root / record.path) for record in shard.records),
        segmenter,
        MaskStore(study.shared_cache("masks")),
        batch_size=study.params.masks.batch_size,
    )
    return len(shard.records)


@lru_cache(maxsize=4)
def _segmenter_of_thread(
    folder: Path, version: str, dataset: str, adapter: Path | None, thread: int
) -> tuple[Study, Segmenter]:
    """A segmenter for the shards of one thread: it is for one at a time."""
    study = study_in(folder)
    return study, models.build_segmenter(study, dataset, adapter)


def _lacking(records: Iterable[Record], store: MaskStore, segmenter_key: str) -> Iterator[Record]:
    """The records whose mask the cache lacks, each image once."""
    seen: set[str] = set()
    for some in chunks(records, 1000):
        seen |= {sha for sha, _ in store.encoded((record.sha256 for record in some), segmenter_key)}
        for record in some:
            if record.sha256 not in seen:
                seen.add(record.sha256)
                yield record


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
    # The workers look a job's class up by its module's name, and that is not __main__ there.
    from flows.stages.masks import main as run

    run()
