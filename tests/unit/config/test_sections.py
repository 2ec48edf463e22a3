from dataclasses import FrozenInstanceError, fields
from pathlib import Path

import pytest

from qwench.config.config import Config
from qwench.config.sections.algorithm import AlgorithmConfig
from qwench.config.sections.checkpoint import CheckpointConfig
from qwench.config.sections.cluster import ClusterConfig
from qwench.config.sections.critic import CriticConfig
from qwench.config.sections.data import DataConfig
from qwench.config.sections.debug import DebugConfig, ProfilingConfig
from qwench.config.sections.distillation import DistillationConfig
from qwench.config.sections.engine import EngineConfig
from qwench.config.sections.evaluation import EvalConfig
from qwench.config.sections.logging import LoggingConfig
from qwench.config.sections.optimizer import OptimizerConfig
from qwench.config.sections.parallel import ParallelConfig
from qwench.config.sections.reward import RewardConfig
from qwench.config.sections.rollout import AsyncConfig, RolloutConfig
from qwench.config.sections.timeouts import TimeoutConfig
from qwench.config.sections.training import TrainingConfig
from qwench.config.sections.verbs import ServerConfig
from qwench.errors import ConfigError

SECTIONS = (AlgorithmConfig, DebugConfig, EngineConfig, EvalConfig, OptimizerConfig, RewardConfig, RolloutConfig, TimeoutConfig)
PRICED = {"overlong_buffer_len": 8}
SERVED = {"use_opd": True, "opd_type": "sglang"}
LOADED = {"use_opd": True, "opd_type": "megatron", "opd_teacher_load": Path("teacher")}
OF_ENGINE = {"use_rollout_logprobs": True}
REFUSED = [
    (RolloutConfig, {"rollout_temperature": 0.0}, "--rollout-temperature must be greater than 0, got 0.0"),
    (RolloutConfig, {"rollout_temperature": float("nan")}, "--rollout-temperature must be greater than 0"),
    (RolloutConfig, {"rollout_top_p": 1.1}, "--rollout-top-p must be greater than 0 and at most 1"),
    (RolloutConfig, {"rollout_min_p": 1.5}, "--rollout-min-p must be at most 1, got 1.5"),
    (RolloutConfig, {"rollout_top_k": 0}, "--rollout-top-k must be at least 1, or -1"),
    (RolloutConfig, {"rollout_batch_size": 0}, "--rollout-batch-size must be greater than 0, got 0"),
    (RolloutConfig, {"rollouts_ahead": 2}, "--rollouts-ahead must be 0 (in turn) or 1 (one ahead), got 2"),
    (RolloutConfig, {"rollout_batch_size": 8, "over_sampling_batch_size": 4}, "--over-sampling-batch-size (4) is smaller"),
    (RolloutConfig, {"mask_offpolicy_in_partial_rollout": True}, "--mask-offpolicy-in-partial-rollout has no effect"),
    (RolloutConfig, {"custom_generate_function_path": "generate"}, "--custom-generate-function-path must be the import path"),
    (RolloutConfig, {"buffer_filter_path": "my/module.py"}, "--buffer-filter-path must be the import path"),
    (DistillationConfig, {"opd_kl_coef": 0.5}, "--opd-kl-coef has no effect without --use-opd; add it"),
    (DistillationConfig, {"opd_type": "megatron"}, "--opd-type has no effect without --use-opd; add it"),
    (RewardConfig, {"rm_type": "math,math"}, "--rm-type math,math names a reward twice"),
    (
        RewardConfig,
        {"rm_type": "math,f1", "reward_weights": "1"},
        "--reward-weights 1 has 1 weights for 2 rewards",
    ),
    (RewardConfig, {"rm_type": "math", "reward_weights": "1"}, "--reward-weights 1 has 1 weights for 1 rewards"),
    (RewardConfig, {"rm_type": "math,f1", "reward_weights": "1,x"}, "--reward-weights must be numbers as 0.7,0.3, got '1,x'"),
    (RewardConfig, {"rm_type": "math,f1", "reward_key": "maths"}, "--reward-key maths is none of score, math, f1"),
    (
        RewardConfig,
        {"rm_type": "judge", "judge_url": "http://h/v1"},
        "--rm-type judge asks a language model; give --judge-model",
    ),
    (RewardConfig, {"rm_type": "math,f1", "reward_weights": "1,inf"}, "--reward-weights must be finite numbers"),
    (RewardConfig, {"rm_type": "judge"}, "--rm-type judge asks a language model; give --judge-url and --judge-model"),
    (RewardConfig, {"judge_url": "a", "judge_model": "b"}, "--judge-url must begin with http:// or https://, got 'a'"),
    (RewardConfig, {"judge_url": "http://a"}, "--judge-url asks a model of that server; give its name by --judge-model"),
    (RewardConfig, {"second_grader_share": 0.5}, "--second-grader-share has no effect without --second-grader math-verify"),
    (
        RewardConfig,
        {"second_grader": "math-verify", "second_grader_share": 0.0},
        "--second-grader-share must be greater than 0",
    ),
    (DataConfig, {"curriculum_band": (0.5,)}, "--curriculum-band must be two numbers from 0 to 1, the lower first, got 0.5"),
    (
        DataConfig,
        {"curriculum_band": (0.9, 0.1)},
        "--curriculum-band must be two numbers from 0 to 1, the lower first, got 0",
    ),
    (DataConfig, {"curriculum_key": "rate"}, "--curriculum-key has no effect without --curriculum-band LOW HIGH"),
    (RewardConfig, {"judge_model": "b"}, "--judge-model has no effect without --judge-url; give it, or leave both out"),
    (RewardConfig, {"overlong_buffer_len": 0}, "--overlong-buffer-len must be greater than 0, got 0"),
    (RewardConfig, PRICED | {"overlong_penalty_factor": 0.0}, "--overlong-penalty-factor must be greater than 0"),
    (RewardConfig, {"overlong_penalty_factor": 2.0}, "--overlong-penalty-factor has no effect without --overlong-buffer-len"),
    (
        RewardConfig,
        PRICED | {"custom_reward_post_process_path": "a.b"},
        "--overlong-buffer-len lowers rewards that",
    ),
    (DistillationConfig, {"use_opd": True}, "--use-opd needs a teacher; give --opd-type megatron and --opd-teacher-load"),
    (DistillationConfig, {"use_opd": True, "opd_type": "megatron"}, "--opd-type megatron scores with a teacher in the trainer"),
    (DistillationConfig, SERVED | {"opd_teacher_load": Path("t")}, "--opd-teacher-load has no effect with --opd-type sglang"),
    (DistillationConfig, LOADED | {"opd_log_prob_top_k": 2}, "--opd-log-prob-top-k has no effect with --opd-type megatron"),
    (
        DistillationConfig,
        SERVED | {"opd_top_k_strategy": "xor"},
        "--opd-top-k-strategy has no effect without --opd-log-prob-top",
    ),
    (DistillationConfig, SERVED | {"opd_log_prob_top_k": -1}, "--opd-log-prob-top-k"),
    (DistillationConfig, SERVED | {"opd_teacher_urls": ("http://a",)}, "--opd-teacher-urls must be NAME=URL"),
    (
        DistillationConfig,
        SERVED | {"opd_teacher_urls": ("a=http://a", "a=http://b")},
        "--opd-teacher-urls names the teacher",
    ),
    (AsyncConfig, {"max_weight_staleness": 1}, "--max-weight-staleness has no effect without --fully-async; add it"),
    (AsyncConfig, {"async_unused_samples_handler": "retry"}, "--async-unused-samples-handler has no effect without --fully"),
    (AsyncConfig, {"fully_async": True, "max_weight_staleness": -1}, "--max-weight-staleness must not be negative"),
    (AsyncConfig, {"fully_async": True, "async_max_concurrent_samples": 0}, "--async-max-concurrent-samples must be greater"),
    (
        AsyncConfig,
        {"fully_async": True, "async_data_buffer_capacity_factor": 0.5},
        "--async-data-buffer-capacity-factor must be at least 1, got 0.5",
    ),
    (DataConfig, {"rollout_max_prompt_len": 0}, "--rollout-max-prompt-len must be greater than 0"),
    (RewardConfig, {"reward_timeout_s": 0.0}, "--reward-timeout-s must be greater than 0"),
    (RewardConfig, {"rm_type": "boxed_remote_rm"}, "--rm-type remote_rm needs the address"),
    (EvalConfig, {"eval_prompt_data": ("aime",)}, "--eval-prompt-data takes a name and a file for each set, got 1 values"),
    (EvalConfig, {"eval_prompt_data": ("a", "x", "a", "y")}, "--eval-prompt-data names a set twice"),
    (EvalConfig, {"eval_interval": 5}, "--eval-interval needs something to evaluate on"),
    (EvalConfig, {"eval_temperature": -1.0}, "--eval-temperature must not be negative"),
    (AlgorithmConfig, {"eps_clip": 1.0}, "--eps-clip must be less than 1, got 1.0"),
    (AlgorithmConfig, {"advantage_estimator": "cispo", "eps_clip_c": 3.0}, "--eps-clip-c (3.0) has no effect on cispo"),
    (AlgorithmConfig, {"eps_clip_c": 1.0}, "--eps-clip-c must be greater than 1, got 1.0"),
    (AlgorithmConfig, {"kl_coef": 0.1, "kl_loss_coef": 0.2, "use_kl_loss": True}, "--kl-coef (0.1) and --kl-loss-coef (0.2)"),
    (AlgorithmConfig, {"kl_coef": 0.1}, "--kl-coef (0.1) has no effect on grpo; use --use-kl-loss and --kl-loss-coef"),
    (AlgorithmConfig, {"advantage_estimator": "gspo", "kl_coef": 0.1}, "--kl-coef (0.1) has no effect on gspo"),
    (AlgorithmConfig, {"gamma": 0.9}, "--gamma (0.9) has no effect on grpo"),
    (AlgorithmConfig, {"use_unbiased_kl": True}, "--use-unbiased-kl has no effect without --use-kl-loss"),
    (AlgorithmConfig, {"ref_update_interval": 2}, "--ref-update-interval (2) has no effect without a reference"),
    (AlgorithmConfig, {"tis_level": "sequence"}, "--tis-level sequence has no effect without --use-tis; add it"),
    (AlgorithmConfig, {"tis_lower_bound": 0.5, "use_tis": True}, "--tis-lower-bound 0.5 has no effect without --tis-mode clip"),
    (
        AlgorithmConfig,
        {"tis_clip_low": 0.5, "use_tis": True, "tis_mode": "mask"},
        "--tis-clip-low 0.5 has no effect without --use-tis and --tis-mode truncate or icepop",
    ),
    (AlgorithmConfig, {"tis_batch_normalize": True}, "--tis-batch-normalize True has no effect without --use-tis; add it"),
    (
        AlgorithmConfig,
        {"use_tis": True, "tis_level": "geometric", "tis_batch_normalize": True},
        "--tis-batch-normalize has no mean for --tis-level geometric",
    ),
    (AlgorithmConfig, {"rs_veto_threshold": 0.1}, "--rs-veto-threshold 0.1 has no effect without --use-rs; add it"),
    (AlgorithmConfig, {"use_rs": True, **OF_ENGINE}, "--use-rollout-logprobs leaves nothing for --use-rs to correct"),
    (AlgorithmConfig, {"use_rs": True, "rs_lower_bound": 3.0}, "--rs-lower-bound (3) must be less than --rs-upper-bound (2)"),
    (
        AlgorithmConfig,
        {"use_tis": True, "tis_mode": "clip", "tis_lower_bound": 2.0},
        "--tis-lower-bound (2) must be less than --tis-clip (2)",
    ),
    (AlgorithmConfig, {"tis_mode": "icepop"}, "--tis-mode icepop has no effect without --use-tis; add it"),
    (AlgorithmConfig, {"tis_clip": 3.0}, "--tis-clip 3.0 has no effect without --use-tis; add it"),
    (AlgorithmConfig, {"tis_clip_low": 0.5}, "--tis-clip-low 0.5 has no effect without --use-tis and --tis-mode"),
    (AlgorithmConfig, {"opsm_delta": 0.5}, "--opsm-delta 0.5 has no effect without --use-opsm"),
    (AlgorithmConfig, {"advantage_estimator": "rloo", "disable_grpo_std_normalization": True}, "--disable-grpo-std-"),
    (
        AlgorithmConfig,
        {"advantage_estimator": "reinforce_plus_plus", "normalize_advantages": True, "disable_rewards_normalization": True},
        "--disable-rewards-normalization has no effect on reinforce_plus_plus",
    ),
    (AlgorithmConfig, {"kl_loss_coef": 0.2}, "--kl-loss-coef (0.2) has no effect without --use-kl-loss"),
    (AlgorithmConfig, {"use_tis": True, **OF_ENGINE}, "--use-rollout-logprobs leaves nothing for --use-tis to correct"),
    (AlgorithmConfig, {"tis_clip": 2.0, "tis_clip_low": 3.0}, "--tis-clip-low (3.0) is greater than --tis-clip (2.0)"),
    (AlgorithmConfig, {"advantage_estimator": "grp0"}, "unknown --advantage-estimator 'grp0'; known: grpo, gspo"),
    (AlgorithmConfig, {"sapo_tau_pos": 2.0}, "--sapo-tau-pos (2.0) has no effect with --advantage-estimator grpo; it is"),
    (AlgorithmConfig, {"dr_grpo_length": 5}, "--dr-grpo-length (5) has no effect with --advantage-estimator grpo"),
    (AlgorithmConfig, {"advantage_estimator": "gpg", "eps_clip_high": 0.3}, "--eps-clip-high (0.3) has no effect on gpg"),
    (AlgorithmConfig, {"advantage_estimator": "sapo", "eps_clip": 0.3}, "--eps-clip (0.3) has no effect on sapo"),
    (AlgorithmConfig, {"advantage_estimator": "sapo", "sapo_tau_pos": 0.0}, "--sapo-tau-pos must be greater than 0"),
    (AlgorithmConfig, {"advantage_estimator": "gmpo", "eps_clip_c": 3.0}, "--eps-clip-c (3.0) has no effect on gmpo"),
    (
        AlgorithmConfig,
        {"advantage_estimator": "clip_cov", "clip_cov_lb": 6.0},
        "--clip-cov-lb (6.0) must be less than --clip-cov-ub (5.0)",
    ),
    (
        AlgorithmConfig,
        {"advantage_estimator": "dr_grpo", "calculate_per_token_loss": True},
        "--calculate-per-token-loss has no effect with --advantage-estimator dr_grpo, which divides by --dr-grpo-length",
    ),
    (AlgorithmConfig, {"lambd": 0.9}, "--lambd (0.9) has no effect with --advantage-estimator grpo; it is an option of ppo"),
    (AlgorithmConfig, {"advantage_estimator": "ppo", "lambd": 1.5}, "--lambd must be at most 1, got 1.5"),
    (AlgorithmConfig, {"advantage_estimator": "ppo", "value_clip": 0.0}, "--value-clip must be greater than 0"),
    (CriticConfig, {"critic_lr": 0.0}, "--critic-lr must be greater than 0"),
    (CriticConfig, {"num_critic_only_steps": -1}, "--num-critic-only-steps must not be negative"),
    (AlgorithmConfig, {"advantage_estimator": "reinforce_plus_plus"}, "--advantage-estimator reinforce_plus_plus requires"),
    (AlgorithmConfig, {"disable_compute_advantages_and_returns": True}, "--disable-compute-advantages-and-returns is for"),
    (OptimizerConfig, {"lr": 0.0}, "--lr must be greater than 0"),
    (OptimizerConfig, {"lr": float("inf")}, "--lr must be a finite number, got inf"),
    (OptimizerConfig, {"lr": 1e-6, "min_lr": 1e-5}, "--min-lr (1e-05) is greater than --lr (1e-06)"),
    (OptimizerConfig, {"adam_beta2": 1.0}, "--adam-beta2 must be at least 0 and less than 1"),
    (OptimizerConfig, {"optimizer_offload_fraction": 0.5}, "--optimizer-offload-fraction (0.5) needs"),
    (OptimizerConfig, {"overlap_cpu_optimizer_d2h_h2d": True}, "--overlap-cpu-optimizer-d2h-h2d needs --optimizer-cpu-offload"),
    (
        OptimizerConfig,
        {"use_precision_aware_optimizer": True, "exp_avg_sq_dtype": "bf16"},
        "--exp-avg-sq-dtype bf16 rounds away a decay by --adam-beta2 (0.999)",
    ),
    (
        OptimizerConfig,
        {"muon_momentum": 0.9},
        "--muon-momentum has no effect with --optimizer adam; give muon",
    ),
    (OptimizerConfig, {"optimizer": "muon", "muon_momentum": 1.0}, "--muon-momentum must be at least 0 and less than 1, got 1"),
    (OptimizerConfig, {"optimizer": "muon", "optimizer_cpu_offload": True}, "--optimizer-cpu-offload is for --optimizer adam"),
    (OptimizerConfig, {"exp_avg_dtype": "bf16"}, "--exp-avg-dtype bf16 needs --use-precision-aware-optimizer"),
    (
        OptimizerConfig,
        {"use_precision_aware_optimizer": True, "exp_avg_dtype": "bf16", "adam_beta1": 0.999},
        "--exp-avg-dtype bf16 rounds away a decay by --adam-beta1 (0.999)",
    ),
    (OptimizerConfig, {"lr_warmup_fraction": 1.5}, "--lr-warmup-fraction must be at least 0 and less than 1"),
    (
        OptimizerConfig,
        {"lr_warmup_fraction": 0.1, "lr_warmup_iters": 3},
        "--lr-warmup-fraction (0.1) and --lr-warmup-iters (3)",
    ),
    (TrainingConfig, {"use_dynamic_batch_size": True}, "--use-dynamic-batch-size packs by tokens; give the budget"),
    (TrainingConfig, {"max_tokens_per_gpu": 8}, "--max-tokens-per-gpu has no effect without --use-dynamic-batch-size"),
    (TrainingConfig, {"log_probs_chunk_size": 0}, "--log-probs-chunk-size must be greater than 0"),
    (ParallelConfig, {"context_parallel_size": 0}, "--context-parallel-size must be greater than 0"),
    (ClusterConfig, {"actor_num_nodes": 0}, "--actor-num-nodes must be greater than 0"),
    (ClusterConfig, {"train_env_vars": {"A": 1}}, "--train-env-vars must map names to texts, got 1 for A"),
    (ClusterConfig, {"launcher": "local", "actor_num_nodes": 2}, "--launcher local knows this machine only"),
    (ClusterConfig, {"rollout_num_gpus_per_engine": 16}, "--rollout-num-gpus-per-engine (16) is more than --num-gpus"),
    (ClusterConfig, {"rollout_num_gpus": -1}, "--rollout-num-gpus must not be negative"),
    (EngineConfig, {"rollout_external_engine_addrs": ("node1",)}, "--rollout-external-engine-addrs must be host:port"),
    (EngineConfig, {"engine_start_timeout": 0.0}, "--engine-start-timeout must be greater than 0"),
    (EngineConfig, {"engine_start_timeout": 1e9}, "--engine-start-timeout must be at most 1e+08 seconds, got 1000000000.0"),
    (RewardConfig, {"reward_timeout_s": 1e30}, "--reward-timeout-s must be at most 1e+08 seconds"),
    (ProfilingConfig, {"profile_step_start": 12}, "--profile-step-start (12) must be less than --profile-step-end (12)"),
    (ProfilingConfig, {"profile_target": ("train_overall", "train_actor")}, "--profile-target train_overall traces the other"),
    *(
        (ProfilingConfig, {"memory_snapshot_path": Path(path)}, f"--memory-snapshot-path {path} must be the name of a file")
        for path in ("a/b", "/", ".")
    ),
    (TimeoutConfig, {"rollout_timeout": 1e30}, "--rollout-timeout must be at most 1e+08 seconds"),
    (TimeoutConfig, {"train_timeout": -1.0}, "--train-timeout must be greater than 0"),
    (TimeoutConfig, {"distributed_timeout_minutes": 1e7}, "--distributed-timeout-minutes must be from 1 second to 3 years"),
    (TimeoutConfig, {"distributed_timeout_minutes": 0.01}, "--distributed-timeout-minutes must be from 1 second to 3 years"),
    (EngineConfig, {"embedded_mem_fraction": 0.0}, "--embedded-mem-fraction must be greater than 0 and at most 1"),
    (CheckpointConfig, {"save_interval": 5}, "--save-interval (5) has no effect without a folder to save to; give --save"),
    (CheckpointConfig, {"ckpt_step": 5}, "--ckpt-step (5) picks a checkpoint of --load"),
    (LoggingConfig, {"use_wandb": True}, "--use-wandb needs a project"),
    (DebugConfig, {"debug_rollout_only": True, "debug_train_only": True}, "--debug-rollout-only leaves no trainer"),
    (ServerConfig, {"port": 0}, "--port must be greater than 0"),
    (ServerConfig, {"lora": ("law",)}, "--lora takes NAME=FOLDER, each name once; got law"),
    (ServerConfig, {"lora": ("a=b", "a=c")}, "--lora takes NAME=FOLDER, each name once; got a=b a=c"),
]


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 1e39], ids=str)
@pytest.mark.parametrize("section", SECTIONS)
def test_no_number_of_any_section_may_be_infinite(section, value):
    for item in fields(section):
        if item.type in ("float", "float | None"):
            with pytest.raises(ConfigError, match="--" + item.name.replace("_", "-")):
                section(**{item.name: value})


