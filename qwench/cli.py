"""The command line: `qwench VERB ...`. Explains the verbs and calls the module of the one that is named.

Exit codes: 0 done; 1 the run failed; 2 the user's mistake, found before anything started; 129, 130, 143 ended by
SIGHUP, Ctrl-C or SIGTERM; 141 standard output was closed by its reader.
"""

from __future__ import annotations

import difflib
import errno
import faulthandler
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from qwench import __version__
from qwench.errors import ConfigError, QwenchError, Stopped
from qwench.observability.stopping import ended_by_signals
from qwench.threads import waiting_defaults

EXIT_CLOSED_OUTPUT = 141  # 128 + SIGPIPE, what a shell reports of other programs

USAGE = """\
usage: qwench VERB [FLAGS]

Post-train Qwen3 with reinforcement learning and supervised fine-tuning.

  train          train by reinforcement learning (GRPO and relatives)
  sft            train on conversations (supervised fine-tuning)
  eval           score a model on evaluation sets
  serve          serve a model over SGLang's and OpenAI's HTTP APIs
  reward check   grade a file of responses and labels
  convert        convert a checkpoint between Hugging Face, torch_dist (Megatron), FSDP and FP8
  make-model     write a checkpoint with random weights, from tiny to 32B
  download       download models and data sets from the Hugging Face hub
  doctor         check this machine: packages, GPUs, network, disk
  quickstart     train a tiny model to do arithmetic, in minutes on a CPU
  completion     print the completion script of a shell: bash or zsh

  qwench VERB --help   show what a verb requires and a typical command; --help-all lists every flag
  qwench --version     print the version
  --traceback          (any verb) print the whole traceback of an error; QWENCH_TRACEBACK=1 does the same
"""
VERBS = ("train", "sft", "eval", "serve", "reward", "convert", "make-model", "download", "doctor", "quickstart", "completion")

_WORDS_FOR_VERBS = {
    "train": "rl grpo gspo ppo rlhf dapo reinforce fit learn launch run start resume post-train",
    "train --dry-run": "plan dry-run",
    "sft": "finetune fine-tune finetuning fine-tuning tune ft train-sft supervised instruct pretrain",
    "eval": "evaluate evaluation evals test validate bench benchmark score",
    "serve": "server serving generate infer inference chat sample complete api deploy host predict",
    "reward check": "grade grading grader rewards rm verify",
    "convert": "export merge quantize quantise save-hf to-hf from-hf conversion",
    "make-model": "makemodel make create init new random-model create-model model",
    "download": "pull get fetch clone hub",
    "doctor": "env info check diagnose status env-info",
    "quickstart": "demo tutorial tour example quick-start",
    "completion": "completions complete-shell autocomplete",
}
"""Verb -> words that users of other tools type for it."""

_SHOWN_CHARS = 500

_TROUBLES_OF_STDOUT = (errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG)
"""Errors of writing to a pipe without reader, to a full disk, beyond a limit."""

Command = Callable[[Sequence[str]], None]


def _refuse_without_docstrings(optimize: int) -> None:
    if optimize > 1:
        raise ConfigError(
            "Python runs without docstrings (-OO or PYTHONOPTIMIZE=2), which help and transformers read; unset it."
        )


def _refuse_deleted_folder() -> None:
    try:
        Path.cwd()
    except FileNotFoundError as error:
        raise ConfigError("the working folder was deleted; change to another one, or enter it again.") from error


def main(argv: Sequence[str] | None = None, *, command: Command | None = None) -> NoReturn:
    """Run the verb of the command line, or `command` with all its words, and end the process with its exit code."""
    _open_closed_streams()
    if sys.__stderr__ is not None:
        faulthandler.enable(sys.__stderr__)  # a crash of native code says where it was
    os.environ.update(waiting_defaults(os.environ))  # before a verb imports PyTorch; child processes inherit it
    words = list(sys.argv[1:] if argv is None else argv)
    with_traceback = "--traceback" in words or os.environ.get("QWENCH_TRACEBACK", "") not in ("", "0")
    words = [word for word in words if word != "--traceback"]
    try:
        _refuse_without_docstrings(sys.flags.optimize)
        _refuse_deleted_folder()
        try:
            if command is None:
                command, words = find_command(words)
            with ended_by_signals():
                command(words)
        finally:
            sys.stdout.flush()  # before main returns, or a closed pipe goes unnoticed
    except QwenchError as error:
        if with_traceback:
            raise
        sys.stderr.write(f"qwench: {' '.join(str(error).split())}\n")
        sys.exit(2 if isinstance(error, ConfigError) else 1)
    except Stopped as stopped:
        sys.stderr.write(f"qwench: {_told(stopped, sys.argv[1:] if argv is None else argv)}\n")
        sys.exit(128 + stopped.number)
    except KeyboardInterrupt:
        sys.stderr.write("qwench: interrupted\n")
        sys.exit(130)
    except Exception as error:
        if isinstance(error, OSError):
            _end_if_stdout_failed(error)
        if with_traceback:
            raise
        sys.stderr.write(f"qwench: {_unforeseen(error)}\n")
        sys.exit(1)
    sys.exit(0)


