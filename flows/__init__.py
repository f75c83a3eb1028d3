"""Orchestration: stages, flows, servers and the command line. It may import everything in medfocus."""

import os

# Prefect reads these settings when it is imported.
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")  # Prefect's pages show the rest
