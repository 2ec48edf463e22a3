"""The command line: `qwench VERB ...`. Explains the verbs and calls the module of the one that is named.

Exit codes: 0 done; 1 the run failed; 2 the user's mistake, found before anything started; 130 interrupted; 141 standard output
was closed by its reader.
"""

from __future__ import annotations

import faulthandler
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from qwench import __version__
from qwench.errors import ConfigError, QwenchError
from qwench.threads import waiting_defaults

EXIT_CLOSED_OUTPUT = 141  # 128 + SIGPIPE, what a shell reports of other programs

USAGE = """\
usage: qwench VERB [FLAGS]

Post-train Qwen3 with reinforcement learning and supervised fine-tuning.

  train          train by reinforcement learning (GRPO and relatives)
  sft            train on conversations (supervised fine-tuning)
  eval           score a model on evaluation sets
  serve          serve a model over SGLang's HTTP API with the embedded engine
  reward check   grade a file of responses and labels
  convert        convert a checkpoint between Hugging Face, torch_dist (Megatron), FSDP and FP8
  make-model     write a checkpoint with random weights, from tiny to 32B
  download       download models and data sets from the Hugging Face hub
  doctor         check this machine: packages, GPUs, network, disk
  quickstart     train a tiny model to do arithmetic, in minutes on a CPU

  qwench VERB --help   list all flags of a verb
  qwench --version     print the version
  --traceback          (any verb) print the whole traceback of an error; QWENCH_TRACEBACK=1 does the same
"""
VERBS = ("train", "sft", "eval", "serve", "reward", "convert", "make-model", "download", "doctor", "quickstart")

Command = Callable[[Sequence[str]], None]


def main(argv: Sequence[str] | None = None, *, command: Command | None = None) -> NoReturn:
    """Run the verb of the command line, or `command` with all its words, and end the process with its exit code."""
    if sys.__stderr__ is not None:  # closed by the shell
        faulthandler.enable(sys.__stderr__)  # a crash of native code says where it was
    os.environ.update(waiting_defaults(os.environ))  # before a verb imports PyTorch; child processes inherit it
    words = list(sys.argv[1:] if argv is None else argv)
    with_traceback = "--traceback" in words or os.environ.get("QWENCH_TRACEBACK", "") not in ("", "0")
    words = [word for word in words if word != "--traceback"]
    try:
        try:
            if command is None:
                command, words = find_command(words)
            command(words)
        finally:
            sys.stdout.flush()  # before main returns, or a closed pipe goes unnoticed
    except BrokenPipeError:
        if not _stdout_is_closed():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains when it flushes
        sys.exit(EXIT_CLOSED_OUTPUT)
    except QwenchError as error:
        if with_traceback:
            raise
        sys.stderr.write(f"qwench: {' '.join(str(error).split())}\n")
        sys.exit(2 if isinstance(error, ConfigError) else 1)
    except KeyboardInterrupt:
        sys.stderr.write("qwench: interrupted\n")
        sys.exit(130)
    sys.exit(0)


def find_command(words: Sequence[str]) -> tuple[Command, list[str]]:
    """Return the verb that `words` begin with, and the words that follow it.

    Raises:
        ConfigError: there is no such verb.
    """
    if not words or words[0] in ("-h", "--help", "help"):
        return show_usage, []
    if words[0] == "--version":
        return show_version, []
    if words[0] not in VERBS:
        raise ConfigError(f"unknown verb {words[0]!r}; known: {', '.join(VERBS)}")
    return _load_verb(words[0]), list(words[1:])


def show_usage(words: Sequence[str]) -> None:
    """Print the verbs."""
    sys.stdout.write(USAGE)


def show_version(words: Sequence[str]) -> None:
    """Print the version."""
    sys.stdout.write(f"qwench {__version__}\n")


def _load_verb(verb: str) -> Command:
    """Import the module of a verb, and no other: some need libraries that take seconds to import."""
    match verb:
        case "train":
            from qwench.commands import train

            return train.run
        case "sft":
            from qwench.commands import sft

            return sft.run
        case "eval":
            from qwench.commands import evaluate

            return evaluate.run
        case "serve":
            from qwench.commands import serve

            return serve.run
        case "reward":
            from qwench.commands import reward_check

            return reward_check.run
        case "convert":
            from qwench.commands import convert

            return convert.run
        case "make-model":
            from qwench.commands import make_model

            return make_model.run
        case "download":
            from qwench.commands import download

            return download.run
        case "doctor":
            from qwench.commands import doctor

            return doctor.run
    from qwench.commands import quickstart

    return quickstart.run


def _stdout_is_closed() -> bool:
    """Tell whether a BrokenPipeError was that of standard output, and not of some connection."""
    try:
        sys.stdout.write("\n")  # what was lost is not written again, so something must be for the pipe to be tried
        sys.stdout.flush()
    except BrokenPipeError:
        return True
    return False
