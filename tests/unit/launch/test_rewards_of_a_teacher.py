"""Which rewards grade training and evaluation when --use-opd trains on rows without labels."""

import asyncio
import random
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PretrainedConfig

from qwench.config.config import Config
from qwench.config.plan import plan_run
from qwench.config.sections.data import DataConfig
from qwench.config.sections.distillation import DistillationConfig
from qwench.config.sections.reward import RewardConfig
from qwench.config.sections.rollout import RolloutConfig
from qwench.engines.fleet.event_loop import EventLoopThread
from qwench.engines.fleet.pool import EnginePool
from qwench.errors import ConfigError
from qwench.launch import rollouts
from qwench.launch.inputs import Inputs, read_eval_prompts
from qwench.models.built_tokenizers import build_small_tokenizer
from qwench.samples import Prompt, Sample
from tests.fakes.console import RecordingConsole
from tests.fakes.engine import FakeEngine
from tests.unit.config.architectures import QWEN3_4B
from tests.unit.launch.test_generation import eval_settings
from tests.unit.rollout.scene import write_ok

OPD = DistillationConfig(use_opd=True, opd_type="megatron", opd_teacher_load=Path("teacher"))
LABELLED = eval_settings(name="labelled", input_key="input", label_key="label")


def inputs_of(*eval_sets, label_key=None, **reward):
    config = Config(
        distillation=OPD,
        data=DataConfig(label_key=label_key, apply_chat_template=False),
        reward=RewardConfig(**reward),
        rollout=RolloutConfig(rollout_batch_size=2, rollout_max_response_len=9),
    )
    return Inputs(
        config=config, plan=replace(plan_run(config, QWEN3_4B), eval_sets=tuple(eval_sets)), model_folder=Path(),
        tokenizer=build_small_tokenizer(), console=RecordingConsole(),
        hf_config=PretrainedConfig(), device=torch.device("cpu"), dtype=torch.float32,
        rank=0,
    )  # fmt: skip


@contextmanager
def generation_of(inputs, monkeypatch):
    with closing(EnginePool([FakeEngine(write_ok)], EventLoopThread())) as engines:
        monkeypatch.setattr(rollouts, "build_pool", lambda *_args, **_options: engines)
        generation = rollouts.build_generation(inputs, with_weights=False, servers=None, token=None)
        try:
            yield generation
        finally:
            generation.grader.close()
            generation.eval_grader.close()


def scores(inputs, monkeypatch, response, *, label="2"):
    """Return the scores of one response as a training sample without a label, and as an evaluation sample with one."""
    prompt = Prompt(text="1+1?", token_ids=(1,))
    with generation_of(inputs, monkeypatch) as generation:
        return [
            asyncio.run(grader.grade(Sample(prompt=one, sample_id=0, group_id=0, response=response))).score
            for grader, one in ((generation.grader, prompt), (generation.eval_grader, replace(prompt, label=label)))
        ]


def test_an_evaluation_set_with_labels_is_graded_and_training_is_not(monkeypatch):
    assert scores(inputs_of(LABELLED, rm_type="math"), monkeypatch, "\\boxed{2}") == [0.0, 1.0]


def test_with_labels_one_grader_does_both(monkeypatch):
    inputs = inputs_of(LABELLED, rm_type="math", label_key="label")
    with generation_of(inputs, monkeypatch) as generation:
        assert generation.eval_grader is generation.grader


def test_a_reward_without_labels_stays_and_the_others_go_with_their_weights(monkeypatch):
    several = {"rm_type": "math,random,zero", "reward_weights": "0.7,0.25,3"}
    coin = random.Random(0).randint(0, 1)
    assert coin == 1
    trained, evaluated = scores(inputs_of(LABELLED, **several), monkeypatch, "\\boxed{2}")
    assert trained == 0.25 * coin
    assert evaluated == pytest.approx(0.7 + 0.25 * coin)


@pytest.mark.parametrize("key", [None, "math", "random"])
def test_one_reward_that_is_left_counts_whole(monkeypatch, key):
    coin = random.Random(0).randint(0, 1)
    two = inputs_of(LABELLED, rm_type="math,random", reward_weights="0.7,0.3", reward_key=key)
    assert scores(two, monkeypatch, "\\boxed{2}")[0] == coin


def test_labels_of_an_evaluation_set_are_checked(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"input": "1+1?", "label": null}\n')
    inputs = inputs_of(replace(LABELLED, path=str(rows)), rm_type="math")
    with pytest.raises(ConfigError, match="label"):
        read_eval_prompts(inputs)


def test_an_evaluation_set_without_labels_beside_one_with_labels_is_refused(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"input": "1+1?", "label": "2"}\n')
    sets = [replace(LABELLED, path=str(rows)), eval_settings(name="bare", input_key="input", path=str(rows))]
    with pytest.raises(ConfigError, match=r"the reward compares answers of .* with labels; name their key with"):
        read_eval_prompts(inputs_of(*sets, rm_type="math"))
    assert set(read_eval_prompts(inputs_of(sets[1], rm_type="math"))) == {"bare"}
