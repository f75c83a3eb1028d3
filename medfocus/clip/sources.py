"""Find what builds a CLIP: its configuration and weights, and the files of a text tower of Hugging Face."""

from __future__ import annotations

import difflib
import importlib.util
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from medfocus.clip.tokenizer import CONFIGS, pocket_tokenizer
from medfocus.storage import weights
from medfocus.storage.imagenet import MEAN, STD, imagenet_state

_POCKET = "clip_pocket"  # the pocket model's name in open_clip, and the stem of its configuration file
_TRUNK = "visual.trunk."
_CONFIG = "open_clip_config.json"
_HUB_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")  # in order of preference
_FOLDER_FILES = (*_HUB_FILES, "model.safetensors", "pytorch_model.bin")  # the last two: transformers' format
_TOKENIZER_OPTIONS = {"clean", "language", "strip_sep_token"}  # of open_clip's HFTokenizer
_TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "vocab.txt")  # a tokenizer has one of these


@dataclass(frozen=True)
class Source:
    """The origin of a CLIP."""

    name: str  # of the configuration, as open_clip takes it
    checkpoint: Path | None  # None: random weights
    options: dict[str, Any] = field(default_factory=dict)  # of open_clip.create_model
    folder: Path | None = None  # with the configuration and the weights
    by_path: bool = False  # a checkpoint without a configuration or tag that describes it


def locate(model: str, pretrained: str) -> Source:
    """Find the configuration and the weights of a CLIP; see ``medfocus.clip.build.build_clip``.

    Raises FileNotFoundError if the weights do not exist, and ValueError for an unknown model or tag.
    """
    if model.startswith(("hf-hub:", "local-dir:")):
        if pretrained:
            raise ValueError(
                f"CLIP {model} contains its weights, but clip.pretrained is '{pretrained}'. Leave it empty."
            )
        return _folder(model)
    name, caller = _registered(model), f"CLIP {model} (clip.pretrained)"
    if re.fullmatch(r"random:\d+", pretrained):
        return Source(name, None, _published_preprocessing(name))
    if model == pretrained == "pocket":
        file = CONFIGS.parent / "data" / f"{_POCKET}.safetensors"
        return Source(name, file, _published_preprocessing(name))
    if "." in pretrained or "/" in pretrained or os.sep in pretrained:  # a path: no tag has one of these
        return Source(name, _file(pretrained, caller), _published_preprocessing(name), by_path=True)

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
        "force_preprocess_cfg": _preprocessing(tag),
    }
    return Source(name, weights.resolve(pretrained, hub_id=hub_id, filename=files, what=caller), options)


def completed(state: dict[str, Tensor], source: Source) -> dict[str, Tensor]:
    """Add the image trunk, whose ImageNet weights are in another package, to the weights of the pocket model.

    Raises FileNotFoundError and ValueError as ``imagenet_state`` does.
    """
    if source.name != _POCKET or any(name.startswith(_TRUNK) for name in state):
        return state
    trunk = {name: value for name, value in imagenet_state().items() if not name.startswith("classifier.")}
    return {**{f"{_TRUNK}{name}": value for name, value in trunk.items()}, **state}


def _preprocessing(tag: dict[str, Any]) -> dict[str, Any]:
    return {part: tag[part] for part in ("mean", "std", "interpolation", "resize_mode")}


