"""What verbs do with a parsed configuration before they start: warn, set the environment, plan, and show a dry run."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace

from rich.text import Text

from qwench.cluster.child import describe_end
from qwench.config.advice import plan_warnings, warnings
from qwench.config.command_line.compat import EMBEDDED_ALIASES
from qwench.config.command_line.parse import Declared
from qwench.config.config import Config
from qwench.config.config_text import PARSER_SETTINGS, as_typed, replaced_values, settings_by_section
from qwench.config.engine_choice import check_engine_is_installed, look_at_machine
from qwench.config.environment import trainer_environment
from qwench.config.eval_sets import eval_settings
from qwench.config.memory_fit import engine_weight_bytes
from qwench.config.named_files import check_checkpoint
from qwench.config.plan import BFLOAT16_BYTES, RunPlan, train_dtype
from qwench.config.plan_lines import plan_lines
from qwench.data.rows import check_first_row
from qwench.errors import ConfigError
from qwench.hub import data_files, find_reference, model_folder
from qwench.launch.trial_import import run_child
from qwench.models.memory import FLOAT32_BYTES, gib
from qwench.observability.console import StandardOutput
from qwench.plugins import place_in_stack


def ask_functions(paths: Sequence[str]) -> Declared:
    """Return the flags that functions declare. Another process imports them: PyTorch must not be imported here yet.

    Raises:
        ConfigError: a function cannot be loaded, or declares a flag that Qwench has.
    """
    named = " ".join(paths)
    code, report, errors = run_child("qwench.foreign.declared_flags", paths, named=named)
    if not report:
        how = f"{describe_end(code)}, at {place}" if (place := place_in_stack(errors)) else describe_end(code)
        raise ConfigError(f"{named} cannot be asked for flags: a module ends the process (it {how}).")
    answer = json.loads(report)
    if answer["problem"]:
        raise ConfigError(answer["problem"])
    return Declared(names=frozenset(answer["names"]), help=answer["help"])


def with_local_inputs(config: Config) -> Config:
    """Return the configuration with every name of the hub replaced by the folder or file in the cache, downloaded now.

    Ranks and engine servers get these paths. A dry run downloads no weights.

    Raises:
        ConfigError: the hub did not give one.
    """
    model, checkpoint, data, sets = config.model, config.checkpoint, config.data, config.evaluation.eval_prompt_data
    with_weights = not config.debug.dry_run
    assert model.hf_checkpoint is not None, "config.verb_checks requires --hf-checkpoint"
    folder = model_folder(model.hf_checkpoint, flag="--hf-checkpoint", with_weights=with_weights)
    files = tuple(data_files(word, flag="--eval-prompt-data") if i % 2 else word for i, word in enumerate(sets))
    local = replace(
        config, model=replace(model, hf_checkpoint=folder), evaluation=replace(config.evaluation, eval_prompt_data=files)
    )
    if data.prompt_data is not None:
        local = replace(local, data=replace(data, prompt_data=data_files(data.prompt_data, flag="--prompt-data")))
    if checkpoint.ref_load is not None:
        reference = model_folder(checkpoint.ref_load, flag="--ref-load", with_weights=with_weights)
        local = replace(local, checkpoint=replace(checkpoint, ref_load=reference))
    _say_where(config, local)
    if local.model != model:
        check_checkpoint(local.model)
    return local


def _say_where(asked: Config, local: Config) -> None:
    for flag, before, after in (
        ("--hf-checkpoint", asked.model.hf_checkpoint, local.model.hf_checkpoint),
        ("--prompt-data", asked.data.prompt_data, local.data.prompt_data),
        ("--ref-load", asked.checkpoint.ref_load, local.checkpoint.ref_load),
        *(
            ("--eval-prompt-data", before, after)
            for before, after in zip(asked.evaluation.eval_prompt_data, local.evaluation.eval_prompt_data, strict=True)
        ),
    ):
        if before != after:
            sys.stderr.write(f"qwench: {flag} {before} is read from {after}\n")


def prepare(config: Config, *, trains: bool = True) -> RunPlan:
    """Plan the run; print warnings, and with --dry-run the settings and the plan.

    The environment is written here only, before PyTorch is imported.

    Raises:
        ConfigError: the flags do not fit the model or each other.
    """
    for warning in warnings(config, trains=trains):
        sys.stderr.write(f"qwench: warning: {warning}\n")
    _check_columns(config)  # before seconds of imports
    if not config.debug.dry_run:
        check_engine_is_installed(config, look_at_machine())
        os.environ.update(trainer_environment(config, os.environ))
    from qwench.launch.inputs import plan_inputs  # PyTorch reads the environment when it is imported

    plan = plan_inputs(config, trains=trains)
    if config.evaluation.eval_config is not None:
        sets = (replace(one, path=data_files(one.path, flag="--eval-config")) for one in plan.eval_sets)
        plan = replace(plan, eval_sets=tuple(sets))
    for warning in plan_warnings(config, plan):
        sys.stderr.write(f"qwench: warning: {warning}\n")
    if config.debug.dry_run:
        _show(config, plan)
    return plan


def _check_columns(config: Config) -> None:
    """Check that the first rows have the column of the prompt; conversations come in several forms, which are read later."""
    data, rollout = config.data, config.rollout
    if config.algorithm.loss_type == "sft_loss":
        return
    if config.debug.load_debug_rollout_data is None and data.prompt_data is not None and rollout.rollout_function_path is None:
        check_first_row(data.prompt_data, data.input_key, flag="--input-key")
    for one in eval_settings(config.evaluation, rollout, data):
        if find_reference(one.path, "dataset") is None:
            check_first_row(one.path, one.input_key, flag=config.evaluation.key_flags["input_key"])


def _show(config: Config, plan: RunPlan) -> None:
    from qwench.launch.inputs import samples_in_fp8  # as in `prepare`

    fp8 = samples_in_fp8(config)
    console = StandardOutput(soft_wrap=True)
    console.print("settings that differ from their defaults (--help-all lists the others)")
    # A flag of SGLang that has a twin sets that too, before the engine is chosen.
    twins = set[str]() if config.engine.facts.reads_embedded_flags else {f"--{name}" for name in EMBEDDED_ALIASES.values()}
    hidden = PARSER_SETTINGS | twins
    for section, settings in settings_by_section(config).items():
        changed = [setting for setting in settings if not setting.is_default and setting.flag not in hidden]
        if changed:
            console.print(Text(section, style="bold"))
        for setting in changed:
            console.print(Text(f"  {as_typed(setting)}"))
    if replaced := replaced_values(config):
        console.print(Text(f"given before with another value, which the last one replaces: {', '.join(replaced)}"))
    console.print(Text("plan", style="bold"))
    for line in plan_lines(config, plan):
        console.print(Text(f"  {line}"))
    dtype = train_dtype(config, on_gpus=plan.devices.on_gpus)
    element_bytes = {"bfloat16": BFLOAT16_BYTES, "float32": FLOAT32_BYTES}[dtype]
    if plan.devices.generates and (weights := engine_weight_bytes(plan, element_bytes=element_bytes, fp8=fp8)):
        console.print(Text(f"  engine weights: {gib(weights)} GiB in {'FP8' if fp8 else dtype} on each device"))
