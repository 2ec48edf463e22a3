"""What the flags of a run say to its models and its learner: the backend's own arguments, learning rates, checkpoints."""

import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from qwench.config.config import Config
from qwench.config.sections.algorithm import AlgorithmConfig
from qwench.config.sections.checkpoint import CheckpointConfig
from qwench.config.sections.cluster import ClusterConfig
from qwench.config.sections.critic import CriticConfig
from qwench.config.sections.data import DataConfig
from qwench.config.sections.debug import DebugConfig, ProfilingConfig
from qwench.config.sections.distillation import DistillationConfig
from qwench.config.sections.logging import LoggingConfig
from qwench.config.sections.lora import LoraConfig
from qwench.config.sections.optimizer import OptimizerConfig
from qwench.config.sections.parallel import ParallelConfig
from qwench.config.sections.reward import RewardConfig
from qwench.config.sections.rollout import RolloutConfig
from qwench.config.sections.timeouts import TimeoutConfig
from qwench.config.sections.training import TrainingConfig
from qwench.errors import QwenchError
from qwench.launch import trainer
from qwench.launch.inputs import Inputs
from qwench.observability.timing import PhaseTimer
from qwench.training.shaping import Shaping
from tests.unit.launch.test_placement import inputs_of

OPTIMIZER = OptimizerConfig(lr=1e-5, min_lr=1e-6, lr_warmup_fraction=0.1, reset_optimizer_states=True)


class Built:
    """A trainer that remembers how it was built, and what it loaded."""

    def __init__(self, folder: Path, options: dict[str, object]) -> None:
        self.folder, self.options, self.loaded = folder, options, []
        self.has_adapters = options["lora"] is not None

    def load(self, folder: Path, *, weights_only: bool) -> None:
        self.loaded.append((folder, weights_only))


@pytest.fixture(autouse=True)
def recording(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer.FsdpTrainer, "build", lambda folder, **options: Built(folder, options))


def of(**sections: object) -> Inputs:
    rollout = RolloutConfig(rollout_batch_size=4, num_rollout=3)
    return inputs_of(Config(**{"rollout": rollout, "optimizer": OPTIMIZER, **sections}))


def with_equal_bits(inputs: Inputs) -> Inputs:
    """Return inputs with --true-on-policy-mode, which the plan of these tests, with GPUs, refuses."""
    return replace(inputs, config=replace(inputs.config, training=TrainingConfig(true_on_policy_mode=True)))


