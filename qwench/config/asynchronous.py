"""What fully asynchronous rollouts exclude."""

from __future__ import annotations

from qwench.config.config import Config


def asynchronous_rollouts_never_end(config: Config) -> str | None:
    """Flags that cut a rollout off, or count rollouts between publications, have nothing to act on."""
    rollout = config.rollout
    if not config.asynchronous.fully_async:
        return None
    if config.algorithm.loss_type == "sft_loss":
        return "--fully-async generates rollouts, and fine-tuning has none; leave it out"
    for flag, is_given, reason in (
        ("--partial-rollout", rollout.partial_rollout, "no response is cut off at the end of a rollout"),
        ("--over-sampling-batch-size", rollout.over_sampling_batch_size is not None, "groups are begun one by one"),
        ("--buffer-filter-path", rollout.buffer_filter_path is not None, "no unfinished group waits for a later rollout"),
        ("--rollout-function-path", rollout.rollout_function_path is not None, "the built-in function makes the rollouts"),
        ("--update-weights-interval", rollout.update_weights_interval > 1, "weights are published after every rollout"),
        ("--debug-rollout-only", config.debug.debug_rollout_only, "nothing is trained"),
        ("--load-debug-rollout-data", not config.generates, "recorded rollouts are not generated"),
    ):
        if is_given:
            return f"{flag} has no effect with --fully-async: {reason}; leave one of them out"
    return None
