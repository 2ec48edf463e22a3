"""What a continuous run counts: groups as they come, those that wait, and the pass rates of those that a filter rejected."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qwench.config.sections.data import DataConfig
from qwench.data.curriculum import Curriculum
from qwench.data.prompts import PromptSource
from qwench.rollout.functions import RolloutFunctions
from qwench.rollout.selection import Selection
from tests.fakes.console import RecordingConsole
from tests.unit.rollout.scene import prompt, prompts_of
from tests.unit.rollout.test_continuous import GatedEngine, drop_c, open_stream


def test_a_saved_state_holds_the_rates_of_groups_that_were_rejected_since_the_last_rollout() -> None:
    prompts = [replace(prompt(letter), place=letter) for letter in "abcdefgh"]
    curriculum = Curriculum(DataConfig(curriculum_band=(0.0, 1.0)), prompts)
    source = PromptSource(prompts, n_samples_per_prompt=1, shuffle=False, seed=0, curriculum=curriculum)
    selection = Selection(RolloutFunctions(group_filter=drop_c), curriculum)
    engine = GatedEngine("ce")
    with open_stream(engine, source=source, selection=selection) as stream:
        assert prompts_of(stream.take(0).groups) == "ab"
        engine.closed_to.remove("c")
        engine.wait_for("e")  # it replaces c
        with stream.paused():
            rates = stream.state_dict()["source"]["curriculum"]["rates"]
    assert (2, 1.0) in rates


@pytest.mark.parametrize("deterministic", [True, False])
def test_a_rollout_counts_its_groups_as_they_come_and_those_that_timing_decides(deterministic):
    engine, console = GatedEngine("cd"), RecordingConsole()
    with open_stream(engine, deterministic=deterministic, console=console) as stream:
        rollout = stream.take(0)
        if not deterministic:
            counts = [rollout.metrics[f"rollout/async/groups_{name}"] for name in ("in_flight", "finished")]
            assert counts == [2.0, 0.0]
        engine.closed_to.clear()
    assert deterministic == ("rollout/async/groups_in_flight" not in rollout.metrics)
    (bar,) = console.progresses
    assert (bar.description, bar.total, sum(bar.steps)) == ("generate rollout 0", 2, 2) and min(bar.steps) >= 0
