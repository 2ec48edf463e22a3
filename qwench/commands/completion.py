"""`qwench completion bash|zsh`: print the script that completes verbs, flags, their values and files in a shell."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

import shtab

from qwench.config.command_line.flags import Flag, flag_table
from qwench.config.command_line.help import first_sentence, is_help
from qwench.config.command_line.verb_help import PAGES
from qwench.config.config import Config
from qwench.config.sections.convert import ConvertConfig
from qwench.config.sections.verbs import (
    DoctorConfig,
    DownloadConfig,
    MakeModelConfig,
    QuickstartConfig,
    RewardCheckConfig,
    ServeConfig,
)
from qwench.config.values import choices, strip_none, takes_many
from qwench.errors import ConfigError

SHELLS = ("bash", "zsh")
_USAGE = """\
usage: qwench completion bash|zsh

Print the completion script of a shell. It is written once, and completes without starting Python.

  bash   add to ~/.bashrc:  source <(qwench completion bash)
  zsh    qwench completion zsh > ~/.zfunc/_qwench
         with these lines in ~/.zshrc:  fpath+=~/.zfunc; autoload -Uz compinit; compinit
"""
_FLAGS_OF: Mapping[str, type] = {
    "train": Config,
    "sft": Config,
    "eval": Config,
    "serve": ServeConfig,
    "convert": ConvertConfig,
    "make-model": MakeModelConfig,
    "download": DownloadConfig,
    "doctor": DoctorConfig,
    "quickstart": QuickstartConfig,
}
_FILES = frozenset({"prompt-data", "eval-prompt-data", "config", "load-debug-rollout-data", "save-debug-rollout-data"})
"""Flags whose values are files, though their fields are texts."""


def run(words: Sequence[str]) -> None:
    """Print the script.

    Raises:
        ConfigError: no shell is named, or one that is not known.
    """
    if is_help(words):
        sys.stdout.write(_USAGE)
        return
    if len(words) != 1 or words[0] not in SHELLS:
        raise ConfigError(f"usage: qwench completion {'|'.join(SHELLS)}; got {' '.join(words) or 'no shell'}")
    sys.stdout.write(shtab.complete(build_parser(), shell=words[0]) + "\n")


def build_parser() -> argparse.ArgumentParser:
    """Return the verbs and flags in the form that shtab reads; it parses nothing."""
    parser = argparse.ArgumentParser(prog="qwench", add_help=False)
    parser.add_argument("--version", action="store_true", help="Print the version.")
    parser.add_argument("--help", action="store_true", help="Print the verbs.")
    verbs = parser.add_subparsers()
    for verb, config_type in _FLAGS_OF.items():
        _add_flags(verbs.add_parser(verb, help=_summary(verb), add_help=False), config_type)
    reward = verbs.add_parser("reward", help=_summary("reward check"), add_help=False).add_subparsers()
    check = reward.add_parser("check", help=_summary("reward check"), add_help=False)
    check.add_argument("file").complete = shtab.FILE  # type: ignore[attr-defined]  # shtab's own mark
    _add_flags(check, RewardCheckConfig)
    completion = verbs.add_parser("completion", help="Print the completion script of a shell.", add_help=False)
    completion.add_argument("shell", choices=SHELLS)
    return parser


def _add_flags(parser: argparse.ArgumentParser, config_type: type) -> None:
    for flag in flag_table(config_type).values():
        _add_flag(parser, flag)
    if config_type is Config:
        config = parser.add_argument("--config", help="YAML file of flags.")
        config.complete = shtab.FILE  # type: ignore[attr-defined]  # shtab's own mark
    for name, meaning in (("--help", "Show what is required and a typical command."), ("--help-all", "List every flag.")):
        parser.add_argument(name, action="store_true", help=meaning)


def _add_flag(parser: argparse.ArgumentParser, flag: Flag) -> None:
    meaning = first_sentence(flag.help).replace("%", "%%")
    if flag.is_switch:
        parser.add_argument(f"--{flag.name}", action="store_true", help=meaning)
        if flag.negation is not None:
            parser.add_argument(f"--{flag.negation}", action="store_true", help=f"Off: {meaning}")
        return
    action = parser.add_argument(
        f"--{flag.name}",
        choices=choices(flag.annotation) or None,
        nargs="*" if takes_many(flag.annotation) else None,
        help=meaning,
    )
    kind = strip_none(flag.annotation)
    if kind is Path or Path in get_args(kind) or flag.name in _FILES:
        action.complete = shtab.FILE  # type: ignore[attr-defined]  # shtab's own mark


def _summary(verb: str) -> str:
    return next((page.summary for prog, page in PAGES.items() if prog.startswith(f"qwench {verb}")), "")
