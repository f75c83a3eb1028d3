"""Stage: cells of the study -> checkpoints. This stage reads only training images."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import multiprocessing
import os
import shutil
import signal
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from joblib import Parallel, delayed, parallel_config
from joblib.externals.loky import get_reusable_executor
from torch import nn
from tqdm import tqdm

from flows.study import costs, models
from flows.study.cells import Cell, methods_of, plan
from flows.study.dataset import EncodedDataset
from flows.study.methods import build_method, check_towers, choice_of
from flows.study.study import here
from medfocus.focus.controls import CONTROLS
from medfocus.learning import fitting
from medfocus.learning.method import Method, Support
from medfocus.learning.selection import Choice
from medfocus.methods import METHODS
from medfocus.serving import checkpoint
from medfocus.storage import atomic

if TYPE_CHECKING:
    from medfocus.clip.encoder import ClipEncoder


@dataclass(frozen=True)
class FitJob:
    """A cell, ready for a worker."""

    method: Method
    support: Support
    header: checkpoint.Header  # without its validation and calibration
    choice: Choice | None  # of settings; None if there is nothing to choose
    folds: int  # of the validation; 0 to skip it
    confidence: float  # of the sets of classes
    path: Path


def main(arguments: Sequence[str] | None = None) -> None:
    """Fit the cells that the cache lacks; publish exactly this study's checkpoints to data/checkpoints."""
    argparse.ArgumentParser(description=__doc__).parse_args(arguments)
    study = here()
    cells = plan(study.params)  # finds a typo in a method's settings before anything slow
    encoder = models.build_encoder(study)
    check_towers(study.params, encoder)
    published = study.paths.checkpoints
    for unfinished in published.parent.glob(".checkpoints.*"):  # of a killed run; DVC's lock allows one run
        shutil.rmtree(unfinished)
    temporary = published.with_name(f".checkpoints.{os.getpid()}")
    # The fits are many and small, so each takes one thread, and each core one process.
    with (
        warnings.catch_warnings(),
        _workers_that_end(),
        parallel_config("loky", n_jobs=os.cpu_count(), inner_max_num_threads=1),
        tqdm(total=len(cells), desc="fine-tune", unit="cell", disable=None) as bar,
    ):
        # loky restarts a worker with much memory, such as tokens of many images; no work is lost.
        warnings.filterwarnings("ignore", message="A worker stopped while some jobs", category=UserWarning)
        for name, of_dataset in groupby(cells, key=lambda cell: cell.dataset):
            dataset = EncodedDataset(study, name, encoder)
            paths = {cell: cached_path(dataset, cell) for cell in of_dataset}
            missing = [cell for cell, path in paths.items() if not atomic.is_sound(path)]
            bar.update(len(paths) - len(missing))
            fits = (delayed(fit)(job) for job in _prepared(dataset, {c: paths[c] for c in missing}))
            for _ in Parallel(return_as="generator_unordered")(fits):
                bar.update()
            for cell, path in paths.items():
                (temporary / cell.path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, temporary / cell.path)
    shutil.rmtree(published, ignore_errors=True)
    temporary.rename(published)


def fit(job: FitJob) -> None:
    """Validate and fit one cell and write its checkpoint, in a worker process."""
    torch.set_num_threads(1)
    _end_with_parent()
    seed = job.header.facts["seed"]
    validation = fitting.validate(job.method, job.support, job.choice, folds=job.folds, seed=seed)
    method, seconds, peak_mib = costs.measure(lambda: fitting.fit(job.method, job.support, job.choice, seed))
    header = dataclasses.replace(
        job.header,
        validation_correct=validation.correct,
        validation_count=validation.count,
        calibration=fitting.calibration(method, job.support, validation, job.confidence),
        settings=method.settings,
    )
    learnt = sum(value.numel() for value in method.state().values())
    costs.write(costs.FitCost(seconds, peak_mib, learnt, method.note), job.path)
    with atomic.sealed_file(job.path) as file:
        checkpoint.save(method, header, file)


@contextlib.contextmanager
def _workers_that_end() -> Iterator[None]:
    """End the worker processes after the block; idle ones keep memory and stop the caller from exiting."""
    try:
        yield
    finally:
        get_reusable_executor().shutdown(wait=True, kill_workers=True)


