from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwench.config.config import Config
from qwench.config.layout import data_parallel_size
from qwench.config.plan import RunPlan, plan_batch, plan_run, train_dtype
from qwench.config.plan_lines import plan_lines
from qwench.config.sections.algorithm import AlgorithmConfig
from qwench.config.sections.checkpoint import CheckpointConfig
from qwench.config.sections.cluster import ClusterConfig
from qwench.config.sections.critic import CriticConfig
from qwench.config.sections.data import DataConfig
from qwench.config.sections.debug import DebugConfig
from qwench.config.sections.engine import EngineConfig
from qwench.config.sections.evaluation import EvalConfig
from qwench.config.sections.logging import LoggingConfig
from qwench.config.sections.lora import LoraConfig
from qwench.config.sections.model import ArchitectureConfig, ModelConfig
from qwench.config.sections.optimizer import OptimizerConfig
from qwench.config.sections.parallel import ParallelConfig
from qwench.config.sections.reward import RewardConfig
from qwench.config.sections.rollout import AsyncConfig, RolloutConfig
from qwench.config.sections.training import TrainingConfig
from qwench.errors import ConfigError
from tests.unit.config.architectures import QWEN3_4B


def planned(**sections) -> RunPlan:
    sections.setdefault("rollout", BATCH)
    return plan_run(Config(**sections), QWEN3_4B)


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
    assert (batch.rollout_batch_size, batch.n_samples_per_prompt) == (32, 8)


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


def test_without_a_rollout_batch_size_nothing_can_be_planned():
    with pytest.raises(ConfigError, match="--rollout-batch-size is required"):
        plan_run(Config(), QWEN3_4B)


def test_ranks_that_are_left_over_are_data_parallel():
    layout = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2, context_parallel_size=1).layout
    assert data_parallel_size(layout, world_size=16) == 4
    with pytest.raises(ConfigError, match=r"\(4 ranks .* the 6 trainer ranks of --actor-num-nodes x --actor-num-gpus-per-node"):
        data_parallel_size(layout, world_size=6)


def test_a_critic_of_its_own_is_sharded_over_its_own_ranks():
    cluster = ClusterConfig(actor_num_nodes=2, actor_num_gpus_per_node=8)
    algorithm, rollout = AlgorithmConfig(advantage_estimator="ppo"), RolloutConfig(rollout_batch_size=1)
    parts = {"cluster": cluster, "algorithm": algorithm, "rollout": rollout}
    on_tp2 = ParallelConfig(tensor_model_parallel_size=2)
    plan = plan_run(Config(**parts, critic=CriticConfig(critic_num_gpus_per_node=2), parallel=on_tp2), QWEN3_4B)
    assert (plan.devices.critic, plan.dp_size, plan.critic.dp_size) == ((2, 2), 8, 2)
    assert (plan.of_critic.dp_size, plan.of_critic.rank_bytes) == (2, plan.critic.rank_bytes)
    assert plan.critic.rank_bytes.optimizer > 2 * plan.rank_bytes.optimizer
    lines = list(plan_lines(Config(**parts, critic=CriticConfig(critic_num_gpus_per_node=2), parallel=on_tp2), plan))
    assert any(line.startswith("critic: on 4 ranks of its own (DP 2), beside the policy; ") for line in lines)
    shared = plan_run(Config(**parts), QWEN3_4B)
    assert (shared.holds_critic, shared.critic, shared.of_critic, shared.devices.critic) == (True, None, None, ())
    resting = (shared.rank_bytes.weights + shared.rank_bytes.optimizer) / 2**30
    in_turn = "critic: on the ranks of the policy, in turn with it; "
    (line,) = (line for line in plan_lines(Config(**parts), shared) if line.startswith(in_turn))
    assert line == f"{in_turn}the one that rests takes {resting:.3g} GiB of the host, which the next line does not count"
    with pytest.raises(ConfigError, match=r"the 3 trainer ranks of --critic-num-nodes x --critic-num-gpus-per-node"):
        lone = CriticConfig(critic_num_nodes=1, critic_num_gpus_per_node=3)
        plan_run(Config(**parts, critic=lone, parallel=on_tp2), QWEN3_4B)


