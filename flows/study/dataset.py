"""A data set opened for the cells of a study: its records, splits and masks, seen through one encoder."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import threading
from collections.abc import Iterable, Sequence
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from flows.study import models
from flows.study.cells import NOTHING, Cell
from flows.study.methods import build_method, choice_of_rate
from flows.study.study import Study, study_in
from medfocus.clip import features
from medfocus.clip.build import build_clip
from medfocus.clip.prompts import class_embeddings, text_prompts
from medfocus.clip.regions import REGIONS
from medfocus.datasets.records import Record, chunks, read_manifest
from medfocus.datasets.splits import Splits, read_splits
from medfocus.focus.controls import MaskSource, focus_of, mask_source_of
from medfocus.focus.crop import crop_box
from medfocus.focus.view import view, view_key
from medfocus.images import decode
from medfocus.learning import fitting
from medfocus.learning.method import IMAGES, Method, Support
from medfocus.masks.quality import center_box
from medfocus.masks.store import PublishedMasks
from medfocus.methods import METHODS
from medfocus.storage.fingerprint import fingerprint

if TYPE_CHECKING:
    from medfocus.clip.encoder import ClipEncoder


class EncodedDataset:
    """A data set after ingestion, splitting and masking, seen through one encoder."""

    def __init__(self, study: Study, name: str, encoder: ClipEncoder) -> None:
        """Read what the earlier stages made in the study's folder."""
        self.name = name
        self.study = study
        self.encoder = encoder
        self.params = study.params.datasets[name]
        self.root = study.root(name)
        self.paths = study.paths
        self.records: dict[str, Record] = {r.path: r for r in read_manifest(self.paths.manifest(name))}
        self.splits: Splits = read_splits(self.paths.splits(name))
        self.masks = PublishedMasks(self.paths.masks(name))
        self.classes: tuple[str, ...] = tuple(self.splits.classes)
        self._regional: dict[str, ClipEncoder] = {}  # by focus
        self._embedded: dict[tuple[str, str, int], dict[str, Tensor]] = {}  # -> path -> (V, ...)

    @cached_property
    def text_features(self) -> Tensor:
        """(K, D) class embeddings of the data set's prompts."""
        return class_embeddings(self.encoder, self.prompts)

    @property
    def class_names(self) -> tuple[str, ...]:
        """(K,) the words for each class."""
        return tuple(self.params.names.get(label, label) for label in self.classes)

    @cached_property
    def prompts(self) -> tuple[tuple[str, ...], ...]:
        """(K, templates) the texts of each class."""
        written = text_prompts(self.class_names, self.params.modality, self.params.templates)
        return tuple(map(tuple, written))

    def encoder_for(self, focus: str) -> ClipEncoder:
        """The encoder as a focus mode needs it: with an eye for a region beside the image, or without."""
        if focus not in REGIONS:
            return self.encoder
        if focus not in self._regional:
            bias = self.study.params.views.attention_bias
            self._regional[focus] = self.encoder.with_region(focus, bias)
        return self._regional[focus]

    def labels(self, paths: Sequence[str]) -> np.ndarray:
        """(N,) int64 class indices of images."""
        return np.array([self.classes.index(self.records[path].label) for path in paths], dtype=np.int64)

    def digest(self, paths: Iterable[str]) -> str:
        """sha256 hex over the bytes and the labels of images."""
        content = sorted((self.records[path].sha256, self.records[path].label) for path in paths)
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    @cached_property
    def test_digest(self) -> str:
        """``digest`` of the whole test set."""
        return self.digest(self.splits.test)

    def support_paths(self, cell: Cell) -> list[str]:
        """The images a cell may learn from; for a method that learns nothing, none."""
        return [] if cell.support == NOTHING else self.splits.supports[cell.seed][cell.support]

    def embed(self, methods: Iterable[str], focus: str, paths: Iterable[str], views: int, label: str) -> None:
        """Have the frozen parts' output for ``views`` views of images at hand, computing each once.

        Args:
            methods: Whose frozen parts are run, all of them in one pass of the images through the tower.
            focus: The visual prompt.
            paths: Images of the manifest.
            views: View 0 is the whole image, the others are random crops.
            label: Beside the progress bar.
        """
        one_each = {build_method(self.study.params, name, None).embedding: name for name in methods}
        known = {name: self._embedded.setdefault((name, focus, views), {}) for name in one_each}
        wanted = [path for path in dict.fromkeys(paths) if any(path not in rows for rows in known.values())]
        if not wanted:
            return
        names, label = tuple(one_each.values()), f"{label} {self.name} {focus}"
        scale = self.study.params.scale
        if scale.runner != "here":
            from flows.study.runners import by_shards  # imports Prefect

            lacking = self._lacking(names, focus, wanted, views)
            jobs = [
                FeatureShard(
                    self.study.folder, self.study.version, self.name, names, focus, tuple(part), views
                )
                for part in chunks(lacking, scale.images)
            ]
            if jobs:
                with tqdm(total=len(lacking), desc=label, unit="image", disable=None, leave=False) as bar:
                    by_shards(encode_shard, jobs, scale, bar.update)
        tables = self.encode(names, focus, wanted, views, label)
        for rows, table in zip(known.values(), tables, strict=True):
            rows.update(zip(wanted, table, strict=True))

    def encode(
        self, methods: Sequence[str], focus: str, paths: Sequence[str], views: int, label: str | None
    ) -> list[Tensor]:
        """The output of each method's frozen part for N paths, (N, V, ...); without a label no bar shows."""
        size, feather = self.encoder.image_size, self.study.params.views.feather
        items = [(self.records[path], number) for path in paths for number in range(views)]
        hidden = True if label is None else None
        with tqdm(total=len(items), desc=label, unit="view", disable=hidden, leave=False) as bar:
            encoded = features.encode_together(
                items,
                [self._view_name(record, focus, number) for record, number in items],
                lambda item: self._view(*item, focus=focus, size=size, feather=feather),
                self._kinds(methods, focus),
                cache=self.study.shared_cache("features"),
                batch_size=self.study.params.views.batch_size,
                progress=lambda done, total: bar.update(done - bar.n),
            )
        return [table.unflatten(0, (len(paths), views)) for table in encoded]

    def _kinds(self, methods: Sequence[str], focus: str) -> list[features.Kind]:
        encoder = self.encoder_for(focus).with_activation_cache()

        def kind(name: str) -> features.Kind:
            method = build_method(self.study.params, name, encoder)
            settings = feature_key(method, encoder, self._view_key(focus))
            return features.Kind(method.embed, settings, _dtype(method.embedding))

        return [kind(name) for name in methods]

    def _lacking(self, methods: Sequence[str], focus: str, paths: Sequence[str], views: int) -> list[str]:
        """Of the paths those whose features are not in the cache."""
        names = [self._view_name(self.records[path], focus, i) for path in paths for i in range(views)]
        missing = features.lacking(names, self._kinds(methods, focus), self.study.shared_cache("features"))
        return [path for i, path in enumerate(paths) if any(missing[i * views : (i + 1) * views])]

    def inputs(self, method: Method, focus: str, paths: Sequence[str], views: int) -> Tensor:
        """What ``embed`` computed of ``method``'s frozen part for ``paths``: (V, N, ...)."""
        known = self._embedded[method.embedding, focus, views]
        return torch.stack([known[path] for path in paths], dim=1)

    def percent_of_train(self, cell: Cell) -> float:
        """How much of the training images a cell may learn from; as written, where that is a percentage."""
        if cell.support.endswith("%"):
            return float(cell.support[:-1])
        return 100 * len(self.support_paths(cell)) / len(self.splits.train)

    def support(self, method: Method, cell: Cell, views: int) -> Support:
        """A cell's support, embedded before; empty for a method that learns nothing."""
        paths = self.support_paths(cell)
        if not paths:
            nothing = torch.empty(0, dtype=torch.int64)
            inputs = torch.empty(1, 0)
            return Support(inputs, nothing, nothing, self.text_features, self.class_names, self.prompts)
        return Support(
            self.inputs(method, cell.focus, paths, views),
            torch.from_numpy(self.labels(paths)),
            torch.tensor([self.splits.groups[path] for path in paths]),
            self.text_features,
            self.class_names,
            self.prompts,
        )

    def key(self, cell: Cell, settings: dict[str, Any], views: int, folds: int) -> str:
        """sha256 hex over everything that a cell's checkpoint depends on, the code included."""
        paths = self.support_paths(cell)
        choice = choice_of_rate(self.study.params, cell.method)
        content = {
            "cell": [cell.method, cell.focus, cell.seed],
            "settings": settings,
            "encoder": self.encoder_for(cell.focus).key,
            "view": self._view_key(cell.focus),
            "views": views,
            "folds": folds,
            "classes": self.classes,
            "text": _digest(self.text_features),
            "support": [
                [
                    self._view_name(self.records[p], cell.focus, 0),
                    self.records[p].label,
                    self.splits.groups[p],
                ]
                for p in paths
            ],
            "flip": self.params.flip,
            "rates": dataclasses.asdict(choice) if choice else None,
            "prompts": self.prompts,
            "code": cell_code(METHODS[self.study.params.method(cell.method)[0]], self.encoder),
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def image(self, record: Record) -> np.ndarray:
        """(H, W, 3) uint8, decoded."""
        return decode.read(self.root / record.path)

    def mask(self, record: Record, focus: str) -> np.ndarray | None:
        """(H, W) bool, what a focus mode takes for the region; for "none" the image's own mask."""
        which = "own" if focus == "none" else mask_source_of(focus)
        mask = self._mask(record.sha256, which)
        return mask if mask.shape == (record.height, record.width) else None

    def shown(self, record: Record, focus: str) -> np.ndarray:
        """(S, S, C) uint8, the whole image as a focus mode shows it."""
        size, feather = self.encoder.image_size, self.study.params.views.feather
        return self._view(record, 0, focus=focus, size=size, feather=feather)

    def _view(self, record: Record, number: int, *, focus: str, size: int, feather: float) -> np.ndarray:
        image = decode.read(self.root / record.path)
        mask = None if focus == "none" else self._mask(record.sha256, mask_source_of(focus))
        if mask is not None and mask.shape != image.shape[:2]:  # another image's
            height, width = image.shape[:2]
            mask = np.asarray(Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST))
        crop = crop_box(record.sha256, number, mirror=self.params.flip)
        return view(image, mask, focus=focus_of(focus), size=size, feather=feather, crop=crop)

    def _view_key(self, focus: str) -> str:
        size, feather = self.encoder.image_size, self.study.params.views.feather
        return view_key(focus=focus_of(focus), size=size, feather=feather)

    def _view_name(self, record: Record, focus: str, number: int) -> str:
        mask = "" if focus == "none" else self._mask_digest(record.sha256, mask_source_of(focus))
        return f"{record.sha256} {mask} {number} {self.params.flip and number > 0}"

    def _mask(self, sha256: str, which: MaskSource) -> np.ndarray:
        """(H, W) bool, at the resolution of the image that it was made for."""
        mask = self.masks[self._partner[sha256] if which == "another image's" else sha256]
        return center_box(*mask.shape) if which == "center box" else mask

    @cached_property
    def _partner(self) -> dict[str, str]:
        """Every image's successor on one random ring through all of them, drawn without their labels."""
        ring = sorted(
            {record.sha256 for record in self.records.values()},
            key=lambda sha: hashlib.sha256(f"shuffled {sha}".encode()).digest(),
        )
        return dict(zip(ring, [*ring[1:], ring[0]], strict=True))

    @cache  # noqa: B019  # lives as long as the stage that made the data set
    def _mask_digest(self, sha256: str, which: MaskSource) -> str:
        mask = self._mask(sha256, which)
        return hashlib.sha256(f"{mask.shape}".encode() + np.packbits(mask).tobytes()).hexdigest()


