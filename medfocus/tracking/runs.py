"""Runs of MLflow: a parent run for each study, a child run for each cell."""

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

_KIND = {"mlflow.experimentKind": "custom_model_development"}  # selects MLflow's pages for the experiment
_PAGE_WIDTH = 800  # pixels
LONGEST_TAG = 5000  # characters, of a tag or a parameter; MLflow's databases take 8000 and 6000


@dataclass(frozen=True)
class DataInput:
    """Images of a data set that a run uses."""

    name: str
    digest: str  # digest of these images; MLflow keeps its first 36 characters
    source: str  # path of the data set
    context: str = "training"


def start(uri: str | None, home: Path, experiment: str) -> Tracking:
    """Open the tracking store, and close the runs that dead processes of this host left RUNNING.

    The network is used only if the URI names a server.

    Args:
        uri: MLflow tracking URI; None means ``home``/mlflow.db. MLFLOW_TRACKING_URI overrides it.
        home: Folder of the database and, without a server, of the artifacts (``home``/mlruns).
        experiment: Name of the experiment. It is created if it does not exist.

    Raises:
        ValueError: The experiment was deleted.
    """
    quieten()
    import mlflow  # the import takes seconds

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
    """An open tracking store; ``start`` opens it."""

    uri: str
    home: Path
    experiment_id: str
    client: MlflowClient = field(repr=False)

    @contextmanager
    def study(
        self, name: str, params: Mapping[str, object], tags: Mapping[str, object] | None = None
    ) -> Iterator[StudyRun]:
        """Open a parent run for the ``with`` block. It ends FAILED or KILLED if the block raises."""
        run = self.client.create_run(self.experiment_id, run_name=name, tags=_tags(tags or {}))
        with self._closing(run.info.run_id):
            self._log_params_and_metrics(run.info.run_id, params, {})
            yield StudyRun(run.info.run_id, self)

    def run(self, run_id: str) -> Run:
        """Return a run by its id. Raises ValueError if it does not exist."""
        from mlflow.exceptions import MlflowException

        try:
            return self.client.get_run(run_id)
        except MlflowException as error:
            raise ValueError(
                f"{self.uri} has no run {run_id!r}. Give a run id from MLflow's page or reports/study.csv."
            ) from error

    def download(self, run_id: str, name: str, into: Path) -> Path:
        """Copy a file of a run into a folder. Raises ValueError if the run does not have it."""
        from mlflow.exceptions import MlflowException

        try:
            return Path(self.client.download_artifacts(run_id, name, str(into)))
        except (MlflowException, OSError) as error:
            raise ValueError(f"the run {run_id} has no file {name} ({error}).") from error

    def close_dead_runs(self) -> list[str]:
        """Set RUNNING runs of this host's dead processes to FAILED, in all experiments; return their ids."""
        experiments = [e.experiment_id for e in self.client.search_experiments()]
        running_here = f"attributes.status = 'RUNNING' and tags.`owner.host` = '{socket.gethostname()}'"
        search = functools.partial(self.client.search_runs, experiments, running_here)
        # Read all pages first: closing a run removes it from the search, which shifts the next page.
        dead = [run.info.run_id for run in pages(search) if not is_alive(run.data.tags)]
        for run_id in dead:
            self.client.set_tag(run_id, "error", "The process of this run ended without closing it.")
            self.client.set_terminated(run_id, "FAILED")
        return dead

    def runs_by_cell(self) -> dict[str, str]:
        """Return the newest finished run of each cell of the experiment: tag ``cell_key`` -> run id."""
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
        """Log a study's page with the parent of a cell's run, if the store has the cell's run."""
        from mlflow.exceptions import MlflowException

        try:
            parent = self.client.get_run(cell_run).data.tags["mlflow.parentRunId"]
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            return
        self.client.log_artifact(parent, str(page))

    def _answers(self) -> bool:
        """Return whether the store's server, if any, answers. MLflow itself would retry for minutes."""
        url = urllib.parse.urlsplit(self.uri)
        if not url.scheme.startswith("http"):
            return True
        try:
            port = url.port or (443 if url.scheme == "https" else 80)
            socket.create_connection((url.hostname or "", port), timeout=2).close()
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
            params=[Param(key, str(value)[:LONGEST_TAG]) for key, value in params.items()],
        )

    def _log_file(self, run_id: str, name: str, data: bytes) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, Path(name).name)
            path.write_bytes(data)
            self.client.log_artifact(run_id, str(path), str(Path(name).parent).removeprefix("."))

    @contextmanager
    def _closing(self, run_id: str) -> Iterator[None]:
        """End the run after the block as FINISHED, as FAILED, or, after Ctrl-C or an exit, as KILLED."""
        try:
            yield
        except BaseException as error:
            killed = isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit)
            if self._answers():  # otherwise the next start closes the run
                self.client.set_tag(run_id, "error", kind_and_place(error))
                self.client.set_terminated(run_id, "KILLED" if killed else "FAILED")
            raise
        self.client.set_terminated(run_id, "FINISHED")


