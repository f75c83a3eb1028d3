"""Masks and features by shards of images: on threads, processes or a Dask cluster, by Prefect.

A worker puts what it makes into the shared cache and returns how many images it has seen to; the stage then
goes on as if all had been there before. So every runner and every size of shards gives the same bytes, and a
worker that dies loses nothing but what it was at.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.futures import as_completed
from prefect.task_runners import ProcessPoolTaskRunner, TaskRunner, ThreadPoolTaskRunner

from flows.servers.prefect import prefect_api
from medfocus.storage.redaction import redacted, unredacted

if TYPE_CHECKING:
    from flows.study.params import ScaleParams

Job = TypeVar("Job")


@task(cache_policy=NO_CACHE, task_run_name="{work.__name__} {number}")
@redacted
def shard(work: Callable[[Any], int], job: object, number: int, threads: int) -> int:
    """One shard: ``work`` on ``job``, in whatever thread or process the runner has for it.

    Its torch computes with so many ``threads``; 0 leaves that as it is.
    """
    if threads:
        os.environ["OMP_NUM_THREADS"] = str(threads)  # for a torch that is still to be imported
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(threads)
    return work(job)


def by_shards(
    work: Callable[[Job], int], jobs: Sequence[Job], scale: ScaleParams, progress: Callable[[int], object]
) -> None:
    """Do ``work`` on every job, each on its own, and again once where it failed or its worker died.

    Args:
        work: A function of a module; returns the number of images seen to. What it makes lies in a cache
            that all workers share.
        jobs: What it is called with; pickled for another process.
        scale: Which runner, and how many workers.
        progress: Called with the number of images seen to since its last call.

    Raises the first error of a second attempt.
    """
    failed = _attempt(work, jobs, scale, progress)
    for error in failed.values():
        print(f"a shard is done again: {type(error).__name__}: {error}", file=sys.stderr)
    for error in _attempt(work, [jobs[number] for number in failed], scale, progress).values():
        raise error


def _attempt(
    work: Callable[[Job], int], jobs: Sequence[Job], scale: ScaleParams, progress: Callable[[int], object]
) -> dict[int, BaseException]:
    """Every job once; number -> what went wrong. Without a job no server is started."""
    if not jobs:
        return {}
    failed: dict[int, BaseException] = {}
    # As many as here: the last bits of a mask's score depend on it.
    threads = sys.modules["torch"].get_num_threads() if "torch" in sys.modules and not scale.address else 0

    @flow(name=f"shards of {work.__name__}", task_runner=_runner(scale))
    @redacted
    def shards() -> None:
        futures = {shard.submit(work, job, number, threads): number for number, job in enumerate(jobs)}
        for future in as_completed(list(futures)):
            try:
                progress(future.result())
            except Exception as error:
                failed[futures[future]] = unredacted(error)

    with prefect_api():
        shards()
    return failed


def _runner(scale: ScaleParams) -> TaskRunner[Any]:
    if scale.runner == "threads":
        return ThreadPoolTaskRunner(max_workers=scale.workers)
    if scale.runner == "processes":
        return ProcessPoolTaskRunner(max_workers=scale.workers)
    try:
        from prefect_dask.task_runners import DaskTaskRunner
    except ImportError as error:
        raise ImportError(
            "params.yaml: scale.runner is 'dask', and the package prefect-dask is not installed; run "
            "pip install 'medfocusclip[dask]', or take another runner."
        ) from error
    if scale.address:
        return DaskTaskRunner(address=scale.address)
    # By itself the page of a cluster would answer to the whole network.
    own = {"n_workers": scale.workers, "threads_per_worker": 1, "dashboard_address": "127.0.0.1:0"}
    return DaskTaskRunner(cluster_kwargs=own)
