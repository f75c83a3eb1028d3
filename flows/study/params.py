"""params.yaml -> frozen dataclasses, one a section; every fault of the file is reported at once.

No field has a default but ``slices`` and ``columns`` of a data set, which most have no use for: every
number of a study stands in its params.yaml. What depends on the
data (enough images per class, files that exist) is checked where the data is.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from medfocus.storage.tables import COLUMNS

Modality = Literal["chest_xray", "brain_mri", "breast_ultrasound", "chest_ct", "other"]
Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(gt=0, lt=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]  # names files, DVC stages, MLflow models

# Fields that may be paths, beside names of what is found elsewhere.
_PATHS = (("masks", "config"), ("masks", "checkpoint"), ("clip", "pretrained"), ("report", "published"))

DRIFT_BY = "clip-zero-shot"  # the method whose features say how unlike two sets of images are

_strict = ConfigDict(extra="forbid")


@dataclass(frozen=True, config=_strict)
class OnlyParams:
    """What a method is held to, where all of the study would take it too long."""

    percents: tuple[Annotated[float, Field(gt=0, le=100)], ...]
    shots: tuple[Positive, ...]
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]


@dataclass(frozen=True, config=_strict)
class StudyParams:
    """Which cells are run: every method with its focus modes, on every data set, support and seed."""

    name: Name
    methods: dict[str, tuple[str, ...]]  # method -> focus modes to run it with
    percents: tuple[Annotated[float, Field(gt=0, le=100)], ...]  # of the training images
    shots: tuple[Positive, ...]  # images per class
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]  # a support set each
    only: dict[str, OnlyParams]  # method -> the part of percents, shots and seeds that it is run at

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
    """Which slices of a NIfTI volume are images."""

    axis: Annotated[int, Field(ge=0, le=2)]  # of the patient: 0 sagittal, 1 coronal, 2 axial slices
    every: Positive  # so many'th slice


@dataclass(frozen=True, config=_strict)
class DatasetParams:
    """One data set: where its images are and how they are spoken of."""

    root: (
        str  # folder of split/class/*.png|jpg, class/*.png|jpg, or of the CSV below; relative to params.yaml
    )
    manifest: str | None  # table (CSV, Parquet) inside root: path, label and optional split, patient
    patient_pattern: str | None  # regular expression over the path, its one group is the patient
    modality: Modality  # chooses the text templates and how many segments a mask unites
    names: dict[str, str]  # label -> the words for it in a text prompt; the label itself where absent
    templates: tuple[str, ...]  # text prompts with {c} for the class; empty: the modality's own
    flip: bool  # whether views may be mirrored; never for chest films
    # These may be left out, as most have no need of them.
    licence: str = ""  # of the images, as their source states it; for the data sheet
    slices: SlicesParams = SlicesParams(2, 1)  # of volumes
    columns: dict[str, str] = Field(default_factory=dict)  # what the manifest calls path, label, ...

    @model_validator(mode="after")
    def _columns_are_of_a_manifest(self) -> DatasetParams:
        if unknown := sorted(self.columns.keys() - COLUMNS):
            raise ValueError(f"columns has {unknown[0]!r}, which is none of {', '.join(COLUMNS)}")
        if self.columns and self.manifest is None:
            raise ValueError("columns is given, but manifest is null: name the table, or leave columns out")
        return self


@dataclass(frozen=True, config=_strict)
class PhantomParams:
    """One procedural data set, written to data/phantoms/<modality>."""

    seed: Annotated[int, Field(ge=0)]
    train_per_class: Positive
    test_per_class: Positive
    size: Annotated[int, Field(ge=64)]  # pixels a side


@dataclass(frozen=True, config=_strict)
class SplitsParams:
    """How support sets, and a test split where the data set has none, are drawn."""

    test_fraction: Share


@dataclass(frozen=True, config=_strict)
class AdapterParams:
    """How the strategy adapter is taught known regions of training images; see ``train_adapter``."""

    steps: Positive
    batch_size: Positive  # images per step
    lr: Annotated[float, Field(gt=0)]
    weight_decay: Annotated[float, Field(ge=0)]
    reduction: Positive  # the encoder's widths over the adapters'
    seed: Annotated[int, Field(ge=0)]


@dataclass(frozen=True, config=_strict)
class MasksParams:
    """How one mask per image is found without labels."""

    segmenter: Literal["sam2", "otsu"]
    config: str  # "pocket", a configuration of the sam2 package, or a YAML path
    checkpoint: str  # "pocket", "random:SEED", a path, or a hub id
    image_size: Positive  # pixels a side that SAM2 sees
    strategy: Literal["automatic", "grid", "center", "box", "retrieved", "adapter"]
    points_per_side: Positive  # of the automatic, grid and retrieved strategies
    follow_edges: bool  # move the outline of SAM2's mask to the image's edges
    min_area: Share  # of the image
    max_area: Share
    keep: dict[Modality, Positive]  # how many of the best segments are united; 1 where absent
    batch_size: Positive
    anatomy: dict[Modality, tuple[str, ...]]  # texts by which "retrieved" chooses; never a class
    adapter: AdapterParams  # how "adapter" is taught

    @model_validator(mode="after")
    def _fields_agree(self) -> MasksParams:
        if self.min_area >= self.max_area:
            raise ValueError(f"min_area {self.min_area} is not below max_area {self.max_area}")
        if self.follow_edges and self.strategy == "automatic" and self.segmenter == "sam2":
            raise ValueError("follow_edges is for every strategy but automatic, which is SAM2's own")
        return self


@dataclass(frozen=True, config=_strict)
class ViewsParams:
    """How an image and its mask become what CLIP sees."""

    feather: Annotated[float, Field(ge=0, lt=0.5)]  # width of the soft edge, share of the longest side
    attention_bias: Annotated[float, Field(ge=0)]  # β of the focus "attention"; 0 leaves it without effect
    augmented: Annotated[int, Field(ge=0)]  # random resized crops a support image, beside the whole one
    batch_size: Positive


@dataclass(frozen=True, config=_strict)
class ClipParams:
    """The frozen towers."""

    model: str  # "pocket", an open_clip model name, or an hf-hub: id
    pretrained: str  # "random:SEED", a pretrained tag, or a checkpoint path


@dataclass(frozen=True, config=_strict)
class LearningRatesParams:
    """How a learning rate is chosen where a method lists several."""

    folds: Annotated[int, Field(ge=2)]  # of the cross-validation inside the support
    images: Positive  # of the support, at most, that it trains and measures on


@dataclass(frozen=True, config=_strict)
class ValidationParams:
    """Out-of-fold validation inside the support, by which the best cell is chosen."""

    folds: Annotated[int, Field(ge=2)]
    methods: tuple[str, ...]  # the methods whose best cell may be registered


@dataclass(frozen=True, config=_strict)
class TrackingParams:
    """MLflow."""

    experiment: Name


@dataclass(frozen=True, config=_strict)
class GateParams:
    """What a model has to fulfil to become champion; see ``medfocus.evaluation.gate``."""

    margin: Annotated[float, Field(gt=-1, lt=1)]  # of accuracy above the champion; below 0: so much worse
    p: Annotated[float, Field(gt=0, le=1)]  # at most, of the paired test; 1 asks for none
    images: Positive  # at least, of the test set, that the champion has not learnt from
    recall: dict[str, Annotated[float, Field(ge=0, le=1)]]  # floors by class; "all" for classes not named
    calibration: Annotated[float, Field(gt=0, le=1)]  # expected calibration error at most


@dataclass(frozen=True, config=_strict)
class DriftParams:
    """From when on new images are too unlike the champion's to promote.

    See ``medfocus.evaluation.drift``.
    """

    embedding: Annotated[float, Field(gt=0.5, le=1)]  # AUROC of telling new from old by CLIP's features
    coverage: Annotated[float, Field(gt=0, le=1)]  # distance of the distributions of mask coverage
    classes: Annotated[float, Field(gt=0, le=1)]  # total variation of the class shares
    statistics: Annotated[float, Field(gt=0, le=1)]  # as coverage; of brightness, contrast, sharpness, size
    p: Annotated[float, Field(gt=0, lt=1)]  # below which chance does not explain it
    images: Positive  # old and new ones compared, at most


@dataclass(frozen=True, config=_strict)
class ReportParams:
    """What the page of a study compares."""

    baseline: str  # the system, a method without focus, that all others are compared with
    published: str | None  # CSV dataset,method,percent,accuracy of published rows; relative to params.yaml


@dataclass(frozen=True, config=_strict)
class ScaleParams:
    """Who makes masks and features, and where they are kept; it changes no byte of them."""

    runner: Literal["here", "threads", "processes", "dask"]  # here: this process, without shards
    workers: Positive
    images: Positive  # a shard
    address: str | None  # of a Dask scheduler; None starts a cluster on this machine
    cache: str | None  # URL for fsspec of the cache of masks and features; None: .cache in the project

    @model_validator(mode="after")
    def _fits(self) -> ScaleParams:
        if self.address and self.runner != "dask":
            raise ValueError(f"address is {self.address!r}, but runner is {self.runner!r}; only dask has one")
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
    methods: dict[str, dict[str, Any]]  # hyperparameters; each method checks its own
    learning_rates: LearningRatesParams
    validation: ValidationParams
    tracking: TrackingParams
    gate: GateParams
    drift: DriftParams
    report: ReportParams
    scale: ScaleParams
    device: Literal["auto", "cpu", "cuda"]  # auto: CUDA where there is one

    def method(self, name: str) -> tuple[str, dict[str, Any]]:
        """What kind of method a name of the section methods stands for, and its hyperparameters.

        A section with ``like`` is another row of the kind that it names, and takes over what it leaves out.
        """
        own = dict(self.methods[name])
        kind = own.pop("like", name)
        return kind, own if kind == name else {**self.methods[kind], **own}

    @model_validator(mode="after")
    def _names_agree(self) -> Params:
        for name, section in self.methods.items():
            kind = section.get("like", name)
            if kind not in self.methods or ("like" in self.methods[kind] and kind != name):
                kinds = ", ".join(n for n, s in self.methods.items() if "like" not in s)
                raise ValueError(f"methods.{name}.like is {kind!r}, which is no section; use one of {kinds}")
        if DRIFT_BY not in self.methods:
            raise ValueError(
                f"methods has no {DRIFT_BY}, by whose features drift is measured; add {DRIFT_BY}: {{}}"
            )
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
                        f"{section}.methods names {name!r}, but the section methods has only {known}"
                    )
        return self


def load_params(path: Path) -> Params:
    """Read and check a params.yaml.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: One line a fault, each naming the field, what stands there and what may.
    """
    content = read_content(path)
    try:
        return TypeAdapter(Params).validate_python(content)
    except ValidationError as error:
        faults = "\n".join(f"  {_describe(fault)}" for fault in error.errors())
        raise ValueError(f"{path}: {error.error_count()} fault(s):\n{faults}") from error


def read_content(path: Path) -> dict[str, Any]:
    """The sections of a params file, those of the file that it ``extends`` filled in.

    Of that one (a path relative to this one) it takes every section that it leaves out, and of a section that
    both have the fields that it leaves out; below methods that goes for each method's. The data sets and
    phantoms of a file that names some are its own alone. Paths are as this file's folder sees them.

    Raises FileNotFoundError and ValueError as ``load_params`` does.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such params file; copy the project's params.yaml and edit it.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds {type(content).__name__}, not the sections of a params file.")
    if "extends" not in content:
        return content
    base_path = path.parent / str(content.pop("extends"))
    base = moved_paths(read_content(base_path), base_path.parent, path.parent)
    for name, section in base.items():
        own = content.setdefault(name, section)
        if name in ("datasets", "phantoms") or not isinstance(own, dict) or not isinstance(section, dict):
            continue
        if name == "methods":
            own = {key: {**section.get(key, {}), **value} for key, value in own.items()}
        content[name] = {**section, **own}
    return content


