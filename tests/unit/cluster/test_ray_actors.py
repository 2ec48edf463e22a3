"""What actors on the nodes of a Ray cluster say and do; Ray itself is played."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from qwench.cluster import ray_actors
from qwench.cluster.bundles import EnginePlace, Seat
from qwench.cluster.messages import Answer, Call
from qwench.cluster.ray_actors import EngineActor, TrainerActor
from qwench.wire.addresses import Placement


@pytest.fixture
def granted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Play a node whose processes see the GPUs 4 to 7; the list holds what Ray grants."""
    granted = [6]
    context = SimpleNamespace(get_node_id=lambda: "node")
    util = SimpleNamespace(get_node_ip_address=lambda: "10.0.0.1")
    played = SimpleNamespace(get_runtime_context=lambda: context, util=util, get_gpu_ids=lambda: granted)
    monkeypatch.setattr(ray_actors, "ray", played)
    monkeypatch.delenv("HIP_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    return granted


@pytest.mark.parametrize("variable", ["CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"])
def test_an_actor_says_its_node_and_its_devices_among_those_that_are_visible(variable, granted, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setenv(variable, "4,5,6,7")
    assert TrainerActor().seat() == Seat(node_id="node", address="10.0.0.1", device=2)
    granted[:] = [7, 5]
    assert EngineActor().place() == EnginePlace(node_id="node", address="10.0.0.1", devices=(3, 1))
    granted.clear()
    assert TrainerActor().seat().device == 0 and EngineActor().place().devices == ()


@pytest.mark.parametrize(("ranks_here", "threads"), [(None, None), (2, 3), (4, 1), (8, 1)])
def test_a_trainers_actor_becomes_a_rank(ranks_here, threads, granted, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "of the driver")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    set_threads: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", set_threads.append)
    monkeypatch.setattr(ray_actors, "usable_cores", lambda: 6)
    actor = TrainerActor()
    actor.become(3, {"RANK": "3"}, folder=str(tmp_path / "run"), ranks_here=ranks_here)
    assert (os.environ["RANK"], Path.cwd()) == ("3", tmp_path / "run")
    assert set_threads == ([] if threads is None else [threads])
    actor.become(3, {}, folder=str(tmp_path / "absent"), ranks_here=None)
    assert Path.cwd() == tmp_path / "run", "a folder that is not here is no place to go"
    assert actor.answer(Call(method="close")) == Answer(value=None)
    assert (actor._host._is_main, actor._host._exchange_folder) == (False, None)
    stacks = actor.stacks()
    assert actor.beat() is None and "test_ray_actors.py" in stacks and stacks.startswith(("Thread 0x", "Current thread 0x"))


@pytest.mark.parametrize("devices", [(), (2, 3)])
def test_an_engines_actor_owns_the_server_of_its_node(devices, granted, monkeypatch):
    made, called = [], []

    class Server:
        def __init__(self, command: object, *, placement: Placement | None) -> None:
            made.append((command, placement))

        def __getattr__(self, name: str):
            return lambda: called.append(name) or f"{name} said"

    def make(*, gpu_ids: tuple[int, ...], environ: dict[str, str], host: str) -> SimpleNamespace:
        assert environ == dict(os.environ)
        return SimpleNamespace(label="engine 0", made_with=(gpu_ids, host))

    monkeypatch.setattr(ray_actors, "ServerProcess", Server)
    monkeypatch.setattr(ray_actors, "host_name", lambda: "host")
    monkeypatch.setattr(ray_actors, "gpu_names", lambda numbers: tuple(f"gpu {number}" for number in numbers))
    actor = EngineActor()
    place = EnginePlace(node_id="node", address="10.0.0.9", devices=devices)
    expected = Placement(host="host", devices=("gpu 2", "gpu 3")) if devices else None
    assert actor.prepare(make, place) == ("engine 0", expected)
    ((command, placement),) = made
    assert (command.made_with, placement) == ((devices, "10.0.0.9"), expected)
    names = ["start", "stop", "is_running", "last_output", "stacks"]
    assert [getattr(actor, name)() for name in names] == [
        "start said", None, "is_running said", "last_output said", "stacks said",
    ]  # fmt: skip
    assert called == names
