"""Notices about failed runs: the kind of error and the run's page, and nothing about a patient."""

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

WEBHOOK = "MEDFOCUS_WEBHOOK"  # environment variable with the address for failures
LIMIT = 10.0  # seconds for the webhook, so that a finished run does not hang on it


def report_failure(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Report a flow run that failed or crashed; a hook of Prefect's flows."""
    report(flow.name, flow_run, state)


def report(flow: str, flow_run: FlowRun, state: State[Any]) -> None:
    """Post a failure as JSON to MEDFOCUS_WEBHOOK. If it is not set or fails, write one line to stderr.

    The notice has only the error's class, because the text may contain a patient's file name. Never raises.
    """
    notice = {
        "flow": flow,
        "run": flow_run.name,
        "state": state.name,
        "error": _kind(state),
        "page": _page(flow_run),
    }
    address = os.environ.get(WEBHOOK)
    fault = _post(address, notice) if address else None
    if not address or fault:
        suffix = f"; {WEBHOOK} failed ({fault})" if fault else ""
        line = "{flow}, run {run}: {state}, {error}, {page}".format(**notice)
        # Print, because the console handler of Prefect shows only Prefect's own faults.
        print(line + suffix, file=sys.stderr, flush=True)


def _kind(state: State[Any]) -> str | None:
    """Return the class of the error; CrashedRun if the process was killed and left no error."""
    try:
        error = state.result(raise_on_failure=False)
    except Exception:
        return None
    return type(unredacted(error)).__name__ if isinstance(error, BaseException) else None


def _page(flow_run: FlowRun) -> str | None:
    from prefect.utilities.urls import url_for

    return url_for("flow-run", obj_id=flow_run.id)


def _post(address: str, notice: dict[str, str | None]) -> str | None:
    """Post the notice within ``LIMIT`` seconds; return the fault, or None."""
    if not address.startswith(("http://", "https://")):
        return "not an http:// or https:// address"
    request = urllib.request.Request(
        address, json.dumps(notice).encode(), {"Content-Type": "application/json"}, method="POST"
    )
    faults: list[str | None] = []

    def send() -> None:
        try:
            with urllib.request.urlopen(request, timeout=LIMIT):
                faults.append(None)
        except Exception as error:  # only the class: the error may show the address and a secret in it
            faults.append(type(error).__name__)

    # urllib's timeout counts for each packet, so a server that sends single bytes could exceed it.
    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    thread.join(LIMIT)
    return faults[0] if faults else f"no answer in {LIMIT:g} s"
