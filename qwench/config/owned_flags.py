"""Flags of the SGLang server and its router that Qwench sets itself: who gives one is told what to use instead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qwench.errors import ConfigError

_ONE_SERVER = "an engine is one server of --rollout-num-gpus-per-engine GPUs on one node; --rollout-num-gpus gives more engines"
_ADDRESS = "addresses are chosen by Qwench; give servers that run already by --rollout-external-engine-addrs"
_PRIVATE = "each run makes its own token"
SGLANG_OWN_FLAGS: Mapping[str, str] = {
    **dict.fromkeys(("model-path", "model", "tokenizer-path"), "use --hf-checkpoint"),
    "config": "Qwench reads the groups of engines, see --sglang-config",
    "tp-size": "use --rollout-num-gpus-per-engine",
    "tensor-parallel-size": "use --rollout-num-gpus-per-engine",
    "tp": "use --rollout-num-gpus-per-engine",
    **dict.fromkeys(
        ("dp-size", "data-parallel-size", "pp-size", "pipeline-parallel-size", "ep-size", "expert-parallel-size", "nnodes",
         "node-rank", "dist-init-addr", "nccl-init-addr"),
        _ONE_SERVER,
    ),
    **dict.fromkeys(("base-gpu-id", "gpu-id-step"), "GPUs are placed by Qwench; use CUDA_VISIBLE_DEVICES"),
    **dict.fromkeys(("host", "port", "nccl-port", "grpc-port"), _ADDRESS),
    **dict.fromkeys(("router-ip", "router-port"), "use --use-sglang-router and --router-port, which start a router"),
    "enable-memory-saver": "use --colocate or --offload-rollout",
    "enable-weights-cpu-backup": "weights are published again after memory was given back",
    "dtype": "use --train-dtype: engines compute in the dtype that is published",
    "random-seed": "use --rollout-seed",
    "trust-remote-code": "models are those that transformers knows",
    "weight-version": "it is the number of rollouts learned from",
    "api-key": _PRIVATE,
    "admin-api-key": _PRIVATE,
    "skip-tokenizer-init": "stop words need the tokenizer",
    "is-embedding": "an engine generates",
}  # fmt: skip
"""SGLang's flags, without their prefix, that are ours to set -> what to use instead."""

ROUTER_OWN_FLAGS: Mapping[str, str] = {
    "host": "the router serves this run only",
    "worker-urls": "the engines are added by Qwench; give addresses of others with --rollout-external-engine-addrs",
    "pd-disaggregation": "an engine does both prefill and decode",
    "service-discovery": "the engines are added by Qwench",
    "mini-lb": "it belongs to prefill-decode disaggregation",
    "api-key": "the router is reached from this run only",
    "backend": "engines speak SGLang's API",
}
"""Flags of the router that are ours to set."""


def refuse_owned(words: Sequence[str], owned: Mapping[str, str], *, prefix: str) -> None:
    """Refuse flags that Qwench sets itself.

    Args:
        words: the user's, without the prefix.
        owned: name -> why it is ours, and what to use instead.

    Raises:
        ConfigError: one of them is among the words.
    """
    for word in words:
        name = word.removeprefix("--")
        if word.startswith("--") and name in owned:
            raise ConfigError(f"--{prefix}-{name} is not passed on: {owned[name]}")
