"""Decode steps that are played from recordings, beside the same steps computed by the model's code."""

from __future__ import annotations

import asyncio

import pytest
import torch

from qwench.engines.embedded.compute import recorded as module
from qwench.engines.protocol import MemoryTag
from qwench.models.decoder.native import recording
from qwench.models.decoder.native.recording import Recording
from tests.compiler import needs_compiler
from tests.contract.engine_hosts import ask, generate_all, make_engine, make_model, prompt_of

pytestmark = needs_compiler


def _requests(name: str):
    """Twelve, two of a prompt, that end one after the other: from 12 rows down to 1, over many pages of 4 tokens."""
    limits = [{}, {"temperature": 0.0}, {"top_p": 0.9}]
    return [
        ask(
            f"{name}{i}", prompt_of(5 + i // 2, seed=i // 2), seed=i, max_new_tokens=3 + 5 * i, ignore_eos=True, **limits[i % 3]
        )
        for i in range(12)
    ]


@torch.no_grad()
def _move(parameter: torch.Tensor) -> torch.Tensor:
    """Give the tensor other memory, as a trainer that sleeps and wakes does; return what may lie in the old place: nan."""
    place, storage = parameter.data_ptr(), parameter.untyped_storage()
    storage.resize_(storage.nbytes() + 64)  # takes the new memory before it frees the old
    assert parameter.data_ptr() != place
    return torch.full_like(parameter, torch.nan)


async def _scenario(family: str, dtype: torch.dtype):
    model, other = make_model(family).to(dtype), make_model(family, seed=5).to(dtype)
    engine, beside = make_engine(model, dtype=dtype), make_engine(other, dtype=dtype)
    both = await asyncio.gather(generate_all(engine, _requests("a")), generate_all(beside, _requests("b")))
    results = [result for some in both for result in some]
    await engine.update_weights([list(other.named_parameters())], version=1)
    results += await generate_all(engine, _requests("c"))
    await engine.sleep([MemoryTag.KV_CACHE, MemoryTag.WEIGHTS])
    await engine.wake([MemoryTag.KV_CACHE, MemoryTag.WEIGHTS])
    await engine.adopt_weights(dict(model.named_parameters()), version=2)
    results += await generate_all(engine, _requests("d"))
    fillers = [_move(parameter) for parameter in model.parameters()]
    results += await generate_all(engine, _requests("e"))
    await engine.close()
    await beside.close()
    del fillers
    return [(result.request_id, result.output_ids, result.log_probs) for result in results]


@pytest.mark.parametrize(("family", "dtype"), [("qwen3", torch.float32), ("qwen2", torch.bfloat16)], ids=str)
def test_played_steps_have_the_bits_of_computed_ones(monkeypatch, family, dtype):
    plays, play = [], Recording.play
    monkeypatch.setattr(Recording, "play", lambda self: (plays.append(self), play(self)))
    played = asyncio.run(_scenario(family, dtype))
    # Of 57 steps a pass, 12 are recorded.
    assert len(plays) >= 5 * 40
    plays.clear()
    monkeypatch.setattr(recording, "CACHE_BYTES", 0)
    assert played == asyncio.run(_scenario(family, dtype))
    assert not plays


def test_the_oldest_recording_leaves(monkeypatch):
    monkeypatch.setattr(module, "KEPT_RECORDINGS", 3)

    async def scenario():
        engine = make_engine(make_model("qwen3"))
        await generate_all(engine, _requests("a"))
        kept = engine._runner._bind()._recorded._recorded
        await engine.close()
        return [rows for rows, _ in kept]

    assert asyncio.run(scenario()) == [3, 2, 1]
