"""What a registered version is and what it was made from, as two Markdown texts.

The model card follows Mitchell et al., arXiv 1810.03993, the data sheet Gebru et al., arXiv 1803.09010. Both
are shown where others see them, so they count images and patients and name none; and neither has a time in
it: the same model on the same data gives the same bytes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np

from medfocus.datasets.duplicates import Pair
from medfocus.datasets.listing import SUFFIXES
from medfocus.datasets.records import Record
from medfocus.datasets.splits import Splits
from medfocus.evaluation import metrics
from medfocus.evaluation.gate import Check
from medfocus.reports.data_warnings import data_warnings, mask_warnings

CARD, SHEET = "card.md", "datasheet.md"  # as files of a version and of its run
FEW = 20  # images of a group, below which its accuracy says little
_CONFUSIONS = 5
_SIZES = 4  # groups by size at most; more sizes are put together by their pixels
# How ingestion's faults begin or go on -> what they are counted as. Their own texts may name files.
_KINDS = (
    (r"another label", "the same bytes under two labels"),
    (r"seen in training", "test image with the same bytes in train"),
    (r"times, with different", "listed several times, with different labels, splits or patients"),
    (r"^the file is empty", "empty file"),
    (r"^is no image in a format", "no image in a format that is read"),
    (r"^is by its name no image", "by its name no image"),
    (r"^cannot be decoded", "cannot be decoded"),
    (r"^cannot be read", "cannot be read"),
    (r"^the file is larger", "larger file than is read"),
    (r"^has .+ pixels", "more pixels than are decoded"),
    (r"^is no ordinary file", "no ordinary file"),
    (r"^holds values that are not finite", "values that are not finite"),
    (r"^holds several images|^holds \d+ (images|volumes), of which", "several images in one file"),
    (r"^holds no image", "DICOM without an image"),
    (r"^is stored as", "stored in a way that cannot be decoded"),
    (r"^promises ", "fewer pixels than are promised"),
    (r"of one shade", "slices of one shade"),
    (r"^has text burnt", "text burnt into the pixels, as the header says"),
    (r"have no window", "DICOM images without a window"),
    (r"without a known patient", "files of several images without a known patient"),
    (r"^is listed by itself", "slice listed twice, with different labels, splits or patients"),
    (r"^holds \d+ images beside", "folder beside the split folders"),
    (r"^lies in no class folder", "in no class folder"),
    (r"^the label is empty", "no label"),
    (r"^no such file|^leads out of", "path in the manifest without a file"),
    (r"^the split ", "unknown split"),
    (r"finds no patient", "no patient by the pattern"),
    (r"^the class has no test image", "class without a test image"),
)


@dataclass(frozen=True)
class Data:
    """A data set as the pipeline sees it."""

    name: str
    modality: str
    licence: str  # "" where nobody has stated it
    records: Sequence[Record]
    splits: Splits
    pairs: Sequence[Pair]  # of duplicates
    left_out: Sequence[str]  # ingestion's faults, by their texts
    reported: Sequence[str]
    statuses: Mapping[str, str]  # path -> the rung of the fallback ladder that its mask comes from
    coverage: Mapping[str, float]  # path -> share of the image inside its mask
    mask_lines: Sequence[Mapping[str, object]]  # of masks.csv
    segmenter: str  # what made the masks, in words
    drift: Sequence[Check]  # of new images against the champion's; none where nothing was compared
    new: int | None  # images that came since the champion was made
    made: Mapping[str, str]  # commit, digests, versions: how to make it again


@dataclass(frozen=True)
class Model:
    """A version of a registered model."""

    name: str
    method: str
    focus: str
    support: str  # "20%", "16-shot"
    seed: int
    learnt: Mapping[str, int]  # class -> images it was fitted on
    settings: Mapping[str, object]
    parts: Mapping[str, str]  # CLIP, segmenter, ... -> which, and the digest of its weights
    pocket: bool  # whether a part is one of the embedded models
    validation: str  # "17 of 24"
    probabilities: np.ndarray  # (N, K) on the whole test set, in the order of ``splits.test``
    labels: np.ndarray  # (N,) integers in [0, K)
    classes: Sequence[str]
    test_sets: Mapping[str, Sequence[str]]  # "official", "clean" -> paths; the first is the whole test set
    checks: Sequence[Check]  # of the gate
    reason: str  # the gate's decision


def model_card(model: Model, data: Data) -> str:
    """The card in Markdown."""
    learnt = sum(model.learnt.values())
    validated = (
        f"{model.validation} right out of fold, inside the support"
        if not model.validation.endswith(" 0")
        else "none"
    )
    lines = [
        f"# Model card: {model.name}",
        "",
        "## Intended use",
        "",
        f"Research on few-shot classification of {data.modality} images into {', '.join(model.classes)}. "
        "**Not for clinical use**: not for diagnosis, triage or treatment, not for images of another kind "
        "or source than those below, not for a class that is not among these; it always answers one.",
        "",
        "## Model",
        "",
        *_table(
            ("", ""),
            [
                ("method", model.method),
                ("focus", model.focus),
                ("support", f"{model.support} of train, {learnt} images, draw {model.seed}"),
                ("validation", validated),
                *model.parts.items(),
                *((f"`{name}`", f"`{value}`") for name, value in sorted(model.settings.items())),
            ],
        ),
        "",
        "## Training data",
        "",
        f"{data.name}; its data sheet is {SHEET}. {_split_kind(data)} {_patients(data)}",
        "",
        *_table(
            ("class", "in train", "learnt from", "in test"),
            [
                (
                    name,
                    _count(data, data.splits.train, name),
                    model.learnt.get(name, 0),
                    _count(data, data.splits.test, name),
                )
                for name in model.classes
            ],
        ),
        "",
        "## Metrics",
        "",
        "In brackets the 95 % Wilson interval, which takes images for independent: where a patient has "
        "several, it is too narrow.",
        "",
        *_scores(model, data),
        "",
        "## Where it fails",
        "",
        *_failures(model, data),
        "",
        "## The gate's decision at its registration",
        "",
        model.reason,
        "",
        *checks_table(model.checks),
        "",
        "## Limits",
        "",
        *(f"- {said}" for said in _limits(model, data)),
    ]
    return "\n".join(lines) + "\n"


def data_sheet(data: Data) -> str:
    """The data sheet in Markdown."""
    records = data.records
    sides = {"train": data.splits.train, "test": data.splits.test, "clean test": data.splits.clean_test}
    used = {path for side in sides.values() for path in side}
    columns = [*sides, *(["not used"] if len(used) < len(records) else [])]
    rows = [
        (
            label,
            *(_count(data, side, label) for side in sides.values()),
            *(
                [sum(r.label == label and r.path not in used for r in records)]
                if "not used" in columns
                else []
            ),
        )
        for label in data.splits.classes
    ]
    sizes = Counter((record.width, record.height) for record in records)
    sides_px = [side for size in sizes for side in size]
    formats = Counter(_format(record.path) for record in records)
    modes = Counter(record.mode for record in records)
    lines = [
        f"# Data sheet: {data.name}",
        "",
        "## What it consists of",
        "",
        f"{len(records)} {data.modality} images in {len(data.splits.classes)} classes. {_split_kind(data)}",
        "",
        *_table(("class", *columns), rows),
        "",
        f"Sizes: {len(sizes)}, sides of {min(sides_px)} to {max(sides_px)} pixels. Modes: {_counted(modes)}. "
        f"Files: {_counted(formats)}.",
        "",
        _patients(data),
        "",
        "## What was left out or reported at ingestion",
        "",
        *_kinds("left out", data.left_out),
        *_kinds("kept, but reported", data.reported),
        "",
        "## Duplicates",
        "",
        *_duplicates(data),
        "",
        "## Masks",
        "",
        f"Made by {data.segmenter}, without labels. Mean coverage and the rungs of the fallback ladder:",
        "",
        *_masks(data.mask_lines),
        "",
        "## Drift",
        "",
        *_drift(data),
        "",
        "## Licence and collection",
        "",
        f"Licence: {data.licence or 'not stated'}. Who collected the images, how, with whose consent, and "
        "who labelled them is not known to this pipeline: ask their source.",
        "",
        "## How to make it again",
        "",
        *_table(("", ""), data.made.items()),
        "",
        "Check out the commit, put the images where `params.yaml` says, and run `make run`; or `dvc pull`, "
        "then `dvc repro`, which has nothing to do where `dvc.lock` has this digest.",
        "",
        "## Warnings",
        "",
        *(f"- {said}" for said in _warnings(data) or ["None of those that are looked for."]),
    ]
    return "\n".join(lines) + "\n"


def headline(test_set: str, probabilities: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> str:
    """The card in one paragraph, for a version's page; (N, K), (N,) integers in [0, K), (K,)."""
    right = probabilities.argmax(axis=1) == labels
    weakest = int(np.nanargmin(metrics.per_class_recall(probabilities, labels)))
    return (
        f"On the {test_set} test set: accuracy {_share(right)}; weakest class {classes[weakest]}, "
        f"recall {_share(right[labels == weakest])}. For research; not for clinical use."
    )


