"""A data set's folders or CSV -> checked records, and one report of every fault in it.

What is read from ``root``:

    {split}/{class}/**/x.png   split is train, val (valid, validation), test, or all: no official split
    {class}/**/x.png           no official split
    a CSV manifest             columns path, label, and optionally split and patient

A manifest comes with the pictures and is not trusted: what it names has to lie in ``root``, whether by
``..``, by an absolute path or by a link. Links in folders of classes are their owner's, and are followed.

Ground truth for measuring masks is never a picture: the folder ``masks`` at the top, and ``x_mask.png``
(or ``x_mask_1.png``) beside ``x.png``. Hidden files and those of file managers are ignored.

Faults are of three weights. *Left out*: the picture cannot be used, the data set can (broken bytes, no
picture, no label, one picture under two labels, ...). *Reported*: kept as it is, but a reader of the results
has to know (the same bytes in train and test: the official split stays). *Fatal*: nothing could be trusted
(a label in two spellings, a class without pictures, one class only, ...); then one ``IngestError``
names every fault of every weight.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from medfocus import images
from medfocus.records import Record, chunks
from medfocus.shards import Shards

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")
_SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val"}
_SPLITS |= {"test": "test", "testing": "test", "all": ""}
_AT_ONCE = 1000  # pictures of which the cache is asked together
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
class Ingested:
    """A data set that can be used."""

    records: list[Record]  # sorted by path
    left_out: list[Fault]  # what is not among the records
    reported: list[Fault]  # what is, although a reader of the results has to know of it


class IngestError(ValueError):
    """The data set cannot be used. The text lists every fault; so do the three lists."""

    def __init__(self, root: Path, fatal: list[Fault], left_out: list[Fault], reported: list[Fault]) -> None:
        self.fatal, self.left_out, self.reported = fatal, left_out, reported
        text = [f"{root}: {len(fatal)} fault(s) keep this data set from being used; mend all, ingest again."]
        for heading, faults in (("", fatal), ("left out:", left_out), ("kept, but:", reported)):
            text += [heading] if heading and faults else []
            text += [f"  {fault.path}: {fault.fault}. {fault.fix}" for fault in faults]
        super().__init__("\n".join(text).encode("utf-8", "backslashreplace").decode())


def ingest(
    root: Path,
    *,
    manifest: str | None = None,
    patient_pattern: str | None = None,
    workers: int | None = None,
    progress: bool = False,
    cache: str | Path | None = None,
) -> Ingested:
    """Read, open and check every picture of the data set at ``root``.

    Args:
        root: The data set's folder; record paths are relative to it.
        manifest: A CSV inside ``root`` that lists the pictures; its paths are relative to its own folder.
        patient_pattern: A regular expression whose one group, searched for in each relative path, is the
            patient. A patient that the manifest gives has precedence.
        workers: Threads that open pictures; None takes one a core.
        progress: Whether a bar is shown.
        cache: A folder, or what fsspec knows, that keeps by their bytes what decoding said of good pictures:
            those in it are read and not decoded again.

    Raises:
        FileNotFoundError: ``root`` or the manifest does not exist.
        IngestError: All faults at once, where at least one is fatal.
    """
    if not root.is_dir():
        raise FileNotFoundError(
            f"{root}: no such folder; give the folder that holds the data set's pictures."
        )
    report = _Report()
    listed = _list_folders(root, report) if manifest is None else _list_manifest(root, manifest, report)
    listed = _with_patients(listed, patient_pattern, report)
    _check_spellings(listed, report)
    known = None if cache is None else Shards(f"{cache}/{images.decoder_key(__file__)}", ".json")
    records = _open_all(root, [item for item in listed if item.path], workers, progress, known, report)
    records = _check_bytes(records, report)
    _check_classes({_label(item.label) for item in listed}, records, report)
    if report.fatal:
        raise IngestError(root, report.fatal, report.left_out, report.reported)
    return Ingested(sorted(records, key=lambda r: r.path), report.left_out, report.reported)


def write_left_out(left_out: Iterable[Fault], path: Path) -> None:
    """Write faults as CSV: path, fault, fix."""
    with path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Fault)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(fault) for fault in left_out)


@dataclass(frozen=True)
class _Listed:
    """A file that is to become a record; path "" stands for a class folder without any."""

    path: str
    label: str  # as it is spelled
    split: str
    patient: str


class _Report:
    def __init__(self) -> None:
        self.fatal: list[Fault] = []
        self.left_out: list[Fault] = []
        self.reported: list[Fault] = []

    def stop(self, path: str, fault: str, fix: str) -> None:
        self.fatal.append(Fault(path, fault, fix))

    def leave_out(self, path: str, fault: str, fix: str) -> None:
        self.left_out.append(Fault(path, fault, fix))

    def mention(self, path: str, fault: str, fix: str) -> None:
        self.reported.append(Fault(path, fault, fix))


def _list_folders(root: Path, report: _Report) -> list[_Listed]:
    tops = [entry for entry in _entries(root) if entry.name.casefold() != _MASKS]
    folders = [entry for entry in tops if entry.is_dir()]
    splits = {folder: _SPLITS[folder.name.casefold()] for folder in folders if _is_split(folder)}
    if "" in splits.values() and len(splits) > 1:
        names = ", ".join(folder.name for folder in splits)
        report.stop("all", f"stands beside split folders ({names})", "Keep either all or the others.")
    for folder in folders if splits else []:
        if folder not in splits and (count := sum(map(_is_picture, _files(folder)))):
            fault = f"holds {count} pictures beside the split folders, but is none itself"
            fix = "Move them into train, val, test or all to have them in."
            report.leave_out(folder.name, fault, fix)
    loose = [entry for folder in (root, *splits) for entry in _entries(folder) if _is_picture(entry)]
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


def _list_class(root: Path, folder: Path, split: str, report: _Report) -> list[_Listed]:
    """The pictures of one class folder, in it and below."""
    files = list(_files(folder))
    pictures = {(file.parent, file.stem.casefold()) for file in files if _is_picture(file)}
    listed: list[_Listed] = []
    for file in files:
        path = file.relative_to(root).as_posix()
        mask = _MASK_STEM.fullmatch(file.stem.casefold())
        if mask and (file.parent, mask[1]) in pictures:
            continue
        if not _is_picture(file):
            known = ", ".join(suffix[1:] for suffix in SUFFIXES)
            fault = f"is by its name no picture of a known format ({known})"
            report.leave_out(path, fault, "Export it as PNG, or remove it.")
        elif path.encode("utf-8", "replace").decode() != path:
            report.leave_out(path, "has a name that is not valid UTF-8", "Rename it.")
        else:
            listed.append(_Listed(path, folder.name, split, ""))
    return listed or [_Listed("", folder.name, split, "")]


def _list_manifest(root: Path, manifest: str, report: _Report) -> list[_Listed]:
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
    listed: dict[str, set[_Listed]] = defaultdict(set)
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
            listed[path].add(_Listed(path, given["label"], split, given.get("patient", "")))
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
        file = Path(os.path.abspath(folder / spelling))
        if not file.is_relative_to(top) or not _real(file).is_relative_to(_real(top)):
            found = None
        elif _is_file(file):
            return file.relative_to(top).as_posix()
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


def _is_picture(file: Path) -> bool:
    return file.suffix.casefold() in SUFFIXES and not file.is_dir()


def _is_split(folder: Path) -> bool:
    """Whether a top folder is a split. "all" is a leukaemia as well: without folders inside it is a class."""
    name = folder.name.casefold()
    return name in _SPLITS and (name != "all" or any(entry.is_dir() for entry in _entries(folder)))


def _label(spelled: str) -> str:
    return unicodedata.normalize("NFC", spelled).strip()


def _with_patients(listed: list[_Listed], pattern: str | None, report: _Report) -> list[_Listed]:
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


def _check_spellings(listed: Iterable[_Listed], report: _Report) -> None:
    spellings: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for item in listed:
        folded = unicodedata.normalize("NFKC", item.label).casefold()
        spellings[re.sub(r"[\s_-]+", " ", folded).strip()][item.label].append(item.path)
    for variants in spellings.values():
        if len(variants) > 1:
            seen = ", ".join(f"{label!r} as in {min(paths)!r}" for label, paths in sorted(variants.items()))
            fault = f"the label is spelled in {len(variants)} ways: {seen}"
            report.stop(min(variants), fault, "Choose one spelling and rename the others.")


class _Facts(NamedTuple):
    """What decoding a picture says of it."""

    width: int
    height: int
    mode: str
    frames: int


def _open_all(
    root: Path,
    files: Sequence[_Listed],
    workers: int | None,
    progress: bool,
    known: Shards | None,
    report: _Report,
) -> list[Record]:
    records: list[Record] = []
    with (
        ThreadPoolExecutor(workers or os.cpu_count()) as pool,  # Pillow decodes outside of the GIL
        tqdm(desc="pictures", total=len(files), disable=not progress) as bar,
    ):
        for some in chunks(files, _AT_ONCE):
            there: dict[str, _Facts] = {}
            if known is not None:
                hashes = {sha for sha in pool.map(lambda item: _hash(root, item), some) if sha}
                there = {sha: _Facts(*json.loads(facts)) for sha, facts in known.read(hashes)}
            opened = pool.map(lambda item, there=there: _open(root, item, there), some)
            for item, result in zip(some, opened, strict=True):
                bar.update()
                if isinstance(result, images.PictureError):
                    report.leave_out(item.path, result.fault, result.fix)
                    continue
                sha, facts = result
                size = (facts.width, facts.height, facts.mode)
                label = _label(item.label)
                records.append(Record(item.path, sha, *size, label, item.split, item.patient))
                if facts.frames > 1:
                    fault = f"holds {facts.frames} pictures, of which the first is used"
                    report.mention(item.path, fault, "Export each as a file of its own.")
                if known is not None and sha not in there:
                    known.put([(sha, json.dumps(facts).encode())])
    if known is not None:
        known.close()
    return records


def _hash(root: Path, item: _Listed) -> str | None:
    """sha256 hex over a file's bytes; None where they cannot be read, of which ``_open`` tells."""
    try:
        return hashlib.sha256(images.read_bytes(root / item.path, item.path)).hexdigest()
    except (OSError, images.PictureError):
        return None


