"""List the image files of a data set from its folders or its manifest, without opening images.

``medfocus.datasets.ingest`` describes the layouts.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from medfocus.datasets.faults import FaultKind, IngestReport
from medfocus.images import stack
from medfocus.storage import tables

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".dcm", ".dicom", ".nii", ".nii.gz")
SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val"}
SPLITS |= {"test": "test", "testing": "test", "all": ""}
MASKS = "masks"  # the folder of known regions, which are not images of the data set
MASK_STEM = re.compile(r"(.+)_mask(_\d+)?")
_CLUTTER = ("thumbs.db", "desktop.ini", "__macosx")  # ignored, like names that begin with a dot


@dataclass(frozen=True)
class Listed:
    """A file that will become a record. Path "" stands for a class folder without images."""

    path: str
    label: str  # as spelled in the data set
    split: str
    patient: str


def unwrapped(root: Path) -> Path:
    """Return the folder of the data set: ``root``, or the folder inside it if an archive was unpacked there.

    A folder is skipped if it holds no image and one folder (apart from ``masks``), and if that inner folder
    is not a split and holds folders but no image.
    """
    inner = _only_folder(root)
    while inner is not None and not _is_split(inner) and not _has_images(inner) and _has_folders(inner):
        root, inner = inner, _only_folder(inner)
    return root


def _only_folder(folder: Path) -> Path | None:
    """Return the only folder in ``folder``; None if it holds several, none, or images."""
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


def list_folders(root: Path, report: IngestReport) -> list[Listed]:
    """List the images of class folders, with or without split folders above them; see ``unwrapped``."""
    top = unwrapped(root)
    folders = [entry for entry in _entries(top) if entry.is_dir() and entry.name.casefold() != MASKS]
    splits = {folder: SPLITS[folder.name.casefold()] for folder in folders if _is_split(folder)}
    if "" in splits.values() and len(splits) > 1:
        names = ", ".join(folder.name for folder in splits)
        report.stop("all", f"lies next to split folders ({names})", 'Keep either "all" or the others.')
    _report_outsiders(root, top, folders, splits, report)
    if not splits:
        return [item for folder in folders for item in _list_class(root, folder, "", report)]
    return [
        item
        for folder, split in splits.items()
        for entry in _entries(folder)
        if entry.is_dir()
        for item in _list_class(root, entry, split, report)
    ]


def _report_outsiders(
    root: Path, top: Path, folders: Sequence[Path], splits: Collection[Path], report: IngestReport
) -> None:
    """Report images outside the class folders and, next to split folders, outside the splits."""
    for folder in folders if splits else ():
        images = [] if folder in splits else list(filter(is_image, _files(folder)))
        if images and all((top / image.relative_to(folder)).is_file() for image in images):
            fault = f"holds {len(images)} images with the same paths as in the split folders"
            fix = "Remove it if it is a copy."
            report.leave_out(folder.relative_to(root).as_posix(), "copy of the split folders", fault, fix)
        elif images:
            fault = f"holds {len(images)} images, but is not a split folder like the others"
            fix = "To use the images, move them into train, val, test or all."
            report.leave_out(folder.relative_to(root).as_posix(), "folder outside the splits", fault, fix)
    for file in [entry for folder in (top, *splits) for entry in _entries(folder) if is_image(entry)]:
        path, fix = file.relative_to(root).as_posix(), "Move it into the folder of its class."
        report.leave_out(path, "file outside the class folders", "lies outside the class folders", fix)


def _list_class(root: Path, folder: Path, split: str, report: IngestReport) -> list[Listed]:
    """List the images of a class folder and its subfolders."""
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
            fault = f"does not have the suffix of a supported image format ({known})"
            report.leave_out(path, "unknown file type", fault, "Export it as PNG, or remove it.")
        elif path.encode("utf-8", "replace").decode() != path:
            fault = "has a name that is not valid UTF-8"
            report.leave_out(path, "file name is not UTF-8", fault, "Rename it.")
        else:
            listed.append(Listed(path, folder.name, split, ""))
    return listed or [Listed("", folder.name, split, "")]


def list_manifest(
    root: Path, manifest: str, report: IngestReport, columns: Mapping[str, str] | None = None
) -> list[Listed]:
    """List the images of a table inside ``root``; ``columns`` maps ``tables.COLUMNS`` to the table's names.

    Raises FileNotFoundError if the table does not exist.
    """
    file = root / manifest
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such manifest; give the path of a CSV inside {root}.")
    named = {ours: tables.folded((columns or {}).get(ours, ours)) for ours in tables.COLUMNS}
    try:
        table = tables.read_table(file, set(named.values()))
        places = _columns(table.heading, named, columns or {})
    except tables.TableError as error:
        report.stop(manifest, error.fault, error.fix)
        return []
    listed: dict[str, set[Listed]] = defaultdict(set)
    for where, row in table.rows:
        cells = {ours: row[place] if place < len(row) else "" for ours, place in places.items()}
        item = _of_row(root, file.parent, cells)
        if any(row[len(table.heading) :]):
            fault = f"has {len(row)} cells, but the heading has {len(table.heading)}"
            item = "malformed row", fault, "Quote cells that contain the separator."
        if isinstance(item, Listed):
            listed[item.path].add(item)
        elif any(row):
            report.leave_out(f"{manifest}, {where}: {cells['path']}", *item)
    for path, items in listed.items():
        if len(items) > 1:
            fault = f"is listed in {manifest} {len(items)} times, with different labels, splits or patients"
            report.leave_out(path, "conflicting rows", fault, "Keep the correct row and remove the others.")
    items = [item for (item, *others) in listed.values() if not others]
    without = [item for item in items if not item.split]
    if without and len(without) < len(items):
        fault = f"has no split for {len(without)} of {len(items)} images (the first is {without[0].path!r})"
        report.stop(manifest, fault, "Fill in the column split in every row, or remove the column.")
    return _without_masks(items, manifest, report)


def _columns(heading: Sequence[str], named: Mapping[str, str], columns: Mapping[str, str]) -> dict[str, int]:
    """Return our name -> index of the column. Raises tables.TableError for a missing or repeated column."""
    names = [tables.folded(name) for name in heading]
    has = f"its columns: {', '.join(heading)}"
    missing = {ours for ours in ("path", "label", *columns) if named[ours] not in names}
    if renamed := sorted(missing & columns.keys()):
        fault = " and ".join(f"no column {columns[ours]!r}, set as columns.{ours}" for ours in renamed)
        raise tables.TableError(f"has {fault} ({has})", "Correct columns in the params file.")
    if missing:
        fault = f"has no column {' and no column '.join(sorted(missing))} ({has})"
        fix = "Rename the columns to path, label and, where known, split and patient, or map them in the "
        fix += "params file, as in columns: {path: File, label: Diagnosis}."
        raise tables.TableError(fault, fix)
    for ours, name in named.items():
        if names.count(name) > 1:
            fault = f"has {names.count(name)} columns for {ours} ({has})"
            raise tables.TableError(fault, "Rename all except the correct one.")
    return {ours: names.index(name) for ours, name in named.items() if name in names}


def _of_row(root: Path, folder: Path, cells: Mapping[str, str]) -> Listed | tuple[FaultKind, str, str]:
    """Return the file that a row lists, or the kind of the row's fault, the fault and the fix."""
    path = inside(root, folder, cells["path"])
    split = SPLITS.get(cells.get("split", "").casefold() or "all")
    if path is None:
        fix = "Copy the image into that folder and correct the path, or remove the row."
        return "path outside the data set", f"leads out of {root}", fix
    if not path:
        fix = "Correct the path, relative to the manifest, or remove the row."
        return "missing file", f"no such file inside {root}", fix
    if not cells["label"]:
        return "missing label", "the label is empty", "Fill it in or remove the row."
    if split is None:
        fault = f"the split {cells['split']!r} is not train, val or test"
        return "unknown split", fault, "Correct it, or leave it empty."
    return Listed(path, cells["label"], split, cells.get("patient", ""))