@dataclass(frozen=True)
class StudyRun:
    """An open parent run; ``Tracking.study`` opens it."""

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
        """Log a finished child run with a cell's numbers; return its id."""
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
        """Log a figure with the study, as ``figures/<name>.png``."""
        self.tracking._log_file(self.run_id, f"figures/{name}.png", png)

    def log_table(self, name: str, csv: str) -> None:
        """Log a table with the study, as ``<name>.csv``."""
        self.tracking._log_file(self.run_id, f"{name}.csv", csv.encode())

    def describe(self, text: str, figures: Mapping[str, bytes], cell_run: str | None = None) -> None:
        """Show a Markdown text and PNG figures on the study's page, or on a cell's page."""
        run_id = cell_run or self.run_id
        lines = [text[:LONGEST_TAG]]
        for name, png in figures.items():
            self.tracking._log_file(run_id, f"shown/{name}.png", _narrow(png))
            lines.append(f"![{name}](get-artifact?path=shown%2F{name}.png&run_uuid={run_id})")
        self.tracking.client.set_tag(run_id, "mlflow.note.content", "\n\n".join(lines))

    def log_input(self, path: Path) -> None:
        """Log an input file of the study, as ``inputs/<its name>``."""
        self.tracking._log_file(self.run_id, f"inputs/{path.name}", path.read_bytes())


def _narrow(png: bytes) -> bytes:
    """Scale an image down to the width of a run's page, which crops wider images."""
    with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
        image.thumbnail((_PAGE_WIDTH, 2 * _PAGE_WIDTH), Image.Resampling.LANCZOS)
        narrow = io.BytesIO()
        image.save(narrow, "PNG")
    return narrow.getvalue()


def pages(search: Callable[..., Any]) -> Iterator[Any]:
    """Yield all results of a search of MLflow, page by page."""
    token: str | None = None
    while token != "":
        page = search(page_token=token)
        yield from page
        token = page.token or ""


def create_database(home: Path) -> None:
    """Create MLflow's tables in ``home``/mlflow.db, for a server that starts afterwards."""
    quieten()
    with lock(home):
        _create(home / "mlflow.db")


def _create(path: Path) -> None:
    """Create MLflow's tables in a temporary file, then rename it: a kill leaves no partial database."""
    if path.exists():
        return
    import sqlalchemy
    from mlflow.store.db.utils import _initialize_tables

    unfinished = path.with_name(f".{path.name}.making")
    for left in path.parent.glob(f"{unfinished.name}*"):  # the file and its journal after a killed start
        left.unlink()
    engine = sqlalchemy.create_engine(f"sqlite:///{unfinished}")
    _initialize_tables(engine)
    with engine.connect() as connection:
        # The file keeps this mode. With WAL, writing a cell takes 40 % of the time on a disk with slow syncs,
        # and the pages are readable while a study writes. On a file system without WAL, SQLite keeps its
        # default.
        connection.exec_driver_sql("PRAGMA journal_mode=WAL")
    engine.dispose()
    unfinished.replace(path)


def _experiment(client: MlflowClient, name: str, location: str | None) -> str:
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            return client.create_experiment(name, location, _KIND)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":  # otherwise another process created it
                raise
            experiment = client.get_experiment_by_name(name)
    if experiment is None or experiment.lifecycle_stage != "active":
        raise ValueError(
            f"The MLflow experiment {name!r} was deleted. Restore it (`mlflow experiments restore`) "
            "or set another name (params.yaml: tracking)."
        )
    return experiment.experiment_id


def _tags(tags: Mapping[str, object]) -> dict[str, Any]:
    """Return tags as text, together with the tags of the run's owner."""
    return {key: str(value)[:LONGEST_TAG] for key, value in {**tags, **owner_tags()}.items()}
