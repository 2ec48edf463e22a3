"""The command line: `qwench VERB ...`. Verbs import late, so that `qwench --help` is instant.

Exit codes: 0 done; 1 the run failed; 2 the user's mistake, found before anything started; 130 interrupted; 141 standard output
was closed by its reader.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NoReturn

from qwench import __version__
from qwench.errors import ConfigError, QwenchError

if TYPE_CHECKING:
    from qwench.config import Config, RunPlan

EXIT_CLOSED_OUTPUT = 141  # 128 + SIGPIPE, what a shell reports of other programs

USAGE = """\
usage: qwench VERB [FLAGS]

Post-train Qwen3 with reinforcement learning and supervised fine-tuning.

  train          reinforcement learning (GRPO and relatives)
  sft            supervised fine-tuning
  eval           score a model on evaluation sets
  serve          the embedded engine behind SGLang's HTTP API
  reward check   grade a file of responses and labels
  convert        checkpoints between Hugging Face, Megatron's torch_dist and FSDP
  make-model     a checkpoint with random weights, from tiny to 32B
  download       models and data sets of the Hugging Face hub
  doctor         what this machine has and what is amiss
  quickstart     from nothing to a model that learned arithmetic, in minutes on a CPU

  qwench VERB --help   all flags of a verb
  qwench --version     the version
  --traceback          (any verb) show the whole traceback of an error; so does QWENCH_TRACEBACK=1
"""


def main(argv: Sequence[str] | None = None, *, command: Callable[[Sequence[str]], None] | None = None) -> NoReturn:
    """Run the verb of the command line, or `command` with all its words, and end the process with its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    with_traceback = "--traceback" in words or os.environ.get("QWENCH_TRACEBACK", "") not in ("", "0")
    words = [word for word in words if word != "--traceback"]
    try:
        _run_and_flush(command or run, words)
    except BrokenPipeError:
        if not _stdout_is_closed():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains when it flushes
        sys.exit(EXIT_CLOSED_OUTPUT)
    except QwenchError as error:
        if with_traceback:
            raise
        _say(f"qwench: {' '.join(str(error).split())}")
        sys.exit(2 if isinstance(error, ConfigError) else 1)
    except KeyboardInterrupt:
        _say("qwench: interrupted")
        sys.exit(130)
    sys.exit(0)


def run(words: Sequence[str]) -> None:
    """Run the verb that `words` begin with.

    Raises:
        QwenchError: the verb's own, or a ConfigError for a verb that does not exist.
    """
    if not words or words[0] in ("-h", "--help", "help"):
        sys.stdout.write(USAGE)
    elif words[0] == "--version":
        sys.stdout.write(f"qwench {__version__}\n")
    elif words[0] in VERBS:
        VERBS[words[0]](words[1:])
    else:
        raise ConfigError(f"unknown verb {words[0]!r}; known: {', '.join(VERBS)}")


def train(words: Sequence[str]) -> None:
    """Train by reinforcement learning, or fine-tune when the flags say --loss-type sft_loss, as slime's SFT recipe does."""
    from qwench.config.command_line.parse import parse_train

    config = parse_train(words)
    if _ends_as_dry_run(config):
        return
    _set_environment(config)
    from qwench import launch

    plan = launch.plan_inputs(config, trains=True)
    if config.algorithm.loss_type == "sft_loss":
        launch.sft(config, plan)
    else:
        launch.train(config, plan)


def sft(words: Sequence[str]) -> None:
    """Fine-tune on conversations."""
    from qwench.config.command_line.parse import parse_sft

    config = parse_sft(words)
    if _ends_as_dry_run(config):
        return
    _set_environment(config)
    from qwench import launch

    launch.sft(config, launch.plan_inputs(config, trains=True))


def evaluate(words: Sequence[str]) -> None:
    """Score a model on evaluation sets."""
    from qwench.config.command_line.parse import parse_eval

    config = parse_eval(words)
    if _ends_as_dry_run(config, trains=False):
        return
    _set_environment(config)
    from qwench import launch

    launch.evaluate(config, launch.plan_inputs(config, trains=False))


def serve(words: Sequence[str]) -> None:
    """Serve a model over HTTP."""
    from qwench.config.command_line.parse import parse_serve

    config = parse_serve(words)
    from qwench import launch

    launch.serve(config)


def reward(words: Sequence[str]) -> None:
    """Grade a file of responses: `qwench reward check FILE`."""
    from qwench.config.command_line.parse import parse_flags
    from qwench.config.sections.verbs import RewardCheckConfig, split_file

    if not words or words[0] != "check":
        raise ConfigError(f"qwench reward has one command, check; got {' '.join(words[:1]) or 'none'}")
    file, flags = split_file(words[1:], usage="qwench reward check FILE --rm-type NAME")
    config = parse_flags(RewardCheckConfig, flags, prog="qwench reward check FILE")
    from qwench.commands.reward_check import check_file

    columns = config.columns
    check_file(file, config=config.reward, response_key=columns.response_key, label_key=columns.label_key)


def convert(words: Sequence[str]) -> None:
    """Write a checkpoint in another format."""
    from qwench.config.command_line.parse import parse_flags
    from qwench.config.sections.convert import ConvertConfig

    config = parse_flags(ConvertConfig, words, prog="qwench convert")
    from qwench.commands.convert import convert as run_conversion

    run_conversion(config)


