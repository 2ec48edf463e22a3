"""Stock SGLang servers: how to start one, and whether the installed SGLang and router take the flags that pass through.

Written against SGLang 0.5.16: `python -m sglang.launch_server`, whose `--admin-api-key` protects the endpoints that change
weights or memory, and whose `--enable-memory-saver` lets it give memory back.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence

from qwench.engines.client import SERVER_IDLE_TIMEOUT_S
from qwench.engines.fleet.servers import ServerCommand, server_environ, visible_devices
from qwench.engines.kinds.kind import EngineKind, ServerOrder
from qwench.engines.kinds.sglang_receiver import SglangReceiver
from qwench.errors import ConfigError

_OVERRIDES = frozenset({"--json-model-override-args", "--context-length"})
"""With one of them the user decides how long texts are."""
_KEEP_ALIVE = "SGLANG_TIMEOUT_KEEP_ALIVE"
"""Seconds that an idle connection stays open; SGLang closes it after 5."""

_PARSER_PROGRAM = """
from sglang.srt.server_args import ServerArgs
ServerArgs.add_cli_args(parser)
"""


def check_sglang_words(words: Sequence[str]) -> None:
    """Check the flags with the parser of the installed SGLang.

    Raises:
        ConfigError: SGLang is not installed, or does not know a flag.
    """
    # The model's folder is the one argument that SGLang's parser insists on.
    check_words([*words, "--model-path", "."], prefix="sglang", parser_program=_PARSER_PROGRAM, package="sglang")


def sglang_command(
    order: ServerOrder, *, index: int, gpu_ids: Sequence[int], environ: Mapping[str, str], host: str = "127.0.0.1"
) -> ServerCommand:
    """Return how to start engine `index`; see `EngineKind.command`."""
    engine, tp_size = order.engine, order.engine_sizes[index]
    assert not gpu_ids or len(gpu_ids) == tp_size, f"{len(gpu_ids)} GPUs for tp {tp_size}"
    argv = [sys.executable, "-P", "-m", "sglang.launch_server", *_adapter_words(order)]
    if order.ranks_requests:
        # Without a default value SGLang lets requests that bring no priority wait for all others.
        argv += ["--enable-priority-scheduling", "--default-priority-value", "0"]
    if order.keeps_requests:
        # SGLang drops cached prefixes, which are of the old weights, only while it has no request; it ends otherwise.
        argv += ["--disable-radix-cache"]
    argv += engine.sglang_args
    argv += ["--model-path", str(order.model_folder), "--tp-size", str(tp_size), "--dtype", order.dtype]
    # Engines that sampled with one seed would draw the same for requests that bring none.
    argv += ["--random-seed", str(order.seed + index)]
    # SGLang reads the token from this file: other users of the machine see command lines. Another run may use the same folder.
    secrets = order.log_folder / f".engine-{index}-{os.getpid()}.yaml"
    argv += ["--config", str(secrets)]
    if order.stretched_positions is not None and not _OVERRIDES.intersection(engine.sglang_args):
        # SGLang would end texts at max_position_embeddings, which Qwen3's instructions for YaRN leave as it is.
        argv += ["--json-model-override-args", json.dumps({"max_position_embeddings": order.stretched_positions})]
    changes = {
        "SGLANG_RETURN_ORIGINAL_LOGPROB": "0",  # log-probs must be those at the sampling temperature
        _KEEP_ALIVE: environ.get(_KEEP_ALIVE, str(SERVER_IDLE_TIMEOUT_S)),
    }
    if order.releases_memory:
        argv += ["--enable-memory-saver"]
        changes |= _without_expandable_segments(environ)
    if engine.sglang_enable_deterministic_inference:
        argv += ["--enable-deterministic-inference"]
    if order.serves_checkpoint:
        # Otherwise the version is not a number, and the client refuses responses of unpublished weights.
        argv += ["--weight-version", "0"]
    return ServerCommand(
        label=f"SGLang engine {index}",
        argv=tuple(argv),
        environ=server_environ(environ, **changes, **visible_devices(gpu_ids, environ)),
        log_file=order.log_folder / f"engine-{index}.log",
        private_files={secrets: f"admin-api-key: {json.dumps(order.token)}\n"},
        host=host,
        start_timeout_s=engine.engine_start_timeout,
    )


def _without_expandable_segments(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the allocator's settings without what the memory saver refuses; a run may set it for its trainer."""
    return {
        name: ",".join(one for one in environ[name].split(",") if not one.strip().startswith("expandable_segments"))
        for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
        if name in environ
    }


def _adapter_words(order: ServerOrder) -> list[str]:
    """Return the flags for adapters that publications bring; flags of the user come later and win."""
    if order.adapter is None:
        return []
    # At a publication the adapter before it is still loaded.
    limits = ["--max-lora-rank", str(order.adapter.rank), "--max-loras-per-batch", "2", "--max-loaded-loras", "2"]
    return ["--enable-lora", *limits, "--lora-target-modules", *order.adapter.targets]


SGLANG = EngineKind(
    name="sglang",
    check_flags=lambda engine: check_sglang_words(engine.sglang_args),
    command=sglang_command,
    receiver=SglangReceiver,
    answers=lambda model_info: True,
)
"""A server with this HTTP API that is of no other kind is taken for SGLang."""


CHECK_TIMEOUT_S = 180.0
_PREAMBLE = """
import argparse, sys
parser = argparse.ArgumentParser(prog="flags", allow_abbrev=False)
"""
_EPILOGUE = """
parser.parse_args(sys.argv[1:])
"""
_NOT_INSTALLED = 3


def check_words(words: Sequence[str], *, prefix: str, parser_program: str, package: str) -> None:
    """Check the flags with the parser of the installed package, in another process: an import takes seconds and GPU memory.

    Args:
        parser_program: Python lines that import the package and add its flags to `parser`.

    Raises:
        ConfigError: the package is not installed, or does not take the flags.
    """
    guarded = "try:\n" + "".join(f"    {line}\n" for line in parser_program.strip().splitlines())
    program = (
        f"{_PREAMBLE}{guarded}except ImportError as error:\n    print(error, file=sys.stderr)\n    sys.exit(3)\n{_EPILOGUE}"
    )
    try:
        finished = subprocess.run(
            [sys.executable, "-P", "-c", program, *words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=CHECK_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as cause:
        raise ConfigError(f"{package} did not read its flags within {CHECK_TIMEOUT_S:g} s; is it installed well?") from cause
    if finished.returncode == 0:
        return
    last = (finished.stderr.strip().splitlines() or ["(no message)"])[-1]
    if finished.returncode == _NOT_INSTALLED:
        raise ConfigError(f"{package} cannot be imported ({last}); install it: pip install 'qwench[sglang]'")
    problem = last.removeprefix("flags: error: ").replace("--", f"--{prefix}-")
    raise ConfigError(f"the installed {package} does not take the --{prefix}-* flags: {problem}")
