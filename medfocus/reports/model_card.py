"""The model card of a registered version, in Markdown, after Mitchell et al., arXiv 1810.03993.

Others may read the card, so it counts images and patients and names none. It contains no time: the same model
on the same data gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from medfocus.datasets.faults import LABEL_NOISE
from medfocus.datasets.records import Record
from medfocus.evaluation import metrics
from medfocus.evaluation.gate import Check
from medfocus.reports.data_sheet import SHEET, DatasetFacts
from medfocus.reports.markdown import checks_table, share, share_of, table

CARD = "card.md"  # the card's name as a file of a version and of its run
FEW = 20  # images of a group, below which its accuracy says little
_CONFUSIONS = 5
_SIZES = 4  # groups by size at most; more sizes are put together by their pixels


@dataclass(frozen=True)
class ModelFacts:
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


def model_card(model: ModelFacts, data: DatasetFacts) -> str:
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
        *table(
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
        f"{data.name}; its data sheet is {SHEET}. {data.split_sentence} {data.patients_sentence}",
        "",
        *table(
            ("class", "in train", "learnt from", "in test"),
            [
                (
                    name,
                    data.count(data.splits.train, name),
                    model.learnt.get(name, 0),
                    data.count(data.splits.test, name),
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


def headline(test_set: str, probabilities: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> str:
    """The card in one paragraph, for a version's page; (N, K), (N,) integers in [0, K), (K,)."""
    right = probabilities.argmax(axis=1) == labels
    weakest = int(np.nanargmin(metrics.per_class_recall(probabilities, labels)))
    return (
        f"On the {test_set} test set: accuracy {share(right)}; weakest class {classes[weakest]}, "
        f"recall {share(right[labels == weakest])}. For research; not for clinical use."
    )


def _scores(model: ModelFacts, data: DatasetFacts) -> list[str]:
    """Both tables of metrics, a column a test set."""
    scored: list[list[str]] = []
    recalls: list[list[str]] = []
    for paths in model.test_sets.values():
        at = np.isin(data.splits.test, paths)
        probabilities, labels = model.probabilities[at], model.labels[at]
        right = probabilities.argmax(axis=1) == labels
        found = metrics.score(probabilities, labels)
        names = ("balanced_accuracy", "macro_f1", "auroc", "ece")
        scored.append([str(len(labels)), share(right), *(_number(found[name]) for name in names)])
        recalls.append([share(right[labels == place]) for place in range(len(model.classes))])
    rows = ("images", "accuracy", "balanced accuracy", "macro-F1", "AUROC", "calibration error")
    head = ("", *(f"{name} test set" for name in model.test_sets))
    return [
        *table(head, [(name, *values) for name, values in zip(rows, zip(*scored, strict=True), strict=True)]),
        "",
        *table(
            ("recall", *head[1:]),
            [(name, *values) for name, values in zip(model.classes, zip(*recalls, strict=True), strict=True)],
        ),
    ]


def _failures(model: ModelFacts, data: DatasetFacts) -> list[str]:
    """Confusions, and accuracy by what the pipeline knows of an image."""
    predicted = model.probabilities.argmax(axis=1)
    counts = metrics.confusion(predicted, model.labels, len(model.classes))  # (K, K)
    wrong = [(int(counts[true, said]), true, said) for true, said in np.ndindex(counts.shape) if true != said]
    worst = [each for each in sorted(wrong, key=lambda each: (-each[0], *each[1:])) if each[0]][:_CONFUSIONS]
    confused = [
        (f"{model.classes[true]} taken for {model.classes[said]}", share_of(n, int(counts[true].sum())))
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
        (f"{by} {group}", share(right[(at := np.array(members) == group)]), _few(int(at.sum())))
        for by, members in groups.items()
        if len(set(members)) > 1
        for group in dict.fromkeys(sorted(members, key=_natural))
    ]
    told = (
        [*table(("confusion", "share of the class"), confused)] if confused else ["No test image is wrong."]
    )
    same = [by for by, members in groups.items() if len(set(members)) == 1]
    if rows:
        told += ["", *table(("group of test images", "accuracy", ""), rows)]
    if same:
        told += ["", f"The same for all test images: {', '.join(same)}."]
    return told


def _limits(model: ModelFacts, data: DatasetFacts) -> list[str]:
    """What a reader has to know before believing the numbers."""
    said = [*data.warnings]
    if model.pocket:
        said.append(
            "The embedded weights (pocket) were trained on drawn images alone; they never saw a real one."
        )
    if noise := sum(kind in LABEL_NOISE for kind in (*data.left_out, *data.reported)):
        said.append(f"Label noise: ingestion found {noise} files whose label contradicts another's.")
    elif data.reported:
        said.append(
            "Ingestion found no contradicting labels; wrong ones that nothing contradicts stay unseen."
        )
    if small := [f"{name} ({n})" for name, n in model.learnt.items() if n < FEW]:
        said.append(f"Learnt from fewer than {FEW} images: {', '.join(small)}.")
    said.append("The version was chosen by validation inside its support, and the test set chose nothing.")
    said.append("Confounds are unknown: age, sex, device, site and burnt-in marks are not recorded.")
    return said


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


def _few(count: int) -> str:
    return f"fewer than {FEW}: too few to tell" if count < FEW else ""


def _number(value: float) -> str:
    return f"{value:.3f}" if np.isfinite(value) else "cannot be told"
