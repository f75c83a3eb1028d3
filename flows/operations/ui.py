"""Open MLflow's and Prefect's pages on loopback until interrupted."""

from __future__ import annotations

import signal
from pathlib import Path

from flows.servers.servers import HOST, PREFECT_PORT, mlflow_server, prefect_server
from flows.study.study import find_home
from medfocus.tracking import runs


def main() -> None:
    """Start both servers, say where they are, and wait."""
    home = find_home(Path.cwd())
    runs.start(None, home, "medfocus")  # makes the database, so that the server need not
    with prefect_server(), mlflow_server(home) as mlflow:
        print(f"MLflow:  {mlflow}\nPrefect: http://{HOST}:{PREFECT_PORT}\nCtrl-C ends both.", flush=True)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            signal.pause()
        except KeyboardInterrupt:
            print("Stopping.")


if __name__ == "__main__":
    main()
