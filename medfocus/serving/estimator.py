"""MedFocusCLIP as a scikit-learn classifier: no study, no server, no files."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Self, cast

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import assert_all_finite
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_consistent_length, check_is_fitted, column_or_1d
from torch import Tensor

from medfocus.clip import features
from medfocus.clip.prompts import class_embeddings, text_prompts
from medfocus.clip.regions import REGIONS
from medfocus.explain.explain import explain, on_image
from medfocus.focus.augment import augmentation
from medfocus.focus.view import view
from medfocus.learning import fitting
from medfocus.learning.method import IMAGES, Method, Support
from medfocus.learning.selection import Choice, candidates
from medfocus.masks.segmenter import Mask, Segmenter
from medfocus.methods import METHODS
from medfocus.serving import checkpoint, defaults, parameters
from medfocus.serving.inputs import Images, InputImage, open_images, segment
from medfocus.serving.model_folder import load_model, save_model
from medfocus.serving.networks import shared_clip, shared_segmenter
from medfocus.serving.predictor import probabilities_of

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

_PARAMETERS = "estimator.json"  # the estimator's classes and parameters in a saved folder


@dataclass(frozen=True, eq=False)
class Explanation:
    """The mask, the view and the attribution of one image."""

    label: Any  # the explained class, one of ``classes_``
    mask: np.ndarray  # (H, W) bool, the region
    mask_status: str  # the rung of the fallback ladder that made the mask
    focus: np.ndarray  # (S, S, 3) uint8, the view of CLIP
    attribution: np.ndarray  # (H, W) float32, sums to one
    way: str  # the attribution's method, see ``medfocus.explain.explain``


class MedFocusCLIP(ClassifierMixin, BaseEstimator):
    """Few-shot classification of medical images with region focus. For research; not for clinical use.

    An image is an array (H, W) or (H, W, 3) of uint8, or a path. X is a sequence of images of any sizes, or
    one array that stacks them. There is no ``n_features_in_``, which has no meaning for images.

    Parameters
    ----------
    method : str, default="medfocusclip"
        A key of ``medfocus.methods.METHODS``.
    settings : dict or None, default=None
        Hyperparameters that replace the method's defaults, which are in params.yaml.
    schedule : {"small", "published"}, default="small"
        The method's defaults: for the embedded ``clip`` and small machines, or as published, for full-size
        weights.
    focus : str, default="crop"
        The visual prompt: a key of ``medfocus.focus.modes.FOCUS`` or of ``medfocus.clip.regions.REGIONS``.
        With "none", images are not segmented.
    clip, pretrained, resize : str
        See ``medfocus.clip.build.build_clip``. The default, "pocket", is small; its texts know only phantoms.
    segmenter : {"sam2", "otsu"}, default="sam2"
        The segmenter of the masks.
    segmenter_settings : dict or None, default=None
        Settings that replace the segmenter's defaults, which are in params.yaml.
    modality : str, default="other"
        A key of ``medfocus.clip.prompts.TEMPLATES``.
    names : dict or None, default=None
        ``str(label)`` -> the class name in text prompts; by default, the label itself.
    templates : sequence of str or None, default=None
        Text prompts with "{c}" for the class name, in place of the modality's templates.
    augmented : int, default=1
        Augmented views of each training image, in addition to the image, for methods that train on views.
    flip : bool, default=False
        Whether a mirror image has the same class, for half of the augmented views and for methods that
        average over both. Do not mirror chest X-rays: the heart's side is a finding.
    feather, attention_bias, fill
        See ``medfocus.focus.view.view`` and ``medfocus.clip.encoder.ClipEncoder.with_region``.
    batch_size : int, default=16
        Views in a batch of the image encoder.
    cache : path or None, default=None
        A folder that keeps the masks between fits, for example in a cross-validation.
    device : str, default="cpu"
        The device of CLIP and SAM2.
    folds : int or None, default=None
        Folds of the predictions out of fold that calibrate probabilities and sets; each takes a further fit.
        With None, 3, or 0 for a method that trains an encoder. With 0, nothing is calibrated.
    confidence : float, default=0.9
        Share of images whose set of classes has to contain the true class; see ``predict_set``.
    random_state : int, RandomState instance or None, default=0
        An int gives the same result as the study's draw with this seed.

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
        The sorted classes, in the order of the columns of ``predict_proba``.
    method_, encoder_, segmenter_
        The fitted method, its CLIP, and its segmenter (None for the focus "none").
    calibration_ : medfocus.learning.calibration.Calibration
        The temperature of the probabilities and the threshold of the sets.
    """

    def __init__(
        self,
        *,
        method: str = "medfocusclip",
        settings: Mapping[str, Any] | None = None,
        schedule: str = "small",
        focus: str = "crop",
        clip: str = "pocket",
        pretrained: str = "pocket",
        resize: str = "letterbox",
        segmenter: str = "sam2",
        segmenter_settings: Mapping[str, Any] | None = None,
        modality: str = "other",
        names: Mapping[str, str] | None = None,
        templates: Sequence[str] | None = None,
        augmented: int = 1,
        flip: bool = False,
        feather: float = 0.01,
        attention_bias: float = 2.0,
        fill: str = "mean",
        batch_size: int = 16,
        cache: str | os.PathLike[str] | None = None,
        device: str = "cpu",
        folds: int | None = None,
        confidence: float = 0.9,
        random_state: int | np.random.RandomState | None = 0,
    ) -> None:
        self.method = method
        self.settings = settings
        self.schedule = schedule
        self.focus = focus
        self.clip = clip
        self.pretrained = pretrained
        self.resize = resize
        self.segmenter = segmenter
        self.segmenter_settings = segmenter_settings
        self.modality = modality
        self.names = names
        self.templates = templates
        self.augmented = augmented
        self.flip = flip
        self.feather = feather
        self.attention_bias = attention_bias
        self.fill = fill
        self.batch_size = batch_size
        self.cache = cache
        self.device = device
        self.folds = folds
        self.confidence = confidence
        self.random_state = random_state

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = False
        tags.input_tags.three_d_array = True
        return tags

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without CLIP and the segmenter: a pickle contains only learned values."""
        state = dict(cast("dict[str, Any]", super().__getstate__()))
        if "method_" in state:
            del state["encoder_"], state["segmenter_"]
            state["method_"] = (self.encoder_.key, self.method_.settings, self.method_.state())
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Rebuild CLIP and the segmenter. Raises ValueError if CLIP has other weights now."""
        super().__setstate__(state)
        if "method_" in state:
            key, settings, learnt = state["method_"]
            self._build(settings)
            if self.encoder_.key != key:
                raise ValueError(
                    f"MedFocusCLIP was fitted on CLIP weights {key[:12]}, but {self.clip!r} has "
                    f"{self.encoder_.key[:12]} here. Use `save` and `load`, which include the weights."
                )
            self.method_ = METHODS[self.method](self.encoder_, **settings).load(learnt)

    def fit(self, X: Images, y: ArrayLike, groups: ArrayLike | None = None) -> Self:
        """Fit on labelled images.

        Args:
            X: N images.
            y: (N,) labels of two classes or more.
            groups: (N,) patients; the folds inside a fit keep the images of a patient together. With None,
                identical images form a group.

        Raises ValueError for a faulty image, lengths that differ, a single class, and a parameter that is
        unknown or out of range.
        """
        settings = parameters.check(self)
        images = open_images(X)
        labels = column_or_1d(y, warn=True)
        check_consistent_length(images, labels)
        assert_all_finite(labels, input_name="y")
        check_classification_targets(labels)
        classes, index = np.unique(labels, return_inverse=True)
        if len(classes) < 2:
            raise ValueError(
                f"MedFocusCLIP: y has {len(classes)} class, {classes[0]!r}. Give images of two classes."
            )
        together = [image.sha256 for image in images] if groups is None else column_or_1d(groups)
        check_consistent_length(images, together)
        self.classes_ = classes
        self._build(settings)
        kind = METHODS[self.method]
        found = candidates(settings)
        method: Method = kind(self.encoder_, flip=self.flip, **{**settings, **found[0]})
        method.check_towers(f"MedFocusCLIP: {self.method} with the focus {self.focus!r}")
        views = method.views(len(images), self.augmented)
        prompts = text_prompts(self._class_names(), self.modality, self.templates)
        support = Support(
            self._inputs(method, images, self._masks(images), views),
            torch.from_numpy(index.astype(np.int64)),
            torch.from_numpy(np.unique(together, return_inverse=True)[1].astype(np.int64)),
            class_embeddings(self.encoder_, prompts).cpu(),
            self._class_names(),
            tuple(map(tuple, prompts)),
        )
        choice = Choice(found, **defaults.default_params()["choice"]) if len(found) > 1 else None
        seed = parameters.seed(self.random_state)
        folds = self._folds(method)
        validation = fitting.validate(method, support, choice, folds=folds, seed=seed)
        self.method_: Method = fitting.fit(method, support, choice, seed)
        self.calibration_ = fitting.calibration(self.method_, support, validation, self.confidence)
        return self

    def predict_proba(self, X: Images) -> np.ndarray:
        """Return calibrated probabilities (N, K) of N images, in the order of ``classes_``."""
        check_is_fitted(self)
        images = open_images(X)
        inputs = self._inputs(self.method_, images, self._masks(images), 1)[0]  # (N, ...)
        return probabilities_of(self.method_, inputs, self.calibration_)

    def predict_set(self, X: Images) -> np.ndarray:
        """Return sets of classes (N, K) bool; the share ``confidence`` of them has the true class.

        The classifier is not sure of an image whose set has several classes. The assumptions behind this
        promise are in ``medfocus.learning.calibration``. Raises ValueError if ``fit`` had too few images.
        """
        probabilities = self.predict_proba(X)
        if (sets := self.calibration_.sets(probabilities)) is None:
            raise ValueError(
                f"MedFocusCLIP: {self.calibration_.no_set}. Give more images, folds, or a lower confidence."
            )
        return sets

    def predict(self, X: Images) -> np.ndarray:
        """Return the most probable class (N,) of each of N images."""
        probabilities = self.predict_proba(X)
        return self.classes_[probabilities.argmax(axis=1)]

    def explain(self, image: Any, label: Any = None) -> Explanation:
        """Explain one image for a label or, without a label, for the predicted class.

        Raises ValueError for a label that is not one of ``classes_``.
        """
        check_is_fitted(self)
        images = open_images([image])
        # With the focus "none", only an explanation needs a mask.
        [mask] = segment(images, self.segmenter_ or self._segmenter(), self.cache)
        view = self._view(images[0], mask, 0)
        if label is None:
            embedded = self.method_.embed(torch.from_numpy(view)[None]).cpu()
            label = self.classes_[probabilities_of(self.method_, embedded, self.calibration_).argmax()]
        place = np.flatnonzero(self.classes_ == label)
        if not len(place):
            known = ", ".join(map(str, self.classes_))
            raise ValueError(f"explain: {label!r} is not one of the classes. Give one of {known}.")
        target = torch.from_numpy(place)
        maps, way = explain(self.method_, self.encoder_, torch.from_numpy(view)[None], target)
        heat = on_image(maps[0].numpy(), mask.region, self.focus, self.encoder_.frame)
        return Explanation(label, mask.region, mask.status, view[..., :3].copy(), heat, way)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the fitted classifier to ``folder``, without pickles, and replace the content of the folder.

        ``medfocus.serving.model_folder.load_model`` can load this folder too.
        """
        check_is_fitted(self)
        folder = Path(folder)
        header = checkpoint.Header(
            method=self.method,
            settings=self.method_.settings,
            classes=tuple(map(str, self.classes_)),
            focus=self.focus,
            encoder_key=self.encoder_.key,
            validation_correct=0,
            validation_count=0,
            facts={},
            calibration=self.calibration_,
        )
        with TemporaryDirectory() as temporary:
            path = Path(temporary, "cell.safetensors")
            checkpoint.save(self.method_, header, path)
            save_model(
                folder,
                checkpoint=path,
                encoder=self.encoder_,
                segmenter=self.segmenter_ or self._segmenter(),
                feather=self.feather,
                fill=self.fill,
            )
        seed = self.random_state if isinstance(self.random_state, int) else None
        cache = None if self.cache is None else os.fspath(self.cache)
        parameters = {**self.get_params(), "random_state": seed, "cache": cache, "device": "cpu"}
        content = {"classes": self.classes_.tolist(), "dtype": self.classes_.dtype.str, "params": parameters}
        (folder / _PARAMETERS).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Self:
        """Load a folder that ``save`` wrote, on the CPU.

        Raises FileNotFoundError if ``save`` did not write this folder, and ValueError as ``load_model`` does.
        """
        path = Path(folder, _PARAMETERS)
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing. Give a folder that MedFocusCLIP.save wrote.")
        content = json.loads(path.read_text(encoding="utf-8"))
        predictor = load_model(Path(folder))
        model = cls(**content["params"])
        model.classes_ = np.array(content["classes"], dtype=content["dtype"])
        model.method_, model.segmenter_ = predictor.method, predictor.segmenter
        model.calibration_ = predictor.calibration
        model.encoder_ = predictor.method.encoder
        return model

    def _folds(self, method: Method) -> int:
        """Return the number of folds of the predictions out of fold."""
        if not method.learns:
            return 0
        usual = 0 if method.runs_encoder else defaults.default_params()["validation"]["folds"]
        return usual if self.folds is None else self.folds

    def _build(self, settings: Mapping[str, Any]) -> None:
        encoder = shared_clip(self.clip, self.pretrained, self.resize, self.device)
        describes = bool(settings.get("segmenter_grid"))
        self.segmenter_ = self._segmenter() if self.focus != "none" or describes else None
        if describes:
            sam2 = self.segmenter_.sam2 if self.segmenter_ else None
            if sam2 is None:
                raise ValueError(
                    f"MedFocusCLIP: segmenter_grid of {self.method} needs SAM2's features, but the "
                    f"segmenter is {self.segmenter!r}. Set it to 'sam2', or segmenter_grid to 0."
                )
            encoder = encoder.with_segmenter(sam2)
        self.encoder_ = (
            encoder.with_region(self.focus, self.attention_bias) if self.focus in REGIONS else encoder
        )

    def _segmenter(self) -> Segmenter:
        changes = self.segmenter_settings or {}
        settings = defaults.segmenter_settings(self.segmenter, self.modality, changes)
        return shared_segmenter(settings, self.device)

    def _class_names(self) -> tuple[str, ...]:
        return tuple((self.names or {}).get(str(label), str(label)) for label in self.classes_)

    def _masks(self, images: Sequence[InputImage]) -> list[Mask] | list[None]:
        """Return a mask for each image, or None for each if the focus needs no mask."""
        if self.segmenter_ is None:
            return [None] * len(images)
        return segment(images, self.segmenter_, self.cache)

    def _view(self, image: InputImage, mask: Mask | None, number: int) -> np.ndarray:
        return view(
            image.pixels,
            None if mask is None or self.focus == "none" else mask.region,
            focus=self.focus,
            frame=self.encoder_.frame,
            feather=self.feather,
            fill=self.fill,
            change=augmentation(image.sha256, number, mirror=self.flip),
        )

    def _inputs(
        self, method: Method, images: Sequence[InputImage], masks: Sequence[Mask | None], views: int
    ) -> Tensor:
        """Return the outputs (V, N, ...) of a method's frozen part for V views of N images."""
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
