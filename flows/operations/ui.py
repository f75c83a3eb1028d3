"""MLflow's and Prefect's pages on loopback, until Ctrl-C."""

from __future__ import annotations

import signal
from pathlib import Path

from flows.servers.mlflow import mlflow_server
from flows.servers.prefect import PREFECT_PORT, prefect_server
from flows.servers.processes import HOST
from flows.study.study import find_home
from medfocus.tracking import runs


def main() -> None:
    """Start both servers, print their addresses, and wait."""
    home = find_home(Path.cwd())
    runs.start(None, home, "medfocus")  # creates the database before the server needs it
    with prefect_server(), mlflow_server(home) as mlflow:
        print(f"MLflow:  {mlflow}\nPrefect: http://{HOST}:{PREFECT_PORT}\nCtrl-C stops both.", flush=True)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            signal.pause()
        except KeyboardInterrupt:
            print("Stopping.")


if __name__ == "__main__":
    main()
