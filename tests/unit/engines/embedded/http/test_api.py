"""Bodies of `/generate` and of OpenAI's paths: the requests they mean, and what is refused."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from pydantic import ValidationError

from qwench.engines.embedded.http.answers import FieldError
from qwench.engines.embedded.http.api import GenerateBody, to_response
from qwench.engines.embedded.http.openai_requests import ChatBody, CompletionBody
from qwench.engines.embedded.http.weight_routes import GroupBody
from qwench.engines.protocol import FinishReason, GenerateRequest, GenerateResult, SamplingParams, Scores, Scoring
from qwench.errors import EngineError
from qwench.models.built_tokenizers import build_small_tokenizer

TOKENIZER = build_small_tokenizer()
COMMON = {
    "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "stop_token_ids": [3, 4], "ignore_eos": True,
    "skip_special_tokens": False,
}  # fmt: skip
MEANT: dict[str, Any] = {**COMMON, "stop_token_ids": (3, 4), "min_new_tokens": 2}


def requests_of(**fields: object) -> list[GenerateRequest]:
    return GenerateBody.model_validate(fields).to_requests(TOKENIZER, max_tokens=1)


def openai(kind: type[CompletionBody | ChatBody], positions: int = 64, **fields: object) -> list[GenerateRequest]:
    body = kind.model_validate(fields)
    body.check()
    prompts = body.prompts(TOKENIZER, max_tokens=positions)
    return body.requests(prompts, request_id="r", adapter="mine", positions=positions)


def test_every_field_of_generate_reaches_the_request():
    own = {"max_new_tokens": 9, "min_new_tokens": 2, "stop": "x", "sampling_seed": 5, "keeps_support": True}
    found = requests_of(input_ids=[1, 2], sampling_params=COMMON | own, rid="a", lora_path="mine", priority=-1)
    sampling = SamplingParams(max_new_tokens=9, stop=("x",), seed=5, keeps_support=True, **MEANT)
    assert found == [GenerateRequest(request_id="a", input_ids=[1, 2], sampling=sampling, adapter="mine", priority=-1)]


def test_what_is_left_out_has_sglangs_defaults():
    (found,) = requests_of(input_ids=[1])
    assert found.sampling == SamplingParams(max_new_tokens=128, skip_special_tokens=True)
    assert (found.adapter, found.priority, found.scoring) == (None, 0, None) and re.fullmatch("[0-9a-f]{32}", found.request_id)


def test_lists_are_matched_by_their_places():
    params = [{"max_new_tokens": 1, "stop": ["a", "b"]}, {"max_new_tokens": 2}]
    found = requests_of(text=["a", "b"], sampling_params=params, rid=["first", "second"], lora_path=["mine", None])
    assert [(one.request_id, one.input_ids, one.sampling.max_new_tokens, one.adapter) for one in found] == [
        ("first", TOKENIZER.encode("a"), 1, "mine"),
        ("second", TOKENIZER.encode("b"), 2, None),
    ]
    assert [one.sampling.stop for one in found] == [("a", "b"), ()]
    shared = requests_of(input_ids=[[1], [2]], lora_path="mine", sampling_params={"max_new_tokens": 3})
    assert [(one.adapter, one.sampling.max_new_tokens) for one in shared] == [("mine", 3)] * 2


def test_scores_begin_behind_the_token_that_sglang_names():
    score = {"sampling_params": {"max_new_tokens": 0}, "return_logprob": True, "logprob_start_len": 0}
    (found,) = requests_of(input_ids=[1, 2], top_logprobs_num=4, token_ids_logprob=[7, 8], **score)
    assert found.scoring == Scoring(start=1, top_k=4, token_ids=(7, 8))


SCORED = {"input_ids": [1, 2], "return_logprob": True, "logprob_start_len": 0}
NO_GENERATION = "supported without generation only"


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        *(
            ({"text": "a", name: True}, f"{name} is not supported; send {name}: false.")
            for name in ("background", "return_text_in_logprobs", "return_hidden_states", "return_bytes", "return_entropy")
        ),
        *(
            ({"text": "a", "sampling_params": {name: 2}}, f"sampling_params.{name} must be {neutral}; got 2")
            for name, neutral in (("n", 1), ("frequency_penalty", 0.0), ("presence_penalty", 0.0), ("repetition_penalty", 1.0))
        ),
        ({}, "send either text or input_ids."),
        ({"text": "a", "input_ids": [1]}, "send either text or input_ids."),
        ({"text": []}, "there is no prompt in the list"),
        ({"text": ["a", "b"], "rid": ["a"]}, "got 2 prompts, 2 sampling_params, 1 rid and 2 lora_path; send as many of each."),
        ({"text": ["a"], "sampling_params": []}, "got 1 prompts, 0 sampling_params, 1 rid and 1 lora_path"),
        ({"text": ["a"], "lora_path": []}, "got 1 prompts, 1 sampling_params, 1 rid and 0 lora_path"),
        ({"text": "a", "rid": "r" * 257}, "is no id: 1 to 256 printable characters"),
        ({"text": ["a"], "rid": [""]}, "rid '' is no id"),
        ({"text": "a", "rid": "a\n"}, "rid 'a\\n' is no id"),
        ({"text": "a" * 129}, "a text of 129 characters is longer than any prompt of this model."),
        ({"input_ids": [[1]] * 4097}, "4097 prompts are more than the 4096 of a request."),
        (SCORED | {"sampling_params": {"max_new_tokens": 1}}, NO_GENERATION),
        (SCORED | {"sampling_params": {"max_new_tokens": 0}, "return_logprob": False}, NO_GENERATION),
        (SCORED | {"sampling_params": {"max_new_tokens": 0}, "logprob_start_len": -2}, NO_GENERATION),
        ({"text": "a", "top_logprobs_num": 1}, NO_GENERATION),
        ({"text": "a", "token_ids_logprob": [1]}, NO_GENERATION),
    ],
)
def test_what_generate_cannot_do_is_refused(fields, problem):
    with pytest.raises(EngineError, match=re.escape(problem)):
        requests_of(**fields)


def test_bounds_of_generate_are_inclusive():
    assert len(requests_of(input_ids=[[1]] * 4096)) == 4096
    assert requests_of(text="a" * 128, rid="r" * 256)[0].request_id == "r" * 256
    with pytest.raises(EngineError, match=r"no tokenizer; send input_ids"):
        GenerateBody(text="a").to_requests(None, max_tokens=1)


def test_every_field_of_a_completion_reaches_its_requests():
    found = openai(CompletionBody, prompt=["a", "b"], n=2, max_tokens=9, min_tokens=2, stop=["x", "y"], seed=5, **COMMON)
    params = [SamplingParams(max_new_tokens=9, stop=("x", "y"), seed=seed, **MEANT) for seed in (5, 6)]
    prompts = [TOKENIZER.encode("a"), TOKENIZER.encode("b")]
    assert found == [
        GenerateRequest(request_id=f"r-{place}-{choice}", input_ids=prompts[place], sampling=params[choice], adapter="mine")
        for place in (0, 1)
        for choice in (0, 1)
    ]


def test_what_openai_leaves_out_is_sampled_from_the_whole_distribution():
    (found,) = openai(CompletionBody, prompt=[1, 2], stop="x")
    assert (found.request_id, found.input_ids) == ("r", [1, 2])
    assert found.sampling == SamplingParams(max_new_tokens=16, stop=("x",), skip_special_tokens=True)
    chat = {"messages": [{"role": "user", "content": "a"}]}
    assert openai(ChatBody, **chat)[0].sampling == SamplingParams(max_new_tokens=64, skip_special_tokens=True)
    assert openai(ChatBody, max_tokens=5, **chat)[0].sampling.max_new_tokens == 5
    assert openai(ChatBody, max_tokens=5, max_completion_tokens=6, **chat)[0].sampling.max_new_tokens == 6


CHAT = {"messages": [{"role": "user", "content": "a"}]}
COMPLETION = {"prompt": "a"}


@pytest.mark.parametrize(
    ("kind", "fields", "field", "problem"),
    [
        (CompletionBody, COMPLETION | {"n": 0}, "n", "n must lie in [1, 128], got 0."),
        (CompletionBody, COMPLETION | {"n": 129}, "n", "n must lie in [1, 128], got 129."),
        (CompletionBody, {"prompt": ["a"] * 33, "n": 128}, "n", "33 prompts with n 128 are more than the 4096 answers"),
        (
            CompletionBody,
            COMPLETION | {"max_tokens": 0},
            "max_tokens",
            "the most tokens of a response must be at least 1, got 0.",
        ),
        (CompletionBody, COMPLETION | {"stream_options": {}}, "stream_options", "stream_options needs stream: true."),
        (CompletionBody, COMPLETION | {"rid": ""}, "rid", "rid '' is no id"),
        (CompletionBody, COMPLETION | {"logprobs": 1}, "logprobs", "logprobs must be 0 (of the sampled tokens alone), got 1."),
        (CompletionBody, COMPLETION | {"best_of": 2}, "best_of", "best_of 2 is not supported; leave it out, or send n."),
        (CompletionBody, COMPLETION | {"echo": True}, "echo", "echo True is not supported; leave it out, or send False."),
        (CompletionBody, COMPLETION | {"suffix": "x"}, "suffix", "suffix 'x' is not supported"),
        (CompletionBody, COMPLETION | {"frequency_penalty": 1}, "frequency_penalty", "frequency_penalty 1.0 is not supported"),
        (CompletionBody, COMPLETION | {"presence_penalty": 1}, "presence_penalty", "presence_penalty 1.0 is not supported"),
        (CompletionBody, COMPLETION | {"repetition_penalty": 2}, "repetition_penalty", "repetition_penalty 2.0 is not"),
        (CompletionBody, COMPLETION | {"logit_bias": {"1": 1}}, "logit_bias", "logit_bias {'1': 1.0} is not supported"),
        (CompletionBody, COMPLETION | {"return_hidden_states": True}, "return_hidden_states", "return_hidden_states True is"),
        (CompletionBody, {"prompt": []}, "prompt", "there is no prompt in the list; send at least one."),
        (ChatBody, CHAT | {"top_logprobs": 1}, "top_logprobs", "top_logprobs is not supported"),
        (ChatBody, CHAT | {"tool_choice": "required"}, "tool_choice", "leave it out, or send 'auto' or 'none'."),
        (ChatBody, CHAT | {"response_format": {"type": "json_object"}}, "response_format", "response_format {'type': 'json"),
        (ChatBody, CHAT | {"continue_final_message": True}, "continue_final_message", "continue_final_message True is not"),
        (ChatBody, CHAT | {"functions": [{}]}, "functions", "functions [{}] is not supported"),
        (ChatBody, CHAT | {"function_call": "auto"}, "function_call", "function_call 'auto' is not supported"),
        (ChatBody, CHAT | {"modalities": ["audio"]}, "modalities", "modalities ['audio'] is not supported"),
        (ChatBody, CHAT | {"store": True}, "store", "store True is not supported"),
        (ChatBody, CHAT | {"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs", "kwargs cannot set tokenize."),
        (ChatBody, {"messages": [{"role": "user", "content": "a" * 9000}]}, "messages", "is longer than any prompt of this"),
        (ChatBody, {"messages": []}, "messages", "messages"),
    ],
)
def test_what_openais_paths_cannot_do_is_refused_by_its_field(kind, fields, field, problem):
    with pytest.raises(FieldError, match=re.escape(problem)) as refused:
        openai(kind, **fields)
    assert (refused.value.field, refused.value.status_code) == (field, 400)


def test_neutral_values_are_accepted():
    openai(CompletionBody, **COMPLETION, n=1, best_of=1, logprobs=0, echo=False, suffix="", frequency_penalty=0, logit_bias={})
    openai(CompletionBody, **COMPLETION, presence_penalty=0, repetition_penalty=1, return_hidden_states=False)
    openai(ChatBody, **CHAT, top_logprobs=0, tool_choice="none", response_format={"type": "text"}, modalities=["text"])
    openai(ChatBody, **CHAT, tool_choice="auto", continue_final_message=False, functions=[], function_call="none", store=False)
    with pytest.raises(EngineError, match="this server has no tokenizer, so it cannot render messages"):
        ChatBody.model_validate(CHAT).prompts(None, max_tokens=1)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (GenerateBody, {"text": "a", "unknown": 1}),
        (GenerateBody, {"text": "a", "sampling_params": {"unknown": 1}}),
        (CompletionBody, COMPLETION | {"unknown": 1}),
        (ChatBody, CHAT | {"unknown": 1}),
        (ChatBody, CHAT | {"stream": True, "stream_options": {"unknown": 1}}),
    ],
)
def test_a_field_that_is_not_known_is_refused(kind, fields):
    with pytest.raises(ValidationError, match=r"unknown\n  Extra inputs are not permitted"):
        kind.model_validate(fields)


SCORES = Scores(log_probs=[-0.5, -1.5], top=[[(-0.5, 6)], [(-0.25, 2)]], of_token_ids=[[-4.0, -3.0], [-0.25, -1.0]])


@pytest.mark.parametrize(
    ("reason", "matched", "told"),
    [
        (FinishReason.STOP, 9, {"type": "stop", "matched": 9}),
        (FinishReason.LENGTH, None, {"type": "length", "length": 2}),
        (FinishReason.ABORT, None, {"type": "abort", "message": "aborted by request"}),
    ],
)
def test_an_answer_has_sglangs_form_and_what_was_asked_for(reason, matched, told):
    sampling = SamplingParams(max_new_tokens=2)
    request = GenerateRequest(request_id="r", input_ids=[4, 5, 6, 7], sampling=sampling)
    result = GenerateResult(
        request_id="r", output_ids=(8, 9), log_probs=(-1.0, -2.0), finish_reason=reason, matched=matched, text="hi",
        weight_versions=(3, 4), cached_tokens=2,
    )  # fmt: skip
    meta = {
        "id": "r", "finish_reason": told, "prompt_tokens": 4, "completion_tokens": 2, "cached_tokens": 2,
        "weight_version": "4", "weight_versions": [3, 4],
    }  # fmt: skip
    bare, full = GenerateBody(input_ids=[4]), GenerateBody(input_ids=[4], return_logprob=True)
    assert to_response(request, result, body=bare) == {"text": "hi", "output_ids": [8, 9], "meta_info": meta}
    assert to_response(request, result, body=bare, ended=False)["meta_info"] == {**meta, "finish_reason": None}
    drawn = {"output_token_logprobs": [[-1.0, 8, None], [-2.0, 9, None]]}
    scoring = Scoring(start=2, top_k=1, token_ids=(2, 8))
    scored, supported = replace(request, scoring=scoring), replace(result, support=[[8], [9, 1]])
    assert to_response(scored, supported, body=full)["meta_info"] == {**meta, **drawn, "output_support": [[8], [9, 1]]}
    lists = {
        "input_token_logprobs": [[None, 5, None], [-0.5, 6, None], [-1.5, 7, None]],
        "input_top_logprobs": [None, [[-0.5, 6, None]], [[-0.25, 2, None]]],
        "input_token_ids_logprobs": [None, [[-4.0, 2, None], [-3.0, 8, None]], [[-0.25, 2, None], [-1.0, 8, None]]],
    }
    assert to_response(scored, replace(result, scores=SCORES), body=full)["meta_info"] == {**meta, **drawn, **lists}
    alone = replace(scored, scoring=Scoring(start=2))
    first = {"input_token_logprobs": lists["input_token_logprobs"]}
    assert to_response(alone, replace(result, scores=SCORES), body=bare)["meta_info"] == {**meta, **first}
    empty = replace(result, output_ids=(), log_probs=(), weight_versions=())
    assert to_response(request, empty, body=bare)["meta_info"]["weight_version"] is None


JOIN = {"master_address": "h", "master_port": 1, "rank_offset": 0, "world_size": 1, "timeout_s": 86_400}


def test_a_weight_group_has_ports_ranks_and_seconds_in_their_bounds():
    assert GroupBody.model_validate(JOIN | {"master_port": 65_535}).rank_offset == 0
    for change in (
        {"master_port": 0}, {"master_port": 65_536}, {"rank_offset": -1}, {"rank_offset": 2**31}, {"world_size": 0},
        {"world_size": 2**31}, {"timeout_s": 0}, {"timeout_s": 86_401},
    ):  # fmt: skip
        with pytest.raises(ValidationError, match=next(iter(change))):
            GroupBody.model_validate(JOIN | change)
