"""Which launcher the flags and the environment mean, which GPUs each engine gets, and what a lost learner is said to do."""

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import PretrainedConfig

from qwench.cluster.bundles import Bundles
from qwench.cluster.messages import Answer, Death
from qwench.config.config import Config
from qwench.config.plan import plan_run
from qwench.config.sections.algorithm import AlgorithmConfig
from qwench.config.sections.cluster import ClusterConfig
from qwench.config.sections.critic import CriticConfig
from qwench.config.sections.engine import EngineConfig
from qwench.config.sections.logging import LoggingConfig
from qwench.config.sections.model import ModelConfig
from qwench.config.sections.rollout import AsyncConfig, RolloutConfig
from qwench.engines.fleet.servers import ServerCommand
from qwench.errors import ConfigError, EngineError, TrainingError
from qwench.launch import placement
from qwench.launch.inputs import Inputs, publication_dtype
from qwench.launch.placement import (
    LocalProcesses,
    build_rank,
    check_turns,
    choose_launcher,
    make_servers,
    start_beside,
    start_learner,
    start_ranks,
    take_turns,
)
from qwench.observability.timing import PhaseTimer
from qwench.samples import Rollout
from tests.fakes.console import RecordingConsole
from tests.fakes.engine import CharTokenizer
from tests.unit.config.architectures import QWEN3_4B

RAY = {"RAY_ADDRESS": "10.0.0.1:6379"}


@pytest.mark.parametrize(
    ("cluster", "environ", "generates", "expected"),
    [
        ({}, {}, True, "inside"),
        ({}, RAY, True, "inside"),
        ({"actor_num_gpus_per_node": 2}, {}, True, "local"),
        ({"actor_num_gpus_per_node": 2}, RAY, True, "ray"),
        ({"actor_num_gpus_per_node": 2}, RAY, False, "ray"),
        ({"actor_num_nodes": 2}, {}, True, "ray"),
        ({"rollout_num_gpus": 1}, {}, True, "inside"),
        ({"rollout_num_gpus": 1}, RAY, True, "ray"),
        ({"rollout_num_gpus": 1}, RAY, False, "inside"),
        ({"launcher": "local"}, RAY, True, "local"),
        ({"launcher": "ray"}, {}, True, "ray"),
        ({"actor_num_gpus_per_node": 2}, {"WORLD_SIZE": "2", **RAY}, False, "inside"),
    ],
)
def test_launcher(cluster, environ, generates, expected):
    config = Config(cluster=ClusterConfig(**cluster))
    assert choose_launcher(config, environ, generates=generates) == expected


@pytest.mark.parametrize(
    ("ranks", "generates", "message"),
    [(2, True, "qwench starts trainer ranks and engines itself"), (4, False, "torchrun started 2 ranks, and .* asks for 4")],
)
def test_torchrun_is_refused_where_it_cannot_be_meant(ranks, generates, message):
    config = Config(cluster=ClusterConfig(actor_num_gpus_per_node=ranks))
    with pytest.raises(ConfigError, match=message):
        choose_launcher(config, {"WORLD_SIZE": "2"}, generates=generates)


@pytest.mark.parametrize(
    ("critic", "environ", "expected"),
    [
        ({"critic_num_gpus_per_node": 1}, {}, "local"),
        ({"critic_num_nodes": 1}, RAY, "ray"),
        ({"critic_num_nodes": 2}, {}, "ray"),
    ],
)
def test_a_critic_of_its_own_makes_several_ranks(critic, environ, expected):
    config = Config(critic=CriticConfig(**critic))
    assert choose_launcher(config, environ, generates=True) == expected
    with pytest.raises(ConfigError, match="--critic-num-gpus-per-node needs ranks that qwench starts itself"):
        choose_launcher(config, {"WORLD_SIZE": "2"}, generates=False)


