"""The commands on a user's images: predict, explain, masks, app."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from flows.cli import terminal
from flows.cli.commands.study import Params

Files = Annotated[list[Path], typer.Argument(help="Images, or folders of images.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="A folder for the table and the images.")]
Model = Annotated[
    str | None,
    typer.Option("--model", "-m", help="NAME, NAME@VERSION or a model folder; default: the only model."),
]
Force = Annotated[bool, typer.Option("--force", help="Overwrite an existing table.")]


def predict(files: Files, out: Out, model: Model = None, force: Force = False) -> None:
    """Classify images and draw their masks.

    predictions.csv has one line for each image, with all probabilities. Without a version, the model is the
    champion or, if there is none, the newest version.

    \b
    Examples:
      medfocus predict scan1.png scan2.png --out answers
      medfocus predict ../new-images --out answers --model medfocus-phantom-breast
    """
    _with_model("predict", files, out, model, force)


def explain(files: Files, out: Out, model: Model = None, force: Force = False) -> None:
    """Show the parts of an image that an answer depends on.

    Each image gets a sheet and a line in explanations.csv.

    \b
    Example:
      medfocus explain scan1.png --out why --model medfocus-phantom-breast
    """
    _with_model("explain", files, out, model, force)


def _with_model(work: str, files: list[Path], out: Path, model: str | None, force: bool) -> None:
    with terminal.at_work():
        from flows.cli import images

        function, table = {
            "predict": (images.predict, images.PREDICTIONS),
            "explain": (images.explain, images.EXPLANATIONS),
        }[work]
        folder = images.OutputFolder(out, table, force=force)
        batches = images.Images(files, work)
        with terminal.waiting("loading the model"):
            from flows.cli.models import opened
            from medfocus.serving.model_folder import load_model

            with opened(_home_of(model), model) as (name, model_folder):
                predictor = load_model(model_folder)
        terminal.tell(f"model: {name}. For research; not for clinical use.")
        function(predictor, batches, folder)
        done = folder.rows
        print(f"{done} of {done + batches.failed}: {folder.table}" if done else "no image could be read")
    if batches.failed:
        raise typer.Exit(1)


def masks(
    files: Files,
    out: Out,
    params: Params = Path("params.yaml"),
    dataset: Annotated[
        str | None, typer.Option(help="Use the settings of this data set; default: the first.")
    ] = None,
    force: Force = False,
) -> None:
    """Segment the region of images without any label.

    Each image gets a mask, an overlay and a line in masks.csv.

    \b
    Examples:
      medfocus masks scan1.png --out masks
      medfocus masks ../new-images --out masks --params studies/mine.yaml
    """
    with terminal.at_work():
        from flows.cli import images
        from flows.study import models
        from flows.study.params import load_params
        from flows.study.study import Study
        from medfocus.masks.store import MaskStore

        loaded = load_params(params)
        name = dataset or next(iter(loaded.datasets))
        if name not in loaded.datasets:
            known = ", ".join(loaded.datasets)
            raise typer.BadParameter(
                f"{params} has no data set {name!r}. Choose from {known}.", param_hint="--dataset"
            )
        folder = images.OutputFolder(out, images.MASKS, force=force)
        study = Study(params.resolve().parent, terminal.project(), loaded)
        with terminal.waiting("loading the segmenter"):
            segmenter = models.build_segmenter(study, name)
        batches = images.Images(files, "masks")
        store = MaskStore(study.shared_cache("masks"))
        images.masks(segmenter, store, batches, folder, batch_size=loaded.masks.batch_size)
        print(f"{folder.rows} masks: {folder.table}" if folder.rows else "no image could be read")
    if batches.failed:
        raise typer.Exit(1)


def show_app(
    model: Model = None,
    port: Annotated[int, typer.Option(help="0 chooses a free port.", min=0, max=65535)] = 8600,
    host: Annotated[
        str, typer.Option(help="An address beyond loopback needs a password: MEDFOCUS_APP_PASSWORD.")
    ] = "127.0.0.1",
    no_browser: Annotated[bool, typer.Option("--no-browser", help="Do not open a browser.")] = False,
) -> None:
    """Serve a page for reading images and correcting masks.

    The page runs until Ctrl-C and listens only on this machine. Images stay in memory while they are open and
    are never saved.

    \b
    Examples:
      medfocus app
      medfocus app --model medfocus-phantom-brain@1 --port 0 --no-browser
    """
    with terminal.at_work():
        with terminal.waiting("loading the model"):
            from flows.cli import workstation

            password, listener = workstation.password(host, os.environ), workstation.listening(host, port)
            reader, about = workstation.load(_home_of(model), model)
        terminal.tell(f"model: {about.model} {about.version}".rstrip())
        workstation.serve(reader, about, listener, host, password, browser=not no_browser)


def _home_of(model: str | None) -> Path:
    """Return the project with the model's registry; a model folder needs no project."""
    return terminal.project() if model is None or not Path(model).is_dir() else Path.cwd()
