"""What sections answer about themselves."""

from pathlib import Path

import pytest

from qwench.config.layout import ParallelLayout
from qwench.config.sections.agent import AgentConfig
from qwench.config.sections.algorithm import AlgorithmConfig
from qwench.config.sections.checkpoint import CheckpointConfig
from qwench.config.sections.convert import ConvertConfig
from qwench.config.sections.data import DataConfig
from qwench.config.sections.debug import DebugConfig
from qwench.config.sections.distillation import DistillationConfig
from qwench.config.sections.engine import EngineConfig
from qwench.config.sections.evaluation import EvalConfig
from qwench.config.sections.foreign import ForeignConfig
from qwench.config.sections.logging import LoggingConfig
from qwench.config.sections.lora import LoraConfig
from qwench.config.sections.optimizer import OptimizerConfig
from qwench.config.sections.parallel import ParallelConfig
from qwench.config.sections.reward import RewardConfig
from qwench.config.sections.rollout import RolloutConfig
from qwench.config.sections.timeouts import TimeoutConfig
from qwench.config.sections.training import TrainingConfig
from qwench.config.sections.verbs import ServerConfig, split_file
from qwench.errors import ConfigError

SETS = {"eval_prompt_data": ("a", "a.jsonl")}
SERVERS = DistillationConfig(use_opd=True, opd_type="sglang", opd_teacher_urls=("a=http://x/?k=1", "b=https://y"))
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize(
    ("fact", "section", "value"),
    [
        ("served_at", AgentConfig(), ("127.0.0.1", 0)),
        *(("served_at", AgentConfig(session_server_port=(port,)), ("127.0.0.1", port)) for port in (0, 65_535)),
        ("served_at", AgentConfig(session_server_ip="10.0.0.1", session_server_port=(8000,)), ("10.0.0.1", 8000)),
        ("early_stopping", CheckpointConfig(save=Path("run"), save_retain_interval=7), None),
        ("early_stopping", CheckpointConfig(save=Path("run"), save_retain_interval=8, save_interval=4), None),
        (
            "layout",
            ParallelConfig(
                tensor_model_parallel_size=2,
                pipeline_model_parallel_size=3,
                context_parallel_size=4,
                decoder_first_pipeline_num_layers=5,
                decoder_last_pipeline_num_layers=6,
            ),
            ParallelLayout(tp=2, pp=3, cp=4, sequence_parallel=True, first_stage_layers=5, last_stage_layers=6),
        ),
        ("layout", ParallelConfig(), ParallelLayout()),
        ("prometheus_port", LoggingConfig(use_prometheus=True, prometheus_port=1), 1),
        ("rollout_min_p", RolloutConfig(rollout_min_p=1.0), 1.0),
        ("custom_config_path", ForeignConfig(custom_config_path=Path("a.yaml")), Path("a.yaml")),
        (
            "adam_beta1",
            OptimizerConfig(use_precision_aware_optimizer=True, exp_avg_dtype="bf16", adam_beta1=1 - 2.0**-8),
            1 - 2.0**-8,
        ),
        ("takes_entropy", AlgorithmConfig(), False),
        ("takes_entropy", AlgorithmConfig(entropy_coef=-0.1), True),
        ("takes_entropy", AlgorithmConfig(observe_training_entropy=True), True),
        ("has_critic", AlgorithmConfig(), False),
        ("has_critic", AlgorithmConfig(advantage_estimator="ppo"), True),
        ("tis_bounds", AlgorithmConfig(use_tis=True, tis_clip=4.0, tis_clip_low=0.125), (0.125, 4.0)),
        ("tis_bounds", AlgorithmConfig(use_tis=True, tis_clip=4.0, tis_mode="clip"), (0.25, 4.0)),
        ("tis_bounds", AlgorithmConfig(use_tis=True, tis_clip=4.0, tis_mode="mask"), (0.25, 4.0)),
        ("tis_bounds", AlgorithmConfig(use_tis=True, tis_clip=4.0, tis_mode="clip", tis_lower_bound=0.5), (0.5, 4.0)),
        ("rs_bounds", AlgorithmConfig(use_rs=True, tis_clip=4.0), (0.25, 4.0)),
        ("rs_bounds", AlgorithmConfig(use_rs=True, tis_clip=4.0, tis_lower_bound=0.5), (0.5, 4.0)),
        ("rs_bounds", AlgorithmConfig(use_rs=True, rs_lower_bound=0.75, rs_upper_bound=3.0), (0.75, 3.0)),
        ("early_stopping", CheckpointConfig(), None),
        (
            "early_stopping",
            CheckpointConfig(save=Path("s"), keep_best=True, early_stopping_patience=2),
            "--early-stopping-patience 2",
        ),
        ("brings_prompts", DataConfig(), False),
        ("brings_prompts", DataConfig(disable_rollout_global_dataset=True), True),
        ("brings_prompts", DataConfig(data_source_path="a.b"), True),
        ("records", DebugConfig(), {}),
        (
            "records",
            DebugConfig(
                save_debug_rollout_data="r-{rollout_id}",
                save_debug_train_data="t-{rollout_id}",
                save_debug_trajectory_data="m-{rollout_id}",
            ),
            {
                "--save-debug-rollout-data": "r-{rollout_id}",
                "--save-debug-train-data": "t-{rollout_id}",
                "--save-debug-trajectory-data": "m-{rollout_id}",
            },
        ),
        ("teacher_flag", DistillationConfig(), "--rm-url"),
        ("teacher_flag", SERVERS, "--opd-teacher-urls"),
        ("kind", EngineConfig(), "embedded"),
        ("kind", EngineConfig(rollout_engine="sglang"), "sglang"),
        ("names_adapters", EngineConfig(), False),
        ("names_adapters", EngineConfig(rollout_engine="sglang"), True),
        ("names_adapters", EngineConfig(update_weight_transport="disk"), True),
        ("routes_requests", EngineConfig(), False),
        ("routes_requests", EngineConfig(use_sglang_router=True), True),
        ("routes_requests", EngineConfig(router_args=("--policy", "random")), True),
        ("is_beside", EvalConfig(), False),
        ("is_beside", EvalConfig(**SETS, eval_low_priority=True), True),
        ("is_beside", EvalConfig(**SETS, eval_num_gpus=1), True),
        ("key_flags", EvalConfig(), {"input_key": "--input-key", "label_key": "--label-key"}),
        ("key_flags", EvalConfig(eval_input_key="q"), {"input_key": "--eval-input-key", "label_key": "--label-key"}),
        ("key_flags", EvalConfig(eval_label_key="a"), {"input_key": "--input-key", "label_key": "--eval-label-key"}),
        (
            "key_flags",
            EvalConfig(eval_label_key="a", eval_config=Path("sets.yaml")),
            {"input_key": "--input-key or --eval-config", "label_key": "--eval-label-key or --eval-config"},
        ),
        ("has_sets", EvalConfig(), False),
        ("has_sets", EvalConfig(**SETS), True),
        ("has_sets", EvalConfig(eval_config=Path("sets.yaml")), True),
        ("megatron_hooks", ForeignConfig(custom_advantage_function_path="a.b"), ()),
        (
            "megatron_hooks",
            ForeignConfig(custom_megatron_init_path="a.b", custom_megatron_post_save_hook_path="a.c"),
            ("--custom-megatron-init-path", "--custom-megatron-post-save-hook-path"),
        ),
        ("enabled", LoraConfig(), False),
        ("enabled", LoraConfig(lora_rank=0), False),
        ("enabled", LoraConfig(lora_rank=1), True),
        ("rank", LoraConfig(), 0),
        ("alpha", LoraConfig(lora_rank=8), 16.0),
        ("alpha", LoraConfig(lora_rank=8, lora_alpha=0.5), 0.5),
        ("scale", LoraConfig(lora_rank=8, lora_alpha=4.0), 0.5),
        ("scale", LoraConfig(lora_rank=16, lora_alpha=4.0, use_rslora=True), 1.0),
        ("targets", LoraConfig(lora_rank=8), ALL_LINEAR),
        (
            "targets",
            LoraConfig(lora_rank=8, exclude_modules="up_proj,k_proj"),
            ALL_LINEAR[:1] + ALL_LINEAR[2:5] + ALL_LINEAR[6:],
        ),
        ("targets", LoraConfig(lora_rank=8, target_modules="v_proj,q_proj"), ("q_proj", "v_proj")),
        ("offloaded_share", OptimizerConfig(), 0.0),
        ("offloaded_share", OptimizerConfig(optimizer_cpu_offload=True), 1.0),
        ("offloaded_share", OptimizerConfig(optimizer_cpu_offload=True, optimizer_offload_fraction=0.25), 0.25),
        ("truncation_flag", RolloutConfig(), None),
        ("truncation_flag", RolloutConfig(rollout_top_p=0.5), "--rollout-top-p 0.5"),
        ("truncation_flag", RolloutConfig(rollout_top_k=1), "--rollout-top-k 1"),
        ("truncation_flag", RolloutConfig(rollout_min_p=0.1), "--rollout-min-p 0.1"),
        ("freezing_flag", TrainingConfig(), None),
        ("freezing_flag", TrainingConfig(freeze_params_name_list=("a",)), "--freeze-params-name-list"),
        ("freezing_flag", TrainingConfig(only_train_params_name_list=("a",)), "--only-train-params-name-list"),
        ("head_chunk_tokens", TrainingConfig(), 4096),
        ("head_chunk_tokens", TrainingConfig(log_probs_chunk_size=7), 7),
        ("batch_invariant", TrainingConfig(), False),
        ("batch_invariant", TrainingConfig(batch_invariant_mode=True), True),
        ("batch_invariant", TrainingConfig(true_on_policy_mode=True), True),
        ("adapters", ServerConfig(lora=("a=b", "c=d=e")), {"a": Path("b"), "c": Path("d=e")}),
    ],
)
def test_a_fact_of_a_section(fact, section, value):
    assert getattr(section, fact) == value


