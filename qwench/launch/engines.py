"""The engines of a run: inside this process, servers started for it, or servers that run already; and `qwench serve`."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path

from qwench.checkpoints.folders import check_base, check_weights, frozen_form
from qwench.checkpoints.formats.sources import find_checkpoint, open_weights
from qwench.config.config import Config
from qwench.config.environment import TOKEN_VARIABLE
from qwench.config.sections.engine import ENGINE_FACTS, EngineConfig
from qwench.config.sections.rollout import RolloutConfig
from qwench.config.sections.training import TrainingConfig
from qwench.config.sections.verbs import ServeConfig
from qwench.engines.client import HttpEngine
from qwench.engines.embedded.engine import EmbeddedEngine
from qwench.engines.embedded.http.serving import serve as serve_engine
from qwench.engines.embedded.settings import EmbeddedSettings
from qwench.engines.fleet.event_loop import EventLoopThread
from qwench.engines.fleet.members import Member
from qwench.engines.fleet.pool import EnginePool
from qwench.engines.fleet.servers import CommandMaker, Server, ServerProcess, server_environ
from qwench.engines.kinds import KINDS
from qwench.engines.kinds.identity import ModelIdentity, check_serves
from qwench.engines.kinds.kind import ServerOrder
from qwench.engines.kinds.sglang_router import SglangRouter, router_command
from qwench.engines.protocol import AddressedEngine, Engine
from qwench.errors import CheckpointError, ConfigError, EngineError
from qwench.foreign.args import make_args
from qwench.foreign.megatron_hooks import AfterWrite
from qwench.launch.inputs import Inputs, plan_inputs, publication_dtype, read_inputs
from qwench.models.hf import stop_token_ids
from qwench.models.hf_weights import is_fp8_checkpoint
from qwench.models.peft import AdapterConfig, AdapterFolder
from qwench.observability.log import open_process_log
from qwench.observability.run_report import say_facts
from qwench.observability.timing import PhaseTimer
from qwench.observability.waiting import waiting
from qwench.weights.plan import NamedAdapter, PublicationPlan
from qwench.weights.publisher import Devices, PublishedModel, Publisher

_logger = logging.getLogger(__name__)


def command_makers(inputs: Inputs, *, num_engines: int, token: str, with_weights: bool, on_gpus: bool) -> list[CommandMaker]:
    """Return for each engine how to start its server.

    Args:
        on_gpus: the devices of the run are GPUs; this machine may have none.
        token: clients show it to change weights or memory.
        with_weights: the engines sample with the checkpoint's weights; else only after the first publication.
    """
    kind = KINDS[inputs.config.engine.kind]
    order = server_order(inputs, token=token, with_weights=with_weights, on_gpus=on_gpus)
    return [partial(kind.command, order, index=index) for index in range(num_engines)]


def server_order(inputs: Inputs, *, token: str, with_weights: bool, on_gpus: bool) -> ServerOrder:
    """Return what all servers of the run share; see `command_makers`."""
    config, model = inputs.config, inputs.plan.model
    return ServerOrder(
        engine=config.engine,
        model_folder=inputs.model_folder.absolute(),
        dtype=str(publication_dtype(config, on_gpu=on_gpus)).removeprefix("torch."),
        engine_sizes=inputs.plan.devices.engine_sizes,
        releases_memory=inputs.plan.devices.offload_rollout,
        seed=config.data.rollout_seed,
        serves_checkpoint=with_weights,
        log_folder=_log_folder(inputs),
        stretched_positions=model.max_positions if model.max_positions > model.max_position_embeddings else None,
        deterministic=config.training.deterministic_mode,
        adapter=_published_adapter(inputs),
        ranks_requests=config.evaluation.eval_low_priority,
        keeps_requests=config.keeps_requests,
        token=token,
    )


def build_pool(inputs: Inputs, *, with_weights: bool, servers: Sequence[Server] | None, token: str | None) -> EnginePool:
    """Start or reach the engines.

    Args:
        with_weights: load the checkpoint now; else the first publication brings the weights.
        servers: not started yet; None: one embedded engine in this process, or those of --rollout-external-engine-addrs.
        token: of the servers.

    Raises:
        ConfigError: an engine that runs already has another model.
        EngineError: a server did not start, or cannot be reached.
    """
    engine = inputs.config.engine
    with ExitStack() as undo:
        loop = EventLoopThread()
        undo.callback(loop.close)
        if engine.rollout_external_engine_addrs:
            members = _reach_external(inputs, loop)
        elif servers is not None:
            for server in servers:
                undo.callback(server.stop)
            members = _start_servers(inputs, servers, token)
            for member in members[len(members) - inputs.plan.devices.num_eval_engines :]:
                member.evaluates = True
        else:
            members = [Member(engine=_embedded_engine(inputs, with_weights=with_weights))]
        router = _start_router(inputs, undo) if engine.routes_requests and members[0].url else None
        pool = EnginePool(
            members,
            loop,
            router=router,
            health=engine if engine.use_fault_tolerance and members[0].url else None,
            can_republish=not with_weights,
        )
        undo.pop_all()
    return pool


def embedded_settings(inputs: Inputs, *, order_varies: bool) -> EmbeddedSettings:
    """Return where and how an embedded engine of this process runs.

    Args:
        order_varies: requests come at other moments in every run. Sums over another batch have other last bits, so a
            deterministic engine then computes one response at a time.
    """
    sizes, deterministic = inputs.config.engine, inputs.config.training.deterministic_mode
    alone = deterministic and order_varies
    return EmbeddedSettings(
        sizes=replace(sizes, embedded_max_running_requests=1) if alone else sizes,
        dtype=inputs.dtype,
        fp8=is_fp8_checkpoint(inputs.model_folder),
        device=str(inputs.device),
        inline=deterministic,
        batch_invariant=inputs.config.training.batch_invariant,
        prefix_cache=not alone,
        seed=inputs.config.data.rollout_seed,
    )


def _embedded_engine(inputs: Inputs, *, with_weights: bool) -> EmbeddedEngine:
    rollout, evaluation = inputs.config.rollout, inputs.config.evaluation
    of_sets = (one.custom_generate_function_path for one in inputs.plan.eval_sets)
    custom = (rollout.custom_generate_function_path, rollout.rollout_function_path, evaluation.eval_function_path, *of_sets)
    order_varies = inputs.config.asynchronous.fully_async or any(path is not None for path in custom)
    settings = embedded_settings(inputs, order_varies=order_varies)
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
    say_facts(inputs.console, {"engines": f"logs in {_log_folder(inputs)}"})
    starting = {server.label: server for server in servers}

    def start(server: Server) -> str:
        url = server.start()
        del starting[server.label]
        return url

    def late() -> str:
        return "; ".join(f"{label}: {last_line(server.last_output())}" for label, server in list(starting.items()))

    with (
        inputs.console.phase("start engines"),
        waiting("start of the engine servers", late),
        ThreadPoolExecutor(max_workers=len(servers)) as threads,
    ):
        try:
            urls = list(threads.map(start, servers))
        except BaseException:
            for server in servers:  # or leaving the block would wait for those that still start
                server.stop()
            raise
    engine, members = inputs.config.engine, []
    for server, url in zip(servers, urls, strict=True):
        client = HttpEngine(
            url,
            token=token,
            kind=engine.kind,
            label=server.label,
            generate_timeout_s=inputs.config.timeouts.generate_timeout,
            placement=server.placement,
            health_timeout_s=engine.rollout_health_check_timeout,
        )
        members.append(Member(engine=client, server=server, url=url))
    return members


def last_line(text: str) -> str:
    """Return the last line of a server's output: it tells how far a start is."""
    return text.splitlines()[-1].strip()[:200]


