"""The `args` of slime and miles: every flag under its Python name, with its resolved value.

It is a plain namespace that functions may write to, copy and pickle; what they write never reaches the run.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from qwench.config.config import Config
from qwench.config.model_flags import megatron_facts
from qwench.config.plan import RunPlan
from qwench.config.yaml_file import read_yaml_file
from qwench.foreign.declared_flags import parse_declared
from qwench.foreign.sample import Foreign

ABSENT: dict[str, Foreign] = {
    "ci_test": False,
    "use_rollout_routing_replay": False,
    "use_routing_replay": False,
    "use_rollout_indexer_replay": False,
    "multimodal_keys": None,
    "qkv_format": "thd",
    "moe_router_topk": None,
    "num_experts": None,
    "sglang_speculative_algorithm": None,
    "sglang_dp_size": 1,
    "sglang_ep_size": 1,
    "use_critic": False,
    "max_turns": None,
    "rollout_task_type": "math",
    "use_distributed_post": False,
    "use_slime_router": False,
    "use_miles_router": False,
}
"""Flags of slime and miles that Qwench has not -> the value that says so."""


def make_args(config: Config, plan: RunPlan, *, host: str, port: int) -> Namespace:
    """Return the namespace.

    Args:
        host: and `port`: where the engines are reached, as behind slime's and miles' router.
    """
    args = Namespace(**ABSENT)
    args.__dict__.update(parse_declared(config))
    for section in fields(config):
        part = getattr(config, section.name)
        for item in fields(part):
            setattr(args, item.name, _plain(getattr(part, item.name)))
    _set_passed(args, "sglang", config.engine.sglang_args)
    _set_passed(args, "router", config.engine.router_args)
    _set_derived(args, config, plan)
    args.sglang_router_ip, args.sglang_router_port = host, port
    if config.foreign.custom_config_path is not None:
        content = read_yaml_file(config.foreign.custom_config_path)
        args.__dict__.update({str(key).replace("-", "_"): value for key, value in content.items()})
    return args


def _plain(value: Foreign) -> Foreign:
    """Return lists and texts, as argparse would have made them."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple):
        return list(value) or None
    return dict(value) if isinstance(value, dict) else value


def _set_passed(args: Namespace, prefix: str, words: tuple[str, ...]) -> None:
    values: dict[str, list[str]] = {}
    for word in words:
        if word.startswith("--"):
            values[f"{prefix}_{word[2:].replace('-', '_')}"] = []
        else:
            values[next(reversed(values))].append(word)
    for name, given in values.items():
        numbers = [yaml.safe_load(text) for text in given]
        setattr(args, name, True if not numbers else numbers[0] if len(numbers) == 1 else numbers)


def _set_derived(args: Namespace, config: Config, plan: RunPlan) -> None:
    """Set what slime and miles call by another name, and what they derive."""
    model, algorithm = plan.model, config.algorithm
    derived: dict[str, Any] = megatron_facts(model) | {
        "train_backend": config.backend,
        "global_batch_size": plan.batch.global_batch_size,
        "num_steps_per_rollout": plan.batch.num_steps_per_rollout,
        "over_sampling_batch_size": config.rollout.over_sampling_batch_size or plan.batch.rollout_batch_size,
        "rollout_global_dataset": not config.data.disable_rollout_global_dataset,
        "compute_advantages_and_returns": not algorithm.disable_compute_advantages_and_returns,
        "grpo_std_normalization": not algorithm.disable_grpo_std_normalization,
        "rewards_normalization": not algorithm.disable_rewards_normalization,
        "eps_clip_high": algorithm.eps_clip if algorithm.eps_clip_high is None else algorithm.eps_clip_high,
        "rollout_num_gpus": config.cluster.rollout_num_gpus or config.cluster.world_size,
        "rollout_num_engines": plan.devices.num_engines,
        "offload_train": plan.devices.offload_train,
        "offload_rollout": plan.devices.offload_rollout,
        "wandb_random_suffix": False,
        "add_bias_linear": model.mlp_bias,
        "layernorm_epsilon": model.norm_eps,
        "padded_vocab_size": model.vocab_size,
        "rollout_stop": list(config.rollout.rollout_stop) or None,
        "eval_reward_key": plan.eval_reward_key,
        "eval_datasets": list(plan.eval_sets),
    }
    args.__dict__.update(derived)
