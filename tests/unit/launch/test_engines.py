"""What the flags of a run say to its engine servers, to an engine in this process, and to publications."""

import asyncio
import os
import tempfile
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from qwench.config.config import Config
from qwench.config.sections.cluster import ClusterConfig
from qwench.config.sections.data import DataConfig
from qwench.config.sections.engine import EngineConfig
from qwench.config.sections.evaluation import EvalConfig
from qwench.config.sections.foreign import ForeignConfig
from qwench.config.sections.logging import LoggingConfig
from qwench.config.sections.lora import LoraConfig
from qwench.config.sections.rollout import AsyncConfig, RolloutConfig
from qwench.config.sections.timeouts import TimeoutConfig
from qwench.config.sections.training import TrainingConfig
from qwench.engines.client import HttpEngine
from qwench.engines.embedded.settings import EmbeddedSettings
from qwench.engines.fleet.members import Member
from qwench.engines.kinds.identity import ModelIdentity
from qwench.engines.kinds.kind import ServerOrder
from qwench.errors import ConfigError, EngineError
from qwench.launch import engines
from qwench.launch.engines import build_pool, embedded_settings, make_publisher, server_order
from qwench.models.architecture import YarnScaling
from qwench.models.peft import AdapterConfig
from qwench.observability.timing import PhaseTimer
from qwench.weights.plan import NamedAdapter, PublicationPlan
from tests.unit.launch.test_generation import eval_settings
from tests.unit.launch.test_placement import inputs_of

ADAPTERS = LoraConfig(lora_rank=4, lora_alpha=8, lora_publish="adapter")


@pytest.fixture(autouse=True)
def fp8_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "is_fp8_checkpoint", lambda folder: True)


def config_of(**sections: object) -> Config:
    return Config(**{"rollout": RolloutConfig(rollout_batch_size=4), **sections})


def test_engine_servers_of_a_run_without_folders_log_among_temporary_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", "/temporary")

    def folder(log_dir):
        return engines._log_folder(SimpleNamespace(plan=SimpleNamespace(log_dir=log_dir)))

    assert folder(None) == Path(f"/temporary/qwench-{os.getpid()}/engines")
    assert folder(Path("logs")) == tmp_path / "logs" / "engines"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("on_gpus", "dtype"), [(False, "float32"), (True, "bfloat16")])
def test_servers_are_ordered_as_the_flags_say(tmp_path: Path, on_gpus: bool, dtype: str) -> None:
    engine = EngineConfig(rollout_engine="embedded", embedded_max_running_requests=7)
    config = config_of(
        engine=engine,
        cluster=ClusterConfig(rollout_num_gpus=3),
        data=DataConfig(rollout_seed=11),
        logging=LoggingConfig(log_dir=tmp_path),
    )
    inputs = inputs_of(config)
    order = server_order(inputs, token="secret", with_weights=True, on_gpus=on_gpus)
    assert order == ServerOrder(
        engine=engine,
        model_folder=Path.cwd(),
        dtype=dtype,
        engine_sizes=(1, 1, 1),
        releases_memory=False,
        seed=11,
        serves_checkpoint=True,
        log_folder=tmp_path / "engines",
        deterministic=False,
        ranks_requests=False,
        stretched_positions=None,
        adapter=None,
        token="secret",
    )
    scaling = YarnScaling(factor=2.0, original_max_positions=inputs.plan.model.max_position_embeddings, attention_factor=1.0)
    model = replace(inputs.plan.model, rope=replace(inputs.plan.model.rope, scaling=scaling))
    other = replace(
        inputs,
        plan=replace(inputs.plan, model=model, devices=replace(inputs.plan.devices, offload_rollout=True)),
        config=replace(
            config,
            training=TrainingConfig(deterministic_mode=True),
            evaluation=EvalConfig(eval_low_priority=True),
            lora=ADAPTERS,
        ),
    )
    assert server_order(other, token="secret", with_weights=False, on_gpus=on_gpus) == replace(
        order,
        releases_memory=True,
        serves_checkpoint=False,
        deterministic=True,
        ranks_requests=True,
        stretched_positions=2 * model.max_position_embeddings,
        adapter=AdapterConfig.of_run(ADAPTERS, base="."),
    )


def test_every_engine_gets_the_order_of_all_and_its_number() -> None:
    inputs = inputs_of(config_of(engine=EngineConfig(rollout_engine="sglang")))
    order = {"token": "secret", "with_weights": True, "on_gpus": False}
    made = engines.command_makers(inputs, num_engines=2, **order)
    assert [(one.func, one.args, one.keywords) for one in made] == [
        (engines.KINDS["sglang"].command, (server_order(inputs, **order),), {"index": index}) for index in range(2)
    ]


