"""The application ``medfocus`` and the order of its commands."""

from __future__ import annotations

from typing import Annotated

import typer

from flows.cli.commands import convert, images, models, study

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start with: medfocus doctor, then medfocus init IMAGES. "
    "Exit codes: 0 success, 1 failure, 2 wrong usage, 130 interrupted.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(version("medfocusclip"))
        raise typer.Exit


@app.callback()
def medfocus(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    """Few-shot classification of medical images with region focus. For research; not for clinical use."""


for command in (study.init, study.new, study.run, study.study, study.report, study.doctor):
    app.command()(command)
app.add_typer(convert.app, name="convert")
app.add_typer(models.app, name="models")
for command in (images.predict, images.explain, images.masks):
    app.command()(command)
app.command("app")(images.show_app)
