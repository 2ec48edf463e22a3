"""Launch lines of slime and miles choose the methods that they choose there."""

from pathlib import Path

import pytest

from qwench.config.command_line.parse import parse_flags
from qwench.config.config import Config
from qwench.config.sections.reward import NO_TASK

MIS = """\
use_tis: true
use_rs: true
tis_level: token
rs_level: token
tis_mode: truncate
tis_lower_bound: 0.5
tis_upper_bound: 2.0
rs_lower_bound: null
rs_upper_bound: null
rs_veto_threshold: 0.0001
tis_batch_normalize: true
"""
HELPER = "examples.infra_features.train_infer_mismatch_helper.mis"


@pytest.mark.parametrize("function", ["compute_mis_weights_with_cp", "compute_mis_weights_fsdp", "compute_mis_weights"])
def test_the_mismatch_helper_and_its_file_choose_the_built_in_weights(tmp_path: Path, function: str):
    file = tmp_path / "mis.yaml"
    file.write_text(MIS)
    words = ["--custom-config-path", str(file), "--custom-tis-function-path", f"{HELPER}.{function}"]
    algorithm = parse_flags(Config, words, prog="train.py").algorithm
    assert (algorithm.use_tis, algorithm.tis_mode, algorithm.tis_level, algorithm.tis_bounds) == (
        True,
        "truncate",
        "token",
        (0.0, 2.0),
    )
    assert (algorithm.use_rs, algorithm.rs_level, algorithm.rs_bounds) == (True, "token", (0.5, 2.0))
    assert (algorithm.rs_veto_threshold, algorithm.tis_batch_normalize) == (1e-4, True)


BUILT_IN = [
    ("--custom-tis-function-path", f"{HELPER}.compute_mis_weights_fsdp"),
    ("--custom-tis-function-path", "examples.train_infer_mismatch_helper.mis.compute_mis_weights_with_cp"),
    ("--custom-tis-function-path", "slime.backends.megatron_utils.loss.vanilla_tis_function"),
    ("--data-source-path", "slime.rollout.data_source.RolloutDataSource"),
    ("--data-source-path", "miles.rollout.data_source.RolloutDataSourceWithBuffer"),
]


@pytest.mark.parametrize(("flag", "path"), BUILT_IN)
def test_a_function_of_theirs_that_means_the_built_in_is_said(flag: str, path: str):
    config = parse_flags(Config, ["--use-tis", flag, path], prog="train.py")
    assert (config.algorithm.custom_tis_function_path, config.data.data_source_path) == (None, None)
    assert config.foreign.unused_flags == (f"{flag[2:]} {path} (the built-in is used)",)
    own = parse_flags(Config, ["--use-tis", flag, path, flag, "mylab.mine"], prog="train.py")
    assert own.foreign.overridden_flags == (f"{flag[2:]} {path}",) and own.foreign.unused_flags == ()


def test_their_function_of_icepop_is_a_mode_of_ours_and_their_class_the_continuous_rollout():
    for path in ("slime.backends.megatron_utils.loss", "miles.backends.training_utils.loss_hub.corrections"):
        words = ["--use-tis", "--custom-tis-function-path", f"{path}.icepop_function"]
        algorithm = parse_flags(Config, words, prog="train.py").algorithm
        assert (algorithm.tis_mode, algorithm.custom_tis_function_path) == ("icepop", None)
    words = ["--rollout-function-path", "miles.rollout.fully_async_rollout.FullyAsyncRolloutFn"]
    assert parse_flags(Config, words, prog="train.py").asynchronous.fully_async


@pytest.mark.parametrize(
    ("flag", "path"),
    [
        ("--data-source-path", "mylab.rollout.data_source.RolloutDataSourceCurriculum"),
        ("--data-source-path", "mylab.rollout.data_source.RolloutDataSource"),
        ("--custom-tis-function-path", "plugins.my_mis.compute_mis_weights_v2"),
        ("--custom-tis-function-path", "plugins.mis.compute_mis_weights"),
    ],
)
def test_a_function_of_the_users_is_not_taken_for_one_of_theirs(flag: str, path: str):
    config = parse_flags(Config, ["--use-tis", flag, path], prog="train.py")
    assert path in (config.algorithm.custom_tis_function_path, config.data.data_source_path)
    assert config.foreign.unused_flags == ()


def test_settings_of_weights_belong_to_a_function_of_the_users_that_computes_them(tmp_path: Path):
    file = tmp_path / "mis.yaml"
    file.write_text("use_tis: true\nuse_rs: true\ntis_batch_normalize: true\ntis_upper_bound: 3.0\n")
    words = ["--custom-config-path", str(file), "--custom-tis-function-path"]
    own = parse_flags(Config, [*words, "mylab.mis.compute"], prog="train.py").algorithm
    assert (own.use_tis, own.use_rs, own.tis_batch_normalize, own.tis_clip) == (True, False, False, 2.0)
    theirs = parse_flags(
        Config, [*words, "examples.train_infer_mismatch_helper.mis.compute_mis_weights"], prog="train.py"
    ).algorithm
    assert (theirs.use_rs, theirs.tis_batch_normalize, theirs.tis_clip) == (True, True, 3.0)


def test_the_file_wins_over_the_command_line_also_by_another_name(tmp_path: Path):
    file = tmp_path / "mis.yaml"
    file.write_text(MIS)
    words = ["--tis-clip", "3", "--custom-config-path", str(file)]
    assert parse_flags(Config, words, prog="train.py").algorithm.tis_clip == 2.0


TEACHER = "rollout.on_policy_distillation"


@pytest.mark.parametrize("system", ["slime", "miles"])
def test_their_distillation_from_a_server_means_a_teacher_and_no_task(system: str):
    words = ["--use-opd", "--opd-type", "sglang", "--rm-url", "http://127.0.0.1:13141/generate", "--rm-type", "math"]
    words += ["--custom-rm-path", f"{system}.{TEACHER}.reward_func"]
    words += ["--custom-reward-post-process-path", f"{system}.{TEACHER}.post_process_rewards"]
    config = parse_flags(Config, words, prog="train.py")
    assert config.distillation.teacher_urls(config.reward.rm_url) == {"default": "http://127.0.0.1:13141/generate"}
    assert (config.reward.custom_rm_path, config.reward.custom_reward_post_process_path) == (NO_TASK, None)


def test_several_teachers_and_their_likeliest_tokens_are_chosen_as_there():
    words = ["--use-opd", "--opd-type", "sglang", "--opd-log-prob-top-k", "16", "--opd-top-k-strategy", "only-student"]
    words += ["--opd-reward-weight-mode", "student_p", "--opd-teacher-key", "opd_teacher"]
    words += ["--opd-teacher-urls", "math=http://a:1/generate", "default=http://b:2/generate"]
    section = parse_flags(Config, words, prog="train.py").distillation
    assert section.teacher_urls(None) == {"math": "http://a:1/generate", "default": "http://b:2/generate"}
    assert (section.opd_log_prob_top_k, section.opd_top_k_strategy) == (16, "only-student")
