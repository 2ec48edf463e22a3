"""Every number and import path of a section is refused by its flag where it is out of its bounds."""

from __future__ import annotations

import math
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from qwench.config.config import Config
from qwench.config.sections.algorithm import AlgorithmConfig
from qwench.config.sections.checkpoint import CheckpointConfig
from qwench.config.sections.convert import ConvertConfig
from qwench.config.sections.data import DataConfig
from qwench.config.sections.engine import EngineConfig
from qwench.config.sections.evaluation import EvalConfig
from qwench.config.sections.lora import LoraConfig
from qwench.config.sections.reward import RewardConfig
from qwench.config.sections.timeouts import TimeoutConfig
from qwench.config.sections.verbs import ServerConfig
from qwench.errors import ConfigError

POSITIVE = """
actor-num-gpus-per-node actor-num-nodes adam-eps async-max-concurrent-samples critic-lr critic-num-nodes
critic-num-gpus-per-node curriculum-retry-epochs
debug-exit-after-rollout dr-grpo-length dynamic-sampling-max-rounds embedded-kv-cache-tokens embedded-max-running-requests
embedded-page-size embedded-prefill-chunk-tokens engine-start-timeout eps-clip eps-clip-high eval-interval
eval-max-context-len eval-max-in-flight eval-max-prompt-len eval-max-response-len generate-max-turns global-batch-size
keep-checkpoints log-probs-max-tokens-per-gpu lora-alpha lr lr-decay-iters lr-wsd-decay-iters max-seq-len max-tokens-per-gpu
memory-snapshot-num-steps mfu-peak-tflops micro-batch-size muon-num-ns-steps n-samples-per-eval-prompt n-samples-per-prompt
num-epoch num-gpus-per-node num-rollout num-steps-per-rollout over-sampling-batch-size overlong-buffer-len
recompute-num-layers ref-update-interval reward-num-workers reward-timeout-s rollout-batch-size rollout-health-check-interval
rollout-health-check-timeout rollout-max-context-len rollout-max-prompt-len rollout-max-response-len
rollout-num-gpus-per-engine rs-lower-bound rs-upper-bound rs-veto-threshold sapo-tau-neg sapo-tau-pos save-interval
save-retain-interval sglang-server-concurrency table-interval tis-clip tis-lower-bound update-weight-buffer-size
update-weights-interval value-clip
"""
NOT_NEGATIVE = """
ckpt-step clip-grad critic-lr-warmup-iters eval-min-new-tokens eval-num-gpus eval-temperature kl-coef kl-cov-coef
kl-loss-coef lambd lora-rank lr-warmup-init lr-warmup-iters max-weight-staleness min-lr num-critic-only-steps opd-kl-coef
opd-log-prob-top-k profile-step-start ref-ckpt-step rollout-health-check-first-wait rollout-min-new-tokens rollout-min-p
rollout-num-gpus show-samples start-rollout-id tis-clip-low weight-decay
"""
FRACTIONS = """
clip-cov-ratio embedded-mem-fraction eval-top-p gamma kl-cov-ratio load-debug-rollout-data-subsample
optimizer-offload-fraction rollout-top-p second-grader-share
"""
IMPORT_PATHS = """
buffer-filter-path custom-advantage-function-path custom-agent-function-path custom-eval-rollout-log-function-path
custom-generate-function-path custom-loss-function-path custom-megatron-before-log-prob-hook-path
custom-megatron-before-train-step-hook-path custom-megatron-init-path custom-megatron-post-save-hook-path
custom-pg-loss-reducer-function-path custom-reward-post-process-path custom-rm-path custom-rollout-log-function-path
custom-tis-function-path custom-update-weight-post-write-path data-source-path dynamic-sampling-filter-path
eval-function-path generate-execute-tool-function-path generate-tool-specs-path rollout-all-samples-process-path
rollout-function-path rollout-sample-filter-path
"""
CONVERSION = {"input": Path("in"), "output": Path("out")}


def section_of(name: str) -> type[Any]:
    """Return the section that has a field."""
    sections = [kind for kind in get_type_hints(Config).values() if is_dataclass(kind)]
    [found] = [kind for kind in sections if name in {item.name for item in fields(kind)}]
    assert isinstance(found, type)
    return found


def refusal(flag: str, value: object) -> str:
    name = flag.replace("-", "_")
    with pytest.raises(ConfigError) as refused:
        section_of(name)(**{name: value})
    return str(refused.value)


@pytest.mark.parametrize("flag", POSITIVE.split())
def test_what_must_be_positive_is_neither_zero_nor_less(flag):
    for value in (0, -1):
        assert refusal(flag, value) == f"--{flag} must be greater than 0, got {value}"


@pytest.mark.parametrize(
    "flag", ["entropy-coef", "eps-clip-c", "opsm-delta", "clip-cov-lb", "clip-cov-ub", "rollout-temperature"]
)
def test_what_may_have_any_sign_is_finite(flag):
    for value in (math.inf, math.nan):
        assert refusal(flag, value).startswith((f"--{flag} must be a finite number", f"--{flag} must be greater than 0"))


@pytest.mark.parametrize("flag", NOT_NEGATIVE.split())
def test_what_may_be_zero_is_not_less(flag):
    assert refusal(flag, -1) == f"--{flag} must not be negative, got -1"


@pytest.mark.parametrize("flag", FRACTIONS.split())
def test_a_share_is_above_zero_and_at_most_one(flag):
    for value in (0.0, 1.5):
        assert refusal(flag, value).startswith(f"--{flag} must be greater than 0 and at most 1")


@pytest.mark.parametrize("flag", ["eval-top-k", "rollout-top-k"])
def test_top_k_is_at_least_one_or_off(flag):
    for value in (0, -2):
        assert refusal(flag, value) == f"--{flag} must be at least 1, or -1 for off, got {value}"


@pytest.mark.parametrize("flag", IMPORT_PATHS.split())
def test_the_path_of_a_function_names_module_and_function(flag):
    assert refusal(flag, "function").startswith(f"--{flag} must be the import path")


@pytest.mark.parametrize(
    "flag",
    ["save-hf", "save-debug-rollout-data", "save-debug-trajectory-data", "save-debug-train-data", "load-debug-rollout-data"],
)
def test_a_template_has_no_field_but_the_number_of_the_rollout_and_leads_in_no_circle(tmp_path, flag):
    assert refusal(flag, "folder/{step}").startswith(f"--{flag}")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    circle = f"{tmp_path}/loop/{{rollout_id}}"
    assert refusal(flag, circle) == f"--{flag} must not lead in a circle of symbolic links, got {circle!r}"


@pytest.mark.parametrize(
    ("section", "given", "flag"),
    [
        (ConvertConfig, {**CONVERSION, "to": "hf", "max_shard_gb": 0}, "--max-shard-gb"),
        (ConvertConfig, {**CONVERSION, "to": "lora", "lora_rank": 0}, "--lora-rank"),
        (ServerConfig, {"port": 0}, "--port"),
        (ServerConfig, {"num_gpus": 0}, "--num-gpus"),
        (TimeoutConfig, {"train_timeout": 0}, "--train-timeout"),
        (
            RewardConfig,
            {"rm_type": "judge", "judge_url": "http://h/v1", "judge_model": "m", "judge_timeout_s": 0},
            "--judge-timeout-s",
        ),
    ],
)
def test_sections_of_other_verbs_and_of_pairs_have_bounds(section, given, flag):
    with pytest.raises(ConfigError, match=rf"^{flag} must be greater than 0, got 0$"):
        section(**given)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        *(
            (name, "the rendered text is tokenized as it is")
            for name in (
                "tokenize", "sanitize_control_tokens", "padding", "truncation", "max_length", "return_tensors", "return_dict",
                "return_assistant_tokens_mask", "tokenizer_kwargs",
            )
        ),
        ("conversation", "--input-key names their column"),
        ("messages", "--input-key names their column"),
        ("continue_final_message", "the verb decides how the text ends"),
        ("chat_template", "--chat-template-path names another template"),
        ("tools", "--tool-key names their column"),
        ("add_generation_prompt", "the verb decides how the text ends"),
    ],
)  # fmt: skip
def test_an_argument_that_is_no_variable_of_a_template_is_refused_with_what_sets_it(name, reason):
    with pytest.raises(ConfigError) as caught:
        DataConfig(apply_chat_template_kwargs={"enable_thinking": False, name: True})
    assert str(caught.value) == (
        f"--apply-chat-template-kwargs has {name}, which is no variable of a template: {reason}; leave it out"
    )


