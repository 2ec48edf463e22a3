"""From a command line to a configuration.

words -> argv.sort_flags: each flag once, parsed -> dataclasses, which check themselves -> checks: rules, files, required flags
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from typing import Any, Literal, TypeVar, cast, get_type_hints

from qwench.config.command_line.argv import (
    Given,
    Occurrence,
    custom_settings,
    overridden,
    read_mapping,
    sort_flags,
    split_words,
)
from qwench.config.command_line.compat import IMPORT_PATHS
from qwench.config.command_line.flags import Flag, flag_table
from qwench.config.command_line.help import HELP_ALL, first_sentence, help_text, help_topic, is_help
from qwench.config.config import Config
from qwench.config.engine_choice import look_at_machine, with_engine
from qwench.config.limits import flag_name
from qwench.config.rules import check_rules
from qwench.config.sections.verbs import ServeConfig
from qwench.config.values import yaml_words
from qwench.config.verb_checks import check_eval, check_serve, check_sft, check_train
from qwench.errors import ConfigError

ConfigT = TypeVar("ConfigT")

SFT_DEFAULTS: Mapping[str, tuple[str, ...]] = {
    "loss-type": ("sft_loss",),
    "calculate-per-token-loss": ("true",),
    "input-key": ("messages",),
}
"""Defaults of `qwench sft`."""

EVAL_DEFAULTS: Mapping[str, tuple[str, ...]] = {"rollout-batch-size": ("1",)}
"""`qwench eval` has no training batches, but the batch identity needs a number."""


_RUNS: Mapping[str, tuple[Callable[[Config], None], Mapping[str, tuple[str, ...]]]] = {
    "train": (check_train, {}),
    "sft": (check_sft, SFT_DEFAULTS),
    "eval": (check_eval, EVAL_DEFAULTS),
}
"""Verb of a run -> the check of its configuration, and its defaults."""


AskFunctions = Callable[[Sequence[str]], "Declared"]
"""Asks functions, by their paths, which flags they declare."""
_DECLARING = ("rollout-function-path", "custom-generate-function-path")


@dataclass(frozen=True, kw_only=True, slots=True)
class Declared:
    """The flags that the user's functions declare."""

    names: frozenset[str]
    help: str


def parse_run(
    verb: Literal["train", "sft", "eval"],
    words: Sequence[str],
    *,
    more_defaults: Mapping[str, tuple[str, ...]] | None = None,
    ask: AskFunctions | None = None,
) -> Config:
    """Return the configuration of `qwench VERB WORDS`. `train` may also be fine-tuning (--loss-type sft_loss).

    Args:
        more_defaults: flag -> values of lowest precedence, besides those of the verb.
        ask: finds the flags that functions declare. None: they declare none.

    Raises:
        ConfigError: the user's mistake, in one line.
    """
    check, defaults = _RUNS[verb]
    config = parse_flags(Config, words, prog=f"qwench {verb}", defaults={**defaults, **(more_defaults or {})}, ask=ask)
    check(config)
    return config


def parse_serve(words: Sequence[str]) -> ServeConfig:
    """Return the configuration of `qwench serve WORDS`.

    Raises:
        ConfigError: the user's mistake, in one line.
    """
    config = parse_flags(ServeConfig, words, prog="qwench serve")
    check_serve(config)
    return config


def parse_flags(
    config_type: type[ConfigT],
    words: Sequence[str],
    *,
    prog: str,
    defaults: Mapping[str, tuple[str, ...]] | None = None,
    ask: AskFunctions | None = None,
) -> ConfigT:
    """Return a dataclass (of sections, or plain) filled from command-line words; `--help` prints and ends the process.

    Args:
        prog: the command, as help texts show it.
        defaults: flag -> values of lowest precedence.
        ask: see `parse_run`.

    Raises:
        ConfigError: an unknown flag, a wrong value, a section's own check, or a rule between sections.
    """
    table = flag_table(config_type)
    if is_help(words):
        sys.stdout.write(_help(config_type, words, prog=prog, defaults=defaults or {}, ask=ask))
        sys.exit(0)
    base = [Occurrence(name=name, values=values) for name, values in (defaults or {}).items()]
    said = split_words(words, prog=prog, table=table)
    occurrences = [*base, *said]
    if "critic-lr" in table:
        occurrences = with_roles(occurrences)
    occurrences += custom_settings(occurrences, table)
    given = sort_flags(occurrences, table, prog=prog, declared=cache(lambda: _declared(occurrences, ask).names))
    given.overridden.extend(overridden(said, table))
    _check_required(given, table, prog=prog)
    config = _fill(config_type, given)
    if not isinstance(config, Config):
        return config
    chosen = with_engine(config, names_size="rollout-num-gpus-per-engine" in given.flags, machine=look_at_machine())
    check_rules(chosen)
    return cast(ConfigT, chosen)


