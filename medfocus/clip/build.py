"""Build a frozen CLIP: find the weights, build the model with open_clip, and compute its key."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib.util
import json
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from medfocus.clip.encoder import ClipEncoder
from medfocus.clip.tokenizer import CONFIGS, pocket_tokenizer
from medfocus.storage import weights

_POCKET = "clip_pocket"  # the pocket model's name in open_clip, and the stem of its configuration file
_HUB_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")  # in order of preference


def build_clip(model: str, pretrained: str, device: str | torch.device = "cpu") -> ClipEncoder:
    """Build a frozen CLIP.

    Args:
        model: "pocket", a model name of open_clip, "hf-hub:ORG/NAME" or "local-dir:FOLDER". The last two have
            to contain an open_clip_config.json and weights.
        pretrained: A checkpoint path, a pretrained tag of the model, or "random:SEED". The model "pocket"
            also accepts "pocket", the weights in this package. With "hf-hub:" and "local-dir:" it has to be
            empty.
        device: Device of both encoders.

    Raises FileNotFoundError if the weights do not exist; ValueError for an unknown model or tag, an unsafe
    checkpoint, a checkpoint of another architecture, or a model with images that are not square; ImportError
    if the text tower needs a package that is not installed.
    """
    name, checkpoint, options = _locate(model, pretrained)
    if checkpoint:
        weights.load(checkpoint)  # an unsafe or damaged file fails here, with a clear message

    import open_clip

    config = open_clip.get_model_config(name) or {}
    _check_text_tower(model, config.get("text_cfg", {}))
    seed = int(pretrained.removeprefix("random:")) if checkpoint is None else 0
    built = _create(model, name, checkpoint, seed, device, options)
    size, preprocess = _side(model, built.visual.image_size), built.visual.preprocess_cfg
    pocket = model == "pocket"
    tokenizer = pocket_tokenizer() if pocket else open_clip.get_tokenizer(_tokenizer_name(model))
    settings = {"config": config, "options": options, "preprocess": preprocess}
    identity = weights.digest(built.state_dict()) + json.dumps(settings, sort_keys=True)
    return ClipEncoder(
        name=model,
        key=hashlib.sha256(identity.encode()).hexdigest(),
        config={"model_cfg": built_config(config, built), "preprocess_cfg": dict(preprocess)},
        model=built,
        tokenizer=tokenizer,
        dim=config["embed_dim"],
        image_size=size,
        mean=tuple(preprocess["mean"]),
        std=tuple(preprocess["std"]),
        logit_scale=float(built.logit_scale.exp()),
        device=torch.device(device),
    )


def _create(
    model: str,
    name: str,
    checkpoint: Path | None,
    seed: int,
    device: str | torch.device,
    options: dict[str, Any],
) -> Any:
    """Build open_clip's model ``name``, frozen. Without a checkpoint, weights are random from ``seed``."""
    import open_clip

    try:
        with torch.random.fork_rng(devices=[]), _without_random_weights_warning():
            torch.manual_seed(seed)
            built: Any = open_clip.create_model(
                name,
                pretrained=None if checkpoint is None or name.startswith("local-dir:") else str(checkpoint),
                require_pretrained=checkpoint is not None,
                pretrained_text=False,
                device=device,
                **options,
            )
    except (RuntimeError, AssertionError, KeyError) as error:  # weights of another architecture
        if checkpoint is None:
            raise
        fault = " ".join(str(error).split())[:200]
        raise ValueError(
            f"CLIP {model}: the weights in {checkpoint} are of another architecture ({fault} ...). Set "
            "clip.model to their architecture."
        ) from error
    return built.eval().requires_grad_(False)


def _side(model: str, size: int | tuple[int, int]) -> int:
    """Return the image size S. open_clip gives an int for ResNets and (S, S) for other models."""
    if isinstance(size, int):
        return size
    if size[0] != size[1]:
        raise ValueError(f"CLIP {model} sees {size[0]} x {size[1]} pixels. Choose a model for square images.")
    return size[0]


