import inspect
from dataclasses import replace
from pathlib import Path

import pytest

from qwench.config import engine_choice, method_rules, rules
from qwench.config.config import Config
from qwench.config.rules import RULES, check_rules
from qwench.config.sections.algorithm import AlgorithmConfig
from qwench.config.sections.checkpoint import CheckpointConfig
from qwench.config.sections.cluster import ClusterConfig
from qwench.config.sections.debug import DebugConfig, ProfilingConfig
from qwench.config.sections.distillation import DistillationConfig
from qwench.config.sections.engine import EngineConfig
from qwench.config.sections.evaluation import EvalConfig
from qwench.config.sections.foreign import ForeignConfig
from qwench.config.sections.logging import LoggingConfig
from qwench.config.sections.model import ModelConfig
from qwench.config.sections.optimizer import OptimizerConfig
from qwench.config.sections.parallel import ParallelConfig
from qwench.config.sections.reward import RewardConfig
from qwench.config.sections.rollout import SFT_ROLLOUT, AsyncConfig, RolloutConfig
from qwench.config.sections.training import TrainingConfig
from qwench.errors import ConfigError


def in_megatron(optimizer: str) -> dict[str, object]:
    sections = {"training": TrainingConfig(train_backend="megatron")}
    return sections | {"optimizer": OptimizerConfig(optimizer=optimizer)}


EIGHT = ClusterConfig(actor_num_gpus_per_node=8)
FSDP = TrainingConfig(train_backend="fsdp")
MEGATRON = TrainingConfig(train_backend="megatron")

