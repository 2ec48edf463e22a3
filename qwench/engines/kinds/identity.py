"""Whether a server that this run did not start serves the model that is trained."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwench.engines.client import HttpEngine
from qwench.engines.kinds import KINDS
from qwench.engines.kinds.kind import EngineKind
from qwench.errors import ConfigError

PROBE = "Let $x_1 = \\frac{34}{7}$.\n\n  Then 12,345 + 6 = ? <think>Hmm</think> Gr\u00fc\u00dfe, \u4e16\u754c! f(a):\n\tpass"
"""Text that tokenizers of different vocabularies cut differently."""
_COMPARED = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelIdentity:
    """What an engine must agree with the trainer about."""

    model_type: str
    sizes: Mapping[str, int]
    """vocab_size, hidden_size and num_hidden_layers, as in config.json."""
    encode: Callable[[str], Sequence[int]]
    """Text to token ids, without special tokens."""
    ranks_requests: bool = False
    """Some requests wait for all others (--eval-low-priority)."""
    keeps_requests: bool = False
    """Publications change the weights while requests wait or run (--fully-async)."""
    context_len: int | None = None
    """Tokens that prompt and response may have together. None: as many as the model has."""


async def check_serves(engine: HttpEngine, identity: ModelIdentity) -> EngineKind:
    """Compare a server's model with the trained model, and return the kind of the server.

    `qwench serve` reports the sizes of its model. Another server reports the folder of its checkpoint, perhaps on another
    machine; there its tokenization of a text is compared.

    Raises:
        ConfigError: the server has another model, another vocabulary or too short a context.
        EngineError: it cannot be reached, or has another HTTP API.
    """
    info = await engine.model_info()
    kind = next(kind for kind in KINDS.values() if kind.answers(info))
    told = _read_config(str(info["model_path"])) | {name: info[name] for name in _COMPARED if info.get(name)}
    for name, ours in {"model_type": identity.model_type, **identity.sizes}.items():
        if name in told and told[name] != ours:
            raise _wrong(engine, info, f"{name} {told[name]}", str(ours))
    if "vocab_size" not in told and await engine.tokenize(PROBE) != list(identity.encode(PROBE)):
        raise _wrong(engine, info, "a tokenizer that cuts text in another way", "the same tokens")
    settings = await engine.server_info()
    ranks = settings.get("enable_priority_scheduling", True) and settings.get("default_priority_value", 0) is not None
    if identity.ranks_requests and not ranks:
        raise ConfigError(
            f"--eval-low-priority has no effect on the engine at {engine.base_url}; start it with "
            "--enable-priority-scheduling --default-priority-value 0, or leave the flag out."
        )
    if identity.keeps_requests and not settings.get("disable_radix_cache", True):
        raise ConfigError(
            f"--pause-generation-mode retract and in_place change the weights under requests; the engine at {engine.base_url} "
            "would keep prefixes of the old ones. Start it with --disable-radix-cache, or give --pause-generation-mode abort."
        )
    context_len = settings.get("context_length")
    if context_len is not None and identity.context_len is not None and context_len < identity.context_len:
        raise _wrong(engine, info, f"a context of {context_len} tokens", f"--rollout-max-context-len {identity.context_len}")
    return kind


def _wrong(engine: HttpEngine, info: Mapping[str, Any], theirs: str, ours: str) -> ConfigError:  # the server's JSON
    return ConfigError(
        f"--rollout-external-engine-addrs: the engine at {engine.base_url} serves {info['model_path']} with {theirs}; "
        f"this run needs {ours}. Serve the folder of --hf-checkpoint there."
    )


def _read_config(model_path: str) -> dict[str, Any]:  # config.json has no closed type
    """Return the compared entries of config.json, if the folder is on this machine."""
    path = Path(model_path) / "config.json"
    if not path.is_file():
        return {}
    content = json.loads(path.read_text(encoding="utf-8"))
    return {name: content[name] for name in _COMPARED if name in content}
