"""Orchestration: stages, flows, servers and the command line. It may import everything in medfocus."""

import ctypes
import os
import sys

# Libraries and their child processes send no usage data. They read these settings when they are imported.
os.environ |= {
    "DVC_NO_ANALYTICS": "1",
    "DO_NOT_TRACK": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
}
os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")  # Prefect's pages show the rest

# glibc returns the memory of every large array to the kernel and fetches it again for the next one. In the
# layers of a network, this takes up to half of the time. These settings keep up to 1 GiB.
if sys.platform == "linux" and hasattr(_libc := ctypes.CDLL(None), "mallopt"):
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h
    _libc.mallopt(M_MMAP_MAX, 0)
    _libc.mallopt(M_TRIM_THRESHOLD, 2**30)
