"""The commented params file that ``medfocus init`` writes."""

from __future__ import annotations

import json
import os
import re
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import get_args

import yaml

from flows.cli.init.dataset import GIVEN, Described
from flows.cli.init.modality import Guess
from flows.study.params import Modality, load_params
from medfocus.clip.prompts import TEMPLATES
from medfocus.images.stack import MARK
from medfocus.storage import atomic

_SEEDS = (0, 1, 2)
_WIDTH = 110
_PATIENTS = {
    False: "With a pattern, no patient is in both train and test. Without it, that is unknown.",
    True: "The patient of every image is known: no patient is in both train and test.",
}
_SLICES = [
    "    # Slices of volumes: axis 0 is sagittal, 1 coronal, 2 axial; every: 2 takes every second slice.",
    "    slices: {axis: 2, every: 1}",
]
_FLIP = {
    False: "Whether views may be mirrored; never for chest films, because the heart is on one side.",
    True: "Whether views may be mirrored; true only if left and right are alike.",
}


def write(described: Described, path: Path, base: Path, *, force: bool = False) -> None:
    """Write a study's params file that extends ``base``. A temporary file is loaded first, as a check.

    Raises:
        FileExistsError: The file exists and ``force`` is False.
        ValueError: ``base`` does not fit the file.
    """
    if path.exists() and not force:
        raise FileExistsError(
            f"{path} already exists and may contain your changes. Give another --out or --name, or --force."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.yaml")
    try:
        temporary.write_text(text(described, path.parent, base), encoding="utf-8")
        try:
            load_params(temporary)
        except ValueError as error:
            raise ValueError(f"{base}: a study of {described.name} cannot extend it. {error}") from error
        atomic.write(path, temporary.read_bytes())
    finally:
        temporary.unlink(missing_ok=True)


def text(described: Described, folder: Path, base: Path) -> str:
    """Return the text of a params file in ``folder``, with a reason for every choice."""
    lines = [*_head(described), *_study(described, folder, base), *_dataset(described, folder, base.parent)]
    return "\n".join([*lines, *_TAIL]) + "\n"


def _head(described: Described) -> list[str]:
    records = described.ingested.records
    official = any(record.split == "test" for record in records)
    test_set = "an official test set" if official else "a drawn test set"
    return [
        f"# {len(records)} images in {len(described.splits.classes)} classes, with {test_set}:",
        *(
            f"#   {' '.join(label.split())}: {train} to train on, {test} to test on"
            for label, (train, test) in described.counts.items()
        ),
        "#",
        "# Warnings about the results:" if described.warnings else "# No warnings.",
        *(line for warning in described.warnings for line in _comment(f"- {warning}")),
        "#",
    ]


def _study(described: Described, folder: Path, base: Path) -> list[str]:
    return [
        "# The following file has all settings that are not here, with comments.",
        f"extends: {_yaml(_relative(base, folder))}",
        "",
        "study:",
        f"  name: {_yaml(described.name)}",
        "  methods:                       # method: focus modes to run it with",
        "    pixels: [none]",
        "    clip-zero-shot: [none, multiply, crop]",
        "    clip-linear-probe: [none]",
        "    medfocusclip: [none, multiply, dual-crop, inverse, shuffled-crop]  # the last two are controls",
        "    medfocusclip-full: [none]    # may train the encoder's last blocks: minutes a fit",
        f"  percents: {_yaml(described.percents)}  # of each class's training images; at least one",
        "  shots: []                      # images per class, in addition or instead",
        f"  seeds: {_yaml(list(_SEEDS))}               # one support set each; more give narrower intervals",
        "  only:                          # a method's part of percents, shots and seeds; more takes longer",
        f"    medfocusclip-full: {{percents: {_yaml(described.percents[-1:])}, shots: [], "
        f"seeds: [{_SEEDS[0]}]}}",
        f"  schedule: {_schedule(base):<21} # of the methods: small for the embedded models, else published",
        "",
    ]


def _schedule(base: Path) -> str:
    """Return the schedule for the CLIP of the file that the study extends."""
    return "small" if load_params(base).clip.embedded else "published"


def _dataset(described: Described, folder: Path, home: Path) -> list[str]:
    records = described.ingested.records
    modality = described.modality.modality
    changed = any(described.names[label] != label for label in described.names)
    return [
        "datasets:",
        f"  {_yaml(described.name)}:",
        f"    root: {_yaml(_root(described.root, folder, home))}",
        f"    manifest: {_yaml(described.manifest)}",
        *_columns(described.columns),
        "    # A regular expression over the path with one group, the patient, such as 'person(\\d+)_'.",
        f"    # {_PATIENTS[all(record.patient for record in records)]}",
        f"    patient_pattern: {_yaml(described.patient_pattern)}",
        *_comment(f"{_reason(described.modality)} One of {', '.join(get_args(Modality))}.", 4),
        f"    modality: {_yaml(modality)}",
        "    # The words for each class in text prompts"
        + (", made from its name: check them, because CLIP reads them." if changed else "."),
        "    names:",
        *(f"      {_yaml(label)}: {_yaml(words)}" for label, words in described.names.items()),
        "    # Text prompts with {c} for the class. If empty, the prompts of the modality:",
        *(f"    #   {template}" for template in TEMPLATES[modality]),
        "    templates: []",
        *(_SLICES if any(_is_slice(record.path) for record in records) else []),
        *_comment(_FLIP[modality == "other"], 4),
        f"    flip: {_yaml(modality not in ('chest_xray', 'other'))}",
        "",
    ]


_TAIL = [
    "phantoms: {}",
    "",
    "report:",
    "  baseline: clip-linear-probe    # the others are compared with it",
    "  published: null",
    "",
    "# The embedded models are small. `medfocus models` lists other models and fetches them; name them here,",
    "# with study.schedule: published, for example:",
    "# clip: {model: ViT-B-16, pretrained: openai}",
    "# masks: {config: sam2.1_hiera_tiny, checkpoint: facebook/sam2.1-hiera-tiny, strategy: grid}",
]


def _columns(columns: Mapping[str, str]) -> list[str]:
    pairs = ", ".join(f"{ours}: {_yaml(theirs)}" for ours, theirs in columns.items())
    note = (
        "    # The table's column names. Names that you did not give are A GUESS from the values: check them."
    )
    return [note, f"    columns: {{{pairs}}}"] if columns else []


def _reason(modality: Guess) -> str:
    if modality.reason == GIVEN:
        return "Given by --modality."
    return f"A GUESS, {modality.reason}; look at some images and correct it."


def _is_slice(path: str) -> bool:
    return re.search(f"{MARK}[xyz]=", path) is not None


def _comment(sentence: str, indent: int = 0) -> list[str]:
    start = " " * indent + "# "
    further = start + ("  " if sentence.startswith("- ") else "")
    return textwrap.wrap(sentence, _WIDTH, initial_indent=start, subsequent_indent=further)


def _yaml(value: object) -> str:
    """Return a value on one line, with quotes around strings that YAML would misread."""
    if isinstance(value, str):
        plain = re.fullmatch(r"[A-Za-z./][A-Za-z0-9 ./_-]*", value) and value == value.strip()
        return value if plain and yaml.safe_load(value) == value else json.dumps(value, ensure_ascii=False)
    return json.dumps(value)


def _relative(path: Path, folder: Path) -> str:
    return Path(os.path.relpath(path, folder)).as_posix()


def _root(root: Path, folder: Path, home: Path) -> str:
    """Return a path relative to the file if the images are in the project, otherwise an absolute path."""
    return _relative(root, folder) if root.is_relative_to(home) else root.as_posix()