@dataclasses.dataclass(frozen=True)
class FeatureShard:
    """Some images of a data set whose features a worker is to put into the cache."""

    folder: Path  # of the study
    version: str  # see ``Study.version``
    dataset: str
    methods: tuple[str, ...]
    focus: str
    paths: tuple[str, ...]
    views: int


def encode_shard(shard: FeatureShard) -> int:
    """Have the cache hold a shard's features; in a worker of ``flows.study.runners``."""
    dataset = _dataset_of_thread(shard.folder, shard.version, shard.dataset, threading.get_ident())
    dataset.encode(shard.methods, shard.focus, shard.paths, shard.views, None)
    return len(shard.paths)


@lru_cache(maxsize=4)
def _dataset_of_thread(folder: Path, version: str, dataset: str, thread: int) -> EncodedDataset:
    """A data set for the shards of one thread: towers are for one at a time."""
    study = study_in(folder)
    return EncodedDataset(study, dataset, models.build_encoder(study))


def feature_key(method: Method, encoder: ClipEncoder, view: str) -> str:
    """Return the cache's key of a method's frozen features, from the key of their views."""
    return fingerprint(
        type(method).embed,
        type(encoder),
        build_clip,
        encoder=encoder.key,
        embedding=method.embedding,
        view=view,
    )


def cell_code(method: type[Method], encoder: ClipEncoder) -> str:
    """Return the sha256 hex of the code behind a cell's checkpoint."""
    return fingerprint(method, fitting, class_embeddings, features, type(encoder), build_clip)


def _dtype(embedding: str) -> torch.dtype:
    """As which rows are kept: images as they are, tokens in half of the room."""
    if embedding == IMAGES:
        return torch.uint8
    return torch.float16 if embedding.startswith("tokens") else torch.float32


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()
