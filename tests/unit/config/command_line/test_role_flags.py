from pathlib import Path

import pytest

from qwench.config.command_line.parse import parse_flags
from qwench.config.config import Config
from qwench.errors import ConfigError

ROLES = """\
megatron:
- name: default
  role: critic
  overrides: {lr: 1e-5, lr_warmup_iters: 3}
- name: default
  role: actor
  overrides:
    lr: 1e-6
"""


def read(file: Path, *words: str) -> Config:
    given = ["--megatron-config-path", str(file), "--advantage-estimator", "ppo", *words]
    return parse_flags(Config, given, prog="train.py")


@pytest.mark.parametrize("flag", ["--megatron-config-path", "--critic-config-path", "--megatron_config_path"])
def test_a_file_of_roles_sets_the_flags_of_each_model(tmp_path: Path, flag: str):
    file = tmp_path / "roles.yaml"
    file.write_text(ROLES)
    words = [flag, str(file), "--advantage-estimator", "ppo", "--lr", "1"]
    config = parse_flags(Config, words, prog="train.py")
    assert (config.critic.critic_lr, config.critic.critic_lr_warmup_iters, config.optimizer.lr) == (1e-5, 3, 1e-6)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("lr: 1\n", "must have a list `megatron` of role and overrides"),
        ("megatron: [{role: reward, overrides: {lr: 1}}]\n", "has the role 'reward'; known: actor, critic"),
        (
            "megatron: [{role: critic, overrides: {adam_beta2: 0.9}}]\n",
            "the critic has no adam-beta2 of its own; it may",
        ),
        ("megatron: [{role: actor, overrides: {learning_rte: 0.9}}]\n", "unknown flag --learning-rte"),
    ],
)
def test_what_a_role_cannot_have_is_refused_with_the_file(tmp_path: Path, text: str, problem: str):
    file = tmp_path / "roles.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read(file)
    assert str(file) in str(caught.value)
    assert problem in str(caught.value)


def test_a_critic_needs_a_method_that_has_one():
    with pytest.raises(ConfigError, match=r"^--critic-lr \(1.0\) has no effect with --advantage-estimator grpo, which"):
        parse_flags(Config, ["--critic-lr", "1"], prog="qwench train")
    with pytest.raises(ConfigError, match="--num-critic-only-steps"):
        parse_flags(Config, ["--num-critic-only-steps", "1"], prog="qwench train")
    with pytest.raises(ConfigError, match=r"^--critic-train-only has no effect with --advantage-estimator grpo, which has no"):
        parse_flags(Config, ["--critic-train-only"], prog="qwench train")
    words = ["--advantage-estimator", "ppo", "--custom-advantage-function-path", "mine.advantages"]
    with pytest.raises(ConfigError, match="--custom-advantage-function-path replaces the returns that the critic of --adv"):
        parse_flags(Config, words, prog="qwench train")