def test_a_deterministic_engine_computes_one_response_at_a_time_where_their_order_varies() -> None:
    sizes = EngineConfig(embedded_max_running_requests=7)
    config = config_of(engine=sizes, data=DataConfig(rollout_seed=11))
    plain = EmbeddedSettings(sizes=sizes, dtype=torch.float32, fp8=True, device="cpu", seed=11)
    assert embedded_settings(inputs_of(config), order_varies=True) == plain
    invariant = replace(config, training=TrainingConfig(batch_invariant_mode=True))
    other = replace(inputs_of(config), config=invariant, device=torch.device("meta"))
    assert embedded_settings(other, order_varies=True) == replace(plain, batch_invariant=True, device="meta")
    deterministic = inputs_of(replace(config, training=TrainingConfig(deterministic_mode=True)))
    assert embedded_settings(deterministic, order_varies=False) == replace(plain, inline=True)
    assert embedded_settings(deterministic, order_varies=True) == replace(
        plain, inline=True, prefix_cache=False, sizes=replace(sizes, embedded_max_running_requests=1)
    )


@pytest.mark.parametrize(
    ("sections", "of_set", "varies"),
    [
        ({}, None, False),
        ({"asynchronous": AsyncConfig(fully_async=True)}, None, True),
        ({"rollout": RolloutConfig(rollout_batch_size=4, custom_generate_function_path="a.b")}, None, True),
        ({"rollout": RolloutConfig(rollout_batch_size=4, rollout_function_path="a.b")}, None, True),
        ({"evaluation": EvalConfig(eval_function_path="a.b")}, None, True),
        ({}, "a.b", True),
    ],
)
@pytest.mark.parametrize("with_weights", [False, True])
def test_requests_of_the_users_functions_come_in_any_order(
    sections: dict[str, object], of_set: str | None, varies: bool, with_weights: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[object, EmbeddedSettings]] = []

    class Engine:
        def __init__(self, model: object, settings: EmbeddedSettings, *, eos_ids: object, tokenizer: object) -> None:
            made.append((model, settings))
            assert (eos_ids, tokenizer) == (frozenset({5}), inputs.tokenizer)

        @classmethod
        def from_checkpoint(cls, folder: Path, settings: EmbeddedSettings, *, tokenizer: object) -> None:
            made.append((folder, settings))
            assert tokenizer is inputs.tokenizer

    monkeypatch.setattr(engines, "EmbeddedEngine", Engine)
    monkeypatch.setattr(engines, "stop_token_ids", lambda folder, tokenizer: [5, 5])
    inputs = inputs_of(config_of(training=TrainingConfig(deterministic_mode=True), **sections))
    sets = (eval_settings(custom_generate_function_path=of_set),)
    inputs = replace(inputs, plan=replace(inputs.plan, eval_sets=sets))
    engines._embedded_engine(inputs, with_weights=with_weights)
    model = inputs.model_folder if with_weights else inputs.plan.model
    assert made == [(model, embedded_settings(inputs, order_varies=varies))]


def test_publications_are_planned_by_the_flags() -> None:
    config = config_of(engine=EngineConfig(update_weight_buffer_size=99), timeouts=TimeoutConfig(update_weights_timeout=7.0))
    expected = PublicationPlan(engine=config.engine, model_folder=Path(), fp8=True, timeout_s=7.0)
    inputs = inputs_of(config)
    parts = {"gpus": object(), "timer": PhaseTimer()}
    publisher = make_publisher(inputs, "model", None, **parts)
    assert publisher._plan == expected
    assert [publisher._model, publisher._pool, publisher._gpus, publisher._timer] == ["model", None, *parts.values()]
    apart = replace(inputs, config=replace(config, lora=ADAPTERS), plan=replace(inputs.plan, holds_teacher=True))
    assert make_publisher(apart, "model", None, **parts)._plan == replace(expected, adapters=True, frozen_moves=True)


class Pool:
    """The arguments of an engine pool."""

    def __init__(self, members: list[Member], loop: object, **options: object) -> None:
        self.members, self.loop, self.options = members, loop, options


class ServerAt:
    """A server that starts at once, unless it is broken."""

    placement = "node"

    def __init__(self, label: str, stopped: list[str], *, broken: bool = False) -> None:
        self.label, self._stopped, self._broken = label, stopped, broken

    def start(self) -> str:
        if self._broken:
            raise EngineError(f"{self.label} did not start")
        return f"http://{self.label}"

    def stop(self) -> None:
        self._stopped.append(self.label)

    def last_output(self) -> str:
        return "loading"


