"""What every engine must do, checked against Hugging Face: the tokens, their log-probs, and how requests share the engine."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
import torch

from qwench.engines.protocol import Engine, FinishReason, GenerateRequest, Scoring
from qwench.errors import EngineError
from tests.contract.engine_hosts import (
    EOS,
    FAMILIES,
    HOSTS,
    LONG,
    LONGER_THAN_A_LOOK,
    MAX_POSITIONS,
    ask,
    distribution,
    drive,
    generate_all,
    make_model,
    prompt_of,
    reference_log_probs,
)

pytestmark = pytest.mark.parametrize("host", HOSTS)


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_equal_an_independent_forward(host, family):
    model = make_model(family)
    requests = [
        ask(f"r{i}", prompt_of(length, seed=i), temperature=temperature, max_new_tokens=new, seed=i, ignore_eos=True)
        for i, (length, temperature, new) in enumerate(
            [(1, 1.0, 9), (3, 0.7, 5), (4, 1.0, 12), (17, 1.3, 7), (40, 0.0, 9), (90, 1.0, 3)]
        )
    ]
    results = drive(host, model, lambda engine: generate_all(engine, requests))
    for request, result in zip(requests, results, strict=True):
        assert len(result.output_ids) == request.sampling.max_new_tokens
        assert result.finish_reason is FinishReason.LENGTH
        torch.testing.assert_close(
            torch.tensor(result.log_probs), reference_log_probs(model, request, result), atol=1e-4, rtol=0
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_hugging_face_generate(host, family):
    model = make_model(family)
    requests = [
        ask(f"r{i}", prompt_of(length, seed=i), temperature=0.0, max_new_tokens=12) for i, length in enumerate((2, 9, 33))
    ]
    results = drive(host, model, lambda engine: generate_all(engine, requests))
    for request, result in zip(requests, results, strict=True):
        prompt = torch.tensor([request.input_ids])
        expected = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=12, eos_token_id=EOS, pad_token_id=0
        )
        assert list(result.output_ids) == expected[0, prompt.shape[1] :].tolist()


def test_seeded_draws_do_not_depend_on_the_batch(host):
    model = make_model("qwen3")
    wanted = ask("wanted", prompt_of(11), seed=1234, max_new_tokens=20, ignore_eos=True)
    others = [ask(f"o{i}", prompt_of(3 + 5 * i, seed=i), seed=i, max_new_tokens=4 + i, ignore_eos=True) for i in range(9)]

    async def scenario(engine: Engine):
        alone = await engine.generate(wanted)
        await engine.flush_cache()
        together = await generate_all(engine, [*others[:4], wanted, *others[4:]])
        return alone, together[4]

    alone, together = drive(host, model, scenario)
    assert alone.output_ids == together.output_ids


def test_different_seeds_draw_different_responses(host):
    requests = [ask(f"r{i}", prompt_of(6), seed=i, max_new_tokens=12, ignore_eos=True) for i in range(8)]
    results = drive(host, make_model("qwen3"), lambda engine: generate_all(engine, requests))
    assert len({tuple(result.output_ids) for result in results}) == 8


@pytest.mark.parametrize("length", [15, 16, 17])
def test_equal_prompts_are_prefilled_once_and_sampled_apart(host, length):
    model = make_model("qwen3")
    requests = [ask(f"r{i}", prompt_of(length), seed=i, ignore_eos=True) for i in range(8)]
    other = ask("other", prompt_of(5, seed=9), seed=3, ignore_eos=True)

    async def scenario(engine: Engine):
        results = await generate_all(engine, [*requests, other])
        return results, await engine.stats()

    # Held back until all have arrived, or the first could be through before the others came over the socket.
    async def together(engine: Engine):
        await engine.pause()
        work = asyncio.ensure_future(scenario(engine))
        while (await engine.stats()).num_waiting < 9:
            await asyncio.sleep(0.001)
        await engine.resume()
        return await work

    results, stats = drive(host, model, together, prefix_cache=False)
    assert stats.prompt_tokens - stats.cached_prompt_tokens == length + 5
    assert stats.prompt_tokens == 8 * length + 5
    for request, result in zip([*requests, other], results, strict=True):
        torch.testing.assert_close(
            torch.tensor(result.log_probs), reference_log_probs(model, request, result), atol=1e-4, rtol=0
        )


def score(name: str, prompt: list[int], **scoring) -> GenerateRequest:
    return replace(ask(name, prompt, max_new_tokens=0), scoring=Scoring(**({"start": 1} | scoring)))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_is_scored_as_an_independent_forward_scores_it(host, family):
    model = make_model(family)
    prompts = [prompt_of(length, seed=length) for length in (2, 9, 17, 41)]
    requests = [
        score("whole", prompts[0]),
        score("response", prompts[1], start=6),
        score("likeliest", prompts[2], start=5, top_k=3),
        score("named", prompts[3], start=40, token_ids=(7, 200)),
        ask("beside them", prompts[3], max_new_tokens=5, ignore_eos=True),
    ]
    *scored, beside = drive(host, model, lambda engine: generate_all(engine, requests), prefill_chunk_tokens=7)
    for request, result in zip(requests, scored, strict=False):
        start = request.scoring.start
        with torch.no_grad():
            expected = model(torch.tensor([request.input_ids])).logits[0, start - 1 : -1].log_softmax(-1)
        found = result.scores
        labels = torch.tensor(request.input_ids[start:])[:, None]
        assert (list(result.output_ids), result.finish_reason) == ([], FinishReason.LENGTH)
        torch.testing.assert_close(torch.tensor(found.log_probs), expected.gather(-1, labels)[:, 0], atol=1e-4, rtol=0)
        values, tokens = expected.topk(request.scoring.top_k)
        assert [[token for _, token in row] for row in found.top] == (tokens.tolist() if found.top else [])
        for row, likeliest in zip(found.top, values, strict=bool(found.top)):
            torch.testing.assert_close(torch.tensor([one for one, _ in row]), likeliest, atol=1e-4, rtol=0)
        if request.scoring.token_ids:
            named = expected[:, list(request.scoring.token_ids)]
            torch.testing.assert_close(torch.tensor(found.of_token_ids), named, atol=1e-4, rtol=0)
    torch.testing.assert_close(
        torch.tensor(beside.log_probs), reference_log_probs(model, requests[-1], beside), atol=1e-4, rtol=0
    )


def test_a_response_is_scored_with_the_log_probs_of_its_own_sampling(host):
    model = make_model("qwen3")
    prompt = prompt_of(21)

    async def scenario(engine: Engine):
        sampled = await engine.generate(ask("sampled", prompt, seed=3, max_new_tokens=11, ignore_eos=True))
        request = score("scored", [*prompt, *sampled.output_ids], start=len(prompt))
        return sampled, [(await engine.generate(replace(request, request_id=name))).scores for name in ("once", "again")]

    sampled, (once, again) = drive(host, model, scenario)
    assert once.log_probs == pytest.approx(sampled.log_probs, abs=1e-4)
    assert again.log_probs == pytest.approx(once.log_probs, abs=1e-5)


@pytest.mark.parametrize(
    ("scoring", "word"),
    [({"start": 4}, "from token 4"), ({"token_ids": (288,)}, "outside"), ({"top_k": 999}, "likeliest")],
)
def test_a_score_that_cannot_be_is_refused_and_the_engine_goes_on(host, scoring, word):
    async def scenario(engine: Engine):
        with pytest.raises(EngineError, match=word):
            await engine.generate(score("bad", prompt_of(4), **scoring))
        return await engine.generate(score("good", prompt_of(4)))

    assert len(drive(host, make_model("qwen3"), scenario).scores.log_probs) == 3


def test_scoring_gives_way_to_generation_and_is_computed_again(host):
    model = make_model("qwen3")
    prompt = prompt_of(200, seed=4)
    requests = [ask(f"r{i}", prompt_of(30, seed=i), seed=i, max_new_tokens=60, ignore_eos=True) for i in range(6)]
    results = drive(
        host,
        model,
        lambda engine: generate_all(engine, [*requests, score("scored", prompt)]),
        kv_cache_tokens=420,
        prefill_chunk_tokens=8,
    )
    with torch.no_grad():
        expected = model(torch.tensor([prompt])).logits[0, :-1].log_softmax(-1)
    found = torch.tensor(results[-1].scores.log_probs)
    torch.testing.assert_close(found, expected.gather(-1, torch.tensor(prompt[1:])[:, None])[:, 0], atol=1e-4, rtol=0)


def test_chunked_prefill_equals_unchunked(host):
    model = make_model("qwen3")
    requests = [
        ask(f"r{i}", prompt_of(length, seed=i), seed=i, ignore_eos=True) for i, length in enumerate((50, 7, 30, 30, 64))
    ]
    whole = drive(host, model, lambda engine: generate_all(engine, requests))
    chunked = drive(host, model, lambda engine: generate_all(engine, requests), prefill_chunk_tokens=7)
    assert [result.output_ids for result in whole] == [result.output_ids for result in chunked]


def test_preempted_requests_give_the_same_tokens(host):
    model = make_model("qwen3")
    requests = [ask(f"r{i}", prompt_of(10, seed=i // 3), seed=i, max_new_tokens=40, ignore_eos=True) for i in range(12)]

    async def scenario(engine: Engine):
        results = await generate_all(engine, requests)
        return [result.output_ids for result in results], await engine.stats()

    roomy, _ = drive(host, model, scenario)
    crowded, stats = drive(host, model, scenario, kv_cache_tokens=160)
    assert stats.num_preempted > 0
    assert stats.num_free_pages == stats.num_pages == 40
    assert crowded == roomy


def test_continuation_reuses_the_cached_prefix(host):
    model = make_model("qwen3")

    async def scenario(engine: Engine):
        first = await engine.generate(ask("first", prompt_of(18), max_new_tokens=10, ignore_eos=True, seed=5))
        request = ask("second", [*prompt_of(18), *first.output_ids, 7, 8, 9], max_new_tokens=6, ignore_eos=True, seed=6)
        return request, await engine.generate(request)

    request, result = drive(host, model, scenario)
    # 18 prompt and 9 computed response tokens fill six pages of four; the tenth's keys were never needed.
    assert result.cached_tokens == 24
    torch.testing.assert_close(torch.tensor(result.log_probs), reference_log_probs(model, request, result), atol=1e-4, rtol=0)


def test_abort_returns_what_there_is(host):
    async def scenario(engine: Engine):
        running = asyncio.ensure_future(
            engine.generate(ask("long", prompt_of(5), max_new_tokens=LONG, ignore_eos=True, seed=1))
        )
        other = asyncio.ensure_future(
            engine.generate(ask("other", prompt_of(6), max_new_tokens=LONGER_THAN_A_LOOK[host], ignore_eos=True, seed=2))
        )
        while (await engine.stats()).generated_tokens < 5:
            await asyncio.sleep(0)
        await engine.abort("long")
        return await running, await other, await engine.stats()

    aborted, other, stats = drive(host, make_model("qwen3"), scenario)
    assert aborted.finish_reason is FinishReason.ABORT
    assert 0 < len(aborted.output_ids) == len(aborted.log_probs) == len(aborted.weight_versions) < LONG
    assert other.finish_reason is FinishReason.LENGTH and len(other.output_ids) == LONGER_THAN_A_LOOK[host]
    assert stats.num_free_pages == stats.num_pages


def test_an_aborted_request_for_scores_has_none(host):
    """Also none of the chunks that were scored before."""
    prompt = prompt_of(200)

    async def scenario(engine: Engine):
        await engine.pause()
        running = asyncio.ensure_future(engine.generate(score("scored", prompt, top_k=2)))
        while (stats := await engine.stats()).num_waiting + stats.num_running == 0:
            await asyncio.sleep(0)
        await engine.abort("scored")
        await engine.resume()
        return await running

    result = drive(host, make_model("qwen3"), scenario, prefill_chunk_tokens=8)
    assert (result.finish_reason, result.scores) == (FinishReason.ABORT, None)


def test_abort_of_all_also_ends_what_waits(host):
    requests = [ask(f"r{i}", prompt_of(5, seed=i), max_new_tokens=LONG, ignore_eos=True) for i in range(6)]

    async def scenario(engine: Engine):
        running = asyncio.ensure_future(generate_all(engine, requests))
        while (await engine.stats()).num_waiting < 4:
            await asyncio.sleep(0)
        await engine.abort()
        return await running

    results = drive(host, make_model("qwen3"), scenario, max_running_requests=2)
    assert {result.finish_reason for result in results} == {FinishReason.ABORT}


def test_nothing_is_generated_while_paused(host):
    async def scenario(engine: Engine):
        running = asyncio.ensure_future(
            engine.generate(ask("r", prompt_of(5), max_new_tokens=LONGER_THAN_A_LOOK[host], ignore_eos=True))
        )
        while (await engine.stats()).generated_tokens < 3:
            await asyncio.sleep(0)
        await engine.pause()
        before = (await engine.stats()).generated_tokens
        await asyncio.sleep(0.05)
        after = (await engine.stats()).generated_tokens
        await engine.resume()
        return before, after, await running

    before, after, result = drive(host, make_model("qwen3"), scenario)
    assert before == after < LONGER_THAN_A_LOOK[host]
    assert len(result.output_ids) == LONGER_THAN_A_LOOK[host]


def test_a_retracted_request_goes_on_under_the_new_weights_as_if_they_had_read_all_its_tokens(host):
    old, new = make_model("qwen3", seed=0), make_model("qwen3", seed=1)
    request = ask("r", prompt_of(5), seed=3, max_new_tokens=LONGER_THAN_A_LOOK[host], ignore_eos=True)

    async def scenario(engine: Engine):
        running = [asyncio.ensure_future(engine.generate(one)) for one in (request, replace(request, request_id="sibling"))]
        while (await engine.stats()).generated_tokens < 7:
            await asyncio.sleep(0)
        await engine.pause(retract=True)
        await engine.update_weights([list(new.state_dict().items())], version=1)
        await engine.resume()
        return await asyncio.gather(*running)

    for result in drive(host, old, scenario):
        num_old = list(result.weight_versions).count(0)
        assert 0 < num_old < LONGER_THAN_A_LOOK[host]
        assert list(result.weight_versions) == [0] * num_old + [1] * (LONGER_THAN_A_LOOK[host] - num_old)
        for model, part in ((old, slice(0, num_old)), (new, slice(num_old, None))):
            expected = reference_log_probs(model, request, result)
            torch.testing.assert_close(torch.tensor(result.log_probs)[part], expected[part], atol=1e-4, rtol=0)


def test_response_ends_where_the_engine_ends(host):
    async def scenario(engine: Engine):
        result = await engine.generate(ask("r", prompt_of(MAX_POSITIONS - 6), max_new_tokens=100, ignore_eos=True))
        with pytest.raises(EngineError, match="leaves no room"):
            await engine.generate(ask("too-long", prompt_of(MAX_POSITIONS)))
        return result

    result = drive(host, make_model("qwen3"), scenario)
    assert result.finish_reason is FinishReason.LENGTH and len(result.output_ids) == 6


def test_requests_that_cannot_run_are_refused_and_harm_nobody(host):
    async def scenario(engine: Engine):
        for request in (
            ask("empty", []),
            ask("vocabulary", [5, 99_999]),
            ask("none", [5], max_new_tokens=0),
            ask("stop", [5], stop=("x",)),
        ):
            with pytest.raises(EngineError):
                await engine.generate(request)
        return await engine.health(), await engine.generate(ask("fine", [5, 6]))

    healthy, result = drive(host, make_model("qwen3"), scenario)
    assert healthy and len(result.output_ids) > 0


class BrokenTokenizer:
    """Fails as soon as a stop string must be looked for."""

    eos_token_id = EOS

    def decode(self, token_ids, skip_special_tokens=False):
        raise ValueError("broken on purpose")


def test_a_tokenizer_that_fails_ends_each_request_that_needs_it_and_not_the_engine(host):
    async def scenario(engine: Engine):
        requests = [ask(f"r{i}", prompt_of(4 + i), max_new_tokens=50, stop=("never",)) for i in range(3)]
        outcomes = await asyncio.gather(*(engine.generate(request) for request in requests), return_exceptions=True)
        with pytest.raises(EngineError, match="broken on purpose"):
            await engine.generate(ask("later", [5]))
        return outcomes, await engine.health()

    outcomes, healthy = drive(host, make_model("qwen3"), scenario, tokenizer=BrokenTokenizer())
    assert all(isinstance(outcome, EngineError) and "broken on purpose" in str(outcome) for outcome in outcomes)
    assert healthy


@pytest.mark.parametrize(
    "limits", [{"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.3}, {"top_k": 4, "top_p": 0.6}, {"top_p": 0.8, "min_p": 0.2}], ids=str
)
def test_limits_restrict_the_support_to_exactly_the_likeliest_tokens(host, limits):
    model, prompt = make_model("qwen3", seed=5), prompt_of(9)
    log_probs, order = distribution(model, prompt, temperature=2.0).sort(descending=True)
    probs = log_probs.exp()
    kept = torch.ones_like(probs, dtype=torch.bool)
    if "top_k" in limits:
        kept[limits["top_k"] :] = False
    if "top_p" in limits:
        kept &= (probs.cumsum(-1) - probs) < limits["top_p"]
    if "min_p" in limits:
        kept &= probs >= limits["min_p"] * probs[0]
    requests = [ask(f"r{i}", prompt, seed=i, max_new_tokens=1, temperature=2.0, **limits) for i in range(64)]
    results = drive(host, model, lambda engine: generate_all(engine, requests))
    allowed = set(order[kept].tolist())
    drawn = {result.output_ids[0] for result in results}
    assert drawn <= allowed
    assert order[0].item() in drawn and len(drawn) > len(allowed) / 3
    full = distribution(model, prompt, temperature=2.0)
    assert all(abs(result.log_probs[0] - full[result.output_ids[0]].item()) < 1e-4 for result in results)
    asking = [replace(one, sampling=replace(one.sampling, keeps_support=True)) for one in requests[:8]]
    for before, result in zip(results, drive(host, model, lambda engine: generate_all(engine, asking)), strict=False):
        assert result.output_ids == before.output_ids
        assert [set(ids) for ids in result.support] == [allowed]
        assert abs(result.log_probs[0] - (full[result.output_ids[0]] - full[order[kept]].logsumexp(0)).item()) < 1e-4
