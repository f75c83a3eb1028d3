"""The description of a data set for ``medfocus init``, by the same code as in the pipeline."""

from __future__ import annotations

import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from flows.cli.init.columns import propose
from flows.cli.init.modality import Guess, by_headers, guess, look_at
from medfocus.datasets import pseudonyms
from medfocus.datasets.duplicates import Pair, find_duplicates, groups, twins
from medfocus.datasets.ingest import Ingested, ingest
from medfocus.datasets.listing import unwrapped
from medfocus.datasets.records import Record, spread_over_classes
from medfocus.datasets.splits import Splits, draw_splits
from medfocus.images import decode
from medfocus.reports.data_warnings import data_warnings
from medfocus.storage import tables

GIVEN = "given by --modality"  # the reason for a modality that is not a guess
_PERCENTS = (5, 10, 20, 50, 100)
_GLANCED = 16  # images for the guess of the modality
_FAULTS = 10  # faults to print
_KNOWN_WORDS = {
    "notumor": "no tumor",
    "nofinding": "no finding",
    "nofindings": "no findings",
    "tb": "tuberculosis",
    "covid": "COVID-19",
    "covid19": "COVID-19",
}


@dataclass(frozen=True)
class Described:
    """A data set that is ready for a study."""

    name: str
    root: Path
    manifest: str | None
    columns: dict[str, str]  # our name -> the manifest's, where they differ
    patient_pattern: str | None
    ingested: Ingested
    splits: Splits
    warnings: list[str]  # for the params file, so they contain no file name
    modality: Guess
    names: dict[str, str]  # label -> words

    @property
    def counts(self) -> dict[str, tuple[int, int]]:
        """Number of training and test images of each class."""
        labels = {record.path: record.label for record in self.ingested.records}
        train, test = (
            Counter(labels[path] for path in part) for part in (self.splits.train, self.splits.test)
        )
        return {label: (train[label], test[label]) for label in self.splits.classes}

    @property
    def percents(self) -> list[int]:
        """The percents for a study: every class keeps an image, and each percent adds images."""
        smallest = min(train for train, _ in self.counts.values())
        sizes: dict[int, int] = {}
        for percent in _PERCENTS:
            if (size := round(smallest * percent / 100)) >= 1:
                sizes.setdefault(size, percent)
        return list(sizes.values())

    def summary(self) -> list[Sequence[str]]:
        """Return a row for each class: label, words, training images, test images."""
        return [
            (label, self.names[label], str(train), str(test)) for label, (train, test) in self.counts.items()
        ]

    def faults(self) -> list[str]:
        """Return the first faults of ingestion, one line each, and the number of the others."""
        every = [*self.ingested.left_out, *self.ingested.reported]
        lines = [f"{fault.path}: {fault.fault}. {fault.fix}" for fault in every[:_FAULTS]]
        return lines + ([f"and {len(every) - _FAULTS} more"] if len(every) > _FAULTS else [])


def describe(
    data: Path,
    *,
    home: Path,
    root: Path | None = None,
    name: str | None = None,
    columns: Mapping[str, str] | None = None,
    modality: str | None = None,
    patient_pattern: str | None = None,
    test_fraction: float,
) -> Described:
    """Read every image of ``data`` as the stages of a study do, and fill the same caches.

    Args:
        data: A folder of classes or of splits, a folder that contains only such a folder, or a table.
        home: The project, which keeps the caches of images and thumbnails.
        root: For a table, the folder that contains all its paths; default: the table's folder.
        name: Name of the data set; default: the name of the folder or the table.
        columns: The table's names for path, label, split and patient, as far as they are known.
        modality: The modality; default: a guess.
        patient_pattern: A regular expression with one group, the patient.
        test_fraction: Size of the test set if there is no official test set.

    Raises:
        FileNotFoundError: There is no such folder or table.
        ValueError: The data set has faults, which the message lists, or too few images.
    """
    folder, manifest = _locate(data, root)
    table_columns = propose(data, folder, columns or {}) if manifest else {}
    caches = home / ".cache"
    progress = sys.stderr.isatty()
    ingested = ingest(
        folder,
        manifest=manifest,
        columns=table_columns,
        patient_pattern=patient_pattern,
        progress=progress,
        cache=caches / "images",
        salt_file=home / pseudonyms.FILE,
    )
    records = ingested.records
    pairs = find_duplicates(records, folder, progress=progress, cache=caches / "thumbnails")
    try:
        splits = _splits(records, pairs, test_fraction)
    except ValueError as error:
        raise ValueError(f"{data}: {error}") from error
    path = Path(os.path.abspath(data))
    duplicates = [_duplicates(len(twins(pairs)), len(pairs), len(records))] if pairs else []
    return Described(
        name=name or slug(path.stem if manifest else path.name),
        root=folder,
        manifest=manifest,
        columns=table_columns,
        patient_pattern=patient_pattern,
        ingested=ingested,
        splits=splits,
        warnings=[*_of_ingestion(ingested), *duplicates, *data_warnings(records, splits, pairs)],
        modality=Guess(modality, GIVEN) if modality else _modality(path, folder, records, splits.classes),
        names=readable(splits.classes),
    )


