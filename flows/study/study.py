"""A study is a folder with a params.yaml and a dvc.yaml; the project's root is the default one."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import yaml

from flows.study.params import Params, Region, load_params, moved_paths, read_content
from medfocus.datasets.records import read_manifest
from medfocus.masks.factory import build_sam2, build_segmenter
from medfocus.masks.settings import OtsuSettings, Sam2Settings, SegmenterSettings

if TYPE_CHECKING:
    from medfocus.clip.encoder import ClipEncoder
    from medfocus.masks.sam2.segmenter import Sam2Segmenter
    from medfocus.masks.segmenter import Segmenter

RESULTS = Path("reports/results.csv")  # DVC's output: rows by their cell's key, repeated exactly by a rerun
STUDY = Path("reports/study.csv")  # the same rows by the ids of this machine's MLflow runs
PLOTS = Path("reports/plots.csv")  # for `dvc plots`
METRICS = Path("reports/metrics.json")  # for `dvc exp show`: of each data set the cell that validation chose
PAGE = Path("reports/index.html")  # the whole study as one file to read and to send
ADAPTER = "adapter.safetensors"  # beside the masks of a data set that it made
CODE_HERE = "  - code: .\n"  # the line of the project's dvc.yaml that says where the code of the stages is
_GENERATED = "# Made from the project's dvc.yaml by `make run PARAMS=...`; change that one.\n"


@dataclass(frozen=True)
class Study:
    """An opened study: its checked parameters and where its files live."""

    folder: Path  # holds params.yaml, dvc.yaml, dvc.lock, data/ and reports/
    home: Path  # the project: .dvc/, .cache/ and MLflow's default database, shared by its studies
    params: Params

    def root(self, dataset: str) -> Path:
        """The folder of a data set's images."""
        return self.folder / self.params.datasets[dataset].root

    def segmenter_settings(self, dataset: str) -> SegmenterSettings:
        """Return the settings of a data set's segmenter, or of the SAM2 that an adapter or texts guide."""
        masks = self.params.masks
        keep = masks.keep.get(self.params.datasets[dataset].modality, 1)
        if masks.segmenter == "otsu":
            return OtsuSettings(keep, masks.min_area, masks.max_area)
        return Sam2Settings(
            masks.config,
            masks.checkpoint,
            masks.image_size,
            {"retrieved": "grid", "adapter": "box"}.get(masks.strategy, masks.strategy),
            points_per_side=masks.points_per_side,
            keep=keep,
            min_area=masks.min_area,
            max_area=masks.max_area,
            follow_edges=masks.follow_edges,
        )

    def segmenter(self, dataset: str, adapter: Path | None = None) -> Segmenter:
        """Build the segmenter that the masks section describes for a data set.

        ``adapter`` is the file of the strategy "adapter", by default the published one.
        Raises FileNotFoundError if that file is missing, and ValueError as ``anatomy`` does.
        """
        masks, state, rank = self.params.masks, None, None
        if masks.segmenter == "sam2" and masks.strategy == "retrieved":
            texts = self.anatomy(dataset)  # faults in the texts show before the seconds of loading
            from medfocus.clip.encoder import build_clip
            from medfocus.masks.sam2.retrieval import TextRank

            rank = TextRank.of(
                build_clip(self.params.clip.model, self.params.clip.pretrained, self._device), texts
            )
        elif masks.segmenter == "sam2" and masks.strategy == "adapter":
            path = adapter or self.folder / "data" / "masks" / dataset / ADAPTER
            if not path.is_file():
                raise FileNotFoundError(f"{path}: no adapter. Run the masks stage, which trains one.")
            from medfocus.storage import weights

            state = weights.load(path)
        return build_segmenter(
            self.segmenter_settings(dataset),
            adapter=state,
            rank=rank,
            batch_size=masks.batch_size,
            device=self._device,
        )

    def sam2(self, dataset: str) -> Sam2Segmenter:
        """Build the SAM2 of a data set, without adapter and texts."""
        settings = self.segmenter_settings(dataset)
        assert isinstance(settings, Sam2Settings)
        return build_sam2(settings, batch_size=self.params.masks.batch_size, device=self._device)

    def anatomy(self, dataset: str) -> tuple[str, ...]:
        """The texts by which "retrieved" chooses a data set's masks.

        Raises ValueError where there is none, or where one has the name of a class in it: the mask would tell
        what it is to help find.
        """
        described = self.params.datasets[dataset]
        texts = self.params.masks.anatomy.get(described.modality, ())
        if not texts:
            raise ValueError(
                f"params.yaml: masks.strategy is 'retrieved', but masks.anatomy has no text for "
                f"{described.modality}, the modality of {dataset}. Add one that says where to look, such as "
                "'the lungs' or 'a lesion'."
            )
        manifest = self.folder / "data" / "manifests" / f"{dataset}.csv"
        labels = {record.label for record in read_manifest(manifest)} if manifest.is_file() else set()
        for name in sorted({*labels, *described.names, *described.names.values()}):
            for text in texts:
                if f" {_words(name)} " in f" {_words(text)} ":
                    raise ValueError(
                        f"params.yaml: masks.anatomy.{described.modality} has the text {text!r}, which names "
                        f"the class {name!r} of {dataset}. Name anatomy, such as 'the lungs' or 'a lesion'."
                    )
        return texts

    def encoder(self, focus: str = "none") -> ClipEncoder:
        """The frozen towers of the clip section, with an eye for the region if ``focus`` is one for that.

        Beside them stands SAM2 where a method asks for its features.
        Raises ValueError where it does and the masks are not SAM2's.
        """
        encoder = self._towers()
        if focus not in get_args(Region):
            return encoder
        return encoder.with_region(focus, self.params.views.attention_bias)

    def _towers(self) -> ClipEncoder:
        from medfocus.clip.encoder import build_clip  # takes seconds

        encoder = build_clip(self.params.clip.model, self.params.clip.pretrained, self._device)
        asking = [
            name for name in self.params.study.methods if self.params.method(name)[1].get("segmenter_grid")
        ]
        if not asking:
            return encoder
        if self.params.masks.segmenter != "sam2":
            raise ValueError(
                f"params.yaml: methods.{asking[0]}.segmenter_grid asks for SAM2's features, but "
                f"masks.segmenter is {self.params.masks.segmenter!r}. Set it to sam2, or segmenter_grid to 0."
            )
        return encoder.with_segmenter(self.sam2(next(iter(self.params.datasets))))

    @property
    def _device(self) -> str:
        if self.params.device != "auto":
            return self.params.device
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"

    @property
    def stages(self) -> list[str]:
        """The names of the study's DVC stages, in the order in which the flow runs them."""
        each = ("ingest", "duplicates", "splits", "masks")
        return [
            *(f"phantoms@{modality}" for modality in self.params.phantoms),
            *(f"{stage}@{dataset}" for dataset in self.params.datasets for stage in each),
            "finetune",
            "evaluate",
        ]

    @property
    def cache(self) -> Path:
        """Content-keyed scratch space, shared by all studies; deleting it costs time and nothing else."""
        return self.home / ".cache"

    def shared_cache(self, kind: str) -> str:
        """The folder or URL for "masks" or "features", which machines may share."""
        return f"{self.params.scale.cache or self.cache}/{kind}"

    @cached_property
    def version(self) -> str:
        """sha256 hex over the parameters and the manifests: what a process that lives on may not mix up."""
        manifests = sorted((self.folder / "data" / "manifests").glob("*.csv"))
        content = b"\0".join(path.read_bytes() for path in manifests)
        return hashlib.sha256(repr(self.params).encode() + content).hexdigest()


