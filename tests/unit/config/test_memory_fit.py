"""What does not fit a GPU is refused before it starts."""

from dataclasses import replace

import pytest

from qwench.config.command_line.parse import parse_flags
from qwench.config.config import Config
from qwench.config.memory_fit import check_fit, engine_weight_bytes, weight_bytes_beside_trainer
from qwench.config.plan import plan_run
from qwench.errors import ConfigError
from tests.unit.config.architectures import QWEN3_4B

WEIGHTS_4B = 4_022_468_096
"""Parameters of Qwen3-4B, worked out by hand: 151,936 x 2,560 + 2,560 + 36 layers of 2 x 4,096 x 2,560 + 2 x 1,024 x 2,560 +
3 x 9,728 x 2,560 + 2 x 2,560 + 2 x 128."""
GIB = 2**30
TEACHER = "--use-opd --opd-type megatron --opd-teacher-load teacher"


def read(*words: str) -> Config:
    given = ["--rollout-batch-size", "8", "--actor-num-gpus-per-node", "8", *words]
    return parse_flags(Config, given, prog="qwench train")


def test_weights_are_divided_among_the_gpus_of_an_engine():
    config = read("--rollout-num-gpus-per-engine", "2")
    assert engine_weight_bytes(plan_run(config, QWEN3_4B)) == WEIGHTS_4B
    config = read("--rollout-engine", "embedded")
    assert engine_weight_bytes(plan_run(config, QWEN3_4B)) == 2 * WEIGHTS_4B
    config = read("--rollout-engine", "embedded", "--rollout-num-gpus-per-engine", "2")
    assert engine_weight_bytes(plan_run(config, QWEN3_4B)) == WEIGHTS_4B
    assert engine_weight_bytes(plan_run(read("--loss-type", "sft_loss"), QWEN3_4B)) == 0


def test_fp8_weights_are_matrices_of_layers_and_their_scales_beside_bfloat16():
    config = read("--rollout-engine", "embedded")
    matrices = 36 * (2 * 4096 * 2560 + 2 * 1024 * 2560 + 3 * 9728 * 2560)
    expected = matrices + 4 * matrices // 128**2 + 2 * (WEIGHTS_4B - matrices)
    assert engine_weight_bytes(plan_run(config, QWEN3_4B), fp8=True) == expected


@pytest.mark.parametrize(
    ("words", "copies"),
    [
        ("--colocate", 0),
        ("", 0),  # devices apart
        ("--colocate --update-weights-interval 2", 1),
        ("--colocate --train-backend megatron", 1),
        ("--colocate --lora-rank 8", 1),
        ("--colocate --lora-rank 8 --lora-publish adapter", 0),
        (f"--colocate --lora-rank 8 --lora-publish adapter {TEACHER}", 0),
        (f"--colocate --lora-rank 8 --lora-publish adapter {TEACHER} --update-weights-interval 2", 1),
        ("--colocate --lora-rank 8 --lora-publish adapter --lora-base nf4", 1),
        ("--colocate --actor-num-gpus-per-node 2", 0),  # engines have processes of their own
    ],
)
def test_an_engine_in_the_trainers_process_has_a_copy_where_it_cannot_share(words, copies):
    given = ["--rollout-batch-size", "8", "--rollout-engine", "embedded", *words.split()]
    config = parse_flags(Config, given, prog="qwench train")
    assert weight_bytes_beside_trainer(config, plan_run(config, QWEN3_4B)) == copies * 2 * WEIGHTS_4B


def test_an_engine_that_does_not_fit_is_refused_with_what_to_do():
    engine = ("--sglang-page-size", "1", "--sglang-mem-fraction-static", "0.5", "--sglang-stream-interval", "2")
    small = read("--rollout-num-gpus-per-engine", "1", *engine)
    plan = plan_run(small, QWEN3_4B)
    with pytest.raises(ConfigError) as refused:
        check_fit(small, plan, device_bytes=14 * GIB)
    assert str(refused.value) == (
        "an engine of 1 GPU holds 7.49 GiB of weights on each, more than --sglang-mem-fraction-static 0.5 of 14 GiB; "
        "raise --rollout-num-gpus-per-engine"
    )
    check_fit(small, plan, device_bytes=4 * WEIGHTS_4B)
    with pytest.raises(ConfigError, match="an engine of 1 GPU"):
        check_fit(small, plan, device_bytes=4 * WEIGHTS_4B - 1)
    mixed = replace(plan, devices=replace(plan.devices, engine_sizes=(2, 1)))
    with pytest.raises(ConfigError, match=r"an engine of 1 GPU holds 7\.49 GiB"):
        check_fit(small, mixed, device_bytes=14 * GIB)
    check_fit(small, plan, device_bytes=14 * GIB, fp8=True)
    embedded = read("--rollout-engine", "embedded")
    with pytest.raises(ConfigError, match=r"--embedded-mem-fraction 0\.8 of 8 GiB; raise --rollout-num-gpus-per-engine"):
        check_fit(embedded, plan_run(embedded, QWEN3_4B), device_bytes=8 * GIB)


def test_sglangs_own_share_is_nine_tenths_at_most():
    config = read("--sglang-page-size", "1")
    plan = plan_run(config, QWEN3_4B)
    check_fit(config, plan, device_bytes=20 * WEIGHTS_4B // 9 + 1)
    with pytest.raises(ConfigError, match=r"--sglang-mem-fraction-static 0\.9 of"):
        check_fit(config, plan, device_bytes=20 * WEIGHTS_4B // 9 - 1)


def test_a_trainer_that_does_not_fit_is_refused():
    config = read("--rollout-num-gpus-per-engine", "8")
    exact = plan_run(config, QWEN3_4B)
    check_fit(config, exact, device_bytes=exact.rank_bytes.device)
    only = replace(exact, devices=replace(exact.devices, trains=False))
    check_fit(config, only, device_bytes=4 * GIB)
    with pytest.raises(ConfigError, match=r"each trainer rank holds .* more than the 4 GiB of its GPU"):
        check_fit(config, plan_run(config, QWEN3_4B), device_bytes=4 * GIB)
    critic = read("--advantage-estimator", "ppo", "--critic-num-gpus-per-node", "1", "--rollout-num-gpus-per-engine", "8")
    plan = plan_run(critic, QWEN3_4B)
    assert plan.critic is not None and plan.rank_bytes.device < 20 * GIB < plan.critic.rank_bytes.device
    with pytest.raises(ConfigError, match=r"each critic rank holds .* more than the 20 GiB of its GPU"):
        check_fit(critic, plan, device_bytes=20 * GIB)
