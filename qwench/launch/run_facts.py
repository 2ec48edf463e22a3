"""What a run tells a person: what it is about to do, and after its last step what it has left and what to type next."""

from __future__ import annotations

import logging
import math
import os
import shlex
from pathlib import Path

import torch

from qwench.checkpoints.best import read_best
from qwench.checkpoints.folders import hf_folder, starting_weights
from qwench.checkpoints.formats.iterations import Iterations
from qwench.checkpoints.formats.sources import find_format
from qwench.config.plan_lines import adapter_line, missing_kernels
from qwench.errors import counted
from qwench.launch.inputs import Inputs
from qwench.observability.run_report import NEXT, RunReport
from qwench.rewards.second_grader import DISAGREEMENTS, describe_shortest, read_disagreements

_logger = logging.getLogger(__name__)


def start_report(inputs: Inputs, rows: str) -> RunReport:
    """Say what the run is about to do, and that it keeps nothing where that is so."""
    plan, flags = inputs.plan, inputs.config.logging
    report = RunReport(
        inputs.console,
        unit="step" if plan.fine_tunes else "rollout",
        total=plan.num_steps if plan.fine_tunes else plan.num_rollout,
        show_samples=flags.show_samples,
        table_interval=flags.table_interval,
    )
    report.start(_start_facts(inputs, rows))
    if plan.devices.trains and inputs.config.checkpoint.save is None:
        _logger.warning("nothing is saved: the weights are lost when the run ends; give --save FOLDER to keep them")
    if inputs.config.algorithm.keep_old_actor and not plan.num_past_policies:
        _logger.warning(
            "--keep-old-actor has no effect: the weights that sample are those that learn "
            "(--rollouts-ahead, --fully-async and --update-weights-interval change that)"
        )
    data = inputs.config.data
    if data.chat_template_path is not None and not (data.apply_chat_template or plan.fine_tunes):
        _logger.warning("--chat-template-path renders no prompts: --apply-chat-template is off")
    return report


def finish_report(report: RunReport, inputs: Inputs) -> None:
    """Say what the run has left, and what to type next."""
    listed = None if inputs.plan.log_dir is None else inputs.plan.log_dir / DISAGREEMENTS
    differing = None
    if inputs.config.reward.second_grader is not None and listed is not None and listed.is_file():
        differing = describe_shortest(read_disagreements(listed))
    found = {} if differing is None else {"differ": f"{differing} ({listed})"}
    ends = inputs.config.debug.debug_exit_after_rollout
    if ends is not None and report.is_unfinished and inputs.config.checkpoint.save is not None:
        found["left"] = f"--debug-exit-after-rollout {ends} ends this start; the same command goes on"
    report.finish(found | _end_facts(inputs))


def _start_facts(inputs: Inputs, rows: str) -> dict[str, str]:
    """Return what the run is about to do.

    Args:
        rows: what was read, such as `4,000 prompts`.
    """
    config, plan = inputs.config, inputs.plan
    data = config.data.prompt_data or config.debug.load_debug_rollout_data
    facts = {
        "model": describe_model(inputs),
        **({"adapters": adapter_line(config, plan)} if config.lora.enabled else {}),
        "data": f"{data}: {rows}",
        "devices": _devices(inputs),
        "length": _length(inputs),
    }
    if config.checkpoint.save is not None:
        every = config.checkpoint.save_interval
        facts["saves to"] = f"{config.checkpoint.save} {_after_every(inputs, every) if every is not None else 'at the end'}"
    if plan.log_dir is not None:
        facts["logs"] = str(plan.log_dir / "metrics.jsonl")
    return facts


def _end_facts(inputs: Inputs) -> dict[str, str]:
    """Return what a run that is done has left, and what to type next."""
    checkpoint, plan = inputs.config.checkpoint, inputs.plan
    if not plan.devices.trains:
        return {}
    if checkpoint.save is None:
        return {"saved": "nothing (no --save)"}
    iterations = Iterations(checkpoint.save)
    last = next(iter(iterations.newest_first()), None)  # --stop-metric ends a run before its last rollout
    if last is None:
        return {"saved": "nothing (the run ended before its first rollout)"}
    facts = {"saved": str(iterations.folder(last))}
    best = read_best(checkpoint.save) if checkpoint.keep_best else None
    if best is not None:
        facts["best"] = f"{iterations.folder(best.iteration)} ({best.metric} {best.value:.4g})"
    export = None if checkpoint.save_hf is None else hf_folder(checkpoint.save_hf, last - checkpoint.number(1))
    if best is None and export is not None and export.is_dir():
        return facts | {"exported": str(export), NEXT: shlex.join(["qwench", "serve", "--hf-checkpoint", str(export)])}
    chosen = [] if best is None else ["--ckpt-step", str(best.iteration)]
    base, before = _base_of_export(inputs)
    return facts | {NEXT: before + _conversion(checkpoint.save, *chosen, base=base, output=f"{checkpoint.save}-hf")}


