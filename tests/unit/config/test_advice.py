from dataclasses import replace
from pathlib import Path

import pytest

from qwench.config.advice import plan_warnings, warnings
from qwench.config.command_line.parse import parse_run
from qwench.config.config import Config
from qwench.config.plan import plan_run
from qwench.config.sections.data import DataConfig
from qwench.config.sections.debug import DebugConfig
from qwench.config.sections.distillation import DistillationConfig
from qwench.config.sections.evaluation import EvalConfig
from qwench.config.sections.parallel import ParallelConfig
from qwench.config.sections.reward import RewardConfig
from qwench.config.sections.rollout import RolloutConfig
from qwench.config.sections.training import TrainingConfig
from tests.unit.config.architectures import QWEN3_4B
from tests.unit.config.words import flat, words_of


def test_a_complete_command_line_needs_no_advice(files):
    assert list(warnings(parse_run("train", flat(words_of(files))))) == []


def test_a_flag_given_twice_is_no_fault(files):
    given = [*flat(words_of(files)), "--lr", "1e-5", "--lr=1e-5", "--num_rollout", "3", "--colocate", "--no-colocate"]
    config = parse_run("train", given)
    assert (config.optimizer.lr, config.cluster.colocate) == (1e-5, False)
    assert list(warnings(config)) == [] and config.foreign.overridden_flags == ("lr 1e-6", "colocate true")
    unexplained = replace(config, foreign=replace(config.foreign, unused_flags=("a", "b (why)")))
    assert list(warnings(unexplained)) == ["these flags have no effect here (docs/flags.md says why): --a --b (why)"]


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        (["--rm-type", "f1", "--custom-rm-path", "a.b"], "--rm-type f1 grades no response by itself: --custom-rm-path wins"),
        (["--num-rollout", "3", "--num-epoch", "2"], "--num-epoch 2 has no effect: --num-rollout 3 wins"),
        (
            ["--use-dynamic-batch-size", "--max-tokens-per-gpu", "99999", "--micro-batch-size", "2"],
            "--micro-batch-size 2 has no effect: --use-dynamic-batch-size packs by tokens",
        ),
        (
            ["--log-probs-max-tokens-per-gpu", "99"],
            "--log-probs-max-tokens-per-gpu 99 has no effect: without --use-dynamic-batch-size nothing is packed by tokens",
        ),
        (
            ["--colocate", "--rollout-num-gpus", "4"],
            "--rollout-num-gpus 4 has no effect: --colocate shares the trainer's GPUs",
        ),
        (["--custom-rm-in-process"], "--custom-rm-in-process has no effect: no --custom-rm-path is given"),
        (
            ["--use-stateless-adam", "--reset-optimizer-states"],
            "--reset-optimizer-states has no effect: --use-stateless-adam forgets the moments before every step",
        ),
        (
            ["--custom-reward-post-process-path", "a.b", "--custom-convert-samples-to-train-data-path", "a.c"],
            "--custom-reward-post-process-path a.b has no effect: --custom-convert-samples-to-train-data-path returns rewards",
        ),
        (
            ["--advantage-estimator", "ppo", "--critic-train-only", "--num-critic-only-steps", "2"],
            "--num-critic-only-steps 2 has no effect: --critic-train-only is for every rollout",
        ),
        (
            ["--use-opd", "--opd-type", "sglang", "--rm-url", "http://a", "--opd-teacher-urls", "default=http://b"],
            "--rm-url http://a has no effect: --opd-teacher-urls names the teachers",
        ),
        (
            ["--lr-decay-style", "constant", "--min-lr", "1e-8"],
            "--min-lr 1e-08 has no effect: --lr-decay-style constant does not decay",
        ),
    ],
)
def test_a_flag_that_another_one_overrules_is_told(files, extra, expected):
    words = {flag: values for flag, values in words_of(files).items() if flag not in extra}
    assert list(warnings(parse_run("train", flat(words) + extra))) == [expected]


EMBEDDED = ("--rollout-engine", "embedded")


