"""Flags that a user's rollout and generate functions declare, as miles asks them: `function.add_arguments(parser)`.

    --custom-generate-function-path mine.generate --max-hops 3  ->  args.max_hops == 3

    python -m qwench.foreign.declared_flags PATH ...   prints the names as JSON

A command line is read before PyTorch is imported, and such a module may import it. So another process names the flags
(`commands.start`), and the run parses their values where it loads the functions.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
from argparse import Action, ArgumentError, ArgumentParser
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from qwench.config.command_line.compat import ALIASES, SHORTHANDS, foreign_flag
from qwench.config.command_line.flags import flag_table
from qwench.config.config import Config
from qwench.config.values import FALSE_WORDS, TRUE_WORDS
from qwench.errors import ConfigError
from qwench.foreign.loading import load
from qwench.observability.stopping import end_with_parent
from qwench.plugins import raised_at

_SHARED = "agent"
"""Section whose flags functions of miles declare too: those of the section are used."""


_OF_THE_COMMAND_LINE = ("help", "help-all", "config")
"""Flags that no section has."""


class _Parser(ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Raise the user's mistake."""
        raise ConfigError(f"a flag that a function declares by add_arguments(): {message}")


def parse_declared(config: Config) -> Mapping[str, Any]:  # Any: of the flags' own types
    """Return the values of the flags that the user's functions declare, under their Python names.

    Raises:
        ConfigError: a wrong value, or a flag that Qwench has.
    """
    rollout = config.rollout
    named = (
        ("rollout-function", rollout.rollout_function_path),
        ("custom-generate-function", rollout.custom_generate_function_path),
    )
    theirs = [(flag, path) for flag, path in named if path is not None and "." in path and not path.startswith("qwench.")]
    parser = _parser({path: load(path, flag=f"--{flag}-path") for flag, path in theirs})
    return vars(parser.parse_args(_spelled(config.foreign.declared_args, _options(parser))))


def _parser(functions: Mapping[str, object]) -> ArgumentParser:
    """Return a parser of the flags of functions, which are given by path."""
    parser = _Parser(prog="", usage="", add_help=False, allow_abbrev=False)
    for path, function in functions.items():
        add = getattr(function, "add_arguments", None)
        if not callable(add):
            continue
        try:
            add(parser)
            parser.format_help()  # argparse reads a help text only now
        except ArgumentError as error:
            raise ConfigError(f"two functions declare one flag: {error}") from error
        except (Exception, SystemExit) as error:  # the user's code, which may raise anything
            place = raised_at(error) or path
            raise ConfigError(f"add_arguments() of {path} failed ({type(error).__name__}: {error}, at {place}).") from error
    for action in parser._actions:  # argparse has no public list of them
        if not any(option.startswith("--") for option in action.option_strings):
            raise ConfigError(f"add_arguments() of a function declares {_shown(action)}; a flag begins with two dashes.")
    for name in _options(parser):
        _check_is_new(name)
    return parser


def _shown(action: Action) -> str:
    return ", ".join(action.option_strings) or f"the position {action.dest!r}"


def _options(parser: ArgumentParser) -> dict[str, tuple[str, Action]]:
    """Return flag name -> how the parser spells it, and its action."""
    return {
        option.removeprefix("--").replace("_", "-"): (option, action)
        for action in parser._actions
        for option in action.option_strings
        if option.startswith("--")
    }


def _check_is_new(name: str) -> None:
    flag = flag_table(Config).get(name)
    if flag is not None and flag.section == _SHARED:
        return
    if (
        flag is not None
        or name in ALIASES
        or name in SHORTHANDS
        or name in _OF_THE_COMMAND_LINE
        or foreign_flag(name)
        or name.startswith(("sglang-", "router-"))
    ):
        raise ConfigError(f"add_arguments() of a function declares --{name}, which Qwench has itself; give it another name.")


def _spelled(words: Sequence[str], options: Mapping[str, tuple[str, Action]]) -> list[str]:
    """Return words as the parser wants them: its own spelling, and switches without a value."""
    groups: list[list[str]] = []
    for word in words:
        if word.startswith("--") and word[2:] in options:
            groups.append([word[2:]])
        else:
            groups[-1].append(word)
    spelled: list[str] = []
    for name, *values in groups:
        option, action = options[name]
        if action.nargs == 0 and values and values[0].lower() in TRUE_WORDS + FALSE_WORDS:  # from a file
            spelled += [option] if values[0].lower() in TRUE_WORDS else []
        elif len(values) == 1 and action.nargs is None:
            spelled.append(f"{option}={values[0]}")  # also one that begins with a dash
        else:
            spelled += [option, *values]
    return spelled


def main() -> None:
    """Print as JSON what the functions declare that the arguments name."""
    end_with_parent(os.getppid())
    report = os.fdopen(os.dup(1), "w")
    faulthandler.enable(all_threads=False)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what the modules print, the run will print
    answer: dict[str, object] = {"names": [], "help": "", "problem": ""}
    try:
        parser = _parser({path: load(path, flag="add_arguments() of") for path in sys.argv[1:]})
        answer |= {"names": sorted(_options(parser)), "help": parser.format_help() if _options(parser) else ""}
    except ConfigError as error:
        answer["problem"] = str(error)
    print(json.dumps(answer), file=report, flush=True)
    os._exit(0)  # threads that a module has started would hold it


if __name__ == "__main__":
    main()
