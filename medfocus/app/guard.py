"""What stands before every request: whom it is for, where it comes from, and who asks.

A page of another site must not reach a server on loopback through the reader's browser. By DNS rebinding it
would come under that site's own name, so the name is checked; by a form or a script it would come with that
site's origin, so whatever changes something has to come from this page.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import ipaddress
import json
import socket
import sys
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from medfocus.storage.redaction import kind_and_place

_SAFE = ("GET", "HEAD")
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' "
    "data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class Refused(Exception):
    """A request that is not done: its status, and place, fault and fix."""

    def __init__(self, status: int, place: str, fault: str, fix: str) -> None:
        super().__init__(f"{place}: {fault}. {fix}")
        self.status, self.place, self.fault, self.fix = status, place, fault, fix

    def content(self) -> dict[str, str | int]:
        """As a page gets it."""
        return {"status": self.status, "place": self.place, "fault": self.fault, "fix": self.fix}

    def response(self) -> Response:
        """As JSON."""
        body = json.dumps({"error": self.content()})
        return Response(body, self.status, media_type="application/json")


@dataclass(frozen=True)
class Door:
    """Whom a server answers."""

    names: frozenset[str]  # hosts, in small letters, that a request may be for
    addresses: bool  # and whether it may be for any IP address, which no other site's name stands for
    password: str | None = field(default=None, repr=False)

    def check(self, method: str, headers: Headers) -> None:
        """Raises Refused."""
        host = headers.get("host", "")
        if not self._is_for_us(host):
            fault = "is no name of this server"
            raise Refused(421, "the header Host", fault, f"Open the page as {sorted(self.names)[0]}.")
        if self.password is not None and not _knows(headers.get("authorization", ""), self.password):
            raise Refused(
                401, "the password", "is missing or wrong", "Give the one the server was started with."
            )
        site = headers.get("sec-fetch-site", "none")
        origin = headers.get("origin")
        foreign = origin is not None and urlsplit(origin).netloc.casefold() != host.casefold()
        if foreign or (method not in _SAFE and (origin is None or site == "cross-site")):
            fault = "does not come from this server's own page"
            raise Refused(403, "the request", fault, "Open the page itself, and do it there.")

    def _is_for_us(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        return name in self.names or (self.addresses and _is_address(name))


class Guard:
    """Checks every request at a ``Door``, and gives every answer the headers that keep it in."""

    def __init__(self, app: ASGIApp, door: Door) -> None:
        self.app, self.door = app, door

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """An ASGI application."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return

        async def sealed(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
            await send(message)

        try:
            self.door.check(scope["method"], Headers(scope=scope))
        except Refused as refused:
            response = refused.response()
            if refused.status == 401:
                response.headers["WWW-Authenticate"] = 'Basic realm="MedFocusCLIP", charset="UTF-8"'
            await response(scope, receive, sealed)
            return
        try:
            await self.app(scope, receive, sealed)
        except Exception as error:  # it was answered; a log would have its text, and that may name a file
            print(f"medfocus: {kind_and_place(error)}", file=sys.stderr)


def door(host: str, password: str | None) -> Door:
    """The door of a server that listens on ``host``: on loopback for loopback's names alone."""
    if is_loopback(host):
        return Door(frozenset({"localhost", "127.0.0.1", "::1", host.casefold()}), False, password)
    own = {socket.gethostname().casefold(), "localhost"} | (set() if _is_address(host) else {host.casefold()})
    return Door(frozenset(own), True, password)


def is_loopback(host: str) -> bool:
    """Whether nobody beyond this machine reaches a server that listens there."""
    return host == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _knows(authorization: str, password: str) -> bool:
    scheme, _, encoded = authorization.partition(" ")
    if scheme.casefold() != "basic":
        return False
    try:
        said = base64.b64decode(encoded, validate=True).partition(b":")[2]
    except (binascii.Error, ValueError):
        return False
    return hmac.compare_digest(said, password.encode())
