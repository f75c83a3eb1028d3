"""Claims about a team: DVC's remotes share a study, and a run is rebuilt from its tags alone."""

from __future__ import annotations

import csv
import os
import re
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import mlflow
import pytest
from moto.server import ThreadedMotoServer

from flows import reproduce
from flows.pipeline import pipeline
from tests.conftest import ROOT, make_project, work_in


def command(folder: Path, *words: str) -> str:
    """Run a command in a folder and return its output."""
    identity = {f"GIT_{who}_{what}": "t@t" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    environment = {**os.environ, **identity, "PYTHONPATH": str(folder)}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def dvc(folder: Path, *words: str) -> str:
    return command(folder, sys.executable, "-m", "dvc", *words)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A project after one run of its study, with dvc.lock committed."""
    from prefect.testing.utilities import prefect_test_harness

    folder = tmp_path_factory.mktemp("project")
    make_project(folder)
    with pytest.MonkeyPatch.context() as patch, prefect_test_harness(server_startup_timeout=120):
        work_in(folder, patch)
        pipeline(Path("params.yaml"))
        command(folder, "git", "add", "dvc.lock")
        command(folder, "git", "commit", "--quiet", "-m", "a study")
        yield folder


@pytest.fixture
def cell(shared: Path) -> str:
    """The run of a cell with all training images and a focus on masks."""
    with (shared / "reports" / "study.csv").open(newline="") as file:
        (row,) = (
            row
            for row in csv.DictReader(file)
            if (row["method"], row["focus"], row["percent_of_train"], row["seed"], row["test_set"])
            == ("medfocusclip", "multiply", "100", "1", "official")
        )
    return row["mlflow_run_id"]


def test_a_run_is_reproduced_from_its_tags_alone(
    shared: Path, cell: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Other parameters and missing data in the folder make no difference."""
    params = (shared / "params.yaml").read_text()
    (shared / "params.yaml").write_text(params.replace("epochs: 5", "epochs: 6"))
    kept = (shared / "data" / "splits" / "phantom-breast.json").read_bytes()
    (shared / "data" / "splits" / "phantom-breast.json").unlink()
    try:
        reproduce.main(["--run", cell])
    finally:
        (shared / "params.yaml").write_text(params)
        (shared / "data" / "splits" / "phantom-breast.json").write_bytes(kept)
    output = capsys.readouterr().out
    assert f"Run {cell} is reproduced: every metric is equal." in output
    assert {line.split()[0] for line in output.splitlines()[:-1]} >= {"accuracy", "auroc", "ece", "macro_f1"}
    assert "DIFFERS" not in output


def test_a_metric_that_differs_is_shown_and_the_command_fails(
    shared: Path, cell: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    then = {"accuracy": 0.5, "ece": 0.1}
    monkeypatch.setattr(reproduce, "reproduce_run", lambda study, run: (then, {**then, "accuracy": 0.4}))
    with pytest.raises(SystemExit, match="is not reproduced"):
        reproduce.main(["--run", cell])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["accuracy", "0.5", "0.4", "DIFFERS"] and lines[1].endswith("same")


def test_a_run_of_uncommitted_files_cannot_be_rebuilt(shared: Path, cell: str) -> None:
    client = mlflow.MlflowClient(f"sqlite:///{shared / 'mlflow.db'}")
    parent = client.get_run(cell).data.tags["mlflow.parentRunId"]
    client.set_tag(cell, "git.dirty", "true")
    try:
        with pytest.raises(SystemExit, match=f"{cell} used changed files that are in no commit"):
            reproduce.main(["--run", cell])
    finally:
        client.set_tag(cell, "git.dirty", "false")
    with pytest.raises(SystemExit, match=f"{parent} has no tag .*Give the id of a cell's run"):
        reproduce.main(["--run", parent])
    with pytest.raises(SystemExit, match="has no run 'nonsense'"):
        reproduce.main(["--run", "nonsense"])


def test_an_experiment_with_another_parameter_is_shown_next_to_the_study(
    shared: Path, tmp_path: Path
) -> None:
    clone = tmp_path / "clone"
    command(tmp_path, "git", "clone", "--quiet", str(shared), str(clone))
    dvc(clone, "config", "--local", "cache.dir", str(shared / ".dvc" / "cache"))
    dvc(clone, "checkout", "--quiet")
    changed = "methods.medfocusclip.text_prior=false"
    dvc(clone, "exp", "run", "--quiet", "--name", "paper", "--set-param", changed)
    shown = {row["Experiment"] or row["rev"]: row for row in _csv(dvc(clone, "exp", "show", "--csv"))}
    priors = {name: shown[name]["methods.medfocusclip.text_prior"] for name in ("master", "paper")}
    assert priors == {"master": "True", "paper": "False"}
    ece = {name: float(shown[name]["phantom-breast.ece"]) for name in priors}
    assert ece["master"] != ece["paper"]
    assert shown["paper"]["phantom-breast.best"].startswith("phantom-breast medfocusclip ")

    dvc(clone, "plots", "diff", "HEAD", "paper", "--out", "compared")
    page = (clone / "compared" / "index.html").read_text(encoding="utf-8")
    assert '"rev": "HEAD"' in page and '"rev": "paper"' in page and "percent_of_train" in page


def _csv(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(text.splitlines()))


def test_the_search_of_the_docs_lists_the_best_cell_of_each_percent(
    shared: Path, capsys: pytest.CaptureFixture[str], sets_tracking_uri: None
) -> None:
    text = (ROOT / "docs" / "mlflow.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    variables: dict[str, Any] = {}
    exec(snippet.replace("phantom-brain", "phantom-breast"), variables)
    with (shared / "reports" / "study.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["method"] != "medfocusclip-head"]
    for support, percent in (("0%", "0"), ("50%", "50"), ("100%", "100")):
        best = max(float(row["accuracy"]) for row in rows if row["percent_of_train"] == percent)
        cells = variables["best_cell"]
        assert float(cells[cells["tags.support"] == support]["metrics.accuracy"].iloc[0]) == pytest.approx(
            best, abs=5e-5
        )
    assert set(variables["best_system"].index.get_level_values(0)) == {"0%", "50%", "100%"}
    assert "medfocusclip" in capsys.readouterr().out


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """The URL of an empty bucket on an S3 server on loopback."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "testing")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        name = f"dvc-{uuid.uuid4().hex}"
        fsspec.filesystem("s3", skip_instance_cache=True).mkdir(name)
        yield f"s3://{name}/study"
    server.stop()


@pytest.mark.parametrize("kind", ["folder", "s3"])
def test_a_fresh_clone_pulls_the_pushed_outputs_and_is_up_to_date(
    shared: Path, cell: str, kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    url = str(tmp_path / "remote") if kind == "folder" else request.getfixturevalue("bucket")
    dvc(shared, "remote", "add", "--force", "--default", "team", url)
    dvc(shared, "push", "--quiet")
    command(shared, "git", "commit", "--quiet", "-m", f"remote {kind}", ".dvc/config")
    clone = tmp_path / "elsewhere"
    command(tmp_path, "git", "clone", "--quiet", str(shared), str(clone))
    dvc(clone, "pull", "--quiet")
    assert "up to date" in dvc(clone, "status")
    assert "Running stage" not in dvc(clone, "repro")
    results = Path("reports", "results.csv")
    assert (clone / results).read_bytes() == (shared / results).read_bytes()
    if kind == "s3":  # without a cache, the run's data come from the remote
        shutil.rmtree(shared / ".dvc" / "cache")
        reproduce.main(["--run", cell])
