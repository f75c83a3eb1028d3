"""The features of a data set's images, computed with one encoder."""

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
from flows.study.methods import build_method, choice_of
from flows.study.study import Study, study_in
from medfocus.clip import features
from medfocus.clip.build import build_clip
from medfocus.clip.prompts import class_embeddings, text_prompts
from medfocus.datasets.records import Record, chunks, read_manifest
from medfocus.datasets.splits import Splits, read_splits
from medfocus.focus.augment import augmentation
from medfocus.focus.controls import MaskSource, focus_of, mask_source_of
from medfocus.focus.view import view, view_key
from medfocus.images import decode
from medfocus.learning import fitting
from medfocus.learning.method import IMAGES, Method, Support
from medfocus.masks.published import PublishedMasks
from medfocus.masks.quality import center_box
from medfocus.methods import METHODS
from medfocus.storage.fingerprint import fingerprint

if TYPE_CHECKING:
    from medfocus.clip.encoder import ClipEncoder


class EncodedDataset:
    """A data set after ingestion, splitting and segmentation, with one encoder."""

    def __init__(self, study: Study, name: str, encoder: ClipEncoder) -> None:
        """Read the data set's manifest, splits and masks from the study's folder."""
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
        self._region_encoders: dict[str, ClipEncoder] = {}  # focus mode -> encoder
        # (embedding, focus, V) -> path -> (V, ...)
        self._embedded: dict[tuple[str, str, int], dict[str, Tensor]] = {}

    @cached_property
    def text_features(self) -> Tensor:
        """Class embeddings (K, D) of the data set's text prompts."""
        return class_embeddings(self.encoder, self.prompts)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Each class's name in text prompts (K,)."""
        return tuple(self.params.names.get(label, label) for label in self.classes)

    @cached_property
    def prompts(self) -> tuple[tuple[str, ...], ...]:
        """Each class's text prompts (K, templates)."""
        prompts = text_prompts(self.class_names, self.params.modality, self.params.templates)
        return tuple(map(tuple, prompts))

    def encoder_for(self, focus: str) -> ClipEncoder:
        """Return the encoder for a focus mode, with an input for the region if the mode needs one."""
        mode = focus_of(focus)
        if mode not in self._region_encoders:
            self._region_encoders[mode] = models.region_encoder(self.study.params, self.encoder, mode)
        return self._region_encoders[mode]

    def labels(self, paths: Sequence[str]) -> np.ndarray:
        """Return the class indices of images, (N,) int64."""
        return np.array([self.classes.index(self.records[path].label) for path in paths], dtype=np.int64)

    def digest(self, paths: Iterable[str]) -> str:
        """Return the sha256 hex of images' bytes and labels."""
        content = sorted((self.records[path].sha256, self.records[path].label) for path in paths)
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    @cached_property
    def test_digest(self) -> str:
        """``digest`` of the whole test set."""
        return self.digest(self.splits.test)

    def support_paths(self, cell: Cell) -> list[str]:
        """Return the images of a cell's support; none for a method that does not learn."""
        return [] if cell.support == NOTHING else self.splits.supports[cell.seed][cell.support]

    def embed(self, methods: Iterable[str], focus: str, paths: Iterable[str], views: int, label: str) -> None:
        """Compute the output of the methods' frozen parts for images, for ``inputs`` to return.

        Args:
            methods: Names of methods; each view passes the image encoder once for all of them.
            focus: Visual prompt.
            paths: Images of the manifest.
            views: Number of views of each image: the whole image, then augmented ones.
            label: Label of the progress bar.
        """
        by_embedding = {self._method(name).embedding: name for name in methods}
        known = [self._embedded.setdefault((embedding, focus, views), {}) for embedding in by_embedding]
        wanted = [path for path in dict.fromkeys(paths) if any(path not in rows for rows in known)]
        if not wanted:
            return
        names, label = tuple(by_embedding.values()), f"{label} {self.name} {focus}"
        scale = self.study.params.scale
        if scale.runner != "here":
            from flows.study.runners import by_shards  # imports Prefect

            missing = self._missing(names, focus, wanted, views)
            jobs = [
                FeatureShard(
                    self.study.folder, self.study.version, self.name, names, focus, tuple(part), views
                )
                for part in chunks(missing, scale.images)
            ]
            if jobs:
                with tqdm(total=len(missing), desc=label, unit="image", disable=None, leave=False) as bar:
                    by_shards(encode_shard, jobs, scale, bar.update)
        tables = self.encode(names, focus, wanted, views, label)
        for rows, table in zip(known, tables, strict=True):
            rows.update(zip(wanted, table, strict=True))

    def encode(
        self, methods: Sequence[str], focus: str, paths: Sequence[str], views: int, label: str | None
    ) -> list[Tensor]:
        """Return each method's frozen output (N, V, ...); without a label, no progress bar is shown."""
        items = [(self.records[path], number) for path in paths for number in range(views)]
        hidden = label is None or None  # None: only if there is no terminal
        with tqdm(total=len(items), desc=label, unit="view", disable=hidden, leave=False) as bar:
            encoded = features.encode_together(
                items,
                [self._view_name(record, focus, number) for record, number in items],
                lambda item: self._view(*item, focus),
                self._kinds(methods, focus),
                cache=self.study.shared_cache("features"),
                batch_size=self.study.params.views.batch_size,
                progress=lambda done, total: bar.update(done - bar.n),
            )
        return [table.unflatten(0, (len(paths), views)) for table in encoded]

    def _kinds(self, methods: Sequence[str], focus: str) -> list[features.Kind]:
        encoder = self.encoder_for(focus).with_activation_cache()

        def kind(name: str) -> features.Kind:
            method = self._method(name, encoder)
            settings = feature_key(method, encoder, self._view_key(focus))
            return features.Kind(method.embed, settings, _dtype(method.embedding))

        return [kind(name) for name in methods]

    def _missing(self, methods: Sequence[str], focus: str, paths: Sequence[str], views: int) -> list[str]:
        """Return the paths without features in the cache."""
        names = [self._view_name(self.records[path], focus, i) for path in paths for i in range(views)]
        missing = features.lacking(names, self._kinds(methods, focus), self.study.shared_cache("features"))
        return [path for i, path in enumerate(paths) if any(missing[i * views : (i + 1) * views])]

    def inputs(self, method: Method, focus: str, paths: Sequence[str], views: int) -> Tensor:
        """Return the output of the method's frozen part (V, N, ...), which ``embed`` has computed."""
        known = self._embedded[method.embedding, focus, views]
        return torch.stack([known[path] for path in paths], dim=1)

    def percent_of_train(self, cell: Cell) -> float:
        """Return the size of a cell's support in percent of the training images."""
        if cell.support.endswith("%"):
            return float(cell.support[:-1])
        return 100 * len(self.support_paths(cell)) / len(self.splits.train)

    def _method(self, name: str, encoder: ClipEncoder | None = None) -> Method:
        return build_method(self.study.params, name, encoder, flip=self.params.flip)

    def views(self, cell: Cell) -> int:
        """Return the number of views that a cell's method takes of each image of its support."""
        usual = self.study.params.views.augmented
        return self._method(cell.method).views(len(self.support_paths(cell)), usual)

    def support(self, method: Method, cell: Cell, views: int) -> Support:
        """Return a cell's support, which ``embed`` has computed; it is empty if the method does not learn."""
        paths = self.support_paths(cell)
        return Support(
            self.inputs(method, cell.focus, paths, views) if paths else torch.empty(1, 0),
            torch.from_numpy(self.labels(paths)),
            torch.tensor([self.splits.groups[path] for path in paths], dtype=torch.int64),
            self.text_features,
            self.class_names,
            self.prompts,
        )

    def key(self, cell: Cell, settings: dict[str, Any], views: int, folds: int) -> str:
        """Return the sha256 hex of all that a cell's checkpoint depends on, including the code."""
        paths = self.support_paths(cell)
        choice = choice_of(self.study.params, cell.method)
        content = {
            "cell": [cell.method, cell.focus, cell.seed],
            "settings": settings,
            "encoder": self.encoder_for(cell.focus).key,
            "view": self._view_key(cell.focus),
            "views": views,
            "folds": folds,
            "confidence": self.study.params.validation.confidence if folds else None,
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
            "choice": dataclasses.asdict(choice) if choice else None,
            "prompts": self.prompts,
            "code": cell_code(METHODS[self.study.params.method(cell.method)[0]], self.encoder),
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def image(self, record: Record) -> np.ndarray:
        """Decode an image, (H, W, 3) uint8."""
        return decode.read(self.root / record.path)

    def mask(self, record: Record, focus: str) -> np.ndarray | None:
        """Return the mask (H, W) that a focus mode uses, or the image's own if the mode uses none.

        Another image's mask of another size gives None.
        """
        mask = self._mask(record.sha256, "own" if focus == "none" else mask_source_of(focus))
        return mask if mask.shape == (record.height, record.width) else None

    def shown(self, record: Record, focus: str) -> np.ndarray:
        """Return the view (S, S, C) uint8 of the whole image under a focus mode."""
        return self._view(record, 0, focus)

    def _view(self, record: Record, number: int, focus: str) -> np.ndarray:
        image = decode.read(self.root / record.path)
        mask = None if focus == "none" else self._mask(record.sha256, mask_source_of(focus))
        if mask is not None and mask.shape != image.shape[:2]:  # another image's mask
            height, width = image.shape[:2]
            mask = np.asarray(Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST))
        change = augmentation(record.sha256, number, mirror=self.params.flip)
        frame, params = self.encoder.frame, self.study.params.views
        return view(
            image,
            mask,
            focus=focus_of(focus),
            frame=frame,
            feather=params.feather,
            fill=params.fill,
            change=change,
        )

    def _view_key(self, focus: str) -> str:
        frame, params = self.encoder.frame, self.study.params.views
        return view_key(focus=focus_of(focus), frame=frame, feather=params.feather, fill=params.fill)

    def _view_name(self, record: Record, focus: str, number: int) -> str:
        mask = "" if focus == "none" else self._mask_digest(record.sha256, mask_source_of(focus))
        return f"{record.sha256} {mask} {number} {self.params.flip and number > 0}"

    def _mask(self, sha256: str, source: MaskSource) -> np.ndarray:
        """Return a mask (H, W) bool at the size of the image from which it was computed."""
        mask = self.masks[self._partner[sha256] if source == "another image's" else sha256]
        return center_box(*mask.shape) if source == "center box" else mask

    @cached_property
    def _partner(self) -> dict[str, str]:
        """Each image's successor on a random ring of all images, drawn without their labels."""
        ring = sorted(
            {record.sha256 for record in self.records.values()},
            key=lambda sha: hashlib.sha256(f"shuffled {sha}".encode()).digest(),
        )
        return dict(zip(ring, [*ring[1:], ring[0]], strict=True))

    @cache  # noqa: B019  # the stage keeps the data set until it ends
    def _mask_digest(self, sha256: str, source: MaskSource) -> str:
        mask = self._mask(sha256, source)
        return hashlib.sha256(f"{mask.shape}".encode() + np.packbits(mask).tobytes()).hexdigest()


@dataclasses.dataclass(frozen=True)
class FeatureShard:
    """Images of a data set; a worker computes their features."""

    folder: Path  # of the study
    version: str  # ``Study.version``
    dataset: str
    methods: tuple[str, ...]
    focus: str
    paths: tuple[str, ...]
    views: int


def encode_shard(shard: FeatureShard) -> int:
    """Write a shard's features to the cache, in a worker of ``flows.study.runners``."""
    dataset = _dataset_of_thread(shard.folder, shard.version, shard.dataset, threading.get_ident())
    dataset.encode(shard.methods, shard.focus, shard.paths, shard.views, None)
    return len(shard.paths)


@lru_cache(maxsize=4)
def _dataset_of_thread(folder: Path, version: str, dataset: str, thread: int) -> EncodedDataset:
    """Open a data set for one thread, because threads cannot share an encoder."""
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
    """Return the dtype that the cache uses for an embedding."""
    if embedding == IMAGES:
        return torch.uint8
    return torch.float16 if embedding.startswith("tokens") else torch.float32


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()
