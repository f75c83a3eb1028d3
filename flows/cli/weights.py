"""Published weights: a list with their place in the hub cache, and their download."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from flows.study.content import read_content
from flows.study.study import params_files

_SAM2 = tuple(f"facebook/sam2.1-hiera-{size}" for size in ("tiny", "small", "base-plus", "large"))
_CLIP = ("ViT-B-16:openai", "hf-hub:microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224")
_CLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
_IN_PACKAGE = "in the package, not for clinical use; its card is in medfocus/data"


class Row(NamedTuple):
    """A row of the list of weights."""

    name: str  # as ``fetch`` takes it
    setting: str
    state: str


def rows(home: Path) -> list[Row]:
    """List the package's weights, the weights of this project's studies, and other published weights."""
    used = list(of_studies(home))
    lines = [Row("pocket", setting, _IN_PACKAGE) for setting in ("masks.checkpoint", "clip.pretrained")]
    for name in dict.fromkeys([*used, *_SAM2, *_CLIP]):
        setting = "masks.checkpoint" if _is_sam2(name) else "clip"
        lines.append(Row(name, f"{setting} of a study here" if name in used else setting, _state(name)))
    return lines


def of_studies(home: Path) -> Iterator[str]:
    """Yield the weights in a project's params files, except files and weights from the package."""
    for path in params_files(home):
        try:
            content = read_content(path)
            checkpoint = str(content["masks"]["checkpoint"])
            model, pretrained = str(content["clip"]["model"]), str(content["clip"]["pretrained"] or "")
        except (ValueError, OSError, KeyError, TypeError):  # medfocus doctor reports the fault
            continue
        if _is_sam2(checkpoint) and not (path.parent / checkpoint).exists():
            yield checkpoint
        if model.startswith("hf-hub:"):
            yield model
        elif pretrained and pretrained != "pocket" and not any(sign in pretrained for sign in ":./"):
            yield f"{model}:{pretrained}"


def fetch(name: str) -> str:
    """Download weights to the hub cache if they are not there, load them once, and return their place.

    Args:
        name: A hub id of SAM2 (facebook/sam2.1-hiera-tiny), a CLIP on the hub (hf-hub:ORG/NAME), or a model
            of open_clip and its tag (ViT-B-16:openai).

    Raises:
        ValueError: The name has another form.
        FileNotFoundError: The file is not cached and the download fails.
    """
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from medfocus.clip.build import build_clip
    from medfocus.storage import weights

    if _is_sam2(name):
        path = weights.resolve(name, hub_id=name, filename=_sam2_file(name), what="medfocus models fetch")
        weights.load(path)  # reports a damaged or refused file now
        return str(path)
    if name.startswith("hf-hub:"):
        return f"{build_clip(name, '').name}, in the hub cache"
    model, colon, tag = name.rpartition(":")
    if not colon or not model or not tag:
        raise ValueError(
            f"{name!r} does not name weights. Give a hub id of SAM2 such as {_SAM2[0]}, hf-hub:ORG/NAME, or "
            f"MODEL:TAG such as {_CLIP[0]}."
        )
    build_clip(model, tag)
    return f"{name}, in the hub cache"


def _is_sam2(name: str) -> bool:
    return name.count("/") == 1 and ":" not in name and not name.startswith((".", "~"))


def _sam2_file(name: str) -> str:
    return name.rpartition("/")[2].replace("-", "_") + ".pt"  # as in facebook/sam2.1-hiera-*


def _state(name: str) -> str:
    """Return whether weights are in the local hub cache, without network access."""
    import huggingface_hub

    if _is_sam2(name):
        wanted = {name: (_sam2_file(name),)}
    elif name.startswith("hf-hub:"):
        wanted = {name.removeprefix("hf-hub:"): _CLIP_FILES}
    else:
        wanted = _open_clip_files(name)
    for hub_id, files in wanted.items():
        for file in files:
            if isinstance(cached := huggingface_hub.try_to_load_from_cache(hub_id, file), str):
                return f"cached, {Path(cached).stat().st_size / 1e6:.0f} MB"
    return f"not cached: medfocus models fetch {name}"


def _open_clip_files(name: str) -> dict[str, tuple[str, ...]]:
    """Return the hub id and files of MODEL:TAG; empty if open_clip does not know it."""
    import open_clip

    model, _, tag = name.rpartition(":")
    location = (open_clip.get_pretrained_cfg(model.replace("/", "-"), tag) or {}).get("hf_hub")
    if not location:
        return {}
    hub_id, file = os.path.split(location)
    return {hub_id: (f"{Path(file).stem}.safetensors", file) if file else _CLIP_FILES}