@cache
def _end_with_parent() -> None:
    """End this worker when its stage is killed; loky would wait for minutes.

    The worker ignores Ctrl-C, because the stage receives it too and ends the worker.
    """
    if multiprocessing.current_process().name.startswith("Loky"):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def cached_path(dataset: EncodedDataset, cell: Cell) -> Path:
    """Return the path of a cell's checkpoint in the cache, under a key of all that it depends on."""
    params = dataset.study.params
    settings = params.method(cell.method)[1]
    key = dataset.key(cell, settings, dataset.views(cell), _folds(dataset, cell))
    return dataset.study.cell_cache(key)


def _prepared(dataset: EncodedDataset, cells: Mapping[Cell, Path]) -> Iterator[FitJob]:
    """Yield the fits of cells; encode the images of a focus mode before its first cell."""
    params = dataset.study.params
    by_views: dict[tuple[str, int], list[Cell]] = {}  # (focus, number of views) -> cells
    for cell in cells:
        if METHODS[params.method(cell.method)[0]].learns:
            by_views.setdefault((cell.focus, dataset.views(cell)), []).append(cell)
    for cell, path in cells.items():
        views = dataset.views(cell)
        if same_views := by_views.get((cell.focus, views)):
            images = sorted({path for other in same_views for path in dataset.support_paths(other)})
            dataset.embed(methods_of(same_views), cell.focus, images, views, "encode")
        yield prepare(dataset, cell, path)


def prepare(dataset: EncodedDataset, cell: Cell, path: Path) -> FitJob:
    """Return the fit of a cell, whose support is already embedded; its checkpoint will be ``path``."""
    params = dataset.study.params
    encoder = dataset.encoder_for(cell.focus)
    kind, settings = params.method(cell.method)
    method = build_method(params, cell.method, encoder, flip=dataset.params.flip)
    header = checkpoint.Header(
        method=kind,
        settings=settings,
        classes=dataset.classes,
        focus=cell.focus,
        encoder_key=encoder.key,
        validation_correct=0,
        validation_count=0,
        facts={
            "support": cell.support,
            "seed": cell.seed,
            "n_train": len(dataset.support_paths(cell)),
            "key": path.stem,
        },
    )
    support = dataset.support(method, cell, dataset.views(cell))
    method.encoder = encoder_to_fit(method, encoder)
    choice = choice_of(params, cell.method)
    confidence = params.validation.confidence
    return FitJob(method, support, header, choice, _folds(dataset, cell), confidence, path)


def encoder_to_fit(method: Method, encoder: ClipEncoder) -> ClipEncoder:
    """Return the encoder with only the parts that ``fit`` uses, because they are copied to a worker."""
    if method.needs_towers:
        return dataclasses.replace(encoder, segmenter=None)
    model = nn.Module()
    if method.trained_blocks:
        tail = encoder.tail(method.trained_blocks)
        model.visual = tail.visual
        encoder = dataclasses.replace(encoder, skipped=tail.skipped)
    return dataclasses.replace(encoder, segmenter=None, tokenizer=None, model=model)


def _folds(dataset: EncodedDataset, cell: Cell) -> int:
    """Return the folds of a cell's validation; 0 for a cell that is neither validated nor calibrated.

    Refits of a method that runs an encoder cost as much as its fit, so such a method is validated only where
    it may be registered: at the largest support, if ``validation.methods`` names it. Controls, which are
    compared by accuracy, are not validated.
    """
    params = dataset.study.params
    method = build_method(params, cell.method, None)
    if cell.focus in CONTROLS or not method.learns:
        return 0
    registrable = cell.method in params.validation.methods and _is_largest(dataset, cell)
    return params.validation.folds if registrable or not method.runs_encoder else 0


def _is_largest(dataset: EncodedDataset, cell: Cell) -> bool:
    supports = dataset.splits.supports[cell.seed]
    return len(dataset.support_paths(cell)) == max(map(len, supports.values()))


if __name__ == "__main__":
    # Workers import the job's classes from this module, which must not be named __main__.
    from flows.stages.finetune import main as run

    run()
