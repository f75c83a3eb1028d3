"""The data sheet of a data set, in Markdown, after Gebru et al., arXiv 1803.09010.

The sheet is public, so it contains counts of images and patients, and no name. It contains no time, so the
same data give the same bytes.
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

SHEET = "datasheet.md"  # file name of the sheet among the files of a version and of its run


@dataclass(frozen=True)
class DatasetFacts:
    """The facts about a data set that the pipeline knows."""

    name: str
    modality: str
    licence: str  # "" if it is not stated
    records: Sequence[Record]
    splits: Splits
    pairs: Sequence[Pair]  # of duplicates
    left_out: Sequence[str]  # kinds of the faults of files that ingestion left out, one per fault
    reported: Sequence[str]  # likewise for files that ingestion kept
    statuses: Mapping[str, str]  # path -> rung of the fallback ladder that made the mask
    coverage: Mapping[str, float]  # path -> share of the image inside its mask
    mask_lines: Sequence[Mapping[str, object]]  # of masks.csv
    segmenter: str  # description of the segmenter
    drift: Sequence[Check]  # of new images against the champion's; empty if there are no new images
    new: int | None  # images added since the champion was made; None if there is no champion
    provenance: Mapping[str, str]  # commit, digests, seeds

    @property
    def split_sentence(self) -> str:
        """A sentence on the origin of the test set."""
        if any(record.split == "test" for record in self.records):
            return "The test set is the official one."
        return "There is no official test set. One was drawn; no patient and no duplicate is in both parts."

    @property
    def patients_sentence(self) -> str:
        """A sentence on the number of known patients."""
        known = [record.patient for record in self.records if record.patient]
        if not known:
            return "Patients: none is known."
        return f"Patients: {len(set(known))} are known, for {len(known)} of {len(self.records)} images."

    @property
    def warnings(self) -> list[str]:
        """Warnings about the data and its masks."""
        return [*data_warnings(self.records, self.splits, self.pairs), *mask_warnings(self.mask_lines)]

    def count(self, paths: Sequence[str], label: str) -> int:
        """Count the images among ``paths`` with a label."""
        labels = {record.path: record.label for record in self.records}
        return sum(labels[path] == label for path in paths)


def data_sheet(data: DatasetFacts) -> str:
    """Write the data sheet in Markdown."""
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
        "## Composition",
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
        "## Faults at ingestion",
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
        f"Segmenter: {data.segmenter}, without labels. Mean coverage and rungs of the fallback ladder:",
        "",
        *_masks(data.mask_lines),
        "",
        "## Drift",
        "",
        *_drift(data),
        "",
        "## Licence and collection",
        "",
        f"Licence: {data.licence or 'not stated'}. The pipeline does not know who collected and labelled the "
        "images, how, and with whose consent. Ask their source.",
        "",
        "## Reproduction",
        "",
        *table(("", ""), data.provenance.items()),
        "",
        "Check out the commit, put the images into the folder that `params.yaml` names, and run `make run`. "
        "Or run `dvc pull`, then `dvc repro`, which does nothing if `dvc.lock` has this digest.",
        "",
        "## Warnings",
        "",
        *(f"- {warning}" for warning in data.warnings or ["none"]),
    ]
    return "\n".join(lines) + "\n"


def _duplicates(data: DatasetFacts) -> list[str]:
    test = set(data.splits.test)
    across = Counter(pair.kind for pair in data.pairs if (pair.path_a in test) != (pair.path_b in test))
    rows = [(kind, n, across[kind]) for kind, n in sorted(Counter(p.kind for p in data.pairs).items())]
    if not rows:
        return ["No pair was found."]
    return table(("kind of pair", "pairs", "across train and test"), rows)


def _masks(lines: Sequence[Mapping[str, object]]) -> list[str]:
    names = [name for name in lines[0] if lines[0][name] not in ("", None)] if lines else []
    return table(names, [[_cell(line[name]) for name in names] for line in lines])


def _cell(value: object) -> str:
    text = str(value)
    return f"{float(text):.3f}" if re.fullmatch(r"-?\d+\.\d+(e-?\d+)?", text) else text


def _drift(data: DatasetFacts) -> list[str]:
    if data.new is None:
        return ["There was no champion to compare the images with."]
    checks = ["", *checks_table(data.drift)] if data.drift else []
    return [f"{data.new} images were added since the present champion was made.", *checks]


def _kinds(severity: str, kinds: Sequence[str]) -> list[str]:
    if not kinds:
        return [f"- {severity}: nothing"]
    return [f"- {severity}: {n}, {kind}" for kind, n in sorted(Counter(kinds).items())]


def _format(path: str) -> str:
    """Return a path's suffix if ingestion knows it. Any other suffix may be part of a name."""
    suffix = PurePosixPath(path).suffix.lower()
    return suffix.removeprefix(".") if suffix in SUFFIXES else "other"
