"""Find a table's columns for path, label, split and patient by option, by heading, or by their values."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from medfocus.datasets.listing import SPLITS, inside
from medfocus.storage.tables import COLUMNS, Table, TableError, folded, read_table

_SAMPLE = 200  # rows to check for paths; half of them must name files
_CLASSES = (2, 50)  # smallest and largest number of distinct values of a label
_GRADES = 10  # largest number of distinct values of a numeric label; ages, sizes and counts have more
_HEADINGS = {  # beginnings of words in headings, as clinics write them
    "label": "label class diagnos finding befund categor target klasse classe kategorie pathology dx",
    "patient": "patient subject pid proband person",
}


def parse(arguments: Sequence[str]) -> dict[str, str]:
    """Return ``["label=Diagnosis"]`` as {"label": "Diagnosis"}. Raises ValueError for another form."""
    columns: dict[str, str] = {}
    for argument in arguments:
        ours, equals, theirs = argument.partition("=")
        if ours not in COLUMNS or not equals or not theirs.strip():
            raise ValueError(
                f"--column {argument!r} has the wrong form. Write NAME=COLUMN, such as label=Diagnosis; NAME "
                f"is one of {', '.join(COLUMNS)}."
            )
        columns[ours] = theirs.strip()
    return columns


def propose(file: Path, root: Path, known: Mapping[str, str]) -> dict[str, str]:
    """Return the columns as our name -> the table's name, if the names differ.

    If the heading and ``known`` have path and label, return only ``known``.

    Args:
        file: The table, inside ``root``.
        root: The folder that contains the files of the table's paths.
        known: Names from the user, which are not checked here.

    Raises ValueError if the table is unreadable, or if its values do not show the path or the label.
    """
    try:
        table = read_table(file)
    except TableError as error:
        raise ValueError(f"{file}: {error}") from error
    heading = {folded(name): name for name in table.heading}
    columns = {ours: heading[ours] for ours in COLUMNS if ours in heading} | dict(known)
    if {"path", "label"} <= columns.keys():
        return dict(known)
    values = {name: _values(table, place) for place, name in enumerate(table.heading)}

    def free() -> list[str]:
        return [name for name in table.heading if name not in columns.values()]

    if "path" not in columns:
        columns["path"] = _path(file, root, {name: values[name] for name in free()})
    if "split" not in columns and (splits := [name for name in free() if _is_split(values[name])]):
        columns["split"] = splits[0]
    if "patient" not in columns and (patients := [name for name in free() if _is_named(name, "patient")]):
        columns["patient"] = patients[0]
    if "label" not in columns:
        columns["label"] = _label(file, {name: values[name] for name in free()})
    return {ours: columns[ours] for ours in COLUMNS if ours in columns and folded(columns[ours]) != ours}


def _values(table: Table, place: int) -> list[str]:
    return [row[place] for _, row in table.rows if place < len(row) and row[place]]


def _path(file: Path, root: Path, columns: Mapping[str, list[str]]) -> str:
    """Return the column with the largest share of values that are files."""
    shares = {
        name: sum(bool(inside(root, file.parent, value)) for value in sample) / len(sample)
        for name, values in columns.items()
        if (sample := values[:_SAMPLE])
    }
    best = max(shares, key=lambda name: shares[name], default="")
    if not best or shares[best] < 0.5:
        raise ValueError(
            f"{file}: no column names files in {root} (columns: {', '.join(columns)}). Write paths with "
            "suffixes, relative to the table, set --root to the folder of table and images, or name the "
            "column with --column path=NAME."
        )
    return best


def _label(file: Path, columns: Mapping[str, list[str]]) -> str:
    """Return the column with few distinct values, by its heading if several columns have few."""
    few = [name for name, values in columns.items() if _is_few(values)]
    choice = [name for name in few if _is_named(name, "label")] or few
    if len(choice) != 1:
        fault = (
            f"several columns may be the classes ({', '.join(choice)})"
            if choice
            else f"no column has few distinct values, as classes have (columns: {', '.join(columns)})"
        )
        raise ValueError(f"{file}: {fault}. Name the column with --column label=NAME.")
    return choice[0]


def _is_few(values: Sequence[str]) -> bool:
    """Return whether values may be classes: 2 to 50 distinct values (10 for numbers), mostly repeated."""
    counts = Counter(values)
    often = sum(count > 1 for count in counts.values())
    fewest, most = _CLASSES
    if all(re.fullmatch(r"-?[\d.,]+", value) for value in counts):
        most = _GRADES
    return fewest <= len(counts) <= most and 2 * often > len(counts)


def _is_split(values: Sequence[str]) -> bool:
    return bool(values) and {value.casefold() for value in values} <= SPLITS.keys()


def _is_named(heading: str, column: str) -> bool:
    words = re.findall(r"[^\W_]+", folded(heading))
    return any(word.startswith(part) for word in words for part in _HEADINGS[column].split())
