"""Runs, their numbers and the model registry; beside the served model's own file, the only mlflow import."""

from __future__ import annotations

import functools
import io
import json
import logging
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

import psutil
from filelock import FileLock
from PIL import Image

from medfocus.discreet import kind_and_place
from medfocus.provenance import PACKAGES, installed

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion

CHAMPION = "champion"  # the alias that served code loads
_BEFORE, _ROLLED_BACK = "champion.before", "champion.rolled_back"  # tags of a version
_MODEL_ARTIFACT = "model"  # the served model's folder inside the logged one
_SERVED_WITH = (
    *(*PACKAGES, "timm", "numpy", "scipy", "pandas", "pillow", "safetensors", "huggingface_hub"),
    *("pydicom", "python-gdcm", "nibabel"),
)
_QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",  # mlflow ignores "1"
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
_KIND = {"mlflow.experimentKind": "custom_model_development"}  # which pages the experiment is shown with
_PAGE_WIDTH = 800  # pixels
_LONGEST_TAG = 5000  # characters; MLflow's databases take 8000 bytes


@dataclass(frozen=True)
class DataInput:
    """Pictures of a data set as a run used them."""

    name: str
    digest: str  # of these pictures; MLflow keeps its first 36 characters
    source: str  # where it lies
    context: str = "training"


@dataclass(frozen=True)
class Champion:
    """The version that holds the alias."""

    name: str
    version: str
    cell_key: str
    model_folder: Callable[[Path], Path]  # downloads its files into a folder; the folder of serve.save_model


@dataclass(frozen=True)
class Verdict:
    """What becomes of a challenger."""

    promoted: bool
    reason: str
    tags: Mapping[str, str]  # more of the version


@dataclass(frozen=True)
class Registration:
    """What ``Tracking.register`` did, and why."""

    name: str
    version: str
    alias: str | None  # "champion" where this version holds it
    reason: str


@dataclass(frozen=True)
class Registered:
    """A version in the registry."""

    name: str
    version: str
    alias: str  # "champion", or "" where it holds none
    created: str  # day and time, UTC
    tags: Mapping[str, str]
    model_folder: Callable[[Path], Path]  # as a champion's


