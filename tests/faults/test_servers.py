"""Claims about servers that are down or hang: a time limit, and an error with the server's name."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows import pipeline
from flows.servers import prefect, processes
from flows.study.study import open_study
from medfocus.storage.redaction import RedactedError
from medfocus.tracking import runs

LOOPBACK = processes.HOST


@pytest.fixture
def hanging() -> Iterator[int]:
    """The port of a server on loopback that accepts every connection and never answers."""
    with socket.create_server((LOOPBACK, 0)) as listener:
        held: list[socket.socket] = []

        def accept() -> None:
            while True:
                try:
                    held.append(listener.accept()[0])
                except OSError:  # closed
                    return

        threading.Thread(target=accept, daemon=True).start()
        yield listener.getsockname()[1]
        for connection in held:
            connection.close()


@pytest.mark.parametrize("fault", ["down", "hangs"])
def test_a_server_that_does_not_answer_is_named_within_the_time_limit(fault: str, hanging: int) -> None:
    url = f"http://{LOOPBACK}:{hanging if fault == 'hangs' else processes.free_port()}/api/health"
    began = time.monotonic()
    with pytest.raises(ConnectionError, match=f"PREFECT_API_URL: no server answers at {url} in 0.5 seconds"):
        processes.must_answer(url, "PREFECT_API_URL", "else", seconds=0.5)
    assert time.monotonic() - began < 2.5


def test_prefect_s_server_must_answer_before_the_flow_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def refuse(url: str, setting: str, without: str) -> None:
        asked.append(url)
        raise ConnectionError(f"{setting}: {without}")

    monkeypatch.setattr(prefect, "must_answer", refuse)
    with (
        temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}),
        pytest.raises(ConnectionError, match="PREFECT_API_URL: the run then starts a server on loopback"),
        prefect.prefect_api(),
    ):
        raise AssertionError("the flow ran")
    assert asked == ["http://127.0.0.1:9/api/health"]


def test_mlflow_s_server_must_answer_before_anything_is_computed(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = f"http://{LOOPBACK}:{processes.free_port()}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    must_answer: Callable[..., None] = processes.must_answer
    monkeypatch.setattr(pipeline, "must_answer", lambda *arguments: must_answer(*arguments, seconds=0.5))
    with pytest.raises(RedactedError) as caught:
        pipeline.check_plan.fn(open_study(project / "params.yaml"))
    assert isinstance(caught.value.error, ConnectionError)
    assert f"MLFLOW_TRACKING_URI: no server answers at {address} " in str(caught.value.error)


def test_a_run_on_a_dead_server_ends_at_once_with_its_own_error(tmp_path: Path) -> None:
    opened = runs.start(None, tmp_path, "medfocus")
    run_id = opened.client.create_run(opened.experiment_id).info.run_id
    gone = runs.Tracking(
        f"http://{LOOPBACK}:{processes.free_port()}", tmp_path, opened.experiment_id, opened.client
    )
    with pytest.raises(RuntimeError, match="the fit failed"), gone._closing(run_id):
        raise RuntimeError("the fit failed")
    assert opened.client.get_run(run_id).info.status == "RUNNING", "the next start closes it"


def test_an_incomplete_new_database_is_created_again(tmp_path: Path) -> None:
    database, journal = tmp_path / "prefect.db", tmp_path / "prefect.db-wal"
    making = prefect.whole_database(tmp_path)
    making.__enter__()  # the process is killed here
    database.write_text("half")
    journal.write_text("its journal")
    with prefect.whole_database(tmp_path):
        assert not database.exists() and not journal.exists()
        database.write_text("whole")
    with prefect.whole_database(tmp_path):
        assert database.read_text() == "whole"
    assert list(tmp_path.iterdir()) == [database]


HUB = """
import time
from medfocus.storage import weights
began = time.monotonic()
try:
    weights.resolve("tag", hub_id="someone/model", filename="model.safetensors", what="clip.pretrained")
except FileNotFoundError as error:
    print(f"{time.monotonic() - began:.1f}", error)
"""


def test_a_hub_that_hangs_is_given_up_after_the_time_limit(hanging: int, tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "HF_ENDPOINT": f"http://{LOOPBACK}:{hanging}",
        "HF_HOME": str(tmp_path),
        "HF_HUB_ETAG_TIMEOUT": "1",  # seconds; the default is 10
        "HF_HUB_OFFLINE": "0",
    }
    command = [sys.executable, "-c", HUB]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60).stdout
    seconds, _, message = output.partition(" ")
    assert float(seconds) < 4
    assert re.match(
        r"clip.pretrained: 'tag' is not a local file, model.safetensors of 'someone/model' is not in the "
        rf"hub cache {tmp_path}\S*, and the download failed \(\w*Timeout\w*: .*\)\. Give the path",
        message,
    ), output