BATCH = RolloutConfig(rollout_batch_size=4, n_samples_per_prompt=2, rollout_max_response_len=100, rollout_temperature=0.7)


def test_evaluation_falls_back_to_the_values_of_the_rollout():
    config = Config(
        rollout=BATCH,
        data=DataConfig(label_key="answer", rollout_max_prompt_len=50),
        reward=RewardConfig(reward_key="score"),
        evaluation=EvalConfig(eval_prompt_data=("a", "x.jsonl", "b", "y.jsonl@[0:2]")),
    )
    settings, other = plan_run(config, QWEN3_4B).eval_sets
    assert (settings.temperature, settings.top_p, settings.top_k, settings.min_new_tokens) == (0.7, 1.0, -1, 0)
    assert (settings.max_response_len, settings.max_prompt_len, settings.max_context_len) == (100, None, None)
    assert (settings.input_key, settings.label_key, settings.tool_key, settings.metadata_key) == (
        "input",
        "answer",
        "tools",
        "metadata",
    )
    assert (settings.n_samples_per_eval_prompt, settings.stop, settings.stop_token_ids) == (1, (), ())
    assert [(one.name, one.path) for one in (settings, other)] == [("a", "x.jsonl"), ("b", "y.jsonl@[0:2]")]
    assert plan_run(config, QWEN3_4B).eval_reward_key == "score"


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
    resolved = planned(rollout=rollout, evaluation=evaluation)
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
        (ClusterConfig(rollout_num_gpus=2), (False, False, False)),
    ],
)
def test_memory_is_shared_and_offloaded_where_devices_are_shared(cluster, expected):
    devices = planned(cluster=cluster).devices
    assert (devices.shared, devices.offload_train, devices.offload_rollout) == expected


def test_token_budgets_default_to_each_other_and_grow_with_context_parallelism():
    training = TrainingConfig(use_dynamic_batch_size=True, max_tokens_per_gpu=100)
    resolved = planned(training=training)
    assert (resolved.micro_batch_tokens, resolved.score_tokens) == (100, 100)
    training = TrainingConfig(use_dynamic_batch_size=True, max_tokens_per_gpu=100, log_probs_max_tokens_per_gpu=300)
    resolved = planned(training=training)
    assert (resolved.micro_batch_tokens, resolved.score_tokens) == (100, 300)
    ranks, parallel = ClusterConfig(actor_num_gpus_per_node=2), ParallelConfig(context_parallel_size=2)
    resolved = planned(training=training, cluster=ranks, parallel=parallel)
    assert (resolved.micro_batch_tokens, resolved.score_tokens, resolved.dp_size) == (200, 600, 1)
    assert planned().micro_batch_tokens is None


def test_engines_share_the_ranks_devices_or_have_their_own():
    sglang = EngineConfig(rollout_engine="sglang")
    shared = planned(engine=sglang, cluster=ClusterConfig(actor_num_gpus_per_node=4, rollout_num_gpus_per_engine=2)).devices
    assert (shared.shared, shared.engine_sizes) == (True, (2, 2))
    apart = planned(engine=sglang, cluster=ClusterConfig(rollout_num_gpus=6, rollout_num_gpus_per_engine=2)).devices
    assert (apart.shared, apart.engine_sizes) == (False, (2, 2, 2))
    assert planned(cluster=ClusterConfig(rollout_num_gpus=3)).devices.num_engines == 3
    external = EngineConfig(rollout_external_engine_addrs=("a:1",))
    assert planned(engine=external).devices.num_engines == 0