ONE_STEP = RolloutConfig(rollout_batch_size=8, n_samples_per_prompt=4)
REFUSED = [
    ({"debug": DebugConfig(save_debug_rollout_data="a.jsonl")}, "--save-debug-rollout-data must contain {rollout_id}"),
    ({"evaluation": EvalConfig(eval_num_gpus=1)}, "--eval-num-gpus 1 needs --fully-async"),
    (
        {
            "evaluation": EvalConfig(eval_num_gpus=1, eval_prompt_data=("a", "b")),
            "asynchronous": AsyncConfig(fully_async=True, max_weight_staleness=1),
            "cluster": ClusterConfig(),
        },
        "--eval-num-gpus 1 needs engines on GPUs of their own",
    ),
    ({"evaluation": EvalConfig(eval_low_priority=True)}, "--eval-low-priority needs --fully-async"),
    (
        {
            "evaluation": EvalConfig(eval_low_priority=True, eval_prompt_data=("a", "b")),
            "asynchronous": AsyncConfig(fully_async=True, max_weight_staleness=1),
            "engine": EngineConfig(rollout_engine="sglang", sglang_args=("--schedule-low-priority-values-first",)),
        },
        "--eval-low-priority cannot go with --sglang-schedule-low-priority-values-first",
    ),
    (
        {"foreign": ForeignConfig(custom_update_weight_post_write_path="a.b")},
        "--custom-update-weight-post-write-path sees files that only --update-weight-transport disk writes, got nccl",
    ),
    (
        {
            "foreign": ForeignConfig(custom_update_weight_post_write_path="a.b"),
            "engine": EngineConfig(update_weight_transport="disk"),
        },
        "--custom-update-weight-post-write-path has no effect on the embedded engine of this process",
    ),
    (
        {"foreign": ForeignConfig(custom_megatron_init_path="a.b"), "training": FSDP},
        "--custom-megatron-init-path needs --train-backend megatron",
    ),
    (
        {
            "algorithm": AlgorithmConfig(skip_actor_forward_only=True),
            "rollout": ONE_STEP,
            "training": TrainingConfig(global_batch_size=8),
        },
        "--skip-actor-forward-only needs one step for each rollout, but there are 4",
    ),
    (
        {"algorithm": AlgorithmConfig(keep_old_actor=True, use_rollout_logprobs=True)},
        "--keep-old-actor has no effect with --use-rollout-logprobs",
    ),
    (
        {"algorithm": AlgorithmConfig(keep_old_actor=True, skip_actor_forward_only=True)},
        "--keep-old-actor needs the old log-probs",
    ),
    (
        {
            "algorithm": AlgorithmConfig(skip_actor_forward_only=True),
            "distillation": DistillationConfig(use_opd=True, opd_type="megatron", opd_teacher_load=Path("t")),
        },
        "--use-opd needs the old log-probs",
    ),
    ({"parallel": ParallelConfig(expert_model_parallel_size=2)}, "--expert-model-parallel-size must be 1, got 2"),
    ({"parallel": ParallelConfig(expert_tensor_parallel_size=2)}, "--expert-tensor-parallel-size must be 1, got 2"),
    (
        {"parallel": ParallelConfig(tensor_model_parallel_size=2), "cluster": EIGHT, "training": FSDP},
        "--tensor-model-parallel-size 2 needs --train-backend megatron",
    ),
    (
        {"parallel": ParallelConfig(pipeline_model_parallel_size=2), "cluster": EIGHT, "training": FSDP},
        "--pipeline-model-parallel-size 2 needs --train-backend megatron",
    ),
    (
        {"parallel": ParallelConfig(context_parallel_size=2), "cluster": EIGHT, "training": FSDP},
        "--context-parallel-size 2 needs --train-backend megatron",
    ),
    ({"parallel": ParallelConfig(tensor_model_parallel_size=3), "cluster": EIGHT}, "--tensor-model-parallel-size 3 (3 ranks"),
    ({"training": MEGATRON, "model": ModelConfig(attn_implementation="varlen")}, "--attn-implementation varlen needs"),
    ({"training": MEGATRON, "parallel": ParallelConfig(dp_replicate=2), "cluster": EIGHT}, "--dp-replicate 2 needs"),
    (
        {"training": TrainingConfig(train_backend="megatron", whole_weights=True), "cluster": EIGHT},
        "--whole-weights needs --train-backend fsdp",
    ),
    ({"training": TrainingConfig(train_backend="megatron", torch_compile=True)}, "--torch-compile needs --train-backend fsdp"),
    (in_megatron("adam8bit"), "--optimizer adam8bit needs --train-backend fsdp"),
    ({"training": TrainingConfig(transformer_impl="transformer_engine")}, "--transformer-impl transformer_engine needs"),
    ({"parallel": ParallelConfig(dp_replicate=3), "cluster": EIGHT}, "--dp-replicate 3 does not divide the 8"),
    (
        {"model": ModelConfig(hf_checkpoint=Path("m")), "checkpoint": CheckpointConfig(save=Path("r"), save_hf="m")},
        "--save-hf m would replace --hf-checkpoint m",
    ),
    (
        {"checkpoint": CheckpointConfig(save=Path("run"), save_hf="x/../run")},
        "--save and --save-hf name the same folder, run; give --save-hf one of its own",
    ),
    (
        {"checkpoint": CheckpointConfig(save=Path("hf/0/run"), save_hf="hf/{rollout_id}")},
        "--save-hf hf/{rollout_id} would replace --save hf/0/run",
    ),
    (
        {"checkpoint": CheckpointConfig(save=Path("r"), save_hf="hf"), "logging": LoggingConfig(log_dir=Path("hf/log"))},
        "--save-hf hf would replace --log-dir hf/log",
    ),
    (
        {
            "checkpoint": CheckpointConfig(save=Path("r"), save_hf="hf"),
            "debug": DebugConfig(save_debug_rollout_data="hf/{rollout_id}.jsonl"),
        },
        "--save-hf hf would replace --save-debug-rollout-data hf",
    ),
    (
        {"checkpoint": CheckpointConfig(save=Path("r"), keep_best=True)},
        "--keep-best compares results of evaluations, and there are none; give --eval-prompt-data NAME FILE",
    ),
    (
        {
            "checkpoint": CheckpointConfig(save=Path("r"), keep_best=True, early_stopping_patience=2),
            "evaluation": EvalConfig(eval_prompt_data=("a", "a.jsonl")),
        },
        "--early-stopping-patience counts evaluations during the run, and there are none; give --eval-interval",
    ),
    (
        {
            "profiling": ProfilingConfig(use_pytorch_profiler=True),
            "rollout": RolloutConfig(num_rollout=10, rollout_batch_size=4),
        },
        "--profile-step-start (10) leaves nothing to trace: a start has 10 rollouts, counted from 0; give a smaller number",
    ),
    ({"logging": LoggingConfig(use_tensorboard=True)}, "--use-tensorboard has no folder to write to; give --log-dir or --save"),
    ({"training": TrainingConfig(recompute_granularity="selective")}, "--recompute-granularity selective needs"),
    ({"training": TrainingConfig(recompute_granularity="full", recompute_method="block")}, "--train-backend fsdp recomputes"),
    ({"training": TrainingConfig(recompute_granularity="full", recompute_num_layers=2)}, "--train-backend fsdp recomputes"),
    ({"training": TrainingConfig(recompute_method="uniform")}, "--recompute-method and --recompute-num-layers have no effect"),
    (
        {"rollout": RolloutConfig(rollout_max_response_len=64, rollout_max_context_len=64)},
        "--rollout-max-response-len (64) leaves no room for the prompt in --rollout-max-context-len (64)",
    ),
    (
        {"rollout": RolloutConfig(rollout_max_response_len=64, rollout_min_new_tokens=65)},
        "--rollout-min-new-tokens (65) is more than --rollout-max-response-len (64)",
    ),
    (
        {"algorithm": AlgorithmConfig(loss_type="sft_loss"), "rollout": RolloutConfig(n_samples_per_prompt=2)},
        "--n-samples-per-prompt must be 1 in fine-tuning, got 2",
    ),
    ({"rollout": RolloutConfig(rollout_function_path=SFT_ROLLOUT)}, "--rollout-function-path names the rollout function of"),
    ({"debug": DebugConfig(debug_train_only=True)}, "--debug-train-only trains on recorded rollouts"),
    (
        {"rollout": RolloutConfig(rollout_batch_size=3), "training": TrainingConfig(global_batch_size=2)},
        "--rollout-batch-size 3 x --n-samples-per-prompt 1 = 3 samples, which --global-batch-size 2 does not divide",
    ),
]