def _open(root: Path, item: _Listed, known: Mapping[str, _Facts]) -> tuple[str, _Facts] | images.PictureError:
    """One file's sha256 and facts, or why it is no picture; decoded where it is not ``known``."""
    try:
        data = images.read_bytes(root / item.path, item.path)
        sha256 = hashlib.sha256(data).hexdigest()
        if sha256 in known:
            return sha256, known[sha256]
        picture = images.open_picture(data, item.path)
        images.to_rgb(picture, item.path)
        frames = _frames(data, item.path) if picture.format == "TIFF" else 1
    except OSError as error:
        return images.PictureError(item.path, f"cannot be read ({error.strerror})", "Copy or link it again.")
    except images.PictureError as error:
        return error
    return sha256, _Facts(picture.width, picture.height, picture.mode, frames)


def _frames(data: bytes, name: str) -> int:
    try:
        with images.read_header(data, name) as stack:
            return getattr(stack, "n_frames", 1)
    except Exception as error:  # as in ``images.open_picture``
        fault = f"holds several pictures, of which a later one is broken ({error})"
        raise images.PictureError(name, fault, "Export the first as PNG, or remove it.") from error


def _check_bytes(records: list[Record], report: _Report) -> list[Record]:
    """Leave out what has two labels, and report what is in two splits."""
    same: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        same[record.sha256].append(record)
    torn: set[str] = set()
    for record in records:
        twins = same[record.sha256]
        if other := next((twin for twin in twins if twin.label != record.label), None):
            torn.add(record.path)
            fault = f"holds the same bytes as {other.path}, which has another label, {other.label!r}"
            report.leave_out(record.path, fault, "Decide which label is right and remove the other file.")
        elif record.split == "test" and (other := next((t for t in twins if t.split != "test"), None)):
            fault = f"holds the same bytes as {other.path}, so this test picture is seen in training"
            report.mention(record.path, fault, "Kept in the official test set; the clean one is without it.")
    return [record for record in records if record.path not in torn]


def _check_classes(labels: set[str], records: Sequence[Record], report: _Report) -> None:
    """What makes a data set: two classes or more, each with pictures to train on."""
    splits: dict[str, set[str]] = {label: set() for label in sorted(labels)}
    for record in records:
        splits[record.label].add(record.split)
    official = any(record.split == "test" for record in records)
    for label, present in splits.items():
        if not present:
            report.stop(label, "the class has no usable picture", "Add pictures, or remove the class.")
        elif official and present == {"test"}:
            report.stop(label, "the class has test pictures but none to train on", "Add some, or remove it.")
        elif official and "test" not in present:
            fix = "Add some; until then its recall cannot be measured."
            report.mention(label, "the class has no test picture", fix)
    if not labels and not report.fatal:
        fix = "Give a folder of split/class/*.png, of class/*.png, or a CSV manifest."
        report.stop(".", "no class folder was found", fix)
    elif len(labels) == 1:
        fix = "Add another; if this folder only wraps the data set, give the folder inside it."
        report.stop(".", f"there is one class only, {min(labels)!r}", fix)