def test_recorded_rollouts_are_replayed_unless_conversations_are_read():
    for loss_type, recorded, replays in (
        ("policy_loss", "{rollout_id}", True), ("policy_loss", None, False), ("sft_loss", "{rollout_id}", False),
    ):  # fmt: skip
        sections = {"algorithm": AlgorithmConfig(loss_type=loss_type), "debug": DebugConfig(load_debug_rollout_data=recorded)}
        assert planned(**sections).replays == replays


def test_engines_for_evaluation_are_the_last_ones():
    def devices(num_gpus, **engine):
        cluster = ClusterConfig(rollout_num_gpus=4, rollout_num_gpus_per_engine=2)
        evaluation = EvalConfig(eval_num_gpus=num_gpus, eval_prompt_data=("a", "a.jsonl"))
        asynchronous = AsyncConfig(fully_async=True)
        engine = EngineConfig(rollout_engine="sglang", **engine)
        return planned(engine=engine, cluster=cluster, evaluation=evaluation, asynchronous=asynchronous).devices

    assert (devices(4).engine_sizes, devices(4).num_eval_engines) == ((2, 2, 2, 2), 2)
    with pytest.raises(ConfigError, match=r"--eval-num-gpus 1 must be the GPUs of the last engines, which have 2, 2;"):
        devices(1)


def test_an_engine_that_would_span_two_nodes_is_refused():
    cluster = ClusterConfig(actor_num_nodes=2, actor_num_gpus_per_node=3, rollout_num_gpus_per_engine=2)
    with pytest.raises(ConfigError, match="--rollout-num-gpus-per-engine 2 does not divide --actor-num-gpus-per-node 3"):
        planned(cluster=cluster, engine=EngineConfig(rollout_engine="sglang"))


def test_verbs_that_only_train_or_only_generate_have_the_devices_alone():
    tuning = planned(rollout=RolloutConfig(rollout_batch_size=4), algorithm=AlgorithmConfig(loss_type="sft_loss")).devices
    assert (tuning.trains, tuning.generates, tuning.shared, tuning.num_engines) == (True, False, False, 0)
    only = planned(debug=DebugConfig(debug_rollout_only=True)).devices
    assert (only.trains, only.generates, only.shared, only.num_engines) == (False, True, False, 1)
    evaluation = plan_run(Config(rollout=BATCH), QWEN3_4B, trains=False)
    assert (evaluation.devices.trains, evaluation.devices.num_engines, evaluation.holds_reference) == (False, 1, False)


@pytest.mark.parametrize(
    ("rollout", "expected"),
    [({}, True), ({"rollouts_ahead": 1}, False), ({"update_weights_interval": 2}, False)],
)
def test_engines_may_use_the_trainers_tensors_where_generation_never_meets_a_step(rollout, expected):
    asynchronous = planned(rollout=RolloutConfig(rollout_batch_size=4), asynchronous=AsyncConfig(fully_async=True))
    assert not asynchronous.devices.weights_may_alias
    assert planned(rollout=RolloutConfig(rollout_batch_size=4, **rollout)).devices.weights_may_alias is expected


@pytest.mark.parametrize(
    ("algorithm", "expected"),
    [
        (AlgorithmConfig(), False),
        (AlgorithmConfig(use_kl_loss=True), True),
        (AlgorithmConfig(advantage_estimator="reinforce_plus_plus", normalize_advantages=True, kl_coef=0.1), True),
    ],
)
def test_the_reference_is_held_where_its_log_probs_are_used(algorithm, expected):
    resolved = planned(algorithm=algorithm)
    assert resolved.holds_reference is expected
    assert (resolved.rank_bytes.host_reference > 0) is expected


def test_metrics_go_where_checkpoints_go_unless_told_otherwise(tmp_path):
    assert planned(checkpoint=CheckpointConfig(save=tmp_path)).log_dir == tmp_path
    logging = LoggingConfig(log_dir=tmp_path / "logs")
    assert planned(checkpoint=CheckpointConfig(save=tmp_path), logging=logging).log_dir == tmp_path / "logs"


