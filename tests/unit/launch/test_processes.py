"""Ranks, servers and actors of a run: their environments, devices and logs."""

import sys
from contextlib import ExitStack
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from qwench.cluster.bundles import Bundles
from qwench.config.config import Config
from qwench.config.sections.cluster import ClusterConfig
from qwench.config.sections.engine import EngineConfig
from qwench.config.sections.logging import LoggingConfig
from qwench.config.sections.rollout import RolloutConfig
from qwench.errors import ConfigError
from qwench.launch import placement
from qwench.launch.placement import LocalProcesses, enough_gpus, open_processes
from qwench.wire.addresses import Placement
from tests.unit.launch.test_placement import inputs_of


@pytest.fixture
def environments(monkeypatch):
    """Let environments say of what they are made."""
    monkeypatch.setattr(placement, "trainer_environment", lambda config, environ: {"OF": "trainer" if environ else "flags"})
    monkeypatch.setattr(placement, "engine_environment", lambda environ, trainers: {"OF": f"engine beside {trainers['OF']}"})
    monkeypatch.setattr(placement, "usable_cores", lambda: 9)
    monkeypatch.setenv("GIVEN", "1")


def test_ranks_of_this_machine_log_beside_the_run(environments, monkeypatch, tmp_path):
    monkeypatch.setattr(placement, "LocalRanks", lambda size, **options: (size, options))
    config = Config(
        cluster=ClusterConfig(actor_num_gpus_per_node=2), rollout=RolloutConfig(rollout_batch_size=4),
        logging=LoggingConfig(log_dir=tmp_path), engine=EngineConfig(update_weight_buffer_size=99),
    )  # fmt: skip
    inputs, bundles = inputs_of(config), Bundles(trainer=(2,), engines=())
    assert LocalProcesses(inputs, bundles, ranks_inside=True).start_ranks() is None
    size, options = LocalProcesses(inputs, bundles, ranks_inside=False).start_ranks()
    environ = options.pop("environ")
    assert (size, options) == (2, {"bucket_bytes": 99, "log_folder": tmp_path / "ranks"})
    assert (environ["OF"], environ["GIVEN"]) == ("trainer", "1")
    without = inputs_of(replace(config, logging=LoggingConfig()))
    assert LocalProcesses(without, bundles, ranks_inside=False).start_ranks()[1]["log_folder"] is None


@pytest.mark.parametrize(("has_gpus", "num_engines", "cores"), [(True, 2, None), (False, 2, "4"), (False, 10, "1")])
def test_servers_on_cpus_share_the_cores(has_gpus, num_engines, cores, environments, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpus)
    monkeypatch.setattr(placement, "gpu_names", lambda gpu_ids: tuple(gpu_ids))
    monkeypatch.setattr(placement, "host_name", lambda: "here")
    monkeypatch.setattr(placement, "ServerProcess", lambda command, *, placement: (command, placement))
    inputs = inputs_of(Config(rollout=RolloutConfig(rollout_batch_size=4)))
    devices = replace(inputs.plan.devices, engine_sizes=(1,) * num_engines)
    inputs = replace(inputs, plan=replace(inputs.plan, devices=devices))
    processes = LocalProcesses(inputs, Bundles(trainer=(1,), engines=()), ranks_inside=False)
    [(asked, place)] = processes.make_servers([lambda **options: options], sizes=[1])
    environ = {"OF": "engine beside flags"} | ({} if cores is None else {"OMP_NUM_THREADS": cores})
    assert asked == {"gpu_ids": [0] if has_gpus else [], "environ": environ, "host": "127.0.0.1"}
    assert place == (Placement(host="here", devices=(0,)) if has_gpus else None)


def test_actors_are_reserved_where_the_launcher_is_ray(environments, monkeypatch):
    said = []

    class Cluster:
        has_gpus = True

        def __init__(self, **options):
            said.append(options)

        def reserve(self, bundles):
            said.append(bundles)

        def close(self):
            said.append("closed")

    monkeypatch.setitem(sys.modules, "qwench.cluster.ray", SimpleNamespace(RayCluster=Cluster))
    monkeypatch.setattr(placement, "plan_bundles", lambda cluster, devices: ("bundles", cluster, devices))
    monkeypatch.setattr(placement, "waiting_defaults", lambda environ: {"WAITS": "long", "OF": "defaults"})
    monkeypatch.setattr(placement, "check_turns", lambda config, *, on_gpus: said.append((config, on_gpus)))
    monkeypatch.setenv("RAY_ADDRESS", "there:1")
    monkeypatch.setenv("WAITS", "given")
    inputs = inputs_of(Config(cluster=ClusterConfig(launcher="ray"), rollout=RolloutConfig(rollout_batch_size=4)))
    bundles = ("bundles", inputs.config.cluster, inputs.plan.devices)
    with ExitStack() as started:
        assert isinstance(open_processes(inputs, started), Cluster)
        made = {"address": "there:1", "environ": {"WAITS": "given", "OF": "flags"}}
        assert said == [made, bundles, (inputs.config, True)]
    assert said[-1] == "closed"
    for launcher, inside in (("inside", True), ("local", False)):
        monkeypatch.setattr(placement, "choose_launcher", lambda *given, launcher=launcher, **options: launcher)
        processes = open_processes(inputs, ExitStack())
        assert (processes._inputs, processes._bundles, processes._ranks_inside) == (inputs, bundles, inside)


def test_gpus_that_are_not_there_are_refused_before_a_start(monkeypatch):
    inputs = inputs_of(Config(cluster=ClusterConfig(actor_num_gpus_per_node=4), rollout=RolloutConfig(rollout_batch_size=4)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for there in (4, 3):
        monkeypatch.setattr(torch.cuda, "device_count", lambda there=there: there)
        if there == 4:
            enough_gpus(inputs)
            continue
        with pytest.raises(ConfigError, match=r"^the run needs 4 GPUs \(.*\), and this machine has 3; ask for fewer"):
            enough_gpus(inputs)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    enough_gpus(inputs)
