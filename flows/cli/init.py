"""A folder or a table of images -> a commented params file of a study, checked as the pipeline does."""

from __future__ import annotations

import json
import os
import re
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import yaml

from flows.cli.columns import propose
from flows.cli.modality import Guess, guess, look_at, told
from flows.study.params import Modality, load_params
from medfocus.clip.prompts import TEMPLATES
from medfocus.datasets import pseudonyms
from medfocus.datasets.duplicates import find_duplicates, groups, twins
from medfocus.datasets.ingest import Ingested, ingest
from medfocus.datasets.listing import unwrapped
from medfocus.datasets.records import spread_over_classes
from medfocus.datasets.splits import Splits, draw_splits
from medfocus.images import decode
from medfocus.images.stack import MARK
from medfocus.reports.data_warnings import data_warnings
from medfocus.storage import atomic, tables

_PERCENTS = (5, 10, 20, 50, 100)
_SEEDS = (0, 1, 2)
_GLANCED = 16  # images that the guess of the modality looks at
_KNOWN_WORDS = {
    "notumor": "no tumor",
    "nofinding": "no finding",
    "nofindings": "no findings",
    "tb": "tuberculosis",
    "covid": "COVID-19",
    "covid19": "COVID-19",
}
_WIDTH = 110


@dataclass(frozen=True)
class Described:
    """A data set that a study can be made of."""

    name: str
    root: Path
    manifest: str | None
    columns: dict[str, str]  # of the manifest, where they have other names
    patient_pattern: str | None
    found: Ingested
    splits: Splits
    warnings: list[str]  # without a file's name: they stand in the params file
    modality: Guess
    names: dict[str, str]  # label -> words

    @property
    def counts(self) -> dict[str, tuple[int, int]]:
        """Class -> images to train on and to test on."""
        labels = {record.path: record.label for record in self.found.records}
        train, test = (
            Counter(labels[path] for path in part) for part in (self.splits.train, self.splits.test)
        )
        return {label: (train[label], test[label]) for label in self.splits.classes}

    @property
    def percents(self) -> list[int]:
        """Those that leave each class an image, without one that leaves no more than the one before."""
        smallest = min(train for train, _ in self.counts.values())
        sizes: dict[int, int] = {}
        for percent in _PERCENTS:
            if (size := round(smallest * percent / 100)) >= 1:
                sizes.setdefault(size, percent)
        return list(sizes.values())


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
    """Look at every image of ``data``, as the stages of a study will; what they cache they find again.

    Args:
        data: A folder of classes or of splits, or that only wraps one; or a table that lists images.
        home: The project, in whose caches images and thumbnails are kept.
        root: Of a table, the folder that its paths stay in; None for the table's own.
        name: Of the data set; None for that of the folder or the table.
        columns: What the table calls path, label, split and patient, as far as it is known.
        modality: Where it is known; None guesses.
        patient_pattern: A regular expression whose one group is the patient.
        test_fraction: Of a test set that is drawn, where there is no official one.

    Raises:
        FileNotFoundError: There is no such folder or table.
        ValueError: The data set cannot be used, with every fault; or there are too few images.
    """
    folder, manifest = _place(data, root)
    named = propose(data, folder, columns or {}) if manifest else {}
    caches = home / ".cache"
    shown = sys.stderr.isatty()
    found = ingest(
        folder,
        manifest=manifest,
        columns=named,
        patient_pattern=patient_pattern,
        progress=shown,
        cache=caches / "images",
        salt_file=home / pseudonyms.FILE,
    )
    records = found.records
    pairs = find_duplicates(records, folder, progress=shown, cache=caches / "thumbnails")
    try:
        splits = draw_splits(
            records,
            groups(records, pairs),
            groups(records, twins(pairs)),
            test_fraction=test_fraction,
            fractions=[1.0],
            shots=[],
            seeds=[0],
        )
    except ValueError as error:
        raise ValueError(f"{data}: {error}") from error
    labels = [record.label for record in records]
    glanced = [folder / records[i].path for i in spread_over_classes(labels, _GLANCED)]
    given = Path(os.path.abspath(data))
    texts = [folder.name, given.stem, *splits.classes]
    if modality:
        known = Guess(modality, "as it was given")
    else:
        known = told(map(decode.modality_and_body_part, glanced)) or guess(texts, look_at(glanced))
    duplicates = [_duplicates(len(twins(pairs)), len(pairs), len(records))] if pairs else []
    return Described(
        name=name or slug(given.stem if manifest else given.name),
        root=folder,
        manifest=manifest,
        columns=named,
        patient_pattern=patient_pattern,
        found=found,
        splits=splits,
        warnings=[*_of_ingestion(found), *duplicates, *data_warnings(records, splits, pairs)],
        modality=known,
        names=readable(splits.classes),
    )


