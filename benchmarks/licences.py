"""The licences of the direct dependencies, as their own metadata says: the table of THIRD_PARTY.md.

python -m benchmarks.licences
"""

from __future__ import annotations

import tomllib
from importlib.metadata import PackageMetadata, PackageNotFoundError, metadata
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
_LONGEST = 60  # characters of a field License that is a name and not the text


def direct() -> dict[str, str]:
    """Name of a direct dependency -> what it is for: "" for all, the name of an extra, or development."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    parts = {"": project["project"]["dependencies"], **project["project"]["optional-dependencies"]}
    parts |= {"development": project["dependency-groups"]["dev"]}
    found: dict[str, str] = {}
    for part, lines in parts.items():
        for line in lines:
            found.setdefault(Requirement(line).name, part)
    return found


def licence(about: PackageMetadata) -> str:
    """Its SPDX expression, or else its trove classifiers, or else its field License where that is a name."""
    if "License-Expression" in about:
        return about["License-Expression"]
    trove = [line.rpartition(" :: ")[2] for line in about.get_all("Classifier") or [] if "License ::" in line]
    named = about["License"].strip() if "License" in about else ""
    if trove := [line for line in trove if line != "OSI Approved"]:
        return ", ".join(trove)
    return named if named and len(named) <= _LONGEST and "\n" not in named else "not named"


def row(name: str, part: str) -> str | None:
    """A line of the table; None where the package is not installed."""
    try:
        about = metadata(name)
    except PackageNotFoundError:
        return None
    return f"| {name} | {licence(about)} | {part} |"


def main() -> None:
    """Print the table."""
    print("| package | licence | for |\n|---|---|---|")
    for name, part in sorted(direct().items(), key=lambda item: item[0].casefold()):
        print(row(name, part) or f"| {name} | not installed here | {part} |")


if __name__ == "__main__":
    main()
