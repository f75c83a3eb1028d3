"""A study is a folder with a params.yaml and a dvc.yaml; the project's root is the default one."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import yaml

from medfocus.params import Params, load_params

if TYPE_CHECKING:
    from medfocus.encoders import ClipEncoder
    from medfocus.masks.sam2 import Sam2Segmenter
    from medfocus.masks.segmenter import Segmenter

RESULTS = Path("reports/results.csv")  # DVC's output: rows by their cell's key, repeated exactly by a rerun
STUDY = Path("reports/study.csv")  # the same rows by the ids of this machine's MLflow runs
_GENERATED = "# Made from the project's dvc.yaml by `make run PARAMS=...`; change that one.\n"


@dataclass(frozen=True)
class Study:
    """An opened study: its checked parameters and where its files live."""

    folder: Path  # holds params.yaml, dvc.yaml, dvc.lock, data/ and reports/
    home: Path  # the project: .dvc/, .cache/ and MLflow's default database, shared by its studies
    params: Params

    def root(self, dataset: str) -> Path:
        """The folder of a data set's pictures."""
        return self.folder / self.params.datasets[dataset].root

    def segmenter_settings(self, dataset: str) -> dict[str, Any]:
        """The arguments that make a data set's segmenter; without ``batch_size``, which changes no mask."""
        masks = self.params.masks
        common = {
            "keep": masks.keep.get(self.params.datasets[dataset].modality, 1),
            "min_area": masks.min_area,
            "max_area": masks.max_area,
        }
        if masks.segmenter == "otsu":
            return common
        return common | {
            "config": masks.config,
            "checkpoint": masks.checkpoint,
            "image_size": masks.image_size,
            "strategy": masks.strategy,
            "points_per_side": masks.points_per_side,
            "follow_edges": masks.follow_edges,
        }

    def segmenter(self, dataset: str) -> Segmenter:
        """The segmenter that the masks section describes for a data set's modality."""
        settings = self.segmenter_settings(dataset)
        if self.params.masks.segmenter == "otsu":
            from medfocus.masks.otsu import OtsuSegmenter

            return OtsuSegmenter(**settings)
        from medfocus.masks.sam2 import build_segmenter  # takes seconds

        return build_segmenter(**settings, batch_size=self.params.masks.batch_size, device=self._device)

    def encoder(self) -> ClipEncoder:
        """The frozen towers of the clip section; beside them SAM2 where a method asks for its features.

        Raises ValueError where it does and the masks are not SAM2's.
        """
        from medfocus.encoders import build_clip  # takes seconds

        encoder = build_clip(self.params.clip.model, self.params.clip.pretrained, self._device)
        asking = [
            name for name in self.params.study.methods if self.params.methods[name].get("segmenter_grid")
        ]
        if not asking:
            return encoder
        if self.params.masks.segmenter != "sam2":
            raise ValueError(
                f"params.yaml: methods.{asking[0]}.segmenter_grid asks for SAM2's features, but "
                f"masks.segmenter is {self.params.masks.segmenter!r}. Set it to sam2, or segmenter_grid to 0."
            )
        return encoder.beside(cast("Sam2Segmenter", self.segmenter(next(iter(self.params.datasets)))))

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


def find_home(start: Path) -> Path:
    """The project around ``start``: the nearest folder upwards that DVC was initialised in."""
    for folder in (start.resolve(), *start.resolve().parents):
        if (folder / ".dvc").is_dir():
            return folder
    raise FileNotFoundError(
        f"{start.resolve()} is in no DVC project; work in a clone, or run `git init` and `dvc init` first."
    )


def here() -> Study:
    """The study of the working directory, as the stages see it."""
    return Study(Path.cwd(), find_home(Path.cwd()), load_params(Path("params.yaml")))


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
    else:
        folder = home / "studies" / (source.parent.name if source.name == "params.yaml" else source.stem)
        _adopt(source, folder)
        params = load_params(folder / "params.yaml")
    if folder != home:
        _write_if_changed(folder / "dvc.yaml", _stages_for(home, folder))
    return Study(folder, home, params)


def _stages_for(home: Path, folder: Path) -> str:
    text = (home / "dvc.yaml").read_text(encoding="utf-8")
    here, there = "  - code: .\n", f"  - code: {Path(os.path.relpath(home, folder)).as_posix()}\n"
    if here not in text:
        raise ValueError(f"{home / 'dvc.yaml'}: the line '- code: .' under vars is gone; put it back.")
    return _GENERATED + text.replace(here, there, 1)


def _adopt(source: Path, folder: Path) -> None:
    content = yaml.safe_load(source.read_text(encoding="utf-8"))
    for dataset in content["datasets"].values():
        dataset["root"] = _moved(dataset["root"], source.parent, folder)
    for section, field in (("masks", "config"), ("masks", "checkpoint"), ("clip", "pretrained")):
        if (source.parent / content[section][field]).exists():
            content[section][field] = _moved(content[section][field], source.parent, folder)
    head = f"# A copy of {source.name}, brought up to date from it at every run.\n"
    folder.mkdir(parents=True, exist_ok=True)
    _write_if_changed(folder / "params.yaml", head + _dump(content))


def _moved(path: str, before: Path, after: Path) -> str:
    """A path as written in ``before``/params.yaml, as it has to be written in ``after``/params.yaml."""
    if Path(path).is_absolute():
        return path
    return Path(os.path.relpath(before / path, after)).as_posix()


def _dump(content: dict[str, Any]) -> str:
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def _write_if_changed(path: Path, text: str) -> None:
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")
