"""MedFocusCLIP as a scikit-learn classifier: images and labels in, no study, no server, nothing on disk."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Self, cast

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import assert_all_finite, check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_consistent_length, check_is_fitted, column_or_1d
from torch import Tensor

from medfocus.clip import features
from medfocus.clip.build import build_clip
from medfocus.clip.encoder import ClipEncoder
from medfocus.clip.prompts import class_embeddings, text_prompts
from medfocus.clip.regions import REGIONS
from medfocus.explain.explain import explain, on_image
from medfocus.focus.crop import crop_box
from medfocus.focus.modes import FOCUS
from medfocus.focus.view import view
from medfocus.images import decode
from medfocus.learning.selection import LearningRates
from medfocus.masks.factory import build_segmenter
from medfocus.masks.segmenter import Mask, Segmenter
from medfocus.masks.settings import SETTINGS, SegmenterSettings
from medfocus.masks.store import MaskStore
from medfocus.methods import IMAGES, METHODS, Method, Support
from medfocus.serving import checkpoint, defaults
from medfocus.serving.predictor import Predictor, probabilities_of, save_model

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

_OWN = "estimator.json"  # in a saved model's folder: what scikit-learn knows of it

Images = Iterable[Any]  # of arrays (H, W) or (H, W, 3) uint8, or of paths


@dataclass(frozen=True, eq=False)
class Explanation:
    """What a fitted classifier saw of one image, and where what it says comes from."""

    label: Any  # the class that is explained, one of ``classes_``
    mask: np.ndarray  # (H, W) bool, the region
    mask_status: str  # the rung of the fallback ladder on which it was found
    focus: np.ndarray  # (S, S, 3) uint8, the image as CLIP gets it
    attribution: np.ndarray  # (H, W) float32, sums to one
    way: str  # how the attribution was come by, see ``medfocus.explain.explain``


class MedFocusCLIP(ClassifierMixin, BaseEstimator):
    """Few-shot classification of medical images with region focus. For research; not for clinical use.

    An image is an array (H, W) or (H, W, 3) of uint8, or a path; X is a sequence of them, of any sizes, or
    an array that stacks them. ``n_features_in_`` has no meaning for images, so there is none.

    Parameters
    ----------
    method : str, default="medfocusclip"
        A key of ``medfocus.methods.METHODS``.
    settings : dict or None, default=None
        Hyperparameters of the method, in place of those of ``medfocus.serving.defaults.METHODS``.
    focus : str, default="crop"
        How an image is shown under its mask: a key of ``medfocus.focus.modes.FOCUS``, "attention", "alpha"
        or "dual". With "none" no mask is made.
    clip, pretrained : str, default="pocket"
        See ``medfocus.clip.build.build_clip``. The default is small and knows procedural images alone.
    segmenter : {"sam2", "otsu"}, default="sam2"
        What makes the masks.
    segmenter_settings : dict or None, default=None
        In place of those of ``medfocus.serving.defaults.SEGMENTERS``.
    modality : str, default="other"
        A key of ``medfocus.clip.prompts.TEMPLATES``.
    names : dict or None, default=None
        ``str(label)`` -> the words for the class; a label that is not in it is its own name.
    templates : sequence of str or None, default=None
        Texts with "{c}" in place of the modality's.
    augmented : int, default=2
        Random crops beside each training image, for methods that train on views.
    flip : bool, default=False
        Whether half of them are mirrored; never for chest films, where the heart's side is a finding.
    feather, attention_bias : float
        See ``medfocus.focus.modes.focus`` and ``medfocus.clip.encoder.ClipEncoder.with_region``.
    batch_size : int, default=64
        Views a pass of the image encoder.
    cache : path or None, default=None
        A folder that keeps the masks between fits, as a cross-validation wants; None keeps nothing.
    device : str, default="cpu"
        Where the towers run.
    random_state : int, RandomState instance or None, default=0
        An int gives what a study's draw of that seed gives.

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
        Sorted; the columns of ``predict_proba``.
    method_, encoder_, segmenter_
        The fitted method, its CLIP, and what makes the masks (None where "none" asks for none).
    """

    def __init__(
        self,
        *,
        method: str = "medfocusclip",
        settings: Mapping[str, Any] | None = None,
        focus: str = "crop",
        clip: str = "pocket",
        pretrained: str = "pocket",
        segmenter: str = "sam2",
        segmenter_settings: Mapping[str, Any] | None = None,
        modality: str = "other",
        names: Mapping[str, str] | None = None,
        templates: Sequence[str] | None = None,
        augmented: int = 2,
        flip: bool = False,
        feather: float = 0.01,
        attention_bias: float = 2.0,
        batch_size: int = 64,
        cache: str | os.PathLike[str] | None = None,
        device: str = "cpu",
        random_state: int | np.random.RandomState | None = 0,
    ) -> None:
        self.method = method
        self.settings = settings
        self.focus = focus
        self.clip = clip
        self.pretrained = pretrained
        self.segmenter = segmenter
        self.segmenter_settings = segmenter_settings
        self.modality = modality
        self.names = names
        self.templates = templates
        self.augmented = augmented
        self.flip = flip
        self.feather = feather
        self.attention_bias = attention_bias
        self.batch_size = batch_size
        self.cache = cache
        self.device = device
        self.random_state = random_state

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = False
        tags.input_tags.three_d_array = True
        return tags

    def __getstate__(self) -> dict[str, Any]:
        """Without towers and segmenter, which are built anew: a pickle holds what was learnt."""
        state = dict(cast("dict[str, Any]", super().__getstate__()))
        if "method_" in state:
            del state["encoder_"], state["segmenter_"]
            state["method_"] = (self.encoder_.key, self._settled(), self.method_.state())
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Raises ValueError where the CLIP of the same name has other weights by now."""
        super().__setstate__(state)
        if "method_" in state:
            key, settings, learnt = state["method_"]
            self._build(settings)
            if self.encoder_.key != key:
                raise ValueError(
                    f"MedFocusCLIP: it was fitted on CLIP weights {key[:12]}, but {self.clip!r} has "
                    f"{self.encoder_.key[:12]} here. Use `save` and `load`, which bring the weights along."
                )
            self.method_ = METHODS[self.method](self.encoder_, **settings).load(learnt)

    def fit(self, X: Images, y: ArrayLike, groups: ArrayLike | None = None) -> Self:
        """Learn from labelled images.

        Args:
            X: N images.
            y: (N,) labels of two classes or more.
            groups: (N,) whose images are one patient's; the folds inside of a fit keep them together.
                None: identical images are one group.

        Raises ValueError for what is no image, naming its place, for lengths that differ, a single class,
        and for a parameter that is unknown or out of range.
        """
        settings = self._check_parameters()
        images = _opened(X)
        labels = column_or_1d(y, warn=True)
        check_consistent_length(images, labels)
        assert_all_finite(labels, input_name="y")
        check_classification_targets(labels)
        classes, index = np.unique(labels, return_inverse=True)
        if len(classes) < 2:
            raise ValueError(
                f"MedFocusCLIP: y has {len(classes)} class, {classes[0]!r}; give images of two classes or "
                "more."
            )
        together = [image.sha256 for image in images] if groups is None else column_or_1d(groups)
        check_consistent_length(images, together)
        self.classes_ = classes
        self._build(settings)
        kind = METHODS[self.method]
        method: Method = kind(self.encoder_, **_first_rate(settings))
        views = 1 + self.augmented if kind.takes_views else 1
        prompts = text_prompts(self._class_names(), self.modality, self.templates)
        support = Support(
            self._inputs(method, images, self._masks(images), views),
            torch.from_numpy(index.astype(np.int64)),
            torch.from_numpy(np.unique(together, return_inverse=True)[1].astype(np.int64)),
            class_embeddings(self.encoder_, prompts).cpu(),
            self._class_names(),
            tuple(map(tuple, prompts)),
        )
        generator = torch.Generator().manual_seed(_seed(self.random_state))
        if len(rates := _rates(settings)) > 1:
            self.method_: Method = LearningRates(rates, **defaults.LEARNING_RATES).fit(
                method, support, generator
            )
        else:
            self.method_ = method.fit(support, generator)
        return self

    def predict_proba(self, X: Images) -> np.ndarray:
        """N images -> (N, K) probabilities by ``classes_``, rows summing to one."""
        check_is_fitted(self)
        images = _opened(X)
        inputs = self._inputs(self.method_, images, self._masks(images), 1)[0]  # (N, ...)
        return probabilities_of(self.method_, inputs)

    def predict(self, X: Images) -> np.ndarray:
        """N images -> (N,) the most probable of ``classes_`` each."""
        probabilities = self.predict_proba(X)  # says so where it is not fitted
        return self.classes_[probabilities.argmax(axis=1)]

    def explain(self, image: Any, label: Any = None) -> Explanation:
        """Mask, focus image and attribution of one image, for a label or, without one, what it predicts.

        Raises ValueError for a label that is not among ``classes_``.
        """
        check_is_fitted(self)
        images = _opened([image])
        if self.segmenter_ is None:  # the focus "none" saw none, but who asks wants to see it
            self.segmenter_ = self._segmenter()
        [mask] = self._masks(images)
        assert mask is not None
        view = self._view(images[0], mask, 0)
        if label is None:
            label = self.classes_[probabilities_of(self.method_, self._embedded(view)).argmax()]
        found = np.flatnonzero(self.classes_ == label)
        if not len(found):
            known = ", ".join(map(str, self.classes_))
            raise ValueError(f"explain: {label!r} is none of the classes; give one of {known}.")
        target = torch.from_numpy(found)
        maps, way = explain(self.method_, self.encoder_, torch.from_numpy(view)[None], target)
        heat = on_image(maps[0].numpy(), mask.region, self.focus)
        return Explanation(label, mask.region, mask.status, view[..., :3].copy(), heat, way)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the fitted classifier to ``folder``, in place of what was there: tensors and text, no pickle.

        ``medfocus.serving.predictor.Predictor`` loads it as well.
        """
        check_is_fitted(self)
        folder = Path(folder)
        header = checkpoint.Header(
            method=self.method,
            settings=self._settled(),
            classes=tuple(map(str, self.classes_)),
            focus=self.focus,
            encoder_key=self.encoder_.key,
            validation_correct=0,
            validation_count=0,
            facts={},
        )
        with TemporaryDirectory() as beside:
            path = Path(beside, "cell.safetensors")
            checkpoint.save(self.method_, header, path)
            save_model(
                folder,
                checkpoint=path,
                encoder=self.encoder_,
                segmenter=self.segmenter_ or self._segmenter(),
                feather=self.feather,
            )
        seed = self.random_state if isinstance(self.random_state, int) else None
        cache = None if self.cache is None else os.fspath(self.cache)
        parameters = {**self.get_params(), "random_state": seed, "cache": cache, "device": "cpu"}
        content = {"classes": self.classes_.tolist(), "dtype": self.classes_.dtype.str, "params": parameters}
        (folder / _OWN).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Self:
        """What ``save`` wrote, on the CPU.

        Raises FileNotFoundError where it did not write that folder, ValueError as ``Predictor.load`` does.
        """
        path = Path(folder, _OWN)
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not there; give a folder that MedFocusCLIP.save wrote.")
        content = json.loads(path.read_text(encoding="utf-8"))
        predictor = Predictor.load(Path(folder))
        made = cls(**content["params"])
        made.classes_ = np.array(content["classes"], dtype=content["dtype"])
        made.method_, made.segmenter_ = predictor.method, predictor.segmenter
        made.encoder_ = predictor.method.encoder
        return made

    def _check_parameters(self) -> dict[str, Any]:
        """The method's whole settings. Raises ValueError for a parameter that cannot be."""
        modes = (*FOCUS, *REGIONS)
        for name, value, known in (
            ("method", self.method, METHODS),
            ("focus", self.focus, modes),
            ("segmenter", self.segmenter, defaults.SEGMENTERS),
        ):
            if value not in known:
                raise ValueError(f"MedFocusCLIP: {name} is {value!r}; use one of {', '.join(known)}.")
        for name, value, least in (("augmented", self.augmented, 0), ("batch_size", self.batch_size, 1)):
            if value < least:
                raise ValueError(f"MedFocusCLIP: {name} is {value}; use {least} or more.")
        known, given = defaults.METHODS[self.method], dict(self.settings or {})
        if unknown := sorted(given.keys() - known.keys()):
            raise ValueError(
                f"MedFocusCLIP: settings has {unknown[0]!r}, which {self.method} does not take; it takes "
                f"{', '.join(known) or 'none'}."
            )
        return {k: tuple(v) if isinstance(v, list) else v for k, v in {**known, **given}.items()}

    def _settled(self) -> dict[str, Any]:
        """The settings of the fitted method, its learning rate the one that was chosen."""
        settings = self._check_parameters()
        return {**settings, "lr": vars(self.method_)["lr"]} if "lr" in settings else settings

    def _build(self, settings: Mapping[str, Any]) -> None:
        encoder = _towers(self.clip, self.pretrained, self.device, threading.get_ident())
        beside = bool(settings.get("segmenter_grid"))
        self.segmenter_ = self._segmenter() if self.focus != "none" or beside else None
        if beside:
            sam2 = self.segmenter_.sam2 if self.segmenter_ else None
            if sam2 is None:
                raise ValueError(
                    f"MedFocusCLIP: segmenter_grid of {self.method} asks for SAM2's features, but the "
                    f"segmenter is {self.segmenter!r}. Set it to 'sam2', or segmenter_grid to 0."
                )
            encoder = encoder.with_segmenter(sam2)
        self.encoder_ = (
            encoder.with_region(self.focus, self.attention_bias) if self.focus in REGIONS else encoder
        )

    def _segmenter(self) -> Segmenter:
        values = {**defaults.SEGMENTERS[self.segmenter], **(self.segmenter_settings or {})}
        settings = SETTINGS[self.segmenter](**values)
        return _built_segmenter(settings, self.device, threading.get_ident())

    def _class_names(self) -> tuple[str, ...]:
        return tuple((self.names or {}).get(str(label), str(label)) for label in self.classes_)

    def _masks(self, images: Sequence[_Image]) -> list[Mask] | list[None]:
        """A mask each; none where no focus asks for one."""
        segmenter = self.segmenter_
        if segmenter is None:
            return [None] * len(images)
        store = None if self.cache is None else MaskStore(os.fspath(self.cache))
        shas = list(dict.fromkeys(image.sha256 for image in images))
        stored = {sha: store.get(sha, segmenter.key) for sha in shas} if store else {}
        known = {sha: mask for sha, mask in stored.items() if mask is not None}
        missing = {image.sha256: image.pixels for image in images if image.sha256 not in known}
        if missing:
            made = dict(zip(missing, segmenter.segment(list(missing.values())), strict=True))
            known |= made
            if store:
                store.put(made, segmenter.key)
                store.close()
        return [known[image.sha256] for image in images]

    def _view(self, image: _Image, mask: Mask | None, number: int) -> np.ndarray:
        return view(
            image.pixels,
            None if mask is None or self.focus == "none" else mask.region,
            focus=self.focus,
            size=self.encoder_.image_size,
            feather=self.feather,
            crop=crop_box(image.sha256, number, mirror=self.flip),
        )

    def _embedded(self, view: np.ndarray) -> Tensor:
        return self.method_.embed(torch.from_numpy(view)[None]).cpu()

    def _inputs(
        self, method: Method, images: Sequence[_Image], masks: Sequence[Mask | None], views: int
    ) -> Tensor:
        """(V, N, ...) the output of a method's frozen part for ``views`` views of images."""
        items = [(i, number) for i in range(len(images)) for number in range(views)]
        encoded = features.encode(
            items,
            [f"{images[i].sha256} {number}" for i, number in items],
            lambda item: self._view(images[item[0]], masks[item[0]], item[1]),
            method.embed,
            cache=None,
            settings="",
            batch_size=self.batch_size,
            dtype=torch.uint8 if method.embedding == IMAGES else torch.float32,
        )
        return encoded.unflatten(0, (len(images), views)).transpose(0, 1)


