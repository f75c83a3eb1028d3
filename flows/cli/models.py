"""Registered models and cached weights: which there are, how they come to a machine without a network.

A model travels as a zip of tensors and text: the parts of a model folder (``medfocus.serving.predictor``) and
``contents.json``, which names each with its sha256. A zip from elsewhere is not trusted: no name in it leads
anywhere, what it unpacks to is bounded while it is read, and it is loaded once before it is registered.
Which images the model was made with stays behind.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from flows.study.params import read_content
from flows.study.study import params_files
from medfocus.storage import atomic
from medfocus.tracking import registry, runs
from medfocus.tracking.registry import Registered

PARTS = (
    "serve.json",
    "cell.safetensors",
    "clip/open_clip_config.json",
    "clip/open_clip_model.safetensors",
    "sam2.yaml",
    "sam2.safetensors",
    "adapter.safetensors",
    "text.safetensors",
)  # of a model folder, those that may travel
CONTENTS = "contents.json"
MOST_BYTES = 16_000_000_000  # that an archive may unpack to
_MOST_TEXT = 10_000_000  # bytes of a part that is no tensors
_CHUNK = 2**20
_SAM2 = tuple(f"facebook/sam2.1-hiera-{size}" for size in ("tiny", "small", "base-plus", "large"))
_CLIP = ("ViT-B-16:openai", "hf-hub:microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224")


class Weights(NamedTuple):
    """A line of the list of weights."""

    name: str  # as ``fetch`` takes it
    use: str
    state: str


def weights(home: Path) -> list[Weights]:
    """The weights in the package, those that this project's studies name, and published ones."""
    asked = list(asked_for(home))
    lines = [
        Weights("pocket", "masks.checkpoint", "in the package, trained on drawn images alone"),
        Weights("pocket", "clip.pretrained", "in the package, trained on drawn images alone"),
    ]
    for name in dict.fromkeys([*asked, *_SAM2, *_CLIP]):
        used = " of a study here" if name in asked else ""
        field = "masks.checkpoint" if _is_sam2(name) else "clip"
        lines.append(Weights(name, f"{field}{used}", _state(name)))
    return lines


def asked_for(home: Path) -> Iterator[str]:
    """What the params files of a project name that is neither in the package nor a file."""
    for path in params_files(home):
        try:
            content = read_content(path)
            checkpoint = str(content["masks"]["checkpoint"])
            model, pretrained = str(content["clip"]["model"]), str(content["clip"]["pretrained"] or "")
        except (ValueError, OSError, KeyError, TypeError):  # medfocus doctor and medfocus study tell
            continue
        if _is_sam2(checkpoint) and not (path.parent / checkpoint).exists():
            yield checkpoint
        if model.startswith("hf-hub:"):
            yield model
        elif pretrained and pretrained != "pocket" and not any(sign in pretrained for sign in ":./"):
            yield f"{model}:{pretrained}"


def fetch(name: str) -> str:
    """Have published weights in the local hub cache, and load them once; where the first file lies.

    Args:
        name: A hub id of SAM2 (facebook/sam2.1-hiera-tiny), a CLIP on the hub (hf-hub:ORG/NAME), or a model
            of open_clip and its tag (ViT-B-16:openai).

    Raises ValueError for another spelling, FileNotFoundError where the file is neither cached nor can be had.
    """
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from medfocus.clip.build import build_clip

    if _is_sam2(name):
        from medfocus.storage import weights as door

        path = door.resolve(name, hub_id=name, filename=_sam2_file(name), what="medfocus models fetch")
        door.load(path)  # a damaged or refused file is told here
        return str(path)
    if name.startswith("hf-hub:"):
        return f"{build_clip(name, '').name}, in the hub cache"
    model, colon, tag = name.rpartition(":")
    if not colon or not model or not tag:
        raise ValueError(
            f"{name!r} is no name of weights. Give a hub id of SAM2 such as {_SAM2[0]}, hf-hub:ORG/NAME, or "
            f"MODEL:TAG such as {_CLIP[0]}."
        )
    build_clip(model, tag)
    return f"{name}, in the hub cache"


