"""A small run of each campaign of `tests/campaigns`; the long ones are run by hand."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from qwench.engines.embedded.http.serving import ServerThread
from qwench.models.built_tokenizers import build_small_tokenizer
from tests.campaigns import damage, disks, fuzz, kills, stops
from tests.contract.engine_hosts import make_engine, make_model
from tests.e2e.conftest import Workspace


@pytest.mark.parametrize("name", ["rank", "engine", "router", "watched router"])
def test_a_stopped_process_is_named(name: str, workspace: Workspace, tmp_path: Path) -> None:
    named_s, faults = stops.stop(name, workspace, tmp_path, prepare=stops.hurry)
    assert faults == [] and named_s < stops.NAMED_WITHIN_S


def test_a_run_that_ends_badly_before_it_is_killed_is_a_fault(workspace: Workspace, tmp_path: Path) -> None:
    without_model = replace(workspace, model=tmp_path / "none")
    campaign = kills.Campaign(without_model, tmp_path, random.Random(0))
    campaign.references["in-process"] = kills.Reference({}, seconds=1e6)
    first, *_ = campaign.run("in-process", 0)
    assert first.startswith("the run ended with 2 before it was killed") and "--hf-checkpoint" in first


def test_odd_sampling_parameters_are_refused_or_answered_and_the_engine_lives_on() -> None:
    engine = make_engine(make_model("qwen3"), tokenizer=build_small_tokenizer(), prefix_cache=False)
    with ServerThread(engine, model_path="tiny") as server:
        statuses, faults = fuzz.send_odd(server.base_url)
    assert faults == []
    assert sum(statuses.values()) >= 74 and set(statuses) <= {200, 400, 422}


def test_damage_of_any_file_of_a_checkpoint_is_found(tmp_path: Path) -> None:
    save = damage.make_checkpoints(tmp_path, "tiny")
    assert damage.is_newest_whole(save), "undamaged, the newest is taken"
    count, unseen = damage.damage_all(save, rng=random.Random(0), kinds=["flip", "truncate"], say=lambda line: None)
    assert unseen == [] and count == 2 * len(damage.files_of(save / "iter_0000002")) >= 20


@pytest.mark.parametrize("name", ["save", "dump", "eval"])
def test_a_full_disk_is_one_sentence_and_the_same_command_goes_on_once_there_is_room(
    name: str, workspace: Workspace, tmp_path: Path
) -> None:
    assert disks.try_limited(name, workspace, tmp_path) == []
