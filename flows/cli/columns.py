"""What a table calls path, label, split and patient: as it was said, by its heading, or a guess by values."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from medfocus.datasets.listing import SPLITS, inside
from medfocus.storage.tables import COLUMNS, Table, TableError, folded, read_table

_LOOKED_AT = 200  # rows, of which half have to name files
_CLASSES = (2, 50)  # distinct values that a label may have
_GRADES = 10  # of them, where all are numbers: more are ages, sizes, counts
_TOLD = {  # parts of headings, as clinics write them
    "label": "label class diagnos finding befund categor target klasse classe kategorie pathology dx",
    "patient": "patient subject pid proband person",
}


def given(arguments: Sequence[str]) -> dict[str, str]:
    """``label=Diagnosis`` and the like. Raises ValueError for one that is not of this form."""
    found: dict[str, str] = {}
    for argument in arguments:
        ours, equals, theirs = argument.partition("=")
        if ours not in COLUMNS or not equals or not theirs.strip():
            raise ValueError(f"{argument!r} is not as in label=Diagnosis; left of = is {', '.join(COLUMNS)}.")
        found[ours] = theirs.strip()
    return found


def propose(file: Path, root: Path, told: Mapping[str, str]) -> dict[str, str]:
    """Our name -> the table's, for those that differ; {} where the heading has path and label itself.

    Args:
        file: The table, inside ``root``.
        root: Where the files have to be that its paths name.
        told: What is known already; it is not checked here.

    Raises ValueError where the table cannot be read, or where path or label cannot be told from the values.
    """
    try:
        table = read_table(file)
    except TableError as error:
        raise ValueError(f"{file}: {error}") from error
    there = {folded(name): name for name in table.heading}
    known = {ours: there[ours] for ours in COLUMNS if ours in there} | dict(told)
    if {"path", "label"} <= known.keys():
        return dict(told)
    values = {name: _values(table, place) for place, name in enumerate(table.heading)}
    free = [name for name in table.heading if name not in known.values()]
    if "path" not in known:
        known["path"] = _path(file, root, {name: values[name] for name in free})
    free = [name for name in free if name != known["path"]]
    if "split" not in known and (splits := [name for name in free if _is_split(values[name])]):
        known["split"] = splits[0]
    if "patient" not in known and (patients := [name for name in free if _named(name, "patient")]):
        known["patient"] = patients[0]
    free = [name for name in free if name not in known.values()]
    if "label" not in known:
        known["label"] = _label(file, {name: values[name] for name in free})
    return {ours: known[ours] for ours in COLUMNS if ours in known and folded(known[ours]) != ours}


def _values(table: Table, place: int) -> list[str]:
    return [row[place] for _, row in table.rows if place < len(row) and row[place]]


def _path(file: Path, root: Path, columns: Mapping[str, list[str]]) -> str:
    """The column most of whose values are files."""
    shares = {
        name: sum(bool(inside(root, file.parent, value)) for value in some) / len(some)
        for name, values in columns.items()
        if (some := values[:_LOOKED_AT])
    }
    best = max(shares, key=lambda name: shares[name], default="")
    if not best or shares[best] < 0.5:
        raise ValueError(
            f"{file}: no column names files in {root} (its columns: {', '.join(columns)}). Write paths "
            "relative to this table, with suffixes, or give the folder of table and images as --root; "
            "--column path=NAME says which column it is."
        )
    return best


def _label(file: Path, columns: Mapping[str, list[str]]) -> str:
    """The column with few distinct values that is called as one of classes, or the only one with few."""
    few = [name for name, values in columns.items() if _is_few(values)]
    called = [name for name in few if _named(name, "label")]
    choice = called or few
    if len(choice) != 1:
        fault = f"several columns may be the classes ({', '.join(choice)})" if choice else (
            f"no column has few distinct values, as classes have (its columns: {', '.join(columns)})"
        )  # fmt: skip
        raise ValueError(f"{file}: {fault}. Say which with --column label=NAME.")
    return choice[0]


def _is_few(values: Sequence[str]) -> bool:
    """Whether values may be classes: from 2 to 50 of them (numbers: 10), most more than once."""
    counts = Counter(values)
    often = sum(count > 1 for count in counts.values())
    fewest, most = _CLASSES
    if all(re.fullmatch(r"-?[\d.,]+", value) for value in counts):
        most = _GRADES
    return fewest <= len(counts) <= most and 2 * often > len(counts)


def _is_split(values: Sequence[str]) -> bool:
    return bool(values) and {value.casefold() for value in values} <= SPLITS.keys()


def _named(name: str, ours: str) -> bool:
    words = re.findall(r"[^\W_]+", folded(name))
    return any(word.startswith(part) for word in words for part in _TOLD[ours].split())
