"""params.yaml -> frozen dataclasses, one per section; all faults of the file are reported together.

Every number of a study is in its params.yaml: only ``licence``, ``slices`` and ``columns`` of a data set have
defaults, because few data sets need them. The stages check facts that depend on the data.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from flows.study.content import read_content
from medfocus.learning.schedules import extended, scheduled
from medfocus.storage.tables import COLUMNS

Modality = Literal["chest_xray", "brain_mri", "breast_ultrasound", "chest_ct", "other"]
Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(gt=0, lt=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]  # names files, DVC stages, MLflow models

DRIFT_BY = "clip-zero-shot"  # the method that gives the features for measuring drift

_strict = ConfigDict(extra="forbid")


@dataclass(frozen=True, config=_strict)
class OnlyParams:
    """The part of a study's supports and seeds on which a slow method runs."""

    percents: tuple[Annotated[float, Field(gt=0, le=100)], ...]
    shots: tuple[Positive, ...]
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]


@dataclass(frozen=True, config=_strict)
class StudyParams:
    """The cells: every method with its focus modes, on every data set, support and seed."""

    name: Name
    methods: dict[str, tuple[str, ...]]  # method -> its focus modes
    percents: tuple[Annotated[float, Field(gt=0, le=100)], ...]  # of the training images
    shots: tuple[Positive, ...]  # images per class
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]  # one support set per seed
    only: dict[str, OnlyParams]  # method -> its part of percents, shots and seeds
    schedule: Literal["published", "small"]  # small: the values in a method's section ``small`` apply

    @model_validator(mode="after")
    def _has_a_support(self) -> StudyParams:
        if not self.percents and not self.shots:
            raise ValueError("percents and shots are both empty; give at least one support size")
        if not self.methods:
            raise ValueError("methods is empty; name at least one")
        for name, only in self.only.items():
            if name not in self.methods:
                raise ValueError(
                    f"only names {name!r}, which is not among methods; they are {', '.join(self.methods)}"
                )
            for field in ("percents", "shots", "seeds"):
                if beyond := sorted(set(getattr(only, field)) - set(getattr(self, field))):
                    raise ValueError(f"only.{name}.{field} has {beyond}, which the study's {field} lack")
        return self


@dataclass(frozen=True, config=_strict)
class SlicesParams:
    """The slices of a NIfTI volume that are images."""

    axis: Annotated[int, Field(ge=0, le=2)]  # of the patient: 0 sagittal, 1 coronal, 2 axial slices
    every: Positive  # 3 takes every third slice


@dataclass(frozen=True, config=_strict)
class DatasetParams:
    """One data set: its images and their names in text prompts."""

    root: str  # folder of split/class/*, class/* or the table below; relative to params.yaml
    manifest: str | None  # table (CSV, Parquet) inside root: path, label and optional split, patient
    patient_pattern: str | None  # regular expression for paths; its one group is the patient
    modality: Modality  # selects the text templates and the number of segments in a mask
    names: dict[str, str]  # label -> its name in text prompts, by default the label
    templates: tuple[str, ...]  # text prompts with {c} for the class; empty: the modality's templates
    flip: bool  # mirror some views; false for chest films
    licence: str = ""  # of the images, for the data sheet
    slices: SlicesParams = SlicesParams(2, 1)  # of NIfTI volumes
    columns: dict[str, str] = Field(default_factory=dict)  # path, label, ... -> its column in the manifest

    @model_validator(mode="after")
    def _columns_are_of_a_manifest(self) -> DatasetParams:
        if unknown := sorted(self.columns.keys() - COLUMNS):
            raise ValueError(f"columns has {unknown[0]!r}, which is not one of {', '.join(COLUMNS)}")
        if self.columns and self.manifest is None:
            raise ValueError("columns is given, but manifest is null; name the table, or remove columns")
        return self


@dataclass(frozen=True, config=_strict)
class PhantomParams:
    """One procedural data set, written to data/phantoms/<modality>."""

    seed: Annotated[int, Field(ge=0)]
    train_per_class: Positive
    test_per_class: Positive
    size: Annotated[int, Field(ge=64)]  # pixels per side


@dataclass(frozen=True, config=_strict)
class SplitsParams:
    """How supports are drawn, and a test set if the data set has none."""

    test_fraction: Share


@dataclass(frozen=True, config=_strict)
class AdapterParams:
    """How the strategy "adapter" learns known regions of training images; see ``train_adapter``."""

    steps: Positive
    batch_size: Positive  # images per step
    lr: Annotated[float, Field(gt=0)]
    weight_decay: Annotated[float, Field(ge=0)]
    reduction: Positive  # width of the encoder divided by the width of the adapters
    seed: Annotated[int, Field(ge=0)]


