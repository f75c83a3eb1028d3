"""MLflow's scoring server under load, compared with bare `Predictor.predict`.

A classifier is fitted on a few phantoms with the pocket models, registered, and served by `mlflow models
serve` on loopback. Clients in threads send images in base64 and wait for the answer. The reference predicts
the same images with the same model in this process, in batches of the same size. Both alternate, so that a
slower machine affects both. The ratio of the image rates is the median over repetitions, with one thread of
PyTorch. A latency is the time that a client waits, including the turns of other clients.

    python -m benchmarks.serving
    python -m benchmarks.serving --clients 1 --images 64
"""

from __future__ import annotations

import argparse
import base64
import http.client
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

from flows.servers.processes import HOST, answers, free_port, running
from medfocus import phantoms
from medfocus.phantoms import png
from medfocus.serving.model_folder import load_model
from medfocus.serving.predictor import Predictor
from medfocus.tracking import registry, runs

MODALITY = "breast_ultrasound"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--images", type=int, default=128, help="images in a repetition")
    parser.add_argument("--size", type=int, default=512, help="pixels a side")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16], help="images per request")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # of the server
    import torch

    torch.set_num_threads(1)
    images = [png.encode(_drawn("test", i, options.size)) for i in range(options.images)]
    result: dict[str, object] = {
        "clients": options.clients,
        "images": options.images,
        "load_average": round(os.getloadavg()[0], 1),
    }
    with tempfile.TemporaryDirectory() as place:
        home, model = Path(place, "home"), Path(place, "model")
        uri = _registered(home, model)
        predictor = load_model(model)
        predictor.predict(images[:1])
        began = time.perf_counter()
        with model_server(uri, "models:/benchmark@champion", free_port()) as address:
            result["start_s"] = round(time.perf_counter() - began, 1)
            _post(address, _body(images[:1], True))
            print(
                f"{options.clients} clients, {options.images} images of {options.size} px a repetition, "
                f"{options.repeats} repetitions; load average before: {result['load_average']}; the server "
                f"was up after {result['start_s']} s"
            )
            print("images per request  overlay  p50 s  p95 s  images/s  bare images/s  ratio")
            for batch, overlay in product(options.batches, (True, False)):
                measured = _compare(predictor, address, images, batch, overlay, options)
                name = f"batch_{batch}_{'overlay' if overlay else 'plain'}"
                result |= {f"{key}_{name}": value for key, value in measured.items()}
                print(
                    f"{batch:18}  {'yes' if overlay else 'no':7}  {measured['p50_s']:5.2f}  "
                    f"{measured['p95_s']:5.2f}  {measured['rate']:10.1f}  {measured['bare_rate']:15.1f}  "
                    f"{measured['ratio']:5.2f}",
                    flush=True,
                )
    if options.json:
        print(json.dumps(result))


@contextmanager
def model_server(store: str, model: str, port: int, log: Path | None = None) -> Iterator[str]:
    """Run MLflow's scoring server on loopback for the ``with`` block, in this environment; yield its address.

    Args:
        store: The tracking URI of the registry.
        model: For example ``models:/NAME@champion``.
        port: The port.
        log: The server's log file.
    """
    command = [
        *(sys.executable, "-m", "mlflow", "models", "serve", "--model-uri", model, "--env-manager", "local"),
        *("--host", HOST, "--port", str(port)),
    ]
    environment = {
        "MLFLOW_TRACKING_URI": store,
        "MLFLOW_LOGGING_LEVEL": "ERROR",  # warnings would log the names of unknown columns
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # MLflow runs `uvicorn`
    }
    address = f"http://{HOST}:{port}"
    with tempfile.TemporaryDirectory() as temporary:  # the server leaves its files behind
        environment["TMPDIR"] = temporary
        fault = f"The scoring server does not answer at {address}; is its port taken?"
        with running(command, environment, lambda: answers(f"{address}/ping"), fault, log=log):
            yield address


def _compare(
    predictor: Predictor,
    address: str,
    images: Sequence[bytes],
    batch: int,
    overlay: bool,
    options: argparse.Namespace,
) -> dict[str, float]:
    """Return latencies, and both rates in images per second."""
    parts = [images[start : start + batch] for start in range(0, len(images), batch)]
    bodies = [_body(part, overlay) for part in parts]
    latencies: list[float] = []
    seconds: list[tuple[float, float]] = []
    for _ in range(options.repeats):
        began = time.perf_counter()
        for part in parts:
            predictor.predict(part, overlay=overlay)
        bare = time.perf_counter() - began
        began = time.perf_counter()
        with ThreadPoolExecutor(options.clients) as pool:
            latencies += pool.map(lambda body: _post(address, body), bodies)
        seconds.append((bare, time.perf_counter() - began))
    bare_s, served_s = np.array(seconds).T
    p50, p95 = np.quantile(latencies, [0.5, 0.95])
    return {
        "p50_s": round(float(p50), 3),
        "p95_s": round(float(p95), 3),
        "rate": round(len(images) / float(np.median(served_s)), 2),
        "bare_rate": round(len(images) / float(np.median(bare_s)), 2),
        "ratio": round(float(np.median(bare_s / served_s)), 3),
    }


def _body(images: Sequence[bytes], overlay: bool) -> bytes:
    rows = [{"image": base64.b64encode(data).decode()} for data in images]
    return json.dumps({"dataframe_records": rows, "params": {"overlay": overlay}}).encode()


def _post(address: str, body: bytes) -> float:
    """Return the seconds until the answer is complete."""
    place = urlsplit(address)
    began = time.perf_counter()
    connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=120)
    connection.request("POST", "/invocations", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    answer = response.read()
    connection.close()
    if response.status != 200:
        raise SystemExit(f"the server answered {response.status}: {answer[:500]!r}")
    return time.perf_counter() - began


def _registered(home: Path, model: Path) -> str:
    """Save a small classifier in a folder and register it; return the registry's URI."""
    from medfocus import MedFocusCLIP

    labels = [label for label in phantoms.MODALITIES[MODALITY] for _ in range(8)]
    drawn = [_drawn("train", i, 192, label) for i, label in enumerate(labels)]
    MedFocusCLIP(modality=MODALITY).fit(drawn, labels).save(model)
    store = runs.start(None, home, "benchmark")
    registry.register(
        store,
        "benchmark",
        lambda folder: shutil.copytree(model, folder),
        cell_key="benchmark",
        judge=lambda champion: registry.Verdict(True, "for a benchmark", {}),
        classes=sorted(set(labels)),
        example=png.encode(drawn[0]),
        tags={},
    )
    return store.uri


def _drawn(split: str, number: int, size: int, label: str | None = None) -> np.ndarray:
    label = label or phantoms.MODALITIES[MODALITY][number % 3]
    random = phantoms.generator(0, MODALITY, split, label, number)
    return phantoms.draw(MODALITY, label, random, size).image


if __name__ == "__main__":
    main()