@pytest.mark.parametrize(("section", "values", "message"), REFUSED, ids=[f"{s.__name__}-{'-'.join(v)}" for s, v, _ in REFUSED])
def test_a_section_refuses_values_that_cannot_be_meant_and_quotes_the_flag(section, values, message):
    with pytest.raises(ConfigError) as caught:
        section(**values)
    assert str(caught.value).startswith(message)


AT_THE_EDGE = [
    (
        RolloutConfig,
        {
            "rollout_top_p": 1.0,
            "rollout_top_k": 1,
            "rollout_batch_size": 8,
            "over_sampling_batch_size": 8,
            "rollout_min_new_tokens": 0,
        },
    ),
    (
        AlgorithmConfig,
        {"eps_clip_c": 1.01, "kl_coef": 0.0, "use_kl_loss": True, "kl_loss_coef": 0.1, "use_unbiased_kl": True},
    ),
    (AlgorithmConfig, {"use_tis": True, "tis_clip_low": 2.0, "custom_tis_function_path": "a.b"}),
    (AlgorithmConfig, {"custom_tis_function_path": "a.b", "get_mismatch_metrics": True}),
    (
        AlgorithmConfig,
        {"advantage_estimator": "reinforce_plus_plus_baseline", "normalize_advantages": True, "kl_coef": 0.1},
    ),
    (
        AlgorithmConfig,
        {
            "advantage_estimator": "cispo",
            "eps_clip": 1.0,
            "eps_clip_high": 4.0,
            "get_mismatch_metrics": True,
            "tis_mode": "icepop",
        },
    ),
    (EvalConfig, {"eval_interval": 1, "eval_prompt_data": ("a", "x", "b", "x"), "eval_temperature": 0.0}),
    (OptimizerConfig, {"lr": 1e-6, "min_lr": 1e-6, "lr_warmup_fraction": 0.0, "clip_grad": 0.0}),
    (
        OptimizerConfig,
        {"optimizer_cpu_offload": True, "overlap_cpu_optimizer_d2h_h2d": True, "optimizer_offload_fraction": 0.1},
    ),
    (OptimizerConfig, {"use_precision_aware_optimizer": True}),
    (
        OptimizerConfig,
        {"use_precision_aware_optimizer": True, "adam_beta2": 0.99, "exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "bf16"},
    ),
    (TrainingConfig, {"use_dynamic_batch_size": True, "max_tokens_per_gpu": 1, "log_probs_chunk_size": -1}),
    (RewardConfig, {"rm_type": "remote_rm", "rm_url": "http://127.0.0.1:1", "custom_rm_path": "module.function"}),
]


@pytest.mark.parametrize(("section", "values"), AT_THE_EDGE, ids=[f"{s.__name__}-{'-'.join(v)}" for s, v in AT_THE_EDGE])
def test_a_section_keeps_values_at_the_edge(section, values):
    made = section(**values)
    assert {name: getattr(made, name) for name in values} == values


def test_nothing_writes_to_a_configuration():
    with pytest.raises(FrozenInstanceError):
        Config().optimizer.lr = 1.0


def test_facts_that_sections_know_of_themselves():
    assert AlgorithmConfig(use_kl_loss=True).needs_reference
    assert AlgorithmConfig(advantage_estimator="reinforce_plus_plus", normalize_advantages=True, kl_coef=0.1).needs_reference
    assert not AlgorithmConfig().needs_reference
    assert not AlgorithmConfig(loss_type="sft_loss").needs_reference
    assert TrainingConfig(recompute_granularity="full").recomputes_layers
    assert TrainingConfig(gradient_checkpointing=True).recomputes_layers
    assert not TrainingConfig(recompute_granularity="selective").recomputes_layers
    assert TrainingConfig(recompute_granularity="full").recomputes("mlp")
    assert TrainingConfig(recompute_granularity="selective", recompute_modules=("mlp",)).recomputes("mlp")
    assert not TrainingConfig(recompute_granularity="selective").recomputes("mlp")
    assert ClusterConfig(actor_num_nodes=2, actor_num_gpus_per_node=4).world_size == 8
    assert not ClusterConfig(rollout_num_gpus=2).shares_devices
    assert ClusterConfig(rollout_num_gpus=2, colocate=True).shares_devices
    assert ParallelConfig(tensor_model_parallel_size=2, context_parallel_size=3).layout.model_ranks == 6


INERT_IN_FINE_TUNING = {
    "advantage_estimator": "gspo",
    "eps_clip": 0.1,
    "eps_clip_high": 0.3,
    "eps_clip_c": 3.0,
    "dr_grpo_length": 8,
    "sapo_tau_pos": 2.0,
    "sapo_tau_neg": 2.0,
    "clip_cov_ratio": 0.1,
    "clip_cov_lb": 0.5,
    "clip_cov_ub": 6.0,
    "kl_cov_ratio": 0.1,
    "kl_cov_coef": 0.5,
    "kl_coef": 0.1,
    "use_kl_loss": True,
    "kl_loss_coef": 0.1,
    "kl_loss_type": "k3",
    "use_unbiased_kl": True,
    "ref_update_interval": 2,
    "entropy_coef": 0.1,
    "disable_rewards_normalization": True,
    "disable_grpo_std_normalization": True,
    "normalize_advantages": True,
    "gamma": 0.9,
    "lambd": 0.9,
    "value_clip": 0.3,
    "use_tis": True,
    "tis_mode": "icepop",
    "tis_clip": 3.0,
    "tis_clip_low": 0.1,
    "tis_level": "sequence",
    "tis_lower_bound": 0.1,
    "tis_batch_normalize": True,
    "use_rs": True,
    "rs_level": "sequence",
    "rs_lower_bound": 0.1,
    "rs_upper_bound": 3.0,
    "rs_veto_threshold": 0.1,
    "use_rollout_logprobs": True,
    "get_mismatch_metrics": True,
    "use_opsm": True,
    "opsm_delta": 0.1,
    "custom_tis_function_path": "a.b",
    "custom_pg_loss_reducer_function_path": "a.b",
    "custom_loss_function_path": "a.b",
    "skip_actor_forward_only": True,
    "keep_old_actor": True,
    "use_rollout_entropy": True,
}


@pytest.mark.parametrize("name", INERT_IN_FINE_TUNING)
def test_flags_of_reinforcement_learning_are_refused_by_name_in_fine_tuning(name):
    flag = "--" + name.replace("_", "-")
    with pytest.raises(ConfigError, match=f"^{flag} has no effect with --loss-type sft_loss"):
        AlgorithmConfig(loss_type="sft_loss", **{name: INERT_IN_FINE_TUNING[name]})


def test_every_flag_of_the_algorithm_is_used_or_refused_in_fine_tuning():
    used = {"loss_type", "calculate_per_token_loss", "disable_compute_advantages_and_returns", "observe_training_entropy"}
    assert {item.name for item in fields(AlgorithmConfig)} == used | INERT_IN_FINE_TUNING.keys()
    AlgorithmConfig(loss_type="sft_loss", calculate_per_token_loss=True, observe_training_entropy=True)
