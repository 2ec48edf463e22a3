"""The engines of a run: inside this process, servers started for it, or servers that run already."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Protocol

from qwench.engines.client import HttpEngine
from qwench.engines.embedded.engine import EmbeddedEngine
from qwench.engines.embedded.settings import EmbeddedSettings
from qwench.engines.fleet.event_loop import EventLoopThread
from qwench.engines.fleet.health import HealthRules
from qwench.engines.fleet.identity import ModelIdentity, check_serves
from qwench.engines.fleet.members import Member
from qwench.engines.fleet.pool import EnginePool
from qwench.engines.fleet.router import Router, check_router_words, router_command
from qwench.engines.fleet.servers import Server, ServerCommand, ServerProcess, server_environ
from qwench.engines.kinds.embedded import TOKEN_VARIABLE, embedded_command
from qwench.engines.kinds.sglang import SglangSettings, check_sglang_words, sglang_command
from qwench.launch.inputs import Inputs, publication_dtype
from qwench.models.hf import is_fp8_checkpoint, stop_token_ids


class CommandMaker(Protocol):
    """Makes one engine's command where the server will run; picklable."""

    def __call__(self, *, gpu_ids: Sequence[int], environ: Mapping[str, str], host: str) -> ServerCommand:
        """Return the command.

        Args:
            gpu_ids: the engine's GPUs, counted among those that `environ` shows; empty on a CPU.
            environ: of the process that starts the server.
            host: address that it listens on and is reached at.
        """
        ...


def command_makers(inputs: Inputs, *, num_engines: int, token: str, with_weights: bool, on_gpus: bool) -> list[CommandMaker]:
    """Return for each engine how to start it.

    Args:
        on_gpus: the devices of the run are GPUs, whatever this machine has.
        token: what clients must show to change weights or memory.
        with_weights: the engines sample with the checkpoint's weights; else only after the first publication.

    Raises:
        ConfigError: SGLang is not installed, or does not take the --sglang-* flags.
    """
    engine = inputs.config.engine
    folder, timeout_s = _log_folder(inputs), engine.engine_start_timeout
    if engine.rollout_engine == "sglang":
        check_sglang_words(engine.sglang_args)
        settings = sglang_settings(inputs, serves_checkpoint=with_weights, on_gpus=on_gpus)
        make = partial(sglang_command, settings, log_folder=folder, token=token, start_timeout_s=timeout_s)
        return [partial(make, index=index) for index in range(num_engines)]
    make_embedded = partial(embedded_command, serve_words(inputs), log_folder=folder, token=token, start_timeout_s=timeout_s)
    return [partial(make_embedded, index=index) for index in range(num_engines)]


def build_pool(inputs: Inputs, *, with_weights: bool, servers: Sequence[Server] | None, token: str | None) -> EnginePool:
    """Start or reach the engines.

    Args:
        with_weights: load the checkpoint now; else the first publication brings the weights.
        servers: not started yet; None: one embedded engine in this process, or those of --rollout-external-engine-addrs.
        token: of the servers.

    Raises:
        ConfigError: an engine that runs already has another model, or the router does not take its flags.
        EngineError: a server did not start, or cannot be reached.
    """
    engine = inputs.config.engine
    if engine.routes_requests:
        check_router_words(engine.router_args)
    with ExitStack() as undo:
        loop = EventLoopThread()
        undo.callback(loop.close)
        if engine.rollout_external_engine_addrs:
            members = _reach_external(inputs, loop)
        elif servers is not None:
            for server in servers:
                undo.callback(server.stop)
            members = _start_servers(inputs, servers, token)
        else:
            members = [Member(engine=_embedded_engine(inputs, with_weights=with_weights))]
        router = _start_router(inputs, undo) if engine.routes_requests and members[0].url else None
        pool = EnginePool(
            members,
            loop,
            router=router,
            health=health_rules(inputs) if engine.use_fault_tolerance and members[0].url else None,
            say=inputs.console.say,
        )
        undo.pop_all()
    return pool


def health_rules(inputs: Inputs) -> HealthRules:
    """Translate the flags of --use-fault-tolerance."""
    engine = inputs.config.engine
    return HealthRules(
        first_wait_s=engine.rollout_health_check_first_wait,
        interval_s=engine.rollout_health_check_interval,
        timeout_s=engine.rollout_health_check_timeout,
    )


def embedded_settings(inputs: Inputs) -> EmbeddedSettings:
    """Translate the flags that concern the embedded engine."""
    engine = inputs.config.engine
    return EmbeddedSettings(
        page_size=engine.embedded_page_size,
        max_running_requests=engine.embedded_max_running_requests,
        prefill_chunk_tokens=engine.embedded_prefill_chunk_tokens,
        kv_cache_tokens=engine.embedded_kv_cache_tokens,
        mem_fraction=engine.embedded_mem_fraction,
        dtype=inputs.dtype,
        fp8=is_fp8_checkpoint(inputs.model_folder),
        device=str(inputs.device),
        inline=inputs.config.training.deterministic_mode,
        seed=inputs.config.data.rollout_seed,
    )