def checks_table(checks: Sequence[Check]) -> list[str]:
    """Every check of the gate, a line each; nothing where there was none."""
    rows = [
        (check.name, check.found, check.asked, "met" if check.passed else "**not met**") for check in checks
    ]
    return _table(("check", "found", "asked", ""), rows) if rows else []


def fault_kinds(faults: Iterable[str]) -> Counter[str]:
    """Ingestion's faults, whose texts may name files, counted by kinds, whose names do not."""
    kinds = (
        next((kind for pattern, kind in _KINDS if re.search(pattern, fault)), "of another kind")
        for fault in faults
    )
    return Counter(kinds)


def _scores(model: Model, data: Data) -> list[str]:
    """Both tables of metrics, a column a test set."""
    scored: list[list[str]] = []
    recalls: list[list[str]] = []
    for paths in model.test_sets.values():
        at = np.isin(data.splits.test, paths)
        probabilities, labels = model.probabilities[at], model.labels[at]
        right = probabilities.argmax(axis=1) == labels
        found = metrics.score(probabilities, labels)
        names = ("balanced_accuracy", "macro_f1", "auroc", "ece")
        scored.append([str(len(labels)), _share(right), *(_number(found[name]) for name in names)])
        recalls.append([_share(right[labels == place]) for place in range(len(model.classes))])
    rows = ("images", "accuracy", "balanced accuracy", "macro-F1", "AUROC", "calibration error")
    head = ("", *(f"{name} test set" for name in model.test_sets))
    return [
        *_table(
            head, [(name, *values) for name, values in zip(rows, zip(*scored, strict=True), strict=True)]
        ),
        "",
        *_table(
            ("recall", *head[1:]),
            [(name, *values) for name, values in zip(model.classes, zip(*recalls, strict=True), strict=True)],
        ),
    ]


