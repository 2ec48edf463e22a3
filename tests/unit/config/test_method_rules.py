"""Rules of methods that contradict each other."""

from pathlib import Path

import pytest

from qwench.config.config import Config
from qwench.config.method_rules import the_critics_own_gpus_are_there
from qwench.config.rules import check_rules
from qwench.config.sections.algorithm import AlgorithmConfig
from qwench.config.sections.checkpoint import CheckpointConfig
from qwench.config.sections.cluster import ClusterConfig
from qwench.config.sections.critic import CriticConfig
from qwench.config.sections.data import DataConfig
from qwench.config.sections.distillation import DistillationConfig
from qwench.config.sections.engine import EngineConfig
from qwench.config.sections.foreign import ForeignConfig
from qwench.config.sections.lora import LoraConfig
from qwench.config.sections.model import ModelConfig
from qwench.config.sections.optimizer import OptimizerConfig
from qwench.config.sections.parallel import ParallelConfig
from qwench.config.sections.reward import RewardConfig
from qwench.config.sections.rollout import AsyncConfig, RolloutConfig
from qwench.config.sections.training import TrainingConfig
from qwench.errors import ConfigError


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"keep_old_actor": True}, "--use-rollout-entropy is of one policy, and --keep-old-actor scores by several"),
        ({"skip_actor_forward_only": True}, "--use-rollout-entropy needs the old log-probs that --skip-actor-forward-only"),
    ],
)
def test_entropy_before_the_first_step_needs_a_pass_of_one_policy(flags, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        check_rules(
            Config(rollout=RolloutConfig(rollout_batch_size=1), algorithm=AlgorithmConfig(use_rollout_entropy=True, **flags))
        )


@pytest.mark.parametrize(
    ("critic", "sections", "message"),
    [
        ({"critic_num_gpus_per_node": 16}, {}, r"--critic-num-gpus-per-node \(16\) is more than --num-gpus-per-node \(8\)"),
        (
            {"critic_num_nodes": 2},
            {"cluster": ClusterConfig(launcher="local")},
            "--launcher local knows this machine only, --critic-num-nodes 2",
        ),
        (
            {"critic_num_gpus_per_node": 3},
            {"cluster": ClusterConfig(actor_num_gpus_per_node=4), "parallel": ParallelConfig(dp_replicate=2)},
            "--dp-replicate 2 does not divide the 3 data-parallel ranks of the critic",
        ),
        (
            {"critic_num_gpus_per_node": 3},
            {
                "cluster": ClusterConfig(actor_num_gpus_per_node=2),
                "parallel": ParallelConfig(pipeline_model_parallel_size=2),
                "training": TrainingConfig(train_backend="megatron"),
            },
            r"--pipeline-model-parallel-size 2 .* the 3 trainer ranks of --critic-num-nodes x --critic-num-gpus-per-node;",
        ),
        (
            {"critic_num_nodes": 1},
            {"algorithm": AlgorithmConfig()},
            r"--critic-num-nodes \(1\) has no effect with --adv",
        ),
        ({"critic_train_only": True}, {"algorithm": AlgorithmConfig()}, "--critic-train-only has no effect with --adv"),
    ],
)
def test_the_gpus_of_a_critic_fit_the_run(critic, sections, message):
    rollout, algorithm = RolloutConfig(rollout_batch_size=1), AlgorithmConfig(advantage_estimator="ppo")
    with pytest.raises(ConfigError, match=f"^{message}"):
        check_rules(Config(critic=CriticConfig(**critic), **{"rollout": rollout, "algorithm": algorithm, **sections}))


def test_a_critic_may_have_every_gpu_of_a_node_and_one_node_of_this_machine():
    whole_node = {"critic_num_gpus_per_node": 8}
    nodes = ((whole_node, "auto"), ({**whole_node, "critic_num_nodes": 2}, "auto"), ({"critic_num_nodes": 1}, "local"))
    for critic, launcher in nodes:
        sections = {"algorithm": AlgorithmConfig(advantage_estimator="ppo"), "rollout": RolloutConfig(rollout_batch_size=1)}
        config = Config(critic=CriticConfig(**critic), cluster=ClusterConfig(launcher=launcher), **sections)
        assert the_critics_own_gpus_are_there(config) is None


FROZEN = {"freeze_params_name_list": ("embed",)}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"training": TrainingConfig(train_backend="megatron", **FROZEN)}, "the backend megatron; give --train-backend fsdp"),
        ({"training": TrainingConfig(whole_weights=True, **FROZEN)}, "--whole-weights"),
        ({"training": TrainingConfig(**FROZEN), "lora": LoraConfig(lora_rank=4)}, "--lora-rank"),
        (
            {"training": TrainingConfig(**FROZEN), "algorithm": AlgorithmConfig(advantage_estimator="ppo")},
            "--advantage-estimator",
        ),
    ],
)
def test_frozen_parameters_are_refused_where_they_are_not_built(sections, message):
    with pytest.raises(ConfigError, match=f"^--freeze-params-name-list does not work with {message}"):
        check_rules(Config(rollout=RolloutConfig(rollout_batch_size=1), **sections))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"freeze_params_name_list": ("[",)}, r"--freeze-params-name-list: '\[' is no regular expression"),
        ({"only_train_params_name_list": ("a",), "freeze_params_name_list": ("b",)}, "both choose what is trained"),
        ({"recompute_modules": ("moe_act",), "recompute_granularity": "selective"}, "moe_act is no part of .* core_attn, mlp"),
        ({"recompute_modules": ("layernorm",), "recompute_granularity": "selective"}, "layernorm is not built: .* core_attn"),
        ({"recompute_modules": ("mlp",), "recompute_granularity": "full"}, "no effect without --recompute-granularity select"),
    ],
)
def test_names_of_parts_are_checked_with_the_flags(flags, message):
    with pytest.raises(ConfigError, match=message):
        TrainingConfig(**flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"freeze_params_name_list": ("embed", "linear_qkv")},
            "'linear_qkv' matches no parameter of the model, .* like embed, q",
        ),
        ({"only_train_params_name_list": ("head",)}, "--only-train-params-name-list: 'head' matches no parameter"),
        ({"freeze_params_name_list": (".",)}, "--freeze-params-name-list . leaves no parameter to train"),
    ],
)
def test_expressions_must_match_and_leave_something(flags, message):
    with pytest.raises(ConfigError, match=message):
        TrainingConfig(**flags).check_trained(["embed", "q"])
    TrainingConfig(only_train_params_name_list=("q",)).check_trained(["embed", "q"])