@pytest.mark.parametrize(("sections", "message"), REFUSED, ids=[message.split(" ")[0] for _, message in REFUSED])
def test_sections_that_contradict_each_other_are_refused(sections, message):
    with pytest.raises(ConfigError) as caught:
        check_rules(Config(**sections))
    assert str(caught.value).startswith(message)


AT_THE_EDGE = {
    "data parallel": Config(
        parallel=ParallelConfig(dp_replicate=4, sequence_parallel=True),
        cluster=EIGHT,
        training=TrainingConfig(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1),
        rollout=RolloutConfig(rollout_max_response_len=63, rollout_max_context_len=64, rollout_min_new_tokens=63),
        debug=DebugConfig(debug_train_only=True, load_debug_rollout_data="r/{rollout_id}.jsonl"),
    ),
    "fine-tuning": Config(
        algorithm=AlgorithmConfig(loss_type="sft_loss", disable_compute_advantages_and_returns=True),
        rollout=RolloutConfig(rollout_function_path=SFT_ROLLOUT),
        debug=DebugConfig(debug_train_only=True),
    ),
}


@pytest.mark.parametrize("name", AT_THE_EDGE)
def test_sections_at_the_edge_break_no_rule(name):
    assert [problem for rule in RULES if (problem := rule(AT_THE_EDGE[name])) is not None] == []
    check_rules(AT_THE_EDGE[name])


