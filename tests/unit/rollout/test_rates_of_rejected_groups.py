"""A group that a filter rejected is forgotten at once in a continuous run, but not its prompt's pass rate."""

from __future__ import annotations

from dataclasses import replace

from qwench.config.sections.data import DataConfig
from qwench.data.curriculum import Curriculum
from qwench.data.prompts import PromptSource
from qwench.rollout.functions import RolloutFunctions
from qwench.rollout.selection import Selection
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
