"""What SGLang is sent, and what is verified of it, against an independent account of what SGLang does."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwench.config.sections.engine import EngineConfig
from qwench.errors import EngineError, WeightSyncError
from qwench.models.fp8 import quantized
from qwench.weights.remote import PublicationPlan, publish_from_rank
from qwench.wire.addresses import EngineAddress, Placement, host_name
from qwench.wire.portions import bucketed
from tests.checksums import sglang_hash
from tests.contract.engine_hosts import make_model
from tests.deadlines import patient
from tests.fakes.sglang_server import FakeSglang, numpy_hash

TOKEN = "secret"


class Source:
    def __init__(self, family: str, dtype: torch.dtype) -> None:
        model = make_model(family).to(dtype)
        self.tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def weights(self, *, bucket_bytes, part="merged"):
        return bucketed(self.tensors.items(), bucket_bytes=bucket_bytes)

    def shared_weights(self):
        return None


class Fp8Source(Source):
    """One layer whose matrices are large enough to be split in whole blocks."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        names = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
        plain = {f"model.layers.0.{name}.weight": torch.randn(256, 256, generator=generator) for name in names}
        (bucket,) = quantized([[*plain.items(), ("model.norm.weight", torch.ones(256).bfloat16())]])
        self.tensors = dict(bucket)


def serve(source, *, tp_size=1):
    return FakeSglang({name: tuple(t.shape) for name, t in source.tensors.items()}, tp_size=tp_size, token=TOKEN)


def publish(source, fake, *, version=7, bucket_bytes=5_000, token=TOKEN):
    placement = Placement(host=host_name(), devices=("cpu",) * fake.tp_size)
    address = EngineAddress(base_url=fake.base_url, token=token, kind="sglang", placement=placement)
    publish_from_rank(
        source,
        [address],
        version,
        PublicationPlan(engine=EngineConfig(update_weight_buffer_size=bucket_bytes), timeout_s=patient(20)),
    )


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize(("family", "dtype"), [("qwen3", torch.bfloat16), ("llama", torch.float32), ("qwen2", torch.bfloat16)])
def test_every_tensor_arrives_and_is_verified_on_every_rank(family, dtype, tp_size):
    source = Source(family, dtype)
    with serve(source, tp_size=tp_size) as fake:
        publish(source, fake)
    prefix = "model.layers.1.self_attn."
    whole = torch.cat([params[prefix + "o_proj.weight"] for params in fake.params], dim=1)
    assert torch.equal(whole, source.tensors[prefix + "o_proj.weight"])
    num_queries = source.tensors[prefix + "q_proj.weight"].shape[0] // tp_size
    queries = torch.cat([params[prefix + "qkv_proj.weight"][:num_queries] for params in fake.params])
    assert torch.equal(queries, source.tensors[prefix + "q_proj.weight"])
    assert fake.version == "7"
    updates = [body for path, body in fake.requests if path == "/update_weights_from_tensor"]
    assert len(updates) > 5 and [body["flush_cache"] for body in updates] == [False] * (len(updates) - 1) + [True]
    assert [body.get("weight_version") for body in updates] == [None] * (len(updates) - 1) + ["7"]


@pytest.mark.parametrize("tp_size", [1, 2])
def test_fp8_weights_are_verified_as_what_they_stand_for(tp_size):
    source = Fp8Source()
    with serve(source, tp_size=tp_size) as fake:
        publish(source, fake, bucket_bytes=100_000)
        assert fake.params[0]["model.layers.0.mlp.down_proj.weight"].dtype == torch.float8_e4m3fn
        fake.params[-1]["model.layers.0.self_attn.qkv_proj.weight_scale_inv"][-1] *= 2
        fake.answer_all = fake.answer
        updates = ("/update_weights_from_tensor", "/model_info")
        fake.answer = lambda path, body: (
            (200, {"model_path": "m", "weight_version": "7"}) if path in updates else fake.answer_all(path, body)
        )
        with pytest.raises(WeightSyncError, match=r"'model.layers.0.self_attn.qkv_proj.weight' .* \(1 of 5 differ\)"):
            publish(source, fake)


def test_a_tensor_that_differs_on_one_rank_is_named():
    source = Source("qwen3", torch.bfloat16)
    with serve(source, tp_size=2) as fake:
        fake.damaged = "model.layers.0.mlp.down_proj.weight"
        with pytest.raises(
            WeightSyncError, match=r"'model.layers.0.mlp.down_proj.weight' .* rank 1, has hash .* \(1 of \d+ differ\)"
        ):
            publish(source, fake)


def test_a_version_that_is_not_taken_over_is_found():
    source = Source("qwen3", torch.bfloat16)
    with serve(source) as fake:
        fake.answer_version = fake.answer
        fake.answer = lambda path, body: fake.answer_version(path, {k: v for k, v in body.items() if k != "weight_version"})
        with pytest.raises(EngineError, match="has weight version 'default'"):
            publish(source, fake)


def test_the_wrong_token_is_refused():
    source = Source("qwen3", torch.bfloat16)
    with serve(source) as fake, pytest.raises(EngineError, match="401"):
        publish(source, fake, token="guess")
    assert fake.params == [{}]


@given(st.integers(0, 60_000), st.integers(0, 2**32))
def test_hash_is_that_of_sglangs_kernel(num_bytes, seed):
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=generator)
    assert sglang_hash(tensor) == numpy_hash(tensor)