def test_engines_of_several_gpus_divide_the_gpus_there_are():
    engine = EngineConfig(rollout_engine="embedded")
    shared = ClusterConfig(actor_num_gpus_per_node=8, rollout_num_gpus_per_engine=3)
    with pytest.raises(ConfigError, match="--rollout-num-gpus-per-engine 3 does not divide the 8 GPUs of the engines"):
        check_rules(Config(engine=engine, cluster=shared))
    apart = ClusterConfig(actor_num_gpus_per_node=8, rollout_num_gpus=9, rollout_num_gpus_per_engine=3)
    check_rules(Config(engine=engine, cluster=apart))


def test_servers_that_share_the_gpus_of_several_ranks_read_the_files_of_a_publication():
    check_rules(
        Config(
            cluster=ClusterConfig(actor_num_gpus_per_node=2, colocate=True),
            foreign=ForeignConfig(custom_update_weight_post_write_path="a.b"),
            engine=EngineConfig(rollout_engine="embedded", update_weight_transport="disk"),
        )
    )


def test_recorded_rollouts_have_no_epochs():
    debug = DebugConfig(load_debug_rollout_data="r/{rollout_id}.jsonl")
    with pytest.raises(ConfigError, match="--num-rollout is required here"):
        check_rules(Config(debug=debug, rollout=RolloutConfig(num_epoch=2)))
    check_rules(Config(debug=debug, rollout=RolloutConfig(num_epoch=2, num_rollout=3)))
    tuned = Config(debug=debug, rollout=RolloutConfig(num_epoch=2), algorithm=AlgorithmConfig(loss_type="sft_loss"))
    assert rules.recorded_rollouts_are_counted(tuned) is None
    assert rules.recorded_rollouts_are_counted(Config(rollout=RolloutConfig(num_epoch=2))) is None


@pytest.mark.parametrize(
    ("num_rollout", "exits_after", "begin", "said"),
    [(8, None, 8, 8), (8, 4, 4, 4), (3, 4, 3, 3), (None, 4, 5, 4), (8, 4, 3, None), (None, None, 9, None)],
)
def test_a_trace_begins_before_a_start_ends(num_rollout, exits_after, begin, said):
    config = Config(
        rollout=RolloutConfig(num_rollout=num_rollout),
        debug=DebugConfig(debug_exit_after_rollout=exits_after),
        profiling=ProfilingConfig(use_pytorch_profiler=True, profile_step_start=begin),
    )
    problem = rules.a_start_reaches_its_traces(config)
    assert problem == (
        None
        if said is None
        else f"--profile-step-start ({begin}) leaves nothing to trace: a start has {said} rollouts, counted from 0; give a "
        "smaller number"
    )


@pytest.mark.parametrize(
    "sections",
    [
        {"logging": LoggingConfig(use_tensorboard=True, log_dir=Path("a"))},
        {"logging": LoggingConfig(use_tensorboard=True, tensorboard_dir=Path("a"))},
        {"logging": LoggingConfig(use_tensorboard=True), "checkpoint": CheckpointConfig(save=Path("a"))},
    ],
)
def test_one_folder_is_enough_for_curves(sections):
    assert rules.tensorboard_has_a_folder(Config(**sections)) is None


@pytest.mark.parametrize(("num_rollout", "fits"), [(1, True), (2, False), (None, False)])
@pytest.mark.parametrize("flag", ["load_debug_rollout_data", "save_debug_train_data"])
def test_one_file_holds_one_rollout(flag, num_rollout, fits):
    config = Config(debug=DebugConfig(**{flag: "r.jsonl"}), rollout=RolloutConfig(num_rollout=num_rollout))
    refused = f"--{flag.replace('_', '-')} must contain {{rollout_id}}, got 'r.jsonl'; otherwise rollouts overwrite each other"
    assert rules.recorded_rollouts_have_files(config) == (None if fits else refused)


def test_hooks_see_the_model_of_megatron():
    hooks = ForeignConfig(custom_megatron_init_path="a.b")
    assert rules.hooks_have_what_they_see(Config(foreign=hooks, training=TrainingConfig(train_backend="megatron"))) is None


