"""The content of a params file, completed from the files that it names: the file it extends, and texts."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import yaml

from flows.study.texts import with_texts
from medfocus.learning.schedules import extended

# Fields that may be paths; others are names of packaged or downloaded files.
_PATHS = (
    ("masks", "config"),
    ("masks", "checkpoint"),
    ("clip", "pretrained"),
    ("clip", "alpha"),
    ("report", "published"),
)


def read_content(path: Path) -> dict[str, Any]:
    """Return the sections of a params file, completed from the file that it ``extends``.

    ``extends`` is a path relative to this file. The other file gives each section that this file omits, each
    field that a section omits, and each hyperparameter that a method omits; it does not complete the sections
    datasets and phantoms. Its relative paths are rewritten for this file's folder.

    Raises FileNotFoundError and ValueError as ``load_params`` does.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such params file. Copy the project's params.yaml and edit it.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: contains {type(content).__name__}, not the sections of a params file.")
    if isinstance(methods := content.get("methods"), dict):
        content["methods"] = {name: with_texts(section, path.parent) for name, section in methods.items()}
    if "extends" not in content:
        return content
    base_path = path.parent / str(content.pop("extends"))
    base = moved_paths(read_content(base_path), base_path.parent, path.parent)
    for name, section in base.items():
        extension = content.setdefault(name, section)
        mappings = isinstance(extension, dict) and isinstance(section, dict)
        if name in ("datasets", "phantoms") or not mappings:
            continue
        if name == "methods":
            extension = {
                key: extended(section.get(key, {}), value) if isinstance(value, dict) else value
                for key, value in extension.items()
            }
        content[name] = {**section, **extension}
    return content


def moved_paths(content: dict[str, Any], before: Path, after: Path) -> dict[str, Any]:
    """Return a params file's content with paths relative to folder ``after`` instead of ``before``."""
    moved = copy.deepcopy(content)
    for dataset in moved.get("datasets", {}).values():
        if not Path(dataset["root"]).is_absolute():
            dataset["root"] = _moved(dataset["root"], before, after)
    for section, field in _PATHS:
        value = moved.get(section, {}).get(field)
        if value and not Path(value).is_absolute() and (before / value).exists():
            moved[section][field] = _moved(value, before, after)
    scheme, colon, folder = str(moved.get("clip", {}).get("model", "")).partition("local-dir:")
    if colon and not scheme and not Path(folder).expanduser().is_absolute():
        moved["clip"]["model"] = f"local-dir:{_moved(folder, before, after)}"
    return moved


def _moved(path: str, before: Path, after: Path) -> str:
    return Path(os.path.relpath(before / path, after)).as_posix()
