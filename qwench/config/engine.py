"""The inference engines that generate.

Flags that begin with `--sglang-` or `--router-` and are not fields here are kept by name for the SGLang server and its
router. Those that mean the same to the embedded engine also set its field (`compat.EMBEDDED_ALIASES`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from qwench.config.checks import check_fraction, check_not_negative, check_positive


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """Kind, size and supervision of the engines."""

    rollout_engine: Literal["embedded", "sglang"] = "embedded"
    """embedded: Qwench's own engine inside the training process; sglang: SGLang servers."""
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
    """Bytes of one bucket of published weights."""
    rollout_external_engine_addrs: tuple[str, ...] = ()
    """Addresses (host:port) of engines that run already."""
    use_fault_tolerance: bool = False
    """Watch the engines' health and restart those that fail."""
    rollout_health_check_first_wait: float = 0.0
    """Seconds before the first health check."""
    rollout_health_check_interval: float = 30.0
    """Seconds between health checks."""
    rollout_health_check_timeout: float = 30.0
    """Seconds an engine may take to answer a health check."""
    sglang_args: Annotated[tuple[str, ...], tyro.conf.Suppress] = ()
    """The collected --sglang-* flags and their values, without that prefix."""
    router_args: Annotated[tuple[str, ...], tyro.conf.Suppress] = ()
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
        ):
            check_positive(flag, value)
        check_not_negative("--rollout-health-check-first-wait", self.rollout_health_check_first_wait)
        check_fraction("--embedded-mem-fraction", self.embedded_mem_fraction)
