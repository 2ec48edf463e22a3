import logging
from dataclasses import replace

import pytest

from qwench.checkpoints.manager import CheckpointManager
from qwench.checkpoints.saved import Saved
from qwench.config.sections.checkpoint import CheckpointConfig
from qwench.errors import ConfigError
from tests.fakes.console import RecordingConsole
from tests.fakes.learner import CountingLearner, CountingRollouts


def manager_of(folder, *, steps_per_rollout: int = 1, **flags: str) -> CheckpointManager:
    given = {f"--{name.replace('_', '-')}": value for name, value in flags.items()}
    config = CheckpointConfig(save=folder)
    return CheckpointManager(config, {}, RecordingConsole(), flags=given, steps_per_rollout=steps_per_rollout)


def save(manager: CheckpointManager, *ids: int) -> None:
    for i in ids:
        manager.save(i, CountingLearner(i), CountingRollouts(i))


def test_a_fresh_run_has_nothing_saved(tmp_path):
    assert manager_of(tmp_path).saved is None
    assert manager_of(tmp_path, steps_per_rollout=3).train_steps(4) == 12


def test_the_newest_checkpoint_is_known_before_anything_is_loaded(tmp_path):
    save(manager_of(tmp_path), 1, 2)
    saved = manager_of(tmp_path).saved
    assert (saved.iteration, saved.folder, saved.is_own) == (2, tmp_path / "iter_0000002", True)
    assert saved.rollouts["taken"] == 2


def test_steps_go_on_from_those_taken_when_a_rollout_has_another_number_of_them(tmp_path):
    save(manager_of(tmp_path, steps_per_rollout=4), 3)
    resumed = manager_of(tmp_path, steps_per_rollout=2)
    assert [resumed.train_steps(rollout_id) for rollout_id in (3, 4, 5)] == [12, 14, 16]
    save(resumed, 5)
    assert manager_of(tmp_path, steps_per_rollout=8).train_steps(6) == 16 + 8


def test_each_flag_that_changed_is_one_line(tmp_path, caplog):
    save(manager_of(tmp_path, lr="1e-4", num_rollout="3", seed="1", save="a", gone="x", eval_interval="10"), 1)
    with caplog.at_level(logging.INFO):
        manager_of(tmp_path, lr="1e-6", num_rollout="6", seed="1", save="b", new="y", eval_interval="1").restore(
            CountingLearner(), CountingRollouts()
        )
    assert [record.getMessage() for record in caplog.records] == [
        f"resuming from {tmp_path / 'iter_0000001'}",
        "changed since checkpoint 1: --eval-interval 10 -> 1 "
        "(--early-stopping-patience counts as if it had been so since the best evaluation)",
        "changed since checkpoint 1: --gone x -> -",
        "changed since checkpoint 1: --lr 1e-4 -> 1e-6 (from the next step on)",
        "changed since checkpoint 1: --new - -> y",
        "changed since checkpoint 1: --num-rollout 3 -> 6 (a decaying learning rate is spread over the new length)",
    ]


@pytest.mark.parametrize(
    ("flag", "means"),
    [
        ("num_epoch", "a decaying learning rate is spread over the new length"),
        ("global_batch_size", "other steps per rollout; their positions on the x-axis go on from the last one"),
        ("rollout_batch_size", "other steps per rollout; their positions on the x-axis go on from the last one"),
        ("hf_checkpoint", "its tokenizer and config are used, its weights are not"),
    ],
)
def test_what_a_changed_flag_means_is_said(tmp_path, caplog, flag, means):
    save(manager_of(tmp_path, **{flag: "1"}), 1)
    with caplog.at_level(logging.INFO):
        manager_of(tmp_path, **{flag: "2"}).restore(CountingLearner(), CountingRollouts())
    assert caplog.messages[-1] == f"changed since checkpoint 1: --{flag.replace('_', '-')} 1 -> 2 ({means})"


@pytest.mark.parametrize(
    "flag", ["advantage_estimator", "n_samples_per_prompt", "rollout_temperature", "rm_type", "hf_checkpoint"]
)
def test_any_flag_of_the_algorithm_data_or_model_that_changed_is_said(tmp_path, caplog, flag):
    save(manager_of(tmp_path, seed="1", **{flag: "one"}), 1)
    with caplog.at_level(logging.INFO):
        manager_of(tmp_path, seed="1", **{flag: "other"}).restore(CountingLearner(), CountingRollouts())
    said = [record.getMessage() for record in caplog.records if "changed" in record.getMessage()]
    assert len(said) == 1 and said[0].startswith(f"changed since checkpoint 1: --{flag.replace('_', '-')} one -> other")