def check_external(inputs: Inputs) -> None:
    """Check that the engines of --rollout-external-engine-addrs can be reached and serve this model.

    Raises:
        ConfigError: one has another model, or cannot be reached.
    """
    with closing(EventLoopThread()) as loop:
        try:
            _reach_external(inputs, loop)
        except EngineError as error:
            raise ConfigError(str(error)) from error


def _reach_external(inputs: Inputs, loop: EventLoopThread) -> list[Member]:
    """Connect to engines that run already, and make sure that they serve this model."""
    config, model, token = inputs.config, inputs.plan.model, os.environ.get(TOKEN_VARIABLE)
    timeout_s = config.engine.rollout_health_check_timeout
    identity = ModelIdentity(
        model_type=model.model_type,
        sizes={"vocab_size": model.vocab_size, "hidden_size": model.hidden_size, "num_hidden_layers": model.num_layers},
        encode=lambda text: inputs.tokenizer.encode(text, add_special_tokens=False),
        ranks_requests=config.evaluation.eval_low_priority,
        keeps_requests=config.keeps_requests,
        context_len=config.rollout.rollout_max_context_len,
    )

    async def connect(url: str) -> Member:
        engine = HttpEngine(url, token=token)
        try:
            kind = await check_serves(engine, identity)
        finally:
            await engine.close()
        client = HttpEngine(
            url,
            token=token,
            kind=kind.name,
            generate_timeout_s=config.timeouts.generate_timeout,
            health_timeout_s=timeout_s,
        )
        return Member(engine=client, url=url)

    members = []
    for address in config.engine.rollout_external_engine_addrs:
        url = "http://" + address.removeprefix("http://").rstrip("/")
        label = f"--rollout-external-engine-addrs: the check of the engine at {url}"
        members.append(loop.run(connect(url), label=label, timeout_s=timeout_s))
    return members


