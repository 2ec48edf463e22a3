"""Publications, versions and memory, in every engine."""

from __future__ import annotations

import asyncio

import pytest
import torch

from qwench.engines.protocol import Engine, MemoryTag
from qwench.errors import EngineError, WeightSyncError
from tests.checksums import tensor_checksum
from tests.contract.engine_hosts import (
    HOSTS,
    LONGER_THAN_A_LOOK,
    ask,
    drive,
    make_engine,
    make_model,
    prompt_of,
    reference_log_probs,
)

every_host = pytest.mark.parametrize("host", HOSTS)


def named(model):
    """Return the parameters without a tied head, in two buckets."""
    entries = [(name, parameter.detach()) for name, parameter in model.named_parameters()]
    return [entries[:5], entries[5:]]


@every_host
def test_update_changes_outputs_and_version_and_confirms_checksums(host):
    old, new = make_model("qwen3", seed=0), make_model("qwen3", seed=1)
    request = ask("r", prompt_of(21), seed=3, ignore_eos=True)

    async def scenario(engine: Engine):
        before = await engine.generate(request)
        receipt = await engine.update_weights(named(new), version=7)
        return before, receipt, await engine.weight_version(), await engine.generate(request)

    before, receipt, version, after = drive(host, old, scenario)
    assert version == receipt.version == 7
    assert set(before.weight_versions) == {0} and set(after.weight_versions) == {7}
    assert receipt.checksums == {name: tensor_checksum(parameter) for name, parameter in new.named_parameters()}
    # A stale prefix of the old weights would show here.
    torch.testing.assert_close(torch.tensor(after.log_probs), reference_log_probs(new, request, after), atol=1e-4, rtol=0)
    assert before.output_ids != after.output_ids


@every_host
def test_each_token_carries_the_version_that_sampled_it(host):
    async def scenario(engine: Engine):
        running = asyncio.ensure_future(
            engine.generate(ask("r", prompt_of(5), max_new_tokens=LONGER_THAN_A_LOOK[host], ignore_eos=True))
        )
        while (await engine.stats()).generated_tokens < 4:
            await asyncio.sleep(0)
        await engine.pause()
        sampled = (await engine.stats()).generated_tokens
        await engine.update_weights(named(make_model("qwen3", seed=1)), version=1)
        await engine.resume()
        return sampled, await running

    sampled, result = drive(host, make_model("qwen3"), scenario)
    assert list(result.weight_versions) == [0] * sampled + [1] * (LONGER_THAN_A_LOOK[host] - sampled)


@every_host
def test_wrong_weights_are_refused_and_the_old_ones_stay(host):
    model = make_model("qwen3")
    request = ask("r", prompt_of(9), seed=3, ignore_eos=True)
    wrong_shape = [[("model.norm.weight", torch.zeros(33))]]
    wrong_name = [[("model.layers.7.mlp.up_proj.weight", torch.zeros(48, 32))]]

    async def scenario(engine: Engine):
        before = await engine.generate(request)
        with pytest.raises(WeightSyncError, match="has shape"):
            await engine.update_weights(wrong_shape, version=1)
        with pytest.raises(WeightSyncError, match=r"no weight 'model\.layers\.7"):
            await engine.update_weights(wrong_name, version=1)
        return before, await engine.generate(request), await engine.weight_version()

    before, after, version = drive(host, model, scenario)
    assert before.output_ids == after.output_ids and version == 0


@every_host
def test_incomplete_weights_stop_the_engine_until_whole_ones_come(host):
    model = make_model("qwen3")

    async def scenario(engine: Engine):
        with pytest.raises(WeightSyncError, match="did not arrive"):
            await engine.update_weights(named(model)[:1], version=1)
        assert not await engine.health()
        with pytest.raises(EngineError):
            await engine.generate(ask("r", [5]))
        await engine.update_weights(named(model), version=2)
        return (await engine.generate(ask("r", [5], ignore_eos=True))).weight_versions

    assert set(drive(host, model, scenario)) == {2}


@every_host
def test_sleep_gives_the_cache_back_and_wake_takes_it_again(host):
    model = make_model("qwen3")
    request = ask("r", prompt_of(9), seed=3, ignore_eos=True)

    async def scenario(engine: Engine):
        before = await engine.generate(request)
        await engine.sleep([MemoryTag.KV_CACHE, MemoryTag.WEIGHTS])
        asleep = (await engine.stats()).num_pages
        with pytest.raises(EngineError):
            await engine.generate(request)
        await engine.wake([MemoryTag.KV_CACHE, MemoryTag.WEIGHTS])
        with pytest.raises(EngineError):
            await engine.generate(request)  # the weights are gone
        await engine.update_weights(named(model), version=1)
        return before, asleep, await engine.generate(request)

    before, asleep, after = drive(host, model, scenario)
    assert asleep == 0
    assert before.output_ids == after.output_ids


@every_host
def test_sleep_is_refused_while_requests_are_unfinished(host):
    async def scenario(engine: Engine):
        running = asyncio.ensure_future(
            engine.generate(ask("r", prompt_of(5), max_new_tokens=LONGER_THAN_A_LOOK[host], ignore_eos=True))
        )
        while (await engine.stats()).generated_tokens < 2:
            await asyncio.sleep(0)
        with pytest.raises(EngineError, match="unfinished"):
            await engine.sleep([MemoryTag.KV_CACHE])
        return await running

    assert len(drive(host, make_model("qwen3"), scenario).output_ids) == LONGER_THAN_A_LOOK[host]


def test_adopted_weights_follow_the_trainer_without_a_copy():
    model = make_model("qwen2")
    request = ask("r", prompt_of(21), seed=3, ignore_eos=True)

    async def scenario():
        engine = make_engine(make_model("qwen2", seed=9))
        await engine.adopt_weights(dict(model.named_parameters()), version=1)
        first = await engine.generate(request)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)
        await engine.adopt_weights(dict(model.named_parameters()), version=2)
        second = await engine.generate(request)
        # A later copy must not write into the trainer's tensors.
        kept = {name: parameter.clone() for name, parameter in model.named_parameters()}
        await engine.update_weights(named(make_model("qwen2", seed=4)), version=3)
        await engine.close()
        return first, second, kept

    first, second, kept = asyncio.run(scenario())
    assert first.output_ids != second.output_ids and set(second.weight_versions) == {2}
    torch.testing.assert_close(torch.tensor(second.log_probs), reference_log_probs(model, request, second), atol=1e-4, rtol=0)
    assert all(torch.equal(kept[name], parameter) for name, parameter in model.named_parameters())


def test_weights_of_another_dtype_cannot_be_adopted():
    async def scenario():
        engine = make_engine(make_model("qwen3"))
        with pytest.raises(WeightSyncError, match="cannot be aliased"):
            await engine.adopt_weights(dict(make_model("qwen3").bfloat16().named_parameters()), version=1)
        await engine.close()

    asyncio.run(scenario())