def test_epochs_become_rollouts_once_the_data_set_is_known():
    resolved = planned(rollout=RolloutConfig(rollout_batch_size=4, num_epoch=3), training=TrainingConfig(global_batch_size=2))
    assert (resolved.with_epochs_of(5).num_rollout, resolved.with_epochs_of(5).num_steps) == (15, 30)
    both = planned(rollout=RolloutConfig(rollout_batch_size=4, num_epoch=3, num_rollout=7))
    assert both.with_epochs_of(5).num_rollout == 7


def test_flags_that_contradict_the_model_are_refused():
    with pytest.raises(ConfigError, match=r"--num-layers \(28\) contradicts"):
        planned(architecture=ArchitectureConfig(num_layers=28))
    cluster, parallel = ClusterConfig(actor_num_gpus_per_node=3), ParallelConfig(tensor_model_parallel_size=3)
    with pytest.raises(ConfigError, match=r"--tensor-model-parallel-size \(3\) does not divide the model's 32 attention heads"):
        planned(cluster=cluster, parallel=parallel)


def test_train_dtype_auto_is_bfloat16_on_gpus_and_float32_elsewhere():
    on_gpus, on_cpus = (plan_run(Config(rollout=BATCH), QWEN3_4B, on_gpus=there) for there in (True, False))
    # One rank keeps a float32 master as a bfloat16 weight and the rest of its bits, which counts to the optimizer.
    of_gpu, of_cpu = on_gpus.rank_bytes, on_cpus.rank_bytes
    assert 2 * of_gpu.weights == of_cpu.weights
    assert of_gpu.weights + of_gpu.optimizer == of_cpu.weights + of_cpu.optimizer
    assert [train_dtype(Config(), on_gpus=there) for there in (True, False)] == ["bfloat16", "float32"]
    assert train_dtype(Config(model=ModelConfig(train_dtype="bfloat16")), on_gpus=False) == "bfloat16"


def test_the_plan_states_the_identities_with_their_numbers():
    config = Config(
        rollout=RolloutConfig(rollout_batch_size=32, n_samples_per_prompt=8, num_rollout=5),
        training=TrainingConfig(global_batch_size=64, micro_batch_size=4),
        cluster=ClusterConfig(actor_num_gpus_per_node=2),
        algorithm=AlgorithmConfig(use_kl_loss=True),
    )
    assert list(plan_lines(config, plan_run(config, QWEN3_4B))) == [
        "rollout_batch_size 32 x n_samples_per_prompt 8 = global_batch_size 64 x num_steps_per_rollout 4",
        "world_size 2 = TP 1 x PP 1 x CP 1 x DP 2",
        "micro-batches: 8 of 4 samples in each step on each of the 2 DP ranks",
        "rollouts: 5",
        "devices: shared by trainer and engines",
        "engines: embedded (the default), 2 engines of 1 device",
        "reference model: held",
        "each trainer rank, without activations: 30 GiB on the device (7.49 weights, 7.49 gradients, 15 optimizer), "
        "3.75 GiB on the host",
        "computation: 24.1 GFLOP a trained token, without attention",
    ]
    packed = Config(rollout=BATCH, training=TrainingConfig(use_dynamic_batch_size=True, max_tokens_per_gpu=100))
    assert "micro-batches: packed up to 100 tokens, the same number on each of the 1 DP ranks" in plan_lines(
        packed, plan_run(packed, QWEN3_4B)
    )


