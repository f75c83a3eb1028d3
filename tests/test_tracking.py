"""Runs, dead runs and the champion's alias, on a database in a temporary folder."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import psutil
import pytest
from PIL import Image

from medfocus.tracking import registry
from medfocus.tracking import runs as tracking
from medfocus.tracking.process import owner_tags
from medfocus.tracking.provenance import made_from
from medfocus.tracking.registry import Champion, Verdict
from medfocus.tracking.runs import DataInput, Tracking

pytestmark = [
    # On import MLflow silences this in a way that "error" overrules.
    pytest.mark.filterwarnings("ignore:.*type hint is inferred as AnyType:UserWarning"),
    # MLflow compares a pandas index with a range when it saves an input example.
    pytest.mark.filterwarnings("ignore:Operation with range is deprecated"),
]

# Opens a study, logs a cell, prints the ids, and stays in the block until standard input ends.
_HOLDER = """
import sys
from pathlib import Path
from medfocus.tracking import runs
opened = runs.start(None, Path(sys.argv[1]), "shared")
with opened.study("held", {}) as study:
    study.log_cell(name="cell", params={}, metrics={"accuracy": 0.5})
    print(study.run_id, flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def no_uri_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Isolate the stores of the tests from the shell's environment."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One database for all tests, because creating one takes seconds. Its path contains a space."""
    return tmp_path_factory.mktemp("a home") / "mlflow"


@pytest.fixture(scope="module")
def holders(home: Path) -> Iterator[list[tuple[subprocess.Popen[str], str]]]:
    """Two processes that start concurrently in a new home, and their open runs."""
    environment = {k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"}
    command = [sys.executable, "-c", _HOLDER, str(home)]
    pipes: Any = {name: subprocess.PIPE for name in ("stdin", "stdout", "stderr")}
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(subprocess.Popen(command, text=True, env=environment, **pipes))
            for _ in range(2)
        ]
        for process in processes:
            stack.callback(process.kill)
        held = []
        for process in processes:
            assert process.stdout is not None and process.stderr is not None
            run_id = process.stdout.readline().strip()
            assert run_id, process.stderr.read()
            held.append((process, run_id))
        yield held


@pytest.fixture
def opened(home: Path, holders: object, request: pytest.FixtureRequest) -> Tracking:
    """The common database with an experiment for each test."""
    return tracking.start(None, home, request.node.name)


def run_of(opened: Tracking, run_id: str) -> Any:
    """Return MLflow's record of a run."""
    return opened.client.get_run(run_id)


def test_two_concurrent_first_starts_create_one_database(
    home: Path, holders: list[tuple[subprocess.Popen[str], str]]
) -> None:
    opened = tracking.start(None, home, "shared")
    assert {run_of(opened, run_id).info.experiment_id for _, run_id in holders} == {opened.experiment_id}
    assert {path.name for path in home.iterdir()} >= {"mlflow.db", "mlflow.lock"}
    assert not list(home.glob(".mlflow.db.making*"))


def test_the_next_start_fails_the_run_of_a_killed_process_and_not_that_of_a_living_process(
    home: Path, holders: list[tuple[subprocess.Popen[str], str]]
) -> None:
    (victim, dead), (_, alive) = holders
    victim.kill()
    victim.wait()
    opened = tracking.start(None, home, "another experiment")
    assert run_of(opened, dead).info.status == "FAILED"
    assert run_of(opened, dead).info.end_time is not None
    assert run_of(opened, dead).data.tags["error"] == "The process of this run ended without closing it."
    assert run_of(opened, alive).info.status == "RUNNING"
    assert opened.close_dead_runs() == []


def test_a_process_that_ends_normally_finishes_its_run(
    home: Path, holders: list[tuple[subprocess.Popen[str], str]]
) -> None:
    process, run_id = holders[1]
    _, chatter = process.communicate(timeout=60)  # its input ends
    assert (process.returncode, chatter) == (0, "")  # MLflow and alembic print nothing
    assert run_of(tracking.start(None, home, "shared"), run_id).info.status == "FINISHED"


def test_a_reused_process_id_does_not_keep_a_run_alive(opened: Tracking) -> None:
    owner = owner_tags()
    born = {**owner, "owner.born": owner["owner.born"] + "1"}  # this process id with another start
    before = {name: value for name, value in owner.items() if name != "owner.born"} | {"owner.started": "1.0"}
    runs = [opened.client.create_run(opened.experiment_id, tags=tags).info.run_id for tags in (born, before)]
    assert sorted(opened.close_dead_runs()) == sorted(runs)
    assert {run_of(opened, run_id).info.status for run_id in runs} == {"FAILED"}


def test_dead_runs_on_every_page_of_a_search_are_closed(
    opened: Tracking, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = {**owner_tags(), "owner.pid": "99999999"}  # above the largest process id
    runs = [opened.client.create_run(opened.experiment_id, tags=gone).info.run_id for _ in range(3)]
    one_a_page = functools.partial(opened.client.search_runs, max_results=1)
    monkeypatch.setattr(opened.client, "search_runs", one_a_page)
    assert sorted(opened.close_dead_runs()) == sorted(runs)


@pytest.mark.parametrize("hours", [-30 * 24, -1, 1])
def test_a_changed_clock_does_not_fail_the_run_of_a_living_process(
    opened: Tracking, monkeypatch: pytest.MonkeyPatch, hours: int
) -> None:
    run_id = opened.client.create_run(opened.experiment_id, tags=owner_tags()).info.run_id
    now, started = time.time, psutil.Process.create_time
    monkeypatch.setattr(time, "time", lambda: now() + 3600 * hours)
    # psutil computes a process's start from the boot time by the clock.
    monkeypatch.setattr(psutil.Process, "create_time", lambda process: started(process) + 3600 * hours)
    assert opened.close_dead_runs() == []
    assert run_of(opened, run_id).info.status == "RUNNING"
    opened.client.set_terminated(run_id)


def test_runs_of_other_hosts_are_left_alone(opened: Tracking) -> None:
    tags = {"owner.host": "elsewhere", "owner.pid": "1", "owner.started": "1.0"}
    run_id = opened.client.create_run(opened.experiment_id, tags=tags).info.run_id
    assert opened.close_dead_runs() == []
    assert run_of(opened, run_id).info.status == "RUNNING"


def test_the_remains_of_a_killed_first_start_are_replaced(tmp_path: Path) -> None:
    (tmp_path / ".mlflow.db.making").write_bytes(b"half a database")
    (tmp_path / ".mlflow.db.making-journal").write_bytes(b"its journal")
    opened = tracking.start(None, tmp_path, "after")
    assert opened.client.get_experiment_by_name("after") is not None
    assert not list(tmp_path.glob(".mlflow.db.making*"))


def test_artifacts_are_in_the_home_folder_and_the_uri_is_absolute(opened: Tracking, home: Path) -> None:
    assert opened.uri == f"sqlite:///{home.resolve()}/mlflow.db"
    with opened.study("s", {}) as study:
        study.log_table("study", "a,b\n1,2\n")
        study.log_figure("accuracy", b"png")
    files = sorted(
        path.relative_to(home / "mlruns").as_posix() for path in home.glob("mlruns/*/artifacts/**/*")
    )
    assert f"{study.run_id}/artifacts/study.csv" in files
    assert f"{study.run_id}/artifacts/figures/accuracy.png" in files


def test_the_uri_of_the_environment_has_precedence(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"sqlite:///{home.resolve()}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert tracking.start("sqlite:////nowhere/else.db", tmp_path, "from outside").uri == uri
    assert not (tmp_path / "mlflow.db").exists()


def test_a_start_does_not_change_the_uri_of_the_environment(opened: Tracking) -> None:
    assert "MLFLOW_TRACKING_URI" not in os.environ


def test_a_deleted_experiment_is_refused(opened: Tracking, home: Path) -> None:
    opened.client.delete_experiment(opened.experiment_id)
    name = opened.client.get_experiment(opened.experiment_id).name
    with pytest.raises(ValueError, match=rf"experiment '{name}' was deleted\. Restore it .* another name"):
        tracking.start(None, home, name)


def test_a_cell_is_a_finished_child_with_all_its_numbers(opened: Tracking) -> None:
    with opened.study("study", {"percents": [5, 100]}, {"dvc.lock.sha256": "abc"}) as study:
        run_id = study.log_cell(
            name="medfocusclip 5% seed 0",
            params={"method": "medfocusclip", "lr": 0.001, "blocks": None},
            metrics={"accuracy": 0.75, "auroc": float("nan")},
            tags={"cell_key": "k"},
            datasets=[DataInput("covid19", "d" * 64, "/data/covid19")],
        )
    parent, cell = run_of(opened, study.run_id), run_of(opened, run_id)
    assert (parent.info.status, cell.info.status) == ("FINISHED", "FINISHED")
    assert parent.data.params == {"percents": "[5, 100]"}
    assert parent.data.tags["dvc.lock.sha256"] == "abc"
    assert cell.data.tags["mlflow.parentRunId"] == study.run_id
    assert cell.data.tags["cell_key"] == "k"
    assert cell.info.run_name == "medfocusclip 5% seed 0"
    assert cell.data.params == {"method": "medfocusclip", "lr": "0.001", "blocks": "None"}
    assert cell.data.metrics["accuracy"] == 0.75
    assert "auroc" in cell.data.metrics
    [data] = cell.inputs.dataset_inputs
    assert (data.dataset.name, data.dataset.digest, data.tags[0].value) == ("covid19", "d" * 36, "training")


def test_figures_are_not_wider_than_the_page_of_their_run(opened: Tracking, tmp_path: Path) -> None:
    wide = io.BytesIO()
    Image.new("RGB", (2000, 500)).save(wide, "PNG")
    with opened.study("study", {}) as study:
        cell = study.log_cell(name="best", params={}, metrics={})
        study.describe("The best cell.", {"confusion": wide.getvalue()}, cell)
        study.describe("| a |\n|---|", {})
    assert run_of(opened, study.run_id).data.tags["mlflow.note.content"] == "| a |\n|---|"
    note = run_of(opened, cell).data.tags["mlflow.note.content"]
    assert note.startswith("The best cell.\n\n![confusion](get-artifact?")
    (link,) = re.findall(r"path=(\S+)&run_uuid=(\w+)\)", note)
    assert link[1] == cell
    shown = opened.download(cell, unquote(link[0]), tmp_path)
    with Image.open(shown) as image:
        assert image.size == (800, 200)


def test_the_newest_finished_run_of_a_cell_is_found_by_its_key(opened: Tracking) -> None:
    def log(study: tracking.StudyRun, key: str) -> str:
        return study.log_cell(name=key, params={}, metrics={}, tags={"cell_key": key})

    with opened.study("first", {}) as study:
        log(study, "a")
        only = log(study, "b")
    with opened.study("second", {}) as study:
        newest = log(study, "a")
    unfinished = opened.client.create_run(opened.experiment_id, tags={"cell_key": "a"})
    assert unfinished.info.status == "RUNNING"
    assert opened.runs_by_cell() == {"a": newest, "b": only}


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RuntimeError("masks: no space left"), "FAILED"),
        (KeyboardInterrupt(), "KILLED"),
        (SystemExit(3), "KILLED"),
    ],
)
def test_an_error_in_a_study_ends_its_run_and_is_logged(
    opened: Tracking, error: BaseException, status: str
) -> None:
    with pytest.raises(type(error)), opened.study("study", {}) as study:
        raise error
    run = run_of(opened, study.run_id)
    assert run.info.status == status
    assert run.data.tags["error"].startswith(f"{type(error).__name__} at medfocus.tracking.runs:")
    assert "no space left" not in run.data.tags["error"], "the text of an error may name a patient's file"


