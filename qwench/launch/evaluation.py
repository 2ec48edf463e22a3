"""`qwench eval`: engines with the checkpoint's own weights, without a trainer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import orjson

from qwench.config.config import Config
from qwench.config.config_text import flag_values
from qwench.config.plan import RunPlan
from qwench.errors import counted
from qwench.files import LOCK, claim_folder, write_atomically, written
from qwench.launch.inputs import Inputs, names_set, read_eval_prompts, read_inputs
from qwench.launch.outputs import own_results
from qwench.launch.placement import make_servers, open_processes
from qwench.launch.readiness import check_ready
from qwench.launch.rollouts import build_generation
from qwench.launch.run_facts import describe_model
from qwench.launch.trial_import import check_imports
from qwench.launch.user_functions import load_user_functions
from qwench.observability.log import open_driver_log
from qwench.observability.run_report import say_facts
from qwench.observability.summary import summarize
from qwench.rewards.graders import check_prompts
from qwench.rollout.evaluate import EvalResult
from qwench.samples import Prompt

_MARKER = "qwench_eval.json"
"""In --eval-output: the flags of the evaluation that wrote it."""


def evaluate(config: Config, plan: RunPlan) -> None:
    """Print the metrics of each set, and write them and every response to --eval-output."""
    inputs = read_inputs(config, plan)
    open_driver_log(config.logging.log_level, inputs.console)
    prompts = _check(inputs)
    output = config.evaluation.eval_output
    sets = {
        one.name: f"{one.path}: {counted(len(prompts[one.name]), 'prompt')} x {one.n_samples_per_eval_prompt}"
        for one in plan.eval_sets
    }
    say_facts(inputs.console, {"model": describe_model(inputs), **sets})
    with ExitStack() as started:
        if output is not None:
            own_results(output, started)  # before it is marked: of two that start at once one is refused
            own_eval_folder(output, flag_values(config), writes=True)
        processes = open_processes(inputs, started)
        servers, token = make_servers(inputs, processes, with_weights=True)
        generation = build_generation(inputs, with_weights=True, servers=servers, token=token)
        started.callback(generation.close)
        evaluator = generation.evaluator(prompts)
        # A custom evaluation gives metrics only.
        results = evaluator.run(generation.engines) if config.evaluation.eval_function_path is None else []
        metrics = evaluator.summarize(results) if results else evaluator.evaluate(generation.engines)
    for group in summarize(metrics):
        inputs.console.say(f"{group.title}: {'  '.join(f'{label} {value}' for label, value in group.values.items())}")
    if output is not None:
        _write_results(output, metrics, results)
        say_facts(inputs.console, {"written": f"{output}: metrics.json, and a file of responses for each set"})


def check(config: Config, plan: RunPlan) -> None:
    """Check what `evaluate` checks before a model loads: a dry run accepts what a start accepts.

    Raises:
        ConfigError: the user's mistake.
    """
    inputs = read_inputs(config, plan)
    _check(inputs)


def _check(inputs: Inputs) -> dict[str, Sequence[Prompt]]:
    """Check everything that an evaluation needs, without writing, and return its prompts."""
    config = inputs.config
    prompts = _read_sets(inputs)
    if config.evaluation.eval_output is not None:
        own_eval_folder(config.evaluation.eval_output, flag_values(config), writes=False)
    check_ready(inputs, prompts=prompts.values())
    return prompts


def _read_sets(inputs: Inputs) -> dict[str, Sequence[Prompt]]:
    """Read the prompts of each set, and check that rewards and functions fit them."""
    config = inputs.config
    check_imports(config, inputs.plan.eval_sets)
    load_user_functions(config)
    prompts = {name: loaded.prompts for name, loaded in read_eval_prompts(inputs).items()}
    for one in inputs.plan.eval_sets:
        with names_set(one.name):
            own = one.custom_generate_function_path is not None
            check_prompts(inputs.reward_of(one), prompts[one.name], may_come_graded=own)
    return prompts


def own_eval_folder(folder: Path, flags: Mapping[str, str], *, writes: bool) -> None:
    """Make --eval-output this evaluation's: the same command may replace its own results, nothing else is touched.

    Args:
        writes: a dry run checks the folder only.

    Raises:
        ConfigError: the folder holds another evaluation's results, or files that no evaluation wrote.
    """
    left_out = ("--eval-output", "--log-level", "--dry-run")  # a dry run is the evaluation that it checks
    claim_folder(
        folder,
        [{flag: value for flag, value in flags.items() if flag not in left_out}],
        marker=_MARKER,
        flag="--eval-output",
        held="an evaluation of another model or of other flags",
        writer="evaluation",
        own=[folder / LOCK],
        writes=writes,
    )


def _write_results(folder: Path, metrics: dict[str, float], results: Sequence[EvalResult]) -> None:
    with written(f"--eval-output {folder}", folder):
        write_atomically(folder / "metrics.json", json.dumps(metrics, indent=1) + "\n")
        for result in results:
            lines = (orjson.dumps(sample.to_record()) for sample in result.samples)
            write_atomically(folder / f"{result.name}.jsonl", b"\n".join(lines) + b"\n")