@dataclass(frozen=True, eq=False)
class _Image:
    sha256: str  # of the file's bytes or, of an array, of its shape and pixels
    pixels: np.ndarray  # (H, W, 3) uint8


def _opened(X: Images) -> list[_Image]:
    """Every image checked and decoded. Raises ValueError naming the first bad one's place."""
    if isinstance(X, str | os.PathLike):
        raise ValueError(f"MedFocusCLIP: X is one path, {os.fspath(X)!r}; give a list of images.")
    if isinstance(X, np.ndarray) and X.ndim == 3 and X.shape[2] == 3:
        raise ValueError(
            f"MedFocusCLIP: X is one image of {X.shape}, or images that are 3 pixels wide; give a list "
            "of images, [image] for a single one."
        )
    if not hasattr(X, "__iter__"):
        raise ValueError(f"MedFocusCLIP: X is {type(X).__name__}; give a list of images.")
    given = list(X)
    if not given:
        raise ValueError("MedFocusCLIP: X has 0 images (0 samples), and at least 1 is needed.")
    return [_open(image, f"X[{i}]") for i, image in enumerate(given)]


def _open(given: Any, name: str) -> _Image:
    if isinstance(given, str | os.PathLike):
        return _Image(*decode.read_named(Path(given)))
    if not isinstance(given, np.ndarray):
        raise ValueError(f"{name} is {type(given).__name__}; give an array of uint8 or a path.")
    grey, colour = given.ndim == 2, given.ndim == 3 and given.shape[2] == 3
    if given.dtype != np.uint8 or not (grey or colour) or given.size == 0:
        raise ValueError(
            f"{name} is {given.dtype} of shape {given.shape}; an image is uint8 of (H, W) or (H, W, 3). "
            "Scale values to 0 to 255 and convert them, and put one image each into X."
        )
    pixels = np.repeat(given[:, :, None], 3, axis=2) if grey else np.ascontiguousarray(given)
    content = f"{pixels.shape}".encode() + pixels.tobytes()
    return _Image(hashlib.sha256(content).hexdigest(), pixels)


@lru_cache(maxsize=4)
def _towers(clip: str, pretrained: str, device: str, thread: int) -> ClipEncoder:
    """CLIP, once for all the fits of a cross-validation; a thread's own, as towers are for one at a time."""
    return build_clip(clip, pretrained, device)


@lru_cache(maxsize=4)
def _built_segmenter(settings: SegmenterSettings, device: str, thread: int) -> Segmenter:
    """A segmenter, kept as ``_towers`` are."""
    return build_segmenter(settings, batch_size=defaults.SEGMENTER_BATCH, device=device)


def _rates(settings: Mapping[str, Any]) -> tuple[float, ...]:
    lr = settings.get("lr", ())
    return lr if isinstance(lr, tuple) else (lr,)


def _first_rate(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with one learning rate: of several, one is chosen inside the support."""
    rates = _rates(settings)
    return {**settings, "lr": rates[0]} if rates else dict(settings)


def _seed(random_state: int | np.random.RandomState | None) -> int:
    if isinstance(random_state, int | np.integer):
        return int(random_state)
    return int(check_random_state(random_state).randint(2**31))
