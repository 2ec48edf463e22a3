"""--rm-type ifbench, with stand-ins of IFBench's checkers."""

import sys
import types
from dataclasses import dataclass

import pytest

from qwench.config.sections.reward import RewardConfig
from qwench.errors import ConfigError, RewardError
from qwench.rewards.graders import check_installed, check_prompts, find_grader
from qwench.samples import Prompt, Sample

ROW = {"instruction_id_list": [" a:words "], "kwargs": [{"n": 2, "unused": None}], "prompt_text": "say it", "record_id": "7"}


@dataclass
class InputExample:
    key: int
    instruction_id_list: list[str]
    prompt: str
    kwargs: list[dict]


@pytest.fixture
def checkers(monkeypatch: pytest.MonkeyPatch) -> list[InputExample]:
    """Install checkers that want as many words as `n` says; return what they were asked."""
    asked: list[InputExample] = []

    def strict(example: InputExample, responses: dict[str, str]) -> types.SimpleNamespace:
        asked.append(example)
        return types.SimpleNamespace(follow_all_instructions=len(responses[example.prompt].split()) == example.kwargs[0]["n"])

    module = types.ModuleType("evaluation_lib")
    module.InputExample, module.test_instruction_following_strict = InputExample, strict
    monkeypatch.setitem(sys.modules, "evaluation_lib", module)
    return asked


def answered(response: str, metadata: dict) -> Sample:
    return Sample(prompt=Prompt(text="p", token_ids=(1,), metadata=metadata), sample_id=1, group_id=0, response=response)


def test_a_response_is_right_if_it_follows_every_instruction(checkers):
    grade = find_grader("ifbench")
    right, wrong = grade(answered("two words", ROW)), grade(answered("one", ROW))
    assert (right.score, right.reason, wrong.score, wrong.reason) == (1.0, "followed", 0.0, "not_followed")
    assert checkers[0] == InputExample(key=7, instruction_id_list=["a:words"], prompt="say it", kwargs=[{"n": 2}])


def test_rows_without_instructions_and_a_machine_without_checkers_are_refused(monkeypatch):
    reward = RewardConfig(rm_type="ifbench")
    check_prompts(reward, [Prompt(text="p", token_ids=(1,), metadata=ROW)])
    with pytest.raises(ConfigError, match="row 0 of the prompts: --rm-type ifbench needs instruction_id_list"):
        check_prompts(reward, [Prompt(text="p", token_ids=(1,))])
    with pytest.raises(RewardError, match="instruction_id_list"):
        find_grader("ifbench")(answered("x", {}))
    monkeypatch.setitem(sys.modules, "evaluation_lib", None)
    with pytest.raises(ConfigError, match=r"needs the checkers of IFBench .*PYTHONPATH"):
        check_installed(reward, [Prompt(text="p", token_ids=(1,), metadata=ROW)])
    check_installed(RewardConfig(rm_type="math"), [Prompt(text="p", token_ids=(1,))])