def test_teachers_have_their_urls_and_the_one_without_a_name_that_of_the_reward():
    assert SERVERS.teacher_urls("http://r") == {"a": "http://x/?k=1", "b": "https://y"}
    lone = DistillationConfig(use_opd=True, opd_type="sglang")
    assert (list(lone.teacher_urls("http://r").values()), lone.teacher_urls(None)) == (["http://r"], {})
    assert DistillationConfig().teacher_urls("http://r") == {}


def test_checkpoints_are_numbered_by_what_was_learned_or_by_the_last_rollout():
    assert CheckpointConfig().number(3) == 3
    assert CheckpointConfig(save=Path("s"), save_numbering="last").number(3) == 2


def test_parameters_are_frozen_by_the_names_that_match_or_by_those_that_do_not():
    for section, trained in (
        (TrainingConfig(), [True, True]),
        (TrainingConfig(freeze_params_name_list=("layers.0", "norm")), [False, True]),
        (TrainingConfig(only_train_params_name_list=("layers.0", "norm")), [True, False]),
    ):
        assert [section.trains(name) for name in ("model.layers.0.mlp", "model.layers.1.mlp")] == trained


def test_weight_decay_acts_on_matrices_and_where_it_is_asked_on_norms_of_queries_and_keys():
    norms = ["a.q_norm.weight", "a.k_norm.weight", "a.q_layernorm.weight", "a.k_layernorm.weight"]
    for section, decayed in ((OptimizerConfig(), False), (OptimizerConfig(apply_wd_to_qk_layernorm=True), True)):
        assert [section.decays(name, 1) for name in norms] == [decayed] * 4
        assert (section.decays("a.q_proj.weight", 2), section.decays("norm.weight", 1)) == (True, False)


