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
    """An image of the gallery, with a fitted system's prediction and attribution."""

    dataset: str
    system: str
    name: str  # of the image, without a patient's name
    image: np.ndarray  # (H, W, 3) uint8
    true_class: str
    predicted: str
    probability: float  # of the predicted class
    mask: np.ndarray | None = None  # (H, W) bool
    focus: np.ndarray | None = None  # (h, w, 3) uint8, the system's view
    attribution: np.ndarray | None = None  # (h, w) if there is a focus, else (H, W); negative values are 0
    share_inside: float | None = None  # of the attribution, inside the mask


@dataclass(frozen=True)
class Confusion:
    """A confusion matrix."""

    dataset: str
    system: str  # with its percent of train and draw, for the heading
    classes: tuple[str, ...]
    counts: np.ndarray  # (K, K) int, rows the true class, columns the predicted


@dataclass(frozen=True)
class Calibration:
    """A reliability curve, shown with its expected calibration error."""

    dataset: str
    system: str
    curve: Reliability


@dataclass(frozen=True)
class Sets:
    """The sets of classes of one cell on its test set."""

    dataset: str
    system: str  # with its percent of train and draw, for the heading
    classes: tuple[str, ...]
    confidence: float  # wanted share of sets with the true class
    sets: np.ndarray | None  # (N, K) bool; None if the support is too small for the promise
    labels: np.ndarray  # (N,) integers in [0, K)
    no_set: str  # the reason without sets


@dataclass(frozen=True)
class Recalls:
    """The recall of every class, by system."""

    dataset: str
    title: str  # percent of train and test set
    classes: tuple[str, ...]
    counts: tuple[int, ...]  # (K,) test images
    by_system: Mapping[str, np.ndarray]  # -> (R, K) in [0, 1], a row a draw; NaN for an absent class


@dataclass(frozen=True)
class Cost:
    """The costs of a system; None for a cost that was not measured."""

    system: str
    fit_seconds: float | None = None
    images_per_second: float | None = None
    peak_mib: float | None = None
    trainable: int | None = None  # parameters


@dataclass(frozen=True)
class Provenance:
    """The origin of the numbers."""

    command: str
    facts: Mapping[str, str]  # such as git.commit and dvc.lock.sha256
    params: str = ""  # the text of params.yaml


@dataclass(frozen=True)
class PageContent:
    """Everything that a page shows. An empty part has no section."""

    study: str
    rows: Sequence[StudyRow] = ()
    baseline: str = ""  # the system that all others are compared with
    schedule: str = ""  # of the methods' hyperparameters, "published" or "small"
    differences: Mapping[Block, Mapping[CurvePoint, Difference]] = field(default_factory=dict)
    published: Sequence[Published] = ()
    highlighted: Sequence[str] = ()  # systems in colour; if empty, the baseline and the best systems
    verdicts: Sequence[str] = ()  # sentences to show above the sentences on the rows
    gallery: Sequence[Example] = ()
    confusions: Sequence[Confusion] = ()
    calibrations: Sequence[Calibration] = ()
    sets: Sequence[Sets] = ()
    recalls: Sequence[Recalls] = ()
    masks: Mapping[str, Sequence[Mapping[str, object]]] = field(default_factory=dict)  # -> lines of masks.csv
    costs: Sequence[Cost] = ()
    warnings: Mapping[str, Sequence[str]] = field(default_factory=dict)  # data set -> sentences
    provenance: Provenance | None = None
