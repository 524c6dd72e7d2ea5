"""Asks a server whether it is Ray's and lets this process in, before Ray's own client does: that one tries for long, and fills
stderr with a warning a second."""

import os
import socket
from collections.abc import Sequence
from pathlib import Path

from rl.errors import UserError

_ANSWER = 5.0  # seconds for a server to accept, and to speak
# RFC 9113, HTTP/2: what a client begins with, and frames
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _SETTINGS = 0, 1, 4  # types of frames; every server begins with settings
_END_STREAM, _END_HEADERS = 1, 4  # flags
_EMPTY = bytes(5)  # a message of gRPC without content
_ANY_METHOD = "/ray.rpc.NodeInfoGcsService/GetClusterId"  # the first that Ray's client calls
# RFC 7541, HPACK: what a status is in a server's answer as its literal; 16 is UNAUTHENTICATED
_STATUS = b"\x0bgrpc-status"
_REFUSED = _STATUS + b"\x0216"


class TokenError(UserError):
    """Says that a cluster asks for another token than this process has, or for one at all."""


def check_address(address: str) -> None:
    """Raises UserError where no server of Ray's answers at once, TokenError where it refuses this process's token."""
    if address == "auto":
        try:
            check_address(_running())
        except TokenError:
            raise
        except UserError:
            pass  # what is written down may be old: Ray itself looks
        return
    host, _, port = address.rpartition("//")[2].rpartition(":")
    if not port.isdigit():
        raise UserError(f"cluster.address={address}: write auto, local or HOST:PORT")
    try:
        with socket.create_connection((host, int(port)), timeout=_ANSWER) as connection:
            if os.environ.get("RAY_USE_TLS", "0") in ("", "0"):
                _speak(connection, address)
        if address.startswith("ray://"):
            raise UserError(
                f"cluster.address={address}: a run is not driven through Ray's client; give the command on a node of the "
                f"cluster with cluster.address=auto, or by `ray job submit`"
            )
    except TimeoutError:
        raise UserError(
            f"cluster.address={address}: no server of Ray's answers there within {_ANSWER:.0f} s; 'local' starts Ray"
        ) from None
    except (OSError, OverflowError) as error:
        raise UserError(f"cluster.address={address}: nothing answers there ({error}); 'local' starts Ray") from None


def token_hint() -> str:
    """Says what a cluster that refuses this process's token wants."""
    held = os.environ.get("RAY_AUTH_MODE") == "token"
    return (
        f"a cluster that asks for a token wants RAY_AUTH_MODE=token and its RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH) here too; "
        f"{'the token here is another' if held else 'this process has no RAY_AUTH_MODE'}"
    )


def _running() -> str:
    """The address that `auto` stands for, as far as it is written down; "" where Ray itself has to look."""
    if said := os.environ.get("RAY_ADDRESS", ""):
        return said
    folder = os.environ.get("RAY_TMPDIR") or "/tmp"
    try:
        return (Path(folder) / "ray" / "ray_current_cluster").read_text().strip()
    except OSError:
        return ""


def _speak(connection: socket.socket, address: str) -> None:
    connection.sendall(_PREFACE + _frame(_SETTINGS, 0, 0))
    said = connection.recv(9)
    if len(said) < 4 or said[3] != _SETTINGS:
        raise UserError(f"cluster.address={address}: a server answers there that is not Ray's; 'local' starts Ray")
    mode = os.environ.get("RAY_AUTH_MODE", "disabled")
    if address.startswith("ray://") or mode not in ("disabled", "token"):
        return
    token = _token() if mode == "token" else ""
    connection.sendall(
        _frame(_HEADERS, _END_HEADERS, 1, _headers(address, token)) + _frame(_DATA, _END_STREAM, 1, _EMPTY)
    )
    while _STATUS not in said and (more := connection.recv(4096)):
        said += more
    if _REFUSED in said:
        raise TokenError(f"cluster.address={address}: Ray refuses this process: {token_hint()}")


def _frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def _headers(address: str, token: str) -> bytes:
    """The headers of a call of gRPC, each as a literal that nobody need remember."""
    fields = [(":method", "POST"), (":scheme", "http"), (":path", _ANY_METHOD), (":authority", address)]
    fields += [("te", "trailers"), ("content-type", "application/grpc")]
    fields += [("authorization", f"Bearer {token}")] if token else []
    return b"".join(_literal(field) for field in fields)


def _literal(field: Sequence[str]) -> bytes:
    return b"\0" + b"".join(_length(len(text.encode())) + text.encode() for text in field)


def _length(count: int) -> bytes:
    """A number as HPACK writes it, with seven bits in its first byte and in each that follows."""
    if count < 127:
        return bytes([count])
    out, rest = bytearray([127]), count - 127
    while rest >= 128:
        out.append(128 | rest % 128)
        rest //= 128
    return bytes([*out, rest])


def _token() -> str:
    """The token of this process, from where Ray takes it."""
    if token := os.environ.get("RAY_AUTH_TOKEN", ""):
        return token.strip()
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    try:
        return path.expanduser().read_text().strip()
    except OSError:
        return ""
