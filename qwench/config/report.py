"""What `--dry-run` shows: the configuration by section, and what follows from it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

from qwench.config.command_line.flags import flag_name, flag_table, format_value
from qwench.config.config import Config
from qwench.config.plan import Resolved

_SECRET_FLAGS = frozenset({"wandb-key"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """One flag and its value."""

    flag: str
    value: str
    is_default: bool


def settings_by_section(config: Config) -> dict[str, list[Setting]]:
    """Return section -> its settings, in order of definition."""
    table = flag_table(Config)
    shown: dict[str, list[Setting]] = {}
    for section in fields(config):
        values = getattr(config, section.name)
        shown[section.name] = [
            Setting(flag=f"--{flag_name(item.name)}", value=_text(item.name, value), is_default=value == default)
            for item in fields(values)
            for value in [getattr(values, item.name)]
            for default in [table[flag_name(item.name)].default if flag_name(item.name) in table else ()]
        ]
    return shown


def _text(field_name: str, value: object) -> str:
    if flag_name(field_name) in _SECRET_FLAGS and value is not None:
        return "(not shown)"
    return " ".join(format_value(value)) or "-"


def derived_lines(config: Config, resolved: Resolved) -> Iterator[str]:
    """Yield the derived facts, one a line."""
    yield str(resolved.batch)
    yield (
        f"world_size {resolved.world_size} = TP {resolved.tp_size} x PP {resolved.pp_size} x CP {resolved.cp_size}"
        f" x DP {resolved.dp_size}"
    )
    yield f"micro-batches: {_micro_batches(config, resolved)}"
    yield f"rollouts: {resolved.num_rollout or f'those of {config.rollout.num_epoch} epochs'}"
    yield f"devices: {'shared by trainer and engines' if resolved.colocate else 'trainer and engines apart'}"
    yield f"reference model: {'held' if resolved.needs_reference else 'not needed'}"


def _micro_batches(config: Config, resolved: Resolved) -> str:
    if resolved.max_tokens_per_micro_batch is not None:
        return f"packed up to {resolved.max_tokens_per_micro_batch} tokens, as many on each of the {resolved.dp_size} DP ranks"
    per_rank = -(-resolved.global_batch_size // (config.training.micro_batch_size * resolved.dp_size))
    return f"{per_rank} of {config.training.micro_batch_size} samples in each step on each of the {resolved.dp_size} DP ranks"
