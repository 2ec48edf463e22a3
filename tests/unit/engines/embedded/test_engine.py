"""What only the engine in this process does: repeat itself, and start from a checkpoint folder."""

from __future__ import annotations

import asyncio

import pytest
import torch

from qwench.engines.embedded.engine import EmbeddedEngine
from qwench.engines.embedded.settings import EmbeddedSettings
from qwench.engines.protocol import FinishReason
from qwench.errors import ConfigError, EngineError
from qwench.models.made.tokenizers import build_small_tokenizer
from tests.contract.engine_hosts import ask, generate_all, make_engine, make_model, prompt_of, reference_log_probs


def test_inline_engine_repeats_itself_to_the_bit():
    model = make_model("qwen3")

    async def continued(engine: EmbeddedEngine, i: int):
        """Come back with a longer prompt, so that requests of both kinds meet in the batches."""
        first = await engine.generate(ask(f"a{i}", prompt_of(4 + i % 5, seed=i), max_new_tokens=3 + i % 4, ignore_eos=True))
        return first, await engine.generate(ask(f"b{i}", [*first.output_ids, 9], max_new_tokens=9, ignore_eos=True))

    async def scenario():
        engine = make_engine(model, inline=True, max_running_requests=7)
        # The engine draws the seeds here, so the order of arrival must repeat too.
        pairs = await asyncio.gather(*(continued(engine, i) for i in range(20)))
        await engine.close()
        return [(result.output_ids, result.log_probs) for pair in pairs for result in pair]

    assert asyncio.run(scenario()) == asyncio.run(scenario())


def test_checkpoint_folder_brings_weights_tokenizer_and_stop_tokens(tmp_path):
    model, tokenizer = make_model("qwen3"), build_small_tokenizer()
    model.generation_config.eos_token_id = [2, 3]
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    request = ask("r", prompt_of(9), temperature=3.0, seed=0, max_new_tokens=1000)

    async def scenario():
        engine = EmbeddedEngine.from_checkpoint(tmp_path, EmbeddedSettings(kv_cache_tokens=2048))
        result = await engine.generate(request)
        await engine.close()
        return result

    result = asyncio.run(scenario())
    assert result.finish_reason is FinishReason.STOP
    assert result.matched in {1, 2, 3, tokenizer.eos_token_id}
    assert result.text == tokenizer.decode(result.output_ids)
    assert max(abs(reference_log_probs(model, request, result) - torch.tensor(result.log_probs))) < 1e-4


def test_missing_checkpoint_is_a_user_error(tmp_path):
    with pytest.raises(ConfigError):
        EmbeddedEngine.from_checkpoint(tmp_path, EmbeddedSettings())


def test_engine_without_weights_refuses_requests():
    async def scenario():
        engine = EmbeddedEngine.from_checkpoint(make_model("qwen3").config, EmbeddedSettings())
        with pytest.raises(EngineError, match="has no weights"):
            await generate_all(engine, [ask("r", [5])])

    asyncio.run(scenario())


def test_request_id_in_use_is_refused():
    async def scenario():
        engine = make_engine(make_model("qwen3"))
        first = asyncio.ensure_future(engine.generate(ask("same", [5, 6], ignore_eos=True)))
        await asyncio.sleep(0)
        with pytest.raises(EngineError, match="'same' is in use"):
            await engine.generate(ask("same", [7]))
        result = await first
        await engine.close()
        return result

    assert len(asyncio.run(scenario()).output_ids) == 8


def test_cancelled_caller_frees_its_request():
    async def scenario():
        engine = make_engine(make_model("qwen3"))
        cancelled = asyncio.ensure_future(engine.generate(ask("r", prompt_of(5), max_new_tokens=1000, ignore_eos=True)))
        while (await engine.stats()).generated_tokens < 2:
            await asyncio.sleep(0)
        cancelled.cancel()
        await engine.generate(ask("next", [5]))
        stats = await engine.stats()
        await engine.close()
        return stats

    stats = asyncio.run(scenario())
    assert stats.num_running == 0 and stats.num_free_pages == stats.num_pages