@pytest.fixture
def pools(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace what opens connections; return what was closed or made on the way."""
    said: list[str] = []
    monkeypatch.setattr(engines, "EnginePool", Pool)
    monkeypatch.setattr(engines, "EventLoopThread", lambda: SimpleNamespace(close=lambda: said.append("loop")))
    monkeypatch.setattr(engines, "HttpEngine", lambda url, **options: (url, options))
    monkeypatch.setattr(engines, "_embedded_engine", lambda inputs, *, with_weights: ("embedded", with_weights))
    monkeypatch.setattr(engines, "_start_router", lambda inputs, undo: "router")
    return said


def test_a_pool_of_servers_has_their_addresses_flags_and_evaluators(pools: list[str]) -> None:
    engine = EngineConfig(
        rollout_engine="embedded", use_fault_tolerance=True, use_sglang_router=True, rollout_health_check_timeout=4.0
    )
    config = config_of(engine=engine, timeouts=TimeoutConfig(generate_timeout=5.0), cluster=ClusterConfig(rollout_num_gpus=3))
    inputs = inputs_of(config)
    inputs = replace(inputs, plan=replace(inputs.plan, devices=replace(inputs.plan.devices, num_eval_engines=1)))
    servers = [ServerAt(label, pools) for label in "abc"]
    pool = build_pool(inputs, with_weights=False, servers=servers, token="secret")
    options = {"token": "secret", "kind": "embedded", "generate_timeout_s": 5.0, "placement": "node", "health_timeout_s": 4.0}
    assert [(member.engine, member.server, member.url, member.evaluates) for member in pool.members] == [
        ((f"http://{server.label}", {**options, "label": server.label}), server, f"http://{server.label}", server.label == "c")
        for server in servers
    ]
    router = "router" if engine.routes_requests else None
    assert pool.options == {"router": router, "health": engine, "can_republish": True}
    assert pools == []


def test_a_server_that_does_not_start_ends_the_others_and_the_loop(pools: list[str]) -> None:
    servers = [ServerAt("a", pools), ServerAt("b", pools, broken=True)]
    with pytest.raises(EngineError, match="b did not start"):
        build_pool(inputs_of(config_of()), with_weights=False, servers=servers, token=None)
    assert {*pools} == {"a", "b", "loop"} and pools[-1] == "loop"


@pytest.mark.parametrize("with_weights", [False, True])
def test_an_engine_of_this_process_is_neither_watched_nor_routed_to(with_weights: bool, pools: list[str]) -> None:
    inputs = inputs_of(config_of(engine=EngineConfig(use_fault_tolerance=True, use_sglang_router=True)))
    pool = build_pool(inputs, with_weights=with_weights, servers=None, token=None)
    assert [(member.engine, member.server, member.url) for member in pool.members] == [(("embedded", with_weights), None, "")]
    assert pool.options == {"router": None, "health": None, "can_republish": not with_weights}


def test_a_router_that_does_not_start_ends_the_servers_and_the_loop(pools: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(inputs: object, undo: object) -> None:
        raise EngineError("no router")

    monkeypatch.setattr(engines, "_start_router", broken)
    inputs = inputs_of(config_of(engine=EngineConfig(use_sglang_router=True)))
    with pytest.raises(EngineError, match="no router"):
        build_pool(inputs, with_weights=False, servers=[ServerAt(label, pools) for label in "ab"], token=None)
    assert pools == ["b", "a", "loop"]


def test_engines_that_run_already_are_members(pools: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    reached: list[object] = []
    monkeypatch.setattr(engines, "_reach_external", lambda *given: reached.append(given) or [Member(engine="there", url="u")])
    inputs = inputs_of(config_of(engine=EngineConfig(rollout_external_engine_addrs=("10.0.0.1:80",))))
    pool = build_pool(inputs, with_weights=False, servers=None, token=None)
    assert reached == [(inputs, pool.loop)] and [member.engine for member in pool.members] == ["there"]
    assert pool.options == {"router": None, "health": None, "can_republish": True}


class Client:
    """A connection that remembers what was done with it."""

    made: list["Client"]

    def __init__(self, url: str, **options: object) -> None:
        self.url, self.options, self.is_closed = url, options, False
        Client.made.append(self)

    async def close(self) -> None:
        self.is_closed = True


class Loop:
    """Runs coroutines, and remembers what it was told of them."""

    def __init__(self) -> None:
        self.told: list[tuple[str, float]] = []

    def run(self, coroutine: Coroutine[object, object, Member], *, label: str, timeout_s: float) -> Member:
        self.told.append((label, timeout_s))
        return asyncio.run(coroutine)

    def close(self) -> None:
        self.told.append(("closed", 0))


def test_engines_that_run_already_are_asked_for_their_model(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[ModelIdentity] = []

    async def check_serves(engine: Client, identity: ModelIdentity) -> SimpleNamespace:
        asked.append(identity)
        if "10.0.0.3" in engine.url:
            raise EngineError("away")
        return SimpleNamespace(name="sglang")

    loop, Client.made = Loop(), []
    monkeypatch.setattr(engines, "HttpEngine", Client)
    monkeypatch.setattr(engines, "check_serves", check_serves)
    monkeypatch.setattr(engines, "EventLoopThread", lambda: loop)
    monkeypatch.setenv("QWENCH_TOKEN", "secret")
    addresses = ("10.0.0.1:80", "http://10.0.0.2:80/")
    config = config_of(
        engine=EngineConfig(rollout_external_engine_addrs=addresses, rollout_health_check_timeout=4.0),
        rollout=RolloutConfig(rollout_batch_size=4, rollout_max_context_len=99),
        evaluation=EvalConfig(eval_low_priority=True), asynchronous=AsyncConfig(fully_async=True),
        timeouts=TimeoutConfig(generate_timeout=5.0),
    )  # fmt: skip
    encode = {("ab", False): [97, 98]}
    tokenizer = SimpleNamespace(encode=lambda text, *, add_special_tokens: encode[text, add_special_tokens])
    inputs = replace(inputs_of(config), tokenizer=tokenizer)
    members = engines._reach_external(inputs, loop)
    urls = ["http://10.0.0.1:80", "http://10.0.0.2:80"]
    assert [member.url for member in members] == urls
    assert loop.told == [(f"--rollout-external-engine-addrs: the check of the engine at {url}", 4.0) for url in urls]
    options = {"token": "secret", "kind": "sglang", "generate_timeout_s": 5.0, "health_timeout_s": 4.0}
    expected = [(url, given, not rest) for url in urls for given, rest in (({"token": "secret"}, None), (options, "kept"))]
    assert [(one.url, one.options, one.is_closed) for one in Client.made] == expected
    assert [member.engine for member in members] == Client.made[1::2]
    [identity] = {id(one): one for one in asked}.values()
    sizes = {"vocab_size": 151_936, "hidden_size": 2560, "num_hidden_layers": 36}
    assert (identity.model_type, identity.sizes, identity.encode("ab")) == ("qwen3", sizes, [97, 98])
    assert (identity.ranks_requests, identity.keeps_requests, identity.context_len) == (True, True, 99)
    away = replace(config.engine, rollout_external_engine_addrs=("10.0.0.3:80",))
    with pytest.raises(ConfigError, match=r"^away$"):
        engines.check_external(replace(inputs, config=replace(config, engine=away)))
    assert Client.made[-1].is_closed and loop.told[-1] == ("closed", 0)


@pytest.mark.parametrize(
    ("kind", "transport", "named"),
    [(None, "auto", False), ("embedded", "auto", False), ("embedded", "disk", True), ("sglang", "auto", True)],
)
def test_an_adapter_is_named_to_servers_that_read_it_from_a_folder(kind: str | None, transport: str, named: bool) -> None:
    engine = SimpleNamespace() if kind is None else HttpEngine("http://host:1", kind=kind)
    config = config_of(
        lora=ADAPTERS, engine=EngineConfig(update_weight_transport=transport, update_weight_disk_dir=Path("shared")),
        foreign=ForeignConfig(custom_update_weight_post_write_path="a.b"),
    )  # fmt: skip
    pool = SimpleNamespace(engines=[SimpleNamespace(), engine])
    plan = make_publisher(inputs_of(config), "model", pool, gpus=object(), timer=PhaseTimer())._plan
    assert plan.named == (NamedAdapter(config=AdapterConfig.of_run(ADAPTERS, base=".")) if named else None)
    args = plan.after_write.args
    assert plan.after_write.section is config.foreign and args.hf_checkpoint is None
    assert (args.sglang_router_ip, args.sglang_router_port) == ("", 0)
    whole = inputs_of(replace(config, lora=LoraConfig()))
    assert make_publisher(whole, "model", pool, gpus=object(), timer=PhaseTimer())._plan.named is None


def test_servers_that_start_are_named_with_their_last_line(pools: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    @contextmanager
    def waiting(label: str, describe: Callable[[], str]) -> Iterator[None]:
        said.extend([label, describe()])
        yield
        said.append(describe())

    monkeypatch.setattr(engines, "waiting", waiting)
    monkeypatch.setattr(ServerAt, "last_output", lambda self: f"begin\n  {self.label * 300} ")
    inputs = inputs_of(config_of())
    members = engines._start_servers(inputs, [ServerAt("a", pools), ServerAt("b", pools)], None)
    assert said == ["start of the engine servers", f"a: {'a' * 200}; b: {'b' * 200}", ""]
    assert [member.url for member in members] == ["http://a", "http://b"]