def readable(labels: Iterable[str]) -> dict[str, str]:
    """Return each label as words for a text prompt: one case, spaces, abbreviations written out."""
    return {label: _readable(label) for label in labels}


def slug(text: str) -> str:
    """Return a text as a data set's name: letters, digits, hyphens and underscores."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", text).strip("-_") or "images"


def _locate(data: Path, root: Path | None) -> tuple[Path, str | None]:
    """Return the folder of the images and, for a table, its path inside that folder."""
    if data.is_dir():
        if root is not None:
            raise ValueError(f"--root {root}: {data} is a folder, and --root is for a table. Omit --root.")
        return unwrapped(Path(os.path.abspath(data))), None
    if not data.is_file():
        raise FileNotFoundError(f"{data}: no such folder or table. Give the folder that contains the images.")
    if data.suffix.casefold() not in (*tables.SUFFIXES, *tables.SPREADSHEETS):
        known = ", ".join(suffix[1:] for suffix in tables.SUFFIXES)
        raise ValueError(
            f"{data}: neither a folder nor a table ({known}). Give the folder that contains the images."
        )
    folder, file = Path(os.path.abspath(root or data.parent)), Path(os.path.abspath(data))
    if not file.is_relative_to(folder):
        raise ValueError(
            f"{data}: not inside --root {root}. Give a folder that contains the table and the images."
        )
    return folder, file.relative_to(folder).as_posix()


def _splits(records: Sequence[Record], pairs: Sequence[Pair], test_fraction: float) -> Splits:
    """Draw the test set; the only support is the whole training set."""
    return draw_splits(
        records,
        groups(records, pairs),
        groups(records, twins(pairs)),
        test_fraction=test_fraction,
        fractions=[1.0],
        shots=[],
        seeds=[0],
    )


def _modality(data: Path, folder: Path, records: Sequence[Record], classes: Sequence[str]) -> Guess:
    labels = [record.label for record in records]
    files = [folder / records[i].path for i in spread_over_classes(labels, _GLANCED)]
    texts = [folder.name, data.stem, *classes]
    return by_headers(map(decode.modality_and_body_part, files)) or guess(texts, look_at(files))


def _readable(label: str) -> str:
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", label).replace("_", " ").replace("-", " ").split()
    words = [_KNOWN_WORDS.get(word.casefold(), word.casefold() if len(word) > 3 else word) for word in words]
    return " ".join(word if word.isupper() else word[:1].lower() + word[1:] for word in words) or label


def _of_ingestion(ingested: Ingested) -> list[str]:
    warnings = []
    if number := len(ingested.left_out):
        some = "1 file is" if number == 1 else f"{number} files are"
        warnings.append(f"{some} left out; a run lists them in reports/data/<name>/left_out.csv.")
    if number := len(ingested.reported):
        some = "1 file is" if number == 1 else f"{number} files are"
        warnings.append(f"{some} kept with a remark in reports/data/<name>/reported.csv.")
    return warnings


def _duplicates(twin_pairs: int, pairs: int, images: int) -> str:
    some = "1 pair shows" if pairs == 1 else f"{pairs} pairs show"
    near = pairs - twin_pairs
    return f"{some} the same image ({twin_pairs}) or nearly the same image ({near}), among {images} images."
