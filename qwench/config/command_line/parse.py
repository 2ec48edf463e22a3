"""From a command line to a configuration.

words -> argv.sort_flags: one spelling, checked values -> tyro: dataclasses -> preflight: files and required flags
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from qwench.config.command_line.argv import Given, Occurrence, sort_flags, split_words
from qwench.config.command_line.flags import Flag, flag_table, format_value, metavar, parse_value
from qwench.config.config import Config
from qwench.config.preflight import check_checkpoint, check_eval, check_sft, check_train
from qwench.config.sections.serve import ServeConfig
from qwench.errors import ConfigError

ConfigT = TypeVar("ConfigT")

SFT_DEFAULTS: Mapping[str, tuple[str, ...]] = {
    "loss-type": ("sft_loss",),
    "calculate-per-token-loss": ("true",),
    "input-key": ("messages",),
}
"""What `qwench sft` sets where the user does not."""

EVAL_DEFAULTS: Mapping[str, tuple[str, ...]] = {"rollout-batch-size": ("1",)}
"""`qwench eval` has no training batches; their identity still wants a number."""


def parse_train(words: Sequence[str]) -> Config:
    """Return the configuration of `qwench train WORDS`, which may also be fine-tuning (--loss-type sft_loss).

    Raises:
        ConfigError: the user's mistake, in one line.
    """
    config = parse_flags(Config, words, prog="qwench train")
    if config.algorithm.loss_type == "sft_loss":
        check_sft(config)
    else:
        check_train(config)
    return config


def parse_sft(words: Sequence[str]) -> Config:
    """Return the configuration of `qwench sft WORDS`.

    Raises:
        ConfigError: the user's mistake, in one line.
    """
    config = parse_flags(Config, words, prog="qwench sft", defaults=SFT_DEFAULTS)
    check_sft(config)
    return config


def parse_eval(words: Sequence[str]) -> Config:
    """Return the configuration of `qwench eval WORDS`.

    Raises:
        ConfigError: the user's mistake, in one line.
    """
    config = parse_flags(Config, words, prog="qwench eval", defaults=EVAL_DEFAULTS)
    check_eval(config)
    return config


def parse_serve(words: Sequence[str]) -> ServeConfig:
    """Return the configuration of `qwench serve WORDS`.

    Raises:
        ConfigError: the user's mistake, in one line.
    """
    config = parse_flags(ServeConfig, words, prog="qwench serve")
    check_checkpoint(config.model)
    return config


def parse_flags(
    config_type: type[ConfigT], words: Sequence[str], *, prog: str, defaults: Mapping[str, tuple[str, ...]] | None = None
) -> ConfigT:
    """Return a dataclass (of sections, or plain) filled from command-line words; `--help` prints and ends the process.

    Args:
        prog: the command, as help texts show it.
        defaults: flag -> values of lowest precedence.

    Raises:
        ConfigError: an unknown flag, a wrong value, or a section's own check.
    """
    table = flag_table(config_type)
    if "-h" in words or "--help" in words:
        _tyro(config_type, ["--help"], prog=prog)
    base = [Occurrence(name=name, values=values) for name, values in (defaults or {}).items()]
    given = sort_flags([*base, *split_words(words)], table)
    _check_required(given, table)
    config = _tyro(config_type, _canonical_words(given, table), prog=prog)
    return _with_pass_through(config, given)


def _check_required(given: Given, table: Mapping[str, Flag]) -> None:
    for flag in table.values():
        if flag.required and flag.name not in given.flags:
            raise ConfigError(f"--{flag.name} is required: {flag.help}")


def _canonical_words(given: Given, table: Mapping[str, Flag]) -> list[str]:
    """Return one word for each flag; values travel as a JSON list, so that none can be taken for a flag."""
    words: list[str] = []
    for name, values in given.flags.items():
        if table[name].annotation is bool:
            words.append(f"--{name}" if parse_value(bool, values) else f"--no-{name}")
        else:
            words.append(f"--{name}={json.dumps(values)}")
    return words


def _tyro(config_type: type[ConfigT], words: list[str], *, prog: str) -> ConfigT:
    """Let tyro build the dataclass. Flags and values were checked before, so what it still refuses is shown as it says it."""
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(
                config_type,
                prog=prog,
                args=words,
                config=(tyro.conf.OmitArgPrefixes,),
                registry=_registry(flag_table(config_type)),
                description="Flags may also be given as --flag=value and in --config FILE.yaml. The last one wins.",
            )
    except SystemExit as error:
        if error.code in (None, 0):
            raise
        raise ConfigError(" ".join(errors.getvalue().split())) from error


def _registry(table: Mapping[str, Flag]) -> ConstructorRegistry:
    """Teach tyro to read and show values as `flags` does: one home for conversions, and plain names in help texts."""
    registry = ConstructorRegistry()
    ours = {flag.annotation for flag in table.values()} - {bool}

    @registry.primitive_rule
    def rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
        annotation = info.type
        if annotation not in ours:
            return None
        return PrimitiveConstructorSpec(
            nargs=1,
            metavar=metavar(annotation),
            instance_from_str=lambda words: parse_value(annotation, json.loads(words[0])),
            is_instance=lambda value: True,
            str_from_instance=lambda value: [" ".join(format_value(value))],
        )

    return registry


def _with_pass_through(config: ConfigT, given: Given) -> ConfigT:
    if isinstance(config, Config | ServeConfig) and (given.sglang or given.router):
        engine = replace(config.engine, sglang_args=_passed(given.sglang), router_args=_passed(given.router))
        return replace(config, engine=engine)
    return config


def _passed(flags: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    return tuple(word for name, values in flags.items() for word in (f"--{name}", *values))
