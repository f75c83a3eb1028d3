"""``medfocus convert``: collections in formats of their own -> folders that ``medfocus init`` reads."""

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
    help="Make folders that medfocus init reads from MedMNIST and COCO files.",
    epilog="Nothing is written over, and what is interrupted leaves no half folder.",
)

_TOLD = 10  # faults that are printed; all are in the file

Out = Annotated[Path, typer.Argument(help="A folder that is not there yet.")]


@app.command()
def medmnist(
    source: Annotated[str, typer.Argument(help="An .npz, or the name of a set, which is then fetched.")],
    out: Out,
    size: Annotated[int, typer.Option(help="Pixels a side of a set that is fetched.")] = 28,
) -> None:
    """Write the images of MedMNIST to OUT/{train,val,test}/CLASS/NNNNN.png.

    The classes are known by the name of the set, which is the file's up to the first _.

    \b
    Examples:
      medfocus convert medmnist pneumoniamnist_64.npz ../images/pneumonia
      medfocus convert medmnist breastmnist --size 224 ../images/breastmnist
    """
    with terminal.at_work():
        from medfocus.datasets import medmnist as work

        file = Path(source)
        if not file.is_file() and file.suffix != ".npz":
            with terminal.waiting("fetching"):
                file = work.fetch(source, size)
        with _bar() as progress:
            counts = work.convert(file, out, progress)
        labels = list(dict.fromkeys(label for of in counts.values() for label in of))
        rows = [(label, *(str(of[label]) for of in counts.values())) for label in sorted(labels)]
        terminal.table(("class", *counts), rows)
        if work.guess_name(file) is None:
            terminal.tell(f"{file.name}: is named after no set of MedMNIST, so its classes have no names.")
        print(f"written: {out}\nNext: medfocus init {out}")


@app.command()
def coco(
    annotations: Annotated[Path, typer.Argument(help="A JSON of COCO instances.")],
    out: Out,
    images: Annotated[
        Path | None, typer.Option(help="The folder of the images; the JSON's own without it.")
    ] = None,
    label_from: Annotated[
        str, typer.Option(help="What a label is: category, supercategory, or folder (a file name's first).")
    ] = "category",
) -> None:
    """Write the images of a COCO file, their known regions as masks, and a table of their labels.

    An image whose instances are of several categories, or that has none, gets no label: fill it in, or leave
    it out.

    \b
    Examples:
      medfocus convert coco instances.json ../images/lesions --images images
      medfocus convert coco instances.json ../images/lesions --label-from supercategory
    """
    with terminal.at_work():
        from typing import cast, get_args

        from medfocus.datasets import coco as work
        from medfocus.datasets.faults import write_faults

        if label_from not in get_args(work.LabelFrom):
            known = ", ".join(get_args(work.LabelFrom))
            raise typer.BadParameter(f"{label_from!r} is none of {known}.", param_hint="--label-from")
        with _bar() as progress:
            done = work.convert(
                annotations, out, images, label_from=cast("work.LabelFrom", label_from), progress=progress
            )
        rows = [(label or "(none)", str(count)) for label, count in sorted(done.labels.items())]
        terminal.table(("class", "images"), rows)
        for fault in done.faults[:_TOLD]:
            terminal.tell(f"{fault.path}: {fault.fault}. {fault.fix}")
        if done.faults:
            write_faults(done.faults, out / "faults.csv")
            print(f"{len(done.faults)} faults: {out / 'faults.csv'}")
        print(f"{done.regions} known regions: {out / 'masks'}\nNext: medfocus init {out / 'list.csv'}")


@contextmanager
def _bar() -> Iterator[Callable[[int, int], object]]:
    """What is called with the images done and all of them, and shows it."""
    with terminal.bar(0, "images") as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield progress
