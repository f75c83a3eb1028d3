"""The checks of every request: its host, its origin and its password.

No page of another site may reach a server on loopback through the reader's browser. With DNS rebinding, a
request carries the name of that site, so the server checks the header Host. A form or script carries the
origin of that site, so every request that changes something has to come from this server's page.

Starlette's TrustedHostMiddleware is no replacement: it cannot admit all IP addresses, and it answers in
plain text.
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
    """A refused request, with its HTTP status, the place of the fault, the fault and the fix."""

    def __init__(self, status: int, place: str, fault: str, fix: str) -> None:
        super().__init__(f"{place}: {fault}. {fix}")
        self.status, self.place, self.fault, self.fix = status, place, fault, fix

    def content(self) -> dict[str, str | int]:
        """Return the content of the page's error message."""
        return {"status": self.status, "place": self.place, "fault": self.fault, "fix": self.fix}

    def response(self) -> Response:
        """Return the refusal as JSON."""
        body = json.dumps({"error": self.content()})
        return Response(body, self.status, media_type="application/json")


@dataclass(frozen=True)
class Access:
    """The requests that a server accepts."""

    names: frozenset[str]  # accepted hosts, in lower case
    addresses: bool  # accept every IP address as host, because no name of another site is an address
    password: str | None = field(default=None, repr=False)

    def check(self, method: str, headers: Headers) -> None:
        """Check a request. Raises Refused."""
        host = headers.get("host", "")
        if not self._is_known(host):
            fault = "is not this server"
            raise Refused(421, "the header Host", fault, f"Open the page as {sorted(self.names)[0]}.")
        if self.password is not None and not _knows(headers.get("authorization", ""), self.password):
            raise Refused(
                401, "the password", "is missing or wrong", "Enter the password that the server started with."
            )
        site = headers.get("sec-fetch-site", "none")
        origin = headers.get("origin")
        foreign = origin is not None and urlsplit(origin).netloc.casefold() != host.casefold()
        if foreign or (method not in _SAFE and (origin is None or site == "cross-site")):
            fault = "does not come from this server's own page"
            raise Refused(403, "the request", fault, "Use the page itself.")

    def _is_known(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        return name in self.names or (self.addresses and _is_address(name))


class Guard:
    """An ASGI application that checks every request and adds the security headers to every response."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self.app, self.access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
            await send(message)

        try:
            self.access.check(scope["method"], Headers(scope=scope))
        except Refused as refused:
            response = refused.response()
            if refused.status == 401:
                response.headers["WWW-Authenticate"] = 'Basic realm="MedFocusCLIP", charset="UTF-8"'
            await response(scope, receive, send_with_headers)
            return
        try:
            await self.app(scope, receive, send_with_headers)
        except Exception as error:  # already answered; the text of the error may name a file
            print(f"medfocus: {kind_and_place(error)}", file=sys.stderr)


def access_to(host: str, password: str | None) -> Access:
    """Return the access to a server that listens on ``host``. On loopback, accept only names of loopback."""
    if is_loopback(host):
        return Access(frozenset({"localhost", "127.0.0.1", "::1", host.casefold()}), False, password)
    names = {socket.gethostname().casefold(), "localhost"} | (
        set() if _is_address(host) else {host.casefold()}
    )
    return Access(frozenset(names), True, password)


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach a server that listens on ``host``."""
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
        given = base64.b64decode(encoded, validate=True).partition(b":")[2]
    except (binascii.Error, ValueError):
        return False
    return hmac.compare_digest(given, password.encode())
