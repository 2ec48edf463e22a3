"""Stock SGLang servers: how to start one, and which of its flags are the user's.

Written against SGLang 0.5.16: `python -m sglang.launch_server`, whose `--admin-api-key` protects the endpoints that change
weights or memory, and whose `--enable-memory-saver` lets it give memory back.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence

from qwench.config.sections.engine import EngineConfig
from qwench.engines.fleet.servers import ServerCommand, server_environ, visible_devices
from qwench.engines.kinds.kind import EngineKind, ServerOrder
from qwench.engines.kinds.passthrough_flags import check_words, refuse_owned
from qwench.engines.kinds.sglang_receiver import SglangReceiver

_ONE_SERVER = "an engine is one server of --rollout-num-gpus-per-engine GPUs on one node; --rollout-num-gpus gives more engines"
_ADDRESS = "addresses are chosen by Qwench; give servers that run already by --rollout-external-engine-addrs"
_PRIVATE = "each run makes its own token"
OWN_FLAGS: Mapping[str, str] = {
    **dict.fromkeys(("model-path", "model", "tokenizer-path"), "use --hf-checkpoint"),
    "config": "give the flags themselves, or qwench's --config",
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

_OVERRIDES = frozenset({"--json-model-override-args", "--context-length"})
"""With one of them the user decides how long texts are."""

_PARSER_PROGRAM = """
from sglang.srt.server_args import ServerArgs
ServerArgs.add_cli_args(parser)
"""


def check_sglang_words(words: Sequence[str]) -> None:
    """Refuse the flags that Qwench sets, and check the others with the parser of the installed SGLang.

    Raises:
        ConfigError: SGLang is not installed, or does not know a flag, or Qwench sets it.
    """
    refuse_owned(words, OWN_FLAGS, prefix="sglang")
    # The model's folder is the one argument that SGLang's parser insists on.
    check_words([*words, "--model-path", "."], prefix="sglang", parser_program=_PARSER_PROGRAM, package="sglang")


def check_flags(engine: EngineConfig) -> None:
    """See `check_sglang_words`."""
    check_sglang_words(engine.sglang_args)


def sglang_command(
    order: ServerOrder, *, index: int, gpu_ids: Sequence[int], environ: Mapping[str, str], host: str = "127.0.0.1"
) -> ServerCommand:
    """Return how to start engine `index`; see `EngineKind.command`."""
    engine, tp_size = order.engine, order.devices_per_engine
    assert not gpu_ids or len(gpu_ids) == tp_size, f"{len(gpu_ids)} GPUs for tp {tp_size}"
    argv = [sys.executable, "-P", "-m", "sglang.launch_server", *engine.sglang_args]
    argv += ["--model-path", str(order.model_folder), "--tp-size", str(tp_size), "--dtype", order.dtype]
    # Engines that sampled with one seed would draw the same for requests that bring none.
    argv += ["--random-seed", str(order.seed + index)]
    # SGLang reads the token from this file: other users of the machine see command lines. Another run may use the same folder.
    secrets = order.log_folder / f".engine-{index}-{os.getpid()}.yaml"
    argv += ["--config", str(secrets)]
    if order.stretched_positions is not None and not _OVERRIDES.intersection(engine.sglang_args):
        # SGLang would end texts at max_position_embeddings, which Qwen3's instructions for YaRN leave as it is.
        argv += ["--json-model-override-args", json.dumps({"max_position_embeddings": order.stretched_positions})]
    if order.releases_memory:
        argv += ["--enable-memory-saver"]
    if engine.sglang_enable_deterministic_inference:
        argv += ["--enable-deterministic-inference"]
    if order.serves_checkpoint:
        # Otherwise it stays a word that is no number, and the client refuses answers of weights never published.
        argv += ["--weight-version", "0"]
    return ServerCommand(
        label=f"SGLang engine {index}",
        argv=tuple(argv),
        # Log-probs must be those at the sampling temperature.
        environ=server_environ(environ, SGLANG_RETURN_ORIGINAL_LOGPROB="0", **visible_devices(gpu_ids, environ)),
        log_file=order.log_folder / f"engine-{index}.log",
        private_files={secrets: f"admin-api-key: {json.dumps(order.token)}\n"},
        host=host,
        start_timeout_s=engine.engine_start_timeout,
    )


SGLANG = EngineKind(
    name="sglang",
    runs_in_process=False,
    check_flags=check_flags,
    command=sglang_command,
    receiver=SglangReceiver,
    answers=lambda model_info: True,
)
"""A server with this HTTP API that is of no other kind is taken for SGLang."""