def choose(home: Path, asked: str | None) -> Registered:
    """A registered version: NAME, NAME@VERSION or, where only one model is registered, None.

    Without a version it is the champion, and where there is none the newest.

    Raises ValueError, which lists those that there are.
    """
    found = registry.registered(home)
    names = list(dict.fromkeys(each.name for each in found))
    if not found:
        raise ValueError(
            f"{home}: no model is registered. Run a study (medfocus run), import one (medfocus models "
            "import), or give a model folder."
        )
    if asked is None and len(names) > 1:
        raise ValueError(f"several models are registered. Give one with --model: {', '.join(names)}.")
    name, _, version = (asked or names[0]).partition("@")
    own = [each for each in found if each.name == name]
    if not own:
        raise ValueError(f"no model {name!r} is registered; there are {', '.join(names)}.")
    if version and version != registry.CHAMPION:
        own = [each for each in own if each.version == version]
    elif champion := [each for each in own if each.alias]:
        own = champion
    elif version:
        own = []
    if not own:
        there = ", ".join(f"{each.name}@{each.version}" for each in found if each.name == name)
        raise ValueError(f"{name} has no version {version!r}; there are {there}.")
    return own[0]


@contextmanager
def opened(home: Path, asked: str | None) -> Iterator[tuple[str, Path]]:
    """What a user calls a model, and its folder for the ``with`` block: a folder, or as ``choose``."""
    if asked is not None and Path(asked).is_dir():
        yield asked, Path(asked)
        return
    chosen = choose(home, asked)
    with tempfile.TemporaryDirectory() as into:
        told = f"{chosen.name} version {chosen.version}" + (f" ({chosen.alias})" if chosen.alias else "")
        yield told, chosen.model_folder(Path(into))


