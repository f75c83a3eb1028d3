"""A fitted cell as a folder that needs nothing else: raw image bytes in, probabilities and a mask out.

The folder holds ``cell.safetensors`` (the fitted method, see ``checkpoint``), ``clip/`` (weights and
configuration in open_clip's own layout), ``sam2.safetensors`` and ``sam2.yaml`` where SAM2 makes the
masks, and ``serve.json`` (everything else). Nothing in it is a pickle.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medfocus.evaluation.metrics import softmax
from medfocus.focus.modes import focus as apply_focus
from medfocus.focus.view import view
from medfocus.images import decode
from medfocus.images.png import encode_png
from medfocus.masks.factory import build_segmenter
from medfocus.masks.segmenter import Segmenter
from medfocus.masks.settings import OtsuSettings, Sam2Settings
from medfocus.storage import weights

if TYPE_CHECKING:
    from torch import Tensor

    from medfocus.clip.encoder import ClipEncoder
    from medfocus.methods import Method

_CELL, _CLIP, _SAM2, _SAM2_CONFIG = "cell.safetensors", "clip", "sam2.safetensors", "sam2.yaml"
_ADAPTER, _TEXT = "adapter.safetensors", "text.safetensors"
_PACKAGES = ("torch", "open_clip_torch", "sam2", "numpy", "pillow")
_PICKLES = (".pkl", ".pickle", ".joblib", ".pt", ".pth", ".ckpt", ".bin")
_BATCH = 16  # images at once, so that memory does not grow with the request


@dataclass(frozen=True, eq=False)
class Prediction:
    """What the model says of one image."""

    label: str
    probabilities: dict[str, float]  # by class, in the model's order; they sum to 1
    mask: np.ndarray  # (H, W) bool at the image's own resolution: what the focus saw as the region
    mask_status: str  # the rung of the fallback ladder
    mask_score: float  # in [0, 1]
    overlay: bytes = b""  # PNG of the image with its mask tinted; empty if not requested


def save_model(
    folder: Path,
    *,
    checkpoint: Path,
    encoder: ClipEncoder,
    segmenter: Segmenter,
    feather: float,
) -> None:
    """Write all that ``Predictor.load`` needs to ``folder``, in place of what was there.

    Args:
        folder: The model folder; it appears whole or not at all.
        checkpoint: What ``checkpoint.save`` wrote; it brings the method, its classes and its focus.
        encoder: The CLIP on which the method was fitted.
        segmenter: The segmenter of the images the method was fitted on.
        feather: Of the views.

    Raises:
        ValueError: The checkpoint was fitted on another CLIP.
    """
    from safetensors.torch import save_file

    from medfocus.masks.sam2 import model
    from medfocus.masks.sam2.adapter import AdapterSegmenter
    from medfocus.masks.sam2.retrieval import RetrievalSegmenter, TextRank
    from medfocus.serving import checkpoint as checkpoints

    header = checkpoints.read_header(checkpoint)
    if header.encoder_key != encoder.key:
        raise ValueError(
            f"{checkpoint} was fitted on CLIP weights {header.encoder_key[:12]}, but these are "
            f"{encoder.key[:12]}; give the encoder it was fitted on."
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(beside, ignore_errors=True)
    (beside / _CLIP).mkdir(parents=True)
    shutil.copyfile(checkpoint, beside / _CELL)
    save_file(_towers(encoder), beside / _CLIP / "open_clip_model.safetensors")
    _write_json(beside / _CLIP / "open_clip_config.json", encoder.config)
    settings = asdict(segmenter.settings)
    if segmenter.sam2 is not None:
        state = _tensors(segmenter.sam2.model)
        save_file({k: v for k, v in state.items() if k.startswith(model.IMAGE_MODULES)}, beside / _SAM2)
        shutil.copyfile(model.config_path(settings.pop("config")), beside / _SAM2_CONFIG)
        del settings["checkpoint"]
    retrieved = None
    if isinstance(segmenter, AdapterSegmenter):
        save_file(segmenter.state, beside / _ADAPTER)
    elif isinstance(segmenter, RetrievalSegmenter):
        assert isinstance(segmenter.rank, TextRank)  # the only one that a study knows
        save_file({"text": segmenter.rank.text.contiguous()}, beside / _TEXT)
        retrieved = segmenter.rank.key
    content = {
        "segmenter": segmenter.settings.kind,
        "segmenter_settings": settings,
        "segmenter_key": segmenter.key,
        "retrieved": retrieved,
        "clip": encoder.name,
        "clip_key": encoder.key,
        "method": header.method,
        "classes": header.classes,
        "focus": header.focus,
        "feather": feather,
        "region": encoder.region.name,
        "attention_bias": encoder.region.attention_bias,
        "view_size": encoder.image_size,
        "versions": {package: version(package) for package in _PACKAGES},
    }
    _write_json(beside / "serve.json", content)
    shutil.rmtree(folder, ignore_errors=True)
    beside.replace(folder)


@dataclass(frozen=True)
class Predictor:
    """A model folder, loaded. For one thread at a time."""

    method: Method
    segmenter: Segmenter
    classes: tuple[str, ...]
    focus: str
    feather: float
    view_size: int  # pixels a side of what CLIP sees

    @classmethod
    def load(cls, folder: Path) -> Predictor:
        """Load what ``save_model`` wrote, on the CPU, without a look at anything outside of ``folder``.

        Raises FileNotFoundError where it is no model folder, ValueError where its parts do not fit or one of
        them could run code when it is opened; then none was opened.
        """
        _refuse_pickles(folder)
        from medfocus.clip.build import build_clip
        from medfocus.serving import checkpoint

        try:
            content: dict[str, Any] = json.loads((folder / "serve.json").read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{folder} is no model folder (no serve.json); "
                "give one that medfocus.serving.predictor.save_model wrote."
            ) from error
        encoder = build_clip(f"local-dir:{folder / _CLIP}", "")
        # The configuration says the same in another form, so its key would be another. Class texts are
        # in the checkpoint; without a tokenizer nothing can be read by the wrong one.
        segmenter = _load_segmenter(
            folder, content["segmenter"], content["segmenter_settings"], encoder, content["retrieved"]
        )
        if content["region"]:
            encoder = encoder.with_region(content["region"], content["attention_bias"])
        encoder = replace(
            encoder,
            name=content["clip"],
            key=content["clip_key"],
            tokenizer=None,
            segmenter=segmenter.sam2,
        )
        method, header = checkpoint.load(folder / _CELL, encoder)
        return cls(method, segmenter, header.classes, header.focus, content["feather"], content["view_size"])

    def predict(self, images: Sequence[bytes], overlay: bool = True) -> list[Prediction]:
        """Encoded images -> one prediction each, the same that the evaluation makes.

        Without ``overlay`` no image with the mask drawn in is made, which takes time.
        Raises ValueError naming the first bad image's place in the request, the fault and the fix.
        """
        names = [f"image {i + 1} of {len(images)}" for i in range(len(images))]
        predictions: list[Prediction] = []
        for start in range(0, len(images), _BATCH):
            batch = slice(start, start + _BATCH)
            decoded = list(map(decode.decode, images[batch], names[batch]))
            some = self.predict_decoded(decoded)
            if overlay:
                pairs = zip(some, decoded, strict=True)
                some = [replace(one, overlay=_overlay(image, one.mask)) for one, image in pairs]
            predictions += some
        return predictions

    def predict_decoded(self, images: Sequence[np.ndarray]) -> list[Prediction]:
        """Images (H, W, 3) uint8 RGB, few enough for the memory -> one prediction each, without overlays."""
        masks = self.segmenter.segment(images)
        views = [self.view(image, mask.region) for image, mask in zip(images, masks, strict=True)]
        probabilities = self.probabilities(np.stack(views))
        return [
            Prediction(
                label=self.classes[int(p.argmax())],
                probabilities=dict(zip(self.classes, p.tolist(), strict=True)),
                mask=mask.region,
                mask_status=mask.status,
                mask_score=mask.score,
            )
            for mask, p in zip(masks, probabilities, strict=True)
        ]

    def view(self, image: np.ndarray, region: np.ndarray) -> np.ndarray:
        """What CLIP sees of an image (H, W, 3) uint8 with a region (H, W) bool: (S, S, C) uint8."""
        return view(image, region, focus=self.focus, size=self.view_size, feather=self.feather)

    def probabilities(self, views: np.ndarray) -> np.ndarray:
        """Views (N, S, S, C) uint8 -> (N, K), in the order of ``classes``."""
        import torch

        return probabilities_of(self.method, self.method.embed(torch.from_numpy(views)))


def _overlay(image: np.ndarray, region: np.ndarray) -> bytes:
    tinted = apply_focus(image, region, "overlay", feather=0.0)
    return encode_png(tinted, compress_level=3)  # three times as fast as the default, 5 % larger


def probabilities_of(method: Method, inputs: Tensor) -> np.ndarray:
    """What a fitted method's main classifier says of embedded images, inputs (N, ...) -> (N, K)."""
    logits = next(iter(method.logits(inputs).values()))  # (N, K)
    return softmax(logits.detach().cpu().double().numpy())


