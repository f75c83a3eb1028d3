"""The commands of ``medfocus``: what may be given, and what each says; the modules beside do the work."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from flows.cli import convert, terminal

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Begin with: medfocus doctor, then medfocus init IMAGES. "
    "Exit codes: 0 done, 1 something failed, 2 wrong usage, 130 interrupted.",
)


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(version("medfocusclip"))
        raise typer.Exit


@app.callback()
def medfocus(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Few-shot classification of medical images with region focus. For research; not for clinical use."""


Params = Annotated[Path, typer.Option("--params", "-p", help="A study's params file.", show_default=True)]


@app.command()
def init(
    data: Annotated[Path, typer.Argument(help="A folder of classes or of splits, or a table of paths.")],
    out: Annotated[Path | None, typer.Option(help="The file to write; studies/NAME.yaml without it.")] = None,
    name: Annotated[str | None, typer.Option(help="Of the data set; its folder's without it.")] = None,
    root: Annotated[
        Path | None, typer.Option(help="Of a table: the folder that holds it and the images.")
    ] = None,
    column: Annotated[
        list[str] | None, typer.Option(help="Of a table: what it calls ours, as label=Diagnosis.")
    ] = None,
    modality: Annotated[str | None, typer.Option(help="Where it is known; a guess without it.")] = None,
    patient_pattern: Annotated[
        str | None, typer.Option(help="A regular expression whose one group is the patient.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
) -> None:
    """Write a commented params file for a folder or a table of images.

    Every image is looked at; nothing is moved or changed. Folders are class/*.png or split/class/*.png,
    split being train, val or test. A table is CSV, with commas, semicolons or tabs, or Parquet.

    \b
    Examples:
      medfocus init ../images/chest
      medfocus init ../images/chest --modality chest_xray --patient-pattern 'person(\\d+)_'
      medfocus init ../images/list.csv --name clinic-a --column label=Diagnosis
    """
    with terminal.at_work():
        from typing import get_args

        from flows.cli import columns
        from flows.cli import init as work
        from flows.study.params import Modality, load_params

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
            columns=columns.given(column or ()),
            modality=modality,
            patient_pattern=patient_pattern,
            test_fraction=load_params(base).splits.test_fraction,
        )
        path = out or home / "studies" / f"{described.name}.yaml"
        work.write(described, path, base, force=force)
        terminal.table(("class", "in prompts", "train", "test"), work.summary(described))
        known = described.modality
        if described.manifest is None and described.root.resolve() != data.resolve():
            print(f"root: {described.root} ({data} only wraps it)")
        if described.columns:
            print(f"columns: {', '.join(f'{ours} is {name}' for ours, name in described.columns.items())}")
        print(f"modality: {known.modality} ({known.reason})")
        for warning in described.warnings:
            print(f"warning: {warning}")
        for fault in work.faults(described.found):
            terminal.tell(fault)
        print(f"\nwritten: {path}\nRead it, correct it, then: medfocus run --params {path}")


@app.command()
def new(folder: Annotated[Path, typer.Argument(help="It is made; or is empty of such files.")]) -> None:
    """Begin a project: a git repository with DVC and the embedded study. A clone is one already.

    \b
    Examples:
      medfocus new films
      cd films && medfocus init ../images/chest
    """
    with terminal.at_work():
        from flows.cli import new as work

        work.begin(folder)
        print(f"begun: {folder}\nGo there, then: medfocus run, or medfocus init IMAGES.")


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
        with terminal.waiting("reading"):
            rows = [tuple(row) for row in studies.listed(home)]
        terminal.table(("study", "params file", "data sets", "cells", "page"), rows)


@app.command()
def report(params: Params = Path("params.yaml")) -> None:
    """Write the page of a study that was run anew: reports/index.html.

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


@app.command()
def doctor() -> None:
    """Say what is wrong with this installation, and the fix.

    Looks at versions, device, project, stores, servers, caches and disk, and changes nothing. Ends with 1
    where there is a fault.

    \b
    Example:
      medfocus doctor
    """
    with terminal.at_work():
        from flows.cli import doctor as work

        with terminal.waiting("looking"):
            found = list(work.examine())
        terminal.table(("", "", "found"), [(each.what, each.state, each.said) for each in found])
        for each in found:
            if each.fix:
                print(f"{each.state}: {each.what}: {each.said}. {each.fix}")
        faults = sum(each.state == "fault" for each in found)
        print(f"{faults} faults" if faults != 1 else "1 fault")
    if faults:
        raise typer.Exit(1)


app.add_typer(convert.app, name="convert")
models = typer.Typer(
    rich_markup_mode=None,
    help="List, fetch, export and import models and weights.",
    epilog="Without a command they are listed. For a machine without a network: medfocus models fetch where "
    "there is one, then copy the hub cache; medfocus models export there, medfocus models import here.",
    invoke_without_command=True,
)
app.add_typer(models, name="models")


@models.callback()
def models_listed(context: typer.Context) -> None:
    """List what is registered and what is cached."""
    if context.invoked_subcommand is not None:
        return
    with terminal.at_work():
        home = terminal.project()
        with terminal.waiting("reading"):
            from flows.cli import models as work
            from medfocus.tracking import registry

            versions = registry.registered(home)
            weights = work.weights(home)
        if versions:
            rows = [
                (each.name, each.version, each.alias, each.created, each.tags.get("gate", ""))
                for each in versions
            ]
            terminal.table(("model", "version", "alias", "registered, UTC", "why"), rows)
        else:
            print("No model is registered: medfocus run makes one, medfocus models import brings one.")
        terminal.table(("weights", "setting", "where"), [tuple(each) for each in weights])


@models.command("fetch")
def models_fetch(
    names: Annotated[
        list[str] | None, typer.Argument(help="Weights; those that studies name without it.")
    ] = None,
) -> None:
    """Download weights, so that later runs need no network.

    For a machine without a network run it elsewhere and copy the hub cache; medfocus doctor says where
    it is.

    \b
    Examples:
      medfocus models fetch                                what the studies here name
      medfocus models fetch facebook/sam2.1-hiera-tiny     SAM2
      medfocus models fetch ViT-B-16:openai                a model of open_clip and its tag
      medfocus models fetch hf-hub:ORG/NAME                a CLIP on the hub
    """
    failed = False
    with terminal.at_work():
        from flows.cli import models as work

        wanted = names or list(dict.fromkeys(work.asked_for(terminal.project())))
        if not wanted:
            print("No study here names weights that are not in the package: nothing to fetch.")
        for name in wanted:
            try:
                print(f"{name}: {work.fetch(name)}")
            except (ValueError, OSError, ImportError) as error:
                terminal.tell(terminal.sentence(error))
                failed = True
    if failed:
        raise typer.Exit(1)


@models.command("export")
def models_export(
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
            from flows.cli import models as work

            told = work.export(terminal.project(), model, file)
        print(
            f"{told} -> {file}, {file.stat().st_size / 1e6:.1f} MB\nThere: medfocus models import {file.name}"
        )


@models.command("import")
def models_import(
    file: Annotated[Path, typer.Argument(help="What medfocus models export wrote.")],
    name: Annotated[str | None, typer.Option(help="To register it as; the file's name without it.")] = None,
) -> None:
    """Check an exported model and register it here.

    It is loaded once before, and does not become champion.

    \b
    Example:
      medfocus models import breast.zip --name medfocus-breast
    """
    with terminal.at_work():
        with terminal.waiting("checking"):
            from flows.cli import models as work
            from flows.cli.init import slug

            made = work.bring(terminal.project(), file, name or slug(file.stem))
        print(f"{made.name} version {made.version}: {made.reason}")
        print(f"Use it: medfocus predict FILES --out DIR --model {made.name}@{made.version}")


@models.command("card")
def models_card(
    model: Annotated[str, typer.Argument(help="NAME, or NAME@VERSION.")],
    sheet: Annotated[bool, typer.Option("--sheet", help="The data sheet instead.")] = False,
) -> None:
    """Print a version's model card: what it is for, what it scores, where it fails.

    \b
    Examples:
      medfocus models card medfocus-phantom-breast
      medfocus models card medfocus-phantom-breast@1 --sheet
    """
    with terminal.at_work():
        from flows.cli import models as work
        from medfocus.reports.data_sheet import SHEET
        from medfocus.reports.model_card import CARD

        chosen = work.choose(terminal.project(), model)
        print(chosen.text(SHEET if sheet else CARD), end="")


Files = Annotated[list[Path], typer.Argument(help="Images, or folders of them.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="A folder for the table and the images.")]
Model = Annotated[
    str | None, typer.Option("--model", "-m", help="NAME, NAME@VERSION or a model folder; else the only one.")
]
Force = Annotated[bool, typer.Option("--force", help="Write over a table that is there.")]


@app.command()
def predict(files: Files, out: Out, model: Model = None, force: Force = False) -> None:
    """Say the class of images, with their masks drawn in.

    A line each in predictions.csv, with every probability. Without a version the model is the champion or,
    where there is none, the newest.

    \b
    Examples:
      medfocus predict scan1.png scan2.png --out answers
      medfocus predict ../new-images --out answers --model medfocus-phantom-breast
    """
    _with_a_model("predict", files, out, model, force)


@app.command()
def explain(files: Files, out: Out, model: Model = None, force: Force = False) -> None:
    """Show where in an image an answer came from.

    A sheet each, and a line each in explanations.csv.

    \b
    Example:
      medfocus explain scan1.png --out why --model medfocus-phantom-breast
    """
    _with_a_model("explain", files, out, model, force)


@app.command()
def masks(
    files: Files,
    out: Out,
    params: Params = Path("params.yaml"),
    dataset: Annotated[str | None, typer.Option(help="Whose settings; the first one's without it.")] = None,
    force: Force = False,
) -> None:
    """Find the region of images without any label.

    Of each its mask and the image with it drawn in, and a line in masks.csv.

    \b
    Examples:
      medfocus masks scan1.png --out masks
      medfocus masks ../new-images --out masks --params studies/mine.yaml
    """
    with terminal.at_work():
        from flows.cli import images as work
        from flows.study import models
        from flows.study.params import load_params
        from flows.study.study import Study
        from medfocus.masks.store import MaskStore

        loaded = load_params(params)
        name = dataset or next(iter(loaded.datasets))
        if name not in loaded.datasets:
            known = ", ".join(loaded.datasets)
            raise typer.BadParameter(f"{params} has no {name!r}, but {known}.", param_hint="--dataset")
        folder = work.Folder(out, work.MASKS, force=force)
        study = Study(params.resolve().parent, terminal.project(), loaded)
        with terminal.waiting("loading the segmenter"):
            segmenter = models.build_segmenter(study, name)
        given = work.Images(files, "masks")
        store = MaskStore(study.shared_cache("masks"))
        done = work.masks(segmenter, store, given, folder, batch_size=loaded.masks.batch_size)
        print(f"{done} masks: {folder.table}" if done else "no mask was made")
    if given.failed:
        raise typer.Exit(1)


@app.command("app")
def workstation(
    model: Model = None,
    port: Annotated[int, typer.Option(help="0 takes a free one.", min=0, max=65535)] = 8600,
    host: Annotated[
        str, typer.Option(help="Beyond loopback a password is asked for: MEDFOCUS_APP_PASSWORD.")
    ] = "127.0.0.1",
    no_browser: Annotated[bool, typer.Option("--no-browser", help="Open none.")] = False,
) -> None:
    """Show a page where images are read and their masks corrected, until Ctrl-C.

    It listens on this machine alone. Images stay in its memory, and no longer than they are looked at.

    \b
    Examples:
      medfocus app
      medfocus app --model medfocus-phantom-brain@1 --port 0 --no-browser
    """
    with terminal.at_work():
        with terminal.waiting("loading the model"):
            from flows.cli import workstation as work

            secret, bound = work.password(host, os.environ), work.listening(host, port)
            reader, about = work.load(_home_of(model), model)
        terminal.tell(f"model: {about.model} {about.version}".rstrip())
        work.serve(reader, about, bound, host, secret, browser=not no_browser)


def _home_of(model: str | None) -> Path:
    """The project whose registry knows a model; a model folder needs none."""
    return terminal.project() if model is None or not Path(model).is_dir() else Path.cwd()


def _with_a_model(what: str, files: list[Path], out: Path, model: str | None, force: bool) -> None:
    with terminal.at_work():
        from flows.cli import images as work

        table = {"predict": work.PREDICTIONS, "explain": work.EXPLANATIONS}[what]
        folder = work.Folder(out, table, force=force)
        given = work.Images(files, what)
        with terminal.waiting("loading the model"):
            from flows.cli import models as registry
            from medfocus.serving.predictor import Predictor

            with registry.opened(_home_of(model), model) as (told, place):
                predictor = Predictor.load(place)
        terminal.tell(f"model: {told}. For research; not for clinical use.")
        done = {"predict": work.predict, "explain": work.explain}[what](predictor, given, folder)
        print(f"{done} of {done + given.failed}: {folder.table}" if done else "no image could be read")
    if given.failed:
        raise typer.Exit(1)