def _words(text: str) -> str:
    """Without case, underscores and punctuation, one space between words."""
    return " ".join(re.findall(r"[^\W_]+", text.casefold()))


def find_home(start: Path) -> Path:
    """The project around ``start``: the nearest folder upwards that DVC was initialised in."""
    for folder in (start.resolve(), *start.resolve().parents):
        if (folder / ".dvc").is_dir():
            return folder
    raise FileNotFoundError(
        f"{start.resolve()} is in no project; go into one, or begin one with `medfocus new FOLDER`."
    )


def params_files(home: Path) -> list[Path]:
    """The params files of a project's studies, the embedded one first."""
    return [home / "params.yaml", *sorted((home / "studies").glob("*.yaml"))]


def here() -> Study:
    """The study of the working directory, as the stages see it."""
    return study_in(Path.cwd())


def study_in(folder: Path) -> Study:
    """The study of a folder, as it stands."""
    return Study(folder, find_home(folder), load_params(folder / "params.yaml"))


def open_study(params_file: Path, home: Path | None = None) -> Study:
    """Make ready the study that a params file describes.

    A ``params.yaml`` inside the project is a study where it stands. Any other file is copied to
    ``studies/<its name>/params.yaml``, the paths in it kept pointing to what they pointed to. A
    study folder without a current dvc.yaml gets the project's.
    """
    params = load_params(params_file)
    home = home or find_home(Path.cwd())
    source = params_file.resolve()
    if source.name == "params.yaml" and source.is_relative_to(home):
        folder = source.parent
        if "extends" in yaml.safe_load(source.read_text(encoding="utf-8")):
            raise ValueError(
                f"{params_file}: extends another file, but DVC reads a study's params.yaml as it stands. "
                "Give it another name, such as study.yaml: it is then copied, whole, to a study of its own."
            )
    else:
        folder = home / "studies" / (source.parent.name if source.name == "params.yaml" else source.stem)
        _adopt(source, folder)
        params = load_params(folder / "params.yaml")
    if folder != home:
        _write_if_changed(folder / "dvc.yaml", _stages_for(home, folder))
    return Study(folder, home, params)


def _stages_for(home: Path, folder: Path) -> str:
    text = (home / "dvc.yaml").read_text(encoding="utf-8")
    found = re.search(r"^  - code: (.+)\n", text, re.MULTILINE)
    if found is None:
        raise ValueError(f"{home / 'dvc.yaml'}: the line '- code: .' under vars is gone; put it back.")
    if Path(found[1]).is_absolute():  # of packages that are installed
        return _GENERATED + text
    there = Path(os.path.relpath(home / found[1], folder)).as_posix()
    return _GENERATED + text.replace(found[0], f"  - code: {there}\n", 1)


def _adopt(source: Path, folder: Path) -> None:
    content = moved_paths(read_content(source), source.parent, folder)
    head = f"# A copy of {source.name}, brought up to date from it at every run.\n"
    folder.mkdir(parents=True, exist_ok=True)
    _write_if_changed(folder / "params.yaml", head + _dump(content))


def _dump(content: dict[str, Any]) -> str:
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def _write_if_changed(path: Path, text: str) -> None:
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")
