"""The training images of the pocket models: phantoms, drawn once and read in random order.

A shard holds ``SHARD`` images. Its ``NNN.npy``, (SHARD, 2, S, S) uint8, has the image in plane 0 and region r
of the image in bit r of plane 1. Its ``NNN.json`` has the facts of the images. Seed and number alone
determine an image, so that an interrupted pool resumes and a larger pool begins with the same images.
"""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import numpy as np
from tqdm import tqdm

from medfocus import phantoms
from medfocus.storage import atomic

SHARD = 500  # images
TRAIN_SEED, HELD_OUT_SEED = 1_000_000, 2_000_000  # of phantoms.generator; data sets use small seeds
MOST_REGIONS = 4  # the lesion first, then the anatomy


@dataclass(frozen=True)
class Recipe:
    """The composition of a model's pool."""

    count: int  # images
    size: int  # pixels a side as drawn; the model's views are crops
    weights: Mapping[str, tuple[int, ...]]  # modality -> images of each class in a turn of all classes


# Faint lesions of chest and brain are the hardest, so they have the most images. CLIP's images are larger,
# because CLIP also sees crops of less than half of an image's side.
RECIPES = {
    "sam2": Recipe(
        8_000, 192, {"chest_xray": (1, 2, 2, 2), "brain_mri": (1, 2, 2, 2), "breast_ultrasound": (1, 1, 1)}
    ),
    "clip": Recipe(
        12_000, 192, {"chest_xray": (1, 2, 2, 2), "brain_mri": (1, 2, 2, 2), "breast_ultrasound": (2, 2, 2)}
    ),
}


@dataclass(frozen=True)
class Facts:
    """The facts of an image."""

    modality: str
    label: str
    findings: dict[str, str]
    regions: tuple[str, ...]  # names by bit; the first is always "lesion"


@dataclass(frozen=True, eq=False)
class Drawn:
    """One image of the pool."""

    image: np.ndarray  # (S, S) uint8
    regions: np.ndarray  # (R, S, S) bool, in the order of ``facts.regions``
    facts: Facts


class Pool:
    """A pool on disk."""

    def __init__(self, folder: Path, count: int) -> None:
        """Open the first ``count`` images of a pool that ``draw_pool`` made."""
        self.folder, self.count = folder, count

    @property
    def name(self) -> str:
        """Return the description of the images, for a model card."""
        return (
            f"phantoms, generator seed {TRAIN_SEED + int(self.folder.name.partition('-')[0])}, name 'pocket'"
        )

    def __len__(self) -> int:
        return self.count

    @property
    def shards(self) -> list[range]:
        """The numbers of the images in each shard."""
        return [range(n, min(n + SHARD, self.count)) for n in range(0, self.count, SHARD)]

    def __getitem__(self, number: int) -> Drawn:
        """Read image ``number``."""
        planes, facts = _shard(self.folder, number // SHARD)
        image, bits = planes[number % SHARD]
        image_facts = facts[number % SHARD]
        masks = np.uint8(1) << np.arange(len(image_facts.regions), dtype=np.uint8)
        return Drawn(image, (bits & masks[:, None, None]).astype(bool), image_facts)

    def order(self, seed: int, number: int) -> int:
        """Return the number of the image at a training's step ``number``; each epoch has its own order."""
        return int(_permutation(seed, number // self.count, self.count)[number % self.count])


@cache
def _shard(folder: Path, index: int) -> tuple[np.ndarray, list[Facts]]:
    facts = json.loads((folder / f"{index:03d}.json").read_text())
    return np.load(folder / f"{index:03d}.npy", mmap_mode="r", allow_pickle=False), [
        Facts(f["modality"], f["label"], f["findings"], tuple(f["regions"])) for f in facts
    ]


@cache
def _permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


def classes(recipe: Recipe) -> list[tuple[str, str]]:
    """List modality and label of the images of one turn of a recipe."""
    turn = []
    for modality, labels in phantoms.MODALITIES.items():
        for label, weight in zip(labels, recipe.weights[modality], strict=True):
            turn += [(modality, label)] * weight
    return turn


def drawn(phantom: phantoms.Phantom) -> Drawn:
    """Convert a phantom; keep the lesion and the first parts of the anatomy, at most ``MOST_REGIONS``."""
    names = ("lesion", *phantom.parts)[:MOST_REGIONS]
    regions = np.stack([phantom.region, *phantom.parts.values()][:MOST_REGIONS])
    return Drawn(phantom.image, regions, Facts(phantom.modality, phantom.label, phantom.findings, names))


def draw_one(recipe: Recipe, seed: int, number: int) -> Drawn:
    """Draw image ``number`` of the pool of a seed."""
    turn = classes(recipe)
    modality, label = turn[number % len(turn)]
    rng = phantoms.generator(TRAIN_SEED + seed, modality, "pocket", label, number)
    return drawn(phantoms.draw(modality, label, rng, recipe.size))


def held_out(modality: str, label: str, index: int, size: int = 192) -> phantoms.Phantom:
    """Draw image ``index`` of a class, from a seed that no training and no data set uses."""
    return phantoms.draw(
        modality, label, phantoms.generator(HELD_OUT_SEED, modality, "held-out", label, index), size
    )


def draw_pool(folder: Path, model: str, seed: int, count: int, processes: int) -> Pool:
    """Draw the missing shards of a model's first ``count`` images; ``model`` is a key of RECIPES."""
    folder = folder / f"{seed}-{model}"
    folder.mkdir(parents=True, exist_ok=True)
    shards = -(-count // SHARD)
    missing = [i for i in range(shards) if not (folder / f"{i:03d}.json").is_file()]
    if missing:
        with (
            multiprocessing.get_context("spawn").Pool(processes) as workers,
            tqdm(
                total=shards, initial=shards - len(missing), desc=f"phantoms for {model}", unit="shard"
            ) as bar,
        ):
            tasks = [(folder, RECIPES[model], seed, i) for i in missing]
            for _ in workers.imap_unordered(_draw_shard, tasks):
                bar.update()
    return Pool(folder, count)


def _draw_shard(task: tuple[Path, Recipe, int, int]) -> None:
    folder, recipe, seed, index = task
    rows = [draw_one(recipe, seed, number) for number in range(index * SHARD, (index + 1) * SHARD)]
    planes = np.empty((SHARD, 2, recipe.size, recipe.size), np.uint8)
    for plane, row in zip(planes, rows, strict=True):
        plane[0] = row.image
        plane[1] = np.bitwise_or.reduce(
            [region.astype(np.uint8) << r for r, region in enumerate(row.regions)]
        )
    with atomic.new_file(folder / f"{index:03d}.npy") as file, file.open("wb") as stream:
        np.save(stream, planes)  # with a path, np.save would add a suffix
    facts = json.dumps([asdict(row.facts) for row in rows])
    atomic.write(folder / f"{index:03d}.json", facts)  # last, because it marks the shard as complete