def make_publisher(
    inputs: Inputs, model: PublishedModel, engines: EnginePool | None, gpus: Devices, timer: PhaseTimer
) -> Publisher:
    """Return what brings the weights to the engines, or to none."""
    foreign = inputs.config.foreign
    hooked = foreign.custom_update_weight_post_write_path is not None
    adapter = _published_adapter(inputs)
    named = engines is not None and any(_names_adapters(engine, inputs.config.engine) for engine in engines.engines)
    plan = PublicationPlan(
        engine=inputs.config.engine,
        model_folder=inputs.model_folder,
        fp8=is_fp8_checkpoint(inputs.model_folder),
        adapters=adapter is not None,
        frozen_moves=inputs.plan.holds_teacher,
        named=NamedAdapter(config=adapter) if adapter is not None and named else None,
        after_write=AfterWrite(foreign, make_args(inputs.config, inputs.plan, host="", port=0)) if hooked else None,
        timeout_s=inputs.config.timeouts.update_weights_timeout,
    )
    return Publisher(model, engines, plan, gpus=gpus, timer=timer)


def _published_adapter(inputs: Inputs) -> AdapterConfig | None:
    """Return what a folder of the adapter says that is published apart from the weights; None: they are published merged."""
    lora = inputs.config.lora
    return AdapterConfig.of_run(lora, base=str(inputs.model_folder)) if lora.lora_publish == "adapter" else None


def _names_adapters(engine: Engine, section: EngineConfig) -> bool:
    """Tell whether an engine takes published adapters by name: a server that runs already may be of another kind."""
    if not isinstance(engine, AddressedEngine):
        return False
    return section.names_adapters or ENGINE_FACTS[engine.address.kind].names_adapters


def _start_router(inputs: Inputs, undo: ExitStack) -> SglangRouter:
    timeout_s = inputs.config.timeouts.generate_timeout
    command = router_command(
        inputs.config.engine.router_args,
        environ=server_environ(os.environ),
        log_folder=_log_folder(inputs),
        generate_timeout_s=timeout_s,
    )
    process = ServerProcess(command)
    undo.callback(process.stop)
    router = SglangRouter(process, generate_timeout_s=timeout_s)
    router.start()
    return router


def _log_folder(inputs: Inputs) -> Path:
    """Return where engine servers and the router write their logs: a run without folders has one for temporary files."""
    base = inputs.plan.log_dir or Path(tempfile.gettempdir(), f"qwench-{os.getpid()}")
    return (base / "engines").absolute()


def serve(config: ServeConfig) -> None:
    """Serve the embedded engine; clients show QWENCH_TOKEN, if it is set, to change weights or memory."""
    assert config.model.hf_checkpoint is not None, "config.verb_checks requires --hf-checkpoint"
    run = Config(
        model=config.model,
        engine=config.engine,
        rollout=RolloutConfig(rollout_batch_size=1),
        training=TrainingConfig(deterministic_mode=config.server.deterministic_mode),
    )
    inputs = read_inputs(run, plan_inputs(run, trains=False))
    check_weights(run.checkpoint, inputs.plan.model, inputs.model_folder)
    open_process_log("info", f"engine at port {config.server.port}")
    adapters = {name: _find_adapter(name, folder, inputs) for name, folder in config.server.adapters.items()}
    serve_engine(
        config.model.hf_checkpoint,
        replace(embedded_settings(inputs, order_varies=True), num_devices=config.server.num_gpus),
        host=config.server.host,
        port=config.server.port,
        token=os.environ.get(TOKEN_VARIABLE),
        adapters=adapters,
        check_base=partial(_check_adapter_base, inputs),
        waits_for_weights=config.server.wait_for_weights,
    )


def _find_adapter(name: str, folder: Path, inputs: Inputs) -> Path:
    """Return the PEFT folder of one --lora.

    Raises:
        ConfigError: it holds no whole adapter, or one of another model or base.
    """
    found = find_checkpoint(folder, flag="--lora")
    try:
        AdapterFolder(found).check_fits(inputs.plan.model)
        _check_adapter_base(inputs, found)
    except (ConfigError, CheckpointError) as error:
        raise ConfigError(f"--lora {name}={folder}: {error}") from error
    return found


def _check_adapter_base(inputs: Inputs, adapter: Path) -> None:
    """Raise ConfigError if a run trained the adapter on another base than the one that is served; say if it rounded that."""
    if is_fp8_checkpoint(inputs.model_folder):  # what was rounded cannot be told from another base
        return
    check_base(adapter, inputs.model_folder, open_weights(inputs.model_folder, inputs.plan.model))
    if (form := frozen_form(adapter)) is not None:
        _logger.warning(
            "%s was trained beside a base that --lora-base rounded to %s; the base served here is not rounded, so answers are "
            "not quite those of the run. `qwench convert --to hf` merges the adapter into the rounded base",
            adapter,
            form,
        )