def test_a_cell_that_cannot_be_logged_fails_with_its_study(opened: Tracking) -> None:
    from mlflow.exceptions import MlflowException

    with pytest.raises(MlflowException), opened.study("study", {}) as study:
        study.log_cell(name="cell", params={}, metrics={"a name with a *": 1.0})
    runs = opened.client.search_runs([opened.experiment_id])
    assert len(runs) == 2
    assert {run.info.status for run in runs} == {"FAILED"}
    assert run_of(opened, study.run_id).data.tags["error"].startswith("MlflowException")


def test_provenance_names_code_data_packages_and_host(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    assert made_from(tmp_path, [0])["git.commit"] == "none"
    git("init", "-q")
    (tmp_path / "dvc.lock").write_text("schema: '2.0'\n")
    (tmp_path / "code.py").write_text("x = 1\n")
    (tmp_path / "params.yaml").write_text("b: 1\n")
    git("add", ".")
    git("commit", "-q", "-m", "a")
    tags = made_from(tmp_path, [0, 1])
    assert tags["git.commit"] == tags["mlflow.source.git.commit"] == git("rev-parse", "HEAD")
    assert (tags["git.dirty"], tags["seeds"]) == ("false", "0,1")
    assert re.fullmatch("[0-9a-f]{64}", tags["dvc.lock.sha256"])
    assert tags["version.torch"].startswith("2.")
    assert {"host", "python", "version.open_clip_torch", "version.sam2"} <= set(tags)
    (tmp_path / "dvc.lock").write_text("schema: '2.1'\n")
    (tmp_path / "params.yaml").write_text("b: 2\n")
    later = made_from(tmp_path, [0, 1])
    assert later["git.dirty"] == "false"  # a run changes the lock, and both files are logged with it
    assert later["dvc.lock.sha256"] != tags["dvc.lock.sha256"]
    (tmp_path / "code.py").write_text("x = 2\n")
    assert made_from(tmp_path, [0, 1])["git.dirty"] == "true"


@pytest.fixture
def register(opened: Tracking, tmp_path: Path, request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Return ``register`` for a model name of the test, with a model folder that nothing loads."""

    def write_model(folder: Path) -> None:
        folder.mkdir()
        (folder / "serve.json").write_text("{}")

    def register(cell_key: str, promoted: bool = True, judge: Any = None, run_id: str | None = None) -> Any:
        verdict = Verdict(promoted, "promoted: better" if promoted else "refused: worse", {"accuracy": "0.8"})
        return registry.register(
            opened,
            request.node.name.replace(".", "_"),  # MLflow allows no dots
            write_model,
            cell_key=cell_key,
            judge=judge or (lambda champion: verdict),
            classes=["covid", "normal"],
            example=b"png",
            tags={"dataset": "covid19"},
            run_id=run_id,
        )

    return register


def champion(opened: Tracking, name: str) -> Any:
    """Return the version with the alias."""
    return opened.client.get_model_version_by_alias(name, "champion")


def test_a_promoted_model_becomes_champion_and_the_reason_is_kept(
    register: Callable[..., Any], opened: Tracking
) -> None:
    with opened.study("s", {}) as study:
        run_id = study.log_cell(name="cell", params={}, metrics={})
    result = register("a", run_id=run_id)
    assert (result.version, result.alias, result.reason) == ("1", "champion", "promoted: better")
    version = champion(opened, result.name)
    assert version.tags == {
        "dataset": "covid19", "cell_key": "a", "gate": "promoted: better", "accuracy": "0.8"
    }  # fmt: skip
    assert version.status == "READY"
    assert opened.client.get_run(run_id).data.tags["gate"] == "promoted: better"


def test_a_version_has_the_metrics_of_its_run_if_there_is_one(
    register: Callable[..., Any], opened: Tracking, home: Path
) -> None:
    with opened.study("s", {}) as study:
        run_id = study.log_cell(name="cell", params={}, metrics={"ece": 0.125, "accuracy": 0.5})
    name = register("a", run_id=run_id).name
    register("b")
    imported, trained = (each for each in registry.registered(home) if each.name == name)  # the newest first
    assert trained.metrics() == {"ece": 0.125, "accuracy": 0.5} and imported.metrics() == {}


def test_a_refused_model_is_registered_without_the_alias(
    register: Callable[..., Any], opened: Tracking
) -> None:
    register("a")
    result = register("b", promoted=False)
    assert (result.version, result.alias, result.reason) == ("2", None, "refused: worse")
    assert champion(opened, result.name).version == 1
    assert opened.client.get_model_version(result.name, "2").tags["gate"] == "refused: worse"


def test_a_model_can_be_refused_without_a_champion(register: Callable[..., Any], opened: Tracking) -> None:
    result = register("a", promoted=False)
    assert (result.version, result.alias) == ("1", None)
    assert register("b").alias == "champion"


def test_the_champion_itself_is_neither_judged_nor_registered_twice(
    register: Callable[..., Any], opened: Tracking
) -> None:
    register("a")
    result = register("a", promoted=False)
    assert (result.version, result.alias, result.reason) == ("1", "champion", "it is the champion already")
    assert len(opened.client.search_model_versions(f"name = '{result.name}'")) == 1


def test_a_cell_that_lost_before_keeps_its_version_and_is_judged_again(
    register: Callable[..., Any], opened: Tracking
) -> None:
    register("a")
    register("b", promoted=False)
    result = register("b")
    assert (result.version, result.alias) == ("2", "champion")
    assert len(opened.client.search_model_versions(f"name = '{result.name}'")) == 2


def test_the_judge_can_open_the_champions_files(
    register: Callable[..., Any], opened: Tracking, home: Path, tmp_path: Path
) -> None:
    seen: list[str] = []

    def judge(held: Champion | None) -> Verdict:
        assert held is not None and (held.version, held.cell_key) == ("1", "a")
        tracking.start(None, home, "inside")  # does not wait for the lock of its own process
        seen.extend(path.name for path in held.model_folder(tmp_path / "down").iterdir())
        return Verdict(False, "refused", {})

    register("a")
    register("b", judge=judge)
    assert seen == ["serve.json"]


def test_rollback_returns_the_alias_and_prevents_another_promotion(
    register: Callable[..., Any], opened: Tracking
) -> None:
    register("a")
    register("b")
    name = register("c").name
    assert registry.rollback(opened, name) == ("3", "2")
    assert champion(opened, name).version == 2
    result = register("c")
    assert (result.version, result.alias) == ("3", None)
    assert result.reason.startswith("refused: it was rolled back on 20")
    assert registry.rollback(opened, name) == ("2", "1")
    with pytest.raises(ValueError, match="version 1 is the first champion, so there is no previous one"):
        registry.rollback(opened, name)
    assert register("d").alias == "champion"
    assert registry.rollback(opened, name) == ("4", "1")


def test_a_model_without_a_champion_cannot_be_rolled_back(opened: Tracking) -> None:
    with pytest.raises(ValueError, match="nobody has no champion to roll back"):
        registry.rollback(opened, "nobody")


def test_the_logged_model_contains_code_files_and_requirements_and_no_pickle(
    register: Callable[..., Any], opened: Tracking, tmp_path: Path
) -> None:
    from mlflow.artifacts import download_artifacts

    result = register("a")
    uri = opened.client.get_model_version_download_uri(result.name, "1")
    folder = Path(download_artifacts(uri, dst_path=str(tmp_path / "down"), tracking_uri=opened.uri))
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {
        "MLmodel",
        "pyfunc.py",
        "artifacts/model/serve.json",
        "code/medfocus/serving/predictor.py",
    } <= files
    assert not [name for name in files if name.endswith((".pkl", ".pickle", ".pyc", ".pt"))]
    assert "torch==" in (folder / "requirements.txt").read_text()
