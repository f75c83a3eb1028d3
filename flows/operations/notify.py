"""What a failed run tells a person: its kind of error and its page, and nothing about a patient."""

from __future__ import annotations

import json
import os
import sys
import threading
import urllib.request
from typing import TYPE_CHECKING, Any

from medfocus.storage.redaction import unredacted

if TYPE_CHECKING:
    from prefect import Flow
    from prefect.client.schemas.objects import FlowRun, State

WEBHOOK = "MEDFOCUS_WEBHOOK"  # environment: the address that a failure is posted to
LIMIT = 10.0  # seconds that a webhook may take; the run is over by then and must not hang on it


def report_failure(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Tell of a flow run that failed or crashed; a hook of Prefect's flows."""
    tell(flow.name, flow_run, state)


def tell(flow: str, flow_run: FlowRun, state: State[Any]) -> None:
    """Post a failure to MEDFOCUS_WEBHOOK as JSON, or write it to stderr as one line where that is not set.

    An error's text may hold a file name, and that a patient's: only its class is told. Nothing here raises.
    """
    report = {
        "flow": flow,
        "run": flow_run.name,
        "state": state.name,
        "error": _kind(state),
        "page": _page(flow_run),
    }
    address = os.environ.get(WEBHOOK)
    failed = _post(address, report) if address else None
    if not address or failed:
        told = f"; {WEBHOOK} did not take it ({failed})" if failed else ""
        line = "{flow}, run {run}: {state}, {error}, {page}".format(**report)
        print(line + told, file=sys.stderr, flush=True)  # Prefect's console handler is for its own faults


def _kind(state: State[Any]) -> str | None:
    """The class of the error; CrashedRun where the process was killed and left none."""
    try:
        error = state.result(raise_on_failure=False)
    except Exception:
        return None
    return type(unredacted(error)).__name__ if isinstance(error, BaseException) else None


def _page(flow_run: FlowRun) -> str | None:
    from prefect.utilities.urls import url_for

    return url_for("flow-run", obj_id=flow_run.id)


def _post(address: str, report: dict[str, str | None]) -> str | None:
    """Send it within ``LIMIT`` seconds, whatever the other side does; what went wrong, if anything did."""
    if not address.startswith(("http://", "https://")):
        return "it is no http:// or https:// address"
    request = urllib.request.Request(
        address, json.dumps(report).encode(), {"Content-Type": "application/json"}, method="POST"
    )
    outcome: list[str | None] = []

    def send() -> None:
        try:
            with urllib.request.urlopen(request, timeout=LIMIT):
                outcome.append(None)
        except Exception as error:  # the address may hold a secret, and the error the address
            outcome.append(type(error).__name__)

    # urllib's own limit is one for each packet: a server that sends a byte now and then would outlast it.
    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    thread.join(LIMIT)
    return outcome[0] if outcome else f"no answer in {LIMIT:g} s"
