"""A data set's folders or manifest -> the files that are to become records, and what is wrong with them.

What is read is described in ``medfocus.datasets.ingest``; here no image is opened.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from medfocus.images import stack
from medfocus.storage import tables

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".dcm", ".dicom", ".nii", ".nii.gz")
SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val"}
SPLITS |= {"test": "test", "testing": "test", "all": ""}
MASKS = "masks"  # the folder of known regions
MASK_STEM = re.compile(r"(.+)_mask(_\d+)?")
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


def unwrapped(root: Path) -> Path:
    """The folder that holds the data set: ``root``, or what it only wraps, as archives do that are unpacked.

    A wrapper has one folder (a folder of masks apart) and no image, and that folder is no split and holds
    folders and no image. Only as much of a folder is read as tells.
    """
    inner = _only_folder(root)
    while inner is not None and not _is_split(inner) and not _has_images(inner) and _has_folders(inner):
        root, inner = inner, _only_folder(inner)
    return root


def _only_folder(folder: Path) -> Path | None:
    """The one folder in ``folder``; None where there are several, none, or images."""
    only: Path | None = None
    for entry in filter(_is_seen, folder.iterdir()):
        if is_image(entry):
            return None
        if entry.is_dir() and entry.name.casefold() != MASKS:
            if only is not None:
                return None
            only = entry
    return only


def _has_images(folder: Path) -> bool:
    return any(is_image(entry) for entry in filter(_is_seen, folder.iterdir()))


def _has_folders(folder: Path) -> bool:
    return any(entry.is_dir() for entry in filter(_is_seen, folder.iterdir()))


def list_folders(root: Path, report: Report) -> list[Listed]:
    """The images of class folders, with or without folders of splits above them; see ``unwrapped``."""
    top = unwrapped(root)
    tops = [entry for entry in _entries(top) if entry.name.casefold() != MASKS]
    folders = [entry for entry in tops if entry.is_dir()]
    splits = {folder: SPLITS[folder.name.casefold()] for folder in folders if _is_split(folder)}
    if "" in splits.values() and len(splits) > 1:
        names = ", ".join(folder.name for folder in splits)
        report.stop("all", f"stands beside split folders ({names})", "Keep either all or the others.")
    for folder in folders if splits else []:
        images = [] if folder in splits else list(filter(is_image, _files(folder)))
        if images and all((top / image.relative_to(folder)).is_file() for image in images):
            fault = f"repeats {len(images)} images of the split folders beside it, by their paths"
            report.leave_out(folder.relative_to(root).as_posix(), fault, "Remove it, if it is a copy.")
        elif images:
            fault = f"holds {len(images)} images beside the split folders, but is none itself"
            fix = "Move them into train, val, test or all to have them in."
            report.leave_out(folder.relative_to(root).as_posix(), fault, fix)
    loose = [entry for folder in (top, *splits) for entry in _entries(folder) if is_image(entry)]
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
    """The images of one class folder, in it and below."""
    files = list(_files(folder))
    images = {(file.parent, stack.stem(file.name).casefold()) for file in files if is_image(file)}
    listed: list[Listed] = []
    for file in files:
        path = file.relative_to(root).as_posix()
        mask = MASK_STEM.fullmatch(stack.stem(file.name).casefold())
        if mask and (file.parent, mask[1]) in images:
            continue
        if not is_image(file):
            known = ", ".join(suffix[1:] for suffix in SUFFIXES)
            fault = f"is by its name no image of a known format ({known})"
            report.leave_out(path, fault, "Export it as PNG, or remove it.")
        elif path.encode("utf-8", "replace").decode() != path:
            report.leave_out(path, "has a name that is not valid UTF-8", "Rename it.")
        else:
            listed.append(Listed(path, folder.name, split, ""))
    return listed or [Listed("", folder.name, split, "")]


def list_manifest(
    root: Path, manifest: str, report: Report, columns: Mapping[str, str] | None = None
) -> list[Listed]:
    """The images that a table inside ``root`` lists; ``columns`` are its names for ``tables.COLUMNS``.

    Raises FileNotFoundError where there is none.
    """
    file = root / manifest
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such manifest; give a CSV by its path inside {root}.")
    named = {ours: tables.folded((columns or {}).get(ours, ours)) for ours in tables.COLUMNS}
    try:
        table = tables.read_table(file, set(named.values()))
        places = _columns(table.heading, named, columns or {})
    except tables.TableError as error:
        report.stop(manifest, error.fault, error.fix)
        return []
    listed: dict[str, set[Listed]] = defaultdict(set)
    for where, row in table.rows:
        given = {ours: row[place] if place < len(row) else "" for ours, place in places.items()}
        found = _of_row(root, file.parent, given)
        if any(row[len(table.heading) :]):
            fault = f"has {len(row)} cells, and the heading {len(table.heading)}"
            found = fault, "Put cells that hold the separator into quotes."
        if isinstance(found, Listed):
            listed[found.path].add(found)
        elif any(row):
            report.leave_out(f"{manifest}, {where}: {given['path']}", *found)
    for path, items in listed.items():
        if len(items) > 1:
            fault = f"is listed in {manifest} {len(items)} times, with different labels, splits or patients"
            report.leave_out(path, fault, "Decide which row is right and remove the others.")
    items = [item for (item, *others) in listed.values() if not others]
    without = [item for item in items if not item.split]
    if without and len(without) < len(items):
        fault = f"gives {len(without)} of {len(items)} images no split (the first is {without[0].path!r})"
        report.stop(manifest, fault, "Fill the column split in every row, or leave it out.")
    return _without_masks(items, manifest, report)


def _columns(heading: Sequence[str], named: Mapping[str, str], columns: Mapping[str, str]) -> dict[str, int]:
    """Our name of a column -> its place. Raises tables.TableError where one is not there, or there twice."""
    there = [tables.folded(name) for name in heading]
    has = f"its columns: {', '.join(heading)}"
    missing = {ours for ours in ("path", "label", *columns) if named[ours] not in there}
    if told := sorted(missing & columns.keys()):
        fault = " and ".join(f"no column {columns[ours]!r}, which columns.{ours} names" for ours in told)
        raise tables.TableError(f"has {fault} ({has})", "Correct columns in the params file.")
    if missing:
        fault = f"has no column {' and no column '.join(sorted(missing))} ({has})"
        fix = "Rename them to path, label and, where known, split and patient, or say in the params file "
        fix += "which they are, as in columns: {path: File, label: Diagnosis}."
        raise tables.TableError(fault, fix)
    for ours, name in named.items():
        if there.count(name) > 1:
            fault = f"has {there.count(name)} columns for {ours} ({has})"
            raise tables.TableError(fault, "Rename all but the one that is meant.")
    return {ours: there.index(name) for ours, name in named.items() if name in there}


def _of_row(root: Path, folder: Path, given: Mapping[str, str]) -> Listed | tuple[str, str]:
    """The file that a row stands for, or the row's fault and the fix."""
    path = inside(root, folder, given["path"])
    split = SPLITS.get(given.get("split", "").casefold() or "all")
    if path is None:
        fix = "Copy the image into that folder and correct the path, or remove the row."
        return f"leads out of {root}", fix
    if not path:
        return f"no such file inside {root}", "Correct the path, relative to the manifest, or remove the row."
    if not given["label"]:
        return "the label is empty", "Fill it in or remove the row."
    if split is None:
        return f"the split {given['split']!r} is none of train, val, test", "Correct it, or empty it."
    return Listed(path, given["label"], split, given.get("patient", ""))