@pytest.mark.parametrize(
    ("given", "left_out", "rewards"),
    [
        (("math,f1,gpqa", "1,2,0.5", "math"), {"f1"}, ("math,gpqa", "1.0,0.5", "math")),
        (("math,f1,gpqa", "1,2,0.5", "f1"), {"f1"}, ("math,gpqa", "1.0,0.5", None)),
        (("math,f1,gpqa", "1,2,0.5", "score"), {"f1"}, ("math,gpqa", "1.0,0.5", "score")),
        (("math,f1", "1,2", "math"), {"f1"}, ("math", None, None)),
        (("math,f1", None, "score"), {"f1"}, ("math", None, "score")),
        (("math,f1", "1,2", "score"), {"math", "f1"}, ("none", None, None)),
        (("math,f1", None, None), set(), ("math,f1", None, None)),
    ],
)
def test_rewards_are_left_out_with_their_weights_and_a_single_one_counts_whole(given, left_out, rewards):
    rm_type, weights, key = given
    section = RewardConfig(rm_type=rm_type, reward_weights=weights, reward_key=key)
    kept = section.without(left_out.__contains__, otherwise="none")
    assert (kept.rm_type, kept.reward_weights, kept.reward_key) == rewards


def test_a_deadline_of_collectives_is_from_a_second_to_three_years():
    for minutes in (1 / 60, 1e8 / 60):
        assert TimeoutConfig(distributed_timeout_minutes=minutes).distributed_timeout_minutes == minutes
    for minutes in (0.99 / 60, 1.01e8 / 60):
        with pytest.raises(ConfigError, match="--distributed-timeout-minutes must be from 1 second to 3 years"):
            TimeoutConfig(distributed_timeout_minutes=minutes)


