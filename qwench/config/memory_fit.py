"""Whether weights and trainer state fit the GPUs of this machine, by arithmetic, before anything starts."""

from __future__ import annotations

from qwench.config.config import Config
from qwench.config.plan import BFLOAT16_BYTES, RunPlan
from qwench.errors import ConfigError, counted
from qwench.models.memory import fp8_bytes, gib, num_parameters

_SGLANG_FRACTION = 0.9
"""SGLang chooses its own share where --sglang-mem-fraction-static is not given; it is never more."""


def engine_weight_bytes(plan: RunPlan, *, element_bytes: int = BFLOAT16_BYTES, fp8: bool = False) -> int:
    """Return the bytes of weights on each device of the smallest engine; 0 where the run starts none.

    Args:
        element_bytes: of a weight that is not FP8.
        fp8: the checkpoint's weights are FP8.
    """
    if not plan.devices.engine_sizes:
        return 0
    model = plan.model
    whole = fp8_bytes(model, element_bytes=element_bytes) if fp8 else num_parameters(model) * element_bytes
    return whole // min(plan.devices.engine_sizes)


def weight_bytes_beside_trainer(config: Config, plan: RunPlan) -> int:
    """Return the bytes of weights that an engine in the trainer's process holds besides the trainer's own.

    It has a copy where it cannot compute with the trainer's tensors: of merged adapters, under Megatron, and where it samples
    while they change.
    """
    devices, lora = plan.devices, config.lora
    if not (devices.shared and config.embeds_engine):
        return 0
    may_share = devices.weights_may_alias
    if lora.enabled:
        stays = may_share or not plan.holds_teacher
        may_share = lora.lora_publish == "adapter" and lora.lora_base == "auto" and stays
    if may_share and config.backend == "fsdp":
        return 0
    return engine_weight_bytes(plan)


def check_fit(config: Config, plan: RunPlan, *, device_bytes: int, fp8: bool = False) -> None:
    """Refuse what cannot fit.

    Args:
        device_bytes: memory of one GPU.
        fp8: the checkpoint's weights are FP8.

    Raises:
        ConfigError: the engines' weights, or the trainer's state, are more than a GPU has.
    """
    weights, (flag, fraction) = engine_weight_bytes(plan, fp8=fp8), _share(config)
    if weights > fraction * device_bytes:
        size = min(plan.devices.engine_sizes)
        raise ConfigError(
            f"an engine of {counted(size, 'GPU')} holds {gib(weights)} GiB of weights on each, more than {flag} "
            f"{fraction:g} of {gib(device_bytes)} GiB; raise --rollout-num-gpus-per-engine"
        )
    critic = None if plan.critic is None else plan.critic.rank_bytes
    for whose, held in (("trainer", plan.rank_bytes), ("critic", critic)):
        if plan.devices.trains and held is not None and held.device > device_bytes:
            raise ConfigError(
                f"each {whose} rank holds {gib(held.device)} GiB of weights, gradients and optimizer state, no activations "
                f"counted, more than the {gib(device_bytes)} GiB of its GPU; give --optimizer-cpu-offload, "
                "a larger --tensor-model-parallel-size, or more GPUs"
            )


def _share(config: Config) -> tuple[str, float]:
    """Return the share of a GPU that weights and KV cache of an engine may take, and its flag."""
    if config.engine.facts.reads_embedded_flags:
        return "--embedded-mem-fraction", config.engine.embedded_mem_fraction
    words = config.engine.sglang_args
    flag = "--mem-fraction-static"
    given = words[words.index(flag) + 1] if flag in words[:-1] else ""
    try:
        return "--sglang-mem-fraction-static", float(given)
    except ValueError:
        return "--sglang-mem-fraction-static", _SGLANG_FRACTION