def convert_hf_to_torch_dist(words: Sequence[str]) -> None:
    """Do what slime's script of this name does, by its command line."""
    from qwench.config.command_line.parse import parse_flags
    from qwench.config.sections.convert import HfToTorchDistConfig

    config = parse_flags(HfToTorchDistConfig, words, prog="convert_hf_to_torch_dist.py")
    from qwench.commands.convert import convert_hf_to_torch_dist as run_conversion

    run_conversion(config)


def convert_torch_dist_to_hf(words: Sequence[str]) -> None:
    """Do what slime's script of this name does, by its command line."""
    from qwench.config.command_line.parse import parse_flags
    from qwench.config.sections.convert import TorchDistToHfConfig

    long_words = ["--force" if word == "-f" else word for word in words]
    config = parse_flags(TorchDistToHfConfig, long_words, prog="convert_torch_dist_to_hf.py")
    from qwench.commands.convert import convert_torch_dist_to_hf as run_conversion

    run_conversion(config)


def make_model(words: Sequence[str]) -> None:
    """Write a checkpoint with random weights."""
    from qwench.config.command_line.parse import parse_flags
    from qwench.config.sections.verbs import MakeModelConfig

    config = parse_flags(MakeModelConfig, words, prog="qwench make-model")
    from qwench.models.made.tiny import make_checkpoint
    from qwench.models.made.tokenizers import build_qwen_tokenizer, build_small_tokenizer

    tokenizer = build_qwen_tokenizer(config.qwen_tiktoken) if config.tokenizer == "qwen" else build_small_tokenizer()
    make_checkpoint(config.output, size=config.size, tokenizer=tokenizer, seed=config.seed)


def download(words: Sequence[str]) -> None:
    """Fetch repositories of the Hugging Face hub: `qwench download OWNER/NAME ... --output DIR`."""
    from qwench.config.command_line.parse import parse_flags
    from qwench.config.sections.verbs import DownloadConfig, split_names

    names, flags = split_names(words)
    config = parse_flags(DownloadConfig, flags, prog="qwench download OWNER/NAME ...")
    from qwench.models import download as hub

    for folder in hub.download(names, output=config.output, kind=config.kind, revision=config.revision):
        sys.stdout.write(f"{folder}\n")


def doctor(words: Sequence[str]) -> None:
    """Report on this machine."""
    from qwench.config.command_line.parse import parse_flags
    from qwench.config.sections.verbs import DoctorConfig

    config = parse_flags(DoctorConfig, words, prog="qwench doctor")
    from qwench.commands.doctor import examine, render

    sys.stdout.write(render(examine(config.output)))


def quickstart(words: Sequence[str]) -> None:
    """Make a tiny model, teach it arithmetic by SFT and GRPO, and show what was learned."""
    from qwench.config.command_line.parse import parse_flags
    from qwench.config.sections.verbs import QuickstartConfig

    config = parse_flags(QuickstartConfig, words, prog="qwench quickstart")
    from qwench.commands import quickstart as tour

    tour.main(config.output, seed=config.seed)


VERBS: Mapping[str, Callable[[Sequence[str]], None]] = {
    "train": train,
    "sft": sft,
    "eval": evaluate,
    "serve": serve,
    "reward": reward,
    "convert": convert,
    "make-model": make_model,
    "download": download,
    "doctor": doctor,
    "quickstart": quickstart,
}


def _run_and_flush(command: Callable[[Sequence[str]], None], words: Sequence[str]) -> None:
    """Run the command; what it wrote must be out before main returns, or a closed pipe goes unnoticed."""
    try:
        command(words)
    finally:
        sys.stdout.flush()


def _stdout_is_closed() -> bool:
    """Tell whether a BrokenPipeError was that of standard output, and not of some connection."""
    try:
        sys.stdout.write("\n")  # what was lost is not written again, so something must be for the pipe to be tried
        sys.stdout.flush()
    except BrokenPipeError:
        return True
    return False


def _set_environment(config: Config) -> None:
    """Set the variables that the flags ask for; the one place where the environment is written, before PyTorch reads it."""
    from qwench.config.environment import trainer_environment

    os.environ.update(trainer_environment(config.cluster, config.parallel, config.training, os.environ))


def _ends_as_dry_run(config: Config, *, trains: bool = True) -> bool:
    """Show what may not be meant; with --dry-run also the whole configuration, and say that nothing should be run."""
    from qwench.config.advice import warnings

    for warning in warnings(config, trains=trains):
        _say(f"qwench: warning: {warning}")
    if config.debug.dry_run:
        from qwench.launch.inputs import plan_inputs

        _show(config, plan_inputs(config, trains=trains))
    return config.debug.dry_run


def _show(config: Config, plan: RunPlan) -> None:
    from rich.console import Console
    from rich.text import Text

    from qwench.config.plan import plan_lines
    from qwench.config.report import settings_by_section

    console = Console(soft_wrap=True)
    for section, settings in settings_by_section(config).items():
        console.print(Text(section, style="bold"))
        for setting in settings:
            style = "dim" if setting.is_default else "green"
            console.print(Text(f"  {setting.flag} {setting.value}", style=style))
    console.print(Text("plan", style="bold"))
    for line in plan_lines(config, plan):
        console.print(Text(f"  {line}"))


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