@dataclass(frozen=True, config=_strict)
class MasksParams:
    """How each image is segmented, without its label."""

    segmenter: Literal["sam2", "otsu"]
    config: str  # "pocket", a configuration of the sam2 package, or a YAML path
    checkpoint: str  # "pocket", "random:SEED", a path, or a hub id
    image_size: Positive | None  # pixels per side of SAM2's input; None: as in the configuration
    strategy: Literal["interest", "automatic", "grid", "center", "box", "retrieved", "adapter"]
    points_per_side: Positive  # of the automatic, grid and retrieved strategies
    follow_edges: bool  # move the outline of SAM2's mask to edges of the image
    min_area: Share  # of the image
    max_area: Share
    keep: dict[Modality, Positive]  # number of best segments to unite; 1 by default
    batch_size: Positive
    anatomy: dict[Modality, tuple[str, ...]]  # texts by which "retrieved" selects segments; never a class
    adapter: AdapterParams

    @model_validator(mode="after")
    def _fields_agree(self) -> MasksParams:
        if self.min_area >= self.max_area:
            raise ValueError(f"min_area {self.min_area} is not below max_area {self.max_area}")
        if self.follow_edges and self.strategy == "automatic" and self.segmenter == "sam2":
            raise ValueError(
                "follow_edges is true, but SAM2's strategy automatic cannot follow edges; set it to false"
            )
        return self


@dataclass(frozen=True, config=_strict)
class ViewsParams:
    """How an image and its mask become CLIP's input."""

    feather: Annotated[float, Field(ge=0, lt=0.5)]  # width of the soft edge, in shares of the longest side
    fill: Literal["mean", "black"]  # the colour in place of what a focus hides: CLIP's mean colour, or black
    attention_bias: Annotated[float, Field(ge=0)]  # β of the focus "attention"; 0 has no effect
    augmented: Annotated[int, Field(ge=0)]  # changed views of each support image, besides the whole image
    batch_size: Positive


@dataclass(frozen=True, config=_strict)
class ClipParams:
    """The frozen encoders."""

    model: str  # "pocket", an open_clip model name, an hf-hub: id, or a local-dir: folder
    pretrained: str  # "random:SEED", a pretrained tag, or a checkpoint path; empty for hf-hub: and local-dir:
    alpha: str  # checkpoint of Alpha-CLIP's image encoder, which the focus "alpha" uses; empty: none
    resize: Literal["letterbox", "published"]  # how images fill CLIP's input; see ``build_clip``

    @property
    def embedded(self) -> bool:
        """True for the small CLIP that the package contains."""
        return self.model == "pocket"


@dataclass(frozen=True, config=_strict)
class ChoiceParams:
    """How a learning rate or a tuning is selected if a method lists several."""

    folds: Annotated[int, Field(ge=2)]  # of the cross-validation inside the support
    images: Positive  # largest number of support images that the selection uses


@dataclass(frozen=True, config=_strict)
class ValidationParams:
    """Predictions out of fold inside the support: they select the best cell and calibrate probabilities."""

    folds: Annotated[int, Field(ge=2)]
    methods: tuple[str, ...]  # methods that may be registered
    confidence: Annotated[float, Field(ge=0.5, lt=1)]  # share of sets of classes that contain the true class


@dataclass(frozen=True, config=_strict)
class TrackingParams:
    """Names in MLflow."""

    experiment: Name


@dataclass(frozen=True, config=_strict)
class GateParams:
    """The conditions for a new champion; see ``medfocus.evaluation.gate``."""

    margin: Annotated[float, Field(gt=-1, lt=1)]  # least gain of accuracy; below 0 allows a loss
    p: Annotated[float, Field(gt=0, le=1)]  # largest p of the paired test; 1 disables it
    images: Positive  # least number of test images that the champion has not learned from
    recall: dict[str, Annotated[float, Field(ge=0, le=1)]]  # class -> least recall; "all" for other classes
    calibration: Annotated[float, Field(gt=0, le=1)]  # largest expected calibration error


@dataclass(frozen=True, config=_strict)
class DriftParams:
    """The differences from the champion's images above which no model is promoted.

    See ``medfocus.evaluation.drift``.
    """

    embedding: Annotated[float, Field(gt=0.5, le=1)]  # AUROC of separating new from old by features
    coverage: Annotated[float, Field(gt=0, le=1)]  # distance between the distributions of mask coverage
    classes: Annotated[float, Field(gt=0, le=1)]  # total variation of the class shares
    statistics: Annotated[float, Field(gt=0, le=1)]  # same for brightness, contrast, sharpness, size
    p: Annotated[float, Field(gt=0, lt=1)]  # significance level
    images: Positive  # largest number of old and of new images to compare


