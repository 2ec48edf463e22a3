"""A router in front of engine servers, as the pool needs it. The one that runs is a process of `engines.kinds`."""

from __future__ import annotations

from typing import Protocol


class Router(Protocol):
    """Spreads `/generate` over the servers that were added; everything else goes to each server."""

    base_url: str
    """Where requests go."""

    @property
    def label(self) -> str:
        """Return its name in messages."""
        ...

    def is_running(self) -> bool:
        """Tell whether its process is alive."""
        ...

    def last_output(self) -> str:
        """Return a phrase with the end of its log."""
        ...

    async def check(self) -> None:
        """Return when it has answered.

        Raises:
            EngineError: it did not, within its deadline.
        """
        ...

    async def restart(self) -> None:
        """End its process and start another one at the same address, which knows no server.

        Raises:
            EngineError: it did not start.
        """
        ...

    async def add(self, url: str) -> None:
        """Add a server; returns when the router sends requests to it.

        Raises:
            EngineError: the router refused, or did not add it within its deadline.
        """
        ...

    async def remove(self, url: str) -> None:
        """Remove a server; no effect on one that the router does not know."""
        ...

    async def close(self) -> None:
        """End the process."""
        ...
