from dataclasses import replace

import pytest

from qwench.config.config import Config
from qwench.config.plan import plan_run
from qwench.config.plan_lines import plan_lines
from qwench.config.sections.algorithm import AlgorithmConfig
from qwench.config.sections.cluster import ClusterConfig
from qwench.config.sections.debug import DebugConfig
from qwench.config.sections.engine import EngineConfig
from qwench.config.sections.foreign import ForeignConfig
from qwench.config.sections.rollout import AsyncConfig, RolloutConfig
from qwench.config.sections.training import TrainingConfig
from tests.unit.config.architectures import QWEN3_4B

BATCH = RolloutConfig(rollout_batch_size=4, num_rollout=2)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        ({"cluster": ClusterConfig()}, False),  # engines take the devices by turns
        ({"cluster": ClusterConfig(), "engine": EngineConfig(rollout_external_engine_addrs=("h:1",))}, True),
        ({"algorithm": AlgorithmConfig()}, False),
        ({"algorithm": AlgorithmConfig(use_kl_loss=True, ref_update_interval=2)}, True),
        ({"rollout": replace(BATCH, rollouts_ahead=1)}, False),
        ({"asynchronous": AsyncConfig(fully_async=True, max_weight_staleness=0)}, False),
        ({"rollout": replace(BATCH, update_weights_interval=2)}, True),
        ({"training": TrainingConfig(deterministic_mode=True)}, False),
        ({"debug": DebugConfig(load_debug_rollout_data="{rollout_id}")}, False),
        ({"rollout": replace(BATCH, rollout_function_path="a.b")}, False),
        ({"rollout": replace(BATCH, rollout_sample_filter_path="a.b")}, False),
        ({"rollout": replace(BATCH, rollout_all_samples_process_path="a.b")}, False),
        ({"rollout": replace(BATCH, custom_rollout_log_function_path="a.b")}, False),
        ({"foreign": ForeignConfig(custom_convert_samples_to_train_data_path="a.b")}, False),
        ({"rollout": replace(BATCH, dynamic_sampling_filter_path="a.b", custom_generate_function_path="a.b")}, True),
    ],
)
def test_the_reference_scores_early_where_the_trainer_waits_and_nothing_changes_what_it_scored(changes, expected):
    sections = {"algorithm": AlgorithmConfig(use_kl_loss=True), "cluster": ClusterConfig(rollout_num_gpus=1), **changes}
    config = Config(**{"rollout": BATCH, **sections})
    resolved = plan_run(config, QWEN3_4B)
    assert resolved.scores_early is expected
    said = "reference model: held; scores finished groups while others are generated"
    assert (said in plan_lines(config, resolved)) is expected
