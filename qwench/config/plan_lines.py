"""The plan of a run in words, as `--dry-run` prints it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from qwench.config.config import Config
from qwench.config.devices import DevicePlan
from qwench.config.plan import RunPlan, train_dtype
from qwench.config.sections.evaluation import EvalConfig
from qwench.errors import counted
from qwench.models.decoder.native.compiler import COMPILERS, find_compilers
from qwench.models.memory import gib, num_adapter_parameters, num_parameters


def plan_lines(config: Config, plan: RunPlan) -> Iterator[str]:
    """Yield what `--dry-run` prints of the plan, one fact a line."""
    devices, held = plan.devices, plan.rank_bytes
    if devices.trains or config.debug.debug_rollout_only:
        yield from _rollout_lines(config, plan)
    for one in plan.eval_sets:
        yield f"evaluation set {one.name}: {one.path}, {counted(one.n_samples_per_eval_prompt, 'response')} a prompt"
    if devices.trains and plan.eval_sets:
        yield f"evaluations: {_evaluations(config.evaluation)}"
    if devices.trains and devices.generates:
        yield f"devices: {'shared by trainer and engines' if devices.shared else 'trainer and engines apart'}"
    if devices.generates:
        apart = f"; the last {devices.num_eval_engines} for evaluations alone" if devices.num_eval_engines else ""
        slower = missing_kernels(config, on_gpus=devices.on_gpus)
        engine = f"{config.engine.kind} ({config.engine.engine_reason or 'the default'})"
        yield f"engines: {engine}, {_engines(devices)}{apart}{slower}"
    if devices.trains:
        yield f"reference model: {_reference(config, plan)}"
        if config.lora.enabled:
            yield f"LoRA: {adapter_line(config, plan)}"
        if plan.holds_teacher:
            yield "teacher: frozen weights on the host, which score on the policy's ranks"
        for name, url in config.distillation.teacher_urls(config.reward.rm_url).items():
            yield f"teacher {name}: scores at {url} during the rollout"
        if plan.critic is not None:
            num_ranks, of_critic = sum(devices.critic), plan.critic.rank_bytes
            yield (
                f"critic: on {counted(num_ranks, 'rank')} of its own (DP {plan.critic.dp_size}), beside the policy; "
                f"{gib(of_critic.device)} GiB on the device of each, {gib(of_critic.host)} GiB on the host"
            )
        elif plan.holds_critic:
            moved = f"takes {gib(held.weights + held.optimizer)} GiB of the host, which the next line does not count"
            yield (
                "critic: on the ranks of the policy, in turn with it; the one that rests "
                + (moved if devices.on_gpus else "stays in memory, which the next line does not count")
            )
        yield (
            f"each trainer rank, without activations: {gib(held.device)} GiB on the device ({gib(held.weights)} weights, "
            f"{gib(held.gradients)} gradients, {gib(held.optimizer)} optimizer), {gib(held.host)} GiB on the host"
        )
        yield f"computation: {_giga(plan.cost.linear * plan.train_passes)} GFLOP a trained token, without attention"


def _evaluations(evaluation: EvalConfig) -> str:
    """Say when a run evaluates, as `Schedule.eval_due` decides."""
    interval = evaluation.eval_interval
    later = "after the last rollout" if interval is None else f"after every {counted(interval, 'rollout')}"
    return later if evaluation.skip_eval_before_train else f"before the first rollout, and {later}"


def _reference(config: Config, plan: RunPlan) -> str:
    if not plan.holds_reference:
        return "not needed"
    is_base = config.lora.enabled and config.algorithm.ref_update_interval is None
    when = "; scores finished groups while others are generated" if plan.scores_early else ""
    return ("the policy without its adapters, no copy" if is_base else "held") + when


def adapter_line(config: Config, plan: RunPlan) -> str:
    """Return the adapters of the run, and how many parameters are trained."""
    lora, whole = config.lora, num_parameters(plan.model)
    trained = num_adapter_parameters(plan.model, lora.targets, lora.rank)
    return (
        f"rank {lora.rank}, scale {lora.scale:g}, {lora.lora_init} start, at {', '.join(lora.targets)}; "
        f"{trained:,} of {whole:,} parameters are trained ({trained / whole:.2%}), "
        f"the others are frozen in {train_dtype(config, on_gpus=plan.devices.on_gpus)}"
        + (f", projections with adapters in {lora.lora_base}" if lora.lora_base != "auto" else "")
    )


def _rollout_lines(config: Config, plan: RunPlan) -> Iterator[str]:
    layout = plan.layout
    yield str(plan.batch)
    yield f"world_size {config.cluster.world_size} = TP {layout.tp} x PP {layout.pp} x CP {layout.cp} x DP {plan.dp_size}"
    yield f"micro-batches: {_micro_batches(plan)}"
    length = config.rollout.num_rollout or f"those of {counted(config.rollout.num_epoch or 0, 'epoch')}"
    yield f"rollouts: {length}{_ahead(config, plan)}"


def _ahead(config: Config, plan: RunPlan) -> str:
    if config.asynchronous.fully_async:
        rate = f" (--lr: that of a run in turn, divided by {plan.max_staleness + 1})" if plan.max_staleness else ""
        return f", generated without a stop; trained tokens are at most {plan.max_staleness} versions old{rate}"
    return ", generated one ahead of training" if config.rollout.rollouts_ahead else ""


def missing_kernels(config: Config, *, on_gpus: bool) -> str:
    """Say that embedded engines on a CPU compute without their C++ kernels; empty: they have them, or do not want them."""
    engine = config.engine
    wants = engine.kind == "embedded" and not on_gpus and engine.embedded_native_kernels
    if not wants or config.training.batch_invariant or find_compilers():
        return ""
    return f", without the C++ kernels: no {' or '.join(COMPILERS)} is installed"


def _engines(devices: DevicePlan) -> str:
    if not devices.num_engines:
        return "those of --rollout-external-engine-addrs"
    kinds = Counter(devices.engine_sizes)
    if len(kinds) == 1:
        (size,) = kinds
        return f"{counted(devices.num_engines, 'engine')} of {counted(size, 'device')}"
    return ", ".join(f"{count} of {counted(size, 'device')}" for size, count in kinds.items())


def _micro_batches(plan: RunPlan) -> str:
    if plan.micro_batch_tokens is not None:
        return f"packed up to {plan.micro_batch_tokens} tokens, the same number on each of the {plan.dp_size} DP ranks"
    per_rank = -(-plan.batch.global_batch_size // (plan.micro_batch_size * plan.dp_size))
    return f"{per_rank} of {counted(plan.micro_batch_size, 'sample')} in each step on each of the {plan.dp_size} DP ranks"


def _giga(flops: float) -> str:
    return f"{flops / 1e9:.3g}"
