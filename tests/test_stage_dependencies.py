"""dvc.yaml names exactly the code that each stage runs: the import closure of its command."""

from __future__ import annotations

import ast
import shlex
from pathlib import Path

import pytest
import yaml

from medfocus.storage.fingerprint import closure

ROOT = Path(__file__).resolve().parents[1]
CODE = "${code}/"
STAGES = {
    name: stage.get("do", stage)
    for name, stage in yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"].items()
}


def modules_in(path: Path) -> set[Path]:
    """Return the modules of a file or a room, except modules with only a docstring."""
    files = path.rglob("*.py") if path.is_dir() else [path] if path.suffix == ".py" else []
    return {file for file in files if len(ast.parse(file.read_bytes()).body) > 1}


def listed(files: set[Path]) -> list[str]:
    """Return files as dvc.yaml should list them: a room's folder if the stage runs all of its modules."""
    rooms = {room for file in files for room in file.parents if (room / "__init__.py").exists()}
    whole = [room for room in rooms if len(modules_in(room)) > 1 and modules_in(room) <= files]
    paths = [room for room in whole if not set(room.parents) & set(whole)]
    paths += [file for file in files if not set(file.parents) & set(whole)]
    return sorted(f"{CODE}{path.relative_to(ROOT).as_posix()}" for path in paths)


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_depends_on_exactly_the_import_closure_of_its_command(name: str) -> None:
    python, flag, module, *_ = shlex.split(STAGES[name]["cmd"])
    assert (python, flag) == ("python", "-m")
    code = [dep for dep in STAGES[name]["deps"] if dep.startswith(CODE)]
    code = [dep for dep in code if modules_in(ROOT / dep.removeprefix(CODE))]
    imported = {file for file in closure((module,), ROOT) if modules_in(file)}
    assert sorted(code) == listed(imported)
