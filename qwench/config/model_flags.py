"""Whether the architecture flags of a launch script describe the model of the checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from math import isclose
from typing import Any

from qwench.config.limits import as_flag
from qwench.config.sections.model import ArchitectureConfig
from qwench.errors import ConfigError
from qwench.models.architecture import Architecture

DECIDED_BY_THE_CHECKPOINT = ("rotary_base",)
"""Scripts pass another base than the checkpoint has. SGLang reads config.json alone, and so does the trainer here."""


def check_model_flags(flags: ArchitectureConfig, model: Architecture) -> None:
    """Compare every flag that was given with what the checkpoint's config.json says.

    Raises:
        ConfigError: they differ; names the flag and both values.
    """
    for name, given, fact in _differences(flags, model):
        if name not in DECIDED_BY_THE_CHECKPOINT:
            raise ConfigError(
                f"{as_flag(name)} ({given}) contradicts the checkpoint's config.json ({fact}); correct or remove the flag."
            )


def overruled_flags(flags: ArchitectureConfig, model: Architecture) -> Iterator[str]:
    """Yield a warning for each flag whose value the checkpoint's config.json replaces."""
    for name, given, fact in _differences(flags, model):
        if name in DECIDED_BY_THE_CHECKPOINT:
            yield f"{as_flag(name)} {given:.15g} is not used: trainer and engines compute with config.json's {fact:.15g}"


def _differences(flags: ArchitectureConfig, model: Architecture) -> Iterator[tuple[str, Any, Any]]:
    """Yield field, given value and fact (of the field's type) where a flag contradicts config.json."""
    facts = megatron_facts(model)
    for field in fields(flags):
        given, fact = getattr(flags, field.name), facts[field.name]
        if given is None or given == fact:
            continue
        if isinstance(given, float) and isinstance(fact, float | int) and isclose(given, fact, rel_tol=1e-6):
            continue
        yield field.name, given, fact


def megatron_facts(model: Architecture) -> dict[str, object]:
    """Return what each field of `ArchitectureConfig` must be for this model."""
    return {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_heads,
        "num_query_groups": model.num_kv_heads,
        "group_query_attention": model.num_kv_heads < model.num_heads,
        "kv_channels": model.head_dim,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.max_position_embeddings,
        "rotary_base": model.rope.theta,
        "rotary_percent": 1.0,
        "use_rotary_position_embeddings": True,
        "position_embedding_type": "rope",
        "swiglu": True,
        "qk_layernorm": model.qk_norm,
        "normalization": "RMSNorm",
        "norm_epsilon": model.norm_eps,
        "disable_bias_linear": not (model.attention_output_bias or model.mlp_bias),
        "add_qkv_bias": model.qkv_bias,
        "untie_embeddings_and_output_weights": not model.tied_head,
    }