def write(described: Described, path: Path, base: Path, *, force: bool = False) -> None:
    """Write a study's params file at ``path`` that extends ``base``; it is loaded before it takes its place.

    Raises FileExistsError where there is a file and no ``force``, ValueError where ``base`` does not go with
    it.
    """
    if path.exists() and not force:
        raise FileExistsError(
            f"{path} is there already, and it may have been edited. Give another --out or --name, or --force."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.stem}.{os.getpid()}.yaml")
    try:
        beside.write_text(text(described, path.parent, base), encoding="utf-8")
        try:
            load_params(beside)
        except ValueError as error:
            raise ValueError(f"{base}: a study of {described.name} cannot extend it. {error}") from error
        atomic.write(path, beside.read_bytes())
    finally:
        beside.unlink(missing_ok=True)


def text(described: Described, folder: Path, base: Path) -> str:
    """The params file as it stands in ``folder``; every choice in it with its reason."""
    official = any(record.split == "test" for record in described.found.records)
    test = "an official test set" if official else "a test set that is drawn from them"
    known = described.modality
    own = any(described.names[label] != label for label in described.names)
    lines = [
        f"# {len(described.found.records)} images in {len(described.splits.classes)} classes, with {test}:",
        *(
            f"#   {' '.join(label.split())}: {train} to train on, {test} to test on"
            for label, (train, test) in described.counts.items()
        ),
        "#",
        *(["# To know before a number is believed:"] if described.warnings else ["# Nothing to warn of."]),
        *(line for warning in described.warnings for line in _comment(f"- {warning}")),
        "#",
        "# What is left out here stands in the file that this one extends, each number with a comment.",
        f"extends: {_yaml(_relative(base, folder))}",
        "",
        "study:",
        f"  name: {_yaml(described.name)}",
        "  methods:                       # method: focus modes to run it with",
        "    pixels: [none]",
        "    clip-zero-shot: [none, multiply, crop]",
        "    clip-linear-probe: [none]",
        "    clip-few-shot: [none]",
        "    medfocusclip: [none, multiply, crop, inverse, shuffled]  # the last two are controls",
        f"  percents: {_yaml(described.percents)}  # of each class's training images; at least one",
        "  shots: []                      # and, or instead, images per class",
        f"  seeds: {_yaml(list(_SEEDS))}               # one support set each; more make narrower intervals",
        "  only: {}",
        "",
        "datasets:",
        f"  {_yaml(described.name)}:",
        f"    root: {_yaml(_root(described.root, folder, base.parent))}",
        f"    manifest: {_yaml(described.manifest)}",
        *_columns(described.columns),
        "    # A regular expression over the path whose one group is the patient, such as 'person(\\d+)_'.",
        f"    # {_PATIENTS[all(record.patient for record in described.found.records)]}",
        f"    patient_pattern: {_yaml(described.patient_pattern)}",
        *_comment(f"{_said(known)} One of {', '.join(get_args(Modality))}.", 4),
        f"    modality: {_yaml(known.modality)}",
        "    # The words for a class in a text prompt"
        + (", made from its name: read them, CLIP does." if own else "."),
        "    names:",
        *(f"      {_yaml(label)}: {_yaml(words)}" for label, words in described.names.items()),
        "    # Text prompts with {c} for the class. Empty: those of the modality, which are",
        *(f"    #   {template}" for template in TEMPLATES[known.modality]),
        "    templates: []",
        *(_SLICES if any(_is_slice(record.path) for record in described.found.records) else []),
        *_comment(_FLIP[known.modality == "other"], 4),
        f"    flip: {_yaml(known.modality not in ('chest_xray', 'other'))}",
        "",
        "phantoms: {}",
        "",
        "report:",
        "  baseline: clip-linear-probe    # what the others are compared with",
        "  published: null",
        "",
        "# The embedded models are small and have seen drawn images alone. `medfocus models` says",
        "# which others are here and fetches them; their names then stand here, such as",
        "# clip: {model: ViT-B-16, pretrained: openai}",
        "# masks: {config: sam2.1_hiera_tiny, checkpoint: facebook/sam2.1-hiera-tiny, image_size: 1024}",
    ]
    return "\n".join(lines) + "\n"


_PATIENTS = {
    False: "With it no patient is in train and in test; without it nobody knows.",
    True: "Every image's patient is known already: none is in train and in test.",
}
_SLICES = [
    "    # How volumes are cut: axis 0 gives sagittal slices, 1 coronal, 2 axial; every so many'th is taken.",
    "    slices: {axis: 2, every: 1}",
]
_FLIP = {
    False: "Whether views may be mirrored; never for chest films, whose heart is on one side.",
    True: "Whether views may be mirrored. True only where left and right are alike.",
}