def _refuse_pickles(folder: Path) -> None:
    for file in sorted(folder.rglob("*")):
        if file.suffix.casefold() in _PICKLES:
            raise ValueError(
                f"{file}: a {file.suffix} file can run any code when it is opened, and a model folder has "
                "none, so the model was refused. Take it from where it was registered, or register it anew."
            )


def _load_segmenter(
    folder: Path, kind: str, settings: Mapping[str, Any], encoder: ClipEncoder, retrieved: str | None
) -> Segmenter:
    """The segmenter of a model folder; ``retrieved`` is the key of the text that chooses, if one does."""
    if kind == "otsu":
        return build_segmenter(OtsuSettings(**settings))
    sam2 = Sam2Settings(config=str(folder / _SAM2_CONFIG), checkpoint=str(folder / _SAM2), **settings)
    adapter = weights.load(folder / _ADAPTER) if (folder / _ADAPTER).is_file() else None
    rank = None
    if retrieved is not None:
        from medfocus.masks.sam2.retrieval import TextRank

        rank = TextRank(encoder, weights.load(folder / _TEXT)["text"], retrieved)
    return build_segmenter(sam2, adapter=adapter, rank=rank)


def _tensors(model: Any) -> dict[str, Any]:
    """A model's state dict as safetensors takes it: on the CPU, contiguous, no memory shared."""
    return {k: v.detach().cpu().contiguous().clone() for k, v in model.state_dict().items()}


def _towers(encoder: ClipEncoder) -> dict[str, Any]:
    """Return the weights of both towers as they were before ``ClipEncoder.with_region``."""
    named = ((encoder.region.original_name(name), value) for name, value in _tensors(encoder.model).items())
    return {name: value for name, value in named if name is not None}


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")
