"""Which faults pass by themselves: another run holds a stage, or a server does not answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prefect.cache_policies import NO_CACHE
from prefect.tasks import exponential_backoff

from flows.stages.dvc import StageBusyError
from medfocus.storage.redaction import unredacted

if TYPE_CHECKING:
    from prefect.client.schemas.objects import State, TaskRun


def is_passing(error: BaseException) -> bool:
    """Whether a later try may do better; an image that cannot be read stays unreadable."""
    import httpx
    import requests

    # No TimeoutError: Prefect's own, of a flow whose time is over, is one too.
    passing = (
        *(StageBusyError, ConnectionError, httpx.TransportError),
        *(requests.ConnectionError, requests.Timeout),
    )
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        if isinstance(cause, passing):
            return True
        seen.add(id(cause))
        cause = cause.__cause__ or cause.__context__
    return False


async def _passes(task: Any, run: TaskRun, state: State[Any]) -> bool:
    try:
        await state.aresult()
    except BaseException as error:
        return is_passing(unredacted(error))
    return False


# The options of a task. No cache policy but DVC: Prefect's keys know nothing of files or of the code that a
# task calls. Waits 5, 10, 20 ... 160 s, some five minutes in all.
PATIENT = {
    "cache_policy": NO_CACHE,
    "retries": 6,
    "retry_delay_seconds": exponential_backoff(5),
    "retry_condition_fn": _passes,
}