@pytest.mark.parametrize(
    ("train_dtype", "on_gpu", "expected"),
    [("auto", True, torch.bfloat16), ("auto", False, torch.float32), ("float32", True, torch.float32)],
)
def test_engines_compute_in_the_dtype_of_the_runs_devices_whatever_the_driver_has(train_dtype, on_gpu, expected):
    assert publication_dtype(Config(model=ModelConfig(train_dtype=train_dtype)), on_gpu=on_gpu) == expected


@pytest.mark.parametrize(("colocate", "ahead", "on_gpus", "fits"), [
    (True, 1, True, False), (True, 0, True, True), (False, 1, True, True), (True, 1, False, True),
])  # fmt: skip
def test_who_takes_turns_on_a_gpu_does_not_generate_ahead(colocate, ahead, on_gpus, fits):
    config = Config(cluster=ClusterConfig(colocate=colocate), rollout=RolloutConfig(rollouts_ahead=ahead))
    if fits:
        check_turns(config, on_gpus=on_gpus)
    else:
        with pytest.raises(ConfigError, match=r"--colocate .* --rollouts-ahead 1 .* leave one of them out"):
            check_turns(config, on_gpus=on_gpus)
        asynchronous = Config(cluster=ClusterConfig(colocate=colocate), asynchronous=AsyncConfig(fully_async=True))
        with pytest.raises(ConfigError, match=r"--colocate .* --fully-async .* leave one of them out"):
            check_turns(asynchronous, on_gpus=on_gpus)