def test_the_plan_of_an_evaluation_states_its_sets_and_nothing_of_training():
    rollout = RolloutConfig(rollout_batch_size=1, rollout_max_response_len=9)
    evaluation = EvalConfig(eval_interval=1, eval_prompt_data=("easy", "e.jsonl"), n_samples_per_eval_prompt=4)
    config = Config(rollout=rollout, evaluation=evaluation)
    assert list(plan_lines(config, plan_run(config, QWEN3_4B, trains=False))) == [
        "evaluation set easy: e.jsonl, 4 responses a prompt",
        "engines: embedded (the default), 1 engine of 1 device",
    ]


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (
            LoraConfig(lora_rank=1025),
            "--lora-rank 1025 is more than the smallest side of k_proj (1024 x 2560); give at most 1024",
        ),
        (
            LoraConfig(lora_rank=2561, target_modules="down_proj"),
            "--lora-rank 2561 is more than the smallest side of down_proj (2560 x 9728); give at most 2560",
        ),
    ],
)
def test_the_rank_of_adapters_is_at_most_that_of_each_projection(lora, message):
    with pytest.raises(ConfigError) as caught:
        plan_run(Config(rollout=BATCH, lora=lora), QWEN3_4B)
    assert str(caught.value) == message
    plan_run(Config(rollout=BATCH, lora=replace(lora, lora_rank=lora.rank - 1)), QWEN3_4B)


@pytest.mark.parametrize(("base", "tp", "fits"), [
    ("fp8", 4, True), ("nf4", 8, True), ("fp8", 8, False),  # 9,728 / 8 = 1,216 = 9.5 x 128 = 19 x 64
])  # fmt: skip
def test_tensor_parallel_ranks_have_whole_blocks_of_a_frozen_model(base, tp, fits):
    parallel = ParallelConfig(tensor_model_parallel_size=tp)
    config = Config(
        rollout=BATCH,
        lora=LoraConfig(lora_rank=8, lora_base=base),
        parallel=parallel,
        cluster=ClusterConfig(actor_num_gpus_per_node=8),
    )
    if fits:
        plan_run(config, QWEN3_4B)
        return
    with pytest.raises(ConfigError) as caught:
        plan_run(config, QWEN3_4B)
    assert str(caught.value) == (
        "--lora-base fp8 has blocks of 128, and --tensor-model-parallel-size 8 cuts gate_proj (9728 x 2560) inside them; "
        "give fewer tensor-parallel ranks, or --lora-base auto"
    )


@pytest.mark.parametrize(("on_gpus", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_the_plan_of_adapters_states_what_is_trained_and_in_which_dtype_the_rest_is(on_gpus, dtype):
    config = Config(rollout=BATCH, lora=LoraConfig(lora_rank=4, lora_alpha=8.0, target_modules="q_proj"))
    # 36 layers x 4 x (4096 + 2560) of 4,022,468,096 parameters.
    assert (
        "LoRA: rank 4, scale 2, kaiming start, at q_proj; 958,464 of 4,022,468,096 parameters are trained (0.02%), "
        f"the others are frozen in {dtype}"
    ) in plan_lines(config, plan_run(config, QWEN3_4B, on_gpus=on_gpus))


@pytest.mark.parametrize(("optimizer", "moments"), [
    ("adam", 8 * 4_022_468_096),
    ("adam8bit", 8_044_936_192 + 125_702_128),  # two bytes, and two scales of 4 bytes for each block of 256
    ("muon", 8 * 4_022_468_096 - 4 * 36 * 100_925_440),  # one moment for the matrices of the layers
])  # fmt: skip
def test_a_rank_holds_the_moments_of_its_optimizer(optimizer, moments):
    section = OptimizerConfig(optimizer=optimizer)
    on_cpu = plan_run(Config(rollout=BATCH, optimizer=section), QWEN3_4B, on_gpus=False).rank_bytes
    assert (on_cpu.weights, on_cpu.optimizer) == (4 * 4_022_468_096, moments)
    on_gpus = plan_run(Config(rollout=BATCH, optimizer=section), QWEN3_4B).rank_bytes
    assert (on_gpus.weights, on_gpus.optimizer) == (2 * 4_022_468_096, 2 * 4_022_468_096 + moments)
