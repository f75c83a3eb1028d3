"""The commands on a project and its studies: init, new, run, study, report, doctor."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli import terminal

if TYPE_CHECKING:
    from flows.cli.init.dataset import Described

Params = Annotated[Path, typer.Option("--params", "-p", help="A study's params file.", show_default=True)]


def init(
    data: Annotated[Path, typer.Argument(help="A folder of classes or of splits, or a table of paths.")],
    out: Annotated[Path | None, typer.Option(help="The file to write; default: studies/NAME.yaml.")] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the data set; default: the name of its folder.")
    ] = None,
    root: Annotated[
        Path | None, typer.Option(help="For a table: the folder that contains it and the images.")
    ] = None,
    column: Annotated[
        list[str] | None, typer.Option(help="For a table: the name of a column, such as label=Diagnosis.")
    ] = None,
    modality: Annotated[str | None, typer.Option(help="The modality; default: a guess.")] = None,
    patient_pattern: Annotated[
        str | None, typer.Option(help="A regular expression with one group, the patient.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
) -> None:
    """Write a commented params file for a folder or a table of images.

    The command reads every image and changes none. Folders are class/*.png or split/class/*.png, where split
    is train, val or test. A table is CSV, with commas, semicolons or tabs, or Parquet.

    \b
    Examples:
      medfocus init ../images/chest
      medfocus init ../images/chest --modality chest_xray --patient-pattern 'person(\\d+)_'
      medfocus init ../images/list.csv --name clinic-a --column label=Diagnosis
    """
    with terminal.at_work():
        from flows.cli.init import columns, dataset, params_file
        from flows.study.params import Modality, load_params

        terminal.check_choice(modality, Modality, "--modality")
        if name is not None and name != dataset.slug(name):
            raise typer.BadParameter(
                f"{name!r} may have only letters, digits, - and _. Try {dataset.slug(name)!r}.",
                param_hint="--name",
            )
        home = terminal.project()
        base = home / "params.yaml"
        described = dataset.describe(
            data,
            home=home,
            root=root,
            name=name,
            columns=columns.parse(column or ()),
            modality=modality,
            patient_pattern=patient_pattern,
            test_fraction=load_params(base).splits.test_fraction,
        )
        path = out or home / "studies" / f"{described.name}.yaml"
        params_file.write(described, path, base, force=force)
        _print_described(described, data)
        print(f"\nwritten: {path}\nRead it, correct it, then: medfocus run --params {path}")


def _print_described(described: Described, data: Path) -> None:
    terminal.table(("class", "in prompts", "train", "test"), described.summary())
    if described.manifest is None and described.root.resolve() != data.resolve():
        print(f"root: {described.root} ({data} contains only this folder)")
    if described.columns:
        print(f"columns: {', '.join(f'{ours} is {theirs}' for ours, theirs in described.columns.items())}")
    print(f"modality: {described.modality.modality} ({described.modality.reason})")
    for warning in described.warnings:
        print(f"warning: {warning}")
    for fault in described.faults():
        terminal.tell(fault)


def new(
    folder: Annotated[Path, typer.Argument(help="The project's folder; it may exist without a project.")],
) -> None:
    """Create a project: a git repository with DVC and the embedded study. A clone is already a project.

    \b
    Examples:
      medfocus new films
      cd films && medfocus init ../images/chest
    """
    with terminal.at_work():
        from flows.cli.new import create_project

        create_project(folder)
        print(f"created: {folder}\nChange to this folder, then: medfocus run, or medfocus init IMAGES.")


def run(params: Params = Path("params.yaml")) -> None:
    """Run a study: ingest, split, mask, fine-tune, evaluate, register. Finished steps are skipped.

    \b
    Examples:
      medfocus run                               the embedded data
      medfocus run --params studies/mine.yaml    a file from medfocus init
    """
    with terminal.at_work():
        from flows.cli import studies

        studies.run(params)


def study(
    name: Annotated[str | None, typer.Argument(help="Name of a study; without it, all are listed.")] = None,
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
            studies.run(studies.params_file(home, name))
            return
        with terminal.waiting("reading"):
            rows = list(studies.rows(home))
        terminal.table(("study", "params file", "data sets", "cells", "page"), rows)


def report(params: Params = Path("params.yaml")) -> None:
    """Write the page of an evaluated study again: reports/index.html.

    \b
    Example:
      medfocus report --params studies/mine.yaml
    """
    with terminal.at_work():
        from flows.study.study import open_study

        opened = open_study(params)
        with terminal.waiting("loading"):
            from flows.release.page import write_page
        print(write_page(opened))


def doctor() -> None:
    """Check this installation and print a fix for each fault.

    Checks versions, device, project, stores, servers, caches and disk, and changes nothing. The exit code is
    1 if there is a fault.

    \b
    Example:
      medfocus doctor
    """
    with terminal.at_work():
        from flows.cli.doctor import examine

        with terminal.waiting("checking"):
            findings = list(examine())
        terminal.table(("", "", "result"), [(each.subject, each.state, each.text) for each in findings])
        for each in findings:
            if each.fix:
                print(f"{each.state}: {each.subject}: {each.text}. {each.fix}")
        faults = sum(each.state == "fault" for each in findings)
        print(f"{faults} faults" if faults != 1 else "1 fault")
    if faults:
        raise typer.Exit(1)
