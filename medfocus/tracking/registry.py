"""The model registry: versions, the champion's alias, and rollback. Only this module moves the alias."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from medfocus.tracking.process import lock, quieten
from medfocus.tracking.provenance import PACKAGES, installed
from medfocus.tracking.runs import LONGEST_TAG, Tracking, pages

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

CHAMPION = "champion"  # the alias of the served version
_BEFORE, _ROLLED_BACK = "champion.before", "champion.rolled_back"  # tags of a version
_MODEL_ARTIFACT = "model"  # the model folder inside the logged model
_SERVED_WITH = (
    *(*PACKAGES, "timm", "numpy", "scipy", "pandas", "pillow", "safetensors", "huggingface_hub"),
    *("pydicom", "python-gdcm", "nibabel"),
)


@dataclass(frozen=True)
class Champion:
    """The version with the champion's alias."""

    name: str
    version: str
    cell_key: str
    model_folder: Callable[[Path], Path]  # downloads its model folder into a given folder


@dataclass(frozen=True)
class Verdict:
    """The decision on a challenger."""

    promoted: bool
    reason: str
    tags: Mapping[str, str]  # further tags of the version


@dataclass(frozen=True)
class Registration:
    """The result of ``register``, with its reason."""

    name: str
    version: str
    alias: str | None  # "champion" if this version has it
    reason: str


@dataclass(frozen=True)
class Registered:
    """A version in the registry."""

    name: str
    version: str
    alias: str  # "champion" or ""
    created: str  # day and time, UTC
    tags: Mapping[str, str]
    model_folder: Callable[[Path], Path]  # downloads its model folder into a given folder
    metrics: Callable[[], Mapping[str, float]]  # reads its run's metrics; empty without a run
    text: Callable[[str], str]  # reads a file of the version by name, or raises FileNotFoundError


