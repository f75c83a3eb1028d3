"""Compute masks and features in shards of images, on threads, processes or a Dask cluster, with Prefect.

A worker writes its results to the shared cache and returns the number of images. The stage then reads all
results from the cache. So every runner and every shard size gives the same bytes, and a killed worker loses
only its current shard.
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
    """Call ``work`` with ``job`` in a thread or process of the runner.

    PyTorch then computes with ``threads`` threads; 0 leaves its number of threads unchanged.
    """
    if threads:
        os.environ["OMP_NUM_THREADS"] = str(threads)  # in case torch is not imported yet
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(threads)
    return work(job)


def by_shards(
    work: Callable[[Job], int], jobs: Sequence[Job], scale: ScaleParams, progress: Callable[[int], object]
) -> None:
    """Call ``work`` with every job, and once more with each job that failed or lost its worker.

    Args:
        work: A module's function that writes to the shared cache and returns the number of images.
        jobs: Its arguments, which are pickled for another process.
        scale: The runner and the number of workers.
        progress: Called with the number of images of each finished job.

    Raises the first error of the second attempt.
    """
    failed = _attempt(work, jobs, scale, progress)
    for error in failed.values():
        print(f"a shard failed and runs again: {type(error).__name__}: {error}", file=sys.stderr)
    for error in _attempt(work, [jobs[number] for number in failed], scale, progress).values():
        raise error


def _attempt(
    work: Callable[[Job], int], jobs: Sequence[Job], scale: ScaleParams, progress: Callable[[int], object]
) -> dict[int, BaseException]:
    """Run every job once; return number -> error. Without jobs, no server starts."""
    if not jobs:
        return {}
    failed: dict[int, BaseException] = {}
    # The last bits of a mask's score depend on the number of threads, so workers use this process's number.
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
            "params.yaml: scale.runner is 'dask', but the package prefect-dask is not installed. Run "
            "pip install 'medfocusclip[dask]', or use another runner."
        ) from error
    if scale.address:
        return DaskTaskRunner(address=scale.address)
    # By default, the cluster's dashboard accepts connections from the whole network.
    settings = {"n_workers": scale.workers, "threads_per_worker": 1, "dashboard_address": "127.0.0.1:0"}
    return DaskTaskRunner(cluster_kwargs=settings)
