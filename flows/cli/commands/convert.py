"""``medfocus convert``: MedMNIST and COCO files become folders that ``medfocus init`` reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from flows.cli import terminal

app = typer.Typer(
    rich_markup_mode=None,
    no_args_is_help=True,
    help="Convert MedMNIST and COCO files to folders of images.",
    epilog="Existing files are never overwritten, and an interrupted command leaves no partial folder.",
)

_SHOWN_FAULTS = 10  # faults to print; faults.csv has all

Out = Annotated[Path, typer.Argument(help="A new folder.")]


@app.command("medmnist")
def convert_medmnist(
    source: Annotated[str, typer.Argument(help="An .npz, or the name of a data set to download.")],
    out: Out,
    size: Annotated[int, typer.Option(help="Pixels per side of the downloaded images.")] = 28,
) -> None:
    """Write the images of MedMNIST to OUT/{train,val,test}/CLASS/NNNNN.png.

    The part of the file name before the first underscore is the name of the data set, which gives the names
    of the classes.

    \b
    Examples:
      medfocus convert medmnist pneumoniamnist_64.npz ../images/pneumonia
      medfocus convert medmnist breastmnist --size 224 ../images/breastmnist
    """
    with terminal.at_work():
        from medfocus.datasets import medmnist

        file = Path(source)
        if not file.is_file() and file.suffix != ".npz":
            with terminal.waiting("downloading"):
                file = medmnist.fetch(source, size)
        with _bar() as progress:
            counts = medmnist.convert(file, out, progress)
        labels = list(dict.fromkeys(label for part in counts.values() for label in part))
        rows = [(label, *(str(part[label]) for part in counts.values())) for label in sorted(labels)]
        terminal.table(("class", *counts), rows)
        if medmnist.guess_name(file) is None:
            terminal.tell(f"{file.name}: the name is no MedMNIST data set, so the classes get numbers.")
        print(f"written: {out}\nNext: medfocus init {out}")


@app.command("coco")
def convert_coco(
    annotations: Annotated[Path, typer.Argument(help="A JSON of COCO instances.")],
    out: Out,
    images: Annotated[
        Path | None, typer.Option(help="The folder of the images; default: the JSON's folder.")
    ] = None,
    label_from: Annotated[
        str,
        typer.Option(
            help="Source of the label: category, supercategory, or folder (the first in the file name)."
        ),
    ] = "category",
) -> None:
    """Write the images of a COCO file, their known regions as masks, and a table of their labels.

    An image without instances, or with instances of several categories, gets no label. Fill it in or delete
    the line.

    \b
    Examples:
      medfocus convert coco instances.json ../images/lesions --images images
      medfocus convert coco instances.json ../images/lesions --label-from supercategory
    """
    with terminal.at_work():
        from typing import cast

        from medfocus.datasets import coco
        from medfocus.datasets.faults import write_faults

        terminal.check_choice(label_from, coco.LabelFrom, "--label-from")
        with _bar() as progress:
            done = coco.convert(
                annotations, out, images, label_from=cast("coco.LabelFrom", label_from), progress=progress
            )
        rows = [(label or "(none)", str(count)) for label, count in sorted(done.labels.items())]
        terminal.table(("class", "images"), rows)
        for fault in done.faults[:_SHOWN_FAULTS]:
            terminal.tell(f"{fault.path}: {fault.fault}. {fault.fix}")
        if done.faults:
            write_faults(done.faults, out / "faults.csv")
            print(f"{len(done.faults)} faults: {out / 'faults.csv'}")
        print(f"{done.regions} known regions: {out / 'masks'}\nNext: medfocus init {out / 'list.csv'}")


@contextmanager
def _bar() -> Iterator[Callable[[int, int], object]]:
    """Show a bar and yield a function that takes the number of finished images and of all images."""
    with terminal.bar(0, "images") as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield progress