def _is_slice(path: str) -> bool:
    return re.search(f"{MARK}[xyz]=", path) is not None


def readable(labels: Iterable[str]) -> dict[str, str]:
    """Labels -> words for a text prompt: one case, spaces between words, known words written out."""
    labels = list(labels)
    return {label: _readable(label) for label in labels}


def slug(text: str) -> str:
    """A name that a data set may have: letters, digits, hyphens and underscores."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", text).strip("-_") or "images"


def _readable(label: str) -> str:
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", label).replace("_", " ").replace("-", " ").split()
    told = [_KNOWN_WORDS.get(word.casefold(), word.casefold() if len(word) > 3 else word) for word in words]
    return " ".join(word if word.isupper() else word[:1].lower() + word[1:] for word in told) or label


def _columns(columns: Mapping[str, str]) -> list[str]:
    pairs = ", ".join(f"{ours}: {_yaml(theirs)}" for ours, theirs in columns.items())
    said = "    # What the table calls them; A GUESS from its values, where it was not given: read it."
    return [said, f"    columns: {{{pairs}}}"] if columns else []


def _place(data: Path, root: Path | None) -> tuple[Path, str | None]:
    if data.is_dir():
        if root is not None:
            raise ValueError(f"{root}: --root is for a table, and {data} is a folder. Leave it out.")
        return unwrapped(Path(os.path.abspath(data))), None
    if not data.is_file():
        raise FileNotFoundError(f"{data}: no such folder or CSV; give the folder that holds the images.")
    if data.suffix.casefold() not in (*tables.SUFFIXES, *tables.SPREADSHEETS):
        known = ", ".join(suffix[1:] for suffix in tables.SUFFIXES)
        raise ValueError(
            f"{data}: is neither a folder nor a table ({known}). Give the folder that holds the images."
        )
    folder, file = Path(os.path.abspath(root or data.parent)), Path(os.path.abspath(data))
    if not file.is_relative_to(folder):
        raise ValueError(
            f"{data}: lies outside of --root {root}. Give a folder that holds both it and the images."
        )
    return folder, file.relative_to(folder).as_posix()


def _of_ingestion(found: Ingested) -> list[str]:
    said = []
    if number := len(found.left_out):
        some = "1 file is" if number == 1 else f"{number} files are"
        said.append(f"{some} left out; a run lists them in reports/data/<name>/left_out.csv.")
    if number := len(found.reported):
        some = "1 thing is" if number == 1 else f"{number} things are"
        said.append(f"{some} kept, but to be known: reports/data/<name>/reported.csv.")
    return said


def _duplicates(same: int, pairs: int, images: int) -> str:
    some = "pair" if pairs == 1 else "pairs"
    return f"{pairs} {some} among {images} images are the same one ({same}) or nearly so ({pairs - same})."


def _said(known: Guess) -> str:
    if known.reason == "as it was given":
        return "As it was given."
    return f"A GUESS, {known.reason}; look at some images and correct it."


def _comment(sentence: str, indent: int = 0) -> list[str]:
    start = " " * indent + "# "
    further = start + ("  " if sentence.startswith("- ") else "")
    return textwrap.wrap(sentence, _WIDTH, initial_indent=start, subsequent_indent=further)


def _yaml(value: object) -> str:
    """A value on one line; strings in quotes where YAML would read them as something else."""
    if isinstance(value, str):
        plain = re.fullmatch(r"[A-Za-z./][A-Za-z0-9 ./_-]*", value) and value == value.strip()
        return value if plain and yaml.safe_load(value) == value else json.dumps(value, ensure_ascii=False)
    return json.dumps(value)


def _relative(path: Path, folder: Path) -> str:
    return Path(os.path.relpath(path, folder)).as_posix()


def _root(root: Path, folder: Path, home: Path) -> str:
    """Relative inside of the project, which may move with its images; else absolute."""
    return _relative(root, folder) if root.is_relative_to(home) else root.as_posix()


def summary(described: Described) -> list[Sequence[str]]:
    """A row a class: its name, its words, images to train on and to test on."""
    return [
        (label, described.names[label], str(train), str(test))
        for label, (train, test) in described.counts.items()
    ]


def faults(found: Ingested, most: int = 10) -> list[str]:
    """What was left out and what is to be known, a line each, the first ones of many."""
    every = [*found.left_out, *found.reported]
    lines = [f"{fault.path}: {fault.fault}. {fault.fix}" for fault in every[:most]]
    return lines + ([f"and {len(every) - most} more"] if len(every) > most else [])