def registered(home: Path) -> list[Registered]:
    """Return every version in the registry, sorted by name, the newest first. Create no store.

    The store is that of ``runs.start``: MLFLOW_TRACKING_URI, or ``home``/mlflow.db.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home.resolve() / 'mlflow.db'}"
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():
        return []
    quieten()
    import mlflow

    client = mlflow.MlflowClient(uri)
    champions = {
        (model.name, str(model.aliases[CHAMPION]))
        for model in pages(client.search_registered_models)
        if CHAMPION in model.aliases
    }
    versions = [
        Registered(
            each.name,
            str(each.version),
            CHAMPION if (each.name, str(each.version)) in champions else "",
            time.strftime("%Y-%m-%d %H:%M", time.gmtime((each.creation_timestamp or 0) / 1000)),
            dict(each.tags),
            _opener(client, uri, each.name, str(each.version)),
            _measured(client, each.run_id),
            _reader(client, uri, each.name, str(each.version)),
        )
        for each in pages(client.search_model_versions)
    ]
    return sorted(versions, key=lambda each: (each.name, -int(each.version)))


def register(
    store: Tracking,
    name: str,
    write_model: Callable[[Path], object],
    *,
    cell_key: str,
    judge: Callable[[Champion | None], Verdict],
    classes: Sequence[str],
    example: bytes,
    tags: Mapping[str, object],
    run_id: str | None = None,
    cards: Callable[[Path], Mapping[str, str]] | None = None,
) -> Registration:
    """Register a served model, and make it champion if ``judge`` promotes it.

    The version and the run get the verdict's reason as the tag ``gate``. A cell gets at most one version, and
    a version that was rolled back is not judged again.

    Args:
        store: An open tracking store.
        name: Name of the registered model; competing models share it.
        write_model: Writes the folder of ``model_folder.save_model``; called only for a new version.
        cell_key: Identifies the fitted model by content.
        judge: Maps the present champion, if any, to the verdict on the challenger. It may download the
            champion's files.
        classes: The classes in the order of the model's output.
        example: An encoded image, logged as the model's input example; never a patient's image.
        tags: Further tags of the version.
        run_id: The run that fitted the model, if any.
        cards: Maps the written model folder to texts by file name, for the version and the run; called
            only for a new version, after ``judge``.

    Raises:
        RuntimeError: The champion's files cannot be loaded.
    """
    with lock(store.home):
        held = _champion(store, name)
        if held is not None and held.tags.get("cell_key") == cell_key:
            return Registration(name, str(held.version), CHAMPION, "it is the champion already")
        known = _version_of_cell(store, name, cell_key)
        if known is not None and _ROLLED_BACK in known.tags:
            when = known.tags[_ROLLED_BACK]
            reason = f"refused: it was rolled back on {when}; delete its tag {_ROLLED_BACK} to admit it"
            return Registration(name, str(known.version), None, reason)
        verdict = judge(None if held is None else _opened(store, held))
        verdict_tags = {"gate": verdict.reason, **verdict.tags}
        if known is None:
            model_id = _log_model(store, name, write_model, classes, example, run_id, cards)
            version = _create_version(
                store, name, model_id, run_id, {**tags, **verdict_tags, "cell_key": cell_key}
            )
        else:
            version = str(known.version)
            _set_version_tags(store, name, version, verdict_tags)
        if run_id is not None:
            store.client.set_tag(run_id, "gate", verdict.reason[:LONGEST_TAG])
        if not verdict.promoted:
            return Registration(name, version, None, verdict.reason)
        before = {_BEFORE: str(held.version)} if held is not None else {}
        _set_version_tags(store, name, version, before)
        store.client.set_registered_model_alias(name, CHAMPION, version)
        return Registration(name, version, CHAMPION, verdict.reason)


def rollback(store: Tracking, name: str) -> tuple[str, str]:
    """Give the alias back to the previous champion; return the version rolled back and the version restored.

    The version rolled back keeps its files and gets a tag that prevents another promotion.

    Raises ValueError if the model has no champion or no previous champion.
    """
    with lock(store.home):
        held = _champion(store, name)
        if held is None:
            raise ValueError(f"{name} has no champion to roll back.")
        before = held.tags.get(_BEFORE)
        if before is None:
            raise ValueError(
                f"{name} version {held.version} is the first champion, so there is no previous one. "
                f"To have no champion, delete the alias {CHAMPION!r} in MLflow."
            )
        version = str(held.version)
        _set_version_tags(store, name, version, {_ROLLED_BACK: time.strftime("%Y-%m-%d %H:%M")})
        store.client.set_registered_model_alias(name, CHAMPION, before)
        return version, before


def describe(store: Tracking, name: str, version: str, text: str, cards: Sequence[str] = ()) -> None:
    """Show a Markdown text on a version's page, with links to cards of its run."""
    run_id = store.client.get_model_version(name, version).run_id
    links = [f"[{file}](get-artifact?path={file}&run_uuid={run_id})" for file in cards if run_id]
    end = "\n\n" + ", ".join(links) if links else ""
    store.client.update_model_version(name, version, text[: LONGEST_TAG - len(end)] + end)


def _champion(store: Tracking, name: str) -> ModelVersion | None:
    from mlflow.exceptions import MlflowException

    try:
        return store.client.get_model_version_by_alias(name, CHAMPION)
    except MlflowException as error:
        # MLflow's stores report a missing alias by different codes.
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def _opened(store: Tracking, champion: ModelVersion) -> Champion:
    name, version = champion.name, str(champion.version)
    opener = _opener(store.client, store.uri, name, version)
    return Champion(name, version, champion.tags["cell_key"], opener)


def _version_of_cell(store: Tracking, name: str, cell_key: str) -> ModelVersion | None:
    versions = store.client.search_model_versions(f"name = '{name}' and tags.cell_key = '{cell_key}'")
    return versions[0] if versions else None


def _set_version_tags(store: Tracking, name: str, version: str, tags: Mapping[str, str]) -> None:
    for key, value in tags.items():
        store.client.set_model_version_tag(name, version, key, value)


