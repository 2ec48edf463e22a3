import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwench.config import (
    AlgorithmConfig,
    CheckpointConfig,
    ClusterConfig,
    Config,
    DataConfig,
    EvalConfig,
    LoggingConfig,
    ParallelConfig,
    RewardConfig,
    RolloutConfig,
    TrainingConfig,
)
from qwench.config.plan import data_parallel_size, plan_batch
from qwench.errors import ConfigError


def plan(prompts: int, siblings: int, per_step: int | None = None, steps: int | None = None):
    return plan_batch(
        RolloutConfig(rollout_batch_size=prompts, n_samples_per_prompt=siblings),
        TrainingConfig(global_batch_size=per_step, num_steps_per_rollout=steps),
    )


@pytest.mark.parametrize(
    ("per_step", "steps", "expected"), [(None, None, (256, 1)), (64, None, (64, 4)), (None, 8, (32, 8)), (128, 2, (128, 2))]
)
def test_what_is_missing_of_the_batch_identity_is_derived(per_step, steps, expected):
    batch = plan(32, 8, per_step, steps)
    assert (batch.global_batch_size, batch.num_steps_per_rollout) == expected
    assert batch.samples_per_rollout == 256


@given(st.integers(1, 64), st.integers(1, 16), st.none() | st.integers(1, 64), st.none() | st.integers(1, 16))
def test_a_plan_fulfils_the_identity_or_is_refused_with_its_numbers(prompts, siblings, per_step, steps):
    try:
        batch = plan(prompts, siblings, per_step, steps)
    except ConfigError as error:
        assert f"--rollout-batch-size {prompts} x --n-samples-per-prompt {siblings} = {prompts * siblings} samples" in str(
            error
        )
        fits = [size for size in range(1, 1025) if size * (steps or 1) == prompts * siblings or steps is None]
        assert not any(prompts * siblings % size == 0 and (per_step or size) == size for size in fits)
    else:
        assert prompts * siblings == batch.global_batch_size * batch.num_steps_per_rollout
        assert per_step in (None, batch.global_batch_size)
        assert steps in (None, batch.num_steps_per_rollout)


def test_terms_that_do_not_fit_are_refused_with_both_products():
    with pytest.raises(ConfigError) as caught:
        plan(32, 8, 128, 3)
    assert str(caught.value) == (
        "--rollout-batch-size 32 x --n-samples-per-prompt 8 = 256 samples, but --global-batch-size 128 x "
        "--num-steps-per-rollout 3 = 384; leave one of the two out"
    )
    with pytest.raises(ConfigError, match="--num-steps-per-rollout 3 does not divide; choose a divisor of 256"):
        plan(32, 8, None, 3)


def test_without_a_rollout_batch_size_nothing_can_be_resolved():
    with pytest.raises(ConfigError, match="--rollout-batch-size is required"):
        Config().resolve()


def test_ranks_that_are_left_over_are_data_parallel():
    sizes = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2, context_parallel_size=1)
    assert data_parallel_size(16, sizes) == 4
    with pytest.raises(ConfigError, match="= 4 does not divide the 6 ranks of --actor-num-nodes x --actor-num-gpus-per-node"):
        data_parallel_size(6, sizes)


BATCH = RolloutConfig(rollout_batch_size=4, n_samples_per_prompt=2, rollout_max_response_len=100, rollout_temperature=0.7)


def test_evaluation_falls_back_to_the_values_of_the_rollout():
    config = Config(
        rollout=BATCH,
        data=DataConfig(label_key="answer", rollout_max_prompt_len=50),
        reward=RewardConfig(reward_key="score"),
        evaluation=EvalConfig(eval_prompt_data=("a", "x.jsonl", "b", "y.jsonl@[0:2]")),
    )
    settings, other = config.resolve().eval_sets
    assert (settings.temperature, settings.top_p, settings.top_k, settings.min_new_tokens) == (0.7, 1.0, -1, 0)
    assert (settings.max_response_len, settings.max_prompt_len, settings.max_context_len) == (100, 50, None)
    assert (settings.input_key, settings.label_key, settings.tool_key, settings.metadata_key) == (
        "input",
        "answer",
        "tools",
        "metadata",
    )
    assert (settings.n_samples_per_prompt, settings.stop, settings.stop_token_ids) == (1, (), ())
    assert [(one.name, one.path) for one in (settings, other)] == [("a", "x.jsonl"), ("b", "y.jsonl@[0:2]")]
    assert config.resolve().eval_reward_key == "score"