def test_a_finished_run_says_so_and_a_shorter_one_is_refused(tmp_path):
    save(manager_of(tmp_path), 3)
    saved = manager_of(tmp_path).saved
    assert saved.check_length(4) is None
    assert saved.check_length(3).endswith("is the end of this run (--num-rollout 3): nothing to do; a larger one goes on")
    with pytest.raises(ConfigError, match="--num-rollout 2 is less than the 3 rollouts"):
        saved.check_length(2)


@pytest.mark.parametrize(
    ("held", "flag", "fits"),
    [
        ("unfinished", "n_samples_per_prompt", False),
        ("in_flight", "n_samples_per_prompt", False),
        ("finished", "n_samples_per_prompt", False),
        ("finished", "rollout_batch_size", False),
        ("unfinished", "rollout_batch_size", True),
        ("in_flight", "lr", True),
        (None, "n_samples_per_prompt", True),
    ],
)
def test_groups_of_another_size_are_not_gone_on_with(tmp_path, held, flag, fits):
    rollouts = CountingRollouts(1)
    before = rollouts.state_dict() | ({} if held is None else {held: [{}, {}]})
    rollouts.state_dict = lambda: before
    manager_of(tmp_path, **{flag: "2"}).save(1, CountingLearner(1), rollouts)
    assert manager_of(tmp_path, **{flag: "2"}).saved.iteration == 1
    if fits:
        assert manager_of(tmp_path, **{flag: "4"}).saved.iteration == 1
        return
    word = f"--{flag.replace('_', '-')}"
    with pytest.raises(ConfigError, match=rf"{word} was 2 and is 4, but .*iter_0000001 holds .*\(2 .*go on with {word} 2"):
        _ = manager_of(tmp_path, **{flag: "4"}).saved


def test_the_learning_rates_of_the_checkpoint_may_be_asked_for(tmp_path):
    def manager(lr: str, **flags: object) -> CheckpointManager:
        config = CheckpointConfig(save=tmp_path, **flags)
        return CheckpointManager(config, {}, RecordingConsole(), flags={"--lr": lr, "--seed": lr})

    manager("1e-6").save(1, CountingLearner(101), CountingRollouts(1))
    assert manager("1e-5").saved.iteration == 1
    assert manager("1e-6", use_checkpoint_opt_param_scheduler=True).saved.iteration == 1
    with pytest.raises(
        ConfigError, match=r"^--use-checkpoint-opt-param-scheduler: .*iter_0000001 was saved with --lr 1e-6; give the same"
    ):
        _ = manager("1e-5", use_checkpoint_opt_param_scheduler=True).saved


@pytest.mark.parametrize(
    "flag",
    ["--min-lr", "--lr-decay-style", "--lr-decay-iters", "--lr-warmup-iters", "--lr-warmup-fraction", "--lr-warmup-init",
     "--lr-wsd-decay-iters", "--lr-wsd-decay-style", "--weight-decay"],
)  # fmt: skip
def test_any_flag_of_the_schedule_is_asked_for(tmp_path, flag):
    saved = Saved(folder=tmp_path, iteration=1, meta={"flags": {"--lr": "1", flag: "2"}}, rollouts={}, is_own=True)
    saved.check_schedule({"--lr": "1", flag: "2", "--seed": "3"})
    with pytest.raises(ConfigError, match=rf"was saved with {flag} 2; give the same"):
        saved.check_schedule({"--lr": "1"})
    with pytest.raises(ConfigError, match=rf"was saved with --lr -, {flag} -; give the same"):
        replace(saved, meta={"flags": None}).check_schedule({"--lr": "1", flag: "2"})


@pytest.mark.parametrize(
    "flag",
    [
        *(
            "save",
            "load",
            "save_hf",
            "save_interval",
            "keep_checkpoints",
            "save_numbering",
            "ckpt_step",
            "log_dir",
            "log_level",
        ),
        *("dry_run", "debug_exit_after_rollout", "save_trigger_sentinel", "rollout_timeout", "use_pytorch_profiler"),
    ],
)
def test_flags_of_places_and_reports_may_change_without_a_word(tmp_path, caplog, flag):
    save(manager_of(tmp_path, seed="1", **{flag: "one"}), 1)
    with caplog.at_level(logging.INFO):
        manager_of(tmp_path, seed="1", **{flag: "other"}).restore(CountingLearner(), CountingRollouts())
    assert [record.getMessage() for record in caplog.records] == [f"resuming from {tmp_path / 'iter_0000001'}"]