OPD = DistillationConfig(use_opd=True, opd_type="megatron", opd_teacher_load=Path("teacher"))
SERVED = DistillationConfig(use_opd=True, opd_type="sglang")


def apart(**reward) -> dict[str, object]:
    return {"reward": RewardConfig(**reward), "algorithm": AlgorithmConfig(advantage_estimator="gdpo")}


def overlong(**rollout) -> dict[str, object]:
    return {"reward": RewardConfig(overlong_buffer_len=8), "rollout": RolloutConfig(**rollout)}


def twice(**reward) -> dict[str, object]:
    return {"reward": RewardConfig(second_grader="math-verify", **reward)}


def truncated(**sections) -> dict[str, object]:
    return {"rollout": RolloutConfig(rollout_top_p=0.9), **sections}


def banded(**sections) -> dict[str, object]:
    data = {"curriculum_band": (0.1, 0.9), **sections.pop("data", {})}
    return {"data": DataConfig(**data), **sections}


OWN_ADVANTAGES = ForeignConfig(custom_advantage_function_path="a.b")


LORA = LoraConfig(lora_rank=8)


@pytest.mark.parametrize(("sections", "flag"), [
    ({"training": TrainingConfig(whole_weights=True)}, "--whole-weights; leave it out"),
    ({"optimizer": OptimizerConfig(optimizer="muon")}, "--optimizer muon; choose adam"),
    ({"training": TrainingConfig(batch_invariant_mode=True)}, "--batch-invariant-mode or --true-on-policy-mode"),
    ({"algorithm": AlgorithmConfig(advantage_estimator="ppo")}, "--advantage-estimator ppo; choose an estimator"),
])  # fmt: skip
def test_adapters_are_refused_where_they_are_not_built(sections, flag):
    with pytest.raises(ConfigError) as caught:
        check_rules(Config(lora=LORA, **sections))
    assert str(caught.value).startswith(f"--lora-rank 8 does not work yet with {flag}")
    check_rules(Config(**sections))
    check_rules(Config(lora=LORA))


def test_a_teacher_in_the_trainer_goes_with_adapters():
    check_rules(Config(lora=LORA, distillation=OPD))
    check_rules(Config(lora=LoraConfig(lora_rank=8, lora_base="nf4"), distillation=OPD))


@pytest.mark.parametrize(("engine", "named"), [
    (EngineConfig(rollout_engine="sglang"), "SGLang"),
    (EngineConfig(rollout_engine="embedded", update_weight_transport="disk"), "--update-weight-transport disk"),
])  # fmt: skip
def test_adapters_that_engines_name_are_beside_the_checkpoint_and_of_finished_rollouts(engine, named):
    adapter, rounded = (LoraConfig(lora_rank=8, lora_publish="adapter", lora_base=base) for base in ("auto", "nf4"))
    check_rules(Config(lora=adapter, engine=engine))
    asynchronous = AsyncConfig(fully_async=True)
    other_base = CheckpointConfig(ref_load=Path("other"))
    for sections, flag in (
        ({"lora": rounded}, "--lora-base"),
        ({"asynchronous": asynchronous}, "--fully-async"),
        ({"checkpoint": other_base}, "a --ref-load beside --hf-checkpoint"),
    ):
        with pytest.raises(ConfigError) as caught:
            check_rules(Config(**({"lora": adapter, "engine": engine} | sections)))
        assert str(caught.value) == (
            f"--lora-rank 8 does not work yet with --lora-publish adapter, {named} and {flag}; give merged"
        )
    check_rules(Config(lora=rounded, engine=EngineConfig(rollout_engine="embedded")))
    same_base = {"checkpoint": CheckpointConfig(ref_load=Path("base")), "model": ModelConfig(hf_checkpoint=Path("base"))}
    check_rules(Config(lora=adapter, engine=engine, **same_base))