def registered(home: Path) -> list[Registered]:
    """Every version in the registry by name, the newest first. Makes nothing where there is no store yet.

    The store is that of ``start``: MLFLOW_TRACKING_URI, or ``home``/mlflow.db.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home.resolve() / 'mlflow.db'}"
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():
        return []
    _quieten()
    import mlflow

    client = mlflow.MlflowClient(uri)
    champions = {
        (model.name, str(model.aliases[CHAMPION]))
        for model in _pages(client.search_registered_models)
        if CHAMPION in model.aliases
    }
    found = [
        Registered(
            each.name,
            str(each.version),
            CHAMPION if (each.name, str(each.version)) in champions else "",
            time.strftime("%Y-%m-%d %H:%M", time.gmtime((each.creation_timestamp or 0) / 1000)),
            dict(each.tags),
            _opener(client, uri, each.name, str(each.version)),
        )
        for each in _pages(client.search_model_versions)
    ]
    return sorted(found, key=lambda each: (each.name, -int(each.version)))


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
    _quieten()
    import mlflow  # takes seconds, so not at the top

    home = home.resolve()
    home.mkdir(parents=True, exist_ok=True)
    uri = os.environ.get("MLFLOW_TRACKING_URI") or uri
    with _lock(home):
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
    ) -> Iterator[Study]:
        """A parent run for the ``with`` block: FINISHED after it, FAILED or KILLED when it raises."""
        run = self.client.create_run(self.experiment_id, run_name=name, tags=_tags(tags or {}))
        with self._closing(run.info.run_id):
            self._log_params_and_metrics(run.info.run_id, params, {})
            yield Study(run.info.run_id, self)

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
        dead = [
            run.info.run_id
            for run in self.client.search_runs(experiments, mine)
            if not _is_alive(run.data.tags)
        ]
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
        for run in _pages(search):
            newest.setdefault(run.data.tags["cell_key"], run.info.run_id)
        return newest

    def describe_version(self, name: str, version: str, text: str) -> None:
        """Give a registered version's page a Markdown text."""
        self.client.update_model_version(name, version, text[:_LONGEST_TAG])

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

    def register(
        self,
        name: str,
        write_model: Callable[[Path], object],
        *,
        cell_key: str,
        judge: Callable[[Champion | None], Verdict],
        classes: Sequence[str],
        example: bytes,
        tags: Mapping[str, object],
        run_id: str | None = None,
    ) -> Registration:
        """Register a served model, and make it champion if ``judge`` says so; nothing else moves the alias.

        The verdict's reason is kept as the tag ``gate`` of the version and of the run. A cell that has a
        version gets no second one; one that was rolled back is not judged again.

        Args:
            name: Of the registered model; models that compete share it.
            write_model: Writes the folder of ``serve.save_model``; called only if a version is made.
            cell_key: Identifies the fitted model by content.
            judge: Maps the present champion, if there is one, to the verdict on the challenger. It may
                download the champion's files.
            classes: In the order of the model's output.
            example: An encoded picture, kept with the model as its input example; not a patient's.
            tags: More tags of the version.
            run_id: The run that fitted the model, where there is one.

        Raises:
            RuntimeError: The champion's files cannot be loaded and judged.
        """
        with _lock(self.home):
            held = self._champion(name)
            if held is not None and held.tags.get("cell_key") == cell_key:
                return Registration(name, str(held.version), CHAMPION, "it is the champion already")
            known = self._version_of_cell(name, cell_key)
            if known is not None and _ROLLED_BACK in known.tags:
                when = known.tags[_ROLLED_BACK]
                reason = f"refused: it was rolled back on {when}; delete its tag {_ROLLED_BACK} to admit it"
                return Registration(name, str(known.version), None, reason)
            verdict = judge(None if held is None else self._opened(held))
            said = {"gate": verdict.reason, **verdict.tags}
            if known is None:
                model_id = self._log_model(name, write_model, classes, example, run_id)
                version = self._create_version(name, model_id, run_id, {**tags, **said, "cell_key": cell_key})
            else:
                version = str(known.version)
                self._set_version_tags(name, version, said)
            if run_id is not None:
                self.client.set_tag(run_id, "gate", verdict.reason[:_LONGEST_TAG])
            if not verdict.promoted:
                return Registration(name, version, None, verdict.reason)
            before = {_BEFORE: str(held.version)} if held is not None else {}
            self._set_version_tags(name, version, before)
            self.client.set_registered_model_alias(name, CHAMPION, version)
            return Registration(name, version, CHAMPION, verdict.reason)

    def rollback(self, name: str) -> tuple[str, str]:
        """Give the alias back to the version that held it before: the version that had it, and that one.

        The one that is rolled back keeps its files, and a tag by which it is not promoted again.

        Raises ValueError where the model has no champion, or the champion none before it.
        """
        with _lock(self.home):
            held = self._champion(name)
            if held is None:
                raise ValueError(f"{name} has no champion, so there is nothing to roll back.")
            before = held.tags.get(_BEFORE)
            if before is None:
                raise ValueError(
                    f"{name} version {held.version} is the first champion, so there is none to go back to. "
                    f"To be without a champion, delete the alias {CHAMPION!r} in MLflow."
                )
            version = str(held.version)
            self._set_version_tags(name, version, {_ROLLED_BACK: time.strftime("%Y-%m-%d %H:%M")})
            self.client.set_registered_model_alias(name, CHAMPION, before)
            return version, before

    def _champion(self, name: str) -> ModelVersion | None:
        from mlflow.exceptions import MlflowException

        try:
            return self.client.get_model_version_by_alias(name, CHAMPION)
        except MlflowException as error:
            # The two stores call a missing alias by different names.
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise

    def _opened(self, champion: ModelVersion) -> Champion:
        name, version = champion.name, str(champion.version)
        opener = _opener(self.client, self.uri, name, version)
        return Champion(name, version, champion.tags["cell_key"], opener)

    def _version_of_cell(self, name: str, cell_key: str) -> ModelVersion | None:
        found = self.client.search_model_versions(f"name = '{name}' and tags.cell_key = '{cell_key}'")
        return found[0] if found else None

    def _set_version_tags(self, name: str, version: str, tags: Mapping[str, str]) -> None:
        for key, value in tags.items():
            self.client.set_model_version_tag(name, version, key, value)

    def _log_model(
        self,
        name: str,
        write_model: Callable[[Path], object],
        classes: Sequence[str],
        example: bytes,
        run_id: str | None,
    ) -> str:
        """Log the model folder as a pyfunc, models from code; its model id."""
        import mlflow
        import pandas as pd
        from mlflow.entities import LoggedModelOutput
        from mlflow.models import ModelSignature
        from mlflow.types import ColSpec, Schema, TensorSpec

        package = Path(__file__).parent
        outputs: list[ColSpec | TensorSpec] = [
            ColSpec("string", "label"),
            *(ColSpec("double", f"probability_{name}") for name in classes),
            ColSpec("string", "mask_status"),
            ColSpec("double", "mask_score"),
            ColSpec("string", "overlay"),
        ]
        with tempfile.TemporaryDirectory() as folder:
            write_model(Path(folder, _MODEL_ARTIFACT))
            mlflow.pyfunc.save_model(
                f"{folder}/pyfunc",
                python_model=str(package / "pyfunc.py"),
                artifacts={_MODEL_ARTIFACT: f"{folder}/{_MODEL_ARTIFACT}"},
                code_paths=[str(package)],
                signature=ModelSignature(Schema([ColSpec("binary", "picture")]), Schema(outputs)),
                input_example=pd.DataFrame({"picture": [example]}),
                # Given, so that MLflow neither loads the model nor asks an index to find them out.
                pip_requirements=[f"{package}=={version}" for package, version in installed(_SERVED_WITH)],
            )
            logged = self.client.create_logged_model(self.experiment_id, name, run_id)
            self.client.log_model_artifacts(logged.model_id, f"{folder}/pyfunc")
        self.client.finalize_logged_model(logged.model_id, "READY")
        if run_id is not None:
            self.client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
        return logged.model_id

    def _create_version(
        self, name: str, model_id: str, run_id: str | None, tags: Mapping[str, object]
    ) -> str:
        from mlflow.exceptions import MlflowException
        from mlflow.tracking._tracking_service.utils import _use_tracking_uri

        try:
            self.client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        texts = {key: str(value) for key, value in tags.items()}
        # The registry's own store looks the model up through the process-wide URI, which stays as it was:
        # it would leak into the environment and win over the next start's.
        with _use_tracking_uri(self.uri):
            version = self.client.create_model_version(
                name, f"models:/{model_id}", run_id, texts, model_id=model_id
            )
        return str(version.version)

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
class Study:
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
        lines = [text[:_LONGEST_TAG]]
        for name, png in figures.items():
            self.tracking._log_file(run_id, f"shown/{name}.png", _narrow(png))
            lines.append(f"![{name}](get-artifact?path=shown%2F{name}.png&run_uuid={run_id})")
        self.tracking.client.set_tag(run_id, "mlflow.note.content", "\n\n".join(lines))

    def log_input(self, path: Path) -> None:
        """Keep a file that the study was made from, as ``inputs/<its name>``."""
        self.tracking._log_file(self.run_id, f"inputs/{path.name}", path.read_bytes())