def _failures(model: Model, data: Data) -> list[str]:
    """Confusions, and accuracy by what the pipeline knows of an image."""
    predicted = model.probabilities.argmax(axis=1)
    counts = metrics.confusion(predicted, model.labels, len(model.classes))  # (K, K)
    wrong = [(int(counts[true, said]), true, said) for true, said in np.ndindex(counts.shape) if true != said]
    worst = [each for each in sorted(wrong, key=lambda each: (-each[0], *each[1:])) if each[0]][:_CONFUSIONS]
    confused = [
        (f"{model.classes[true]} taken for {model.classes[said]}", _of(n, int(counts[true].sum())))
        for n, true, said in worst
    ]
    by_path = {record.path: record for record in data.records}
    test = [by_path[path] for path in data.splits.test]
    groups = {
        "mask from": [data.statuses[record.path] for record in test],
        "mask covers": _thirds([100 * data.coverage[r.path] for r in test], "{:.1f} %".format),
        "size": _by_size(test),
        "mode": [record.mode for record in test],
    }
    right = predicted == model.labels
    rows = [
        (f"{by} {group}", _share(right[(at := np.array(members) == group)]), _few(int(at.sum())))
        for by, members in groups.items()
        if len(set(members)) > 1
        for group in dict.fromkeys(sorted(members, key=_natural))
    ]
    told = (
        [*_table(("confusion", "share of the class"), confused)] if confused else ["No test image is wrong."]
    )
    same = [by for by, members in groups.items() if len(set(members)) == 1]
    if rows:
        told += ["", *_table(("group of test images", "accuracy", ""), rows)]
    if same:
        told += ["", f"The same for all test images: {', '.join(same)}."]
    return told


def _limits(model: Model, data: Data) -> list[str]:
    """What a reader has to know before believing the numbers."""
    said = [*_warnings(data)]
    if model.pocket:
        said.append(
            "The embedded weights (pocket) were trained on drawn images alone; they never saw a real one."
        )
    reported = fault_kinds(data.reported)
    if noise := sum(fault_kinds([*data.left_out, *data.reported])[kind] for kind in _label_kinds()):
        said.append(f"Label noise: ingestion found {noise} files whose label contradicts another's.")
    elif reported:
        said.append(
            "Ingestion found no contradicting labels; wrong ones that nothing contradicts stay unseen."
        )
    if small := [f"{name} ({n})" for name, n in model.learnt.items() if n < FEW]:
        said.append(f"Learnt from fewer than {FEW} images: {', '.join(small)}.")
    said.append("The version was chosen by validation inside its support, and the test set chose nothing.")
    said.append("Confounds are unknown: age, sex, device, site and burnt-in marks are not recorded.")
    return said


