"""Claims about the private parts of DVC that the flow relies on."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path

import pytest
from dvc.repo import Repo
from dvc.stage import run

from flows.stages import dvc, dvc_patches, phantoms
from tests.conftest import ROOT

STAGE = "phantoms@breast_ultrasound"


def test_the_pins_are_those_of_pyproject_and_are_installed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pins = dict(line.split("==") for line in project["dependencies"] if line.startswith("dvc"))
    assert pins == dvc_patches.PINNED
    assert pins == {package: importlib.metadata.version(package) for package in pins}


@pytest.mark.parametrize("name", dvc_patches._RELIED_ON)
@pytest.mark.parametrize("change", ["the name is gone", "its parameters are others"])
def test_another_dvc_is_refused_at_import_in_one_clear_error(
    monkeypatch: pytest.MonkeyPatch, name: str, change: str
) -> None:
    place = name.replace(":", ".")
    if change == "the name is gone":
        monkeypatch.delattr(place)
    else:
        monkeypatch.setattr(place, lambda: None)
    with pytest.raises(ImportError) as refused:
        importlib.reload(dvc_patches)
    what, _, fix = str(refused.value).partition(", which the flow needs. ")
    assert re.fullmatch(rf"{name}: the installed dvc 3\.67\.1 and dvc-objects 5\.2\.0 lack [a-z_, ]+", what)
    assert fix == "Run make install, or pip install dvc==3.67.1 dvc-objects==5.2.0."


def test_a_stage_has_the_environment_and_the_folder_that_dvc_gives_a_subprocess(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, str, Path]] = []
    main = phantoms.main

    def noted(arguments: Sequence[str] | None = None) -> None:
        seen.append((os.environ["DVC_STAGE"], os.environ["DVC_ROOT"], Path.cwd()))
        main(arguments)

    monkeypatch.setattr(phantoms, "main", noted)
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("DVC_STAGE", raising=False)
    monkeypatch.setenv("DVC_ROOT", str(project))
    environment, own = dict(os.environ), run._run
    assert dvc.reproduce(project, STAGE)
    assert seen == [(STAGE, str(project), project)]
    assert dict(os.environ) == environment and Path.cwd() == ROOT and run._run is own
    with Repo(str(project)) as repo:
        assert not repo.status([f"{project}/dvc.yaml:{STAGE}"])


def test_the_users_number_of_hashing_threads_holds(project: Path) -> None:
    (project / ".dvc/config.local").write_text("[core]\n    checksum_jobs = 7\n")
    with dvc_patches.open_repo() as repo:
        assert repo.fs.hash_jobs == repo.cache.local.fs.hash_jobs == 7