def serve_words(inputs: Inputs) -> list[str]:
    """Spell the flags that concern the embedded engine for `qwench serve`."""
    engine = inputs.config.engine
    flags: dict[str, object] = {
        "hf-checkpoint": inputs.model_folder.absolute(),
        "train-dtype": inputs.config.model.train_dtype,
        "embedded-page-size": engine.embedded_page_size,
        "embedded-max-running-requests": engine.embedded_max_running_requests,
        "embedded-prefill-chunk-tokens": engine.embedded_prefill_chunk_tokens,
        "embedded-kv-cache-tokens": engine.embedded_kv_cache_tokens,
        "embedded-mem-fraction": engine.embedded_mem_fraction,
    }
    return [word for name, value in flags.items() if value is not None for word in (f"--{name}", str(value))]


def sglang_settings(inputs: Inputs, *, serves_checkpoint: bool, on_gpus: bool) -> SglangSettings:
    """Translate the flags that concern SGLang."""
    config = inputs.config
    dtype = publication_dtype(config, on_gpu=on_gpus)
    return SglangSettings(
        model_folder=inputs.model_folder.absolute(),
        tp_size=config.cluster.rollout_num_gpus_per_engine,
        dtype=str(dtype).removeprefix("torch."),
        memory_saver=inputs.plan.devices.offload_rollout,
        seed=config.data.rollout_seed,
        deterministic=config.engine.sglang_enable_deterministic_inference,
        serves_checkpoint=serves_checkpoint,
        words=config.engine.sglang_args,
    )


def _embedded_engine(inputs: Inputs, *, with_weights: bool) -> EmbeddedEngine:
    settings = embedded_settings(inputs)
    if with_weights:
        return EmbeddedEngine.from_checkpoint(inputs.model_folder, settings, tokenizer=inputs.tokenizer)
    return EmbeddedEngine(
        inputs.plan.model,
        settings,
        eos_ids=frozenset(stop_token_ids(inputs.model_folder, inputs.tokenizer)),
        tokenizer=inputs.tokenizer,
    )


def _start_servers(inputs: Inputs, servers: Sequence[Server], token: str | None) -> list[Member]:
    """Start all servers side by side."""
    with inputs.console.phase("start engines"), ThreadPoolExecutor(max_workers=len(servers)) as threads:
        try:
            urls = list(threads.map(lambda server: server.start(), servers))
        except BaseException:
            for server in servers:  # or leaving the block would wait for those that still start
                server.stop()
            raise
    engine, members = inputs.config.engine, []
    for server, url in zip(servers, urls, strict=True):
        client = HttpEngine(
            url,
            token=token,
            dialect=engine.rollout_engine,
            placement=server.placement,
            health_timeout_s=engine.rollout_health_check_timeout,
        )
        members.append(Member(engine=client, server=server, url=url))
    return members


def _reach_external(inputs: Inputs, loop: EventLoopThread) -> list[Member]:
    """Connect to engines that run already, and make sure that they serve this model."""
    config, model, token = inputs.config, inputs.plan.model, os.environ.get(TOKEN_VARIABLE)
    timeout_s = config.engine.rollout_health_check_timeout
    identity = ModelIdentity(
        model_type=model.model_type,
        sizes={"vocab_size": model.vocab_size, "hidden_size": model.hidden_size, "num_hidden_layers": model.num_layers},
        encode=lambda text: inputs.tokenizer.encode(text, add_special_tokens=False),
        context_len=config.rollout.rollout_max_context_len,
    )

    async def connect(url: str) -> Member:
        engine = HttpEngine(url, token=token)
        dialect = await check_serves(engine, identity)
        await engine.close()
        return Member(engine=HttpEngine(url, token=token, dialect=dialect, health_timeout_s=timeout_s), url=url)

    members = []
    for address in config.engine.rollout_external_engine_addrs:
        url = "http://" + address.removeprefix("http://").rstrip("/")
        label = f"--rollout-external-engine-addrs: the check of the engine at {url}"
        members.append(loop.run(connect(url), label=label, timeout_s=timeout_s))
    return members


def _start_router(inputs: Inputs, undo: ExitStack) -> Router:
    command = router_command(
        inputs.config.engine.router_args, environ=server_environ(os.environ), log_folder=_log_folder(inputs)
    )
    process = ServerProcess(command)
    undo.callback(process.stop)
    router = Router(process)
    router.start()
    return router


def _log_folder(inputs: Inputs) -> Path:
    return ((inputs.plan.log_dir or Path("runs")) / "engines").absolute()
