"""The folder of a served model: all files that turn an encoded image into probabilities and a mask.

``cell.safetensors``
    The fitted method, see ``checkpoint``.
``clip/``
    CLIP's weights and configuration, in open_clip's layout; with the configuration of a text tower of Hugging
    Face.
``alpha.safetensors``
    The channel of Alpha-CLIP's weights, if the focus "alpha" uses them; ``clip/`` then has their image
    encoder.
``sam2.safetensors``, ``sam2.yaml``
    SAM2, if it makes the masks.
``adapter.safetensors``, ``text.safetensors``
    The trained adapter, and the embedded text that chooses among SAM2's candidates. Each file exists only if
    the segmenter uses it.
``serve.json``
    Everything else.

No file is a pickle.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medfocus.clip.regions import channel_weights, plain_weights
from medfocus.images.geometry import Frame
from medfocus.masks.factory import build_segmenter
from medfocus.masks.segmenter import Segmenter
from medfocus.masks.settings import OtsuSettings, Sam2Settings
from medfocus.serving.predictor import Predictor
from medfocus.storage import weights

if TYPE_CHECKING:
    from medfocus.clip.encoder import ClipEncoder

_CELL, _CLIP, _SAM2, _SAM2_CONFIG = "cell.safetensors", "clip", "sam2.safetensors", "sam2.yaml"
_ADAPTER, _TEXT, _ALPHA = "adapter.safetensors", "text.safetensors", "alpha.safetensors"
_CONTENT = "serve.json"
_PACKAGES = ("torch", "open_clip_torch", "sam2", "numpy", "pillow")
_PICKLES = (".pkl", ".pickle", ".joblib", ".pt", ".pth", ".ckpt", ".bin")


def save_model(
    folder: Path,
    *,
    checkpoint: Path,
    encoder: ClipEncoder,
    segmenter: Segmenter,
    feather: float,
    fill: str,
) -> None:
    """Write all files of a model to ``folder``, and replace the model that the folder holds.

    Args:
        folder: The model folder. The new content appears complete or not at all.
        checkpoint: A file of ``checkpoint.save``: the method, its classes and its focus.
        encoder: The CLIP that the method was fitted on.
        segmenter: The segmenter of the training images.
        feather: The feather of the views.
        fill: The fill of the views, see ``medfocus.focus.view.view``.

    Raises:
        ValueError: The checkpoint was fitted on another CLIP.
        FileExistsError: The folder holds something other than a model, which this function would delete.
    """
    from safetensors.torch import save_file

    from medfocus.serving import checkpoint as checkpoints

    folder = folder.absolute()
    if (
        folder.exists()
        and not (folder / _CONTENT).is_file()
        and (not folder.is_dir() or any(folder.iterdir()))
    ):
        raise FileExistsError(
            f"{folder} exists and holds no model, so it is not replaced. Give a new folder, or an empty one."
        )
    header = checkpoints.read_header(checkpoint)
    if header.encoder_key != encoder.key:
        raise ValueError(
            f"{checkpoint} was fitted on CLIP weights {header.encoder_key[:12]}, but the encoder has "
            f"{encoder.key[:12]}. Give the encoder that the checkpoint was fitted on."
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(unfinished, ignore_errors=True)
    (unfinished / _CLIP).mkdir(parents=True)
    shutil.copyfile(checkpoint, unfinished / _CELL)
    save_file(_stored(plain_weights(encoder.model)), unfinished / _CLIP / "open_clip_model.safetensors")
    if channel := channel_weights(encoder.model):
        save_file(_stored(channel), unfinished / _ALPHA)
    _write_json(unfinished / _CLIP / "open_clip_config.json", encoder.config)
    if encoder.config["model_cfg"]["text_cfg"].get("hf_model_name"):
        model: Any = encoder.model
        model.text.config.save_pretrained(unfinished / _CLIP)  # config.json
    content = {
        **_write_segmenter(segmenter, unfinished),
        "clip": encoder.name,
        "clip_key": encoder.key,
        "method": header.method,
        "classes": header.classes,
        "focus": header.focus,
        "feather": feather,
        "fill": fill,
        "region": encoder.region.name,
        "attention_bias": encoder.region.attention_bias,
        "frame": asdict(encoder.frame),
        "versions": {package: version(package) for package in _PACKAGES},
    }
    _write_json(unfinished / _CONTENT, content)
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.replace(folder)


def _write_segmenter(segmenter: Segmenter, folder: Path) -> dict[str, object]:
    """Write the segmenter's files; return its entries of serve.json."""
    from safetensors.torch import save_file

    from medfocus.masks.sam2 import model
    from medfocus.masks.sam2.adapter import AdapterSegmenter
    from medfocus.masks.sam2.retrieval import RetrievalSegmenter, TextRank

    settings = asdict(segmenter.settings)
    if segmenter.sam2 is not None:
        state = _stored(segmenter.sam2.model.state_dict())
        save_file({k: v for k, v in state.items() if k.startswith(model.IMAGE_MODULES)}, folder / _SAM2)
        shutil.copyfile(model.config_path(settings.pop("config")), folder / _SAM2_CONFIG)
        del settings["checkpoint"]
    retrieved = None
    if isinstance(segmenter, AdapterSegmenter):
        save_file(segmenter.state, folder / _ADAPTER)
    elif isinstance(segmenter, RetrievalSegmenter):
        assert isinstance(segmenter.rank, TextRank)  # the only rank of a study
        save_file({"text": segmenter.rank.text.contiguous()}, folder / _TEXT)
        retrieved = segmenter.rank.key
    return {
        "segmenter": segmenter.settings.kind,
        "segmenter_settings": settings,
        "segmenter_key": segmenter.key,
        "retrieved": retrieved,
    }


