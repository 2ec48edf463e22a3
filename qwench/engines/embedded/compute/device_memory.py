"""When memory that torch caches goes back to the device: where the engine takes memory past torch's allocator, and it lacks."""

from __future__ import annotations

import torch

RESERVE_BYTES = 2 << 30
"""Device memory that is left free for libraries and kernels, which cannot take what torch caches."""


def lacks(num_bytes: int, *, free: int) -> bool:
    """Tell whether a device with `free` bytes cannot give `num_bytes` without its reserve."""
    return free < num_bytes + RESERVE_BYTES


def make_room(num_bytes: int, device: torch.device) -> None:
    """Give back what torch caches on a GPU, if `num_bytes` are not free otherwise."""
    if device.type == "cuda" and lacks(num_bytes, free=torch.cuda.mem_get_info(device)[0]):
        torch.cuda.empty_cache()
