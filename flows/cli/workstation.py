"""``medfocus app``: a model in a web page on this machine."""

from __future__ import annotations

import os
import socket
import sys
import webbrowser
from collections.abc import Mapping
from pathlib import Path

import uvicorn

from flows.cli import models, terminal
from medfocus.app.guard import Guard, access_to, is_loopback
from medfocus.app.reading import Reader
from medfocus.app.server import NOTICE, About, Workplace, build
from medfocus.serving.model_folder import load_model

PASSWORD = "MEDFOCUS_APP_PASSWORD"


def password(host: str, environment: Mapping[str, str]) -> str | None:
    """Return the page's password; on loopback, None if the environment has no password.

    Raises ValueError if the page should listen beyond loopback and the environment has no password.
    """
    secret = environment.get(PASSWORD)
    if not secret and not is_loopback(host):
        raise ValueError(
            f"--host {host} is beyond loopback, where the page needs a password, and there is no default. "
            f"Set {PASSWORD} in the environment."
        )
    return secret or None


def listening(host: str, port: int) -> socket.socket:
    """Return a socket on this address; port 0 means a free port. Raises OSError if the port is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise OSError(
            f"cannot listen on {host}:{port} ({error.strerror}). Give another --port, or 0."
        ) from error
    return bound


def load(home: Path, model: str | None) -> tuple[Reader, About]:
    """Load a model as ``models.opened`` finds it; return a reader and a description of the model."""
    with models.opened(home, model) as (name, folder):
        predictor = load_model(folder)
        reader = Reader(predictor)
        kind = "SAM2" if reader.takes_points else "Otsu's threshold"
        method = type(predictor.method).__name__
        if model is not None and Path(model).is_dir():
            return reader, About(Path(name).resolve().name, "", "", method, kind)
        chosen = models.choose(home, model)
        version = f"{chosen.version} ({chosen.alias})" if chosen.alias else chosen.version
        tags = chosen.tags
        dataset, method = tags.get("dataset", ""), tags.get("method", method)
        return reader, About(chosen.name, version, dataset, method, kind, chosen.metrics())


def serve(
    reader: Reader, about: About, bound: socket.socket, host: str, secret: str | None, *, browser: bool
) -> None:
    """Serve the page until Ctrl-C."""
    server = configured(build(Workplace(reader), about, access_to(host, secret)))
    name = socket.gethostname() if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    url = f"http://{name}:{bound.getsockname()[1]}/"
    print(url, flush=True)
    terminal.tell(f"{NOTICE} Ctrl-C stops the page.")
    if browser and has_display():
        webbrowser.open(url)
    try:
        server.run(sockets=[bound])
    except KeyboardInterrupt:
        terminal.tell("stopped. No image was kept.")


def configured(app: Guard) -> uvicorn.Server:
    """Return a server without an access log, because requests may contain patients' names."""
    config = uvicorn.Config(app, access_log=False, log_level="warning", server_header=False, ws="none")
    return uvicorn.Server(config)


def has_display() -> bool:
    """Return whether there is a display for a browser."""
    if sys.platform in ("win32", "darwin"):
        return True
    return any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))