def _without_masks(items: list[Listed], manifest: str, report: Report) -> list[Listed]:
    """Without those whose names make them the ground truth of another that is listed beside them."""
    stems = {_stem(item.path): item.path for item in items}
    kept: list[Listed] = []
    for item in items:
        mask = MASK_STEM.fullmatch(_stem(item.path))
        if mask and mask[1] in stems:
            fault = f"is listed in {manifest}, but is by its name the known region of {stems[mask[1]]}"
            report.leave_out(item.path, fault, "Remove the row, or rename the file if it is an image.")
        else:
            kept.append(item)
    return kept


def _stem(path: str) -> str:
    return Path(path).with_name(stack.stem(Path(path).name)).as_posix().casefold()


def inside(root: Path, folder: Path, path: str) -> str | None:
    """``path``, seen from ``folder``, as a path relative to ``root``; "" for no file there, None for outside.

    Outside nothing is looked at: whether there is a file is not told either.
    """
    top, found = Path(os.path.abspath(root)), None
    for spelling in (path, path.replace("\\", "/")):  # the latter was written on Windows
        named = Path(os.path.abspath(folder / spelling))
        file, _ = stack.split(named)  # of one slice its volume
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
    return sorted(filter(_is_seen, folder.iterdir()))


def _is_seen(entry: Path) -> bool:
    return not entry.name.startswith(".") and entry.name.casefold() not in _CLUTTER


def _files(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """All files in a folder and below; links are followed, but never round in a circle."""
    here = folder.resolve()
    for entry in _entries(folder) if here not in above else ():
        if entry.is_dir():
            yield from _files(entry, (*above, here))
        else:
            yield entry


def is_image(file: Path) -> bool:
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
    return name in SPLITS and (name != "all" or any(entry.is_dir() for entry in _entries(folder)))


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
        fault = f"{pattern!r} matches no image (the first is {without[0]!r})"
        report.stop("patient_pattern", fault, "Correct it, or set it to null.")
    elif without:
        fault = f"{pattern!r} finds no patient in {len(without)} images (the first is {without[0]!r})"
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
