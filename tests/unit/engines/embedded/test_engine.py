"""What only the engine in this process does: repeat itself, and start from a checkpoint folder."""

from __future__ import annotations

import asyncio
import gc
from itertools import takewhile

import pytest
import torch

from qwench.engines.embedded import engine as engine_module
from qwench.engines.embedded.compute import runner, sampler
from qwench.engines.embedded.compute.kv_memory import KVCache
from qwench.engines.embedded.engine import EmbeddedEngine
from qwench.engines.embedded.scheduling import stopping
from qwench.engines.embedded.scheduling.request import RunningRequest
from qwench.engines.protocol import FinishReason, MemoryTag
from qwench.errors import ConfigError, EngineError, WeightSyncError
from qwench.models.built_tokenizers import build_small_tokenizer
from tests.contract.engine_hosts import (
    EOS,
    FAMILIES,
    ask,
    drive,
    generate_all,
    make_engine,
    make_model,
    prompt_of,
    reference_log_probs,
    settings_of,
)
from tests.deadlines import patient


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


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_of_many_prompts_are_those_of_transformers(family):
    """A thousand prompts over the families, in float32."""
    model, count = make_model(family), 10
    requests = [
        ask(f"r{i}", prompt_of(2 + i // count, seed=i), temperature=0.0, max_new_tokens=12)
        for i in range(1000 // len(FAMILIES))
    ]
    results = drive("inline", model, lambda engine: generate_all(engine, requests))
    expected, settings = [], {"do_sample": False, "max_new_tokens": 12, "eos_token_id": EOS, "pad_token_id": 0}
    for start in range(0, len(requests), count):
        prompts = torch.tensor([request.input_ids for request in requests[start : start + count]])
        whole = model.generate(prompts, attention_mask=torch.ones_like(prompts), **settings)
        expected += [[*takewhile(lambda token: token != EOS, row), EOS][:12] for row in whole[:, prompts.shape[1] :].tolist()]
    assert [list(result.output_ids) for result in results] == expected


def test_one_decoder_serves_all_steps_while_the_weights_stay_where_they_are_also_over_a_sleep(monkeypatch):
    made, decoder_type = [], runner.Decoder

    def make(*arguments, **options):
        made.append(decoder_type(*arguments, **options))
        return made[-1]

    monkeypatch.setattr(runner, "Decoder", make)

    async def scenario():
        engine = make_engine(make_model("qwen3"), inline=True)
        before = await engine.generate(ask("a", prompt_of(4), max_new_tokens=3, ignore_eos=True, seed=1))
        await engine.sleep([MemoryTag.KV_CACHE])
        await engine.wake([MemoryTag.KV_CACHE])
        after = await engine.generate(ask("b", prompt_of(4), max_new_tokens=3, ignore_eos=True, seed=1))
        await engine.close()
        return before.output_ids, before.log_probs, after.output_ids, after.log_probs

    tokens, log_probs, tokens_after, log_probs_after = asyncio.run(scenario())
    assert len(made) == 1
    assert (tokens, log_probs) == (tokens_after, log_probs_after)


def test_checkpoint_folder_brings_weights_tokenizer_and_stop_tokens(tmp_path):
    model, tokenizer = make_model("qwen3"), build_small_tokenizer()
    model.generation_config.eos_token_id = [2, 3]
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    request = ask("r", prompt_of(9), temperature=3.0, seed=0, max_new_tokens=1000)

    async def scenario():
        engine = EmbeddedEngine.from_checkpoint(tmp_path, settings_of(kv_cache_tokens=2048))
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
        EmbeddedEngine.from_checkpoint(tmp_path, settings_of())


def test_engine_without_weights_refuses_requests():
    async def scenario():
        engine = EmbeddedEngine.from_checkpoint(make_model("qwen3").config, settings_of())
        with pytest.raises(EngineError, match="has no weights"):
            await generate_all(engine, [ask("r", [5])])

    asyncio.run(scenario())


@pytest.mark.parametrize("num_devices", [1, 2])
def test_an_engine_that_waits_for_weights_reads_none_and_is_healthy(tmp_path, num_devices, monkeypatch):
    model, request = make_model("qwen3"), ask("r", prompt_of(6), max_new_tokens=4, temperature=0.0, ignore_eos=True)
    model.save_pretrained(tmp_path)
    build_small_tokenizer().save_pretrained(tmp_path)
    monkeypatch.setattr(engine_module, "read_folder", None)

    async def scenario():
        engine = EmbeddedEngine.from_checkpoint(
            tmp_path, settings_of(kv_cache_tokens=2048, num_devices=num_devices), waits_for_weights=True
        )
        assert await engine.health()
        with pytest.raises(EngineError, match="has no weights"):
            await engine.generate(request)
        await engine.sleep([MemoryTag.WEIGHTS])
        assert not await engine.health()
        await engine.update_weights([list(model.state_dict().items())], version=3)
        result = await engine.generate(request)
        assert await engine.health() and result.weight_versions == [3] * 4
        await engine.close()
        return result

    result = asyncio.run(scenario())
    assert max(abs(reference_log_probs(model, request, result) - torch.tensor(result.log_probs))) < 1e-4


def test_weights_that_are_adopted_have_their_version_and_none_of_the_prefixes_of_those_before():
    model, request = make_model("qwen3"), ask("r", prompt_of(60), max_new_tokens=1)

    async def scenario():
        engine = make_engine(model, inline=True)
        results = [await engine.generate(request), await engine.generate(request)]
        receipt = await engine.adopt_weights(dict(model.named_parameters()), version=9)
        assert (receipt.version, await engine.weight_version()) == (9, 9)
        results.append(await engine.generate(request))
        await engine.set_version(11)
        results.append(await engine.generate(request))
        await engine.close()
        return [(list(one.weight_versions), one.cached_tokens > 0) for one in results]

    assert asyncio.run(scenario()) == [([0], False), ([0], True), ([9], False), ([11], True)]


def test_requests_that_waited_for_weights_go_on_with_those_that_are_adopted():
    model = make_model("qwen3")

    async def scenario():
        engine = make_engine(model)
        waiting = asyncio.ensure_future(engine.generate(ask("r", prompt_of(5), max_new_tokens=9, ignore_eos=True)))
        await asyncio.sleep(0)
        assert (await engine.stats()).num_waiting == 1
        with pytest.raises(WeightSyncError):
            await engine.update_weights([[("unknown", torch.zeros(1))]], version=1)
        await engine.adopt_weights(dict(model.named_parameters()), version=2)
        result = await asyncio.wait_for(waiting, patient(20))
        await engine.close()
        return result.weight_versions

    assert asyncio.run(scenario())[-1] == 2


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


def test_abort_of_a_request_spares_those_whose_ids_begin_alike():
    async def scenario():
        engine = make_engine(make_model("qwen3"))
        ids = ("r", "r1", "q")
        requests = [ask(name, prompt_of(5), max_new_tokens=40, ignore_eos=True) for name in ids]
        running = [asyncio.ensure_future(engine.generate(request)) for request in requests]
        await asyncio.sleep(0)
        await engine.abort("r")
        reasons = [(await one).finish_reason for one in running]
        running = [asyncio.ensure_future(engine.generate(request)) for request in requests]
        await asyncio.sleep(0)
        await engine.abort("r", begins=True)
        reasons += [(await one).finish_reason for one in running]
        await engine.close()
        return reasons

    abort, length = FinishReason.ABORT, FinishReason.LENGTH
    assert asyncio.run(scenario()) == [abort, length, length, abort, abort, length]


def num_caches() -> int:
    """Count the caches that hold memory."""
    gc.collect()
    return sum(isinstance(one, KVCache) and not one.is_asleep for one in gc.get_objects())


def test_each_kind_of_memory_is_given_back_alone():
    model, request = make_model("qwen3"), ask("r", prompt_of(9), seed=3, ignore_eos=True)
    others = num_caches()

    async def scenario():
        engine = make_engine(model, inline=True)
        before = await engine.generate(request)
        assert num_caches() == others + 1
        await engine.sleep([MemoryTag.KV_CACHE])
        assert (num_caches(), await engine.health()) == (others, True)
        await engine.wake([MemoryTag.KV_CACHE])
        assert num_caches() == others + 1, "the memory is taken at once, not by the first request"
        after = await engine.generate(request)
        await engine.sleep([MemoryTag.WEIGHTS])
        assert (num_caches(), await engine.health()) == (others + 1, False)
        await engine.update_weights([list(model.state_dict().items())], version=1)
        stats = await engine.stats()
        assert (stats.num_running, stats.num_waiting, stats.num_pages) == (0, 0, stats.num_free_pages)
        await engine.close()
        assert not engine._weights.ready, "its weights are given back"
        return before, after

    before, after = asyncio.run(scenario())
    assert (before.output_ids, before.log_probs) == (after.output_ids, after.log_probs)
    assert num_caches() == others


class BrokenError(Exception):
    """A fault of one request."""


def break_reading(engine: EmbeddedEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the sampling parameters of the request `bad` raise in a step."""
    original = sampler.sampling_rows

    def sampling_rows(requests):
        if any(one.request.request_id == "bad" and one.request.sampling.temperature > 0 for one in requests):
            raise BrokenError("top_k")
        return original(requests)

    monkeypatch.setattr(sampler, "sampling_rows", sampling_rows)


def break_drawing(engine: EmbeddedEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the draw for rows with a certain top-k raise."""
    original = sampler.sample

    def sample(logits, rows):
        if 7 in rows.top_k:
            raise BrokenError("top_k")
        return original(logits, rows)

    monkeypatch.setattr(sampler, "sample", sample)


def break_stopping(engine: EmbeddedEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the search for a stop string raise."""
    original = stopping.update_finish

    def update_finish(request, tokenizer):
        if request.request.request_id == "bad" and request.num_output == 3:
            raise BrokenError("a stop string")
        return original(request, tokenizer)

    monkeypatch.setattr(stopping, "update_finish", update_finish)


def break_decoding(engine: EmbeddedEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the text of the response raise."""
    original = RunningRequest.to_result

    def to_result(self, tokenizer):
        if self.request.request_id == "bad":
            raise BrokenError("a text")
        return original(self, tokenizer)

    monkeypatch.setattr(RunningRequest, "to_result", to_result)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("break_it", [break_reading, break_drawing, break_stopping, break_decoding])
def test_the_fault_of_one_request_fails_that_one_and_gives_its_row_and_pages_back(break_it, overlap, monkeypatch):
    model = make_model("qwen3")
    others = [ask(f"r{i}", prompt_of(6, seed=i), seed=i, max_new_tokens=8, ignore_eos=True) for i in range(3)]
    bad = ask("bad", prompt_of(6, seed=0), seed=9, max_new_tokens=8, ignore_eos=True, top_k=7)  # a sibling of r0

    async def scenario(broken: bool):
        engine = make_engine(model, overlap=overlap)
        if broken:
            break_it(engine, monkeypatch)
        requests = [*others[:2], bad, others[2]]
        answers = await asyncio.gather(*(engine.generate(one) for one in requests), return_exceptions=True)
        again = await engine.generate(ask("later", prompt_of(5), seed=1, max_new_tokens=2, ignore_eos=True))
        stats, healthy = await engine.stats(), await engine.health()
        await engine.close()
        return answers, again, stats, healthy

    whole, _, _, _ = asyncio.run(scenario(broken=False))
    answers, again, stats, healthy = asyncio.run(scenario(broken=True))
    assert isinstance(answers[2], EngineError) and isinstance(answers[2].__cause__, BrokenError)
    assert "request 'bad' failed: BrokenError" in str(answers[2])
    for index in (0, 1, 3):
        assert answers[index].output_ids == whole[index].output_ids
        assert answers[index].log_probs == pytest.approx(whole[index].log_probs, abs=1e-5)
    assert len(again.output_ids) == 2
    assert healthy and (stats.num_running, stats.num_waiting) == (0, 0)
    cached = stats.num_pages - stats.num_free_pages
    assert cached == 0, "free pages are those that no request holds, cached ones included"


def test_what_fails_for_every_request_of_a_step_ends_the_engine_with_its_reason(monkeypatch):
    def sample(logits, rows):
        raise BrokenError("no kernel")

    async def scenario():
        engine = make_engine(make_model("qwen3"))
        monkeypatch.setattr(sampler, "sample", sample)
        requests = [ask(f"r{i}", prompt_of(4, seed=i), max_new_tokens=4, top_k=3) for i in range(2)]
        answers = await asyncio.gather(*(engine.generate(one) for one in requests), return_exceptions=True)
        healthy = await engine.health()
        with pytest.raises(EngineError, match="failed in a step: BrokenError: no kernel"):
            await engine.generate(ask("later", prompt_of(4), max_new_tokens=1))
        await engine.close()
        return answers, healthy

    answers, healthy = asyncio.run(scenario())
    assert not healthy
    assert {str(answer) for answer in answers} == {"the embedded engine failed in a step: BrokenError: no kernel"}


def test_requests_whose_callers_are_gone_leave_no_error_behind_when_the_engine_closes():
    unheard: list[object] = []

    async def scenario():
        asyncio.get_running_loop().set_exception_handler(lambda _, context: unheard.append(context))
        engine = make_engine(make_model("qwen3"))
        engine.drop(engine.start(ask("gone", prompt_of(4), max_new_tokens=40, ignore_eos=True)))
        await engine.close()

    asyncio.run(scenario())
    gc.collect()
    assert unheard == []
