"""Where the embedded server listens, and what its connections are encrypted with."""

from __future__ import annotations

import errno
import socket
import ssl
from dataclasses import dataclass
from pathlib import Path

from excise.errors import UsageError

_BACKLOG = 1024


@dataclass(frozen=True)
class Tls:
    """A certificate, with those that lead to its issuer, and its key: PEM files."""

    certificate: Path
    key: Path

    def check(self) -> None:
        """Raise ``UsageError`` if they can't be read, or don't belong together."""
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self.certificate, self.key, password="")
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            raise UsageError(
                f"TLS can't use {self.certificate} with {self.key} ({' '.join(str(error).split())}): give a "
                "certificate and its key without a password, as PEM files"
            ) from error


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens: clients that come before the model is loaded wait. Port 0 takes any that is free.

    Its connections send at once what they have (``TCP_NODELAY``, which they inherit). asyncio sets that only on sockets
    of an explicit protocol number, and without it the body of an answer waits for the client's delayed acknowledgement
    of the headers: up to 40 ms on Linux.

    Raises:
        UsageError: The port is in use, or the address isn't this machine's.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.create_server(address[:2], family=family, backlog=_BACKLOG)
    except PermissionError as error:
        raise UsageError(f"port {port} is for administrators: take one from 1024 with --port") from error
    except (OSError, UnicodeError) as error:
        taken = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
        why = "is in use: stop what listens there" if taken else f"can't be listened to ({error}): take another --host"
        raise UsageError(f"{host} port {port} {why}, or take another with --port") from error
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def address(listener: socket.socket, tls: Tls | None) -> str:
    """The URL of a listening socket."""
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    return f"http{'s' if tls else ''}://{shown}:{port}"
