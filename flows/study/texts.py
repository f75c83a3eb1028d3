"""The files of texts that a params file names for a method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml


def names_file(section: Any) -> bool:
    """Return whether a method's section names a file of texts."""
    return isinstance(section, dict) and isinstance(section.get("texts"), str)


def with_texts(section: Any, folder: Path) -> Any:
    """Return a method's section with the content of the YAML or JSON file that its ``texts`` names.

    The file has a list of texts for each class, named as in text prompts. Its path is relative to ``folder``.
    The content stands in the section, so that DVC, MLflow and the cells' keys know it.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is not of this form.
    """
    if not names_file(section):
        return section
    path = folder / section["texts"]
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of texts. Correct `texts` in the params file.")
    try:
        texts = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML or JSON: {error}") from error
    if not isinstance(texts, dict) or not all(
        isinstance(name, str) and isinstance(lines, list) and all(isinstance(line, str) for line in lines)
        for name, lines in texts.items()
    ):
        raise ValueError(f"{path}: not a list of texts for each class. Write `class name: [text, text]`.")
    return {**section, "texts": texts}