def test_the_policy_is_built_from_the_checkpoint_that_training_starts_from(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    lora = LoraConfig(lora_rank=2)
    inputs = of(lora=lora, parallel=ParallelConfig(dp_replicate=2), cluster=ClusterConfig(actor_num_gpus_per_node=2))
    found = trainer.build_trainer(inputs, logits=True)
    expected = {
        "training": inputs.config.training,
        "optimizer": OPTIMIZER,
        "total_steps": inputs.plan.num_steps,
        "param_dtype": torch.float32,
        "device": torch.device("cpu"),
        "attention": inputs.config.model.attn_implementation,
        "dp_replicate": 2,
        "hf_config": inputs.hf_config,
        "critic": False,
        "logits": True,
        "lora": lora,
    }
    assert (found.folder, found.options) == (inputs.model_folder, expected)
    started = trainer.build_trainer(of(checkpoint=CheckpointConfig(ref_load=tmp_path)), logits=False)
    assert (started.folder, started.options["lora"], started.options["logits"]) == (tmp_path, None, False)


@pytest.mark.parametrize(("critic_lr", "lr", "min_lr"), [(None, 1e-5, 1e-6), (3e-5, 3e-5, 1e-6), (5e-7, 5e-7, 5e-7)])
def test_a_critic_has_its_own_rate_and_warmup(critic_lr: float | None, lr: float, min_lr: float) -> None:
    built = trainer._build_critic(of(critic=CriticConfig(critic_lr=critic_lr, critic_lr_warmup_iters=7)))
    assert built.options["optimizer"] == replace(OPTIMIZER, lr=lr, min_lr=min_lr, lr_warmup_iters=7, lr_warmup_fraction=None)
    assert (built.options["critic"], built.options["logits"], built.folder, built.loaded) == (True, False, Path(), [])


def test_a_critic_starts_from_a_model_or_goes_on_from_a_saved_one(tmp_path: Path) -> None:
    model, run = tmp_path / "model", tmp_path / "run"
    (run / "critic").mkdir(parents=True)
    model.mkdir()
    (model / "config.json").write_text("{}")
    of_model = trainer._build_critic(of(critic=CriticConfig(critic_load=model)))
    assert (of_model.folder, of_model.loaded) == (model, [])
    for given in (run, run / "critic"):
        saved = trainer._build_critic(of(critic=CriticConfig(critic_load=given)))
        assert (saved.folder, saved.loaded) == (Path(), [(run / "critic", True)])


@pytest.mark.parametrize("checkpoint", [CheckpointConfig(), CheckpointConfig(ref_load=Path("start"))])
def test_a_teacher_is_read_in_the_policys_place_which_is_read_again(
    checkpoint: CheckpointConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "starting_weights", lambda section: section.ref_load)
    monkeypatch.setattr(trainer, "teacher_weights", lambda section: section.opd_teacher_load)
    monkeypatch.setattr(trainer, "Reference", lambda policy: list(policy.loaded))
    distillation = DistillationConfig(use_opd=True, opd_type="megatron", opd_teacher_load=Path("teacher"))
    inputs = of(checkpoint=checkpoint, distillation=distillation)
    policy = Built(Path(), {"lora": None})
    assert trainer._load_teacher(inputs, policy) == [(Path("teacher"), True)]
    assert policy.loaded[1:] == [(checkpoint.ref_load or inputs.model_folder, True)]


def test_a_profile_lies_beside_the_curves_or_the_logs(tmp_path: Path) -> None:
    for logging, folder in (
        (LoggingConfig(log_dir=tmp_path), tmp_path / "profile"),
        (LoggingConfig(log_dir=tmp_path, tensorboard_dir=tmp_path / "curves"), tmp_path / "curves"),
        (LoggingConfig(), Path("profile")),
    ):
        inputs = replace(of(logging=logging, profiling=ProfilingConfig(use_pytorch_profiler=True)), rank=3)
        profiler = trainer._profiler(inputs)
        assert (profiler._section, profiler._folder, profiler._rank) == (inputs.config.profiling, folder, 3)


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """Return what learners are made of; every model and the learners themselves are only named."""
    found: dict[str, object] = {}

    def keep(*given: object, **options: object) -> None:
        found.update(options | {"given": given})

    for name in ("Learner", "CriticLearner"):
        monkeypatch.setattr(trainer, name, keep)
    for name in ("Reference", "BaseModel", "Critic", "PastPolicies"):
        monkeypatch.setattr(trainer, name, lambda *given, name=name, **options: (name, *given[1:], *options.values()))
    monkeypatch.setattr(trainer, "TrainingState", lambda policy, reference, **options: {"reference": reference, **options})
    monkeypatch.setattr(trainer, "_load_teacher", lambda inputs, policy: ("teacher", inputs.rank, policy.folder))
    monkeypatch.setattr(trainer, "make_args", lambda *given, **options: (*given, options))
    monkeypatch.setattr(trainer, "_join", lambda inputs: found.get("link"))
    monkeypatch.setattr(trainer, "start_hooks", lambda section, policy, args: ("hooks", section, args()))
    monkeypatch.setattr(trainer, "RolloutColumns", lambda method, plan, **options: options)
    return found


def test_a_learner_has_what_the_plan_and_the_flags_name(parts: dict[str, object], tmp_path: Path) -> None:
    timer = PhaseTimer()
    inputs = of(
        logging=LoggingConfig(log_dir=tmp_path, mfu_peak_tflops=9.0),
        debug=DebugConfig(save_debug_train_data="{rollout_id}.pt"),
        algorithm=AlgorithmConfig(ref_update_interval=2, use_kl_loss=True),
    )
    holds = {"holds_teacher": True, "holds_critic": True, "holds_reference": True, "num_past_policies": 3}
    inputs = with_equal_bits(replace(inputs, plan=replace(inputs.plan, **holds)))
    trainer.build_learner(inputs, timer)
    state, _, columns = parts.pop("given")
    assert state == {
        "reference": ("Reference",),
        "reference_moves": True,
        "critic": ("Critic", state["critic"][1]),
        "teacher": ("teacher", 0, Path()),
        "past_policies": ("PastPolicies", 3),
    }
    assert columns["truncated"] is False
    same = ("plan", "temperature", "timer", "console", "hooks", "link", "forgets_moments", "peak_tflops", "equal_bits")
    assert {name: parts[name] for name in same} == {
        "plan": inputs.plan,
        "temperature": 1.0,
        "timer": timer,
        "console": inputs.console,
        "hooks": ("hooks", inputs.config.foreign, (inputs.config, inputs.plan, {"host": "", "port": 0})),
        "link": None,
        "forgets_moments": True,
        "peak_tflops": 9.0,
        "equal_bits": True,
    }
    assert parts["record"].args == ("{rollout_id}.pt",) and parts["record"].keywords == {"run": ""}
    assert parts["profiler"]._folder == tmp_path / "profile"


def test_a_learner_has_nothing_that_the_flags_do_not_name(parts: dict[str, object]) -> None:
    trainer.build_learner(of(optimizer=OptimizerConfig(lr=1e-5)), PhaseTimer())
    nothing = {"reference": None, "reference_moves": False, "critic": None, "teacher": None, "past_policies": None}
    assert parts["given"][0] == nothing
    assert [parts[name] for name in ("record", "forgets_moments", "peak_tflops", "equal_bits")] == [None, False, None, False]


def test_bits_are_compared_where_an_engine_samples(parts: dict[str, object]) -> None:
    inputs = with_equal_bits(of())
    for change in ({"replays": True}, {"devices": replace(inputs.plan.devices, generates=False)}):
        trainer.build_learner(replace(inputs, plan=replace(inputs.plan, **change)), PhaseTimer())
        assert parts["equal_bits"] is False


def test_a_critic_on_ranks_of_its_own_learns_over_the_link(parts: dict[str, object]) -> None:
    parts["link"], timer = "link", PhaseTimer()
    inputs = of(algorithm=AlgorithmConfig(advantage_estimator="ppo"))
    with_critic = replace(inputs, plan=replace(inputs.plan, holds_critic=True))
    trainer.build_critic_learner(with_critic, timer)
    critic, *_, link = parts.pop("given")
    assert critic.options["critic"] and link == "link"
    assert parts == {
        "link": "link",
        "plan": with_critic.plan,
        "temperature": 1.0,
        "timer": timer,
        "console": inputs.console,
        "forgets_moments": True,
    }
    trainer.build_learner(with_critic, timer)
    assert parts["given"][0]["critic"] is None, "the policy's ranks hold no critic beside one with ranks of its own"


def test_methods_are_built_with_the_flags_of_other_sections(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[dict[str, object]] = []
    monkeypatch.setattr(trainer, "build_method", lambda section, **options: built.append({"section": section, **options}))
    rollout = RolloutConfig(rollout_batch_size=4, rollout_max_response_len=77)
    for config in (
        Config(rollout=rollout, algorithm=AlgorithmConfig(advantage_estimator="dr_grpo")),
        Config(rollout=rollout, algorithm=AlgorithmConfig(advantage_estimator="dr_grpo", dr_grpo_length=5)),
        Config(rollout=rollout, reward=RewardConfig(rm_type="math,f1", reward_weights="0.5,2")),
        Config(
            rollout=rollout,
            distillation=DistillationConfig(
                use_opd=True, opd_type="megatron", opd_teacher_load=Path("teacher"), opd_kl_coef=0.3
            ),
        ),
    ):
        trainer._make_method(config, SimpleNamespace)
    assert [one["section"].dr_grpo_length for one in built] == [77, 5, None, None]
    assert [one["reward_weights"] for one in built] == [(), (), (0.5, 2.0), ()]
    assert [one["opd_kl_coef"] for one in built] == [None, None, None, 0.3]


def test_a_collective_waits_for_the_minutes_of_its_flag() -> None:
    assert trainer.collective_timeout_s(of(timeouts=TimeoutConfig(distributed_timeout_minutes=3))) == 180


def test_megatron_is_built_with_its_layout_where_the_flags_ask_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "qwench.training.megatron.megatron_trainer"
    backend = SimpleNamespace(MegatronTrainer=SimpleNamespace(build=lambda folder, **options: Built(folder, options)))
    monkeypatch.setitem(sys.modules, name, backend)
    checked: list[int] = []
    monkeypatch.setattr(trainer, "check_platform", lambda: checked.append(1))
    inputs = of(
        training=TrainingConfig(train_backend="megatron"), timeouts=TimeoutConfig(distributed_timeout_minutes=3),
        lora=LoraConfig(lora_rank=2),
    )  # fmt: skip
    built = trainer.build_trainer(inputs, logits=True)
    expected = {
        "training": inputs.config.training,
        "optimizer": OPTIMIZER,
        "total_steps": inputs.plan.num_steps,
        "layout": inputs.plan.layout,
        "param_dtype": torch.float32,
        "device": torch.device("cpu"),
        "architecture": inputs.plan.model,
        "collective_timeout_s": 180,
        "critic": False,
        "logits": True,
        "lora": inputs.config.lora,
    }
    assert (built.folder, built.options) == (inputs.model_folder, expected)
    without = replace(inputs, config=replace(inputs.config, lora=LoraConfig()))
    other = trainer._build(without, Path("start"), OPTIMIZER, critic=True)
    assert (other.folder, other.options) == (Path("start"), expected | {"critic": True, "logits": False, "lora": None})
    assert checked == [1, 1]


def test_a_reference_of_adapters_is_the_model_without_them_unless_it_moves(parts: dict[str, object]) -> None:
    for adapters, moves, kind in ((True, False, "BaseModel"), (True, True, "Reference"), (False, False, "Reference")):
        assert trainer._reference(SimpleNamespace(has_adapters=adapters), moves=moves) == (kind,)


@pytest.mark.parametrize(
    ("flags", "prompts", "tunes", "longest"),
    [
        ({"rollout_max_response_len": 77}, [], False, 78),
        ({"rollout_max_response_len": 77, "max_prompt_len": 20}, [], False, 97),
        ({"rollout_max_response_len": 77, "max_prompt_len": 20}, [5, 9, 3], False, 86),
        ({"rollout_max_response_len": 77, "rollout_max_context_len": 50}, [5], False, 50),
        ({"rollout_max_context_len": 50}, [], False, 50),
        ({}, [], False, 40_960),
        ({"rollout_max_context_len": 50_000}, [30], False, 40_960),
        ({}, [5, 30], True, 30),
        ({"rollout_max_context_len": 20}, [5, 30], True, 20),
        ({"rollout_max_response_len": 9}, [1], True, 2),
    ],
)
def test_the_memory_probe_is_as_long_as_a_sequence_can_be(
    flags: dict[str, int], prompts: list[int], tunes: bool, longest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer.MemoryProbe, "of", lambda plan, **options: options["longest"])
    data = DataConfig(rollout_max_prompt_len=flags.pop("max_prompt_len", None))
    rollout = RolloutConfig(rollout_batch_size=4, **flags)
    algorithm = AlgorithmConfig(loss_type="sft_loss" if tunes else "policy_loss")
    inputs = of(rollout=rollout, algorithm=algorithm, data=data, training=TrainingConfig(memory_probe=True))
    found = trainer.make_memory_probe(inputs, prompts)
    flag = "--rollout-max-context-len" if tunes else "--rollout-max-response-len"
    assert (found.num_tokens, found.flag) == (longest, flag)


def test_the_memory_probe_is_told_what_else_lies_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[dict[str, object]] = []
    monkeypatch.setattr(trainer.MemoryProbe, "of", lambda plan, **options: made.append({"plan": plan, **options}) or len(made))
    monkeypatch.setattr(trainer, "weight_bytes_beside_trainer", lambda config, plan: (config, plan))
    rollout = RolloutConfig(rollout_batch_size=4, rollout_temperature=0.7)
    inputs = of(rollout=rollout, training=TrainingConfig(memory_probe=True), algorithm=AlgorithmConfig(entropy_coef=0.1))
    assert trainer.make_memory_probe(inputs) == 1
    same = {"training": inputs.config.training, "longest": made[0]["longest"], "temperature": 0.7, "dtype": torch.float32}
    of_policy = {"plan": inputs.plan, "with_entropy": True, "engine_bytes": (inputs.config, inputs.plan)}
    assert made == [{**same, **of_policy, "of_critic": None}]
    critic = CriticConfig(critic_num_nodes=1, critic_num_gpus_per_node=1)
    apart = of(
        rollout=rollout, training=inputs.config.training, algorithm=AlgorithmConfig(advantage_estimator="ppo"), critic=critic
    )
    assert trainer.make_memory_probe(apart) == 3
    assert made[1] == {**same, "plan": apart.plan.of_critic, "with_entropy": False}
    assert (made[2]["with_entropy"], made[2]["of_critic"]) == (False, 2)


def test_memory_is_probed_on_gpus_or_where_the_flag_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer.MemoryProbe, "of", lambda plan, **options: "probe")
    for on_gpus, asked, expected in ((True, None, "probe"), (False, None, None), (True, False, None), (False, True, "probe")):
        inputs = of(training=TrainingConfig(memory_probe=asked))
        devices = replace(inputs.plan.devices, on_gpus=on_gpus)
        assert trainer.make_memory_probe(replace(inputs, plan=replace(inputs.plan, devices=devices))) == expected


def test_columns_are_made_by_the_functions_of_the_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "RolloutColumns", lambda *given, **options: (given, options))
    for name in ("load_post_process", "load_target_functions", "load_user_conversion"):
        monkeypatch.setattr(trainer, name, lambda *given, name=name: (name, *given))
    inputs = of(rollout=RolloutConfig(rollout_batch_size=4, rollout_top_k=9))
    given = (inputs.config, SimpleNamespace)
    assert trainer._make_columns(inputs, "method", SimpleNamespace) == (
        ("method", inputs.plan),
        {
            "reward_post_process": ("load_post_process", *given),
            "targets": ("load_target_functions", *given),
            "shaping": Shaping.of(inputs.config),
            "convert": ("load_user_conversion", *given),
            "truncated": True,
        },
    )
    tunes = of(rollout=inputs.config.rollout, algorithm=AlgorithmConfig(loss_type="sft_loss"))
    assert trainer._make_columns(tunes, "method", SimpleNamespace)[1]["truncated"] is False


