"""The inference engines that generate.

Flags that begin with `--sglang-` or `--router-` and are not fields here are kept by name for the SGLang server and its
router. Flags that the embedded engine has too also set its field (`compat.EMBEDDED_ALIASES`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from qwench.config.limits import check_address, check_fraction, check_not_negative, check_positive, check_seconds
from qwench.config.sglang_flags import ROUTER_OWN_FLAGS, SGLANG_OWN_FLAGS, refuse_owned


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineFacts:
    """What checks and plan ask of a kind of engine. `engines.kinds` holds what runs it."""

    runs_in_process: bool
    """One engine may run in the driver's process, without a server."""
    reads_embedded_flags: bool
    """Its sizes are the --embedded-* flags. Of the --sglang-* flags it takes only those that set these."""
    names_adapters: bool
    """It has the frozen weights from the start, reads a published LoRA adapter from a folder, and requests name it. Else a
    publication brings the frozen weights once, and then the adapter's matrices."""
    nccl_without_cumem: bool
    """The NCCL of its processes allocates with NCCL_CUMEM_ENABLE=0 unless the environment says otherwise."""


ENGINE_FACTS: Mapping[str, EngineFacts] = {
    "embedded": EngineFacts(runs_in_process=True, reads_embedded_flags=True, names_adapters=False, nccl_without_cumem=False),
    "sglang": EngineFacts(runs_in_process=False, reads_embedded_flags=False, names_adapters=True, nccl_without_cumem=True),
}
"""By the values of --rollout-engine."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """Kind, size and supervision of the engines."""

    rollout_engine: Literal["auto", "embedded", "sglang"] = "auto"
    """Engine that generates. embedded: Qwench's own, in the training process or as servers. sglang: SGLang servers. auto:
    sglang when a --sglang-* flag or --rollout-num-gpus-per-engine is given, and on several GPUs; else embedded."""
    sglang_config: Path | None = None
    """YAML file of groups of SGLang engines, in slime's form, for engines of several sizes. None: all engines have
    --rollout-num-gpus-per-engine GPUs."""
    engine_reason: str = field(default="", compare=False)
    """Why auto chose the engine."""
    embedded_page_size: int = 16
    """Tokens in one page of the KV cache of the embedded engine (--sglang-page-size sets it too)."""
    embedded_max_running_requests: int = 512
    """Largest number of responses that the embedded engine decodes at once (--sglang-max-running-requests sets it too)."""
    embedded_prefill_chunk_tokens: int = 4096
    """Largest number of prompt tokens in one forward pass of the embedded engine (--sglang-chunked-prefill-size sets it
    too)."""
    embedded_kv_cache_tokens: int | None = None
    """Size of the embedded engine's KV cache in tokens. None: from --embedded-mem-fraction on a GPU, 65,536 on a CPU."""
    embedded_mem_fraction: float = 0.8
    """Share of the GPU's memory that may be used once the embedded engine's KV cache exists (--sglang-mem-fraction-static sets
    it too)."""
    embedded_native_kernels: bool = True
    """Decode on a CPU with kernels in C++, which the embedded engine compiles once, in seconds, where g++ or clang++ is
    installed. Without them it computes with PyTorch's operations."""
    sglang_server_concurrency: int = 512
    """Largest number of requests in flight per engine, for both kinds of engine."""
    sglang_enable_deterministic_inference: bool = False
    """Seed the sampling: sample i of every group uses --rollout-seed + i."""
    update_weight_buffer_size: int = 512 * 1024**2
    """Size in bytes of one bucket of published weights. Two to four buckets exist at a time; a larger tensor gets a bucket of
    its size."""
    update_weight_transport: Literal["nccl", "ipc", "broadcast", "disk"] = "nccl"
    """How weights reach engines in other processes. nccl: shared memory on the same device, NCCL (gloo on CPUs) between
    devices, disk where neither works. ipc, broadcast, disk: only that way."""
    update_weight_disk_dir: str | None = None
    """Folder that trainer and engines can read, for weights published by disk. None: a temporary folder of this machine."""
    update_weight_disk_keep_files: bool = False
    """Keep the weight files in --update-weight-disk-dir after publication."""
    rollout_external_engine_addrs: tuple[str, ...] = ()
    """Addresses (host:port) of running engines to use, of either kind. The run does not start or stop them. Set QWENCH_TOKEN to
    their token if they need one."""
    use_sglang_router: bool = False
    """Send requests through an sglang-router process. Off: to the engine with the fewest requests. Any --router-* flag turns it
    on."""
    use_fault_tolerance: bool = False
    """Check the health of engine servers. Restart dead engines and retry their requests on the others."""
    rollout_health_check_first_wait: float = 0.0
    """Seconds to wait before the first health check after a start, a publication or a change of memory."""
    rollout_health_check_interval: float = 30.0
    """Seconds between health checks."""
    rollout_health_check_timeout: float = 30.0
    """Seconds an engine may take to answer a health check."""
    engine_start_timeout: float = 1800.0
    """Seconds an engine server may take to start, loading weights and capturing graphs included."""
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
        ):
            check_positive(flag, value)
        for flag, seconds in (
            ("--rollout-health-check-interval", self.rollout_health_check_interval),
            ("--rollout-health-check-timeout", self.rollout_health_check_timeout),
            ("--engine-start-timeout", self.engine_start_timeout),
        ):
            check_seconds(flag, seconds)
        check_not_negative("--rollout-health-check-first-wait", self.rollout_health_check_first_wait)
        check_fraction("--embedded-mem-fraction", self.embedded_mem_fraction)
        refuse_owned(self.sglang_args, SGLANG_OWN_FLAGS, prefix="sglang")
        refuse_owned(self.router_args, ROUTER_OWN_FLAGS, prefix="router")
        for address in self.rollout_external_engine_addrs:
            check_address("--rollout-external-engine-addrs", address)

    @property
    def facts(self) -> EngineFacts:
        """Return the facts of --rollout-engine."""
        return ENGINE_FACTS[self.kind]

    @property
    def names_adapters(self) -> bool:
        """Tell whether engine servers read published adapters from folders."""
        return self.facts.names_adapters or self.update_weight_transport == "disk"

    @property
    def routes_requests(self) -> bool:
        """Tell whether requests go through a router process."""
        return self.use_sglang_router or bool(self.router_args)

    @property
    def kind(self) -> str:
        """Return the name of the engine's kind; embedded where no command line chose one."""
        return "embedded" if self.rollout_engine == "auto" else self.rollout_engine