def _without_masks(items: list[Listed], manifest: str, report: IngestReport) -> list[Listed]:
    """Remove images that, by their names, are the known region of another listed image."""
    stems = {_stem(item.path): item.path for item in items}
    kept: list[Listed] = []
    for item in items:
        mask = MASK_STEM.fullmatch(_stem(item.path))
        if mask and mask[1] in stems:
            fault = f"is listed in {manifest}, but its name marks it as the known region of {stems[mask[1]]}"
            fix = "Remove the row, or rename the file if it is an image."
            report.leave_out(item.path, "known region listed as an image", fault, fix)
        else:
            kept.append(item)
    return kept


def _stem(path: str) -> str:
    return Path(path).with_name(stack.stem(Path(path).name)).as_posix().casefold()


def inside(root: Path, folder: Path, path: str) -> str | None:
    """Return ``path``, relative to ``folder``, as a path relative to ``root``; "" if it is not a file.

    Returns None for a path that leads out of ``root``, whether or not a file exists there.
    """
    top, relative = Path(os.path.abspath(root)), None
    for spelling in (path, path.replace("\\", "/")):  # the second spelling is for paths written on Windows
        named = Path(os.path.abspath(folder / spelling))
        file, _ = stack.split(named)  # the file of a frame or slice
        if not named.is_relative_to(top) or not _real(file).is_relative_to(_real(top)):
            relative = None
        elif _is_file(file):
            return named.relative_to(top).as_posix()
        else:
            relative = ""
    return relative


