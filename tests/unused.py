"""Find code of the package that nothing but a test uses.

Such code is deleted or moved to tests. vulture finds names; `USED` explains those that only seem unused. An explanation that is
not needed any more is reported too.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from vulture import Vulture

ROOT = Path(__file__).parent.parent
FOLDERS = ("qwench", "scripts", "tools", "benchmarks", "examples")
REGISTERED = "qwench/algorithms/methods/"
"""Classes here register themselves under their name."""
FOREIGN = "qwench/foreign/"
"""Functions of other systems' users read its names."""
USED: Mapping[str, str] = {
    "Python, PyTorch, Megatron-Core, Rich, uvicorn and pydantic call or read them": """
        __cause__ __init_subclass__ architectures core_attention do_GET finalize_model_grads_func
        find_class log_message
        grad_stats_parallel_group handleError input_layernorm load_bytes model_config
        on_broken_pipe padding_idx pre_mlp_layernorm pre_tokenizer readable reducer_override seekable
        media_type should_exit trigger""",
    "they keep an object alive as long as their owner": "_timeout",
    "the driver calls methods of a rank by name": "next_bucket",
    "requests of SGLang's HTTP API may carry them": """
        background frequency_penalty no_logs presence_penalty repetition_penalty return_bytes return_entropy
        return_hidden_states return_text_in_logprobs spaces_between_special_tokens""",
    "requests of OpenAI's API may carry them": """
        continue_final_message echo function_call include_obfuscation logit_bias modalities parallel_tool_calls
        response_format separate_reasoning service_tier stream_reasoning user""",
    "flags of slime that are compared with config.json through `fields()`, or have no effect here": """
        add_qkv_bias disable_bias_linear generate_tool_call_parser group_query_attention
        make_vocab_size_divisible_by model_name norm_epsilon normalization num_attention_heads num_query_groups
        parallelism position_embedding_type rotary_base rotary_percent swiglu tito_model
        untie_embeddings_and_output_weights use_rotary_position_embeddings""",
    "a section lists the flags of hooks through `fields()`": """
        custom_megatron_before_log_prob_hook_path custom_megatron_before_train_step_hook_path custom_megatron_init_path
        custom_megatron_post_save_hook_path""",
    "a flag names it by its path": "check_parts_nonzero_std",
    "benchmarks hand them to other programs, or name them by path": "long_tail on_step_end",
    "tests kill processes and look for leaks by them": "pids unfinished",
}
"""Reason -> names."""


def unused_names(folders: Iterable[Path]) -> dict[str, str]:
    """Return each name that seems unused, with its place."""
    vulture = Vulture(ignore_decorators=["@app.*", "@triton.jit", "@*.register"])
    vulture.scavenge([str(folder) for folder in folders])
    found = vulture.get_unused_code(min_confidence=60)
    return {
        str(item.name): f"{Path(item.filename).relative_to(ROOT)}:{item.first_lineno}"
        for item in found
        if not (item.typ == "class" and REGISTERED in Path(item.filename).as_posix())
        and FOREIGN not in Path(item.filename).as_posix()
    }


def main() -> int:
    """Print what is unused, and what is explained without need; return the exit code."""
    unused = unused_names(ROOT / folder for folder in FOLDERS)
    explained = {name for names in USED.values() for name in names.split()}
    problems = [f"{place}: {name} is used by no code but tests" for name, place in unused.items() if name not in explained]
    problems += [f"{Path(__file__).name}: {name} is used, or gone" for name in sorted(explained - unused.keys())]
    sys.stdout.write("".join(f"{problem}\n" for problem in problems))
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
