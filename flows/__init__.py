"""Orchestration: the stages of the pipeline and the flow over them."""

import os

# Prefect reads its settings from the environment when it is imported.
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")  # the pages show the rest
