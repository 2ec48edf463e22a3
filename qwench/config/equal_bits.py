"""Where engine and trainer can compute equal bits: `--true-on-policy-mode` and `--batch-invariant-mode`."""

from __future__ import annotations

from qwench.config.config import Config
from qwench.errors import ConfigError
from qwench.models.architecture import Architecture


def check_equal_bits(config: Config, model: Architecture, *, on_gpus: bool) -> None:
    """Refuse a layout whose engine or trainer has no kernels of equal bits.

    SGLang's kernels are not known here: the learner compares every rollout, and the first difference ends the run.

    Raises:
        ConfigError: names the flag and what it needs.
    """
    training = config.training
    if training.recompute_logprobs_via_prefill and not training.true_on_policy_mode:
        raise ConfigError(
            "--recompute-logprobs-via-prefill needs --true-on-policy-mode: without it the log-probs are those of decoding; "
            "leave it out, or add --true-on-policy-mode"
        )
    if not training.batch_invariant:
        return
    flag = "--true-on-policy-mode" if training.true_on_policy_mode else "--batch-invariant-mode"
    if (stale := _stale(config)) is not None and training.true_on_policy_mode:
        raise ConfigError(
            f"{flag} compares the engine with weights of the same version; {stale} samples with older ones; leave one out"
        )
    if config.engine.kind == "sglang":
        if config.engine.sglang_enable_deterministic_inference:
            return
        raise ConfigError(
            f"{flag} with --rollout-engine sglang needs --sglang-enable-deterministic-inference: without it the batch changes "
            "the last bits of a log-prob"
        )
    if (missing := _missing(config, model, on_gpus=on_gpus)) is not None:
        raise ConfigError(f"{flag} with the embedded engine needs {missing}: other kernels have other bits; leave it out")


def _stale(config: Config) -> str | None:
    """Return the flag by which engines sample with older weights."""
    rollout = config.rollout
    for flag, is_set in (
        (f"--rollouts-ahead {rollout.rollouts_ahead}", rollout.rollouts_ahead > 0),
        ("--fully-async", config.asynchronous.fully_async),
        (f"--update-weights-interval {rollout.update_weights_interval}", rollout.update_weights_interval > 1),
        ("--partial-rollout", rollout.partial_rollout),
    ):
        if is_set:
            return flag
    return None


def _missing(config: Config, model: Architecture, *, on_gpus: bool) -> str | None:
    """Return what the one trainer with equal bits needs: it shares its decoder with the engine of this process."""
    for needed, is_there in (
        ("a CPU", not on_gpus),
        ("--train-backend fsdp", config.backend == "fsdp"),
        ("one trainer rank", config.num_ranks == 1),
        ("--colocate", config.cluster.shares_devices),
        ("--attn-implementation sdpa", config.model.attn_implementation == "sdpa"),
        ("a model without biases", not (model.qkv_bias or model.attention_output_bias or model.mlp_bias)),
    ):
        if not is_there:
            return needed
    return None
