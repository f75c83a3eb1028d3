"""Runs and their numbers. Only this module, ``registry`` and the served model's own file import mlflow."""

from __future__ import annotations

import functools
import io
import json
import os
import socket
import tempfile
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from medfocus.storage.redaction import kind_and_place
from medfocus.tracking.process import is_alive, lock, owner_tags, quieten

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

_KIND = {"mlflow.experimentKind": "custom_model_development"}  # which pages the experiment is shown with
_PAGE_WIDTH = 800  # pixels
LONGEST_TAG = 5000  # characters; MLflow's databases take 8000 bytes


@dataclass(frozen=True)
class DataInput:
    """Images of a data set as a run used them."""

    name: str
    digest: str  # of these images; MLflow keeps its first 36 characters
    source: str  # where it lies
    context: str = "training"


def start(uri: str | None, home: Path, experiment: str) -> Tracking:
    """Open the tracking store and close the runs that dead processes of this host left RUNNING.

    Nothing here asks the network, unless the URI names a server.

    Args:
        uri: Any MLflow tracking URI; None means ``home``/mlflow.db. MLFLOW_TRACKING_URI wins over both.
        home: Folder of the database and, unless a server decides, of the artefacts (``home``/mlruns).
        experiment: Name of the experiment; made where it does not exist.

    Raises:
        ValueError: The experiment was deleted.
    """
    quieten()
    import mlflow  # takes seconds, so not at the top

    home = home.resolve()
    home.mkdir(parents=True, exist_ok=True)
    uri = os.environ.get("MLFLOW_TRACKING_URI") or uri
    with lock(home):
        if uri is None:
            uri = f"sqlite:///{home / 'mlflow.db'}"
            _create(home / "mlflow.db")
        client = mlflow.MlflowClient(uri)
        served = uri.startswith(("http", "databricks"))
        location = None if served else (home / "mlruns").as_uri()
        tracking = Tracking(uri, home, _experiment(client, experiment, location), client)
    tracking.close_dead_runs()
    return tracking


@dataclass(frozen=True)
class Tracking:
    """An open tracking store; made by ``start``."""

    uri: str
    home: Path
    experiment_id: str
    client: MlflowClient = field(repr=False)

    @contextmanager
    def study(
        self, name: str, params: Mapping[str, object], tags: Mapping[str, object] | None = None
    ) -> Iterator[StudyRun]:
        """A parent run for the ``with`` block: FINISHED after it, FAILED or KILLED when it raises."""
        run = self.client.create_run(self.experiment_id, run_name=name, tags=_tags(tags or {}))
        with self._closing(run.info.run_id):
            self._log_params_and_metrics(run.info.run_id, params, {})
            yield StudyRun(run.info.run_id, self)

    def run(self, run_id: str) -> Run:
        """A run by its id. Raises ValueError where there is none."""
        from mlflow.exceptions import MlflowException

        try:
            return self.client.get_run(run_id)
        except MlflowException as error:
            raise ValueError(
                f"no run {run_id!r} in {self.uri}; give the id that MLflow's page or reports/study.csv has."
            ) from error

    def download(self, run_id: str, name: str, into: Path) -> Path:
        """One of a run's files, copied into a folder. Raises ValueError where the run has none such."""
        from mlflow.exceptions import MlflowException

        try:
            return Path(self.client.download_artifacts(run_id, name, str(into)))
        except (MlflowException, OSError) as error:
            raise ValueError(f"the run {run_id} has no file {name} ({error}).") from error

    def close_dead_runs(self) -> list[str]:
        """Set RUNNING runs of this host whose process is gone to FAILED; their ids. In every experiment."""
        experiments = [e.experiment_id for e in self.client.search_experiments()]
        mine = f"attributes.status = 'RUNNING' and tags.`owner.host` = '{socket.gethostname()}'"
        search = functools.partial(self.client.search_runs, experiments, mine)
        # All pages before anything changes: a run that is closed is no longer found, and moves the next page.
        dead = [run.info.run_id for run in pages(search) if not is_alive(run.data.tags)]
        for run_id in dead:
            self.client.set_tag(run_id, "error", "The process that owned this run ended without closing it.")
            self.client.set_terminated(run_id, "FAILED")
        return dead

    def runs_by_cell(self) -> dict[str, str]:
        """The newest finished run of every cell of the experiment: tag ``cell_key`` -> run id."""
        search = functools.partial(
            self.client.search_runs,
            [self.experiment_id],
            "attributes.status = 'FINISHED' and tags.cell_key != ''",
            order_by=["attributes.start_time DESC"],
        )
        newest: dict[str, str] = {}
        for run in pages(search):
            newest.setdefault(run.data.tags["cell_key"], run.info.run_id)
        return newest

    def log_page(self, cell_run: str, page: Path) -> None:
        """Keep a study's page with the parent of one of its cells' runs, if the store has it."""
        from mlflow.exceptions import MlflowException

        try:
            parent = self.client.get_run(cell_run).data.tags["mlflow.parentRunId"]
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            return
        self.client.log_artifact(parent, str(page))

    def _answers(self) -> bool:
        """Whether a store that is a server is there: MLflow would ask one that is gone for minutes."""
        place = urllib.parse.urlsplit(self.uri)
        if not place.scheme.startswith("http"):
            return True
        try:
            port = place.port or (443 if place.scheme == "https" else 80)
            socket.create_connection((place.hostname or "", port), timeout=2).close()
        except OSError:
            return False
        return True

    def _log_params_and_metrics(
        self, run_id: str, params: Mapping[str, object], metrics: Mapping[str, float]
    ) -> None:
        from mlflow.entities import Metric, Param

        now = int(time.time() * 1000)
        self.client.log_batch(
            run_id,
            metrics=[Metric(key, value, now, 0) for key, value in metrics.items()],
            params=[Param(key, str(value)) for key, value in params.items()],
        )

    def _log_file(self, run_id: str, name: str, data: bytes) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, Path(name).name)
            path.write_bytes(data)
            self.client.log_artifact(run_id, str(path), str(Path(name).parent).removeprefix("."))

    @contextmanager
    def _closing(self, run_id: str) -> Iterator[None]:
        """Whatever happens inside, the run ends: FINISHED, FAILED, or KILLED by the keyboard or an exit."""
        try:
            yield
        except BaseException as error:
            killed = isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit)
            if self._answers():  # else the next start closes the run
                self.client.set_tag(run_id, "error", kind_and_place(error))
                self.client.set_terminated(run_id, "KILLED" if killed else "FAILED")
            raise
        self.client.set_terminated(run_id, "FINISHED")


