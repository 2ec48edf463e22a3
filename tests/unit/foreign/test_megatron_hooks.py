"""What functions around Megatron's model, its checkpoints and publications are called with."""

from __future__ import annotations

import pickle
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import pytest

from qwench.config.sections.foreign import ForeignConfig
from qwench.errors import ConfigError
from qwench.foreign.megatron_hooks import AfterWrite, after_save, load_hooks, start_hooks
from qwench.training.hooks import NO_HOOKS

ARGS = Namespace(lr=1e-6)
CALLS: list[tuple[object, ...]] = []


class Parts:
    """The trainer's model, optimizer and schedule."""

    parts = ("model", "optimizer", "schedule")


def at_start(args):
    CALLS.append(("start", args))


def before_log_probs(args, model, store_prefix):
    CALLS.append(("log probs", args, model, store_prefix))


def before_step(args, rollout_id, step_id, model, optimizer, opt_param_scheduler):
    CALLS.append(("step", args, rollout_id, step_id, model, optimizer, opt_param_scheduler))


def saved(args, rollout_id, checkpoint_dir, hf_checkpoint_dir):
    CALLS.append(("saved", args, rollout_id, checkpoint_dir, hf_checkpoint_dir))


def written(args, version_dir, rollout_engines):
    CALLS.append(("written", args, version_dir, rollout_engines))


@pytest.fixture(autouse=True)
def _no_calls() -> Iterator[None]:
    CALLS.clear()
    yield
    CALLS.clear()


def section(**names: str) -> ForeignConfig:
    return ForeignConfig(**{field: f"{__name__}.{name}" for field, name in names.items()})


def test_each_hook_of_a_rank_is_called_with_the_parts_of_its_trainer():
    names = {
        "custom_megatron_init_path": "at_start",
        "custom_megatron_before_log_prob_hook_path": "before_log_probs",
        "custom_megatron_before_train_step_hook_path": "before_step",
    }
    hooks = start_hooks(section(**names), Parts(), lambda: ARGS)
    assert CALLS == [("start", ARGS)]
    hooks.before_log_probs("ref_")
    hooks.before_step(3, 1)
    assert CALLS[1:] == [
        ("log probs", ARGS, ["model"], "ref_"),
        ("step", ARGS, 3, 1, ["model"], "optimizer", "schedule"),
    ]


@pytest.mark.parametrize("name", ["before_log_probs", "before_step"])
def test_a_hook_alone_leaves_the_others_as_they_are(name):
    field = {"before_log_probs": "log_prob_hook", "before_step": "train_step_hook"}[name]
    hooks = start_hooks(section(**{f"custom_megatron_before_{field}_path": name}), Parts(), lambda: ARGS)
    assert CALLS == []
    hooks.before_log_probs("")
    hooks.before_step(0, 0)
    assert len(CALLS) == 1


NUM_ARGUMENTS = {
    "custom_megatron_init_path": 1,
    "custom_megatron_before_log_prob_hook_path": 3,
    "custom_megatron_before_train_step_hook_path": 6,
    "custom_megatron_post_save_hook_path": 4,
    "custom_update_weight_post_write_path": 3,
}


@pytest.mark.parametrize("field", NUM_ARGUMENTS)
def test_a_hook_of_another_number_of_arguments_is_refused_by_its_flag(field):
    of_number = {1: "at_start", 3: "before_log_probs", 4: "saved", 6: "before_step"}
    flag = "--" + field.replace("_", "-")
    for number, name in of_number.items():
        if number == NUM_ARGUMENTS[field]:
            assert list(load_hooks(section(**{field: name}))) == [field]
        else:
            with pytest.raises(ConfigError, match=rf"^{flag} '.*{name}' has the signature .*, but is called as fn\(args"):
                load_hooks(section(**{field: name}))


def test_without_hooks_the_trainer_may_be_any():
    assert start_hooks(section(custom_update_weight_post_write_path="written"), object(), lambda: ARGS) is NO_HOOKS
    assert after_save(section(custom_megatron_init_path="at_start"), lambda: ARGS) is None


def test_folders_of_checkpoints_and_publications_are_texts():
    call = after_save(section(custom_megatron_post_save_hook_path="saved"), lambda: ARGS)
    assert call is not None
    call(4, Path("/ckpt"), Path("/hf"))
    call(5, Path("/ckpt"), None)
    published = AfterWrite(section(custom_update_weight_post_write_path="written"), ARGS)
    pickle.loads(pickle.dumps(published))(Path("/v7"), ("http://a", "http://b"))
    assert CALLS == [
        ("saved", ARGS, 4, "/ckpt", "/hf"),
        ("saved", ARGS, 5, "/ckpt", None),
        ("written", ARGS, "/v7", ["http://a", "http://b"]),
    ]