def load_model(folder: Path) -> Predictor:
    """Load a folder that ``save_model`` wrote, on the CPU, without any file outside ``folder``.

    Raises FileNotFoundError if it is not a model folder. Raises ValueError if its parts do not fit together.
    Also raises ValueError, before it opens any file, if a file could run code when it is opened.
    """
    _refuse_pickles(folder)
    from medfocus.clip.build import build_clip
    from medfocus.serving import checkpoint

    try:
        content: dict[str, Any] = json.loads((folder / _CONTENT).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{folder} is not a model folder: serve.json is missing. "
            "Give a folder that medfocus.serving.model_folder.save_model wrote."
        ) from error
    # The checkpoint has the class texts, so no tokenizer is needed.
    encoder = build_clip(f"local-dir:{folder / _CLIP}", "", texts=False)
    encoder = replace(encoder, frame=_frame(content["frame"]))
    segmenter = _load_segmenter(
        folder, content["segmenter"], content["segmenter_settings"], encoder, content["retrieved"]
    )
    if content["region"]:
        alpha = folder / _ALPHA if (folder / _ALPHA).is_file() else ""
        encoder = encoder.with_region(content["region"], content["attention_bias"], alpha)
    encoder = replace(
        encoder,
        name=content["clip"],
        key=content["clip_key"],  # the saved configuration has another form, so its key would differ
        segmenter=segmenter.sam2,
    )
    method, header = checkpoint.load(folder / _CELL, encoder)
    return Predictor(
        method,
        segmenter,
        header.classes,
        header.focus,
        content["feather"],
        content["fill"],
        encoder.frame,
        header.calibration,
    )


def _frame(content: Mapping[str, Any]) -> Frame:
    """Return the frame of a JSON object, which has lists in place of tuples."""
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in content.items()}
    return Frame(**fields)


def _refuse_pickles(folder: Path) -> None:
    for file in sorted(folder.rglob("*")):
        if file.suffix.casefold() in _PICKLES:
            raise ValueError(
                f"{file}: a {file.suffix} file can run code when it is opened, so the model is refused. "
                "Download the model from its registry again, or register it again."
            )


def _load_segmenter(
    folder: Path, kind: str, settings: Mapping[str, Any], encoder: ClipEncoder, retrieved: str | None
) -> Segmenter:
    """Load a folder's segmenter; ``retrieved`` is the key of the text that chooses the candidate, if any."""
    if kind == "otsu":
        return build_segmenter(OtsuSettings(**settings))
    sam2 = Sam2Settings(config=str(folder / _SAM2_CONFIG), checkpoint=str(folder / _SAM2), **settings)
    adapter = weights.load(folder / _ADAPTER) if (folder / _ADAPTER).is_file() else None
    rank = None
    if retrieved is not None:
        from medfocus.masks.sam2.retrieval import TextRank

        rank = TextRank(encoder, weights.load(folder / _TEXT)["text"], retrieved)
    return build_segmenter(sam2, adapter=adapter, rank=rank)


def _stored(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return tensors for safetensors: on the CPU, contiguous, without shared memory."""
    return {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")