def test_two_weights_are_given_for_two_rewards_and_a_single_reward_has_any_key():
    assert RewardConfig(rm_type="math,f1", reward_weights="1,2").weights_of(("math", "f1")) == (1.0, 2.0)
    assert RewardConfig(rm_type="remote_rm", rm_url="http://r", reward_key="mine").reward_key == "mine"


@pytest.mark.parametrize("flag", ["adam_beta1", "adam_beta2"])
def test_a_decay_rate_of_moments_is_below_one(flag):
    for value in (-0.1, 1.0):
        with pytest.raises(ConfigError) as refused:
            OptimizerConfig(**{flag: value})
        assert str(refused.value) == f"--{flag.replace('_', '-')} must be at least 0 and less than 1, got {value}"


def test_what_makes_up_a_layout():
    section = ParallelConfig(
        tensor_model_parallel_size=2, pipeline_model_parallel_size=3, context_parallel_size=5, sequence_parallel=True
    )
    layout = section.layout
    assert (layout.tp, layout.pp, layout.cp, layout.sequence_parallel) == (2, 3, 5, True)


def test_a_call_for_help_needs_no_file():
    for word in ("-h", "--help", "--help-all"):
        assert split_file(["--rm-type", "math", word]) == (Path(), ["--rm-type", "math", word])
    assert split_file(["a.jsonl", "--help"]) == (Path("a.jsonl"), ["--help"])
    with pytest.raises(ConfigError, match="a file is missing; usage: qwench reward check FILE"):
        split_file(["--rm-type", "math"])


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ({"to": "fp8"}, None), ({"to": "hf", "verify": True}, None), ({"to": "lora", "lora_rank": 2}, None),
        ({"to": "lora"}, "--to lora and --lora-rank go together: the rank is that of the adapter to write"),
        ({"to": "hf", "lora_rank": 2}, "--to lora and --lora-rank go together: the rank is that of the adapter to write"),
        ({"to": "fp8", "verify": True}, "--verify compares logits bit by bit, and those of --to fp8 are others; leave it out"),
        ({"to": "lora", "lora_rank": 2, "verify": True}, "--verify compares logits bit by bit, and those of --to lora are"),
    ],
)  # fmt: skip
def test_a_conversion_has_a_rank_for_an_adapter_and_equal_logits_to_verify(flags, problem):
    places = {"input": Path("a"), "output": Path("b")}
    if problem is None:
        assert ConvertConfig(**places, **flags).to == flags["to"]
        return
    with pytest.raises(ConfigError) as refused:
        ConvertConfig(**places, **flags)
    assert str(refused.value).startswith(problem)
