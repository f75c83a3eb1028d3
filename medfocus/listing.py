"""A data set's folders or manifest -> the files that are to become records, and what is wrong with them.

What is read is described in ``medfocus.ingest``; here no picture is opened.
"""

from __future__ import annotations

import csv
import io
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from medfocus import frames

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".dcm", ".dicom", ".nii", ".nii.gz")
_SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val"}
_SPLITS |= {"test": "test", "testing": "test", "all": ""}
_MASKS = "masks"
_MASK_STEM = re.compile(r"(.+)_mask(_\d+)?")
_CLUTTER = ("thumbs.db", "desktop.ini", "__macosx")  # beside all whose name begins with a dot


@dataclass(frozen=True)
class Fault:
    """What is wrong with a file, a folder or a setting, and what to do."""

    path: str  # relative to the data set's root
    fault: str
    fix: str


@dataclass(frozen=True)
class Listed:
    """A file that is to become a record; path "" stands for a class folder without any."""

    path: str
    label: str  # as it is spelled
    split: str
    patient: str


class Report:
    """Every fault that is found, by its weight."""

    def __init__(self) -> None:
        self.fatal: list[Fault] = []
        self.left_out: list[Fault] = []
        self.reported: list[Fault] = []

    def stop(self, path: str, fault: str, fix: str) -> None:
        """The data set cannot be used."""
        self.fatal.append(Fault(path, fault, fix))

    def leave_out(self, path: str, fault: str, fix: str) -> None:
        """This file cannot be used; the data set can."""
        self.left_out.append(Fault(path, fault, fix))

    def mention(self, path: str, fault: str, fix: str) -> None:
        """Kept as it is, but a reader of the results has to know."""
        self.reported.append(Fault(path, fault, fix))


def list_folders(root: Path, report: Report) -> list[Listed]:
    """The pictures of class folders, with or without folders of splits above them."""
    tops = [entry for entry in _entries(root) if entry.name.casefold() != _MASKS]
    folders = [entry for entry in tops if entry.is_dir()]
    splits = {folder: _SPLITS[folder.name.casefold()] for folder in folders if _is_split(folder)}
    if "" in splits.values() and len(splits) > 1:
        names = ", ".join(folder.name for folder in splits)
        report.stop("all", f"stands beside split folders ({names})", "Keep either all or the others.")
    for folder in folders if splits else []:
        if folder not in splits and (count := sum(map(is_picture, _files(folder)))):
            fault = f"holds {count} pictures beside the split folders, but is none itself"
            fix = "Move them into train, val, test or all to have them in."
            report.leave_out(folder.name, fault, fix)
    loose = [entry for folder in (root, *splits) for entry in _entries(folder) if is_picture(entry)]
    for file in loose:
        fix = "Move it into the folder of its class."
        report.leave_out(file.relative_to(root).as_posix(), "lies in no class folder", fix)
    if not splits:
        return [item for folder in folders for item in _list_class(root, folder, "", report)]
    return [
        item
        for folder, split in splits.items()
        for entry in _entries(folder)
        if entry.is_dir()
        for item in _list_class(root, entry, split, report)
    ]


def _list_class(root: Path, folder: Path, split: str, report: Report) -> list[Listed]:
    """The pictures of one class folder, in it and below."""
    files = list(_files(folder))
    pictures = {(file.parent, frames.stem(file.name).casefold()) for file in files if is_picture(file)}
    listed: list[Listed] = []
    for file in files:
        path = file.relative_to(root).as_posix()
        mask = _MASK_STEM.fullmatch(frames.stem(file.name).casefold())
        if mask and (file.parent, mask[1]) in pictures:
            continue
        if not is_picture(file):
            known = ", ".join(suffix[1:] for suffix in SUFFIXES)
            fault = f"is by its name no picture of a known format ({known})"
            report.leave_out(path, fault, "Export it as PNG, or remove it.")
        elif path.encode("utf-8", "replace").decode() != path:
            report.leave_out(path, "has a name that is not valid UTF-8", "Rename it.")
        else:
            listed.append(Listed(path, folder.name, split, ""))
    return listed or [Listed("", folder.name, split, "")]


def list_manifest(root: Path, manifest: str, report: Report) -> list[Listed]:
    """The pictures that a CSV inside ``root`` lists. Raises FileNotFoundError where there is none."""
    file = root / manifest
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such manifest; give a CSV by its path inside {root}.")
    try:
        rows = csv.DictReader(io.StringIO(file.read_text(encoding="utf-8-sig"), newline=""))
    except UnicodeDecodeError as error:
        report.stop(manifest, f"is not UTF-8 ({error})", "Save it again as UTF-8 CSV.")
        return []
    columns = {name.strip().casefold(): name for name in rows.fieldnames or []}
    if missing := {"path", "label"} - columns.keys():
        fault = f"has no column {' and no column '.join(sorted(missing))} (its columns: {', '.join(columns)})"
        fix = "Name the columns path, label and, where known, split and patient; separate them by commas."
        report.stop(manifest, fault, fix)
        return []
    listed: dict[str, set[Listed]] = defaultdict(set)
    for row in rows:
        given = {name: (row[column] or "").strip() for name, column in columns.items()}
        path = _inside(root, file.parent, given["path"])
        split = _SPLITS.get(given.get("split", "").casefold() or "all")
        if path is None:
            fault, fix = (
                f"leads out of {root}",
                "Copy the picture into that folder and correct the path, or remove the row.",
            )
        elif not path:
            fault, fix = (
                f"no such file inside {root}",
                "Correct the path, relative to the CSV, or remove the row.",
            )
        elif not given["label"]:
            fault, fix = "the label is empty", "Fill it in or remove the row."
        elif split is None:
            fault, fix = (
                f"the split {given['split']!r} is none of train, val, test",
                "Correct it, or empty it.",
            )
        else:
            listed[path].add(Listed(path, given["label"], split, given.get("patient", "")))
            continue
        report.leave_out(f"{manifest}, line {rows.line_num}: {given['path']}", fault, fix)
    for path, items in listed.items():
        if len(items) > 1:
            fault = f"is listed in {manifest} {len(items)} times, with different labels, splits or patients"
            report.leave_out(path, fault, "Decide which row is right and remove the others.")
    items = [item for (item, *others) in listed.values() if not others]
    without = [item for item in items if not item.split]
    if without and len(without) < len(items):
        fault = f"gives {len(without)} of {len(items)} pictures no split (the first is {without[0].path!r})"
        report.stop(manifest, fault, "Fill the column split in every row, or leave it out.")
    return items


