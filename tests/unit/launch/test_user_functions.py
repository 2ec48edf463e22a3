"""The user's functions in the policy loss, and the session of those of the references' convention."""

import socket
from argparse import Namespace
from contextlib import closing
from pathlib import Path

import pytest
import torch
from transformers import PretrainedConfig

from qwench.config.config import Config
from qwench.config.plan import plan_run
from qwench.config.sections.algorithm import AlgorithmConfig
from qwench.config.sections.parallel import ParallelConfig
from qwench.config.sections.reward import RewardConfig
from qwench.config.sections.rollout import RolloutConfig
from qwench.engines.fleet.event_loop import EventLoopThread
from qwench.engines.fleet.pool import EnginePool
from qwench.errors import ConfigError
from qwench.foreign.session import current_session
from qwench.launch.inputs import Inputs
from qwench.launch.user_functions import load_user_functions, load_user_terms, open_user_session
from tests.fakes.console import RecordingConsole
from tests.fakes.engine import CharTokenizer, FakeEngine
from tests.unit.config.architectures import QWEN3_4B
from tests.unit.rollout.scene import sampling_of, write_ok

HERE = "tests.unit.launch.test_user_functions"


def of_logits(args, batch, logits, sum_of_sample_mean):
    return logits.sum(), {}


def of_log_probs(log_probs, entropy, micro_batch):
    return log_probs


def terms(function: str, *, context_parallel: int):
    algorithm = AlgorithmConfig(loss_type="custom_loss", custom_loss_function_path=f"{HERE}.{function}")
    parallel = ParallelConfig(context_parallel_size=context_parallel)
    return load_user_terms(Config(algorithm=algorithm, parallel=parallel), Namespace)


def test_a_loss_of_logits_is_refused_where_ranks_split_sequences():
    assert terms("of_logits", context_parallel=1).takes_logits
    with pytest.raises(
        ConfigError, match=r"--custom-loss-function-path gets logits of whole .* --context-parallel-size splits"
    ):
        terms("of_logits", context_parallel=2)
    assert not terms("of_log_probs", context_parallel=2).takes_logits


async def foreign_reward(args, sample, **kwargs):
    return 1.0


def test_the_address_of_the_engines_answers_until_the_session_ends():
    config = Config(rollout=RolloutConfig(rollout_batch_size=2), reward=RewardConfig(custom_rm_path=f"{HERE}.foreign_reward"))
    inputs = Inputs(
        config=config, plan=plan_run(config, QWEN3_4B), model_folder=Path(), tokenizer=CharTokenizer(),
        console=RecordingConsole(), hf_config=PretrainedConfig(), device=torch.device("cpu"), dtype=torch.float32, rank=0,
    )  # fmt: skip
    with closing(EnginePool([FakeEngine(write_ok)], EventLoopThread())) as engines:
        end = open_user_session(inputs, engines, sampling_of(max_new_tokens=9), load_user_functions(config), source=None)
        address = ("127.0.0.1", current_session().gateway.port)
        socket.create_connection(address).close()
        end()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address)


def test_the_filter_of_equal_rewards_compares_the_parts_for_gdpo():
    sums = "qwench.rollout.filters.check_reward_nonzero_std"
    for estimator, expected in (("grpo", "check_reward_nonzero_std"), ("gdpo", "check_parts_nonzero_std")):
        config = Config(
            rollout=RolloutConfig(rollout_batch_size=2, dynamic_sampling_filter_path=sums),
            algorithm=AlgorithmConfig(advantage_estimator=estimator),
            reward=RewardConfig(rm_type="math,f1"),
        )
        assert load_user_functions(config).rollout.group_filter.__name__ == expected