def ours(samples: object) -> None:
    raise ValueError("no mean")


def theirs(args: object, samples: object) -> None:
    raise ValueError("no mean")


@pytest.mark.parametrize("name", ["ours", "theirs"])
def test_a_users_normalisation_fails_in_one_line_in_either_convention(name: str) -> None:
    path = f"tests.unit.launch.test_trainer.{name}"
    config = of(reward=RewardConfig(custom_reward_post_process_path=path)).config
    normalise = trainer.load_post_process(config, SimpleNamespace)
    with pytest.raises(QwenchError, match=rf"^--custom-reward-post-process-path '{path}' failed: ValueError: no mean \("):
        normalise([])


@pytest.mark.parametrize(("rank", "members"), [(1, range(2)), (2, range(2, 3))])
def test_ranks_join_those_of_their_model_and_then_the_link(rank: int, members: range, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []
    seconds = {"environ": os.environ, "timeout_s": 180}
    monkeypatch.setattr(trainer, "init_process_group", lambda device, **options: made.append((device, options)))
    monkeypatch.setattr(trainer, "make_link", lambda environ, *, timeout_s: made.append((environ, timeout_s)) or "link")
    monkeypatch.setattr(trainer, "CriticLink", lambda link, **options: (link, options))
    monkeypatch.setattr(torch, "manual_seed", made.append)
    rest = {"timeouts": TimeoutConfig(distributed_timeout_minutes=3), "training": TrainingConfig(seed=5)}
    alone = of(cluster=ClusterConfig(actor_num_gpus_per_node=2), **rest)
    assert trainer._join(replace(alone, rank=rank)) is None
    assert made == [5, (alone.device, seconds)]
    made.clear()
    inputs = of(
        cluster=ClusterConfig(actor_num_gpus_per_node=2), critic=CriticConfig(critic_num_nodes=1, critic_num_gpus_per_node=1),
        algorithm=AlgorithmConfig(advantage_estimator="ppo"), **rest,
    )  # fmt: skip
    assert trainer._join(replace(inputs, rank=rank)) == ("link", {"rank": rank, "num_policy_ranks": 2})
    assert made == [5, (inputs.device, {**seconds, "members": members}), (os.environ, 180)]