def _log_model(
    store: Tracking,
    name: str,
    write_model: Callable[[Path], object],
    classes: Sequence[str],
    example: bytes,
    run_id: str | None,
    cards: Callable[[Path], Mapping[str, str]] | None,
) -> str:
    """Log the model folder as a pyfunc model from code; return its model id."""
    import mlflow
    import pandas as pd
    from mlflow.entities import LoggedModelOutput
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema, TensorSpec
    from mlflow.types.schema import Array

    package = Path(__file__).parents[1]
    outputs: list[ColSpec | TensorSpec] = [
        ColSpec("string", "label"),
        *(ColSpec("double", f"probability_{name}") for name in classes),
        ColSpec(Array(DataType.string), "set", required=False),
        ColSpec("string", "no_set", required=False),  # the reason, if the model gives no sets
        ColSpec("string", "mask_status"),
        ColSpec("double", "mask_score"),
        ColSpec("string", "overlay", required=False),
    ]
    # The column is optional text, so that the model reports every fault itself. With type "binary", MLflow
    # decodes base64 itself and accepts malformed input. If a required column is missing, MLflow's error
    # prints the rest of the request. A column of text may also contain bytes.
    image = ColSpec("string", "image", required=False)
    overlay = ParamSpec("overlay", DataType.boolean, True)
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder, _MODEL_ARTIFACT))
        mlflow.pyfunc.save_model(
            f"{folder}/pyfunc",
            python_model=str(package / "serving" / "pyfunc.py"),
            artifacts={_MODEL_ARTIFACT: f"{folder}/{_MODEL_ARTIFACT}"},
            code_paths=[str(package)],
            signature=ModelSignature(Schema([image]), Schema(outputs), ParamSchema([overlay])),
            input_example=pd.DataFrame({"image": [example]}),
            # Without this list, MLflow loads the model and asks a package index to infer it.
            pip_requirements=[f"{package}=={version}" for package, version in installed(_SERVED_WITH)],
        )
        for file, text in (cards(Path(folder, _MODEL_ARTIFACT)) if cards else {}).items():
            path = Path(folder, "pyfunc", file)  # next to the file MLmodel, where no code reads it
            path.write_text(text, encoding="utf-8")
            if run_id is not None:
                store.client.log_artifact(run_id, str(path))
        logged = store.client.create_logged_model(store.experiment_id, name, run_id)
        store.client.log_model_artifacts(logged.model_id, f"{folder}/pyfunc")
    store.client.finalize_logged_model(logged.model_id, "READY")
    if run_id is not None:
        store.client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
    return logged.model_id


def _create_version(
    store: Tracking, name: str, model_id: str, run_id: str | None, tags: Mapping[str, object]
) -> str:
    from mlflow.exceptions import MlflowException
    from mlflow.tracking._tracking_service.utils import _use_tracking_uri

    try:
        store.client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    texts = {key: str(value) for key, value in tags.items()}
    # The registry's store looks the model up through the process-wide URI. The context manager restores this
    # URI, which would otherwise remain in the environment and override the URI of the next ``runs.start``.
    with _use_tracking_uri(store.uri):
        version = store.client.create_model_version(
            name, f"models:/{model_id}", run_id, texts, model_id=model_id
        )
    return str(version.version)


def _opener(client: MlflowClient, uri: str, name: str, version: str) -> Callable[[Path], Path]:
    """Return a function that downloads a version's model folder."""

    def model_folder(into: Path) -> Path:
        from mlflow.artifacts import download_artifacts

        source = client.get_model_version_download_uri(name, version)
        model = download_artifacts(source, dst_path=str(into), tracking_uri=uri)
        return Path(model) / "artifacts" / _MODEL_ARTIFACT

    return model_folder


def _measured(client: MlflowClient, run_id: str | None) -> Callable[[], Mapping[str, float]]:
    """Return a function that reads the metrics of a version's run."""

    def metrics() -> Mapping[str, float]:
        from mlflow.exceptions import MlflowException

        try:
            return dict(client.get_run(run_id).data.metrics) if run_id else {}
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":  # otherwise the run was deleted
                raise
            return {}

    return metrics


def _reader(client: MlflowClient, uri: str, name: str, version: str) -> Callable[[str], str]:
    """Return a function that reads a text of a version."""

    def text(file: str) -> str:
        from mlflow.artifacts import download_artifacts
        from mlflow.exceptions import MlflowException

        source = client.get_model_version_download_uri(name, version)
        try:
            with tempfile.TemporaryDirectory() as into:
                path = download_artifacts(f"{source}/{file}", dst_path=into, tracking_uri=uri)
                return Path(path).read_text(encoding="utf-8")
        except (MlflowException, OSError) as error:
            raise FileNotFoundError(
                f"{name} version {version} has no {file}; an imported version has none. Register the model "
                "from its study to get one."
            ) from error

    return text
