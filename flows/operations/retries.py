"""Retries of tasks after temporary faults: another run holds a stage, or a server does not answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prefect.cache_policies import NO_CACHE
from prefect.tasks import exponential_backoff

from flows.operations.failures import causes
from flows.stages.dvc import StageBusyError
from medfocus.storage.redaction import unredacted

if TYPE_CHECKING:
    from prefect.client.schemas.objects import State, TaskRun


def is_passing(error: BaseException) -> bool:
    """Return whether a retry can help; an unreadable image, for example, stays unreadable."""
    import httpx
    import requests

    # TimeoutError is not here, because Prefect also raises it when a flow exceeds its time limit.
    passing = (
        *(StageBusyError, ConnectionError, httpx.TransportError),
        *(requests.ConnectionError, requests.Timeout),
    )
    return any(isinstance(cause, passing) for cause in causes(error))


async def _passes(task: Any, run: TaskRun, state: State[Any]) -> bool:
    try:
        await state.aresult()
    except BaseException as error:
        return is_passing(unredacted(error))
    return False


# Options of a task. Only DVC caches, because Prefect's cache keys know neither the files nor the code that a
# task calls. The waits are 5, 10, 20 ... 160 s, about five minutes in all.
PATIENT = {
    "cache_policy": NO_CACHE,
    "retries": 6,
    "retry_delay_seconds": exponential_backoff(5),
    "retry_condition_fn": _passes,
}
