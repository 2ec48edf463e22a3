"""Adapters that publications bring by SGLang's routes, and that requests name."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping, Sequence

import pytest
import torch
from torch import Tensor

from qwench.cluster.gpus import DedicatedGpus
from qwench.config.sections.engine import EngineConfig
from qwench.engines.client import HttpEngine
from qwench.engines.embedded.http.serving import ServerThread
from qwench.engines.fleet.event_loop import EventLoopThread
from qwench.engines.fleet.pool import EnginePool
from qwench.observability.timing import PhaseTimer
from qwench.weights import publisher as publisher_module
from qwench.weights.plan import NamedAdapter, PublicationPlan
from qwench.weights.publisher import Publisher
from qwench.weights.remote import publish_from_rank
from qwench.wire.addresses import EngineAddress, Placement, host_name
from qwench.wire.portions import WeightBucket
from tests.contract.adapter_cases import ADAPTERS, adapter_matrices, check_log_probs, merged_model
from tests.contract.engine_hosts import ask, make_engine, make_model, prompt_of
from tests.deadlines import patient


class Trained:
    """A trained model, whose adapter is published."""

    matrices: Mapping[str, Tensor]

    def weights(self, *, bucket_bytes: int, part: str = "merged") -> Iterator[WeightBucket]:
        assert part == "adapter"
        yield [*self.matrices.items(), ("lora_scale", torch.tensor([2.0]))]

    def shared_weights(self, part: str = "merged") -> None:
        return None

    def publish(self, addresses: Sequence[EngineAddress], version: int, plan: PublicationPlan) -> None:
        publish_from_rank(self, addresses, version, plan)


@pytest.mark.parametrize("kind", ["sglang", "embedded"])
def test_a_run_publishes_adapters_by_sglangs_routes_and_its_requests_name_them(kind):
    model = make_model("qwen3")
    plan = PublicationPlan(
        engine=EngineConfig(), adapters=True, named=NamedAdapter(config=ADAPTERS["wide"]), timeout_s=patient(30)
    )
    request = ask("one", prompt_of(9), ignore_eos=True)
    engine = make_engine(model)
    with ServerThread(engine, token="secret") as server:
        client = HttpEngine(server.base_url, token="secret", kind=kind, placement=Placement(host=host_name(), devices=("cpu",)))
        pool = EnginePool([client], EventLoopThread())
        trained = Trained()
        publisher = Publisher(trained, pool, plan, gpus=DedicatedGpus(weights_may_alias=False), timer=PhaseTimer())
        for version, dtype in ((4, torch.float32), (5, torch.bfloat16)):  # a trainer of float32, and of a GPU
            drawn = adapter_matrices(model, "wide", seed=version)
            trained.matrices = {name: matrix.to(dtype) for name, matrix in drawn.items()}
            matrices = {name: matrix.float() for name, matrix in trained.matrices.items()}
            publisher.publish(version=version)
            result = pool.run(pool.generate(request), label="generate", timeout_s=patient(30))
            check_log_probs({None: merged_model(model, "wide", matrices)}, request, result)
            assert result.weight_versions == [version] * 8 and result.cached_tokens == 0
            (name,) = engine.adapters.folders  # the one before it was unloaded
            assert name.startswith(f"version-{version}-")
        publisher.forget_adapters()  # the end of a run whose engines go on
        assert not engine.adapters.folders
        publisher.forget_adapters()
        pool.close()


def test_an_engine_that_does_not_answer_keeps_its_adapter_and_the_run_ends_well(monkeypatch, caplog):
    monkeypatch.setattr(publisher_module, "_FORGET_TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        client = HttpEngine(f"http://127.0.0.1:{silent.getsockname()[1]}", token="secret", kind="embedded")
        pool = EnginePool([client], EventLoopThread())
        plan = PublicationPlan(engine=EngineConfig(), adapters=True, timeout_s=patient(30))
        publisher = Publisher(Trained(), pool, plan, gpus=DedicatedGpus(weights_may_alias=False), timer=PhaseTimer())
        publisher._names = ("version-1-a",)
        publisher.forget_adapters()
        assert "an adapter of this run stays loaded" in caplog.text
        pool.close()