def moved_paths(content: dict[str, Any], before: Path, after: Path) -> dict[str, Any]:
    """The content of a params file of folder ``before``, its paths written as in folder ``after``."""
    moved = copy.deepcopy(content)
    for dataset in moved.get("datasets", {}).values():
        if not Path(dataset["root"]).is_absolute():
            dataset["root"] = _moved(dataset["root"], before, after)
    for section, field in _PATHS:
        value = moved.get(section, {}).get(field)
        if value and not Path(value).is_absolute() and (before / value).exists():
            moved[section][field] = _moved(value, before, after)
    return moved


def _moved(path: str, before: Path, after: Path) -> str:
    return Path(os.path.relpath(before / path, after)).as_posix()


def _describe(fault: Any) -> str:
    """One pydantic error as `section.field is VALUE: what may stand there`."""
    place = ".".join(str(part) for part in fault["loc"] if part != "[key]") or "the file"
    if fault["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"{place} is not a known field; check its spelling or remove it"
    if fault["type"] in ("missing", "missing_argument"):
        return f"{place} is missing; every field has to stand in the file"
    if fault["type"] == "value_error":
        return f"{place}: {fault['ctx']['error']}"
    return f"{place} is {fault['input']!r}: {fault['msg'][0].lower() + fault['msg'][1:]}"
