"""Build a frozen CLIP with open_clip, and compute its key."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from medfocus.clip import sources
from medfocus.clip.encoder import ClipEncoder
from medfocus.clip.sources import Source
from medfocus.clip.transformers_format import converted
from medfocus.images.geometry import Colour, Frame, Interpolation, Resize
from medfocus.storage import weights

RESIZES = ("letterbox", "published")
_OPENAI = ("input_resolution", "context_length", "vocab_size")  # only OpenAI's own files have these entries


def build_clip(
    model: str,
    pretrained: str,
    device: str | torch.device = "cpu",
    *,
    resize: str = "letterbox",
    texts: bool = True,
) -> ClipEncoder:
    """Build a frozen CLIP.

    Args:
        model: "pocket", a model name of open_clip, "hf-hub:ORG/NAME" or "local-dir:FOLDER". The last two have
            to contain an open_clip_config.json and weights.
        pretrained: A checkpoint path, a pretrained tag of the model, or "random:SEED". The model "pocket"
            also accepts "pocket", the weights in this package. With "hf-hub:" and "local-dir:" it has to be
            empty.
        device: Device of both encoders.
        resize: One of RESIZES. "letterbox" shows the whole image, with the checkpoint's mean colour beside
            it. "published" follows the checkpoint: most see only the square in the middle.
        texts: Whether to build the tokenizer. Without it, the encoder cannot encode texts.

    OpenAI's own files get QuickGELU. A file of other tensors cannot say whether it needs it; if the model has
    a variant with QuickGELU, a warning names it.

    Raises FileNotFoundError if the weights do not exist; ValueError for an unknown model or tag, an unsafe
    checkpoint, a checkpoint of another architecture, or a model with images that are not square; ImportError
    if the text tower needs a package that is not installed.
    """
    if resize not in RESIZES:
        raise ValueError(f"CLIP {model}: resize is {resize!r}. Use one of {', '.join(RESIZES)}.")
    source = sources.locate(model, pretrained)
    state = None
    if source.checkpoint is not None:
        state = sources.completed(converted(weights.load(source.checkpoint)), source)

    import open_clip

    config = open_clip.get_model_config(source.name) or {}
    text = config.get("text_cfg", {})
    sources.check_text_tower(model, text)
    options = {**source.options, **sources.text_tower(model, text, source.folder)}
    if state is not None and all(name in state for name in _OPENAI):
        state = {name: tensor for name, tensor in state.items() if name not in _OPENAI}
        options["force_quick_gelu"] = True
    elif source.by_path:
        for guess in _guesses(source, config):
            warnings.warn(f"CLIP {model}: {source.checkpoint} does not say {guess}", stacklevel=2)
    seed = int(pretrained.removeprefix("random:")) if state is None else 0
    built = _create(model, source, state, seed, device, options)
    preprocess = built.visual.preprocess_cfg
    config = {"model_cfg": built_config(config, built), "preprocess_cfg": dict(preprocess)}
    identity = weights.digest(built.state_dict()) + json.dumps(config, sort_keys=True)
    return ClipEncoder(
        name=model,
        key=hashlib.sha256(identity.encode()).hexdigest(),
        config=config,
        model=built,
        tokenizer=sources.build_tokenizer(model, source.name, text, source.folder) if texts else None,
        dim=config["model_cfg"]["embed_dim"],
        frame=_frame(_side(model, built.visual.image_size), preprocess, resize),
        mean=tuple(preprocess["mean"]),
        std=tuple(preprocess["std"]),
        logit_scale=float(built.logit_scale.exp()),
        device=torch.device(device),
    )


def _guesses(source: Source, config: dict[str, Any]) -> Iterator[str]:
    """Yield what tensors without a description do not say, what is assumed, and how to say it."""
    import open_clip

    variant = f"{source.name}-quickgelu"
    if not config.get("quick_gelu") and open_clip.get_model_config(variant) is not None:
        yield (
            "whether its weights need GELU or QuickGELU, so they get GELU. For OpenAI's weights and models "
            f"trained from them, set clip.model to {variant}."
        )
    if not source.options and open_clip.list_pretrained_tags_by_model(source.name):
        yield (
            "its preprocessing, in which the published weights of this model differ, so it gets OpenAI's. "
            "For other weights, use a tag, or local-dir: with their open_clip_config.json."
        )


def _create(
    model: str,
    source: Source,
    state: dict[str, Tensor] | None,
    seed: int,
    device: str | torch.device,
    options: dict[str, Any],
) -> Any:
    """Build open_clip's model, frozen. Without a state, the weights are random from ``seed``."""
    import open_clip

    with torch.random.fork_rng(devices=[]), _without_random_weights_warning():
        torch.manual_seed(seed)
        built: Any = open_clip.create_model(
            source.name, load_weights=False, pretrained_text=False, device=device, **options
        )
    if state is not None:
        try:
            _load(built, state)
        except (RuntimeError, AssertionError, KeyError) as error:
            fault = " ".join(str(error).split())[:200]
            raise ValueError(
                f"CLIP {model}: the weights in {source.checkpoint} are of another architecture "
                f"({fault} ...). Set clip.model to their architecture."
            ) from error
    return built.eval().requires_grad_(False)


def _load(model: Any, state: dict[str, Tensor]) -> None:
    """Load weights like open_clip's ``load_checkpoint``, but strictly.

    That function would also resize positional embeddings to another image size or context, and set a missing
    logit bias to 0.
    """
    from open_clip.convert import convert_state_dict
    from open_clip.model import convert_to_custom_text_state_dict

    stored = state.get("visual.trunk.pos_embed")
    built = getattr(getattr(model.visual, "trunk", None), "pos_embed", None)
    if stored is not None and built is not None and stored.shape != built.shape:
        model.visual.set_input_size(model.visual.image_size)  # timm built the size in its model's name
    state = convert_state_dict(model, state)
    if "positional_embedding" in state and not hasattr(model, "positional_embedding"):
        state = convert_to_custom_text_state_dict(state)
    for name in {"logit_scale", "logit_bias"} & state.keys():
        if getattr(model, name, None) is not None:
            state[name] = state[name].reshape(getattr(model, name).shape)
    state.pop("text.transformer.embeddings.position_ids", None)  # transformers saved it until version 4.31
    model.load_state_dict(state)


def _side(model: str, size: int | tuple[int, int]) -> int:
    """Return the image size S. open_clip gives an int for ResNets and (S, S) for other models."""
    if isinstance(size, int):
        return size
    if size[0] != size[1]:
        raise ValueError(f"CLIP {model} sees {size[0]} x {size[1]} pixels. Choose a model for square images.")
    return size[0]


def _frame(size: int, preprocess: dict[str, Any], resize: str) -> Frame:
    """Return the frame of a checkpoint's preprocessing; its colour is the checkpoint's mean."""
    red, green, blue = (round(255 * value) for value in preprocess["mean"])
    mean: Colour = (red, green, blue)
    # For inference, open_clip reads "random" as bicubic.
    interpolation: Interpolation = "bilinear" if preprocess["interpolation"] == "bilinear" else "bicubic"
    if resize == "letterbox":
        return Frame(size, "longest", interpolation, mean, padding=mean)
    mode: Resize = preprocess["resize_mode"]
    grey = int(preprocess["fill_color"])
    return Frame(size, mode, interpolation, mean, padding=(grey, grey, grey))


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
