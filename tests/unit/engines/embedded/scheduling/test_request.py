"""What a finished request returns."""

from __future__ import annotations

from qwench.engines.embedded.scheduling.request import RunningRequest
from qwench.engines.protocol import FinishReason, GenerateRequest, GenerateResult, SamplingParams
from tests.fakes.engine import CharTokenizer


def finished(**sampling) -> RunningRequest:
    return RunningRequest(
        request=GenerateRequest(request_id="r", input_ids=[1, 2], sampling=SamplingParams(max_new_tokens=9, **sampling)),
        seed=0,
        max_new_tokens=9,
        stop_ids=frozenset(),
        future=None,
        tokens=[1, 2, 97, 0, 98],
        num_prompt=2,
        log_probs=[-0.5, -0.25, -1.0],
        weight_versions=[3, 3, 4],
        cached_tokens=1,
        finish_reason=FinishReason.STOP,
        matched=98,
    )


def test_a_result_has_the_response_alone_and_what_was_noted_of_it():
    one = finished()
    assert (one.num_output, one.output_ids) == (3, [97, 0, 98])
    assert one.to_result(None) == GenerateResult(
        request_id="r",
        output_ids=[97, 0, 98],
        log_probs=[-0.5, -0.25, -1.0],
        finish_reason=FinishReason.STOP,
        matched=98,
        weight_versions=[3, 3, 4],
        text="",
        cached_tokens=1,
        support=[],
    )


def test_its_text_has_special_tokens_or_not_as_asked():
    assert finished(skip_special_tokens=True).to_result(CharTokenizer()).text == "ab"
    assert finished(skip_special_tokens=False).to_result(CharTokenizer()).text == "a\0b"
