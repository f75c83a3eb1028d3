"""The licences of the direct dependencies, from their metadata: the table of THIRD_PARTY.md.

python -m benchmarks.licences
"""

from __future__ import annotations

import tomllib
from importlib.metadata import PackageMetadata, PackageNotFoundError, files, metadata
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
_LONGEST = 60  # characters of a licence's name; a longer field License is its text


def direct() -> dict[str, str]:
    """Return each direct dependency with its part: "" for the core, the name of an extra, or development."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    parts = {"": project["project"]["dependencies"], **project["project"]["optional-dependencies"]}
    parts |= {"development": project["dependency-groups"]["dev"]}
    dependencies: dict[str, str] = {}
    for part, lines in parts.items():
        for line in lines:
            dependencies.setdefault(Requirement(line).name, part)
    return dependencies


def licence(about: PackageMetadata) -> str:
    """Return the SPDX expression, else the trove classifiers, the field License or the licence's title."""
    if "License-Expression" in about:
        return about["License-Expression"]
    trove = [line.rpartition(" :: ")[2] for line in about.get_all("Classifier") or [] if "License ::" in line]
    named = about["License"].strip() if "License" in about else ""
    if trove := [line for line in trove if line != "OSI Approved"]:
        return ", ".join(trove)
    is_name = named and named != "UNKNOWN" and len(named) <= _LONGEST and "\n" not in named
    return named if is_name else _title(about["Name"]) or "not named"


def _title(name: str) -> str:
    """Return the first line of a package's licence file, or "" if it has none."""
    texts = [file.read_text() for file in files(name) or () if file.name.startswith("LICEN")]
    return next((line.strip() for text in texts for line in text.splitlines() if line.strip()), "")


def row(name: str, part: str) -> str | None:
    """Return a line of the table, or None if the package is not installed."""
    try:
        about = metadata(name)
    except PackageNotFoundError:
        return None
    return f"| {name} | {licence(about)} | {part} |"


def main() -> None:
    """Print the table."""
    print("| package | licence | for |\n|---|---|---|")
    for name, part in sorted(direct().items(), key=lambda item: item[0].casefold()):
        print(row(name, part) or f"| {name} | not installed | {part} |")


if __name__ == "__main__":
    main()
