"""The model card of a registered version, in Markdown, after Mitchell et al., arXiv 1810.03993.

The card is public, so it contains counts of images and patients, and no name. It contains no time, so the
same model on the same data gives the same bytes.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from medfocus.datasets.faults import LABEL_NOISE
from medfocus.datasets.records import Record
from medfocus.evaluation import metrics
from medfocus.evaluation.gate import Check
from medfocus.reports.data_sheet import SHEET, DatasetFacts
from medfocus.reports.markdown import checks_table, share, share_of, table
from medfocus.reports.promises import set_facts

CARD = "card.md"  # file name of the card among the files of a version and of its run
FEW = 20  # images; the accuracy of a smaller group is unreliable
_CONFUSIONS = 5
_LONGEST = 200  # characters of a hyperparameter
_SIZES = 4  # groups by size; more sizes are grouped by number of pixels


@dataclass(frozen=True)
class ModelFacts:
    """A version of a registered model."""

    name: str
    method: str
    focus: str
    support: str  # "20%", "16-shot"
    seed: int
    schedule: str  # of the settings, "published" or "small"
    learned_from: Mapping[str, int]  # class -> training images
    settings: Mapping[str, object]
    parts: Mapping[str, str]  # CLIP, segmenter, ... -> name and digest of the weights
    pocket: bool  # whether a part has the embedded weights
    validation: str  # "17 of 24"
    probabilities: np.ndarray  # (N, K) on the whole test set, in the order of ``splits.test``
    labels: np.ndarray  # (N,) integers in [0, K)
    classes: Sequence[str]
    test_sets: Mapping[str, Sequence[str]]  # "official", "clean" -> paths; the first is the whole test set
    checks: Sequence[Check]  # of the gate
    reason: str  # the gate's decision
    temperature: float  # that divides the logits; 1 without calibration
    ece_uncalibrated: Mapping[str, float]  # test set -> expected calibration error without the temperature
    confidence: float  # wanted share of sets of classes with the true class
    sets: np.ndarray | None  # (N, K) bool on the whole test set; None without sets
    no_set: str  # the reason without sets


def model_card(model: ModelFacts, data: DatasetFacts) -> str:
    """Write the card in Markdown."""
    images = sum(model.learned_from.values())
    validated = (
        f"{model.validation} correct, out of fold, inside the support"
        if not model.validation.endswith(" 0")
        else "none"
    )
    lines = [
        f"# Model card: {model.name}",
        "",
        "## Intended use",
        "",
        f"Research on few-shot classification of {data.modality} images into {', '.join(model.classes)}. "
        "**Not for clinical use**: not for diagnosis, triage or treatment. Not for images of another kind or "
        "source. Not for other classes: the model always predicts one of these.",
        "",
        "## Model",
        "",
        *table(
            ("", ""),
            [
                ("method", model.method),
                ("focus", model.focus),
                ("support", f"{model.support} of train, {images} images, draw {model.seed}"),
                ("validation", validated),
                ("temperature", f"{model.temperature:.3f}" if model.temperature != 1 else "not calibrated"),
                ("schedule", model.schedule),
                *model.parts.items(),
                *((f"`{name}`", _setting(value)) for name, value in sorted(model.settings.items())),
            ],
        ),
        "",
        "## Training data",
        "",
        f"{data.name}; its data sheet is {SHEET}. {data.split_sentence} {data.patients_sentence}",
        "",
        *table(
            ("class", "in train", "learned from", "in test"),
            [
                (
                    name,
                    data.count(data.splits.train, name),
                    model.learned_from.get(name, 0),
                    data.count(data.splits.test, name),
                )
                for name in model.classes
            ],
        ),
        "",
        "## Metrics",
        "",
        "Brackets show the 95 % Wilson interval. It assumes independent images, so it is too narrow if a "
        "patient has several.",
        "",
        *_scores(model, data),
        "",
        "## Sets of classes",
        "",
        *_sets(model, data),
        "",
        "## Failures",
        "",
        *_failures(model, data),
        "",
        "## Decision of the gate at registration",
        "",
        model.reason,
        "",
        *checks_table(model.checks),
        "",
        "## Limits",
        "",
        *(f"- {limit}" for limit in _limits(model, data)),
    ]
    return "\n".join(lines) + "\n"


def headline(test_set: str, probabilities: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> str:
    """Summarise the card for a version's page: probabilities (N, K), labels (N,) in [0, K), classes (K,)."""
    right = probabilities.argmax(axis=1) == labels
    weakest = int(np.nanargmin(metrics.per_class_recall(probabilities, labels)))
    return (
        f"On the {test_set} test set: accuracy {share(right)}; weakest class {classes[weakest]}, "
        f"recall {share(right[labels == weakest])}. For research; not for clinical use."
    )


def _scores(model: ModelFacts, data: DatasetFacts) -> list[str]:
    """Return both tables of metrics, with a column for each test set."""
    scored: list[list[str]] = []  # a column for each test set
    recalls: list[list[str]] = []
    for name, paths in model.test_sets.items():
        at = np.isin(data.splits.test, paths)
        probabilities, labels = model.probabilities[at], model.labels[at]
        right = probabilities.argmax(axis=1) == labels
        values = metrics.score(probabilities, labels)
        numbers = [values[metric] for metric in ("balanced_accuracy", "macro_f1", "auroc", "ece")]
        numbers.append(model.ece_uncalibrated[name])
        scored.append([str(len(labels)), share(right), *map(_number, numbers)])
        recalls.append([share(right[labels == place]) for place in range(len(model.classes))])
    rows = ("images", "accuracy", "balanced accuracy", "macro-F1", "AUROC", "calibration error")
    rows += ("calibration error without temperature",)
    head = ("", *(f"{name} test set" for name in model.test_sets))
    return [
        *table(head, [(name, *values) for name, values in zip(rows, zip(*scored, strict=True), strict=True)]),
        "",
        *table(
            ("recall", *head[1:]),
            [(name, *values) for name, values in zip(model.classes, zip(*recalls, strict=True), strict=True)],
        ),
    ]