def _published_preprocessing(name: str) -> dict[str, Any]:
    """Return the options for weights without a tag: the preprocessing of all tags, if they agree."""
    if name == _POCKET:
        cfg = {"mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "longest"}
        return {"force_preprocess_cfg": cfg}

    import open_clip

    tags = [open_clip.get_pretrained_cfg(name, tag) for tag in open_clip.list_pretrained_tags_by_model(name)]
    known = [_preprocessing(tag) for tag in tags]
    return {"force_preprocess_cfg": known[0]} if known and known.count(known[0]) == len(known) else {}


def _file(pretrained: str, caller: str) -> Path:
    """Return the checkpoint at a path. The error for another place says where that place belongs."""
    path = Path(pretrained).expanduser()
    if path.is_dir() and (path / _CONFIG).is_file():
        raise ValueError(
            f"{caller}: '{pretrained}' is a folder with its own configuration. Set clip.model to "
            f"local-dir:{pretrained}, and leave clip.pretrained empty."
        )
    hub_id = pretrained.removeprefix("hf-hub:")
    looks_like_id = re.fullmatch(r"[\w-]+/[\w.-]+", hub_id) and path.suffix not in weights.CHECKPOINT_SUFFIXES
    if not path.exists() and looks_like_id:
        raise ValueError(
            f"{caller}: '{pretrained}' is not a file. If it is a hub id, set clip.model to hf-hub:{hub_id} "
            "and leave clip.pretrained empty."
        )
    return weights.resolve(pretrained, hub_id=None, filename=None, what=caller)


def _folder(model: str) -> Source:
    """Return the source in a folder of configuration and weights, local or on the hub."""
    scheme, _, place = model.partition(":")
    caller = f"CLIP {model} (clip.model; local-dir:FOLDER takes a folder with weights and configuration)"
    if scheme == "hf-hub":
        checkpoint = weights.resolve(place, hub_id=place, filename=_HUB_FILES, what=caller)
        config = weights.resolve(place, hub_id=place, filename=_CONFIG, what=caller)
    else:
        folder = Path(place).expanduser()
        present = [name for name in _FOLDER_FILES if (folder / name).is_file()]
        file = str(folder / (present or _HUB_FILES)[0])
        checkpoint = weights.resolve(file, hub_id=None, filename=None, what=caller)
        config = weights.resolve(str(folder / _CONFIG), hub_id=None, filename=None, what=caller)
    return Source(f"local-dir:{config.parent}", checkpoint, folder=config.parent)


def _registered(model: str) -> str:
    """Return the model's name in open_clip's registry; add the pocket model to the registry if needed."""
    import open_clip

    if model == "pocket":
        if _POCKET not in open_clip.list_models():
            open_clip.add_model_config(CONFIGS / f"{_POCKET}.json")
        return _POCKET
    name = model.replace("/", "-")  # OpenAI's spelling: ViT-B/32
    if open_clip.get_model_config(name) is None:
        if Path(model).expanduser().is_dir():
            fix = f"For the folder of this name, set it to local-dir:{model}."
        elif re.fullmatch(r"[\w-]+/[\w.-]+", model) and not model.startswith(("ViT", "RN")):
            fix = (
                f"For the hub's model of this name, set it to hf-hub:{model} and leave clip.pretrained empty."
            )
        else:
            fix = "Use a name from open_clip.list_models(), pocket, an hf-hub: id or a local-dir: folder."
        near = ", ".join(difflib.get_close_matches(name, ["pocket", *open_clip.list_models()], cutoff=0.4))
        raise ValueError(f"clip.model: open_clip has no model '{model}' (similar: {near or 'none'}). {fix}")
    return name


def check_text_tower(model: str, text: dict[str, Any]) -> None:
    """Raise ImportError if the text tower needs transformers and it is not installed."""
    needed = text.get("hf_model_name") or text.get("hf_tokenizer_name")
    if needed and importlib.util.find_spec("transformers") is None:
        raise ImportError(
            f"CLIP {model}: its text tower ({needed}) needs the package transformers. Run `pip install "
            "'medfocusclip[biomed]'`, or choose a model with CLIP's own text tower."
        )


def text_tower(model: str, text: dict[str, Any], folder: Path | None) -> dict[str, Any]:
    """Return the option of ``create_model`` for a text tower of Hugging Face; none for CLIP's own.

    ``folder`` may hold the text tower's config.json. Otherwise, the hub cache or the hub has to.
    """
    name = text.get("hf_model_name")
    if not name:
        return {}
    if folder is not None and _is_of_text_tower(folder / "config.json"):
        place = str(folder)
    else:
        place = _on_hub(model, name, ("config.json",), "configuration", folder)
    return {"text_cfg": {**text, "hf_model_name": place, "hf_model_pretrained": False}}


def _is_of_text_tower(path: Path) -> bool:
    """Return whether a file configures a text tower that open_clip knows, and not another model."""
    from open_clip.hf_configs import arch_dict

    return path.is_file() and json.loads(path.read_text(encoding="utf-8")).get("model_type") in arch_dict


def build_tokenizer(model: str, name: str, text: dict[str, Any], folder: Path | None) -> Any:
    """Build the tokenizer of a text tower, from ``folder`` if it holds one of Hugging Face's tokenizers."""
    import open_clip
    from open_clip.tokenizer import DEFAULT_CONTEXT_LENGTH, HFTokenizer

    if model == "pocket":
        return pocket_tokenizer()
    hub_id, options = text.get("hf_tokenizer_name"), text.get("tokenizer_kwargs", {})
    if not hub_id:
        return open_clip.get_tokenizer(name)
    if unknown := sorted(options.keys() - _TOKENIZER_OPTIONS):
        raise ValueError(
            f"CLIP {model}: its configuration has the tokenizer option {unknown[0]!r}, which was refused "
            f"because such options can run code. Known are {', '.join(sorted(_TOKENIZER_OPTIONS))}."
        )
    if folder is not None and any((folder / file).is_file() for file in _TOKENIZER_FILES):
        place = str(folder)
    else:
        place = _on_hub(model, hub_id, _TOKENIZER_FILES, "tokenizer", folder)
    return HFTokenizer(
        place,
        context_length=text.get("context_length", DEFAULT_CONTEXT_LENGTH),
        tokenizer_mode=text.get("tokenizer_mode"),
        trust_remote_code=False,  # the default would ask on the terminal
        **options,
    )


def _on_hub(model: str, hub_id: str, files: tuple[str, ...], part: str, folder: Path | None) -> str:
    """Return the folder of the hub cache with one of ``files``, or the id if it is on the hub.

    ``hub_id`` may also be a local folder. Raises FileNotFoundError, which says how to get the files.
    """
    import huggingface_hub

    if any((Path(hub_id).expanduser() / file).is_file() for file in files):
        return str(Path(hub_id).expanduser())
    for file in files:
        if isinstance(cached := huggingface_hub.try_to_load_from_cache(hub_id, file), str):
            return str(Path(cached).parent)
    try:
        weights.resolve(hub_id, hub_id=hub_id, filename=files, what=f"CLIP {model}")
    except FileNotFoundError as error:
        where = f" --local-dir {folder}" if folder else ""
        raise FileNotFoundError(
            f"CLIP {model}: the {part} of its text tower, {hub_id}, is neither in its folder nor in the hub "
            "cache, and the download failed. On a machine with network access, run `hf download "
            f"{hub_id} --include '*.json' '*.txt' '*.model'{where}`, and copy the result here."
        ) from error
    return hub_id
