"""The data sheet of a data set, in Markdown, after Gebru et al., arXiv 1803.09010.

The sheet is public, so it contains counts of images and patients, and no name. It contains no time, so the
same data give the same bytes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from medfocus.datasets.duplicates import Pair
from medfocus.datasets.listing import SUFFIXES
from medfocus.datasets.records import Record
from medfocus.datasets.splits import Splits
from medfocus.evaluation.gate import Check
from medfocus.reports.data_warnings import data_warnings, mask_warnings
from medfocus.reports.markdown import checks_table, counted, table

SHEET = "datasheet.md"  # file name of the sheet, with a version and with its run
# How ingestion's faults begin or go on -> what they are counted as. Their own texts may name files.
_KINDS = (
    (r"another label", "the same bytes under two labels"),
    (r"seen in training", "test image with the same bytes in train"),
    (r"times, with different", "listed several times, with different labels, splits or patients"),
    (r"^the file is empty", "empty file"),
    (r"^is no image in a format", "no image in a format that is read"),
    (r"^is by its name no image", "by its name no image"),
    (r"^cannot be decoded", "cannot be decoded"),
    (r"^cannot be read", "cannot be read"),
    (r"^the file is larger", "larger file than is read"),
    (r"^has .+ pixels", "more pixels than are decoded"),
    (r"^is no ordinary file", "no ordinary file"),
    (r"^holds values that are not finite", "values that are not finite"),
    (r"^holds several images|^holds \d+ (images|volumes), of which", "several images in one file"),
    (r"^holds no image", "DICOM without an image"),
    (r"^is stored as", "stored in a way that cannot be decoded"),
    (r"^promises ", "fewer pixels than are promised"),
    (r"of one shade", "slices of one shade"),
    (r"^has text burnt", "text burnt into the pixels, as the header says"),
    (r"have no window", "DICOM images without a window"),
    (r"without a known patient", "files of several images without a known patient"),
    (r"^is listed by itself", "slice listed twice, with different labels, splits or patients"),
    (r"^holds \d+ images beside", "folder beside the split folders"),
    (r"^lies in no class folder", "in no class folder"),
    (r"^the label is empty", "no label"),
    (r"^no such file|^leads out of", "path in the manifest without a file"),
    (r"^the split ", "unknown split"),
    (r"finds no patient", "no patient by the pattern"),
    (r"^the class has no test image", "class without a test image"),
)


@dataclass(frozen=True)
class DatasetFacts:
    """The facts about a data set that the pipeline knows."""

    name: str
    modality: str
    licence: str  # "" if it is not stated
    records: Sequence[Record]
    splits: Splits
    pairs: Sequence[Pair]  # of duplicates
    left_out: Sequence[str]  # ingestion's faults, by their texts
    reported: Sequence[str]
    statuses: Mapping[str, str]  # path -> rung of the fallback ladder that made the mask
    coverage: Mapping[str, float]  # path -> share of the image inside its mask
    mask_lines: Sequence[Mapping[str, object]]  # of masks.csv
    segmenter: str  # description of the segmenter
    drift: Sequence[Check]  # of new images against the champion's; empty if there are none
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


def fault_kinds(faults: Iterable[str]) -> Counter[str]:
    """Ingestion's faults, whose texts may name files, counted by kinds, whose names do not."""
    kinds = (
        next((kind for pattern, kind in _KINDS if re.search(pattern, fault)), "of another kind")
        for fault in faults
    )
    return Counter(kinds)


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


def _kinds(what: str, faults: Sequence[str]) -> list[str]:
    if not faults:
        return [f"- {what}: nothing"]
    return [f"- {what}: {n}, {kind}" for kind, n in sorted(fault_kinds(faults).items())]


def _format(path: str) -> str:
    """Return a path's suffix if ingestion knows it. Any other suffix may be part of a name."""
    suffix = PurePosixPath(path).suffix.lower()
    return suffix.removeprefix(".") if suffix in SUFFIXES else "other"