@dataclass(frozen=True, config=_strict)
class ReportParams:
    """The comparisons on the page of a study."""

    baseline: str  # the method with which all systems are compared, without focus
    published: str | None  # CSV dataset,method,percent,accuracy of published rows; relative to params.yaml


@dataclass(frozen=True, config=_strict)
class ScaleParams:
    """The workers and the cache of masks and features; neither changes the results."""

    runner: Literal["here", "threads", "processes", "dask"]  # here: in this process
    workers: Positive
    images: Positive  # per shard
    address: str | None  # of a Dask scheduler; None starts a cluster on this machine
    cache: str | None  # fsspec URL of the cache; None: .cache in the project

    @model_validator(mode="after")
    def _fits(self) -> ScaleParams:
        if self.address and self.runner != "dask":
            raise ValueError(f"address is {self.address!r}, but runner is {self.runner!r}; use dask or null")
        if self.cache and "://" not in self.cache and not Path(self.cache).is_absolute():
            raise ValueError(
                f"cache is {self.cache!r}; give a URL such as s3://bucket/folder, or an absolute path"
            )
        return self


@dataclass(frozen=True, config=_strict)
class Params:
    """A whole params.yaml."""

    study: StudyParams
    datasets: Annotated[dict[Name, DatasetParams], Field(min_length=1)]
    phantoms: dict[Literal["chest_xray", "brain_mri", "breast_ultrasound"], PhantomParams]
    splits: SplitsParams
    masks: MasksParams
    views: ViewsParams
    clip: ClipParams
    methods: dict[str, dict[str, Any]]  # method -> hyperparameters, which the method checks
    choice: ChoiceParams
    validation: ValidationParams
    tracking: TrackingParams
    gate: GateParams
    drift: DriftParams
    report: ReportParams
    scale: ScaleParams
    device: Literal["auto", "cpu", "cuda"]  # auto: CUDA if available

    def method(self, name: str) -> tuple[str, dict[str, Any]]:
        """Return the method and the hyperparameters behind a name in the section methods.

        A section with ``like`` is another row of that method, and inherits the hyperparameters that it omits.
        With the schedule "small", the values in the section's ``small`` replace its others.
        """
        settings = dict(self.methods[name])
        kind = settings.pop("like", name)
        if kind != name:
            settings = extended(self.methods[kind], settings)
        return kind, scheduled(settings, self.study.schedule)

    @model_validator(mode="after")
    def _names_agree(self) -> Params:
        for name, section in self.methods.items():
            if not isinstance(small := section.get("small", {}), dict):
                raise ValueError(f"methods.{name}.small is {small!r}; give hyperparameters, or remove it")
            kind = section.get("like", name)
            if kind not in self.methods or ("like" in self.methods[kind] and kind != name):
                kinds = ", ".join(n for n, s in self.methods.items() if "like" not in s)
                raise ValueError(f"methods.{name}.like is {kind!r}, which is no method; use one of {kinds}")
        if DRIFT_BY not in self.methods:
            raise ValueError(f"methods lacks {DRIFT_BY}, which measures drift; add {DRIFT_BY}: {{}}")
        if "none" not in self.study.methods.get(self.report.baseline, ()):
            plain = ", ".join(method for method, modes in self.study.methods.items() if "none" in modes)
            raise ValueError(
                f"report.baseline is {self.report.baseline!r}, which study.methods does not run with focus "
                f"none; use one of {plain}"
            )
        known = ", ".join(self.methods)
        for section, names in (("study", self.study.methods), ("validation", self.validation.methods)):
            for name in names:
                if name not in self.methods:
                    raise ValueError(
                        f"{section}.methods names {name!r}, which is no method; use one of {known}"
                    )
        return self


def load_params(path: Path) -> Params:
    """Read and check a params.yaml.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file has faults; each has a line with the field, its value and the valid values.
    """
    content = read_content(path)
    try:
        return TypeAdapter(Params).validate_python(content)
    except ValidationError as error:
        faults = "\n".join(f"  {_describe(fault)}" for fault in error.errors())
        raise ValueError(f"{path}: {error.error_count()} fault(s):\n{faults}") from error


def _describe(fault: Any) -> str:
    """Return a pydantic error as `section.field is VALUE: valid values`."""
    place = ".".join(str(part) for part in fault["loc"] if part != "[key]") or "the file"
    if fault["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"{place} is not a known field; check its spelling or remove it"
    if fault["type"] in ("missing", "missing_argument"):
        return f"{place} is missing; add it"
    if fault["type"] == "value_error":
        return f"{place}: {fault['ctx']['error']}"
    return f"{place} is {fault['input']!r}: {fault['msg'][0].lower() + fault['msg'][1:]}"
