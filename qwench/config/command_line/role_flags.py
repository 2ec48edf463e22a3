"""`--megatron-config-path FILE`: other values of flags for one model of a run, as slime spells them.

megatron:
- {name: default, role: critic, overrides: {lr: 1e-5}}     --critic-lr 1e-5
- {name: default, role: actor, overrides: {lr: 1e-6}}      --lr 1e-6
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qwench.config.command_line.argv import Occurrence, read_mapping
from qwench.config.values import yaml_words
from qwench.errors import ConfigError

FLAG = "megatron-config-path"
OLD_FLAG = "critic-config-path"
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
    files = [item for item in occurrences if item.name in (FLAG, OLD_FLAG)]
    others = [item for item in occurrences if item not in files]
    return others + [entry for file in files for entry in _read(file)]


def _read(file: Occurrence) -> list[Occurrence]:
    path, content = read_mapping(file)
    entries = content.get("megatron")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ConfigError(f"--{FLAG}: {path} must have a list `megatron` of role and overrides")
    return [item for entry in entries for item in _of_role(entry, str(path))]


def _of_role(entry: Mapping[str, Any], path: str) -> list[Occurrence]:  # Any: YAML
    role = entry.get("role")
    if role not in ("actor", "critic"):
        raise ConfigError(f"--{FLAG}: {path} has the role {role!r}; known: actor, critic")
    found = list[Occurrence]()
    for key, value in (entry.get("overrides") or {}).items():
        name = str(key).replace("_", "-")
        if role == "critic" and name not in OF_CRITIC:
            raise ConfigError(f"--{FLAG}: {path}: the critic has no {name} of its own; it may have {', '.join(OF_CRITIC)}")
        found.append(Occurrence(name=OF_CRITIC[name] if role == "critic" else name, values=yaml_words(value), origin=path))
    return found
