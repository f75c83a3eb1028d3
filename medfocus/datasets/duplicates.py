"""Find duplicate images: identical, re-encoded, mirrored and rotated copies, and neighbouring frames.

Images are compared by grey thumbnails of 64 px without their coarse structure. Chest radiographs of two
people share the coarse structure (a correlation of 0.95 is common); copies of one radiograph share the fine
structure too. Two thumbnails are compared in all eight flips and rotations.

The thresholds are measured. For radiographs of different people the fine correlation stays below 0.61 (five
data sets, 1.06 million pairs, eight orientations each). It is above 0.9 for 95 of 100
copies that are saved as JPEG of quality 10, reduced to 100 px, sharpened, given another gamma (0.5 to 2), or
marked with arrows and callipers.
Neighbouring ultrasound frames and neighbouring MRI or CT slices of a patient lie between 0.7 and 0.8. A crop
or shift of more than 1 % of the side, or a rotation by a few degrees, is not detected.
"""

from __future__ import annotations

import csv
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from itertools import combinations
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.fft import dctn
from scipy.ndimage import gaussian_filter
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from tqdm import tqdm

from medfocus.datasets.records import Record
from medfocus.images import decode
from medfocus.storage.fingerprint import fingerprint
from medfocus.storage.shards import Shards
from medfocus.storage.tables import write_csv

SAME = 0.8  # fine correlation from which two images are copies
NEAR = 0.7  # correlation from which two images are at least neighbouring frames of one patient
HASH_BITS = 6  # most bits of 63 that may differ if only the coarse correlation is high
NEAR_KIND = "near"

_FINE, _COARSE = 64, 32  # pixels per side
_CANDIDATE = 0.5  # coarse correlation; on real data it exceeds 0.7 if the fine correlation does
_BLANK = 0.5  # grey levels; texture with a smaller deviation is noise and matches no other image
_BLOCK = 1024  # images or pairs per block

# Kind of pair -> operation that turns image b into image a. Arrays (N, h, w).
_TURNS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "re-encoded": lambda a: a,
    "mirrored": lambda a: a[:, :, ::-1],
    "flipped": lambda a: a[:, ::-1],
    "turned-180": lambda a: a[:, ::-1, ::-1],
    "turned-90": lambda a: np.rot90(a, 1, (1, 2)),
    "turned-270": lambda a: np.rot90(a, 3, (1, 2)),
    "transposed": lambda a: a.transpose(0, 2, 1),
    "transversed": lambda a: np.rot90(a, 2, (1, 2)).transpose(0, 2, 1),
}


@dataclass(frozen=True)
class Pair:
    """Two images that are copies or neighbouring frames."""

    path_a: str
    path_b: str
    kind: str  # "identical" bytes; "re-encoded", "mirrored", "flipped", "turned-90", ...; "near"
    similarity: float  # correlation of the thumbnails, up to 1
    split_a: str
    split_b: str
    label_a: str
    label_b: str


def find_duplicates(
    records: Sequence[Record],
    root: Path,
    *,
    workers: int | None = None,
    progress: bool = False,
    cache: str | Path | None = None,
) -> list[Pair]:
    """Return all pairs of copies and of neighbouring frames, sorted by path.

    ``kind`` names the operation that turns ``path_b`` into ``path_a``; angles are anticlockwise. "re-encoded"
    covers every change that keeps the geometry. ``cache``, a folder or fsspec URL, keeps the thumbnails, so
    that known images are not opened. Raises FileNotFoundError or ValueError for an unreadable file.
    """
    records = sorted(records, key=lambda record: record.path)
    pairs = {pair: ("identical", 1.0) for pair in _same_bytes(records)}
    known = None if cache is None else Shards(f"{cache}/{fingerprint(_thumbnails)[:32]}", ".thumbnail")
    thumbnails = _thumbnails(records, root, workers, progress, known)
    for i, j, kind, similarity in match(thumbnails):
        pairs.setdefault((i, j), (kind, similarity))
    return [_pair(records[i], records[j], *pairs[i, j]) for i, j in sorted(pairs)]


def match(thumbnails: np.ndarray) -> list[tuple[int, int, str, float]]:
    """Return the similar pairs of thumbnails (N, 64, 64) uint8 grey as (i, j, kind, similarity), i < j.

    ``kind`` and ``similarity`` are those of the best of eight orientations.
    """
    fine = _textures(thumbnails.astype(np.float32), sigma=1.5)  # (N, 64, 64)
    halved = thumbnails.reshape(-1, _COARSE, 2, _COARSE, 2).mean((2, 4), dtype=np.float32)  # (N, 32, 32)
    coarse = _textures(halved, sigma=1.0)  # (N, 32, 32)
    bits = _hashes(halved)  # (N, 63)
    best: dict[tuple[int, int], tuple[bool, float, str]] = {}
    for kind, turn in _TURNS.items():
        turned_bits = _hashes(turn(halved))
        for i, j, rough in _candidates(coarse, turn(coarse)):
            exact = np.einsum("nhw,nhw->n", fine[i], turn(fine[j]))
            few_bits = (bits[i] != turned_bits[j]).sum(1) <= HASH_BITS
            # Blur, noise and tiny sizes remove fine structure. Then coarse structure and hash must agree.
            kept = np.flatnonzero((exact >= NEAR) | ((rough >= NEAR) & few_bits))
            for k in kept:
                similarity = float(exact[k] if exact[k] >= NEAR else rough[k])
                entry = (bool(exact[k] >= SAME), similarity, kind if exact[k] >= SAME else NEAR_KIND)
                pair = (int(i[k]), int(j[k]))
                best[pair] = max(best.get(pair, entry), entry)
    return [(i, j, kind, min(similarity, 1.0)) for (i, j), (_, similarity, kind) in sorted(best.items())]