def _base_of_export(inputs: Inputs) -> tuple[str, str]:
    """Return the model folder that an export needs, and the command that makes it for adapters of another checkpoint."""
    checkpoint, folder = inputs.config.checkpoint, str(inputs.model_folder)
    started = starting_weights(checkpoint) if inputs.config.lora.enabled else None
    if started is None:
        return folder, ""
    if find_format(started) == "hf":
        return str(started), ""
    base = f"{checkpoint.ref_load}-hf"
    return base, _conversion(started, base=folder, output=base) + " && "


def _conversion(source: Path, *words: str, base: str, output: str) -> str:
    convert = ["qwench", "convert", "--input", str(source), "--to", "hf", *words]
    return shlex.join([*convert, "--hf-checkpoint", base, "--output", output])


def describe_model(inputs: Inputs) -> str:
    """Return where the model lies, its kind and size, and the dtype that it is computed in."""
    model = inputs.plan.model
    count = _short_count(sum(math.prod(shape) for shape in model.parameter_shapes().values()))
    return f"{inputs.model_folder}: {model.model_type}, {count} parameters, {str(inputs.dtype).removeprefix('torch.')}"


def _length(inputs: Inputs) -> str:
    batch, schedule = inputs.plan.batch, inputs.plan.schedule
    epochs = _in_epochs(inputs.plan.num_rollout / schedule.rollouts_per_epoch) if schedule.rollouts_per_epoch else ""
    if inputs.plan.fine_tunes:
        return f"{counted(inputs.plan.num_steps, 'step')} of {counted(batch.global_batch_size, 'conversation')}{epochs}"
    samples = f"{counted(batch.rollout_batch_size, 'prompt')} x {counted(batch.n_samples_per_prompt, 'response')}"
    steps = f", {batch.num_steps_per_rollout} steps each" if batch.num_steps_per_rollout > 1 else ""
    return f"{counted(inputs.plan.num_rollout, 'rollout')} of {samples}{steps if inputs.plan.devices.trains else ''}{epochs}"


def _in_epochs(count: float) -> str:
    return f" ({count:.3g} epoch{'s' * (count != 1)})"


def _devices(inputs: Inputs) -> str:
    devices, config = inputs.plan.devices, inputs.config
    kind = torch.cuda.get_device_name(inputs.device) if inputs.device.type == "cuda" else "CPU"
    if inputs.device.type == "cpu":
        kind = f"CPU with {torch.get_num_threads()} of {os.cpu_count()} threads"
    ranks = config.cluster.world_size
    parts = [f"{counted(ranks, 'trainer rank')} ({config.backend})"] if devices.trains else []
    if devices.generates:
        number = str(devices.num_engines) if devices.num_engines else "external"
        sizes = " or ".join(map(str, sorted(set(devices.engine_sizes))))
        each = f" of {sizes} {'GPUs' if devices.on_gpus else 'processes'}" if sizes not in ("", "1") else ""
        slower = missing_kernels(config, on_gpus=inputs.device.type != "cpu")
        parts.append(f"{number} {config.engine.kind} engine{'s' * (devices.num_engines != 1)}{each}{slower}")
    shared = " that take turns" if devices.shared else ""
    count = sum(devices.critic)
    critic = f", and {counted(count, 'critic rank')} beside them"
    return f"{kind}: {' and '.join(parts)}{shared}{critic if count else ''}"


def _after_every(inputs: Inputs, interval: int) -> str:
    unit = "rollout" if not inputs.plan.fine_tunes else "step" if inputs.plan.batch.num_steps_per_rollout == 1 else "batch"
    return (
        f"after every {unit}" if interval == 1 else f"every {interval} {unit}{'es' if unit == 'batch' else 's'} and at the end"
    )


def _short_count(count: int) -> str:
    """Write a number of parameters as models are named: 1.05M, 596M, 8.19B."""
    scale, letter = (1e9, "B") if count >= 1e9 else (1e6, "M") if count >= 1e6 else (1e3, "k")
    return f"{count / scale:.3g}{letter}"
