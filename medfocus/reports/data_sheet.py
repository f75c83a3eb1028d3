"""The data sheet of a data set, in Markdown, after Gebru et al., arXiv 1803.09010.

Others may read the sheet, so it counts images and patients and names none. It contains no time: the same data
give the same bytes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from medfocus.datasets.duplicates import Pair
from medfocus.datasets.listing import SUFFIXES
from medfocus.datasets.records import Record
from medfocus.datasets.splits import Splits
from medfocus.evaluation.gate import Check
from medfocus.reports.data_warnings import data_warnings, mask_warnings
from medfocus.reports.markdown import checks_table, counted, table

SHEET = "datasheet.md"  # the sheet's name as a file of a version and of its run


@dataclass(frozen=True)
class DatasetFacts:
    """A data set as the pipeline sees it."""

    name: str
    modality: str
    licence: str  # "" where nobody has stated it
    records: Sequence[Record]
    splits: Splits
    pairs: Sequence[Pair]  # of duplicates
    left_out: Sequence[str]  # the kinds of ingestion's faults, one per fault
    reported: Sequence[str]
    statuses: Mapping[str, str]  # path -> the rung of the fallback ladder that its mask comes from
    coverage: Mapping[str, float]  # path -> share of the image inside its mask
    mask_lines: Sequence[Mapping[str, object]]  # of masks.csv
    segmenter: str  # what made the masks, in words
    drift: Sequence[Check]  # of new images against the champion's; none where nothing was compared
    new: int | None  # images that came since the champion was made
    made: Mapping[str, str]  # commit, digests, versions: how to make it again

    @property
    def split_sentence(self) -> str:
        """Where the test set comes from."""
        if any(record.split == "test" for record in self.records):
            return "The test set is the official one."
        return "There is no official test set; one was drawn, without patients or duplicates in both parts."

    @property
    def patients_sentence(self) -> str:
        """How many patients are known."""
        known = [record.patient for record in self.records if record.patient]
        if not known:
            return "Patients: none is known."
        return f"Patients: {len(set(known))} are known, for {len(known)} of {len(self.records)} images."

    @property
    def warnings(self) -> list[str]:
        """Warnings about the data and its masks."""
        return [*data_warnings(self.records, self.splits, self.pairs), *mask_warnings(self.mask_lines)]

    def count(self, paths: Sequence[str], label: str) -> int:
        """Return how many of the images ``paths`` have a label."""
        labels = {record.path: record.label for record in self.records}
        return sum(labels[path] == label for path in paths)


def data_sheet(data: DatasetFacts) -> str:
    """The data sheet in Markdown."""
    records = data.records
    sides = {"train": data.splits.train, "test": data.splits.test, "clean test": data.splits.clean_test}
    used = {path for side in sides.values() for path in side}
    columns = [*sides, *(["not used"] if len(used) < len(records) else [])]
    rows = [
        (
            label,
            *(data.count(side, label) for side in sides.values()),
            *(
                [sum(r.label == label and r.path not in used for r in records)]
                if "not used" in columns
                else []
            ),
        )
        for label in data.splits.classes
    ]
    sizes = Counter((record.width, record.height) for record in records)
    sides_px = [side for size in sizes for side in size]
    formats = Counter(_format(record.path) for record in records)
    modes = Counter(record.mode for record in records)
    lines = [
        f"# Data sheet: {data.name}",
        "",
        "## What it consists of",
        "",
        f"{len(records)} {data.modality} images in {len(data.splits.classes)} classes. {data.split_sentence}",
        "",
        *table(("class", *columns), rows),
        "",
        f"Sizes: {len(sizes)}, sides of {min(sides_px)} to {max(sides_px)} pixels. Modes: {counted(modes)}. "
        f"Files: {counted(formats)}.",
        "",
        data.patients_sentence,
        "",
        "## What was left out or reported at ingestion",
        "",
        *_kinds("left out", data.left_out),
        *_kinds("kept, but reported", data.reported),
        "",
        "## Duplicates",
        "",
        *_duplicates(data),
        "",
        "## Masks",
        "",
        f"Made by {data.segmenter}, without labels. Mean coverage and the rungs of the fallback ladder:",
        "",
        *_masks(data.mask_lines),
        "",
        "## Drift",
        "",
        *_drift(data),
        "",
        "## Licence and collection",
        "",
        f"Licence: {data.licence or 'not stated'}. Who collected the images, how, with whose consent, and "
        "who labelled them is not known to this pipeline: ask their source.",
        "",
        "## How to make it again",
        "",
        *table(("", ""), data.made.items()),
        "",
        "Check out the commit, put the images where `params.yaml` says, and run `make run`; or `dvc pull`, "
        "then `dvc repro`, which has nothing to do where `dvc.lock` has this digest.",
        "",
        "## Warnings",
        "",
        *(f"- {said}" for said in data.warnings or ["None of those that are looked for."]),
    ]
    return "\n".join(lines) + "\n"


def _duplicates(data: DatasetFacts) -> list[str]:
    test = set(data.splits.test)
    across = Counter(pair.kind for pair in data.pairs if (pair.path_a in test) != (pair.path_b in test))
    rows = [(kind, n, across[kind]) for kind, n in sorted(Counter(p.kind for p in data.pairs).items())]
    if not rows:
        return ["No pair was found."]
    return table(("kind of pair", "pairs", "of them across train and test"), rows)


def _masks(lines: Sequence[Mapping[str, object]]) -> list[str]:
    names = [name for name in lines[0] if lines[0][name] not in ("", None)] if lines else []
    return table(names, [[_cell(line[name]) for name in names] for line in lines])


def _cell(value: object) -> str:
    text = str(value)
    return f"{float(text):.3f}" if re.fullmatch(r"-?\d+\.\d+(e-?\d+)?", text) else text


def _drift(data: DatasetFacts) -> list[str]:
    if data.new is None:
        return ["There was no champion yet that the images could be compared with."]
    told = [f"{data.new} images came since the present champion was made."]
    return [*told, *(["", *checks_table(data.drift)] if data.drift else [])]


def _kinds(severity: str, kinds: Sequence[str]) -> list[str]:
    if not kinds:
        return [f"- {severity}: nothing"]
    return [f"- {severity}: {n}, {kind}" for kind, n in sorted(Counter(kinds).items())]


def _format(path: str) -> str:
    """The suffix of a file's name, where it is one that ingestion knows; any other may be part of a name."""
    suffix = PurePosixPath(path).suffix.lower()
    return suffix.removeprefix(".") if suffix in SUFFIXES else "other"