def export(home: Path, asked: str | None, path: Path) -> str:
    """Write a model to a zip; what was written, in words. Raises FileExistsError where there is a file."""
    if path.exists():
        raise FileExistsError(f"{path} is there already. Give another name, or remove it.")
    with opened(home, asked) as (told, folder):
        present = [name for name in PARTS if (folder / name).is_file()]
        contents = {
            "format": 1,
            "model": told,
            "files": {name: atomic.digest(folder / name) for name in present},
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with zipfile.ZipFile(beside, "w", zipfile.ZIP_STORED) as archive:  # weights do not get smaller
                for name in present:
                    archive.write(folder / name, name)
                archive.writestr(CONTENTS, json.dumps(contents, indent=1) + "\n")
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
    return told


def bring(home: Path, path: Path, name: str) -> registry.Registration:
    """Check an exported model, load it once, and register it as ``name``; it does not become champion.

    The gate, which tries a champion on new images, needs to know which ones it was made with, and that
    stays where it was made.

    Raises FileNotFoundError, or ValueError where the archive is not whole, holds anything but the parts of a
    model, or cannot be loaded; then nothing was registered.
    """
    from medfocus import phantoms
    from medfocus.phantoms import png
    from medfocus.serving import checkpoint
    from medfocus.serving.predictor import Predictor

    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give what medfocus models export wrote.")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "model")
        contents = unpack(path, folder)
        try:
            Predictor.load(folder)
        except Exception as error:
            # Whatever is wrong in a file from elsewhere: its place here is of no use to anybody.
            said = " ".join(str(error).replace(f"{folder}{os.sep}", "").split())
            raise ValueError(f"{path}: its model cannot be loaded ({said}). Export it anew.") from error
        header = checkpoint.read_header(folder / "cell.safetensors")
        random = phantoms.generator(0, "chest_xray", "test", "normal", 0)
        shown = phantoms.draw("chest_xray", "normal", random)
        store = runs.start(None, home, "medfocus")
        key = str(header.facts.get("key") or contents["files"]["cell.safetensors"])
        return registry.register(
            store,
            name,
            lambda target: _copy(folder, target),
            cell_key=key,
            judge=lambda champion: registry.Verdict(False, "imported: no gate has tried it here", {}),
            classes=header.classes,
            example=png.encode(shown.image),
            tags={"imported": path.name, "imported.model": contents["model"]},
        )


def unpack(path: Path, folder: Path) -> dict[str, Any]:
    """An archive's parts -> files of ``folder``, and its contents. Raises ValueError, naming part and fault.

    Files are made by the names in PARTS, never by those in the archive.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = [item.filename for item in archive.infolist()]
            if strange := sorted({name for name in names if name not in (*PARTS, CONTENTS)}):
                raise _refused(path, f"holds {strange[0]!r}, which is no part of a model")
            if len(set(names)) < len(names):
                raise _refused(path, "holds a part twice")
            contents = _contents(path, archive)
            left = MOST_BYTES
            for name in PARTS:
                if (name in names) != (name in contents["files"]):
                    raise _refused(path, f"and its {CONTENTS} do not agree on {name}")
                if name in names:
                    left -= _unpack_part(path, archive, name, folder / name, left)
                    if atomic.digest(folder / name) != contents["files"][name]:
                        raise _refused(path, f"{name} is not what was exported (its sha256 differs)")
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of this machine's disk
        raise _refused(path, f"cannot be unpacked ({error})") from error
    if "serve.json" not in names or "cell.safetensors" not in names:
        raise _refused(path, "lacks serve.json or cell.safetensors")
    return contents


def _contents(path: Path, archive: zipfile.ZipFile) -> dict[str, Any]:
    try:
        with archive.open(CONTENTS) as file:
            text = file.read(_MOST_TEXT)
        contents = json.loads(text)
        known = contents["format"] == 1 and all(isinstance(v, str) for v in contents["files"].values())
        known = known and isinstance(contents["model"], str)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise _refused(path, f"has no {CONTENTS} that can be read") from error
    if not known:
        raise _refused(path, f"has a {CONTENTS} of another kind")
    return contents


def _unpack_part(path: Path, archive: zipfile.ZipFile, name: str, target: Path, left: int) -> int:
    """Write one part; its bytes. What an archive says of a size is not believed."""
    most = left if name.endswith(".safetensors") else min(left, _MOST_TEXT)
    target.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with archive.open(name) as source, target.open("wb") as file:
        while data := source.read(_CHUNK):
            count += len(data)
            if count > most:
                raise _refused(path, f"{name} unpacks to more than {most} bytes")
            file.write(data)
    return count


def _refused(path: Path, fault: str) -> ValueError:
    return ValueError(f"{path}: {fault}, so it was refused. Export the model anew: medfocus models export.")


def _copy(folder: Path, target: Path) -> None:

    shutil.copytree(folder, target)


def _is_sam2(name: str) -> bool:
    return name.count("/") == 1 and ":" not in name and not name.startswith((".", "~"))


def _sam2_file(name: str) -> str:
    return name.rpartition("/")[2].replace("-", "_") + ".pt"  # as facebook/sam2.1-hiera-* do


def _state(name: str) -> str:
    """Whether weights are in the local hub cache, without a look at the network."""
    import huggingface_hub

    if _is_sam2(name):
        wanted = {name: (_sam2_file(name),)}
    elif name.startswith("hf-hub:"):
        files = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
        wanted = {name.removeprefix("hf-hub:"): files}
    else:
        wanted = _of_open_clip(name)
    for hub_id, files in wanted.items():
        for file in files:
            if isinstance(cached := huggingface_hub.try_to_load_from_cache(hub_id, file), str):
                return f"cached, {Path(cached).stat().st_size / 1e6:.0f} MB"
    return f"not here: medfocus models fetch {name}"


def _of_open_clip(name: str) -> dict[str, tuple[str, ...]]:
    """Hub id -> files of MODEL:TAG; nothing where open_clip has no such."""
    import open_clip

    model, _, tag = name.rpartition(":")
    place = (open_clip.get_pretrained_cfg(model.replace("/", "-"), tag) or {}).get("hf_hub")
    if not place:
        return {}
    hub_id, file = os.path.split(place)
    usual = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
    return {hub_id: (f"{Path(file).stem}.safetensors", file) if file else usual}
