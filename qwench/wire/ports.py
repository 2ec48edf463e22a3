"""Ports for servers that another process will open."""

from __future__ import annotations

import random
import socket

_FIRST, _LAST = 20_000, 32_000
"""Below the ports that Linux gives to outgoing connections (32768 to 60999 by default): none of those can take a port away
between this choice and the server's start."""
_ATTEMPTS = 50


def unused_port(host: str) -> int:
    """Return a port on which no process listens now.

    Raises:
        OSError: `host` is not an address of this machine.
    """
    for port in random.SystemRandom().sample(range(_FIRST, _LAST), _ATTEMPTS):
        try:
            socket.create_server((host, port)).close()
        except OSError:
            continue
        return port
    with socket.create_server((host, 0)) as free:
        return int(free.getsockname()[1])
