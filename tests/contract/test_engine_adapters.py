"""Adapters of the embedded engine: several in one batch, by name or published, in process and over HTTP."""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import Awaitable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from qwench.engines.client import HttpEngine
from qwench.engines.embedded.compute.adapters import AdapterStack, load_folder
from qwench.engines.embedded.engine import EmbeddedEngine
from qwench.engines.embedded.http.serving import ServerThread
from qwench.engines.protocol import GenerateRequest, GenerateResult, Portion
from qwench.errors import ConfigError, EngineError, WeightSyncError
from qwench.models.built_tokenizers import build_small_tokenizer
from qwench.models.hf import architecture_of
from qwench.models.peft import write_adapter
from tests.checksums import tensor_checksum
from tests.contract.adapter_cases import ADAPTERS, adapter_matrices, check_log_probs, merged_model
from tests.contract.engine_hosts import ask, generate_all, make_engine, make_model, prompt_of


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return make_model("qwen3")


@pytest.fixture(scope="module")
def folders(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Write both adapters as PEFT folders."""
    parent = tmp_path_factory.mktemp("adapters")
    for name, config in ADAPTERS.items():
        (parent / name).mkdir()
        write_adapter(parent / name, config, adapter_matrices(model, name))
    return {name: parent / name for name in ADAPTERS}


@pytest.fixture(scope="module")
def models(model: PreTrainedModel) -> dict[str | None, PreTrainedModel]:
    """Return the model that each adapter makes, and under None the one without."""
    return {None: model} | {name: merged_model(model, name, adapter_matrices(model, name)) for name in ADAPTERS}


def _requests(prompt: list[int]) -> list[GenerateRequest]:
    """Ask every adapter, and none, twice for the same prompt."""
    names = (None, "wide", "narrow")
    return [
        replace(ask(f"{name}-{turn}", prompt, ignore_eos=True, seed=turn), adapter=name) for turn in range(2) for name in names
    ]


async def _loaded(engine: EmbeddedEngine, folders: Mapping[str, Path]) -> EmbeddedEngine:
    for name, folder in folders.items():
        await engine.change_adapters(load_folder(name, folder, engine.architecture))
    return engine


@pytest.mark.parametrize("settings", [{}, {"inline": True}, {"prefill_chunk_tokens": 5}], ids=["plain", "inline", "chunked"])
def test_rows_of_different_adapters_in_one_batch_equal_merged_models(model, models, folders, settings):
    async def scenario() -> None:
        engine = await _loaded(make_engine(model, **settings), folders)
        requests = _requests(prompt_of(11))
        for request, result in zip(requests, await generate_all(engine, requests), strict=True):
            check_log_probs(models, request, result)
        await engine.close()

    asyncio.run(scenario())


def test_prefixes_are_cached_for_each_adapter_apart(model, models, folders):
    async def scenario() -> None:
        engine = await _loaded(make_engine(model), folders)
        cached = []
        for request in _requests(prompt_of(11)):
            result = await engine.generate(request)
            check_log_probs(models, request, result)
            cached.append(result.cached_tokens)
        assert cached == [0, 0, 0, 8, 8, 8]
        await engine.change_adapters(lambda adapters, _: adapters.unload("wide"))
        await engine.change_adapters(load_folder("wide", folders["narrow"], engine.architecture))
        request = replace(ask("again", prompt_of(11), ignore_eos=True), adapter="wide")
        result = await engine.generate(request)
        assert result.cached_tokens == 0
        check_log_probs({"wide": models["narrow"]}, request, result)
        await engine.close()

    asyncio.run(scenario())


def test_a_step_without_a_request_of_an_adapter_takes_no_product_for_those_that_are_loaded(model, folders, monkeypatch):
    products: list[int] = []
    add = AdapterStack.add
    monkeypatch.setattr(AdapterStack, "add", lambda stack, x, *rest: products.append(len(x)) or add(stack, x, *rest))
    graphs: list[bool] = []

    def no_graph(*_step: object, has_adapters: bool) -> None:
        graphs.append(has_adapters)

    async def scenario() -> None:
        engine = await _loaded(make_engine(model), folders)
        assert engine.max_request_tokens > 0  # takes the memory of the cache
        engine._runner._bind()._graphs = no_graph
        plain, adapted = (ask(name, prompt_of(5), ignore_eos=True, max_new_tokens=3) for name in ("plain", "adapted"))
        await engine.generate(plain)
        assert (products, graphs) == ([], [False, False])  # two decodes follow the prefill
        await engine.generate(replace(adapted, adapter="wide"))
        # Four inputs of each layer: in the prefill (5 tokens, or what the cache left of them), and in each decode.
        assert products[-8:] == [1] * 8 and len(products) % 4 == 0
        assert graphs == [False, False, True, True]
        before = len(products)
        await engine.generate(replace(plain, request_id="again"))
        assert (len(products), graphs[4:]) == (before, [False, False])
        await engine.close()

    asyncio.run(scenario())


def test_a_request_without_an_adapter_has_the_bits_of_an_engine_without_any(model, folders):
    async def answer(engine: EmbeddedEngine) -> GenerateResult:
        result = await engine.generate(ask("one", prompt_of(11), ignore_eos=True, seed=3))
        await engine.close()
        return result

    async def both() -> tuple[GenerateResult, GenerateResult]:
        return await answer(make_engine(model)), await answer(await _loaded(make_engine(model), folders))

    plain, beside = asyncio.run(both())
    assert plain == beside


def test_an_unloaded_adapter_is_refused_and_its_unfinished_requests_go_on(model, models, folders):
    async def scenario() -> None:
        engine = await _loaded(make_engine(model), {"wide": folders["wide"]})
        request = replace(ask("long", prompt_of(6), ignore_eos=True, max_new_tokens=60), adapter="wide")
        running = asyncio.create_task(engine.generate(request))
        await asyncio.sleep(0.01)
        await engine.change_adapters(lambda adapters, _: adapters.unload("wide"))
        await engine.change_adapters(load_folder("narrow", folders["narrow"], engine.architecture))
        with pytest.raises(EngineError, match="there is no adapter 'wide'; loaded: narrow"):
            await engine.generate(replace(request, request_id="late"))
        check_log_probs(models, request, await running)
        await engine.close()

    asyncio.run(scenario())


def _publication(model: PreTrainedModel, name: str, matrices: Mapping[str, Tensor], *, base: bool) -> list:
    """Return the buckets of an adapter, with or without the weights it belongs to."""
    weights = [[(one, weight.detach()) for one, weight in model.named_parameters()]] if base else []
    return [*weights, [*matrices.items(), ("lora_scale", torch.tensor([ADAPTERS[name].scale]))]]


def test_a_published_adapter_equals_the_merged_model_and_carries_its_version(model, models):
    first, second = adapter_matrices(model, "wide"), adapter_matrices(model, "wide", seed=77)
    after = merged_model(model, "wide", second)

    async def scenario() -> None:
        engine = make_engine(model)
        receipt = await engine.update_weights(_publication(model, "wide", first, base=True), version=4)
        assert receipt.checksums["lora_scale"] == tensor_checksum(torch.tensor([2.0]))
        assert {name: receipt.checksums[name] for name in first} == {name: tensor_checksum(one) for name, one in first.items()}
        request = ask("first", prompt_of(9), ignore_eos=True)
        result = await engine.generate(request)
        check_log_probs({None: models["wide"]}, request, result)
        assert result.weight_versions == [4] * 8
        for index, bucket in enumerate(_publication(model, "wide", second, base=False)):
            assert await engine.receive_bucket(lambda bucket=bucket: bucket, Portion(version=5, index=index, final=True))
        request = ask("second", prompt_of(9), ignore_eos=True)
        result = await engine.generate(request)
        check_log_probs({None: after}, request, result)
        assert (result.weight_versions, result.cached_tokens) == ([5] * 8, 0)
        await engine.update_weights([list(model.state_dict().items())], version=6)
        request = ask("third", prompt_of(9), ignore_eos=True)
        check_log_probs({None: model}, request, await engine.generate(request))
        await engine.close()

    asyncio.run(scenario())


def test_an_adapter_without_its_weights_is_refused(model):
    async def scenario() -> None:
        engine = EmbeddedEngine.from_checkpoint(model.config, make_engine(model)._settings)
        with pytest.raises(WeightSyncError, match="weights did not arrive"):
            await engine.update_weights(_publication(model, "wide", adapter_matrices(model, "wide"), base=False), version=1)
        assert not await engine.health()
        whole = make_engine(model)
        unscaled = _publication(model, "wide", adapter_matrices(model, "wide"), base=False)[0][:-1]
        with pytest.raises(WeightSyncError, match="an adapter came without 'lora_scale'"):
            await whole.update_weights([unscaled], version=1)
        broken = [("model.layers.0.self_attn.q_proj.lora_A.weight", torch.zeros(3, 5)), ("lora_scale", torch.ones(1))]
        with pytest.raises(WeightSyncError, match="does not fit the engine's model"):
            await whole.update_weights([broken], version=1)

    asyncio.run(scenario())


def _changed(model: PreTrainedModel, folder: Path, *, matrix: str = "", value: float = 0.0, **config: float) -> Path:
    """Write the narrow adapter with one number of one matrix, or entries of its config, replaced."""
    folder.mkdir()
    matrices = adapter_matrices(model, "narrow")
    if matrix:
        matrices[matrix][0, 0] = value
    write_adapter(folder, ADAPTERS["narrow"], matrices)
    described = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(described | config))
    return folder


def test_numbers_that_would_reach_the_other_rows_of_a_batch_are_refused(model, models, folders, tmp_path):
    a, b = (f"model.layers.1.self_attn.k_proj.lora_{leaf}.weight" for leaf in "AB")
    broken = {
        f"not finite in torch.float32, in {a}": _changed(model, tmp_path / "a", matrix=a, value=float("nan")),
        f"not finite in torch.float32, in {b}": _changed(model, tmp_path / "b", matrix=b, value=float("inf")),
        "multiplied by 7.07107e+307": _changed(model, tmp_path / "large", lora_alpha=1e308),
    }

    async def scenario() -> None:
        engine = await _loaded(make_engine(model), {"wide": folders["wide"]})
        for message, folder in broken.items():
            with pytest.raises(EngineError, match=re.escape(message)):
                await engine.change_adapters(load_folder("narrow", folder, engine.architecture))
        requests = [request for request in _requests(prompt_of(11)) if request.adapter != "narrow"]
        for request, result in zip(requests, await generate_all(engine, requests), strict=True):
            check_log_probs(models, request, result)
        await engine.close()

    asyncio.run(scenario())


@pytest.mark.parametrize("num_allocations", [0, 3, 22])
def test_a_device_without_memory_for_another_adapter_keeps_the_loaded_ones(
    model, models, folders, monkeypatch, num_allocations
):
    left = iter(range(num_allocations))

    def zeros(*shape: object, **options: object) -> Tensor:
        if next(left, None) is None:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.empty(*shape, **options).zero_()

    async def scenario() -> None:
        engine = await _loaded(make_engine(model), {"wide": folders["wide"]})
        with monkeypatch.context() as full, pytest.raises(EngineError, match="no memory for adapter 'narrow' of rank 2"):
            full.setattr(torch, "zeros", zeros)
            await engine.change_adapters(load_folder("narrow", folders["narrow"], engine.architecture))
        assert [*engine.adapters.folders] == ["wide"]
        requests = [request for request in _requests(prompt_of(11)) if request.adapter != "narrow"]
        for request, result in zip(requests, await generate_all(engine, requests), strict=True):
            check_log_probs(models, request, result)
        await engine.close()

    asyncio.run(scenario())


def test_steps_use_the_memory_that_the_load_of_an_adapter_took(model, models, folders, monkeypatch):
    def fails(*arguments: object, **options: object) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    async def scenario() -> None:
        engine = await _loaded(make_engine(model), folders)
        with monkeypatch.context() as full:
            for name in ("cat", "zeros", "empty"):
                full.setattr(torch, name, fails)
            layer = "model.layers.0.self_attn."
            stack = engine.adapters.stack([layer + name for name in ("q_proj", "k_proj", "v_proj")])
        assert stack is not None and stack is engine.adapters.stack([layer + name for name in ("q_proj", "k_proj", "v_proj")])
        assert torch.equal(stack.a[1, 2, :2], adapter_matrices(model, "narrow")[f"{layer}k_proj.lora_A.weight"])
        assert engine.adapters.stack(["model.layers.0.other"]) is None
        await engine.close()

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("message", "bucket"),
    [
        ("no matrices of one rank", {"model.layers.0.self_attn.q_proj.lora_B.weight": torch.zeros(3, 5)}),
        ("does not fit", {"model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(())}),
        ("no projection 'other'", {"other.lora_A.weight": torch.zeros(3, 0), "other.lora_B.weight": torch.zeros(0, 3)}),
        ("the one number", {"model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(3, 5), "lora_scale": torch.ones(2)}),
    ],
)
def test_matrices_that_are_no_adapter_are_refused_and_the_next_publication_is_taken(model, message, bucket):
    async def scenario() -> None:
        engine = make_engine(model)
        with pytest.raises(WeightSyncError, match=message):
            await asyncio.wait_for(engine.update_weights([[*({"lora_scale": torch.ones(1)} | bucket).items()]], version=1), 30)
        await engine.update_weights([list(model.state_dict().items())], version=2)
        assert (await engine.generate(ask("one", prompt_of(5), ignore_eos=True))).weight_versions == [2] * 8
        await engine.close()

    asyncio.run(scenario())


def test_a_pipe_in_the_place_of_an_adapters_file_is_refused(model, tmp_path):
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        folder = _changed(model, tmp_path / name)
        (folder / name).unlink()
        os.mkfifo(folder / name)
        with pytest.raises(ConfigError, match=f"{name} is no regular file"):
            load_folder("one", folder, architecture_of(model.config))


def test_a_pickle_in_the_place_of_an_adapters_weights_is_named_and_not_read(model, tmp_path):
    folder = _changed(model, tmp_path / "old")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(ConfigError, match=r"holds adapter_model\.bin, a pickle, which can run code and is not read"):
        load_folder("one", folder, architecture_of(model.config))


def test_clients_load_name_and_unload_adapters_over_http(model, models, folders, tmp_path):
    async def scenario(engine: HttpEngine) -> None:
        def load(name: str, folder: Path) -> Awaitable[object]:
            return engine.post("/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})

        for name, folder in folders.items():
            answer = await load(name, folder)
        assert answer == {"success": True, "loaded_adapters": {k: str(v) for k, v in folders.items()}, "error_message": ""}
        with pytest.raises(EngineError, match="status 400: adapter 'wide' is loaded; unload it first"):
            await load("wide", folders["wide"])
        with pytest.raises(EngineError, match=r"there is no adapter_config.json in .*; give a PEFT folder"):
            await load("none", tmp_path)
        not_utf8 = b'{"lora_name": "none", "lora_path": "\\udce9"}'
        with pytest.raises(EngineError, match=r"status 400: there is no adapter_config.json in \?"):
            await engine._request("POST", "/load_lora_adapter", not_utf8, "application/json", 30.0)
        for request in _requests(prompt_of(11)):
            check_log_probs(models, request, await engine.generate(request))
        await engine.post("/unload_lora_adapter", {"lora_name": "wide"})
        with pytest.raises(EngineError, match="there is no adapter 'wide'; loaded: narrow"):
            await engine.generate(_requests(prompt_of(5))[1])
        await engine.close()

    with ServerThread(make_engine(model), token="secret") as server:
        asyncio.run(scenario(HttpEngine(server.base_url, token="secret")))


def test_adapters_of_the_start_are_named_beside_those_loaded_later(model, folders):
    async def scenario(engine: HttpEngine) -> None:
        answer = await engine.post("/load_lora_adapter", {"lora_name": "late", "lora_path": str(folders["narrow"])})
        named = {"early": str(folders["wide"]), "late": str(folders["narrow"])}
        assert answer == {"success": True, "loaded_adapters": named, "error_message": ""}
        await engine.post("/unload_lora_adapter", {"lora_name": "early"})
        with pytest.raises(EngineError, match="there is no adapter 'early'; loaded: late"):
            await engine.generate(replace(ask("a", prompt_of(5)), adapter="early"))
        of_another_base = {"lora_name": "other", "lora_path": str(folders["wide"])}
        with pytest.raises(EngineError, match="status 400: wide was trained on another base"):
            await engine.post("/load_lora_adapter", of_another_base)
        await engine.post("/update_weight_version", {"new_version": "1"})
        await engine.post("/load_lora_adapter", of_another_base)  # the weights are no longer those that the check knows
        await engine.close()

    def refuse_wide(folder: Path) -> None:
        if folder == folders["wide"]:
            raise ConfigError("wide was trained on another base")

    with ServerThread(make_engine(model), adapters={"early": folders["wide"]}, check_base=refuse_wide) as server:
        asyncio.run(scenario(HttpEngine(server.base_url)))


def test_openais_clients_choose_an_adapter_by_the_name_of_a_model(model, folders):
    async def scenario(engine: HttpEngine) -> None:
        async def text(**body: object) -> object:
            asked = {"prompt": prompt_of(7), "max_tokens": 12, "seed": 1, "ignore_eos": True, **body}
            return (await engine.post("/v1/completions", asked))["choices"][0]["text"]

        wide = await text(lora_path="wide")
        base = await text()
        assert wide != base
        assert [await text(model=name) for name in ("wide", "tiny:wide")] == [wide, wide]
        assert [await text(model=name) for name in ("models/tiny", "tiny", "default")] == [base, base, base]
        with pytest.raises(EngineError, match=r"status 404: there is no model 'wyde'; known: models/tiny, wide, narrow\."):
            await text(model="wyde")
        cards = (await engine._request("GET", "/v1/models", None, "application/json", 30.0))["data"]
        assert [(card["id"], card["parent"]) for card in cards] == [
            ("models/tiny", None), ("wide", "models/tiny"), ("narrow", "models/tiny"),
        ]  # fmt: skip
        assert cards[1]["root"] == str(folders["wide"])
        await engine.close()

    served = make_engine(model, tokenizer=build_small_tokenizer())
    with ServerThread(served, model_path="models/tiny", adapters=folders) as server:
        asyncio.run(scenario(HttpEngine(server.base_url)))


def test_an_adapter_of_another_model_is_refused(folders):
    with pytest.raises(ConfigError, match="is of another model"):
        load_folder("wide", folders["wide"], architecture_of(make_model("llama").config))
