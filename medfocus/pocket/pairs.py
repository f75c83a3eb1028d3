"""Pairs of a real image and its mask, on which the pocket SAM2 trains besides phantoms.

A folder of pairs has a table ``pairs.csv`` with the columns image, mask, source, modality, licence_class and
patient. A mask is a label image: 0 for background and a number for each structure or instance.
"""

from __future__ import annotations

import csv
import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from medfocus.masks.candidates import connected

LICENCES = ("open", "attribution")  # the classes of licence to train on
# Sources without such a licence, published as research data sets: free for research with citation.
RESEARCH = ("jsrt", "ddti", "drive", "ecssd", "isbi12")
HELD_OUT = 12  # one patient in so many is held out, to measure the model
_JSRT_LUNGS = (1, 2)  # labels; 3 is the heart, and other masks of the same films show the clavicles
# A source of n images is drawn with the weight n ** _POWER, times that of its modality.
_POWER = 0.6
_WEIGHTS = {"breast ultrasound": 3.0, "chest X-ray": 2.0, "natural photo": 0.5, "microscopy nuclei": 0.5}


@dataclass(frozen=True)
class Pair:
    """An image and its mask."""

    image: Path
    mask: Path
    source: str
    modality: str

    @property
    def interest(self) -> tuple[int, ...] | None:
        """Return the labels of the region of interest: () for all, None if the mask does not show it."""
        if self.source != "jsrt":
            return ()
        return None if self.mask.stem.endswith("c") else _JSRT_LUNGS

    def region(self, labels: np.ndarray) -> np.ndarray | None:
        """Return the region of interest (H, W) bool of labels (H, W); None if the mask does not show it."""
        if self.interest is None:
            return None
        return np.isin(labels, self.interest) if self.interest else labels > 0

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the image (H, W, 3) uint8 and the labels (H, W) uint8."""
        with Image.open(self.image) as image, Image.open(self.mask) as mask:
            labels = np.asarray(mask)
            return np.asarray(image.convert("RGB").resize(labels.shape[::-1])), labels.astype(np.uint8)


@dataclass(frozen=True)
class Pairs:
    """The pairs of a folder that a model may train on, or those held out."""

    folder: Path
    research: bool = True  # whether to take the sources of RESEARCH
    held_out: bool = False

    @cached_property
    def rows(self) -> list[Pair]:
        """Return all pairs, in the order of the table.

        Raises FileNotFoundError if the folder has no table.
        """
        table = self.folder / "pairs.csv"
        if not table.is_file():
            raise FileNotFoundError(
                f"{table} does not exist. Set POCKET_DATA to a folder of pairs; without it, SAM2 trains on "
                "phantoms alone."
            )
        with table.open(newline="") as file:
            return [
                Pair(self.folder / row["image"], self.folder / row["mask"], row["source"], row["modality"])
                for row in csv.DictReader(file)
                if self._is_wanted(row)
            ]

    def _is_wanted(self, row: dict[str, str]) -> bool:
        is_research = row["source"] in RESEARCH
        if row["licence_class"] not in LICENCES and not (self.research and is_research):
            return False
        patient = f"{row['source']} {row['patient'] or row['image']}"
        held_out = int(hashlib.sha256(patient.encode()).hexdigest(), 16) % HELD_OUT == 0
        return held_out == self.held_out

    @cached_property
    def _shares(self) -> tuple[list[list[Pair]], np.ndarray]:
        """Return the pairs by source, and the probability of each source."""
        sources: dict[tuple[str, bool], list[Pair]] = {}
        for row in self.rows:
            sources.setdefault((row.source, row.interest is None), []).append(row)
        weights = [len(rows) ** _POWER * _WEIGHTS.get(rows[0].modality, 1.0) for rows in sources.values()]
        return list(sources.values()), np.array(weights) / sum(weights)

    def draw(self, rng: np.random.Generator) -> Pair:
        """Draw a source, and then one of its pairs."""
        sources, shares = self._shares
        rows = sources[rng.choice(len(sources), p=shares)]
        return rows[rng.integers(len(rows))]


def components(region: np.ndarray, least: int) -> list[np.ndarray]:
    """Return the connected parts (H, W) bool of a region that have ``least`` pixels, the largest first."""
    numbered, count = connected(region)
    sizes = np.bincount(numbered.ravel(), minlength=count + 1)[1:]
    return [numbered == i + 1 for i in np.argsort(-sizes, kind="stable") if sizes[i] >= least]