@pytest.mark.parametrize(
    ("extra", "begin"),
    [
        (["--use-dynamic-batch-size", "--max-tokens-per-gpu", "15"], "--max-tokens-per-gpu (15) is smaller than the longest"),
        (
            ["--use-opd", "--opd-type", "sglang", "--rm-url", "http://a", "--opd-log-prob-top-k", "4"],
            "--opd-log-prob-top-k gives a token the KL of its position",
        ),
        (
            ["--use-opd", "--opd-type", "sglang", "--rm-url", "http://a", "--rollout-temperature", "0.8"],
            "--rollout-temperature 0.8: the policy's log-probs are at this temperature, and those of a",
        ),
        (
            ["--n-samples-per-prompt", "1"],
            "--n-samples-per-prompt 1: rewards are compared within their group, so every advantage is 0, nothing is learned",
        ),
        (
            ["--n-samples-per-prompt", "1", "--use-opd", "--opd-type", "sglang", "--rm-url", "http://a"],
            "--n-samples-per-prompt 1: rewards are compared within their group, so they count 0, only the teacher is followed",
        ),
        (["--sequence-parallel"], "--sequence-parallel has no effect"),
        (["--use-fault-tolerance"], "--use-fault-tolerance has no effect on the embedded engine"),
        (["--use-sglang-router"], "--use-sglang-router has no effect on the embedded engine"),
        (
            ["--rollout-external-engine-addrs", "a:1", "--sglang-attention-backend", "fa3"],
            "--rollout-external-engine-addrs: the engines run already and are not told --sglang-attention-backend",
        ),
        (["--rollout-health-check-interval", "9"], "--rollout-health-check-interval has no effect on the embedded engine"),
        (
            ["--load-debug-rollout-data", "r/{{rollout_id}}.jsonl", "--eval-prompt-data", "e", "{}/train.jsonl"],
            "--eval-prompt-data has no effect here: recorded rollouts are learned from without an engine",
        ),
        (
            ["--debug-rollout-only", "--eval-prompt-data", "e", "{}/train.jsonl"],
            "--eval-prompt-data has no effect here: --debug-rollout-only makes training rollouts only",
        ),
        (
            ["--debug-rollout-only", "--ref-load", "{}/model"],
            "--ref-load is not read here: responses are those of --hf-checkpoint",
        ),
        (
            ["--debug-rollout-only", "--lora-rank", "4"],
            "--lora-rank has no effect here: to sample with an adapter, merge it into its base with qwench convert",
        ),
        (
            ["--sglang-attention-backend", "fa3", "--sglang-page-size", "4", "--router-policy", "random", *EMBEDDED],
            "the embedded engine makes no use of --sglang-attention-backend --router-policy",
        ),
    ],
)
def test_what_is_perhaps_not_meant_is_warned_about(files, extra, begin):
    words = {flag: values for flag, values in words_of(files).items() if flag not in extra}
    shown = list(warnings(parse_run("train", flat(words) + [word.format(files) for word in extra])))
    assert len(shown) == 1
    assert shown[0].startswith(begin)


@pytest.mark.parametrize(
    ("rollout", "max_prompt_len", "tokens", "longest"),
    [
        ({}, None, 7, 16), ({}, None, 8, None), ({}, 4, 9, 20), ({}, 4, 10, None),
        ({"rollout_max_context_len": 30}, 4, 14, 30), ({"rollout_max_context_len": 30}, 4, 15, None),
    ],
)  # fmt: skip
def test_the_longest_sample_is_compared_with_the_tokens_of_all_context_parallel_ranks(rollout, max_prompt_len, tokens, longest):
    config = Config(
        rollout=RolloutConfig(n_samples_per_prompt=2, rollout_max_response_len=16, **rollout),
        data=DataConfig(rollout_max_prompt_len=max_prompt_len),
        training=TrainingConfig(use_dynamic_batch_size=True, max_tokens_per_gpu=tokens),
        parallel=ParallelConfig(context_parallel_size=2),
    )
    said = f"--max-tokens-per-gpu ({tokens}) is smaller than the longest sample ({longest} tokens); such a sample makes a "
    assert [warning[: len(said)] for warning in warnings(config)] == ([] if longest is None else [said])


