"""Parts of a model on the ranks of an engine, and the life of those ranks."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest
import torch

from qwench.engines.embedded.compute.ranks import Shard
from qwench.engines.protocol import FinishReason
from qwench.errors import ConfigError, EngineError, WeightSyncError
from qwench.models.hf import architecture_of
from tests.contract.engine_hosts import LONG, ask, generate_all, make_engine, make_model, prompt_of

FOUR_BY_TWO = torch.arange(8.0).view(4, 2)
LAYER = "model.layers.0."


@pytest.mark.parametrize(
    ("name", "tensor", "first", "second"),
    [
        (LAYER + "self_attn.q_proj.weight", FOUR_BY_TWO, [[0, 1], [2, 3]], [[4, 5], [6, 7]]),
        (LAYER + "self_attn.k_proj.bias", torch.arange(4.0), [0, 1], [2, 3]),
        (LAYER + "self_attn.o_proj.weight", FOUR_BY_TWO, [[0], [2], [4], [6]], [[1], [3], [5], [7]]),
        (LAYER + "mlp.down_proj.bias", torch.arange(2.0), [0, 1], [0, 0]),
        (LAYER + "input_layernorm.weight", torch.arange(2.0), [0, 1], [0, 1]),
        ("model.embed_tokens.weight", FOUR_BY_TWO, [[0, 1], [2, 3]], [[4, 5], [6, 7]]),
        ("lm_head.weight", FOUR_BY_TWO, [[0, 1], [2, 3]], [[4, 5], [6, 7]]),
    ],
)
def test_each_rank_holds_its_part_of_a_weight(name, tensor, first, second):
    assert [Shard(rank=rank, size=2).cut(name, tensor).tolist() for rank in (0, 1)] == [first, second]
    assert Shard().cut(name, tensor) is tensor


def test_parts_have_the_shapes_of_the_divided_model():
    model = make_model("qwen2")
    shapes = architecture_of(model.config).divided(2).parameter_shapes()
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    assert {name: tuple(Shard(rank=1, size=2).cut(name, one).shape) for name, one in parameters.items()} == shapes


def test_two_ranks_sample_the_tokens_of_one_with_the_same_log_probs():
    model = make_model("llama")
    requests = [
        ask(
            f"r{i}",
            prompt_of(3 + 7 * i, seed=i),
            seed=i,
            max_new_tokens=20,
            ignore_eos=True,
            temperature=0.3 * i,
            top_k=(i % 2) * 9,
        )
        for i in range(6)
    ]

    async def scenario(num_devices: int):
        engine = make_engine(model, num_devices=num_devices)
        results = await generate_all(engine, requests)
        await engine.close()
        return results

    one, two = (asyncio.run(scenario(num_devices)) for num_devices in (1, 2))
    assert [result.output_ids for result in one] == [result.output_ids for result in two]
    for alone, divided in zip(one, two, strict=True):
        assert divided.log_probs == pytest.approx(alone.log_probs, abs=1e-5)


def test_a_rank_that_dies_fails_the_requests_and_the_engine():
    async def scenario():
        engine = make_engine(make_model("qwen3"), num_devices=2)
        running = asyncio.ensure_future(engine.generate(ask("r", prompt_of(5), max_new_tokens=LONG, ignore_eos=True)))
        while (await engine.stats()).generated_tokens < 3:
            await asyncio.sleep(0)
        (process,) = engine._followers._processes
        os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(EngineError):
            await running
        with pytest.raises(EngineError, match="refused"):
            await engine.generate(ask("later", [5]))
        healthy = await engine.health()
        await engine.close()
        return healthy, process.is_alive()

    assert asyncio.run(scenario()) == (False, False)


def test_a_rank_that_fails_is_named_with_its_exit_code():
    async def scenario():
        engine = make_engine(make_model("qwen3"), num_devices=2)
        await engine.generate(ask("before", [5]))
        engine._followers.tell("weights", "no_such_method")
        engine._followers._processes[0].join()
        with pytest.raises(EngineError, match=r"a rank of the engine ended: rank 1 \(exit code 1\)"):
            await engine.generate(ask("after", [5]))
        await engine.close()
        await engine.close()

    asyncio.run(scenario())


def test_closing_an_engine_ends_its_ranks_and_an_abort_does_not():
    async def scenario():
        engine = make_engine(make_model("qwen3"), num_devices=2)
        (process,) = engine._followers._processes
        running = asyncio.ensure_future(engine.generate(ask("r", prompt_of(5), max_new_tokens=LONG, ignore_eos=True)))
        while (await engine.stats()).generated_tokens < 3:
            await asyncio.sleep(0)
        await engine.abort()
        aborted = (await running).finish_reason
        alive = process.is_alive()
        await engine.close()
        return aborted, alive, process.is_alive(), process.exitcode

    assert asyncio.run(scenario()) == (FinishReason.ABORT, True, False, 0)


def test_what_several_ranks_do_not_support_is_refused():
    model = make_model("qwen3")
    for settings, word in (({"fp8": True}, "FP8"), ({"inline": True}, "--deterministic-mode")):
        with pytest.raises(ConfigError, match=word):
            make_engine(model, num_devices=2, **settings)
    with pytest.raises(ConfigError, match="2 key-value heads"):
        make_engine(model, num_devices=3)

    async def scenario():
        engine = make_engine(model, num_devices=2)
        with pytest.raises(EngineError, match="no adapters"):
            await engine.change_adapters(lambda adapters, in_use: None)
        with pytest.raises(WeightSyncError, match="no adapters"):
            await engine.update_weights([[(LAYER + "mlp.up_proj.lora_A.weight", torch.zeros(2, 32))]], version=1)
        with pytest.raises(WeightSyncError, match="cannot alias"):
            await engine.adopt_weights(dict(model.named_parameters()), version=1)
        result = await engine.generate(ask("r", [5], ignore_eos=True))
        await engine.close()
        return result.weight_versions

    assert set(asyncio.run(scenario())) == {0}
