"""The inference engines that generate.

Flags that begin with `--sglang-` or `--router-` and are not fields here are kept by name for the SGLang server and its
router. Those that mean the same to the embedded engine also set its field (`compat.EMBEDDED_ALIASES`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qwench.config.limits import check_address, check_fraction, check_not_negative, check_positive


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """Kind, size and supervision of the engines."""

    rollout_engine: Literal["embedded", "sglang"] = "embedded"
    """embedded: Qwench's own engine, in the training process or as servers; sglang: SGLang servers."""
    embedded_page_size: int = 16
    """Tokens in one page of the KV cache (also set by --sglang-page-size)."""
    embedded_max_running_requests: int = 512
    """Most responses decoded at a time (also set by --sglang-max-running-requests)."""
    embedded_prefill_chunk_tokens: int = 4096
    """Most prompt tokens in one forward pass (also set by --sglang-chunked-prefill-size)."""
    embedded_kv_cache_tokens: int | None = None
    """Size of the KV cache in tokens. None: what --embedded-mem-fraction allows on a GPU; 65,536 on a CPU."""
    embedded_mem_fraction: float = 0.8
    """Share of a GPU's whole memory that may be in use once the KV cache is made: it gets what is free, less (1 - this) of the
    total (also set by --sglang-mem-fraction-static)."""
    sglang_server_concurrency: int = 512
    """Most requests in flight for each engine, of either kind."""
    sglang_enable_deterministic_inference: bool = False
    """Seed the sampling: sample i of every group uses --rollout-seed + i."""
    update_weight_buffer_size: int = 512 * 1024**2
    """Bytes of one bucket of published weights; two to four buffers of this size exist meanwhile, a tensor that is larger takes
    its own size."""
    update_weight_transport: Literal["nccl", "ipc", "broadcast", "disk"] = "nccl"
    """How weights reach engines in other processes. nccl: as their place allows, in shared memory on the trainer's devices,
    by NCCL (gloo on CPUs) elsewhere, from disk where neither works; the others: that way only."""
    update_weight_disk_dir: str | None = None
    """Folder that trainer and engines see, for weights published from disk. None: a temporary one of this machine."""
    update_weight_disk_keep_files: bool = False
    """Keep published weights in --update-weight-disk-dir."""
    rollout_external_engine_addrs: tuple[str, ...] = ()
    """Addresses (host:port) of engines that run already, of either kind; they are used as they are, and left running.
    The environment variable QWENCH_TOKEN holds the token that they ask for, if they do."""
    use_sglang_router: bool = False
    """Send requests through the sglang-router process instead of to the least loaded engine (also switched on by
    any --router-* flag)."""
    use_fault_tolerance: bool = False
    """Watch the health of engine servers, start lost ones again, and ask other engines for what they owed."""
    rollout_health_check_first_wait: float = 0.0
    """Seconds before the first health check, at the start and after weights or memory were moved."""
    rollout_health_check_interval: float = 30.0
    """Seconds between health checks."""
    rollout_health_check_timeout: float = 30.0
    """Seconds an engine may take to answer a health check."""
    engine_start_timeout: float = 1800.0
    """Seconds a server may take until it answers: loading weights, capturing graphs."""
    sglang_args: tuple[str, ...] = ()
    """The collected --sglang-* flags and their values, without that prefix."""
    router_args: tuple[str, ...] = ()
    """The collected --router-* flags and their values, without that prefix."""

    def __post_init__(self) -> None:
        for flag, value in (
            ("--embedded-page-size", self.embedded_page_size),
            ("--embedded-max-running-requests", self.embedded_max_running_requests),
            ("--embedded-prefill-chunk-tokens", self.embedded_prefill_chunk_tokens),
            ("--embedded-kv-cache-tokens", self.embedded_kv_cache_tokens),
            ("--sglang-server-concurrency", self.sglang_server_concurrency),
            ("--update-weight-buffer-size", self.update_weight_buffer_size),
            ("--rollout-health-check-interval", self.rollout_health_check_interval),
            ("--rollout-health-check-timeout", self.rollout_health_check_timeout),
            ("--engine-start-timeout", self.engine_start_timeout),
        ):
            check_positive(flag, value)
        check_not_negative("--rollout-health-check-first-wait", self.rollout_health_check_first_wait)
        check_fraction("--embedded-mem-fraction", self.embedded_mem_fraction)
        for address in self.rollout_external_engine_addrs:
            check_address("--rollout-external-engine-addrs", address)

    @property
    def routes_requests(self) -> bool:
        """Tell whether a router process stands in front of the engines."""
        return self.use_sglang_router or bool(self.router_args)