def test_a_file_of_evaluation_sets_is_named_where_nothing_is_evaluated():
    rollout = RolloutConfig(n_samples_per_prompt=2)
    config = Config(rollout=rollout, evaluation=EvalConfig(eval_config=Path("s")), debug=DebugConfig(debug_rollout_only=True))
    assert [warning.partition(":")[0] for warning in warnings(config)] == ["--eval-config has no effect here"]


@pytest.mark.parametrize("reward", [{"rm_type": "remote_rm"}, {"custom_rm_path": "a.b"}])
def test_the_address_of_a_remote_reward_is_read_beside_those_of_teachers(reward):
    config = Config(
        rollout=RolloutConfig(n_samples_per_prompt=2),
        distillation=DistillationConfig(use_opd=True, opd_type="sglang", opd_teacher_urls=("default=http://b",)),
        reward=RewardConfig(rm_url="http://a", **reward),
    )
    assert list(warnings(config)) == []


def test_fine_tuning_and_evaluation_are_not_warned_about_groups_of_one(files):
    words = words_of(files)
    del words["--n-samples-per-prompt"]
    assert list(warnings(parse_run("sft", flat(words)))) == []
    config = parse_run("eval", [*flat(words), "--eval-prompt-data", "e", str(files / "train.jsonl"), "--use-fault-tolerance"])
    assert [text.split(" ")[0] for text in warnings(config, trains=False)] == ["--use-fault-tolerance"]


@pytest.mark.parametrize("apart", [["--actor-num-gpus-per-node", "2"], ["--launcher", "ray"]])
def test_embedded_engines_in_servers_are_restarted_and_routed(files, apart):
    """A killed server of a colocated run on two GPUs was restarted, although the flag was said to have no effect."""
    served = ["--use-fault-tolerance", "--rollout-health-check-interval", "9"]
    routed = ["--use-sglang-router", "--router-policy", "random"]
    config = parse_run("train", [*flat(words_of(files)), "--colocate", *EMBEDDED, *served, *routed, *apart])
    assert list(warnings(config)) == []


def test_evaluation_warns_that_it_reads_no_training_checkpoint(files):
    words = [*flat(words_of(files)), "--eval-prompt-data", "e", str(files / "train.jsonl"), "--load", str(files)]
    (warning,) = warnings(parse_run("eval", words), trains=False)
    assert warning == (
        "--load is not read here: responses are those of --hf-checkpoint; for trained weights name a folder that "
        "--save-hf wrote"
    )


def test_fine_tuning_evaluates_and_so_does_not_warn(files):
    words = words_of(files)
    del words["--n-samples-per-prompt"]
    assert list(warnings(parse_run("sft", [*flat(words), "--eval-prompt-data", "e", str(files / "train.jsonl")]))) == []


def test_what_is_meant_is_not_warned_about(files):
    extra = ["--disable-rewards-normalization", "--use-dynamic-batch-size"]
    words = words_of(files) | {"--n-samples-per-prompt": ["1"]}
    assert list(warnings(parse_run("train", [*flat(words), *extra, "--max-tokens-per-gpu", "16"]))) == []


@pytest.mark.parametrize(
    ("words", "on_gpus", "expected"),
    [
        (["--actor-num-gpus-per-node", "8"], False, ["8 trainer ranks share this CPU: PyTorch sees no GPU here"]),
        (["--actor-num-gpus-per-node", "8"], True, []),
        (["--actor-num-gpus-per-node", "1"], False, []),
        (["--actor-num-gpus-per-node", "8", "--launcher", "ray"], False, []),
        (["--fully-async"], False, []),
        (["--fully-async", "--colocate", "--launcher", "ray"], False, []),
        *(
            (
                [*flag.split(), "--colocate"],
                False,
                [f"--colocate has no effect here: PyTorch sees no GPU. On GPUs the run is refused, as {flag} excludes it"],
            )
            for flag in ("--fully-async", "--rollouts-ahead 1")
        ),
    ],
)
def test_what_a_cpu_makes_of_flags_for_gpus_is_said(files, words, on_gpus, expected):
    config = parse_run("train", [*flat(words_of(files)), *words])
    assert list(plan_warnings(config, plan_run(config, QWEN3_4B, on_gpus=on_gpus))) == expected