def _narrow(png: bytes) -> bytes:
    """A picture as wide as a run's page at most: it would show what is wider cut off."""
    with Image.open(io.BytesIO(png), formats=["PNG"]) as picture:
        picture.thumbnail((_PAGE_WIDTH, 2 * _PAGE_WIDTH), Image.Resampling.LANCZOS)
        narrow = io.BytesIO()
        picture.save(narrow, "PNG")
    return narrow.getvalue()


def _opener(client: MlflowClient, uri: str, name: str, version: str) -> Callable[[Path], Path]:
    """What downloads a version's files into a folder; the folder of serve.save_model."""

    def model_folder(into: Path) -> Path:
        from mlflow.artifacts import download_artifacts

        source = client.get_model_version_download_uri(name, version)
        model = download_artifacts(source, dst_path=str(into), tracking_uri=uri)
        return Path(model) / "artifacts" / _MODEL_ARTIFACT

    return model_folder


def _pages(search: Callable[..., Any]) -> Iterator[Any]:
    """All that a search of MLflow's finds, page by page."""
    token: str | None = None
    while token != "":
        page = search(page_token=token)
        yield from page
        token = page.token or ""


def _lock(home: Path) -> FileLock:
    """Held by one process at a time; the thread that has it may take it again."""
    return FileLock(home / "mlflow.lock", is_singleton=True)


def _quieten() -> None:
    """Import MLflow, and have it say no more than its faults."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    import mlflow  # noqa: F401  # it sets the level of its loggers

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # It would warn that pip is missing, which environments made by uv do not have.
    logging.getLogger("mlflow.utils.environment").setLevel(logging.ERROR)


def create_database(home: Path) -> None:
    """Have MLflow's tables in ``home``/mlflow.db, before a server over it starts."""
    _quieten()
    with _lock(home):
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
    owner = {
        "owner.host": socket.gethostname(),
        "owner.pid": os.getpid(),
        "owner.started": repr(psutil.Process().create_time()),
        "owner.born": _born(os.getpid()),
    }
    return {key: str(value)[:_LONGEST_TAG] for key, value in {**tags, **owner}.items()}


def _is_alive(owner: Mapping[str, str]) -> bool:
    """Whether a run's process still runs; its number may have been given to another since."""
    try:
        process = psutil.Process(int(owner["owner.pid"]))
        if born := owner.get("owner.born"):
            same = born == _born(process.pid)
        else:  # a start as the clock had it, which a correction shifts
            same = abs(process.create_time() - float(owner["owner.started"])) < 2
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _born(pid: int) -> str:
    """What no other process of this host ever has: the boot, and when in it this one started, by no clock.

    "" where the system is not Linux, or has no such process.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        ticks = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2]
    except OSError:
        return ""
    return f"{boot} {ticks.split()[19]}"
