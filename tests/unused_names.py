"""Names that vulture finds unused in the package, and who uses them; `make check` fails on any other one.

Code that only tests use does not belong in the package: delete it, or move it to tests.
"""

# ruff: noqa: F821, B018 - vulture reads these names; Python never runs this file.

# Registries find methods by their class.
_.__init_subclass__
Cispo
Grpo
Gspo
ReinforcePlusPlus
ReinforcePlusPlusBaseline
Sft

# Python, PyTorch, Megatron-Core, Rich, uvicorn and pydantic call or read them.
_.__cause__
_.__new__
_.core_attention
_.finalize_model_grads_func
_.find_class
_.get_unscaled_state
_.grad_stats_parallel_group
_.input_layernorm
_.k_layernorm
_.load_bytes
_.model_config
_.pre_mlp_layernorm
_.pre_tokenizer
_.q_layernorm
_.readable
_.reducer_override
_.seekable
_.should_exit
_.emit
_.eos_token
frame
kwargs
types

# They keep an object alive as long as their owner.
_._store
_._timeout

# The driver calls a rank's methods by name (`cluster.messages.Call`).
_.next_bucket

# Users name these functions by path, or read these attributes in functions of their own.
check_reward_nonzero_std
_.evaluating

# Requests of SGLang's HTTP API may carry these; the server refuses or ignores them by name.
_.background
_.frequency_penalty
_.log_metrics
_.no_logs
_.presence_penalty
_.repetition_penalty
_.return_bytes
_.return_entropy
_.return_hidden_states
_.return_text_in_logprobs
_.spaces_between_special_tokens

# Flags of slime that are compared with config.json, all by `fields()` of their section, or have no effect here.
_.add_qkv_bias
_.decoder_first_pipeline_num_layers
_.decoder_last_pipeline_num_layers
_.disable_bias_linear
_.group_query_attention
_.make_vocab_size_divisible_by
_.model_name
_.norm_epsilon
_.normalization
_.num_query_groups
_.parallelism
_.position_embedding_type
_.rotary_base
_.rotary_percent
_.swiglu
_.untie_embeddings_and_output_weights
_.use_rotary_position_embeddings

# Tests kill processes and look for leaks by them: no path of a run leads there.
_.leave_groups
_.num_free_pages
_.pids
_.process_group
