"""Orchestration: stages, flows, servers and the command line. It may import everything in medfocus."""

import os

# Libraries and their child processes send no usage data. They read these settings when they are imported.
os.environ |= {
    "DVC_NO_ANALYTICS": "1",
    "DO_NOT_TRACK": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
}
os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")  # Prefect's pages show the rest
