"""Read table files as text (separated values in UTF-8 or UTF-16, or Parquet), and write CSV files.

The content of a file, not its name, determines its format. Parquet begins with a magic number. In other
files, the first lines determine the separator: comma, semicolon or tab. Excel may write ``sep=;`` above them.
"""

from __future__ import annotations

import codecs
import csv
import io
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from medfocus.storage import atomic

COLUMNS = ("path", "label", "split", "patient")  # of a manifest
SUFFIXES = (".csv", ".tsv", ".tab", ".txt", ".parquet", ".pq")
SPREADSHEETS = (".xlsx", ".xlsm", ".xls", ".ods")  # refused, with instructions for converting them
MOST_BYTES = 1_000_000_000  # of a file, and of an unpacked Parquet file
_SEPARATORS = (",", ";", "\t")
_SAMPLE = 20  # lines that determine the separator
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_ZIP, _OLE, _PARQUET = b"PK\x03\x04", b"\xd0\xcf\x11\xe0", b"PAR1"


class TableError(ValueError):
    """A file that is not a supported table."""

    def __init__(self, fault: str, fix: str) -> None:
        self.fault, self.fix = fault, fix
        super().__init__(f"{fault}. {fix}")


@dataclass(frozen=True)
class Table:
    """The content of a table file; each cell is text without surrounding spaces."""

    heading: tuple[str, ...]
    rows: list[tuple[str, list[str]]]  # ("line 7" or "row 6", cells); rows may differ in length


def folded(name: str) -> str:
    """Return the name of a column without case and surrounding spaces."""
    return name.strip().casefold()


def read_table(file: Path, wanted: Set[str] = frozenset()) -> Table:
    """Read a table. Line 1 of a text file is its heading; row 1 of a Parquet file is its first row.

    Args:
        file: Values separated by commas, semicolons or tabs, or Parquet.
        wanted: Folded names of columns. They help to choose the separator. In a Parquet file, only these
            columns are read; without names, all columns are read, except nested and binary columns. Cells
            that are not read are "".

    Raises:
        TableError: The file is not such a table, or is larger than ``MOST_BYTES``.
        OSError: The file cannot be read.
    """
    if (size := file.stat().st_size) > MOST_BYTES:
        raise TableError(f"has {size / 1e9:.1f} GB; the limit is {MOST_BYTES / 1e9:.0f} GB", "Divide it.")
    with file.open("rb") as opened:
        start = opened.read(4)
    if start in (_ZIP, _OLE):
        fault = "is a spreadsheet or an archive; neither is supported"
        raise TableError(fault, "Open it in a spreadsheet program and save it as CSV UTF-8.")
    return _parquet(file, wanted) if start == _PARQUET else _separated(file.read_bytes(), wanted)


def write_csv(path: Path, heading: Sequence[str], rows: Iterable[Iterable[object]]) -> None:
    """Write a CSV file atomically."""
    file = io.StringIO(newline="")
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(heading)
    writer.writerows(rows)
    atomic.write(path, file.getvalue().encode(errors="backslashreplace"))


def read_csv(path: Path) -> list[dict[str, str]]:
    """Read the rows of a CSV file that ``write_csv`` wrote."""
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        return list(csv.DictReader(file))


def _separated(data: bytes, wanted: Set[str]) -> Table:
    try:
        text = data.decode("utf-16" if data.startswith(_UTF16) else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise TableError(f"is not UTF-8 ({error})", "Save it again as UTF-8 CSV.") from error
    first, _, rest = text.partition("\n")
    declared = folded(first).removeprefix("sep=") if folded(first).startswith("sep=") else None
    text, before = (rest, 1) if declared is not None else (text, 0)
    try:
        separator = declared if declared and len(declared) == 1 else _separator(text, wanted)
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
        rows = [(f"line {reader.line_num + before}", [cell.strip() for cell in row]) for row in reader if row]
    except csv.Error as error:
        raise TableError(
            f"does not hold separated values ({error})", "Save it again as UTF-8 CSV."
        ) from error
    return Table(tuple(rows[0][1]), rows[1:]) if rows else Table((), [])


def _separator(text: str, wanted: Set[str]) -> str:
    """Choose the separator with most wanted columns, then most lines of equal length, then most columns."""

    def quality(separator: str) -> tuple[int, int, int]:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
        heading, *lines = list(islice(filter(None, reader), _SAMPLE)) or [[]]
        equal = sum(len(line) == len(heading) for line in lines) if len(heading) > 1 else 0
        return len(wanted & set(map(folded, heading))), equal, len(heading)

    return max(_SEPARATORS, key=quality)


def _parquet(file: Path, wanted: Set[str]) -> Table:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(file) as opened:
            metadata, schema = opened.metadata, opened.schema_arrow
            unpacked = sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
            if unpacked > MOST_BYTES or metadata.num_rows * len(schema.names) > MOST_BYTES:
                fault = f"unpacks to {unpacked / 1e9:.1f} GB in {metadata.num_rows} rows"
                raise TableError(fault, "Remove columns other than path, label, split and patient.")
            columns: list[list[str]] = []
            for field in schema:
                is_plain = not (pa.types.is_nested(field.type) or _is_binary(field.type))
                if folded(field.name) in wanted and not is_plain:
                    fault = f"has a column {field.name!r} of type {field.type}, neither text nor numbers"
                    raise TableError(fault, "Write the images to files, and their paths to the column.")
                is_read = folded(field.name) in wanted or (not wanted and is_plain)
                columns.append(_cells(opened, field.name) if is_read else [""] * metadata.num_rows)
    except (pa.ArrowException, OSError) as error:
        raise TableError(f"is not a valid Parquet file ({error})", "Write it again.") from error
    rows = [(f"row {i}", list(cells)) for i, cells in enumerate(zip(*columns, strict=True), start=1)]
    return Table(tuple(name.strip() for name in schema.names), rows)


def _is_binary(kind: Any) -> bool:
    import pyarrow.types as of

    return of.is_binary(kind) or of.is_large_binary(kind) or of.is_fixed_size_binary(kind)


def _cells(opened: Any, name: str) -> list[str]:
    batches = (batch.column(0).to_pylist() for batch in opened.iter_batches(columns=[name]))
    return [_text(cell) for batch in batches for cell in batch]


def _text(cell: object) -> str:
    """Return a cell as text: "" for null and NaN, "1" for 1.0 (integers with nulls in pandas)."""
    if cell is None or cell != cell:  # NaN
        return ""
    if isinstance(cell, bool):
        return str(cell).lower()
    if isinstance(cell, float) and cell.is_integer():
        return str(int(cell))
    return str(cell).strip()
