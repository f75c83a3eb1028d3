"""Rebuild a cell's run from its tags: its commit, its data, one fit; then compare every metric exactly.

The run's commit is cloned into a temporary folder and given the run's params.yaml and dvc.lock. DVC brings
back the manifest, the splits and the masks of that time, from its cache or a remote. That commit's own code
then fits the cell, out of no cache, and scores it: on a CPU, with the same versions, to the same numbers.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from dvc.repo import Repo

from flows.study.cells import Cell
from flows.study.params import load_params, moved_paths, read_content
from flows.study.study import Study, open_study
from medfocus.tracking import runs
from medfocus.tracking.provenance import PACKAGES, installed


def main(arguments: Sequence[str] | None = None) -> None:
    """Rebuild ``--run``, print its metrics then and now, and fail where they differ."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--params", type=Path, default=Path("params.yaml"), help="any study of the project")
    parser.add_argument("--run", required=True, help="a cell's MLflow run id")
    options = parser.parse_args(arguments)
    try:
        then, now = reproduce_run(open_study(options.params), options.run)
    except (ValueError, RuntimeError) as error:
        sys.exit(f"reproduce: {error}")
    for name in sorted(then.keys() | now.keys()):
        before, after = then.get(name), now.get(name)
        print(f"{name:28} {before!s:22} {after!s:22} {'same' if before == after else 'DIFFERS'}")
    if then != now:
        sys.exit(f"reproduce: the run {options.run} does not come out again.")
    print(f"Run {options.run} comes out again, every metric exactly.")


def reproduce_run(study: Study, run_id: str) -> tuple[dict[str, float], dict[str, float]]:
    """A cell's metrics: as they were logged, as they come out now.

    Raises:
        ValueError: The run is no cell's, or was made from files that no commit has.
        RuntimeError: What it was made from cannot be had any more; what git, DVC or the fit said.
    """
    store = runs.start(None, study.home, study.params.tracking.experiment)
    run = store.run(run_id)
    tags = run.data.tags
    cell = _cell(run_id, tags)
    if others := [f"{name} {tags.get(f'version.{name}')}" for name in _other_versions(tags)]:
        print(f"Of other versions then: {', '.join(others)}; the last digits may differ.", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder, "project")
        _run(["git", "clone", "--quiet", "--no-checkout", str(study.home), str(clone)], study.home)
        _run(["git", "checkout", "--quiet", tags["git.commit"]], clone)
        there = clone / tags["study.folder"]
        there.mkdir(parents=True, exist_ok=True)
        for name in ("params.yaml", "dvc.lock"):
            kept = store.download(tags["mlflow.parentRunId"], f"inputs/{name}", Path(folder))
            (there / name).write_bytes(kept.read_bytes())
        lock = hashlib.sha256((there / "dvc.lock").read_bytes()).hexdigest()
        if lock != tags["dvc.lock.sha256"]:
            raise RuntimeError(f"inputs/dvc.lock of the parent run is not the one of the tag ({lock[:12]}).")
        _bring_data(study.home, clone, tags["study.folder"], cell.dataset)
        options = [word for name, value in cell._asdict().items() for word in (f"--{name}", str(value))]
        said = _run([sys.executable, "-m", "flows.stages.rebuild", *options], there, PYTHONPATH=str(clone))
    answer = json.loads(said.splitlines()[-1])
    if answer["cell_key"] != tags["cell_key"]:
        raise RuntimeError(f"what was fitted is another cell, {answer['cell_key'][:12]}.")
    return dict(run.data.metrics), answer["metrics"]


def _cell(run_id: str, tags: Mapping[str, str]) -> Cell:
    needed = {*Cell._fields, "git.commit", "git.dirty", "dvc.lock.sha256", "study.folder", "cell_key"}
    if missing := sorted(needed - tags.keys()):
        raise ValueError(
            f"the run {run_id} has no tag {', '.join(missing)}, so it is no cell's or an older version's. "
            "Give the id of a cell's run, as reports/study.csv has it."
        )
    if tags["git.dirty"] != "false" or tags["git.commit"] == "none":
        raise ValueError(
            f"the run {run_id} was made from changed files that no commit has, so nobody can have them "
            "again. Commit first, then run."
        )
    return Cell(tags["dataset"], tags["method"], tags["focus"], tags["support"], int(tags["seed"]))


def _other_versions(tags: Mapping[str, str]) -> list[str]:
    return [name for name, version in installed(PACKAGES) if tags.get(f"version.{name}") != version]


def _bring_data(home: Path, clone: Path, folder: str, dataset: str) -> None:
    """Have the clone hold what its dvc.lock names of a data set; its images stay where they are."""
    here, there = home / folder, clone / folder
    if not (there / "dvc.yaml").exists():  # of a study whose folder git does not know
        text = (here / "dvc.yaml").read_text(encoding="utf-8")
        (there / "dvc.yaml").write_text(text, encoding="utf-8")
    params = load_params(there / "params.yaml")
    root = params.datasets[dataset].root
    drawn = root in [f"data/phantoms/{modality}" for modality in params.phantoms]
    made = [f"data/manifests/{dataset}.csv", f"data/splits/{dataset}.json", f"data/masks/{dataset}"]
    outs = [*made, *([root] if drawn else [])]
    _share_storage(home, clone)
    dvc = [sys.executable, "-m", "dvc"]
    try:
        _run([*dvc, "checkout", "--quiet", *outs], there)
    except RuntimeError:
        _run([*dvc, "pull", "--quiet", *outs], there)
    content = moved_paths(read_content(there / "params.yaml"), here, there)
    if drawn:
        content["datasets"][dataset]["root"] = root
    (there / "params.yaml").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")


def _share_storage(home: Path, clone: Path) -> None:
    """Have the clone use the project's DVC cache and today's remotes, which may be younger than the run."""
    with Repo(str(home)) as project, Repo(str(clone)) as made:
        settings: Any
        with made.config.edit("local") as settings:
            settings["cache"] = {"dir": project.cache.local_cache_dir}
            for section in ("core", "remote"):
                settings[section] = project.config[section]


def _run(command: list[str], folder: Path, **environment: str) -> str:
    """What a command printed. Raises RuntimeError with the end of what it said where it fails."""
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:4])} ... failed: {done.stderr.strip()[-1500:]}")
    return done.stdout


if __name__ == "__main__":
    main()
