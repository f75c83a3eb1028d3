"""``medfocus app``: a model out of the registry behind a page on this machine."""

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
from medfocus.serving.predictor import Predictor

PASSWORD = "MEDFOCUS_APP_PASSWORD"


def password(host: str, environment: Mapping[str, str]) -> str | None:
    """What the page asks for; None where nothing is given, which does on loopback alone.

    Raises ValueError where the page is to be seen beyond loopback and no password is given.
    """
    given = environment.get(PASSWORD)
    if not given and not is_loopback(host):
        raise ValueError(
            f"--host {host} is beyond loopback, where the page asks for a password, and there is no default "
            f"one. Set {PASSWORD} in the environment."
        )
    return given or None


def listening(host: str, port: int) -> socket.socket:
    """A socket bound to the address; a port of 0 is a free one. Raises OSError, saying what to do."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise OSError(
            f"{host}:{port} cannot be listened on ({error.strerror}). Give another --port, or 0."
        ) from error
    return bound


def load(home: Path, asked: str | None) -> tuple[Reader, About]:
    """A model as ``models.opened`` finds it, ready to read, and what is known of it."""
    with models.opened(home, asked) as (told, folder):
        predictor = Predictor.load(folder)
        reader = Reader(predictor)
        kind = "SAM2" if reader.takes_points else "Otsu's threshold"
        method = type(predictor.method).__name__
        if asked is not None and Path(asked).is_dir():
            return reader, About(Path(told).resolve().name, "", "", method, kind)
        chosen = models.choose(home, asked)
        version = f"{chosen.version} ({chosen.alias})" if chosen.alias else chosen.version
        tags = chosen.tags
        known = tags.get("dataset", ""), tags.get("method", method)
        return reader, About(chosen.name, version, *known, kind, chosen.metrics())


def serve(
    reader: Reader, about: About, bound: socket.socket, host: str, secret: str | None, *, browser: bool
) -> None:
    """Answer until Ctrl-C."""
    server = configured(build(Workplace(reader), about, access_to(host, secret)))
    shown = socket.gethostname() if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    url = f"http://{shown}:{bound.getsockname()[1]}/"
    print(url, flush=True)
    terminal.tell(f"{NOTICE} Ctrl-C ends it.")
    if browser and has_display():
        webbrowser.open(url)
    try:
        server.run(sockets=[bound])
    except KeyboardInterrupt:
        terminal.tell("ended. No image was kept.")


def configured(app: Guard) -> uvicorn.Server:
    """A server that writes no log of what is asked of it: a name in it may be a patient's."""
    config = uvicorn.Config(app, access_log=False, log_level="warning", server_header=False, ws="none")
    return uvicorn.Server(config)


def has_display() -> bool:
    """Whether a browser would have a screen to open on."""
    if sys.platform in ("win32", "darwin"):
        return True
    return any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))
