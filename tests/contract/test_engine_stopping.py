"""How responses end, in every engine."""

from __future__ import annotations

import pytest
import torch

from qwench.engines.protocol import FinishReason
from qwench.models.built_tokenizers import build_small_tokenizer
from tests.contract.engine_hosts import EOS, HOSTS, ask, drive, generate_all, make_model, prompt_of

pytestmark = pytest.mark.parametrize("host", HOSTS)


@pytest.fixture(scope="module")
def model():
    return make_model("qwen3")


@pytest.fixture(scope="module")
def stopper():
    """A model that much prefers the end-of-sequence token: its embedding points where all hidden states do."""
    model = make_model("llama")
    with torch.no_grad():
        model.model.norm.weight.zero_()
        model.model.norm.weight[0] = 1.0
        model.model.embed_tokens.weight[:, 0] = 5.0
        model.lm_head.weight[:, 0] = 0.0
        model.lm_head.weight[EOS, 0] = 30.0
    return model


def test_end_of_sequence_stops_and_stays_in_the_output(host, stopper):
    (result,) = drive(host, stopper, lambda engine: generate_all(engine, [ask("r", prompt_of(5), temperature=0.0)]))
    assert result.finish_reason is FinishReason.STOP and result.matched == EOS
    assert list(result.output_ids) == [EOS]


def test_ignore_eos_goes_on(host, stopper):
    request = ask("r", prompt_of(5), temperature=0.0, ignore_eos=True, max_new_tokens=7)
    (result,) = drive(host, stopper, lambda engine: generate_all(engine, [request]))
    assert result.finish_reason is FinishReason.LENGTH and list(result.output_ids) == [EOS] * 7


def test_min_new_tokens_forbids_stop_tokens_until_then(host, stopper):
    request = ask("r", prompt_of(5), temperature=0.0, min_new_tokens=4, max_new_tokens=9)
    (result,) = drive(host, stopper, lambda engine: generate_all(engine, [request]))
    assert EOS not in result.output_ids[:4]
    assert result.output_ids[4] == EOS and len(result.output_ids) == 5
    assert result.finish_reason is FinishReason.STOP


def test_stop_token_stops_at_its_first_appearance(host, model):
    free = ask("free", prompt_of(7), seed=3, max_new_tokens=30, ignore_eos=True)
    (whole,) = drive(host, model, lambda engine: generate_all(engine, [free]))
    token = whole.output_ids[11]
    end = whole.output_ids.index(token) + 1
    stopped = ask("stopped", prompt_of(7), seed=3, max_new_tokens=30, stop_token_ids=(token,))
    (result,) = drive(host, model, lambda engine: generate_all(engine, [stopped]))
    assert list(result.output_ids) == list(whole.output_ids[:end])
    assert result.finish_reason is FinishReason.STOP and result.matched == token


def test_stop_string_across_tokens_ends_the_response_and_stays_in_it(host, model):
    tokenizer = build_small_tokenizer()
    free = ask("free", prompt_of(7), seed=4, max_new_tokens=30, ignore_eos=True)
    (whole,) = drive(host, model, lambda engine: generate_all(engine, [free]), tokenizer=tokenizer)
    pieces = [tokenizer.decode([token]) for token in whole.output_ids]
    # Two neighbouring readable tokens make a stop string that no single token holds.
    start = next(i for i in range(1, 29) if all(piece.isascii() and piece.strip() for piece in pieces[i : i + 2]))
    stop = pieces[start] + pieces[start + 1]
    stopped = ask("stopped", prompt_of(7), seed=4, max_new_tokens=30, ignore_eos=True, stop=("unseen", stop))
    (result,) = drive(host, model, lambda engine: generate_all(engine, [stopped]), tokenizer=tokenizer)
    assert result.finish_reason is FinishReason.STOP and result.matched == stop
    assert list(result.output_ids) == list(whole.output_ids[: start + 2])
    assert result.text == tokenizer.decode(result.output_ids) and result.text.endswith(stop)


def test_stop_on_the_last_allowed_token_is_no_truncation(host, stopper):
    request = ask("r", prompt_of(5), temperature=0.0, max_new_tokens=1)
    (result,) = drive(host, stopper, lambda engine: generate_all(engine, [request]))
    assert result.finish_reason is FinishReason.STOP