def built_config(config: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Return the configuration of ``model`` as built, because a tag may add QuickGELU to ``config``."""
    from open_clip.transformer import QuickGELU

    quick = any(isinstance(module, QuickGELU) for module in model.modules())
    return {**config, "quick_gelu": True} if quick else dict(config)


@contextlib.contextmanager
def _without_random_weights_warning() -> Iterator[None]:
    """Silence open_clip's warning about random weights, because the caller asked for them by name."""

    def is_other(record: logging.LogRecord) -> bool:
        return "No pretrained weights loaded" not in record.getMessage()

    root = logging.getLogger()
    root.addFilter(is_other)
    try:
        yield
    finally:
        root.removeFilter(is_other)


def _locate(model: str, pretrained: str) -> tuple[str, Path | None, dict[str, Any]]:
    """Return the name in open_clip, the checkpoint (None for random weights) and the options of the tag."""
    if model.startswith(("hf-hub:", "local-dir:")):
        if pretrained:
            raise ValueError(
                f"CLIP {model} contains its weights, but clip.pretrained is '{pretrained}'. Leave it empty."
            )
        return _locate_folder(model)
    caller = f"CLIP {model} (clip.pretrained)"
    if model == pretrained == "pocket":
        pretrained = str(CONFIGS.parent / "data" / f"{_POCKET}.safetensors")
    if re.fullmatch(r"random:\d+", pretrained):
        return _registered(model), None, {}
    if "." in pretrained or "/" in pretrained or os.sep in pretrained:  # a path: no tag has one of these
        checkpoint = weights.resolve(pretrained, hub_id=None, filename=None, what=caller)
        return _registered(model), checkpoint, {}

    name = _registered(model)
    import open_clip

    tag: dict[str, Any] = open_clip.get_pretrained_cfg(name, pretrained)
    if not tag:
        known = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise ValueError(
            f"{caller}: '{pretrained}' is not a tag of this model (its tags: {known}). Use one, a path "
            "to a checkpoint, or random:SEED."
        )
    hub_id, filename = os.path.split(tag["hf_hub"])
    files = (f"{Path(filename).stem}.safetensors", filename) if filename else _HUB_FILES
    options = {
        "force_quick_gelu": tag.get("quick_gelu", False),  # open_clip only warns if a tag needs it
        "force_preprocess_cfg": {part: tag[part] for part in ("mean", "std", "interpolation", "resize_mode")},
    }
    return name, weights.resolve(pretrained, hub_id=hub_id, filename=files, what=caller), options


def _locate_folder(model: str) -> tuple[str, Path, dict[str, Any]]:
    """Return the result of ``_locate`` for a folder of configuration and weights, local or on the hub."""
    scheme, _, place = model.partition(":")
    caller = f"CLIP {model} (clip.model; local-dir:FOLDER takes a folder with weights and configuration)"
    if scheme == "hf-hub":
        checkpoint = weights.resolve(place, hub_id=place, filename=_HUB_FILES, what=caller)
        config = weights.resolve(place, hub_id=place, filename="open_clip_config.json", what=caller)
    else:
        folder = Path(place).expanduser()
        present = [name for name in _HUB_FILES if (folder / name).is_file()]
        file = str(folder / (present or _HUB_FILES)[0])
        checkpoint = weights.resolve(file, hub_id=None, filename=None, what=caller)
        config = weights.resolve(
            str(folder / "open_clip_config.json"), hub_id=None, filename=None, what=caller
        )
    return f"local-dir:{config.parent}", checkpoint, {}


def _registered(model: str) -> str:
    """Return the model's name in open_clip's registry; add the pocket model to the registry if needed."""
    import open_clip

    if model == "pocket":
        if _POCKET not in open_clip.list_models():
            open_clip.add_model_config(CONFIGS / f"{_POCKET}.json")
        return _POCKET
    name = _tokenizer_name(model)
    if open_clip.get_model_config(name) is None:
        near = ", ".join(difflib.get_close_matches(name, ["pocket", *open_clip.list_models()], cutoff=0.4))
        raise ValueError(
            f"clip.model: open_clip has no model '{model}' (similar: {near or 'none'}). Use a name from "
            "open_clip.list_models(), pocket, or an hf-hub: id."
        )
    return name


def _tokenizer_name(model: str) -> str:
    """Turn OpenAI's spelling ViT-B/32 into ViT-B-32; keep the slashes of hub ids and folders."""
    return model if ":" in model else model.replace("/", "-")


def _check_text_tower(model: str, text: dict[str, Any]) -> None:
    """Raise ImportError if the text tower needs transformers and it is not installed."""
    needed = text.get("hf_model_name") or text.get("hf_tokenizer_name")
    if "siglip" in model.lower():
        needed = needed or "a SigLIP tokenizer"
    if needed and importlib.util.find_spec("transformers") is None:
        raise ImportError(
            f"CLIP {model}: its text tower ({needed}) needs the package transformers. Run `pip install "
            "transformers`, or choose a model with CLIP's own text tower."
        )
