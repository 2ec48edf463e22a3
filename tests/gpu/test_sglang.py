"""A stock SGLang server, started by our code: what the engine contract asks of it, and what it does not count for us.

The model is small and random; its log-probs are compared with Hugging Face's own forward pass in float32, which bfloat16
kernels stay near to.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from qwench.config.sections.engine import EngineConfig
from qwench.engines.client import HttpEngine
from qwench.engines.fleet.event_loop import EventLoopThread
from qwench.engines.fleet.members import Member
from qwench.engines.fleet.pool import EnginePool
from qwench.engines.fleet.servers import ServerProcess
from qwench.engines.kinds.identity import ModelIdentity, check_serves
from qwench.engines.kinds.sglang import check_sglang_words, sglang_command
from qwench.engines.protocol import Engine, FinishReason, GenerateRequest, GenerateResult, MemoryTag
from qwench.errors import ConfigError, EngineError
from qwench.models.built_tokenizers import build_small_tokenizer
from qwench.models.random_qwen3 import make_checkpoint
from tests.contract.engine_hosts import ask, generate_all, prompt_of, reference_log_probs
from tests.fakes.orders import server_order
from tests.gpu.marks import NEEDS_SGLANG

pytestmark = NEEDS_SGLANG
TOKEN = "secret"
LONG = 4000
"""New tokens of a response that a test interrupts."""
WORDS = ("--mem-fraction-static", "0.3", "--cuda-graph-max-bs", "8", *os.environ.get("SGLANG_TEST_FLAGS", "").split())
"""SGLANG_TEST_FLAGS names kernels that are installed where the defaults are not."""
MEAN_GAP, LARGEST_GAP = 0.02, 0.3
"""Of log-probs in bfloat16 from those in float32, for a model of these sizes."""
Result = TypeVar("Result")


@dataclass
class Served:
    """A server and the folders of two models of one shape: the one it began with, and another."""

    process: ServerProcess
    url: str
    folders: Sequence[Path]

    def drive(self, scenario: Callable[[HttpEngine], Awaitable[Result]]) -> Result:
        """Run a scenario against the server."""

        async def run() -> Result:
            engine = HttpEngine(self.url, token=TOKEN, kind="sglang")
            try:
                return await scenario(engine)
            finally:
                await engine.close()

        return asyncio.run(run())

    def reference(self, index: int) -> PreTrainedModel:
        """Return Hugging Face's model of a folder, in float32 on the CPU."""
        return AutoModelForCausalLM.from_pretrained(self.folders[index], dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("sglang")
    folders = [folder / "first", folder / "second"]
    for seed, one in enumerate(folders):
        make_checkpoint(one, size="30M", tokenizer=build_small_tokenizer(), seed=seed)
    check_sglang_words(WORDS)
    order = server_order(
        folders[0], folder, token=TOKEN, dtype="bfloat16", releases_memory=True, seed=0, serves_checkpoint=True,
        sglang_args=WORDS, engine_start_timeout=600.0,
    )  # fmt: skip
    command = sglang_command(order, index=0, gpu_ids=(0,), environ=os.environ)
    process = ServerProcess(command)
    yield Served(process, process.start(), folders)
    process.stop()


def check_log_probs(model: PreTrainedModel, request: GenerateRequest, result: GenerateResult) -> None:
    """Compare a response with an independent forward pass; what kernels add to logits, a low temperature enlarges."""
    gap = (torch.tensor(result.log_probs) - reference_log_probs(model, request, result)).abs()
    gap *= request.sampling.temperature or 1.0
    assert gap.mean() < MEAN_GAP and gap.max() < LARGEST_GAP, gap


def test_flags_are_read_by_the_installed_sglang():
    with pytest.raises(ConfigError, match="--sglang-mem-fraktion"):
        check_sglang_words(("--mem-fraktion", "0.7"))
    with pytest.raises(ConfigError, match="--sglang-mem-fraction-static"):
        check_sglang_words(("--mem-fraction-static", "much"))


def test_log_probs_are_those_of_the_sampling_temperature(served):
    requests = [
        ask(f"r{i}", prompt_of(length, seed=i), temperature=temperature, max_new_tokens=new, seed=i, ignore_eos=True)
        for i, (length, temperature, new) in enumerate([(3, 1.0, 9), (5, 0.7, 40), (17, 1.3, 7), (40, 0.0, 60), (90, 1.0, 33)])
    ]
    results = served.drive(lambda engine: generate_all(engine, requests))
    model = served.reference(0)
    for request, result in zip(requests, results, strict=True):
        assert len(result.output_ids) == request.sampling.max_new_tokens == len(result.log_probs)
        assert result.finish_reason is FinishReason.LENGTH
        assert set(result.weight_versions) == {0}
        check_log_probs(model, request, result)


def test_responses_end_at_stop_tokens_and_stop_words_which_they_keep(served):
    async def scenario(engine: Engine):
        free = await engine.generate(ask("free", prompt_of(9), max_new_tokens=40, ignore_eos=True, temperature=0.0))
        stop = free.output_ids[12]
        by_token = await engine.generate(
            ask("token", prompt_of(9), max_new_tokens=40, temperature=0.0, stop_token_ids=(stop,), ignore_eos=False)
        )
        word = build_small_tokenizer().decode([free.output_ids[3], free.output_ids[4]])
        by_word = await engine.generate(
            ask("word", prompt_of(9), max_new_tokens=40, temperature=0.0, stop=(word,), ignore_eos=True)
        )
        return free, stop, by_token, word, by_word

    free, stop, by_token, word, by_word = served.drive(scenario)
    end = list(free.output_ids).index(stop) + 1
    assert by_token.finish_reason is FinishReason.STOP
    assert list(by_token.output_ids) == list(free.output_ids)[: len(by_token.output_ids)]
    assert len(by_token.output_ids) <= end  # an end-of-sequence id may come first
    assert by_word.finish_reason is FinishReason.STOP and by_word.matched == word
    assert word in build_small_tokenizer().decode(list(by_word.output_ids))


def test_an_abort_ends_its_request_and_no_other(served):
    async def scenario(engine: Engine):
        requests = [ask(f"a{i}", prompt_of(5, seed=i), max_new_tokens=LONG, ignore_eos=True) for i in (1, 10, 11)]
        running = [asyncio.ensure_future(engine.generate(request)) for request in requests]
        await asyncio.sleep(1.0)
        await engine.abort("a1")
        first = await asyncio.wait_for(running[0], 30)
        others_go_on = not any(task.done() for task in running[1:])
        await engine.abort()
        return first, others_go_on, await asyncio.wait_for(asyncio.gather(*running[1:]), 30)

    first, others_go_on, others = served.drive(scenario)
    assert others_go_on
    for result in (first, *others):
        assert result.finish_reason is FinishReason.ABORT
        assert 0 < len(result.output_ids) == len(result.log_probs) == len(result.weight_versions) < LONG


def test_nothing_is_answered_while_paused(served):
    async def scenario(engine: Engine):
        running = asyncio.ensure_future(engine.generate(ask("long", prompt_of(5), max_new_tokens=300, ignore_eos=True)))
        await asyncio.sleep(0.3)
        await engine.pause()
        late = asyncio.ensure_future(engine.generate(ask("late", prompt_of(6), max_new_tokens=2, ignore_eos=True)))
        done, _ = await asyncio.wait({late, running}, timeout=3.0)
        held = late not in done
        await engine.resume()
        return held, await asyncio.wait_for(running, 60), await asyncio.wait_for(late, 60)

    held, long, late = served.drive(scenario)
    assert held
    assert len(long.output_ids) == 300 and len(late.output_ids) == 2


def test_memory_is_released_and_resumed_around_new_weights_from_disk(served):
    request = ask("r", prompt_of(21), max_new_tokens=30, temperature=0.0, ignore_eos=True)

    async def scenario(engine: HttpEngine):
        before = await engine.generate(request)
        free = [torch.cuda.mem_get_info()[0]]
        await engine.sleep([MemoryTag.KV_CACHE])
        free.append(torch.cuda.mem_get_info()[0])
        await engine.sleep([MemoryTag.WEIGHTS])
        free.append(torch.cuda.mem_get_info()[0])
        await engine.wake([MemoryTag.WEIGHTS])
        body = {"model_path": str(served.folders[1]), "weight_version": "7", "flush_cache": True}
        await engine.post("/update_weights_from_disk", body, timeout_s=120)
        await engine.wake([MemoryTag.KV_CACHE])
        return before, free, await engine.weight_version(), await engine.generate(request)

    before, free, version, after = served.drive(scenario)
    assert free[1] - free[0] > 2**30  # the cache of --mem-fraction-static 0.3 has many GiB
    assert free[2] - free[1] > 2**24
    assert version == 7 and set(after.weight_versions) == {7}
    assert before.output_ids != after.output_ids
    check_log_probs(served.reference(1), request, after)

    async def restore(engine: HttpEngine):
        body = {"model_path": str(served.folders[0]), "weight_version": "0", "flush_cache": True}
        await engine.post("/update_weights_from_disk", body, timeout_s=120)
        return await engine.generate(request)

    check_log_probs(served.reference(0), request, served.drive(restore))


def test_memory_is_not_released_under_a_running_request(served):
    async def scenario(engine: Engine):
        running = asyncio.ensure_future(engine.generate(ask("long", prompt_of(5), max_new_tokens=7000, ignore_eos=True)))
        await asyncio.sleep(0.5)
        refused = False
        try:
            await engine.sleep([MemoryTag.KV_CACHE])
        except EngineError:
            refused = True
        was_running = not running.done()
        await engine.abort()
        await running
        if not refused:
            await engine.wake([MemoryTag.KV_CACHE])
        return refused or not was_running, await engine.health()

    fine, healthy = served.drive(scenario)
    assert fine and healthy


def test_weights_and_memory_need_the_token(served):
    async def scenario(engine: Engine):
        stranger = HttpEngine(served.url, token="guess", kind="sglang")
        with pytest.raises(EngineError, match=r"40[13]"):
            await stranger.sleep([MemoryTag.KV_CACHE])
        await stranger.close()

    served.drive(scenario)


def test_its_model_is_told_from_another(served):
    tokenizer = build_small_tokenizer()
    sizes = {"vocab_size": served.reference(0).config.vocab_size}

    def identity(encode, **changed) -> ModelIdentity:
        return ModelIdentity(model_type="qwen3", sizes=sizes | changed, encode=encode)

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    assert served.drive(lambda engine: check_serves(engine, identity(encode))).name == "sglang"
    for other in (identity(encode, vocab_size=99), identity(lambda text: [*encode(text), 1])):
        with pytest.raises(ConfigError, match="--rollout-external-engine-addrs"):
            served.drive(lambda engine, other=other: check_serves(engine, other))


def test_a_killed_server_is_started_again_and_answers_what_it_owed(served, caplog):
    client = HttpEngine(served.url, token=TOKEN, kind="sglang")
    rules = EngineConfig(rollout_health_check_interval=5.0, rollout_health_check_timeout=30.0)
    pool = EnginePool([Member(engine=client, server=served.process, url=served.url)], EventLoopThread(), health=rules)

    async def scenario():
        running = asyncio.ensure_future(pool.generate(ask("long", prompt_of(5), max_new_tokens=LONG, ignore_eos=True)))
        await asyncio.sleep(1.0)
        os.killpg(served.process.process_group, signal.SIGKILL)
        return await running

    try:
        result = pool.run(scenario(), label="generate over a death", timeout_s=600)
    finally:
        pool.close()
    assert len(result.output_ids) == LONG and result.request_id == "long"
    assert pool.num_restarts == 1 and len(caplog.messages) == 2
