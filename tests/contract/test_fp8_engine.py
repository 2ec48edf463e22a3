"""The embedded engine with FP8 weights: against what they stand for, and against bfloat16 on a model that has learned."""

from __future__ import annotations

import asyncio

import pytest
import torch
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from qwench.config.sections.engine import EngineConfig
from qwench.engines.client import HttpEngine
from qwench.engines.embedded.engine import EmbeddedEngine
from qwench.engines.embedded.http.serving import ServerThread
from qwench.errors import WeightSyncError
from qwench.models.built_tokenizers import build_small_tokenizer
from qwench.models.fp8 import BLOCK, is_quantized_name, quantized
from qwench.models.hf import write_hf_checkpoint
from qwench.weights.local import QuantizedWeights, send_copies, shared_weights_for
from qwench.weights.plan import PublicationPlan
from qwench.weights.remote import publish_from_rank
from qwench.wire.addresses import EngineAddress
from tests.contract.engine_hosts import ask, generate_all, make_model, prompt_of, reference_log_probs, settings_of
from tests.deadlines import patient

NUM_SEQUENCES, PROMPT_LENGTH, RESPONSE_LENGTH = 24, 8, 16
FIRST_TOKEN, NUM_TOKENS = 20, 256
SETTINGS = {"kv_cache_tokens": 4096, "page_size": 4, "max_running_requests": 64}


class Source:
    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def weights(self, *, bucket_bytes, part="merged"):
        for name, parameter in self.model.named_parameters():
            yield [(name, parameter.detach())]

    def shared_weights(self, part="merged"):
        return dict(self.model.named_parameters())


def fp8_engine(model: PreTrainedModel, **settings) -> EmbeddedEngine:
    return EmbeddedEngine.from_checkpoint(model.config, settings_of(fp8=True, **SETTINGS, **settings))


