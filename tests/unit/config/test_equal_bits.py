"""Where --true-on-policy-mode and --batch-invariant-mode are refused, and what they need."""

from dataclasses import replace

import pytest

from qwench.config.command_line.parse import parse_flags
from qwench.config.config import Config
from qwench.config.equal_bits import check_equal_bits
from qwench.errors import ConfigError
from tests.unit.config.architectures import QWEN3_4B

ON_POLICY = ["--true-on-policy-mode", "--rollout-engine", "embedded", "--colocate"]
INVARIANT = ["--batch-invariant-mode", "--rollout-engine", "embedded", "--colocate"]
SGLANG = ["--true-on-policy-mode", "--rollout-engine", "sglang"]


def check(words: list[str], *, on_gpus: bool = False) -> None:
    check_equal_bits(parse_flags(Config, words, prog="qwench train"), QWEN3_4B, on_gpus=on_gpus)


def test_a_cpu_with_one_rank_and_sglang_with_its_own_kernels_are_accepted():
    check([])
    check(ON_POLICY)
    check([*ON_POLICY, "--recompute-logprobs-via-prefill"])
    check(INVARIANT)
    check([*SGLANG, "--sglang-enable-deterministic-inference"], on_gpus=True)


@pytest.mark.parametrize(
    ("words", "on_gpus", "message"),
    [
        (ON_POLICY, True, "needs a CPU"),
        ([*ON_POLICY, "--train-backend", "megatron"], False, "needs --train-backend fsdp"),
        ([*ON_POLICY, "--actor-num-gpus-per-node", "2"], False, "needs one trainer rank"),
        ([*ON_POLICY, "--attn-implementation", "varlen"], False, "needs --attn-implementation sdpa"),
        ([*ON_POLICY, "--rollouts-ahead", "1"], False, "--rollouts-ahead 1 samples with older ones"),
        ([*ON_POLICY, "--update-weights-interval", "2"], False, "--update-weights-interval 2 samples with older ones"),
        ([*ON_POLICY, "--fully-async"], False, "; --fully-async samples with older ones"),
        ([*ON_POLICY, "--partial-rollout"], False, "; --partial-rollout samples with older ones"),
        ([*ON_POLICY[:3], "--rollout-num-gpus", "1"], False, "needs --colocate: other kernels have other bits; leave it out"),
        (SGLANG, True, "needs --sglang-enable-deterministic-inference"),
    ],
)
def test_other_layouts_are_refused_by_name(words, on_gpus, message):
    with pytest.raises(ConfigError, match=rf"^--true-on-policy-mode .*{message}"):
        check(words, on_gpus=on_gpus)


@pytest.mark.parametrize("bias", ["qkv_bias", "attention_output_bias", "mlp_bias"])
def test_a_model_with_biases_is_refused_under_the_flag_that_is_given(bias):
    config = parse_flags(Config, [*INVARIANT, "--update-weights-interval", "2"], prog="qwench train")
    check_equal_bits(config, QWEN3_4B, on_gpus=False)  # no log-probs of one version are compared
    with pytest.raises(ConfigError, match=r"^--batch-invariant-mode with the embedded engine needs a model without biases:"):
        check_equal_bits(config, replace(QWEN3_4B, **{bias: True}), on_gpus=False)


def test_a_prefill_for_log_probs_needs_equal_bits():
    with pytest.raises(ConfigError, match=r"^--recompute-logprobs-via-prefill needs --true-on-policy-mode"):
        check(["--recompute-logprobs-via-prefill"])


@pytest.mark.parametrize("flag", ["--true-on-policy-contract", "--sglang-true-on-policy-contract"])
def test_the_contract_of_the_references_is_the_mode(flag):
    words = [flag, "qwen3_dense_true_on_policy_v1"]
    assert parse_flags(Config, words, prog="qwench train").training.true_on_policy_mode
    with pytest.raises(ConfigError, match=rf"^{flag} other is not supported"):
        parse_flags(Config, [flag, "other"], prog="qwench train")
