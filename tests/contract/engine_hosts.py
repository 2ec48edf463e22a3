"""Tiny models, the ways to reach an engine, and an independent forward pass, for the engine's contract tests."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import fields
from typing import TypeVar

import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from qwench.config.sections.engine import EngineConfig
from qwench.engines.client import HttpEngine
from qwench.engines.embedded.engine import EmbeddedEngine
from qwench.engines.embedded.http.serving import ServerThread
from qwench.engines.embedded.settings import EmbeddedSettings
from qwench.engines.protocol import Engine, GenerateRequest, GenerateResult, SamplingParams

HOSTS = ("in_process", "inline", "http", "two_ranks")
"""`two_ranks`: in this process, with half of the model in another one."""
FAMILIES = ("qwen3", "qwen2", "llama", "yarn")
EOS = 1
MAX_POSITIONS = 1100
LONG = 1000
"""New tokens of a response that a test interrupts: many more than a round trip to the server takes."""
LONGER_THAN_A_LOOK = {"in_process": 300, "inline": 300, "http": 900, "two_ranks": 80}
"""New tokens of a response that goes on to its end after a test has looked at it, by host; two ranks take longer a token."""
Result = TypeVar("Result")

_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 288,
    "max_position_embeddings": MAX_POSITIONS,
    "eos_token_id": EOS,
    "initializer_range": 0.3,
}


def make_model(family: str, seed: int = 0) -> PreTrainedModel:
    """Build a random model: tied with QK norm, tied with biases, or untied with rotary frequencies stretched in two ways."""
    torch.manual_seed(seed)
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
    if family == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**_SIZES, head_dim=16, tie_word_embeddings=True))
    elif family == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**_SIZES, tie_word_embeddings=True))
    elif family == "yarn":
        model = Qwen3ForCausalLM(Qwen3Config(**_SIZES, head_dim=16, tie_word_embeddings=False, rope_parameters=yarn))
    else:
        rope = {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
        model = LlamaForCausalLM(LlamaConfig(**_SIZES, head_dim=8, tie_word_embeddings=False, rope_parameters=rope))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.float().eval()


def make_engine(model: PreTrainedModel, *, tokenizer=None, **settings) -> EmbeddedEngine:
    """Make an engine with a copy of the model's weights."""
    sizes = {"kv_cache_tokens": 4096, "page_size": 4, "max_running_requests": 64}
    return EmbeddedEngine.from_checkpoint(
        model.config, settings_of(**(sizes | settings)), weights=dict(model.state_dict()), tokenizer=tokenizer
    )


def settings_of(**settings) -> EmbeddedSettings:
    """Return settings of the engine; flags go by their names without `embedded_`."""
    flags = {item.name for item in fields(EngineConfig)}
    sizes = {name: settings.pop(name) for name in list(settings) if f"embedded_{name}" in flags}
    return EmbeddedSettings(sizes=EngineConfig(**{f"embedded_{name}": value for name, value in sizes.items()}), **settings)


def drive(
    host: str, model: PreTrainedModel, scenario: Callable[[Engine], Awaitable[Result]], *, tokenizer=None, **settings
) -> Result:
    """Run a scenario against a fresh engine, reached the given way."""

    async def run(engine: Engine) -> Result:
        try:
            return await scenario(engine)
        finally:
            await engine.close()

    engine = make_engine(model, tokenizer=tokenizer, inline=host == "inline", num_devices=1 + (host == "two_ranks"), **settings)
    if host != "http":
        return asyncio.run(run(engine))
    with ServerThread(engine, token="secret") as server:
        return asyncio.run(run(HttpEngine(server.base_url, token="secret")))


def ask(name: str, prompt: Sequence[int], **sampling) -> GenerateRequest:
    """Make a request."""
    return GenerateRequest(
        request_id=name, input_ids=list(prompt), sampling=SamplingParams(**({"max_new_tokens": 8} | sampling))
    )


async def generate_all(engine: Engine, requests: Sequence[GenerateRequest]) -> list[GenerateResult]:
    """Generate all at once."""
    return list(await asyncio.gather(*(engine.generate(request) for request in requests)))


def distribution(model: PreTrainedModel, prompt: Sequence[int], temperature: float = 1.0) -> Tensor:
    """Return the log-probs [V] of the token after the prompt."""
    with torch.no_grad():
        return (model(torch.tensor([list(prompt)])).logits[0, -1].float() / temperature).log_softmax(-1)


def reference_log_probs(model: PreTrainedModel, request: GenerateRequest, result: GenerateResult) -> Tensor:
    """Return the log-probs [R] of the response under Hugging Face's own forward pass."""
    tokens = torch.tensor([[*request.input_ids, *result.output_ids]])
    with torch.no_grad():
        logits = model(tokens).logits[0].float() / (request.sampling.temperature or 1.0)
    start = len(request.input_ids)
    return logits[start - 1 : -1].log_softmax(-1).gather(-1, tokens[0, start:, None]).squeeze(-1)


def prompt_of(length: int, seed: int = 0) -> list[int]:
    """Return a random prompt without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, 256, (length,), generator=generator).tolist()