def test_values_of_evaluation_win_also_when_they_are_zero():
    evaluation = EvalConfig(
        eval_prompt_data=("a", "x.jsonl"),
        eval_temperature=0.0,
        eval_top_p=0.9,
        eval_top_k=5,
        eval_min_new_tokens=0,
        eval_max_response_len=7,
        eval_label_key="l",
        eval_reward_key="acc",
    )
    rollout = RolloutConfig(rollout_batch_size=1, rollout_min_new_tokens=3, rollout_max_response_len=9)
    resolved = Config(rollout=rollout, evaluation=evaluation).resolve()
    (settings,) = resolved.eval_sets
    assert (settings.temperature, settings.top_p, settings.top_k, settings.min_new_tokens) == (0.0, 0.9, 5, 0)
    assert (settings.max_response_len, settings.label_key, resolved.eval_reward_key) == (7, "l", "acc")


@pytest.mark.parametrize(
    ("cluster", "expected"),
    [
        (ClusterConfig(), (True, True, True)),
        (ClusterConfig(colocate=True, offload_train=False), (True, False, True)),
        (ClusterConfig(offload_train=False, offload_rollout=False), (True, False, False)),
        (ClusterConfig(offload=True, offload_train=False), (True, True, True)),
    ],
)
def test_memory_is_shared_and_offloaded_where_devices_are_shared(cluster, expected):
    resolved = Config(rollout=BATCH, cluster=cluster).resolve()
    assert (resolved.colocate, resolved.offload_train, resolved.offload_rollout) == expected


def test_token_budgets_default_to_each_other():
    training = TrainingConfig(use_dynamic_batch_size=True, max_tokens_per_gpu=100)
    resolved = Config(rollout=BATCH, training=training).resolve()
    assert (resolved.max_tokens_per_micro_batch, resolved.log_probs_max_tokens_per_micro_batch) == (100, 100)
    training = TrainingConfig(use_dynamic_batch_size=True, max_tokens_per_gpu=100, log_probs_max_tokens_per_gpu=300)
    resolved = Config(rollout=BATCH, training=training).resolve()
    assert (resolved.max_tokens_per_micro_batch, resolved.log_probs_max_tokens_per_micro_batch) == (100, 300)
    assert Config(rollout=BATCH).resolve().max_tokens_per_micro_batch is None


def test_a_group_of_one_is_never_divided_by_its_spread():
    alone = RolloutConfig(rollout_batch_size=4, n_samples_per_prompt=1)
    assert not Config(rollout=alone).resolve().normalize_by_std
    assert Config(rollout=BATCH).resolve().normalize_by_std
    assert not Config(rollout=BATCH, algorithm=AlgorithmConfig(disable_grpo_std_normalization=True)).resolve().normalize_by_std


def test_smaller_derivations(tmp_path):
    resolved = Config(rollout=BATCH, checkpoint=CheckpointConfig(save=tmp_path)).resolve()
    assert (resolved.eps_clip_high, resolved.over_sampling_batch_size, resolved.log_dir) == (0.2, 4, tmp_path)
    assert (resolved.entropy_wanted, resolved.needs_reference) == (False, False)
    config = Config(
        rollout=BATCH,
        algorithm=AlgorithmConfig(eps_clip=0.1, eps_clip_high=0.3, observe_training_entropy=True, use_kl_loss=True),
        checkpoint=CheckpointConfig(save=tmp_path),
        logging=LoggingConfig(log_dir=tmp_path / "logs"),
    )
    resolved = config.resolve()
    assert (resolved.eps_clip_high, resolved.log_dir) == (0.3, tmp_path / "logs")
    assert (resolved.entropy_wanted, resolved.needs_reference) == (True, True)
