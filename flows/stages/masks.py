"""Stage: manifest and images -> exactly one mask per image of the manifest, cached by content."""

from __future__ import annotations

import csv
import hashlib
import shutil
import threading
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from flows.study import models
from flows.study.study import Study, here_with, study_in
from medfocus.datasets.records import Record, chunks, read_manifest, spread_over_classes
from medfocus.datasets.splits import read_splits
from medfocus.images import decode
from medfocus.masks.published import PublishedMasks, publish
from medfocus.masks.quality import iou, known_region
from medfocus.masks.store import MaskStore, cache_masks
from medfocus.reports.figures import mask_sheet
from medfocus.storage import atomic

if TYPE_CHECKING:
    from medfocus.masks.segmenter import Segmenter

_SHEET_IMAGES = 24


def main(arguments: Sequence[str] | None = None) -> None:
    """Segment the images that the cache lacks; publish the masks, a summary per class and a contact sheet."""
    study, dataset = here_with("--dataset", __doc__, arguments)
    params, scale, root = study.params.masks, study.params.scale, study.root(dataset)
    records = read_manifest(study.paths.manifest(dataset))
    examples, adapter = AdapterExamples((), root), None
    if params.segmenter == "sam2" and params.strategy == "adapter":
        examples = AdapterExamples.of(records, set(read_splits(study.paths.splits(dataset)).train), root)
        adapter = _adapter(study, dataset, examples)
    segmenter = models.build_segmenter(study, dataset, adapter)
    store = MaskStore(study.shared_cache("masks"))
    with tqdm(total=len(records), desc=f"masks {dataset}", unit="image", disable=None) as bar:
        if scale.runner != "here":
            from flows.study.runners import by_shards  # imports Prefect

            jobs = [
                MaskShard(study.folder, study.version, dataset, tuple(part), adapter)
                for part in chunks(store.missing(records, segmenter.key), scale.images)
            ]
            by_shards(mask_shard, jobs, scale, bar.update)
            bar.reset()
        images = ((record, root / record.path) for record in records)
        cache_masks(images, segmenter, store, batch_size=params.batch_size, progress=bar.update)
    folder = study.paths.masks(dataset)
    for unfinished in folder.parent.glob(f".{dataset}.????????*"):  # of a killed run; DVC would hash it
        shutil.rmtree(unfinished)
    publish(records, store, segmenter.key, folder)
    if adapter:
        shutil.copyfile(adapter, study.paths.adapter(dataset))

    masks, sheet = PublishedMasks(folder), study.paths.report(dataset, "masks.png")
    sheet.parent.mkdir(parents=True, exist_ok=True)
    learned = set(examples.records)  # the adapter has seen the known regions of these
    measured = [record for record in records if record not in learned]
    _write_summary(masks, _overlaps(measured, root, masks), sheet.with_suffix(".csv"))
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
    """Training images (H, W, 3) uint8 and their known regions (H, W) bool, read on demand.

    The adapter learns from all training images. So the masks of a few-shot cell depend on more regions than
    its support contains, but not on more labels.
    """

    records: tuple[Record, ...]
    root: Path

    @classmethod
    def of(cls, records: Iterable[Record], train: Collection[str], root: Path) -> AdapterExamples:
        """Select the training images with a known region; no other image's region file is opened.

        A blank region does not count, because blank regions of only one class would reveal the class.
        """
        training = (record for record in records if record.path in train)
        with_region = (r for r in training if known_region(root, r.path, r.height, r.width) is not None)
        return cls(tuple(with_region), root)

    @property
    def digest(self) -> str:
        """sha256 hex of the images and regions."""
        sha = hashlib.sha256()
        for i, record in enumerate(self.records):
            sha.update(record.sha256.encode() + np.packbits(self[i][1]).tobytes())
        return sha.hexdigest()

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int, /) -> tuple[np.ndarray, np.ndarray]:
        record = self.records[index]
        region = known_region(self.root, record.path, record.height, record.width)
        assert region is not None  # by construction in ``of``
        return decode.read(self.root / record.path), region


def _adapter(study: Study, dataset: str, examples: AdapterExamples) -> Path:
    """Return the file of the trained adapter; train it if the cache lacks it."""
    from safetensors.torch import save_file

    from medfocus.masks.sam2.adapter import adapter_key, train_adapter  # takes seconds

    params, plain = study.params.masks.adapter, models.build_sam2(study, dataset)
    settings = asdict(params)
    path = study.cache / "adapters" / f"{adapter_key(plain, examples.digest, settings)}.safetensors"
    if atomic.is_sound(path):
        return path
    with tqdm(total=params.steps, desc=f"adapter {dataset}", unit="step", disable=None) as bar:
        state = train_adapter(examples, plain, **settings, progress=bar.update)
    with atomic.sealed_file(path) as file:
        save_file(state, file)
    return path


@dataclass(frozen=True)
class MaskShard:
    """Images of a data set; a worker computes their masks."""

    folder: Path  # of the study
    version: str  # ``Study.version``
    dataset: str
    records: tuple[Record, ...]
    adapter: Path | None


def mask_shard(shard: MaskShard) -> int:
    """Write a shard's masks to the cache, in a worker of ``flows.study.runners``."""
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
    """Build a segmenter for one thread, because threads cannot share one."""
    study = study_in(folder)
    return study, models.build_segmenter(study, dataset, adapter)


def _overlaps(records: Sequence[Record], root: Path, masks: PublishedMasks) -> dict[str, list[float]]:
    """Return label -> IoU of each mask with its image's known region, for images with one in root/masks."""
    overlaps: dict[str, list[float]] = {}
    for record in records:
        mask = masks[record.sha256]
        region = known_region(root, record.path, *mask.shape)
        if region is not None:
            overlaps.setdefault(record.label, []).append(iou(mask, region))
    return overlaps


def _write_summary(masks: PublishedMasks, overlaps: dict[str, list[float]], path: Path) -> None:
    lines = masks.summary()
    if overlaps:
        for line in lines:
            values = overlaps.get(str(line["label"]), [])
            line |= {"regions": len(values), "iou": round(float(np.mean(values)), 3) if values else ""}
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


if __name__ == "__main__":
    # Workers import the job's class from this module, which must not be named __main__.
    from flows.stages.masks import main as run

    run()
