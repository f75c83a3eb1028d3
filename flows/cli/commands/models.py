"""``medfocus models``: the registered models, and the weights of their parts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flows.cli import terminal

app = typer.Typer(
    rich_markup_mode=None,
    help="List, fetch, export and import models and weights.",
    epilog="Without a command, models and weights are listed. For a machine without a network: run medfocus "
    "models fetch and export elsewhere, copy the hub cache and the zip, and run medfocus models import here.",
    invoke_without_command=True,
)


@app.callback()
def models(context: typer.Context) -> None:
    """List the registered models and the cached weights."""
    if context.invoked_subcommand is not None:
        return
    with terminal.at_work():
        home = terminal.project()
        with terminal.waiting("reading"):
            from flows.cli import weights
            from medfocus.tracking import registry

            versions = registry.registered(home)
            rows = weights.rows(home)
        if versions:
            terminal.table(
                ("model", "version", "alias", "registered, UTC", "why"),
                [
                    (each.name, each.version, each.alias, each.created, each.tags.get("gate", ""))
                    for each in versions
                ],
            )
        else:
            print(
                "No model is registered. Run a study (medfocus run) or import one (medfocus models import)."
            )
        terminal.table(("weights", "setting", "where"), rows)


@app.command()
def fetch(
    names: Annotated[
        list[str] | None, typer.Argument(help="Names of weights; default: the weights of the studies here.")
    ] = None,
) -> None:
    """Download weights, so that later runs need no network.

    For a machine without a network, run this on another machine and copy the hub cache; medfocus doctor shows
    its folder.

    \b
    Examples:
      medfocus models fetch                                the weights of the studies here
      medfocus models fetch facebook/sam2.1-hiera-tiny     SAM2
      medfocus models fetch ViT-B-16:openai                a model of open_clip and its tag
      medfocus models fetch hf-hub:ORG/NAME                a CLIP on the hub
    """
    failed = False
    with terminal.at_work():
        from flows.cli import weights

        wanted = names or list(dict.fromkeys(weights.of_studies(terminal.project())))
        if not wanted:
            print("The studies here use only weights from the package: nothing to fetch.")
        for name in wanted:
            try:
                print(f"{name}: {weights.fetch(name)}")
            except (ValueError, OSError, ImportError) as error:
                terminal.tell(terminal.sentence(error))
                failed = True
    if failed:
        raise typer.Exit(1)


@app.command()
def export(
    file: Annotated[Path, typer.Argument(help="The zip to write.")],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="NAME, NAME@VERSION, or a model folder.")
    ] = None,
) -> None:
    """Write a model to a zip of tensors and text.

    \b
    Example:
      medfocus models export breast.zip --model medfocus-phantom-breast
    """
    with terminal.at_work():
        with terminal.waiting("writing"):
            from flows.cli import archive

            name = archive.export(terminal.project(), model, file)
        print(f"{name} -> {file}, {file.stat().st_size / 1e6:.1f} MB")
        print(f"On the other machine: medfocus models import {file.name}")


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="A zip from medfocus models export.")],
    name: Annotated[str | None, typer.Option(help="Name of the model; default: the file's name.")] = None,
) -> None:
    """Check an exported model and register it here.

    The command loads the model once before it registers it. The model does not become champion.

    \b
    Example:
      medfocus models import breast.zip --name medfocus-breast
    """
    with terminal.at_work():
        with terminal.waiting("checking"):
            from flows.cli import archive
            from flows.cli.init.dataset import slug

            registration = archive.import_model(terminal.project(), file, name or slug(file.stem))
        version = f"{registration.name}@{registration.version}"
        print(f"{registration.name} version {registration.version}: {registration.reason}")
        print(f"To use it: medfocus predict FILES --out DIR --model {version}")


@app.command()
def card(
    model: Annotated[str, typer.Argument(help="NAME, or NAME@VERSION.")],
    sheet: Annotated[bool, typer.Option("--sheet", help="Print the data sheet instead.")] = False,
) -> None:
    """Print the model card of a version: its purpose, scores and failures.

    \b
    Examples:
      medfocus models card medfocus-phantom-breast
      medfocus models card medfocus-phantom-breast@1 --sheet
    """
    with terminal.at_work():
        from flows.cli.models import choose
        from medfocus.reports.data_sheet import SHEET
        from medfocus.reports.model_card import CARD

        version = choose(terminal.project(), model)
        print(version.text(SHEET if sheet else CARD), end="")
