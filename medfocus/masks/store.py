"""Cache masks for all studies. The image's sha256 and the segmenter's key name a mask.

Masks of several settings and data sets exist side by side, and no entry is ever out of date.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from medfocus.datasets.records import Record, chunks
from medfocus.images import decode
from medfocus.masks.segmenter import Mask, Segmenter
from medfocus.storage.shards import Shards

_LOOKUP_SIZE = 1000  # images per lookup


class MaskStore:
    """A cache of masks: a folder of shards for each segmenter (see ``medfocus.storage.shards``).

    Many threads and processes may read and write it at once. An entry is a 1-bit PNG, named by its image's
    sha256, with score, status and coverage in its text chunks.
    """

    def __init__(self, url: str | Path) -> None:
        """Use a folder, or any URL that fsspec knows; the first ``put`` creates it."""
        self.url = str(url)
        self._shards: dict[str, Shards] = {}  # by the segmenter's key

    def encoded(self, shas: Iterable[str], segmenter_key: str) -> Iterator[tuple[str, bytes]]:
        """Yield (sha256, PNG bytes) for each image with an undamaged mask in the cache."""
        return self._of(segmenter_key).read(shas)

    def missing(self, records: Iterable[Record], segmenter_key: str) -> Iterator[Record]:
        """Yield the records without a mask in the cache; of identical images, only the first."""
        seen: set[str] = set()
        for chunk in chunks(records, _LOOKUP_SIZE):
            seen |= {sha for sha, _ in self.encoded((record.sha256 for record in chunk), segmenter_key)}
            for record in chunk:
                if record.sha256 not in seen:
                    seen.add(record.sha256)
                    yield record

    def get(self, sha256: str, segmenter_key: str) -> Mask | None:
        """Return one image's mask, or None if it is missing."""
        data = dict(self.encoded([sha256], segmenter_key)).get(sha256)
        return None if data is None else decode_mask(data)

    def put(self, masks: Mapping[str, Mask], segmenter_key: str) -> None:
        """Store masks by their image's sha256; a later ``put`` or ``close`` writes them to disk."""
        self._of(segmenter_key).put((sha, encode_mask(mask)) for sha, mask in masks.items())

    def close(self) -> None:
        """Write everything to disk."""
        for shards in self._shards.values():
            shards.close()

    def _of(self, segmenter_key: str) -> Shards:
        if segmenter_key not in self._shards:
            name = hashlib.sha256(segmenter_key.encode()).hexdigest()[:32]
            self._shards[segmenter_key] = Shards(f"{self.url}/{name}", suffix=".png")
        return self._shards[segmenter_key]


class MaskFacts(NamedTuple):
    """The text chunks of an encoded mask."""

    status: str
    score: str
    coverage: str


def encode_mask(mask: Mask) -> bytes:
    """Encode a mask as a 1-bit PNG with its ``MaskFacts`` in text chunks.

    Score and coverage have few decimals, because their last digits differ between CPUs but the bytes of a
    mask must not.
    """
    text = PngInfo()
    facts = MaskFacts(mask.status, f"{mask.score:.3f}", f"{mask.coverage:.4f}")
    for name, value in facts._asdict().items():
        text.add_text(name, value)
    file = io.BytesIO()
    Image.fromarray(mask.region).save(file, "PNG", pnginfo=text, compress_level=6)
    return file.getvalue()


def decode_mask(data: bytes) -> Mask:
    """Decode a mask that ``encode_mask`` encoded."""
    with decode.read_header(data, "mask", ("PNG",)) as image:
        return Mask(np.array(image), float(image.info["score"]), image.info["status"])


def read_facts(data: bytes) -> MaskFacts:
    """Read the text chunks of an encoded mask without decoding its pixels."""
    with decode.read_header(data, "mask", ("PNG",)) as image:
        return MaskFacts(*(image.info[name] for name in MaskFacts._fields))


@dataclass(frozen=True)
class Cached:
    """The counts of a run of ``cache_masks``."""

    computed: int  # images that the segmenter segmented
    reused: int  # images with a cached mask, and copies of the same bytes


def cache_masks(
    images: Iterable[tuple[Record, Path]],
    segmenter: Segmenter,
    store: MaskStore,
    *,
    batch_size: int,
    workers: int = 2,
    progress: Callable[[int], object] = lambda images: None,
) -> Cached:
    """Compute the masks that the store lacks.

    ``workers`` threads read and decode at most two batches ahead while the segmenter runs, so that memory
    does not grow with the number of images. The segmenter always gets ``batch_size`` images (its own batch
    size, or a multiple), so that a mask does not depend on the other missing masks. ``progress`` receives
    the number of images finished since its last call, as ``tqdm.update`` does.

    Raises:
        ValueError: An image cannot be decoded, or differs from its record. Masks finished before it stay in
            the store.
    """
    computed = reused = 0
    waiting: deque[tuple[Record, Future[np.ndarray]]] = deque()
    in_work: set[str] = set()  # sha256 of the images in ``waiting``

    def run_batch() -> int:
        batch = [waiting.popleft() for _ in range(min(batch_size, len(waiting)))]
        decoded = [image.result() for _, image in batch]
        # Fill up a short batch, because the last bits of a network's output can depend on the batch size.
        filled = decoded + decoded[-1:] * (batch_size - len(decoded))
        masks = segmenter.segment(filled)[: len(decoded)]
        for (record, _), image, mask in zip(batch, decoded, masks, strict=True):
            if mask.region.shape != image.shape[:2]:
                raise ValueError(
                    f"{record.path}: the segmenter returned a mask of {mask.region.shape} for an image of "
                    f"{image.shape[:2]}. Make segment() keep the image's size."
                )
        keys = [record.sha256 for record, _ in batch]
        store.put(dict(zip(keys, masks, strict=True)), segmenter.key)
        in_work.difference_update(keys)
        progress(len(batch))
        return len(batch)

    with ThreadPoolExecutor(workers) as pool, contextlib.closing(store):
        for chunk in chunks(images, _LOOKUP_SIZE):
            known = {sha for sha, _ in store.encoded((record.sha256 for record, _ in chunk), segmenter.key)}
            for record, path in chunk:
                if record.sha256 in in_work or record.sha256 in known:
                    reused += 1
                    progress(1)
                    continue
                in_work.add(record.sha256)
                known.add(record.sha256)
                waiting.append((record, pool.submit(_read_as_recorded, record, path)))
                if len(waiting) >= 2 * batch_size:
                    computed += run_batch()
        while waiting:
            computed += run_batch()
    return Cached(computed, reused)


def _read_as_recorded(record: Record, path: Path) -> np.ndarray:
    """Read the image (H, W, 3) uint8 of a record and check its sha256."""
    sha256, image = decode.read_named(path)
    if sha256 != record.sha256:
        raise ValueError(f"{path}: its bytes differ from the manifest's sha256. Run ingest again.")
    return image
