"""What stands before every route: by what name the server is called, from where, with which key, and as what the body comes."""

import hmac
import ipaddress
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from rollout.server.bodies import BadRequest

OPEN = ("/health", "/health_generate", "/openapi.json")
"""Asked without a key."""

_KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error"}
_KINDS |= {429: "rate_limit_error", 503: "overloaded_error"}


def error_body(error: BadRequest) -> dict[str, Any]:
    """Returns the error as OpenAI's clients expect it in a body."""
    kind = _KINDS.get(error.status, "server_error" if error.status >= 500 else "invalid_request_error")
    return {"error": {"message": str(error), "type": kind, "param": None, "code": error.status}}


def refusal(error: BadRequest) -> JSONResponse:
    """Makes the HTTP answer of an error; the connection is closed where the body was not read."""
    headers = {"retry-after": "1"} if error.status in (429, 503) else {}
    if error.status in (401, 403, 408, 413, 415, 421):
        headers["connection"] = "close"  # the rest of the body is not read
    return JSONResponse(error_body(error), error.status, headers)


@dataclass(frozen=True)
class Gate:
    """Keeps web pages away: one in somebody's browser can send requests to a server on the same machine. It cannot choose the
    Host, which is the name that it has the address by; it cannot leave out Origin where it posts, nor send JSON unasked.

    `names`: what the server may be called, beside the address that is connected to; "*": anything. `changes`: the routes that
    change the state of the server, which takes a key, or a caller on the same machine; and JSON, or no body."""

    app: ASGIApp
    names: frozenset[str]
    api_key: str | None
    changes: frozenset[str]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        answer: Callable[[Scope, Receive, Send], Any] = self.app
        try:
            self._check(scope, Headers(scope=scope))
        except BadRequest as error:
            answer = refusal(error)
        await answer(scope, receive, send)

    def _check(self, scope: Scope, headers: Headers) -> None:
        host = headers.get("host", "")
        if not self._is_named(host, scope):
            raise BadRequest(
                f"Host {host[:100]!r} is no name of this server: start it with names=NAME,... to add some", 421
            )
        if scope["path"] not in OPEN:
            self._check_key(headers)
        if scope["method"] not in ("GET", "HEAD"):
            self._check_sender(scope["path"], scope, headers)

    def _is_named(self, host: str, scope: Scope) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname
        except ValueError:
            return False
        return "*" in self.names or name in self.names or (bool(name) and name == scope["server"][0])

    def _check_key(self, headers: Headers) -> None:
        given = headers.get("authorization", "").encode()
        if self.api_key is not None and not hmac.compare_digest(given, f"Bearer {self.api_key}".encode()):
            raise BadRequest("the API key is missing or wrong: send Authorization: Bearer KEY", 401)

    def _check_sender(self, path: str, scope: Scope, headers: Headers) -> None:
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2] != headers["host"]:
            raise BadRequest(f"a page of {origin[:100]!r} asks, which is another site", 403)
        if path not in self.changes:
            return
        kind, empty = headers.get("content-type"), headers.get("content-length", "0") == "0"
        is_json = kind is not None and kind.partition(";")[0].strip().lower() == "application/json"
        if not is_json and (kind is not None or not empty or "transfer-encoding" in headers):
            raise BadRequest(f"a body of {kind or 'no type'} is not read: send Content-Type: application/json", 415)
        if self.api_key is None and not _is_local(scope):
            raise BadRequest(f"{path} changes the server: start it with api_key=, or call from its own machine", 403)


def _is_local(scope: Scope) -> bool:
    address = ipaddress.ip_address((scope["client"] or ("0.0.0.0",))[0].partition("%")[0])
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback
