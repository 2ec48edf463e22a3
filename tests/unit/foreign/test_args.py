"""The `args` that functions of slime and miles get."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from qwench.config.command_line.parse import parse_flags
from qwench.config.config import Config
from qwench.config.plan import plan_run
from qwench.foreign.args import make_args
from tests.unit.config.architectures import QWEN3_4B


def args_of(*words: str) -> Namespace:
    given = ["--rollout-batch-size", "8", "--n-samples-per-prompt", "4", "--actor-num-gpus-per-node", "8", "--colocate", *words]
    config = parse_flags(Config, given, prog="qwench train")
    return make_args(config, plan_run(config, QWEN3_4B), host="10.0.0.1", port=3000)


def held(args: Namespace, expected: dict[str, object]) -> dict[str, object]:
    """Return what `args` holds under the expected names."""
    return {name: getattr(args, name) for name in expected}


def test_derived_values_have_the_names_of_the_references():
    args = args_of(
        "--rollout-num-gpus-per-engine", "2", "--num-steps-per-rollout", "2", "--eps-clip", "0.3", "--reward-key", "acc",
        "--rollout-stop-token-ids", "1", "2",
    )  # fmt: skip
    expected = {
        "train_backend": "fsdp", "global_batch_size": 16, "num_steps_per_rollout": 2, "over_sampling_batch_size": 8,
        "rollout_global_dataset": True, "compute_advantages_and_returns": True, "grpo_std_normalization": True,
        "rewards_normalization": True, "eps_clip_high": 0.3, "rollout_num_gpus": 8, "rollout_num_engines": 4,
        "offload_train": True, "offload_rollout": True, "wandb_random_suffix": False, "rollout_stop": None, "eval_datasets": [],
        "sglang_router_ip": "10.0.0.1", "sglang_router_port": 3000, "rollout_batch_size": 8, "n_samples_per_prompt": 4,
        "eval_reward_key": "acc", "rollout_stop_token_ids": [1, 2], "eval_prompt_data": None,
    }  # fmt: skip
    assert held(args, expected) == expected


def test_switches_are_turned_round():
    args = args_of(
        "--disable-grpo-std-normalization", "--disable-rewards-normalization",
        "--eps-clip-high", "0.4", "--over-sampling-batch-size", "12", "--rollout-stop", "a", "b",
    )  # fmt: skip
    expected = {
        "grpo_std_normalization": False, "rewards_normalization": False,
        "eps_clip_high": 0.4, "over_sampling_batch_size": 12, "rollout_stop": ["a", "b"],
    }  # fmt: skip
    assert held(args, expected) == expected


def test_the_architecture_is_that_of_the_model():
    expected = {
        "num_layers": 36, "hidden_size": 2560, "ffn_hidden_size": 9728, "num_attention_heads": 32, "num_query_groups": 8,
        "untie_embeddings_and_output_weights": False, "swiglu": True, "add_qkv_bias": False, "norm_epsilon": 1e-6,
        "kv_channels": 128, "vocab_size": 151936, "padded_vocab_size": 151936, "rotary_base": 1e6, "layernorm_epsilon": 1e-6,
        "qk_layernorm": True, "add_bias_linear": False, "num_experts": None, "qkv_format": "thd",
    }  # fmt: skip
    assert held(args_of(), expected) == expected


def test_flags_of_sglang_are_numbers_lists_and_switches():
    args = args_of("--sglang-mem-fraction-static", "0.5", "--sglang-cuda-graph-bs", "1", "2", "--sglang-disable-radix-cache")
    expected = {
        "sglang_mem_fraction_static": 0.5, "sglang_cuda_graph_bs": [1, 2], "sglang_disable_radix_cache": True,
        "sglang_dp_size": 1,
    }  # fmt: skip
    assert held(args, expected) == expected


def test_the_file_of_the_user_comes_last(tmp_path: Path):
    (tmp_path / "own.yaml").write_text("my-threshold: 0.5\nmax_turns: 7\n")
    args = args_of("--custom-config-path", str(tmp_path / "own.yaml"))
    assert held(args, {"my_threshold": 0, "max_turns": 0, "num_layers": 0}) == {
        "my_threshold": 0.5, "max_turns": 7, "num_layers": 36,
    }  # fmt: skip


def test_what_qwench_has_not_is_off():
    expected = {
        "ci_test": False, "use_rollout_routing_replay": False, "use_routing_replay": False, "use_rollout_indexer_replay": False,
        "multimodal_keys": None, "moe_router_topk": None, "num_experts": None, "sglang_speculative_algorithm": None,
        "sglang_dp_size": 1, "sglang_ep_size": 1, "use_critic": False, "max_turns": None, "rollout_task_type": "math",
        "use_distributed_post": False, "use_slime_router": False, "use_miles_router": False, "fully_async": False,
    }  # fmt: skip
    assert held(args_of(), expected) == expected
