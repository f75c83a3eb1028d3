"""The commands of ``medfocus``: what may be given, and what each says; the modules beside do the work."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flows.cli import terminal

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Few-shot classification of medical pictures with region focus. For research; not for clinical use.",
    epilog="Begin with: medfocus doctor, then medfocus init PICTURES. "
    "Exit codes: 0 done, 1 something failed, 2 wrong usage, 130 interrupted.",
)

Params = Annotated[Path, typer.Option("--params", "-p", help="A study's params file.", show_default=True)]


@app.command()
def init(
    data: Annotated[Path, typer.Argument(help="A folder of classes or of splits, or a CSV of path,label.")],
    out: Annotated[Path | None, typer.Option(help="The file to write; studies/NAME.yaml without it.")] = None,
    name: Annotated[str | None, typer.Option(help="Of the data set; its folder's without it.")] = None,
    root: Annotated[
        Path | None, typer.Option(help="Of a CSV: the folder that holds it and the pictures.")
    ] = None,
    modality: Annotated[str | None, typer.Option(help="Where it is known; a guess without it.")] = None,
    patient_pattern: Annotated[
        str | None, typer.Option(help="A regular expression whose one group is the patient.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
) -> None:
    """Look at a folder or a CSV of pictures and write a params file for it, with comments.

    Nothing is moved or changed. Folders are class/*.png or split/class/*.png, split being train, val or test.

    \b
    Examples:
      medfocus init ../pictures/chest
      medfocus init ../pictures/chest --modality chest_xray --patient-pattern 'person(\\d+)_'
      medfocus init ../pictures/list.csv --name clinic-a
    """
    with terminal.at_work():
        from typing import get_args

        from flows.cli import init as work
        from medfocus.params import Modality, load_params

        if modality is not None and modality not in get_args(Modality):
            known = ", ".join(get_args(Modality))
            raise typer.BadParameter(f"{modality!r} is none of {known}.", param_hint="--modality")
        if name is not None and name != work.slug(name):
            raise typer.BadParameter(
                f"{name!r} has more than letters, digits, - and _; {work.slug(name)!r} would do.",
                param_hint="--name",
            )
        home = terminal.project()
        base = home / "params.yaml"
        described = work.describe(
            data,
            home=home,
            root=root,
            name=name,
            modality=modality,
            patient_pattern=patient_pattern,
            test_fraction=load_params(base).splits.test_fraction,
        )
        path = out or home / "studies" / f"{described.name}.yaml"
        work.write(described, path, base, force=force)
        terminal.table(("class", "in prompts", "train", "test"), work.summary(described))
        known = described.modality
        print(f"modality: {known.modality} ({known.reason})")
        for warning in described.warnings:
            print(f"warning: {warning}")
        for fault in work.faults(described.found):
            terminal.tell(fault)
        print(f"\nwritten: {path}\nRead it, correct it, then: medfocus run --params {path}")


@app.command()
def run(params: Params = Path("params.yaml")) -> None:
    """Run a study: ingest, split, mask, fine-tune, evaluate, register. What is done is not done again.

    \b
    Examples:
      medfocus run                               the embedded data
      medfocus run --params studies/mine.yaml    what medfocus init wrote
    """
    with terminal.at_work():
        from flows.cli import studies

        studies.run(params)


@app.command()
def study(
    name: Annotated[
        str | None, typer.Argument(help="A study by its name; all are listed without it.")
    ] = None,
) -> None:
    """List the studies of this project, or run one by its name.

    \b
    Examples:
      medfocus study
      medfocus study busi
    """
    with terminal.at_work():
        from flows.cli import studies

        home = terminal.project()
        if name is not None:
            studies.run(studies.named(home, name))
            return
        columns = ("study", "params file", "data sets", "cells", "page")
        terminal.table(columns, [tuple(row) for row in studies.listed(home)])


@app.command()
def report(params: Params = Path("params.yaml")) -> None:
    """Write the page of a study that was run anew: reports/index.html.

    \b
    Example:
      medfocus report --params studies/mine.yaml
    """
    with terminal.at_work():
        from flows.study import open_study

        opened = open_study(params)
        with terminal.waiting("loading"):
            from flows.page import write_page
        print(write_page(opened))
