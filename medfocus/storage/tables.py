"""A table file -> its heading and rows as text: separated values in UTF-8 or UTF-16, or Parquet.

How it is written is seen from its content, not from its name: Parquet by its first bytes, the separator
(comma, semicolon, tab) from the first lines, which Excel may precede by ``sep=;``.
"""

from __future__ import annotations

import codecs
import csv
import io
from collections.abc import Set
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

COLUMNS = ("path", "label", "split", "patient")  # of a manifest
SUFFIXES = (".csv", ".tsv", ".tab", ".txt", ".parquet", ".pq")
SPREADSHEETS = (".xlsx", ".xlsm", ".xls", ".ods")  # refused, with the way out
MAX_BYTES = 1_000_000_000  # of a file, and of what a Parquet file says that it unpacks to
_SEPARATORS = (",", ";", "\t")
_LOOKED_AT = 20  # lines that choose the separator
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_ZIP, _OLE, _PARQUET = b"PK\x03\x04", b"\xd0\xcf\x11\xe0", b"PAR1"


class TableError(ValueError):
    """A file that is no table that is read: the fault, then the fix."""

    def __init__(self, fault: str, fix: str) -> None:
        self.fault, self.fix = fault, fix
        super().__init__(f"{fault}. {fix}")


@dataclass(frozen=True)
class Table:
    """What a table file holds, each cell as text without space around it."""

    heading: tuple[str, ...]
    rows: list[tuple[str, list[str]]]  # "line 7" or "row 6", and the cells; as many as the heading, or not


def folded(name: str) -> str:
    """A column's name without case and space around it."""
    return name.strip().casefold()


def read_table(file: Path, wanted: Set[str] = frozenset()) -> Table:
    """Read a table; its lines count from 1, the heading's being the first, and a Parquet file's rows do too.

    Args:
        file: CSV, semicolons or tabs instead of commas, or Parquet.
        wanted: Folded names of columns, of which a separator has to show as many as it can. Of a Parquet
            file the others' cells are "": without names, those that hold neither text nor numbers.

    Raises:
        TableError: It is none of these, or larger than ``MAX_BYTES``.
        OSError: It cannot be read.
    """
    if (size := file.stat().st_size) > MAX_BYTES:
        raise TableError(f"has {size / 1e9:.1f} GB; {MAX_BYTES / 1e9:.0f} GB are the most", "Divide it.")
    with file.open("rb") as opened:
        start = opened.read(4)
    if start in (_ZIP, _OLE):
        fault = "is a spreadsheet or an archive, and neither is read"
        raise TableError(fault, "Open it in the spreadsheet program and save it as CSV UTF-8.")
    return _parquet(file, wanted) if start == _PARQUET else _separated(file.read_bytes(), wanted)


def _separated(data: bytes, wanted: Set[str]) -> Table:
    try:
        text = data.decode("utf-16" if data.startswith(_UTF16) else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise TableError(f"is not UTF-8 ({error})", "Save it again as UTF-8 CSV.") from error
    first, _, rest = text.partition("\n")
    told = folded(first).removeprefix("sep=") if folded(first).startswith("sep=") else None
    text, before = (rest, 1) if told is not None else (text, 0)
    try:
        separator = told if told and len(told) == 1 else _separator(text, wanted)
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
        rows = [(f"line {reader.line_num + before}", [cell.strip() for cell in row]) for row in reader if row]
    except csv.Error as error:
        raise TableError(f"holds no separated values ({error})", "Save it again as UTF-8 CSV.") from error
    return Table(tuple(rows[0][1]), rows[1:]) if rows else Table((), [])


def _separator(text: str, wanted: Set[str]) -> str:
    """With which most wanted columns are found, then most lines are as long as the heading, which is long."""

    def worth(separator: str) -> tuple[int, int, int]:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
        heading, *lines = list(islice(filter(None, reader), _LOOKED_AT)) or [[]]
        alike = sum(len(line) == len(heading) for line in lines) if len(heading) > 1 else 0
        return len(wanted & set(map(folded, heading))), alike, len(heading)

    return max(_SEPARATORS, key=worth)


def _parquet(file: Path, wanted: Set[str]) -> Table:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(file) as opened:
            about, schema = opened.metadata, opened.schema_arrow
            unpacked = sum(about.row_group(i).total_byte_size for i in range(about.num_row_groups))
            if unpacked > MAX_BYTES or about.num_rows * len(schema.names) > MAX_BYTES:
                fault = f"says that it unpacks to {unpacked / 1e9:.1f} GB in {about.num_rows} rows"
                raise TableError(fault, "Leave out columns that hold more than a path, a label or a name.")
            columns: list[list[str]] = []
            for field in schema:
                plain = not (pa.types.is_nested(field.type) or _is_binary(field.type))
                if folded(field.name) in wanted and not plain:
                    fault = f"has a column {field.name!r} of type {field.type}, neither text nor numbers"
                    raise TableError(fault, "Write images as files, and their paths into the column.")
                read = folded(field.name) in wanted or (not wanted and plain)
                columns.append(_cells(opened, field.name) if read else [""] * about.num_rows)
    except (pa.ArrowException, OSError) as error:
        raise TableError(f"is no sound Parquet file ({error})", "Write it again.") from error
    rows = [(f"row {i}", list(cells)) for i, cells in enumerate(zip(*columns, strict=True), start=1)]
    return Table(tuple(name.strip() for name in schema.names), rows)


def _is_binary(kind: Any) -> bool:
    import pyarrow.types as of

    return of.is_binary(kind) or of.is_large_binary(kind) or of.is_fixed_size_binary(kind)


def _cells(opened: Any, name: str) -> list[str]:
    batches = (batch.column(0).to_pylist() for batch in opened.iter_batches(columns=[name]))
    return [_text(cell) for batch in batches for cell in batch]


def _text(cell: object) -> str:
    """A cell: "" for a null and for not a number, "1" for 1 and for 1.0 (pandas' integers beside nulls)."""
    if cell is None or cell != cell:  # the latter: not a number
        return ""
    if isinstance(cell, bool):
        return str(cell).lower()
    if isinstance(cell, float) and cell.is_integer():
        return str(int(cell))
    return str(cell).strip()