def test_a_price_of_length_may_begin_with_the_response():
    longest = RolloutConfig(rollout_max_response_len=8)
    assert rules.long_responses_have_a_bound(Config(reward=RewardConfig(overlong_buffer_len=8), rollout=longest)) is None
    said = rules.long_responses_have_a_bound(Config(reward=RewardConfig(overlong_buffer_len=9), rollout=longest))
    assert said == "--overlong-buffer-len (9) is more than --rollout-max-response-len (8)"


def test_every_rule_is_applied():
    returning_a_problem = {
        value.__name__
        for module in (rules, method_rules, engine_choice)
        for value in vars(module).values()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and value.__annotations__["return"] == "str | None"
    }
    assert {rule.__name__ for rule in RULES} == returning_a_problem


@pytest.mark.parametrize(("sections", "flag"), [
    ({"rollout": RolloutConfig(partial_rollout=True)}, "--partial-rollout"),
    ({"rollout": RolloutConfig(over_sampling_batch_size=8)}, "--over-sampling-batch-size"),
    ({"rollout": RolloutConfig(buffer_filter_path="a.b")}, "--buffer-filter-path"),
    ({"rollout": RolloutConfig(rollout_function_path="a.b")}, "--rollout-function-path"),
    ({"rollout": RolloutConfig(update_weights_interval=2)}, "--update-weights-interval"),
    ({"rollout": RolloutConfig(rollouts_ahead=1)}, "--rollouts-ahead"),
    ({"debug": DebugConfig(debug_rollout_only=True)}, "--debug-rollout-only"),
    ({"debug": DebugConfig(load_debug_rollout_data="r/{rollout_id}.jsonl")}, "--load-debug-rollout-data"),
])  # fmt: skip
def test_what_asynchronous_rollouts_cannot_do_is_refused(sections, flag):
    with pytest.raises(ConfigError, match=f"^{flag} has no effect with --fully-async: .*; leave one of them out"):
        check_rules(Config(asynchronous=AsyncConfig(fully_async=True), **sections))
    check_rules(Config(**sections))


def test_fine_tuning_has_no_asynchronous_rollouts():
    config = Config(algorithm=AlgorithmConfig(loss_type="sft_loss"), asynchronous=AsyncConfig(fully_async=True))
    with pytest.raises(ConfigError, match="--fully-async generates rollouts, and fine-tuning has none"):
        check_rules(config)


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (("--mem-fraction-statik", "0.7"), "did you mean --sglang-mem-fraction-static?"),
        (("--page-size", "1", "--atention-backend", "fa3"), "did you mean --sglang-attention-backend?"),
        (("--zzz",), "see python -m sglang.launch_server --help"),
    ],
)
def test_a_flag_that_sglang_does_not_have_is_refused_where_sglang_cannot_say_so(words, hint):
    with pytest.raises(ConfigError) as caught:
        check_rules(Config(engine=EngineConfig(sglang_args=words)))
    assert str(caught.value).endswith(hint) and str(caught.value).startswith("unknown flag --sglang-")
    check_rules(Config(engine=EngineConfig(sglang_args=words, rollout_engine="sglang")))


def test_flags_of_sglang_pass_by_their_names_and_their_other_names():
    words = (
        "--mem-fraction-static",
        "0.7",
        "--attention-backend",
        "fa3",
        "--cuda-graph-bs",
        "1",
        "2",
        "--disable-radix-cache",
    )
    check_rules(Config(engine=EngineConfig(sglang_args=words)))


def test_prefixes_on_the_host_would_outlive_publications_under_requests():
    engine = EngineConfig(sglang_args=("--enable-hierarchical-cache",), rollout_engine="sglang")
    cluster = ClusterConfig(rollout_num_gpus=1)
    config = Config(engine=engine, cluster=cluster, asynchronous=AsyncConfig(fully_async=True))
    with pytest.raises(ConfigError, match=r"--sglang-enable-hierarchical-cache .* retract; leave it out"):
        check_rules(config)
    check_rules(replace(config, asynchronous=AsyncConfig(fully_async=True, pause_generation_mode="abort")))
    check_rules(replace(config, asynchronous=AsyncConfig()))
