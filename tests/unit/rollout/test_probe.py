import pytest

from qwench.engines.fleet.event_loop import EventLoopThread
from qwench.engines.fleet.pool import EnginePool
from qwench.errors import WeightSyncError
from qwench.rollout.probe import NUM_PROMPTS, NUM_TOKENS, GreedyProbe
from qwench.samples import Prompt
from tests.fakes.engine import FakeEngine, log_prob_of


def ask(num_prompts: int):
    prompts = [Prompt(text=f"{i}?", token_ids=tuple(map(ord, f"{i}?"))) for i in range(num_prompts)]
    engine = FakeEngine(lambda context, request: context[0] * 100)
    pool = EnginePool([engine], EventLoopThread())
    try:
        probe = GreedyProbe(prompts)
        return probe, probe.ask(pool), engine
    finally:
        pool.close()


def test_the_first_prompts_are_answered_greedily():
    _, samples, engine = ask(NUM_PROMPTS + 3)
    assert [sample.response_tokens for sample in samples] == [[ord(str(i))] * NUM_TOKENS for i in range(NUM_PROMPTS)]
    assert {request.sampling.temperature for request in engine.requests} == {0.0}
    assert samples[1].rollout_log_probs == [log_prob_of(ord("1"))] * NUM_TOKENS
    assert [(sample.sample_id, sample.group_id) for sample in samples] == [(i, i) for i in range(NUM_PROMPTS)]
    assert [request.request_id for request in engine.requests] == [f"probe-{i}" for i in range(NUM_PROMPTS)]
    assert all(request.sampling.ignore_eos and request.sampling.max_new_tokens == NUM_TOKENS for request in engine.requests)


def test_rounding_passes_and_is_measured():
    probe, samples, _ = ask(2)
    shifts = [[0.1] * NUM_TOKENS, [0.1] * (NUM_TOKENS - 1) + [0.5]]
    scored = [
        [x + s for x, s in zip(sample.rollout_log_probs, own, strict=True)] for sample, own in zip(samples, shifts, strict=True)
    ]
    compared = probe.compare(samples, scored)
    assert compared["probe/fp8_logprob_abs_diff"] == pytest.approx(0.1 + 0.4 / (2 * NUM_TOKENS))
    assert compared["probe/fp8_logprob_abs_diff_max"] == pytest.approx(0.5)


@pytest.mark.parametrize("shift", [0.6, float("nan")])
def test_other_weights_are_found(shift):
    probe, samples, _ = ask(1)
    with pytest.raises(WeightSyncError, match="FP8 engines and BF16 trainer"):
        probe.compare(samples, [[x + shift for x in samples[0].rollout_log_probs]])