def section_subjects(config_type: type) -> dict[str, str]:
    """Return section -> the first line of its class's docstring."""
    hints = get_type_hints(config_type)
    sections = {item.name: hints[item.name] for item in fields(config_type) if is_dataclass(hints[item.name])}
    return {name: (section.__doc__ or "").partition("\n")[0] for name, section in sections.items()}


def _declared(occurrences: Sequence[Occurrence], ask: AskFunctions | None) -> Declared:
    """Ask the functions that the command line names."""
    given = {item.name: item.values for item in occurrences if item.name in _DECLARING}
    paths = [path for values in given.values() for path in values if path not in IMPORT_PATHS and path != "None"]
    return ask(paths) if ask is not None and paths else Declared(names=frozenset(), help="")


def _help(
    config_type: type, words: Sequence[str], *, prog: str, defaults: Mapping[str, tuple[str, ...]], ask: AskFunctions | None
) -> str:
    """Return what the words ask for; functions describe the flags that they declare themselves."""
    table = flag_table(config_type)
    declared = cache(lambda: _declared(split_words(words, prog=prog, table=table), ask))
    try:
        text = help_text(prog, table, defaults, words=words, subjects=section_subjects(config_type))
    except ConfigError:
        if help_topic(words) not in declared().names:
            raise
        return declared().help
    return text + (declared().help if HELP_ALL in words else "")


def _check_required(given: Given, table: Mapping[str, Flag], *, prog: str) -> None:
    missing = [flag for flag in table.values() if flag.required and flag.name not in given.flags]
    if len(missing) == 1:
        raise ConfigError(f"--{missing[0].name} is required: {missing[0].help}")
    if missing:
        named = ", ".join(f"--{flag.name} ({first_sentence(flag.help).rstrip('.')})" for flag in missing)
        raise ConfigError(f"{prog} requires {named}")


def _fill(config_type: type[ConfigT], given: Given) -> ConfigT:
    """Make a dataclass of the values that were given; its sections likewise."""
    hints, arguments = get_type_hints(config_type), dict[str, Any]()  # Any: values of the types that the fields name
    collected = {
        "sglang_args": _passed(given.sglang),
        "router_args": _passed(given.router),
        "declared_args": _passed(given.declared),
        "unused_flags": tuple(given.unused),
        "overridden_flags": tuple(given.overridden),
    }
    for item in fields(config_type):  # type: ignore[arg-type]  # config_type is a dataclass; TypeVars cannot say so
        if is_dataclass(hints[item.name]):
            arguments[item.name] = _fill(hints[item.name], given)
        elif item.name in collected:
            arguments[item.name] = collected[item.name]
        elif flag_name(item.name) in given.flags:
            arguments[item.name] = given.flags[flag_name(item.name)]
    return config_type(**arguments)


def _passed(flags: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    return tuple(word for name, values in flags.items() for word in (f"--{name}", *values))


ROLE_FLAG = "megatron-config-path"
"""Names a file with other values of flags for one model of a run, as slime spells them:

megatron:
- {name: default, role: critic, overrides: {lr: 1e-5}}     --critic-lr 1e-5
- {name: default, role: actor, overrides: {lr: 1e-6}}      --lr 1e-6
"""
OLD_ROLE_FLAG = "critic-config-path"
"""Its name before slime renamed it."""
OF_CRITIC: Mapping[str, str] = {
    "lr": "critic-lr",
    "lr-warmup-iters": "critic-lr-warmup-iters",
    "load": "critic-load",
    "num-critic-only-steps": "num-critic-only-steps",
}
"""Flag of a model -> the critic's flag."""


def with_roles(occurrences: Sequence[Occurrence]) -> list[Occurrence]:
    """Replace each --megatron-config-path by the flags that its file sets, which win over the command line.

    Raises:
        ConfigError: the file has another form, or sets what the critic shares with the policy.
    """
    files = [item for item in occurrences if item.name in (ROLE_FLAG, OLD_ROLE_FLAG)]
    others = [item for item in occurrences if item not in files]
    return others + [entry for file in files for entry in _read_roles(file)]


def _read_roles(file: Occurrence) -> list[Occurrence]:
    path, content = read_mapping(file)
    entries = content.get("megatron")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ConfigError(f"--{ROLE_FLAG}: {path} must have a list `megatron` of role and overrides")
    return [item for entry in entries for item in _of_role(entry, str(path))]


def _of_role(entry: Mapping[str, Any], path: str) -> list[Occurrence]:  # Any: YAML
    role = entry.get("role")
    if role not in ("actor", "critic"):
        raise ConfigError(f"--{ROLE_FLAG}: {path} has the role {role!r}; known: actor, critic")
    found = list[Occurrence]()
    for key, value in (entry.get("overrides") or {}).items():
        name = str(key).replace("_", "-")
        if role == "critic" and name not in OF_CRITIC:
            raise ConfigError(f"--{ROLE_FLAG}: {path}: the critic has no {name} of its own; it may have {', '.join(OF_CRITIC)}")
        found.append(Occurrence(name=OF_CRITIC[name] if role == "critic" else name, values=yaml_words(value), origin=path))
    return found
