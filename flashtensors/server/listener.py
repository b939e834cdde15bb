"""The socket that the daemon listens on."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

from ..errors import DaemonError


@contextlib.contextmanager
def bind(host: str, port: int) -> Iterator[socket.socket]:
    """A bound TCP socket; port 0 takes any free one. Raises `DaemonError` when the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio turns Nagle's algorithm off only on sockets that name their protocol; with it, answers wait 40 ms.
    with socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            raise DaemonError(
                f"cannot listen on {host} port {port}: {error.strerror or error}; stop what uses it, or set server_port"
            ) from error
        yield listener