def _inside(root: Path, folder: Path, path: str) -> str | None:
    """``path``, seen from ``folder``, as a path relative to ``root``; "" for no file there, None for outside.

    Outside nothing is looked at: whether there is a file is not told either.
    """
    top, found = Path(os.path.abspath(root)), None
    for spelling in (path, path.replace("\\", "/")):  # the latter was written on Windows
        named = Path(os.path.abspath(folder / spelling))
        file, _ = frames.split(named)  # of one slice its volume
        if not named.is_relative_to(top) or not _real(file).is_relative_to(_real(top)):
            found = None
        elif _is_file(file):
            return named.relative_to(top).as_posix()
        else:
            found = ""
    return found


def _real(file: Path) -> Path:
    """Where a path leads over its links; Path.resolve raises where they lead in a circle."""
    try:
        return Path(os.path.realpath(file))
    except ValueError:  # a null byte, with which there is no file
        return file


def _is_file(file: Path) -> bool:
    try:
        return file.is_file()
    except (OSError, ValueError):  # too long a name
        return False


def _entries(folder: Path) -> list[Path]:
    """What a folder holds, sorted, without what file managers leave behind."""
    visible = (entry for entry in folder.iterdir() if not entry.name.startswith("."))
    return sorted(entry for entry in visible if entry.name.casefold() not in _CLUTTER)


def _files(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """All files in a folder and below; links are followed, but never round in a circle."""
    here = folder.resolve()
    for entry in _entries(folder) if here not in above else ():
        if entry.is_dir():
            yield from _files(entry, (*above, here))
        else:
            yield entry


def is_picture(file: Path) -> bool:
    """Whether a file is one by its name, or by DICOM's mark in it: scanners give names without a suffix."""
    return not file.is_dir() and (file.name.casefold().endswith(SUFFIXES) or _is_marked(file))


def _is_marked(file: Path) -> bool:
    try:
        if not file.is_file():
            return False
        with file.open("rb") as opened:
            return opened.read(132)[128:] == b"DICM"
    except OSError:
        return False


def _is_split(folder: Path) -> bool:
    """Whether a top folder is a split. "all" is a leukaemia as well: without folders inside it is a class."""
    name = folder.name.casefold()
    return name in _SPLITS and (name != "all" or any(entry.is_dir() for entry in _entries(folder)))


def label_of(spelled: str) -> str:
    """A label as records have it: composed Unicode, no space around it."""
    return unicodedata.normalize("NFC", spelled).strip()


def with_patients(listed: list[Listed], pattern: str | None, report: Report) -> list[Listed]:
    """With the patients that ``pattern`` finds in the paths of those that have none yet."""
    if pattern is None:
        return listed
    try:
        expression = re.compile(pattern)
    except re.error as error:
        report.stop("patient_pattern", f"{pattern!r} is no regular expression ({error})", "Correct it.")
        return listed
    if expression.groups != 1:
        fix = r"Put the patient into the one group, as in 'person(\d+)_'; begin other brackets with (?:."
        report.stop("patient_pattern", f"{pattern!r} has {expression.groups} groups instead of one", fix)
        return listed
    found = {item.path: (match[1] or "") for item in listed if (match := expression.search(item.path))}
    named = [replace(item, patient=item.patient or found.get(item.path, "")) for item in listed]
    without = [item.path for item in named if item.path and not item.patient]
    if without and not any(found.values()):
        fault = f"{pattern!r} matches no picture (the first is {without[0]!r})"
        report.stop("patient_pattern", fault, "Correct it, or set it to null.")
    elif without:
        fault = f"{pattern!r} finds no patient in {len(without)} pictures (the first is {without[0]!r})"
        report.mention("patient_pattern", fault, "Each of them counts as a patient of its own.")
    return named


def check_spellings(listed: Iterable[Listed], report: Report) -> None:
    """Stop where a label is spelled in several ways that differ in case, spaces, hyphens or underscores."""
    spellings: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for item in listed:
        folded = unicodedata.normalize("NFKC", item.label).casefold()
        spellings[re.sub(r"[\s_-]+", " ", folded).strip()][item.label].append(item.path)
    for variants in spellings.values():
        if len(variants) > 1:
            seen = ", ".join(f"{label!r} as in {min(paths)!r}" for label, paths in sorted(variants.items()))
            fault = f"the label is spelled in {len(variants)} ways: {seen}"
            report.stop(min(variants), fault, "Choose one spelling and rename the others.")
