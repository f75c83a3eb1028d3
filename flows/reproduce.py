"""Fit the cell of a run again from the run's commit and data, then compare every metric exactly.

The commit is cloned into a temporary folder, with the run's params.yaml and dvc.lock. DVC restores the
manifest, the splits and the masks from its cache or a remote. The commit's own code then fits and scores the
cell without a cache. On a CPU with the same versions, the numbers are the same.
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
from flows.study.content import moved_paths, read_content
from flows.study.params import load_params
from flows.study.study import Study, open_study
from medfocus.tracking import runs
from medfocus.tracking.provenance import PACKAGES, installed


def main(arguments: Sequence[str] | None = None) -> None:
    """Rebuild ``--run`` and print its metrics then and now; exit with 1 if they differ."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--params", type=Path, default=Path("params.yaml"), help="any study of the project")
    parser.add_argument("--run", required=True, help="the MLflow run id of a cell")
    options = parser.parse_args(arguments)
    try:
        then, now = reproduce_run(open_study(options.params), options.run)
    except (ValueError, RuntimeError) as error:
        sys.exit(f"reproduce: {error}")
    for name in sorted(then.keys() | now.keys()):
        before, after = then.get(name), now.get(name)
        print(f"{name:28} {before!s:22} {after!s:22} {'same' if before == after else 'DIFFERS'}")
    if then != now:
        sys.exit(f"reproduce: run {options.run} is not reproduced; the metrics above differ.")
    print(f"Run {options.run} is reproduced: every metric is equal.")


def reproduce_run(study: Study, run_id: str) -> tuple[dict[str, float], dict[str, float]]:
    """Rebuild a cell's run; return the metrics in MLflow and the metrics of the new fit.

    Raises:
        ValueError: The run is not a cell's, or its files are in no commit.
        RuntimeError: A file is gone, or git, DVC or the fit fails.
    """
    store = runs.start(None, study.home, study.params.tracking.experiment)
    run = store.run(run_id)
    tags = run.data.tags
    cell = _cell(run_id, tags)
    if versions := _changed_versions(tags):
        print(f"The run used {', '.join(versions)}; the last digits may differ.", file=sys.stderr)
    with tempfile.TemporaryDirectory() as temporary:
        clone = Path(temporary, "project")
        _run(["git", "clone", "--quiet", "--no-checkout", str(study.home), str(clone)], study.home)
        _run(["git", "checkout", "--quiet", tags["git.commit"]], clone)
        _restore_inputs(store, tags, clone / tags["study.folder"], Path(temporary))
        _restore_data(study.home, clone, tags["study.folder"], cell.dataset)
        answer = _fit(cell, clone, tags["study.folder"])
    if answer["cell_key"] != tags["cell_key"]:
        raise RuntimeError(f"the fit made another cell, {answer['cell_key'][:12]}.")
    return dict(run.data.metrics), answer["metrics"]


def _cell(run_id: str, tags: Mapping[str, str]) -> Cell:
    needed = {*Cell._fields, "git.commit", "git.dirty", "dvc.lock.sha256", "study.folder", "cell_key"}
    if missing := sorted(needed - tags.keys()):
        raise ValueError(
            f"run {run_id} has no tag {', '.join(missing)}, so it is not a cell's run or comes from an older "
            "version. Give the id of a cell's run from reports/study.csv."
        )
    if tags["git.dirty"] != "false" or tags["git.commit"] == "none":
        raise ValueError(
            f"run {run_id} used changed files that are in no commit, so it cannot be rebuilt. Commit the "
            "changes and run the study again."
        )
    return Cell(tags["dataset"], tags["method"], tags["focus"], tags["support"], int(tags["seed"]))


def _changed_versions(tags: Mapping[str, str]) -> list[str]:
    """Return each package whose version has changed, with the version of the run."""
    then = {name: tags.get(f"version.{name}") for name in PACKAGES}
    return [f"{name} {then[name]}" for name, now in installed(PACKAGES) if then[name] != now]


def _restore_inputs(store: runs.Tracking, tags: Mapping[str, str], folder: Path, temporary: Path) -> None:
    """Put the run's params.yaml and dvc.lock into the study's folder of the clone."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("params.yaml", "dvc.lock"):
        downloaded = store.download(tags["mlflow.parentRunId"], f"inputs/{name}", temporary)
        (folder / name).write_bytes(downloaded.read_bytes())
    digest = hashlib.sha256((folder / "dvc.lock").read_bytes()).hexdigest()
    if digest != tags["dvc.lock.sha256"]:
        raise RuntimeError(f"inputs/dvc.lock of the parent run ({digest[:12]}) does not match the run's tag.")


def _restore_data(home: Path, clone: Path, folder: str, dataset: str) -> None:
    """Restore a data set's outputs by the clone's dvc.lock; images of the user stay in their folder."""
    source, target = home / folder, clone / folder
    if not (target / "dvc.yaml").exists():  # git does not track the study's folder
        text = (source / "dvc.yaml").read_text(encoding="utf-8")
        (target / "dvc.yaml").write_text(text, encoding="utf-8")
    params = load_params(target / "params.yaml")
    root = params.datasets[dataset].root
    drawn = root in [f"data/phantoms/{modality}" for modality in params.phantoms]
    outs = [f"data/manifests/{dataset}.csv", f"data/splits/{dataset}.json", f"data/masks/{dataset}"]
    outs += [root] if drawn else []
    _share_storage(home, clone)
    dvc = [sys.executable, "-m", "dvc"]
    try:
        _run([*dvc, "checkout", "--quiet", *outs], target)
    except RuntimeError:
        _run([*dvc, "pull", "--quiet", *outs], target)
    content = moved_paths(read_content(target / "params.yaml"), source, target)
    if drawn:
        content["datasets"][dataset]["root"] = root
    (target / "params.yaml").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")


def _share_storage(home: Path, clone: Path) -> None:
    """Let the clone use the project's DVC cache and its present remotes."""
    with Repo(str(home)) as project, Repo(str(clone)) as cloned:
        settings: Any
        with cloned.config.edit("local") as settings:
            settings["cache"] = {"dir": project.cache.local_cache_dir}
            for section in ("core", "remote"):
                settings[section] = project.config[section]


def _fit(cell: Cell, clone: Path, folder: str) -> dict[str, Any]:
    """Fit and score the cell with the clone's code; return its key and its metrics."""
    options = [word for name, value in cell._asdict().items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "flows.stages.rebuild", *options]
    output = _run(command, clone / folder, PYTHONPATH=str(clone))
    return json.loads(output.splitlines()[-1])


def _run(command: list[str], folder: Path, **environment: str) -> str:
    """Run a command and return its output. Raises RuntimeError, with the end of stderr, if it fails."""
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:4])} ... failed: {done.stderr.strip()[-1500:]}")
    return done.stdout


if __name__ == "__main__":
    main()
