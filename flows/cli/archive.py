"""Models as zip files of tensors and text, for a machine without a network.

A zip has the parts of a model folder (``medfocus.serving``) and ``contents.json``, which lists each part with
its sha256. Zips are not trusted: file names come from PARTS, sizes are limited while unpacking, and the model
is loaded once before it is registered. A zip does not list the images that the model was made with.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from flows.cli.models import opened
from medfocus.storage import atomic
from medfocus.tracking import registry, runs

PARTS = (
    "serve.json",
    "cell.safetensors",
    "clip/config.json",
    "clip/open_clip_config.json",
    "clip/open_clip_model.safetensors",
    "sam2.yaml",
    "sam2.safetensors",
    "adapter.safetensors",
    "text.safetensors",
)  # files of a model folder that are exported
CONTENTS = "contents.json"
MOST_BYTES = 16_000_000_000  # limit on the unpacked size of an archive
_MOST_TEXT = 10_000_000  # bytes of a part without tensors
_CHUNK = 2**20


def export(home: Path, model: str | None, path: Path) -> str:
    """Write a model to a zip and return the model's name. Raises FileExistsError if the file exists."""
    if path.exists():
        raise FileExistsError(f"{path} already exists. Give another name, or delete the file.")
    with opened(home, model) as (name, folder):
        present = [part for part in PARTS if (folder / part).is_file()]
        contents = {
            "format": 1,
            "model": name,
            "files": {part: atomic.digest(folder / part) for part in present},
        }
        with (
            atomic.new_file(path) as file,
            zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive,  # weights do not compress
        ):
            for part in present:
                archive.write(folder / part, part)
            archive.writestr(CONTENTS, json.dumps(contents, indent=1) + "\n")
    return name


def import_model(home: Path, path: Path, name: str) -> registry.Registration:
    """Check an exported model, load it once, and register it as ``name``.

    The model does not become champion: the gate needs the list of the images that the model was made with,
    but a zip has no such list.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The zip is incomplete, has other files, or has a model that cannot be loaded.
    """
    from medfocus import phantoms
    from medfocus.phantoms import png
    from medfocus.serving import checkpoint
    from medfocus.serving.model_folder import load_model

    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file. Give a zip from medfocus models export.")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "model")
        contents = unpack(path, folder)
        try:
            load_model(folder)
        except Exception as error:  # a foreign file can raise any error; the temporary path is no help
            fault = " ".join(str(error).replace(f"{folder}{os.sep}", "").split())
            raise ValueError(f"{path}: the model cannot be loaded ({fault}). Export it again.") from error
        header = checkpoint.read_header(folder / "cell.safetensors")
        random = phantoms.generator(0, "chest_xray", "test", "normal", 0)
        example = phantoms.draw("chest_xray", "normal", random)
        return registry.register(
            runs.start(None, home, "medfocus"),
            name,
            lambda target: shutil.copytree(folder, target),
            cell_key=str(header.facts.get("key") or contents["files"]["cell.safetensors"]),
            judge=lambda champion: registry.Verdict(False, "imported, so the gate was not applied", {}),
            classes=header.classes,
            example=png.encode(example.image),
            tags={"imported": path.name, "imported.model": contents["model"]},
        )


def unpack(path: Path, folder: Path) -> dict[str, Any]:
    """Unpack an archive's parts into ``folder`` and return its contents.

    Raises ValueError, with the part and the fault, if the archive is not a complete model.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = [item.filename for item in archive.infolist()]
            if foreign := sorted({name for name in names if name not in (*PARTS, CONTENTS)}):
                raise _refused(path, f"contains {foreign[0]!r}, which is not part of a model")
            if len(set(names)) < len(names):
                raise _refused(path, "contains a part twice")
            contents = _contents(path, archive)
            left = MOST_BYTES
            for name in PARTS:
                if (name in names) != (name in contents["files"]):
                    raise _refused(path, f"{name} is either missing or not listed in {CONTENTS}")
                if name in names:
                    left -= _unpack_part(path, archive, name, folder / name, left)
                    if atomic.digest(folder / name) != contents["files"][name]:
                        raise _refused(path, f"{name} has changed since the export (its sha256 differs)")
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # a fault of this machine's disk
        raise _refused(path, f"cannot be unpacked ({error})") from error
    if "serve.json" not in names or "cell.safetensors" not in names:
        raise _refused(path, "has no serve.json or no cell.safetensors")
    return contents


def _contents(path: Path, archive: zipfile.ZipFile) -> dict[str, Any]:
    try:
        with archive.open(CONTENTS) as file:
            contents = json.loads(file.read(_MOST_TEXT))
        known = contents["format"] == 1 and all(isinstance(v, str) for v in contents["files"].values())
        known = known and isinstance(contents["model"], str)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise _refused(path, f"has no readable {CONTENTS}") from error
    if not known:
        raise _refused(path, f"has a {CONTENTS} of another format")
    return contents


def _unpack_part(path: Path, archive: zipfile.ZipFile, name: str, target: Path, left: int) -> int:
    """Write one part and return its size, counted while unpacking; the archive's own number may be false."""
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
    return ValueError(
        f"{path}: {fault}. The file was refused; export the model again: medfocus models export."
    )