TWO_STAGES = ParallelConfig(pipeline_model_parallel_size=2)


@pytest.mark.parametrize(("lora", "training", "parallel", "flag"), [
    (LORA, TrainingConfig(transformer_impl="transformer_engine"), TWO_STAGES, "--transformer-impl transformer_engine; choose"),
    (LoraConfig(lora_rank=8, lora_dropout=0.1), TrainingConfig(gradient_checkpointing=True), TWO_STAGES,
     "--lora-dropout, recomputed layers and several stages; give --lora-dropout 0"),
    (LoraConfig(lora_rank=8, lora_dropout=0.1), TrainingConfig(recompute_granularity="selective", recompute_modules=("mlp",)),
     TWO_STAGES, "--lora-dropout, recomputed layers and several stages; give --lora-dropout 0"),
])  # fmt: skip
def test_adapters_in_megatron_are_refused_where_they_are_not_built(lora, training, parallel, flag):
    def config(lora: LoraConfig) -> Config:
        return Config(lora=lora, training=training, parallel=parallel, cluster=ClusterConfig(actor_num_gpus_per_node=2))

    with pytest.raises(ConfigError) as caught:
        check_rules(config(lora))
    assert str(caught.value).startswith(f"--lora-rank 8 does not work yet with {flag}")
    check_rules(Config(lora=LORA, parallel=parallel, cluster=ClusterConfig(actor_num_gpus_per_node=2)))


@pytest.mark.parametrize(("sections", "message"), [
    ({"critic": CriticConfig(critic_lr=1e-5)}, "--critic-lr (1e-05) has no effect with --advantage-estimator grpo"),
    ({"algorithm": AlgorithmConfig(advantage_estimator="ppo"), "foreign": OWN_ADVANTAGES}, "--custom-advantage-function-"),
    ({"distillation": OPD, "algorithm": AlgorithmConfig(loss_type="sft_loss")}, "--use-opd has no effect with --loss-type"),
    (truncated(engine=EngineConfig(rollout_engine="sglang")), "--rollout-top-p 0.9 does not work in training with SGLang: the"),
    (truncated(distillation=OPD), "--rollout-top-p 0.9 does not work in training with --use-opd: the trainer normalises its"),
    (truncated(training=TrainingConfig(batch_invariant_mode=True)), "--rollout-top-p 0.9 does not work in training with --b"),
    (banded(algorithm=AlgorithmConfig(loss_type="sft_loss")), "--curriculum-band has no effect with --loss-type sft_loss"),
    (banded(data={"data_source_path": "a.b"}), "--curriculum-band has no effect with --data-source-path: the data source"),
    (banded(rollout=RolloutConfig(rollout_function_path="a.b")), "--curriculum-band has no effect with --rollout-function"),
    (twice(rm_type="math"), "--second-grader lists what it finds in the run's folder; give --save or --log-dir"),
    (twice(rm_type="f1"), "--second-grader judges boxed answers: it needs --rm-type math or deepscaler, got f1"),
    (twice(custom_rm_path="a.b"), "--second-grader judges answers of --rm-type, and --custom-rm-path replaces that"),
    (twice() | {"algorithm": AlgorithmConfig(loss_type="sft_loss")}, "--second-grader has no effect with --loss-type sft_loss"),
    (apart(rm_type="math"), "--advantage-estimator gdpo compares several rewards apart; give them as --rm-type a,b, got math"),
    (apart(rm_type="math,f1", reward_key="math"), "--reward-key changes a sum, and --advantage-estimator gdpo"),
    (apart(custom_rm_path="a.b"), "--custom-rm-path changes a sum, and --advantage-estimator gdpo"),
    (overlong(), "--overlong-buffer-len ends at --rollout-max-response-len, which is not given"),
    (overlong(rollout_max_response_len=7), "--overlong-buffer-len (8) is more than --rollout-max-response-len (7)"),
    (overlong() | {"algorithm": AlgorithmConfig(loss_type="sft_loss")}, "--overlong-buffer-len has no effect with --loss-type"),
    ({"distillation": SERVED}, "--opd-type sglang asks a teacher on a server; give its address by --rm-url"),
    ({"distillation": SERVED, "reward": RewardConfig(rm_type="remote_rm", rm_url="http://a")}, "--rm-url is the address of"),
    ({"distillation": OPD, "foreign": OWN_ADVANTAGES}, "--use-opd and --custom-advantage-function-path both set"),
])  # fmt: skip
def test_critic_and_teacher_have_a_method_that_uses_them(sections, message):
    with pytest.raises(ConfigError) as caught:
        check_rules(Config(**sections))
    assert str(caught.value).startswith(message)