def by_hand(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy with every matrix of a layer rounded to e4m3 block by block, in loops."""
    copy = type(model)(model.config)
    copy.load_state_dict(model.state_dict())
    with torch.no_grad():
        for name, parameter in copy.named_parameters():
            if is_quantized_name(name):
                values = parameter.bfloat16().float()
                for i in range(0, values.shape[0], BLOCK):
                    for j in range(0, values.shape[1], BLOCK):
                        block = values[i : i + BLOCK, j : j + BLOCK]
                        scale = block.abs().max() / 448
                        block.copy_((block / scale).to(torch.float8_e4m3fn).float() * scale)
                parameter.copy_(values)
    return copy.eval()


def run(scenario):
    return asyncio.run(scenario())


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama"])
def test_log_probs_are_those_of_the_weights_that_it_stands_for(family):
    model = make_model(family)
    requests = [ask(str(i), prompt_of(5 + 3 * i, seed=i), seed=i, ignore_eos=True, max_new_tokens=12) for i in range(3)]

    async def scenario():
        engine = fp8_engine(model)
        await send_copies(QuantizedWeights(Source(model)), [engine], version=3, bucket_bytes=1, part="merged")
        results = await generate_all(engine, requests)
        await engine.close()
        return results

    stands_for = by_hand(model)
    for request, result in zip(requests, run(scenario), strict=True):
        expected = reference_log_probs(stands_for, request, result)
        torch.testing.assert_close(torch.tensor(result.log_probs), expected, atol=1e-4, rtol=0)
        assert not torch.allclose(expected, reference_log_probs(model, request, result), atol=1e-4)


def test_an_fp8_engine_never_uses_the_trainers_tensors_and_takes_no_plain_ones():
    model = make_model("qwen3")

    async def scenario():
        engine = fp8_engine(model)
        assert shared_weights_for([engine], QuantizedWeights(Source(model)), "merged") is None
        with pytest.raises(WeightSyncError, match=r"'model.layers.0.self_attn.q_proj.weight' came as torch.float32"):
            await engine.update_weights(Source(model).weights(bucket_bytes=1), version=1)
        with pytest.raises(WeightSyncError, match="did not arrive"):
            buckets = quantized(Source(model).weights(bucket_bytes=1))
            await engine.update_weights(
                [[entry for entry in bucket if "scale" not in entry[0]] for bucket in buckets], version=1
            )
        plain = EmbeddedEngine.from_checkpoint(model.config, settings_of(**SETTINGS))
        with pytest.raises(WeightSyncError, match=r"FP8|float8"):
            await plain.update_weights(quantized(Source(model).weights(bucket_bytes=1)), version=1)
        await engine.close()
        await plain.close()

    run(scenario)


@pytest.mark.parametrize("transport", ["ipc", "broadcast", "disk"])
def test_every_transport_quantizes_on_the_way(tmp_path, transport):
    model, source = make_model("llama"), tmp_path / "model"
    model.save_pretrained(source)
    request = ask("r", prompt_of(9), seed=2, ignore_eos=True, max_new_tokens=12)

    async def generate(engine):
        result = await engine.generate(request)
        await engine.close()
        return result

    with ServerThread(fp8_engine(model), token="secret") as server:
        address = EngineAddress(base_url=server.base_url, token="secret", kind="embedded", placement=None)
        flags = EngineConfig(update_weight_buffer_size=9_000, update_weight_transport=transport)
        settings = PublicationPlan(engine=flags, model_folder=source, fp8=True, timeout_s=patient(30))
        publish_from_rank(Source(model), [address], 6, settings)
        result = asyncio.run(generate(HttpEngine(server.base_url)))
    assert set(result.weight_versions) == {6}
    expected = reference_log_probs(by_hand(model), request, result)
    torch.testing.assert_close(torch.tensor(result.log_probs), expected, atol=1e-4, rtol=0)


def trained_model() -> PreTrainedModel:
    """Return a small model that has learned to continue sequences that count up by a step, with three blocks to a row."""
    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=160, intermediate_size=300, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        vocab_size=288, max_position_embeddings=256, eos_token_id=1, tie_word_embeddings=True,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(220):
        starts, steps = torch.randint(0, 220, (32,)).tolist(), torch.randint(1, 5, (32,)).tolist()
        tokens = torch.stack([counting(start, step, 20) for start, step in zip(starts, steps, strict=True)])
        loss = model(tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.bfloat16().float().eval()


def counting(start: int, step: int, length: int) -> torch.Tensor:
    return FIRST_TOKEN + (start + step * torch.arange(length)) % NUM_TOKENS


def agreement(one: list[list[int]], other: list[list[int]]) -> float:
    pairs = [pair for left, right in zip(one, other, strict=True) for pair in zip(left, right, strict=True)]
    return sum(left == right for left, right in pairs) / len(pairs)


def test_greedy_tokens_agree_with_bfloat16_on_a_trained_model(tmp_path):
    model = trained_model()
    model.save_pretrained(tmp_path / "plain")
    build_small_tokenizer().save_pretrained(tmp_path / "plain")
    write_hf_checkpoint(tmp_path / "fp8", quantized(Source(model).weights(bucket_bytes=1)), source=tmp_path / "plain")
    sequences = [counting(7 * i, 1 + i % 4, PROMPT_LENGTH + RESPONSE_LENGTH).tolist() for i in range(NUM_SEQUENCES)]

    async def generate(folder):
        engine = EmbeddedEngine.from_checkpoint(folder, settings_of(**SETTINGS))
        requests = [
            ask(str(i), tokens[:PROMPT_LENGTH], temperature=0.0, max_new_tokens=RESPONSE_LENGTH, ignore_eos=True)
            for i, tokens in enumerate(sequences)
        ]
        results = await generate_all(engine, requests)
        await engine.close()
        return [list(result.output_ids) for result in results]

    plain, fp8 = (asyncio.run(generate(tmp_path / name)) for name in ("plain", "fp8"))
    learned = agreement(plain, [tokens[PROMPT_LENGTH:] for tokens in sequences])
    assert learned > 0.8, "the model has not learned enough to be asked"
    assert agreement(plain, fp8) >= 0.95
