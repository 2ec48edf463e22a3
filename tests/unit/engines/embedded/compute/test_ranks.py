"""Parts of a model on the ranks of an engine, and the life of those ranks."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import re
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.distributed import HashStore

from qwench.engines.embedded import settings as settings_module
from qwench.engines.embedded.compute import follower_process, followers
from qwench.engines.embedded.compute.followers import Followers
from qwench.engines.embedded.compute.ranks import RankGroup, Shard
from qwench.engines.embedded.engine import EmbeddedEngine
from qwench.engines.protocol import FinishReason, MemoryTag
from qwench.errors import ConfigError, EngineError, WeightSyncError
from qwench.models.hf import architecture_of
from tests.contract.engine_hosts import LONG, ask, generate_all, make_engine, make_model, prompt_of, settings_of
from tests.deadlines import patient

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


def test_ranks_draw_with_the_kernels_of_rank_0_or_do_not_start(monkeypatch):
    """With others they would wait for tokens that rank 0 does not send."""
    told, model = [], architecture_of(make_model("qwen3").config)

    def process(*, args, **_):
        told.append(args[3])
        raise InterruptedError

    monkeypatch.setattr(followers._context, "Process", process)
    for loaded in (None, object()):
        monkeypatch.setattr(settings_module, "library", lambda loaded=loaded: loaded)
        with pytest.raises(InterruptedError):
            Followers(model, settings_of(num_devices=2))
    assert [one.sizes.embedded_native_kernels for one in told] == [False, True]
    assert told[1].resolved_native and not told[0].resolved_native
    monkeypatch.setattr(settings_module, "library", lambda: None)
    ours, _ = multiprocessing.Pipe()
    with ours, pytest.raises(EngineError, match=r"rank 0 has the C\+\+ kernels .* --no-embedded-native-kernels"):
        follower_process._work(ours, model, told[1], Shard(rank=1, size=2), 0)


def test_a_rank_that_dies_fails_the_requests_and_the_engine():
    async def scenario():
        engine = make_engine(make_model("qwen3"), num_devices=2)
        running = asyncio.ensure_future(engine.generate(ask("r", prompt_of(5), max_new_tokens=LONG, ignore_eos=True)))
        while (await engine.stats()).generated_tokens < 3:
            await asyncio.sleep(0)
        (process,) = engine._followers._processes
        os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(EngineError, match=r"rank 1 \(exit code -9\)"):
            await running
        with pytest.raises(EngineError, match="refused"):
            await engine.generate(ask("later", [5]))
        healthy = await engine.health()
        await engine.close()
        return healthy, process.is_alive()

    assert asyncio.run(scenario()) == (False, False)


def test_a_step_that_never_ends_fails_once_a_rank_has_ended(monkeypatch):
    monkeypatch.setattr(followers, "LOST_S", 0.1)
    is_stuck, goes_on = threading.Event(), threading.Event()
    gave_back = []

    def never_add_up(part: torch.Tensor) -> torch.Tensor:
        is_stuck.set()
        goes_on.wait()
        return part

    async def scenario():
        engine = make_engine(make_model("qwen3"), num_devices=2)
        await engine.generate(ask("before", [5]))
        monkeypatch.setattr(engine._followers.group, "add_up", never_add_up)
        monkeypatch.setattr(engine._runner, "close", lambda: gave_back.append("memory"))
        running = asyncio.ensure_future(engine.generate(ask("running", [5])))
        while not is_stuck.is_set():
            await asyncio.sleep(0)
        os.kill(engine._followers._processes[0].pid, signal.SIGKILL)
        try:
            with pytest.raises(EngineError, match=r"rank 1 \(exit code -9\)"):
                await running
            assert not await engine.health()
            await engine.close()  # memory is given back when the device has ended its work, which it never does
        finally:
            goes_on.set()

    asyncio.run(scenario())
    assert gave_back == []


@pytest.mark.parametrize("way", ["tell", "ask"])
def test_a_rank_that_fails_is_named_with_its_exit_code_and_reason(way):
    reason = "AttributeError: 'Runner' object has no attribute 'no_such_method'"
    message = re.escape(f"a rank of the engine ended: rank 1 (exit code 1): {reason}; its log tells more.")

    async def scenario():
        engine = make_engine(make_model("qwen3"), num_devices=2)
        await engine.generate(ask("before", [5]))
        if way == "tell":
            engine._followers.tell("runner", "no_such_method")
            engine._followers._processes[0].join()
        else:
            with pytest.raises(EngineError, match=message):
                engine._followers.ask("runner", "no_such_method")
        with pytest.raises(EngineError, match=message):
            await engine.generate(ask("after", [5]))
        await engine.close()
        await engine.close()

    asyncio.run(scenario())


def test_an_error_of_rank_0_in_a_step_ends_the_ranks_that_wait_for_it(monkeypatch):
    def fail():
        raise ValueError("no decoder")

    async def scenario():
        engine = make_engine(make_model("qwen3"), num_devices=2)
        await engine.generate(ask("before", [5]))
        (process,) = engine._followers._processes
        monkeypatch.setattr(engine._runner, "_bind", fail)
        with pytest.raises(EngineError, match="ValueError: no decoder"):
            await engine.generate(ask("r", [6]))
        process.join(patient(10))
        assert not process.is_alive()
        with pytest.raises(EngineError, match=r"rank 0 of the engine failed: ValueError: no decoder"):
            await engine.update_weights([[("model.norm.weight", torch.ones(32))]], version=1)
        await engine.close()

    asyncio.run(scenario())


class EndsWhereItIsSent:
    """A model that ends the process that receives it."""

    def divided(self, size):
        return self

    def __reduce__(self):
        return os._exit, (3,)


def test_a_rank_that_ends_while_it_starts_is_named_at_once():
    with pytest.raises(EngineError, match=r"rank 1 of the engine ended while it started \(exit code 3\)"):
        Followers(EndsWhereItIsSent(), settings_of(num_devices=2))


def test_a_rank_that_does_not_answer_fails_the_engine(monkeypatch):
    async def scenario():
        engine = make_engine(make_model("qwen3"), num_devices=2)
        (process,) = engine._followers._processes
        await engine.generate(ask("before", [5]))
        monkeypatch.setattr(followers, "COLLECTIVE_TIMEOUT_S", 0.2)
        os.kill(process.pid, signal.SIGSTOP)
        with pytest.raises(EngineError, match=r"rank 1 of the engine did not answer 'sleep' within 0.2 s"):
            await engine.sleep([MemoryTag.KV_CACHE])
        os.kill(process.pid, signal.SIGCONT)
        # The late answer to `sleep` is no answer to this.
        with pytest.raises(EngineError, match="did not answer 'sleep'"):
            await engine.sleep([MemoryTag.WEIGHTS])
        await engine.close()

    asyncio.run(scenario())


def test_a_rank_that_is_stopped_in_a_step_is_named_and_ends_the_engine(monkeypatch):
    monkeypatch.setattr(followers, "LOOK_S", 0.05)
    monkeypatch.setattr(followers, "STOPPED_S", 0.2)

    async def scenario():
        engine = make_engine(make_model("qwen3"), num_devices=2)
        (process,) = engine._followers._processes
        await engine.generate(ask("before", [5]))
        os.kill(process.pid, signal.SIGSTOP)
        with pytest.raises(EngineError, match=r"rank 1 of the engine was stopped by a signal for more than 0\.2 s"):
            await engine.generate(ask("after", [5]))
        process.join()
        await engine.close()

    asyncio.run(scenario())


def test_two_threads_that_leave_the_group_leave_it_once():
    class Group:
        num_aborts = 0

        def abort(self):
            time.sleep(0.05)  # the other thread comes
            self.num_aborts += 1

    group = RankGroup(HashStore(), shard=Shard(), device=torch.device("cpu"))
    group._group = left = Group()
    with ThreadPoolExecutor(2) as threads:
        for ended in [threads.submit(group.abort) for _ in range(2)]:
            ended.result()
    assert left.num_aborts == 1


def test_two_threads_get_their_own_answers():
    engine = make_engine(make_model("qwen3"), num_devices=2)
    bucket = [("model.norm.weight", torch.ones(32))]

    def ask_often(method: str, *arguments: object) -> set[str]:
        part = "runner" if method == "choose_num_pages" else "weights"
        return {type(engine._followers.ask(part, method, *arguments)[0]).__name__ for _ in range(200)}

    with ThreadPoolExecutor(2) as threads:
        kinds = [threads.submit(ask_often, "choose_num_pages"), threads.submit(ask_often, "check_bucket", bucket)]
        assert [kind.result() for kind in kinds] == [{"int"}, {"list"}]
    asyncio.run(engine.close())


def test_an_engine_whose_weights_are_refused_leaves_no_rank():
    before = multiprocessing.active_children()
    with pytest.raises(WeightSyncError, match="no weight 'unknown'"):
        EmbeddedEngine.from_checkpoint(
            make_model("qwen3").config, settings_of(num_devices=2), weights={"unknown": torch.zeros(1)}
        )
    assert multiprocessing.active_children() == before


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