@pytest.mark.parametrize("scores", [(1.0,), (1.0, 0.0), (1.0, 1.0), (0.0, 1.0, 2.0)])
def test_a_judges_scale_is_two_numbers(scores):
    with pytest.raises(ConfigError, match=r"^--judge-scores must be two numbers, the lower first, got [012 ]+$"):
        RewardConfig(judge_url="http://h/v1", judge_model="m", judge_scores=scores)


def test_a_scale_without_a_judge_is_refused():
    with pytest.raises(ConfigError, match=r"^--judge-scores has no effect without --judge-url"):
        RewardConfig(judge_scores=(0.0, 10.0))


def test_evaluation_sets_are_told_apart_by_more_than_case():
    with pytest.raises(ConfigError, match=r"names a set twice \(upper case is as lower case\): aime AIME$"):
        EvalConfig(eval_prompt_data=("aime", "x", "AIME", "y"))


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        (CheckpointConfig, {"ref_ckpt_step": 5}, "--ref-ckpt-step (5) picks a checkpoint of --ref-load; give --ref-load"),
        (
            CheckpointConfig,
            {"save": Path("s"), "early_stopping_patience": 2},
            "--early-stopping-patience (2) counts the evaluations after the best one; give --keep-best",
        ),
        (
            AlgorithmConfig,
            {"use_tis": True, "tis_batch_normalize": True, "custom_tis_function_path": "a.b"},
            "--custom-tis-function-path computes the weights that --tis-batch-normalize divides; leave one out",
        ),
        (
            EvalConfig,
            {"eval_num_gpus": 1, "eval_low_priority": True},
            "--eval-low-priority has no effect on the engines of --eval-num-gpus; give one of them",
        ),
        (LoraConfig, {"lora_alpha": 8.0}, "--lora-alpha has no effect without adapters; give --lora-rank, or leave it out"),
        (LoraConfig, {"lora_rank": 0, "lora_init": "pissa"}, "--lora-init has no effect without adapters"),
        (
            LoraConfig,
            {"lora_adapter_path": Path("a")},
            "--lora-adapter-path starts training from an adapter: give its --lora-rank",
        ),
        *(
            (
                ConvertConfig,
                {"input": Path("a"), "output": Path("b"), "to": to, "verify": True, **more},
                f"--verify compares logits bit by bit, and those of --to {to} are others; leave it out",
            )
            for to, more in (("fp8", {}), ("lora", {"lora_rank": 2}))
        ),
        (ServerConfig, {"port": 65_536}, "--port must be at most 65535, got 65536"),
        (ServerConfig, {"num_gpus": 2, "lora": ("a=b",)}, "--lora needs an engine of one GPU, got --num-gpus 2"),
        (ServerConfig, {"num_gpus": 2, "deterministic_mode": True}, "--deterministic-mode needs an engine of one GPU, got"),
    ],
)
def test_a_value_that_another_one_makes_useless_is_refused(section, values, message):
    with pytest.raises(ConfigError) as caught:
        section(**values)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("address", ["host", ":80", "host:", "host:http", "http://host/", "::1:80"])
def test_an_engine_is_found_by_host_and_port(address):
    with pytest.raises(ConfigError) as caught:
        EngineConfig(rollout_external_engine_addrs=("a:1", address))
    assert str(caught.value) == f"--rollout-external-engine-addrs must be host:port ([host]:port for IPv6), got {address!r}"
    EngineConfig(rollout_external_engine_addrs=("a:1", "http://b:2/", "[::1]:3"))


@pytest.mark.parametrize(
    ("band", "fits"),
    [((0.0, 1.0), True), ((0.5, 0.5), True), ((0.6, 0.5), False), ((-0.1, 0.5), False), ((0.5, 1.1), False), ((0.5,), False)],
)
def test_a_band_of_pass_rates_lies_between_none_and_all(band, fits):
    if fits:
        assert DataConfig(curriculum_band=band).curriculum_band == band
        return
    said = f"--curriculum-band must be two numbers from 0 to 1, the lower first, got {' '.join(f'{x:g}' for x in band)}"
    assert refusal("curriculum-band", band) == said
