"""The store through which trainer ranks find each other, on a port that the driver holds from the start."""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist

from qwench.wire.addresses import listen

LOOPBACK = "127.0.0.1"
_BACKLOG = 1024
_TIMEOUT_S = 1800.0
"""How long a rank waits for something that another one has to say."""


class Rendezvous:
    """Listens from construction on, at one address of this machine only; ends with this object."""

    def __init__(self, address: str = LOOPBACK) -> None:
        """Listen on a free port of `address`, of this machine, which every rank must reach."""
        listener = listen(address, backlog=_BACKLOG)
        self._address, self._port = listener.getsockname()[:2]
        self._store = dist.TCPStore(
            self._address,
            self._port,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=_TIMEOUT_S),
            master_listen_fd=listener.detach(),
        )

    def environ(self, rank: int, num_ranks: int, *, local_rank: int) -> dict[str, str]:
        """Return the variables by which `init_process_group` (and torch's own `env://`) joins the ranks."""
        return {
            "RANK": str(rank),
            "WORLD_SIZE": str(num_ranks),
            "LOCAL_RANK": str(local_rank),
            "MASTER_ADDR": self._address,
            "MASTER_PORT": str(self._port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",  # rank 0 connects like the others instead of listening itself
        }
