"""What SGLang is sent, and what is verified of it, against an independent account of what SGLang does."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwench.config.sections.engine import EngineConfig
from qwench.errors import EngineError, WeightSyncError
from qwench.models.fp8 import quantized
from qwench.models.peft import AdapterConfig
from qwench.weights.plan import NamedAdapter, PublicationPlan
from qwench.weights.remote import publish_from_rank
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

    def shared_weights(self, part="merged"):
        return None


class Fp8Source(Source):
    """One layer whose matrices are large enough to be split in whole blocks."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        names = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
        plain = {f"model.layers.0.{name}.weight": torch.randn(256, 256, generator=generator) for name in names}
        (bucket,) = quantized([[*plain.items(), ("model.norm.weight", torch.ones(256).bfloat16())]])
        self.tensors = dict(bucket)


def serve(source, *, tp_size=1, **state):
    return FakeSglang({name: tuple(t.shape) for name, t in source.tensors.items()}, tp_size=tp_size, token=TOKEN, **state)


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


def test_a_server_without_cached_prefixes_takes_weights_while_requests_wait():
    source = Source("qwen3", torch.bfloat16)
    with serve(source, caches_prefixes=False, num_waiting=3) as fake:
        publish(source, fake)
    updates = [body["flush_cache"] for path, body in fake.requests if path == "/update_weights_from_tensor"]
    assert len(updates) > 5 and not any(updates) and fake.version == "7"


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


ADAPTER = AdapterConfig(rank=2, alpha=4.0, use_rslora=False, targets=("q_proj",))


class AdapterSource:
    """Frozen weights that nobody needs, and an adapter of one projection."""

    def weights(self, *, bucket_bytes, part="merged"):
        assert part == "adapter"
        module = "model.layers.0.self_attn.q_proj"
        shapes = {f"{module}.lora_A.weight": (2, 64), f"{module}.lora_B.weight": (64, 2), "lora_scale": (1,)}
        return bucketed(((name, torch.ones(shape)) for name, shape in shapes.items()), bucket_bytes=bucket_bytes)

    def shared_weights(self, part="merged"):
        return None


def name_adapter(fake, name, *, version, retired=()):
    address = EngineAddress(base_url=fake.base_url, token=TOKEN, kind="sglang", placement=None)
    named = NamedAdapter(config=ADAPTER, name=name, retired=retired)
    plan = PublicationPlan(engine=EngineConfig(), adapters=True, named=named, part="adapter", timeout_s=patient(20))
    publish_from_rank(AdapterSource(), [address], version, plan)


def test_an_adapter_is_loaded_by_its_name_and_those_before_it_are_unloaded():
    with FakeSglang({}, tp_size=1, token=TOKEN) as fake:
        name_adapter(fake, "one", version=3)
        name_adapter(fake, "two", version=4, retired=("zero", "one"))
    requests = [(path, body | {"lora_path": ""} if "lora_path" in body else body) for path, body in fake.requests if body]
    label = {"abort_all_requests": False}
    assert requests == [
        ("/load_lora_adapter", {"lora_name": "one", "lora_path": ""}),
        ("/update_weight_version", {"new_version": "3"} | label),
        ("/load_lora_adapter", {"lora_name": "two", "lora_path": ""}),
        ("/update_weight_version", {"new_version": "4"} | label),
        ("/unload_lora_adapter", {"lora_name": "zero"}),  # it was restarted meanwhile: an unknown name is no error
        ("/unload_lora_adapter", {"lora_name": "one"}),
    ]
    config = json.loads(fake.adapters["two"])
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (2, 4, ["q_proj"])
    assert [*fake.adapters] == ["two"] and fake.version == "4"
    folders = [Path(body["lora_path"]) for _, body in fake.requests if "lora_path" in body]
    assert len({*folders}) == 2 and not any(folder.exists() for folder in folders)


def test_an_adapter_that_is_refused_names_the_engine_and_its_reason():
    with FakeSglang({}, tp_size=1, token=TOKEN) as fake:
        name_adapter(fake, "one", version=3)
        with pytest.raises(
            EngineError, match=r"HttpEngine.* status 400: Failed to load LoRA adapter one because it is already"
        ):
            name_adapter(fake, "one", version=4)
        fake.answer = lambda path, body: (200, {"loaded_adapters": {}, "tp_size": 1})
        with pytest.raises(WeightSyncError, match=r"does not name 'two' among its adapters: \{\}"):
            name_adapter(fake, "two", version=4)


@given(st.integers(0, 60_000), st.integers(0, 2**32))
def test_hash_is_that_of_sglangs_kernel(num_bytes, seed):
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=generator)
    assert sglang_hash(tensor) == numpy_hash(tensor)