def _sets(model: ModelFacts, data: DatasetFacts) -> list[str]:
    """Return the promise of the sets and a table of their coverage and size, or the reason without sets."""
    if model.sets is None:
        return [f"{model.no_set[0].upper()}{model.no_set[1:]}."]
    promise = (
        f"The set of an image has the true class in {100 * model.confidence:g} % of cases: the model's "
        "promise. It holds for images like those of the support (the same patients, scanners and mix of "
        "classes), on average and not for each class, and only roughly with few labels. A set with several "
        'classes means "not sure". Measured:'
    )
    columns = [_set_column(model, np.isin(data.splits.test, paths)) for paths in model.test_sets.values()]
    head = ("", *(f"{name} test set" for name in model.test_sets))
    return [promise, "", *table(head, [(name, *(column[name] for column in columns)) for name in columns[0]])]


def _set_column(model: ModelFacts, at: np.ndarray) -> dict[str, str]:
    """Return coverage and size of the sets of the test images at (N,) bool, then each class's coverage."""
    assert model.sets is not None
    sets, labels = model.sets[at], model.labels[at]
    facts = set_facts(sets, labels)
    covered = sets[np.arange(len(labels)), labels]
    by_class = {
        f"coverage of {name}": share(covered[labels == place]) for place, name in enumerate(model.classes)
    }
    return {
        name: facts[name] for name in ("coverage", "mean set size", "one class", "right if one class")
    } | by_class


def _failures(model: ModelFacts, data: DatasetFacts) -> list[str]:
    """Return the confusions, and accuracies by mask, size and mode."""
    predicted = model.probabilities.argmax(axis=1)
    counts = metrics.confusion(predicted, model.labels, len(model.classes))  # (K, K)
    pairs = [
        (true, other) for true, other in np.ndindex(counts.shape) if true != other and counts[true, other]
    ]
    worst = sorted(pairs, key=lambda pair: (-counts[pair], *pair))[:_CONFUSIONS]
    confused = [
        (
            f"{model.classes[true]} predicted as {model.classes[other]}",
            share_of(int(counts[true, other]), int(counts[true].sum())),
        )
        for true, other in worst
    ]
    by_path = {record.path: record for record in data.records}
    test = [by_path[path] for path in data.splits.test]
    groups = {
        "mask": [data.statuses[record.path] for record in test],
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
    lines = (
        table(("confusion", "share of the class"), confused)
        if confused
        else ["Every test image is classified correctly."]
    )
    same = [by for by, members in groups.items() if len(set(members)) == 1]
    if rows:
        lines += ["", *table(("group of test images", "accuracy", ""), rows)]
    if same:
        lines += ["", f"The same for all test images: {', '.join(same)}."]
    return lines


def _limits(model: ModelFacts, data: DatasetFacts) -> list[str]:
    """Return the limits of the numbers, as sentences."""
    limits = [*data.warnings]
    if model.pocket:
        limits.append(
            "The embedded weights (pocket) are small. CLIP's texts know only phantoms, and its image encoder "
            "has seen photographs, not medical images."
        )
    if noise := sum(kind in LABEL_NOISE for kind in (*data.left_out, *data.reported)):
        limits.append(f"Label noise: ingestion found {noise} files with contradicting labels.")
    elif data.reported:
        limits.append("Ingestion found no contradicting labels; it cannot find other wrong labels.")
    if small := [f"{name} ({n})" for name, n in model.learned_from.items() if n < FEW]:
        limits.append(f"Fewer than {FEW} training images: {', '.join(small)}.")
    limits.append("Validation inside the support selected this version; the test set had no influence.")
    limits.append("Confounds are unknown: age, sex, device, site and burnt-in marks are not recorded.")
    return limits


def _by_size(records: Sequence[Record]) -> list[str]:
    """Group records by size, or by thirds of their pixels if there are many sizes."""
    sizes = [f"{record.width} x {record.height}" for record in records]
    if len(set(sizes)) <= _SIZES:
        return sizes
    return _thirds([record.width * record.height / 1e6 for record in records], "{:.2f} megapixels".format)


def _thirds(values: Sequence[float], text: Callable[[float], str]) -> list[str]:
    """Group values by thirds; equal values can leave fewer groups."""
    low, high = np.quantile(values, [1 / 3, 2 / 3])
    names = (f"up to {text(low)}", f"{text(low)} to {text(high)}", f"above {text(high)}")
    return [names[0 if value <= low else 1 if value <= high else 2] for value in values]


def _natural(group: str) -> tuple[bool, bool, str]:
    """Sort thirds from low to high, and other groups by name."""
    return (group.startswith("above "), not group.startswith("up to "), group)


def _setting(value: object) -> str:
    """Return a hyperparameter on one line; the beginning of a long one, such as a list of texts."""
    return f"`{textwrap.shorten(str(value), _LONGEST)}`"


def _few(count: int) -> str:
    return f"fewer than {FEW} images" if count < FEW else ""


def _number(value: float) -> str:
    return f"{value:.3f}" if np.isfinite(value) else "not defined"