def _label_kinds() -> tuple[str, ...]:
    return (
        "the same bytes under two labels",
        "listed several times, with different labels, splits or patients",
    )


def _warnings(data: Data) -> list[str]:
    return [*data_warnings(data.records, data.splits, data.pairs), *mask_warnings(data.mask_lines)]


def _split_kind(data: Data) -> str:
    if any(record.split == "test" for record in data.records):
        return "The test set is the official one."
    return "There is no official test set; one was drawn, without patients or duplicates in both parts."


def _patients(data: Data) -> str:
    known = [record.patient for record in data.records if record.patient]
    if not known:
        return "Patients: none is known."
    return f"Patients: {len(set(known))} are known, for {len(known)} of {len(data.records)} images."


def _duplicates(data: Data) -> list[str]:
    test = set(data.splits.test)
    across = Counter(pair.kind for pair in data.pairs if (pair.path_a in test) != (pair.path_b in test))
    rows = [(kind, n, across[kind]) for kind, n in sorted(Counter(p.kind for p in data.pairs).items())]
    if not rows:
        return ["No pair was found."]
    return _table(("kind of pair", "pairs", "of them across train and test"), rows)


def _masks(lines: Sequence[Mapping[str, object]]) -> list[str]:
    names = [name for name in lines[0] if lines[0][name] not in ("", None)] if lines else []
    return _table(names, [[_cell(line[name]) for name in names] for line in lines])


def _cell(value: object) -> str:
    text = str(value)
    return f"{float(text):.3f}" if re.fullmatch(r"-?\d+\.\d+(e-?\d+)?", text) else text


def _drift(data: Data) -> list[str]:
    if data.new is None:
        return ["There was no champion yet that the images could be compared with."]
    told = [f"{data.new} images came since the present champion was made."]
    return [*told, *(["", *checks_table(data.drift)] if data.drift else [])]


def _kinds(what: str, faults: Sequence[str]) -> list[str]:
    if not faults:
        return [f"- {what}: nothing"]
    return [f"- {what}: {n}, {kind}" for kind, n in sorted(fault_kinds(faults).items())]


def _count(data: Data, paths: Sequence[str], label: str) -> int:
    labels = {record.path: record.label for record in data.records}
    return sum(labels[path] == label for path in paths)


def _format(path: str) -> str:
    """The suffix of a file's name, where it is one that ingestion knows; any other may be part of a name."""
    suffix = PurePosixPath(path).suffix.lower()
    return suffix.removeprefix(".") if suffix in SUFFIXES else "other"


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{name} ({n})" for name, n in sorted(counts.items()))


def _by_size(records: Sequence[Record]) -> list[str]:
    """The group of each record: its size or, where there are many, its third by pixels."""
    sizes = [f"{record.width} x {record.height}" for record in records]
    if len(set(sizes)) <= _SIZES:
        return sizes
    return _thirds([record.width * record.height / 1e6 for record in records], "{:.2f} megapixels".format)


def _thirds(values: Sequence[float], told: Callable[[float], str]) -> list[str]:
    """The group of each value: a third of them, fewer groups where many values are equal."""
    low, high = np.quantile(values, [1 / 3, 2 / 3])
    names = (f"up to {told(low)}", f"{told(low)} to {told(high)}", f"above {told(high)}")
    return [names[0 if value <= low else 1 if value <= high else 2] for value in values]


def _natural(group: str) -> tuple[bool, bool, str]:
    """Thirds from low to high, other groups by name."""
    return (group.startswith("above "), not group.startswith("up to "), group)


def _share(right: np.ndarray) -> str:
    return _of(int(right.sum()), len(right))


def _of(correct: int, count: int) -> str:
    if not count:
        return "no image"
    low, high = metrics.wilson(correct, count)
    return f"{100 * correct / count:.1f} % [{100 * low:.1f}, {100 * high:.1f}], {correct} of {count}"


def _few(count: int) -> str:
    return f"fewer than {FEW}: too few to tell" if count < FEW else ""


def _number(value: float) -> str:
    return f"{value:.3f}" if np.isfinite(value) else "cannot be told"


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    escaped = [[str(value).replace("|", "\\|") for value in row] for row in (head, *rows)]
    first, *others = (f"| {' | '.join(row)} |" for row in escaped)
    return [first, "|---" * len(head) + "|", *others]
