"""Early launch of kernels: a kernel starts before the previous one has ended, and waits for its results itself.

Hopper's programmatic dependent launch: the device sets a kernel's programs up while the last programs of the one before run.
Each of our kernels begins with `wait_for_kernel_before()` and is launched with OPTIONS. Other devices launch as always.
Measured on an H100: a decode step of 0.6B and of 4B, 256 rows, takes 1.3 % less time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_supported = (
    torch.version.cuda is not None and torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
)  # fmt: skip
OPTIONS: dict[str, bool] = {"launch_pdl": True} if _supported else {}
EARLY = tl.constexpr(_supported)


@triton.jit
def wait_for_kernel_before() -> None:
    """Allow the next kernel to be set up, then wait until all results of the one before are in memory."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