def _real(file: Path) -> Path:
    """Resolve links. Unlike Path.resolve, raise no error for links in a circle."""
    try:
        return Path(os.path.realpath(file))
    except ValueError:  # a null byte; no such file exists
        return file


def _is_file(file: Path) -> bool:
    try:
        return file.is_file()
    except (OSError, ValueError):  # for example, the name is too long
        return False


def _entries(folder: Path) -> list[Path]:
    """Return the sorted content of a folder without hidden files and those of file managers."""
    return sorted(filter(_is_seen, folder.iterdir()))


def _is_seen(entry: Path) -> bool:
    return not entry.name.startswith(".") and entry.name.casefold() not in _CLUTTER


def _files(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """Yield all files in a folder and its subfolders; follow links, but never in a circle."""
    real = folder.resolve()
    for entry in _entries(folder) if real not in above else ():
        if entry.is_dir():
            yield from _files(entry, (*above, real))
        else:
            yield entry


def is_image(file: Path) -> bool:
    """Return whether a file has an image suffix, or DICOM's mark, because scanners may omit the suffix."""
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
    """Return whether a folder is a split. A folder "all" without subfolders is a class, a leukaemia."""
    name = folder.name.casefold()
    return name in SPLITS and (name != "all" or any(entry.is_dir() for entry in _entries(folder)))


def label_of(spelled: str) -> str:
    """Normalise a label: composed Unicode without surrounding spaces."""
    return unicodedata.normalize("NFC", spelled).strip()


def with_patients(listed: list[Listed], pattern: str | None, report: IngestReport) -> list[Listed]:
    """Give each file without a patient the patient that ``pattern`` finds in its path."""
    if pattern is None:
        return listed
    try:
        expression = re.compile(pattern)
    except re.error as error:
        report.stop("patient_pattern", f"{pattern!r} is not a regular expression ({error})", "Correct it.")
        return listed
    if expression.groups != 1:
        fix = r"Make the patient the only group, as in 'person(\d+)_'; begin other groups with (?:."
        report.stop("patient_pattern", f"{pattern!r} has {expression.groups} groups instead of one", fix)
        return listed
    patients = {item.path: (match[1] or "") for item in listed if (match := expression.search(item.path))}
    named = [replace(item, patient=item.patient or patients.get(item.path, "")) for item in listed]
    without = [item.path for item in named if item.path and not item.patient]
    if without and not any(patients.values()):
        fault = f"{pattern!r} matches no image (the first is {without[0]!r})"
        report.stop("patient_pattern", fault, "Correct it, or set it to null.")
    elif without:
        fault = f"{pattern!r} finds no patient in {len(without)} images (the first is {without[0]!r})"
        fix = "Nothing to do if each of them belongs to a different patient."
        report.mention("patient_pattern", "images without a patient", fault, fix)
    return named


def check_spellings(listed: Iterable[Listed], report: IngestReport) -> None:
    """Report as fatal each label with several spellings, by case, spaces, hyphens or underscores."""
    spellings: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for item in listed:
        folded = unicodedata.normalize("NFKC", item.label).casefold()
        spellings[re.sub(r"[\s_-]+", " ", folded).strip()][item.label].append(item.path)
    for variants in spellings.values():
        if len(variants) > 1:
            seen = ", ".join(f"{label!r} as in {min(paths)!r}" for label, paths in sorted(variants.items()))
            fault = f"the label is spelled in {len(variants)} ways: {seen}"
            report.stop(min(variants), fault, "Choose one spelling and rename the others.")