@dataclass(frozen=True)
class StudyRun:
    """An open parent run; made by ``Tracking.study``."""

    run_id: str
    tracking: Tracking = field(repr=False)

    def log_cell(
        self,
        *,
        name: str,
        params: Mapping[str, object],
        metrics: Mapping[str, float],
        tags: Mapping[str, object] | None = None,
        datasets: Sequence[DataInput] = (),
    ) -> str:
        """One finished child run with all of a cell's numbers. Its id."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        tracking, client = self.tracking, self.tracking.client
        nested = {**(tags or {}), "mlflow.parentRunId": self.run_id}
        run_id = client.create_run(tracking.experiment_id, run_name=name, tags=_tags(nested)).info.run_id
        with tracking._closing(run_id):
            tracking._log_params_and_metrics(run_id, params, metrics)
            inputs = [
                DatasetInput(
                    Dataset(data.name, data.digest[:36], "local", json.dumps({"uri": data.source})),
                    [InputTag("mlflow.data.context", data.context)],
                )
                for data in datasets
            ]
            if inputs:
                client.log_inputs(run_id, inputs)
        return run_id

    def log_figure(self, name: str, png: bytes) -> None:
        """Keep a figure with the study, as ``figures/<name>.png``."""
        self.tracking._log_file(self.run_id, f"figures/{name}.png", png)

    def log_table(self, name: str, csv: str) -> None:
        """Keep a table with the study, as ``<name>.csv``."""
        self.tracking._log_file(self.run_id, f"{name}.csv", csv.encode())

    def describe(self, text: str, figures: Mapping[str, bytes], cell_run: str | None = None) -> None:
        """Show a Markdown text, and PNG figures by name under it, on the study's page or on a cell's."""
        run_id = cell_run or self.run_id
        lines = [text[:LONGEST_TAG]]
        for name, png in figures.items():
            self.tracking._log_file(run_id, f"shown/{name}.png", _narrow(png))
            lines.append(f"![{name}](get-artifact?path=shown%2F{name}.png&run_uuid={run_id})")
        self.tracking.client.set_tag(run_id, "mlflow.note.content", "\n\n".join(lines))

    def log_input(self, path: Path) -> None:
        """Keep a file that the study was made from, as ``inputs/<its name>``."""
        self.tracking._log_file(self.run_id, f"inputs/{path.name}", path.read_bytes())


def _narrow(png: bytes) -> bytes:
    """An image as wide as a run's page at most: it would show what is wider cut off."""
    with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
        image.thumbnail((_PAGE_WIDTH, 2 * _PAGE_WIDTH), Image.Resampling.LANCZOS)
        narrow = io.BytesIO()
        image.save(narrow, "PNG")
    return narrow.getvalue()


def pages(search: Callable[..., Any]) -> Iterator[Any]:
    """All that a search of MLflow's finds, page by page."""
    token: str | None = None
    while token != "":
        page = search(page_token=token)
        yield from page
        token = page.token or ""


def create_database(home: Path) -> None:
    """Have MLflow's tables in ``home``/mlflow.db, before a server over it starts."""
    quieten()
    with lock(home):
        _create(home / "mlflow.db")


def _create(path: Path) -> None:
    """Make MLflow's tables in a file beside and move it in: a killed start leaves nothing half made."""
    if path.exists():
        return
    import sqlalchemy
    from mlflow.store.db.utils import _initialize_tables

    beside = path.with_name(f".{path.name}.making")
    for left in path.parent.glob(f"{beside.name}*"):  # the file and its journal, from a killed start
        left.unlink()
    engine = sqlalchemy.create_engine(f"sqlite:///{beside}")
    _initialize_tables(engine)
    with engine.connect() as connection:
        # Kept in the file: a cell costs two fifths where the disk is slow to sync, and the pages can be
        # read while a study writes. Where the file system cannot do it, SQLite stays as it was.
        connection.exec_driver_sql("PRAGMA journal_mode=WAL")
    engine.dispose()
    beside.replace(path)


def _experiment(client: MlflowClient, name: str, location: str | None) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return client.create_experiment(name, location, _KIND)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":  # by another process, on a server
                raise
            found = client.get_experiment_by_name(name)
    if found is None or found.lifecycle_stage != "active":
        raise ValueError(
            f"MLflow experiment {name!r} was deleted; restore it (`mlflow experiments restore`) "
            "or give another name."
        )
    return found.experiment_id


def _tags(tags: Mapping[str, object]) -> dict[str, Any]:
    """``tags`` as text, with the process that owns the run."""
    return {key: str(value)[:LONGEST_TAG] for key, value in {**tags, **owner_tags()}.items()}