def inputs_of(config: Config) -> Inputs:
    return Inputs(
        config=config, plan=plan_run(config, QWEN3_4B), model_folder=Path(), tokenizer=CharTokenizer(),
        console=RecordingConsole(), hf_config=PretrainedConfig(), device=torch.device("cpu"), dtype=torch.float32, rank=0,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("engines", "critic", "expected"),
    [
        ((), (), [[0, 1], [2], [3]]),
        ((), (2,), [[0, 1], [2], [3]]),
        ((2, 1, 1), (), [[4, 5], [6], [7]]),
        ((2, 1, 1), (2,), [[6, 7], [8], [9]]),
    ],
)
def test_engines_get_the_trainers_gpus_or_those_after_them(engines, critic, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(placement, "gpu_names", lambda gpu_ids: tuple(f"gpu {gpu_id}" for gpu_id in gpu_ids))
    config = Config(cluster=ClusterConfig(actor_num_gpus_per_node=4), rollout=RolloutConfig(rollout_batch_size=4))
    inputs = inputs_of(config)
    asked = []

    def make(*, gpu_ids, environ, host):
        asked.append(list(gpu_ids))
        return ServerCommand(label="engine", argv=(), environ=environ, log_file=Path(), start_timeout_s=1)

    processes = LocalProcesses(inputs, Bundles(trainer=(4,), critic=critic, engines=engines), ranks_inside=False)
    servers = processes.make_servers([make] * 3, sizes=[2, 1, 1])
    assert asked == expected
    assert [server.placement.devices for server in servers] == [tuple(f"gpu {one}" for one in ids) for ids in expected]


class RecordedServer:
    error = None

    def check_start(self):
        if self.error is not None:
            raise self.error

    def __init__(self, name, calls):
        self.launch, self.stop = (lambda: calls.append(f"launch {name}")), (lambda: calls.append(f"stop {name}"))


@pytest.mark.parametrize(
    ("engine_gpus", "expected"),
    [(2, ["launch a", "launch b", "build", "close", "stop b", "stop a"]), (None, [])],
)
def test_servers_with_gpus_of_their_own_load_while_the_learner_is_built(engine_gpus, expected):
    calls, ranks = [], DyingRank()
    ranks.send = lambda call: calls.append(call.method)
    inputs = inputs_of(Config(cluster=ClusterConfig(rollout_num_gpus=engine_gpus), rollout=RolloutConfig(rollout_batch_size=4)))
    servers = [RecordedServer("a", calls), RecordedServer("b", calls)]
    with ExitStack() as started, ExitStack() as ending:
        start_beside(inputs, servers, ranks, PhaseTimer(), started, ending)
    assert calls == expected


def test_a_server_that_ends_while_the_learner_is_built_ends_the_start():
    calls, ranks = [], DyingRank()
    ranks.send = lambda call: calls.append(call.method)
    ranks.receive = lambda timeout_s: []
    servers = [RecordedServer("a", calls), RecordedServer("b", calls)]
    servers[1].error = EngineError("engine server 1 ended while it started; no GPU")
    inputs = inputs_of(Config(cluster=ClusterConfig(rollout_num_gpus=2), rollout=RolloutConfig(rollout_batch_size=4)))
    with pytest.raises(EngineError, match="engine server 1 ended"), ExitStack() as started, ExitStack() as ending:
        start_beside(inputs, servers, ranks, PhaseTimer(), started, ending)
    assert ranks.ended and calls == ["launch a", "launch b", "build", "stop b", "stop a"]


def test_ranks_end_when_the_engines_do_not_start():
    ranks = DyingRank()
    with pytest.raises(ConfigError), ExitStack() as started:
        assert start_ranks(ranks, started) is ranks and not ranks.ended
        raise ConfigError("no engine")
    assert ranks.ended


class DyingRank:
    """One rank that builds its learner, and dies as it learns; and the processes that start it."""

    size = 1
    ended = False
    _dies = False

    def start_ranks(self):
        return self

    def send(self, call):
        self._dies = call.method == "learn"

    def receive(self, timeout_s):
        return [(0, Death(reason="was ended") if self._dies else Answer())]

    def end(self):
        self.ended = True


@pytest.mark.parametrize(("loss", "unit"), [("policy_loss", "rollout"), ("sft_loss", "batch")])
def test_a_rank_that_dies_is_named_with_what_it_learned_from(loss, unit):
    config = Config(algorithm=AlgorithmConfig(loss_type=loss), rollout=RolloutConfig(rollout_batch_size=4))
    with ExitStack() as started:
        learner = start_learner(inputs_of(config), start_ranks(DyingRank(), started), PhaseTimer(), started)
        with pytest.raises(TrainingError, match=f"learn from {unit} 7"):
            learner.learn(Rollout(rollout_id=7, groups=[]))


@pytest.mark.parametrize(
    ("ranks", "has_gpus", "engine_sizes", "sections", "in_here"),
    [
        (1, True, (1,), {}, True),
        (2, False, (1,), {}, True),
        (2, True, (1,), {}, False),
        (1, True, (2,), {}, False),
        (2, False, (1, 2), {}, False),
        (1, False, (1,), {"cluster": ClusterConfig(rollout_num_gpus=1)}, False),
        (1, False, (1,), {"engine": EngineConfig(rollout_engine="sglang")}, False),
    ],
)
def test_one_embedded_engine_is_in_the_process_where_no_other_rank_has_a_gpu(
    ranks, has_gpus, engine_sizes, sections, in_here, monkeypatch
):
    monkeypatch.setattr(placement, "command_makers", lambda inputs, **options: options)
    cluster = ClusterConfig(actor_num_gpus_per_node=ranks)
    inputs = inputs_of(Config(**{"cluster": cluster, "rollout": RolloutConfig(rollout_batch_size=4), **sections}))
    inputs = replace(inputs, plan=replace(inputs.plan, devices=replace(inputs.plan.devices, engine_sizes=engine_sizes)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpus)
    processes = LocalProcesses(inputs, Bundles(trainer=(ranks,), engines=()), ranks_inside=False)
    processes.make_servers = lambda makers, *, sizes: (makers, sizes)
    servers, token = make_servers(inputs, processes, with_weights=True)
    if in_here:
        assert (servers, token) == (None, None)
        return
    options, sizes = servers
    assert len(token) == 64 and sizes == engine_sizes
    assert options == {"num_engines": len(engine_sizes), "token": token, "with_weights": True, "on_gpus": has_gpus}


def test_engines_that_run_already_need_no_servers():
    engine = EngineConfig(rollout_external_engine_addrs=("10.0.0.1:80",))
    inputs = inputs_of(Config(engine=engine, rollout=RolloutConfig(rollout_batch_size=4)))
    processes = LocalProcesses(inputs, Bundles(trainer=(1,), engines=()), ranks_inside=False)
    assert make_servers(inputs, processes, with_weights=True) == (None, None)


@pytest.mark.parametrize(
    ("sections", "has_gpus", "servers", "turns"),
    [
        ({}, True, None, True),
        ({}, False, ["server"], True),
        ({}, False, None, False),
        ({"cluster": ClusterConfig(rollout_num_gpus=1)}, True, ["server"], False),
        ({"engine": EngineConfig(rollout_external_engine_addrs=("10.0.0.1:80",))}, True, None, False),
    ],
)
def test_who_shares_a_gpu_takes_turns(sections, has_gpus, servers, turns):
    assert take_turns(Config(**sections), SimpleNamespace(has_gpus=has_gpus), servers) is turns


@pytest.mark.parametrize("apart", [False, True])
def test_a_learner_on_ranks_is_told_where_the_critics_begin(apart, monkeypatch):
    monkeypatch.setattr(placement, "WorkerGroup", lambda ranks: SimpleNamespace(ranks=ranks, close=lambda: None))
    monkeypatch.setattr(placement, "RemoteLearner", lambda *given, **options: (given, options))
    critic = CriticConfig(critic_num_nodes=1, critic_num_gpus_per_node=1) if apart else CriticConfig()
    inputs = inputs_of(
        Config(
            cluster=ClusterConfig(actor_num_gpus_per_node=2), critic=critic, rollout=RolloutConfig(rollout_batch_size=4),
            algorithm=AlgorithmConfig(advantage_estimator="ppo"),
        )
    )  # fmt: skip
    (group, build), options = start_learner(inputs, "ranks", PhaseTimer(), ExitStack())
    assert (group.ranks, build.func, build.args) == ("ranks", build_rank, (inputs.config, inputs.plan))
    options.pop("check")
    expected = {"console": inputs.console, "timeouts": inputs.config.timeouts, "unit": "rollout"}
    assert options == expected | {"first_critic_rank": 2 if apart else None}


def test_a_learner_in_this_process_is_closed_at_the_end(monkeypatch):
    closed = []
    learner = SimpleNamespace(state=SimpleNamespace(close=lambda: closed.append("learner")))
    monkeypatch.setattr(placement, "build_learner", lambda *given: closed.append(given) or learner)
    inputs, timer = inputs_of(Config(rollout=RolloutConfig(rollout_batch_size=4))), PhaseTimer()
    with ExitStack() as started:
        assert start_learner(inputs, None, timer, started) is learner
        assert closed == [(inputs, timer)]
    assert closed[1:] == ["learner"]


@pytest.mark.parametrize(("rank", "built"), [(0, "policy"), (1, "policy"), (2, "critic")])
def test_a_rank_builds_the_learner_of_its_model(rank, built, monkeypatch):
    logs = []
    config = Config(
        cluster=ClusterConfig(actor_num_gpus_per_node=2), rollout=RolloutConfig(rollout_batch_size=4),
        logging=LoggingConfig(log_level="debug"),
    )  # fmt: skip
    monkeypatch.setattr(placement, "read_inputs", lambda config, plan: replace(inputs_of(config), rank=rank))
    monkeypatch.setattr(placement, "open_process_log", lambda *given, **options: logs.append((given, options)))
    for name in ("policy", "critic"):
        function = "build_critic_learner" if name == "critic" else "build_learner"
        monkeypatch.setattr(placement, function, lambda inputs, timer, name=name: (name, inputs.rank, timer))
    monkeypatch.setattr(placement.transformers_logging, "disable_progress_bar", lambda: logs.append("quiet"))
    assert build_rank(config, None, "timer") == (built, rank, "timer")
    assert logs == ["quiet", (("debug", f"rank {rank}"), {"to_stdout": rank == 0})]
