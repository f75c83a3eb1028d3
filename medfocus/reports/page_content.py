"""The content of a study's page: values without markup."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from medfocus.evaluation.comparison import CurvePoint, Difference
from medfocus.evaluation.metrics import Reliability
from medfocus.reports.rows import Published, StudyRow

Block = tuple[str, str]  # a data set and one of its test sets


@dataclass(frozen=True)
class Example:
    """An image of the gallery and what a fitted system made of it."""

    dataset: str
    system: str
    name: str  # of the image, which names no patient
    image: np.ndarray  # (H, W, 3) uint8
    true_class: str
    predicted: str
    probability: float  # of the predicted class
    mask: np.ndarray | None = None  # (H, W) bool
    focus: np.ndarray | None = None  # (h, w, 3) uint8, what the system looked at
    attribution: np.ndarray | None = None  # (h, w) of the focus, else (H, W); negative values count as 0
    share_inside: float | None = None  # of the attribution, inside the mask


@dataclass(frozen=True)
class Confusion:
    """A confusion matrix."""

    dataset: str
    system: str  # with its percent of train and draw, as the heading shows it
    classes: tuple[str, ...]
    counts: np.ndarray  # (K, K) int, rows the true class, columns the predicted


@dataclass(frozen=True)
class Calibration:
    """A reliability curve; its expected calibration error is shown beside it."""

    dataset: str
    system: str
    curve: Reliability


@dataclass(frozen=True)
class Recalls:
    """The recall of every class, by system."""

    dataset: str
    what: str  # the percent of train and the test set
    classes: tuple[str, ...]
    counts: tuple[int, ...]  # (K,) test images
    by_system: Mapping[str, np.ndarray]  # -> (R, K) in [0, 1], a row a draw; NaN for an absent class


@dataclass(frozen=True)
class Cost:
    """What a system costs; None where it was not measured."""

    system: str
    fit_seconds: float | None = None
    images_per_second: float | None = None
    peak_mib: float | None = None
    trainable: int | None = None  # parameters


@dataclass(frozen=True)
class Provenance:
    """How to make the numbers again."""

    command: str
    facts: Mapping[str, str]  # such as git.commit and dvc.lock.sha256
    params: str = ""  # params.yaml, whole


@dataclass(frozen=True)
class PageContent:
    """Everything a page shows. A part that is left empty has no section."""

    study: str
    rows: Sequence[StudyRow] = ()
    baseline: str = ""  # the system that the differences are to
    differences: Mapping[Block, Mapping[CurvePoint, Difference]] = field(default_factory=dict)
    published: Sequence[Published] = ()
    highlighted: Sequence[str] = ()  # systems in colour in the figure; empty: the baseline and the best
    verdicts: Sequence[str] = ()  # sentences to stand before those that follow from the rows
    gallery: Sequence[Example] = ()
    confusions: Sequence[Confusion] = ()
    calibrations: Sequence[Calibration] = ()
    recalls: Sequence[Recalls] = ()
    masks: Mapping[str, Sequence[Mapping[str, object]]] = field(default_factory=dict)  # -> lines of masks.csv
    costs: Sequence[Cost] = ()
    warnings: Mapping[str, Sequence[str]] = field(default_factory=dict)  # data set -> sentences
    provenance: Provenance | None = None
