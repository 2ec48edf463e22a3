"""Facts of a run that follow from several sections."""

import pytest

from qwench.config.config import Config
from qwench.config.sections.algorithm import AlgorithmConfig
from qwench.config.sections.cluster import ClusterConfig
from qwench.config.sections.critic import CriticConfig
from qwench.config.sections.debug import DebugConfig
from qwench.config.sections.engine import EngineConfig
from qwench.config.sections.lora import LoraConfig
from qwench.config.sections.parallel import ParallelConfig
from qwench.config.sections.rollout import AsyncConfig, RolloutConfig
from qwench.config.sections.training import TrainingConfig

APART = ClusterConfig(rollout_num_gpus=2)
AHEAD = RolloutConfig(rollouts_ahead=1)
ASYNC = AsyncConfig(fully_async=True)
SGLANG = EngineConfig(rollout_engine="sglang")


def in_async(**flags):
    return AsyncConfig(fully_async=True, **flags)


@pytest.mark.parametrize(
    ("fact", "sections", "value"),
    [
        ("generates", {}, True),
        ("generates", {"algorithm": AlgorithmConfig(loss_type="sft_loss")}, False),
        ("generates", {"debug": DebugConfig(load_debug_rollout_data="r/{rollout_id}")}, False),
        ("generates_ahead", {}, False),
        ("generates_ahead", {"rollout": AHEAD}, True),
        ("generates_ahead", {"asynchronous": ASYNC}, True),
        ("max_staleness", {}, 0),
        ("max_staleness", {"rollout": AHEAD}, 1),
        ("max_staleness", {"asynchronous": ASYNC}, 1),
        ("max_staleness", {"asynchronous": in_async(max_weight_staleness=0)}, 0),
        ("max_staleness", {"asynchronous": in_async(max_weight_staleness=3)}, 3),
        ("max_age", {"rollout": RolloutConfig(update_weights_interval=4)}, 3),
        ("max_age", {"rollout": RolloutConfig(rollouts_ahead=1, update_weights_interval=4)}, 4),
        ("num_past_policies", {"rollout": AHEAD}, 0),
        ("num_past_policies", {"rollout": AHEAD, "algorithm": AlgorithmConfig(keep_old_actor=True)}, 1),
        ("critic_gpus", {}, ()),
        (
            "critic_gpus",
            {"critic": CriticConfig(critic_num_nodes=2), "cluster": ClusterConfig(actor_num_gpus_per_node=4)},
            (4, 4),
        ),
        (
            "critic_gpus",
            {"critic": CriticConfig(critic_num_gpus_per_node=2), "cluster": ClusterConfig(actor_num_nodes=3)},
            (2, 2, 2),
        ),
        ("num_ranks", {"cluster": ClusterConfig(actor_num_nodes=2, actor_num_gpus_per_node=4)}, 8),
        ("num_ranks", {"critic": CriticConfig(critic_num_nodes=1, critic_num_gpus_per_node=2)}, 3),
        ("embeds_engine", {}, True),
        ("embeds_engine", {"cluster": ClusterConfig(actor_num_gpus_per_node=2)}, False),
        ("embeds_engine", {"cluster": ClusterConfig(launcher="ray")}, False),
        ("embeds_engine", {"cluster": APART}, False),
        ("embeds_engine", {"engine": SGLANG}, False),
        ("keeps_requests", {}, False),
        ("keeps_requests", {"asynchronous": ASYNC}, True),
        ("keeps_requests", {"asynchronous": in_async(pause_generation_mode="abort")}, False),
        ("keeps_requests", {"asynchronous": ASYNC, "training": TrainingConfig(deterministic_mode=True)}, False),
        ("keeps_requests", {"asynchronous": ASYNC, "lora": LoraConfig(lora_rank=2, lora_publish="adapter")}, False),
        ("backend", {}, "fsdp"),
        ("backend", {"parallel": ParallelConfig(tensor_model_parallel_size=2)}, "megatron"),
        ("backend", {"training": TrainingConfig(train_backend="megatron")}, "megatron"),
    ],
)
def test_a_fact_of_a_run(fact, sections, value):
    assert getattr(Config(**sections), fact) == value