def find_command(words: Sequence[str]) -> tuple[Command, list[str]]:
    """Return the verb that `words` begin with, and the words that follow it.

    Raises:
        ConfigError: there is no such verb.
    """
    asks = bool(words) and words[0] in ("-h", "--help", "help")
    rest = list(words[1:] if asks else words)
    if not rest:
        return show_usage, []
    verb, *rest = rest
    if verb in ("--version", "-V", "version"):
        return show_version, []
    if verb not in VERBS:
        raise ConfigError(unknown_verb(verb))
    if asks or rest[:1] == ["help"]:
        rest = [*(word for word in rest if word == "check"), "--help"]
    return _load_verb(verb), rest


def unknown_verb(word: str) -> str:
    """Say which verb is meant, where that can be told."""
    if word.startswith("-"):
        return f"the verb comes first: qwench VERB {word} ...; known: {', '.join(VERBS)}"
    word = word.lower().replace("_", "-")
    meant = next((verb for verb, others in _WORDS_FOR_VERBS.items() if word in others.split()), None)
    close = [meant] if meant else difflib.get_close_matches(word, VERBS, n=1)
    hint = f"did you mean qwench {close[0]}? " if close else ""
    return f"unknown verb {word!r}; {hint}known: {', '.join(VERBS)}"


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
            from qwench.commands import train

            return train.run_sft
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
        case "completion":
            from qwench.commands import completion

            return completion.run
    from qwench.commands import quickstart

    return quickstart.run


def _unforeseen(error: Exception) -> str:
    """Describe an error that no message was written for, with the innermost lines of the package and of all."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename.startswith(str(Path(__file__).parent))] or frames
    places = ", in ".join(dict.fromkeys(f"{frame.filename}:{frame.lineno}" for frame in (own[-1], frames[-1])))
    said = " ".join(str(error).split())[:_SHOWN_CHARS]
    return (
        f"{type(error).__name__}: {said} ({places}). This is a fault of Qwench or of the machine; --traceback shows all, "
        "and driver.log beside the metrics keeps it."
    )


def _told(stopped: Stopped, words: Sequence[str]) -> str:
    """Say by what the run was ended, what is saved, and what to type next."""
    by = "interrupted" if stopped.number == signal.SIGINT else f"stopped by {signal.Signals(stopped.number).name}"
    if not stopped.outcome:
        return by
    return f"{by}. {stopped.outcome}\n  {shlex.join(['qwench', *words])}"


def _open_closed_streams() -> None:
    """Open standard streams that the shell closed (`>&-`): the next file to be opened would take their place."""
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)  # the lowest free number
            assert opened == descriptor, f"descriptor {descriptor} is free, and {opened} was opened"
            os.set_inheritable(descriptor, True)
            stream = os.fdopen(descriptor, "r" if name == "stdin" else "w", closefd=False)
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)


def _end_if_stdout_failed(error: OSError) -> None:
    """End the process where the error is that of writing to standard output."""
    trouble = _trouble_of_stdout() if error.errno in _TROUBLES_OF_STDOUT else None
    if trouble is None:
        return
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains when it flushes
    if isinstance(trouble, BrokenPipeError):
        sys.exit(EXIT_CLOSED_OUTPUT)
    sys.stderr.write(f"qwench: standard output cannot be written to ({trouble.strerror}); write it to another place.\n")
    sys.exit(1)


def _trouble_of_stdout() -> OSError | None:
    """Return why standard output cannot be written to; None: an error of it was that of something else."""
    try:
        sys.stdout.write("\n")  # what was lost is not written again, so something must be for the file to be tried
        sys.stdout.flush()
    except OSError as trouble:
        return trouble
    return None