def twins(pairs: Iterable[Pair]) -> list[Pair]:
    """Return the pairs of copies, without neighbouring frames."""
    return [pair for pair in pairs if pair.kind != NEAR_KIND]


def groups(records: Iterable[Record], pairs: Iterable[Pair]) -> dict[str, int]:
    """Return path -> connected component of pairs, numbered in the order of the first paths."""
    paths = sorted(record.path for record in records)
    index = {path: i for i, path in enumerate(paths)}
    edges = np.array([(index[p.path_a], index[p.path_b]) for p in pairs], dtype=np.int64).reshape(-1, 2)
    graph = coo_array((np.ones(len(edges)), (edges[:, 0], edges[:, 1])), shape=(len(paths), len(paths)))
    _, labels = connected_components(graph, directed=False)
    number: dict[int, int] = {}
    return {
        path: number.setdefault(int(label), len(number)) for path, label in zip(paths, labels, strict=True)
    }


def write_pairs(pairs: Iterable[Pair], path: Path) -> None:
    """Write pairs as CSV, one line per pair, with three decimals of the similarity."""
    rows = ({**asdict(pair), "similarity": f"{pair.similarity:.3f}"}.values() for pair in pairs)
    write_csv(path, [field.name for field in fields(Pair)], rows)


def read_pairs(path: Path) -> list[Pair]:
    """Read pairs that ``write_pairs`` wrote."""
    with path.open(newline="", encoding="utf-8") as file:
        return [Pair(**{**row, "similarity": float(row["similarity"])}) for row in csv.DictReader(file)]


def _pair(a: Record, b: Record, kind: str, similarity: float) -> Pair:
    return Pair(a.path, b.path, kind, similarity, a.split, b.split, a.label, b.label)


def _same_bytes(records: Sequence[Record]) -> Iterator[tuple[int, int]]:
    places: dict[str, list[int]] = defaultdict(list)
    for i, record in enumerate(records):
        places[record.sha256].append(i)
    for same in places.values():
        yield from combinations(same, 2)


def _thumbnails(
    records: Sequence[Record], root: Path, workers: int | None, progress: bool, known: Shards | None
) -> np.ndarray:
    """Return grey thumbnails (N, 64, 64) uint8, scaled to squares."""

    def thumbnail(record: Record) -> np.ndarray:
        grey = Image.fromarray(decode.read(root / record.path)).convert("L")
        return np.asarray(grey.resize((_FINE, _FINE), Image.Resampling.BOX))

    thumbnails = np.zeros((len(records), _FINE, _FINE), dtype=np.uint8)
    places: dict[str, list[int]] = defaultdict(list)
    for place, record in enumerate(records):
        places[record.sha256].append(place)
    for sha256, content in known.read(places) if known is not None else ():
        thumbnails[places.pop(sha256)] = np.frombuffer(content, dtype=np.uint8).reshape(_FINE, _FINE)
    new = [places_of[0] for places_of in places.values()]
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        images = pool.map(thumbnail, [records[place] for place in new])
        images = tqdm(images, "thumbnails", len(new), disable=not progress)
        for (sha256, places_of), image in zip(places.items(), images, strict=True):
            thumbnails[places_of] = image
            if known is not None:
                known.put([(sha256, image.tobytes())])
    if known is not None:
        known.close()
    return thumbnails


def _textures(thumbnails: np.ndarray, sigma: float) -> np.ndarray:
    """Return the structure finer than ``sigma`` pixels, (N, n, n) float32 of unit norm; 0 if blank."""
    textures = np.empty_like(thumbnails)
    for start in range(0, len(thumbnails), _BLOCK):
        block = thumbnails[start : start + _BLOCK]
        fine = block - gaussian_filter(block, (0, sigma, sigma))
        spread = fine.std((1, 2), keepdims=True)
        # Without clipping, a label box or a bright border would outweigh the anatomy.
        fine = np.clip(fine, -1.5 * spread, 1.5 * spread)
        fine -= fine.mean((1, 2), keepdims=True)
        norm = np.linalg.norm(fine, axis=(1, 2), keepdims=True)
        textures[start : start + _BLOCK] = np.where(spread < _BLANK, 0, fine / np.maximum(norm, 1e-6))
    return textures


def _hashes(thumbnails: np.ndarray) -> np.ndarray:
    """Return the pHash (N, 63) bool of (N, 32, 32) float32: whether each low frequency exceeds the median."""
    lowest = np.asarray(dctn(thumbnails, axes=(1, 2)))[:, :8, :8].reshape(-1, 64)[:, 1:]
    return lowest > np.median(lowest, axis=1, keepdims=True)


def _candidates(a: np.ndarray, b: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield blocks of pairs i < j with a correlation above ``_CANDIDATE``: (i, j, correlation), each (P,)."""
    a, b = a.reshape(-1, _COARSE**2), b.reshape(-1, _COARSE**2)  # (N, 1024)
    for start in range(0, len(a), _BLOCK):
        correlation = a[start : start + _BLOCK] @ b[start:].T  # (B, 1024) @ (1024, N - start)
        i, j = np.nonzero(np.triu(correlation > _CANDIDATE, 1))
        for first in range(0, len(i), _BLOCK):
            block = slice(first, first + _BLOCK)
            yield i[block] + start, j[block] + start, correlation[i[block], j[block]]
