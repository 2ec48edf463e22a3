"""The embedded engine: the contract of `engines.protocol` over a scheduler and a runner in this process.

Requests join and leave between forward passes. One task steps while there is work and ends when there is none:

    generate() -> scheduler.add ----.                       .--> future of generate()
                                    v                       |
    step task:  [ plan n -> a worker thread launches n, waits for n - 1 -> take the tokens of n - 1 ]  repeat
                                    ^
    abort: between two steps;  update_weights, sleep, pause: between two steps, with no step in flight (see `pipeline`)
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from qwench.engines.embedded.compute.adapters import AdapterChange
from qwench.engines.embedded.compute.followers import divide
from qwench.engines.embedded.compute.runner import InFlight, Sampled
from qwench.engines.embedded.compute.weights import read_folder
from qwench.engines.embedded.pipeline import StepPipeline, failure_of_step, take_step
from qwench.engines.embedded.scheduling.admission import Admission, eos_ids_of
from qwench.engines.embedded.scheduling.kv_cache import PagePool
from qwench.engines.embedded.scheduling.request import RunningRequest
from qwench.engines.embedded.scheduling.request_table import RequestTable
from qwench.engines.embedded.scheduling.scheduler import Scheduler, count_step
from qwench.engines.embedded.settings import EmbeddedSettings
from qwench.engines.embedded.worker import Worker
from qwench.engines.protocol import (
    EngineStats,
    GenerateRequest,
    GenerateResult,
    MemoryTag,
    Portion,
    WeightReceipt,
)
from qwench.errors import EngineError
from qwench.models.architecture import Architecture
from qwench.models.hf import architecture_of, load_hf_config, load_tokenizer, stop_token_ids
from qwench.models.hf_weights import is_fp8_checkpoint
from qwench.wire.portions import WeightBucket


class EmbeddedEngine:
    """An engine in this process; see `engines.protocol.Engine` for what its methods promise."""

    def __init__(
        self,
        architecture: Architecture,
        settings: EmbeddedSettings,
        *,
        eos_ids: frozenset[int],
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        """Make an engine without weights; it can generate after `update_weights` or `adopt_weights`."""
        self.architecture = architecture
        """Sizes of the model."""
        self._settings = settings
        self._tokenizer = tokenizer
        self._admission = Admission(architecture, eos_ids=eos_ids, tokenizer=tokenizer, seed=settings.seed)
        self._weights, self._runner, self._followers = divide(architecture, settings)
        self.adapters = self._weights.adapters
        """LoRA adapters that requests may name; while requests run, they change by `change_adapters`."""
        self._version, self._stats = 0, EngineStats()
        self._scheduler: Scheduler | None = None
        self._requests = RequestTable(tokenizer)
        self._worker = Worker(inline=settings.inline, lost=None if self._followers is None else self._followers.lost)
        self._pipeline = StepPipeline(self._runner, self._worker, self._take, overlap=settings.resolved_overlap)
        self._between_steps = asyncio.Lock()
        self._stepping: asyncio.Task[None] | None = None
        self._paused = self._kv_asleep = False

    @classmethod
    def from_checkpoint(
        cls,
        source: str | Path | PretrainedConfig,
        settings: EmbeddedSettings,
        *,
        weights: Mapping[str, Tensor] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        waits_for_weights: bool = False,
    ) -> EmbeddedEngine:
        """Make an engine from a checkpoint folder, or from a config alone.

        Args:
            source: a folder, whose weights are loaded unless `weights` are given; or a config, which brings none.
            settings: sizes and modes; a folder decides `fp8` by itself.
            weights: Hugging Face names to tensors, copied.
            tokenizer: needed for stop strings and for `GenerateResult.text`. None: the folder's, or none with a config.
            waits_for_weights: take their memory and load none. A publication brings them; until then it is healthy.

        Raises:
            ConfigError, CheckpointError, WeightSyncError: a model this engine cannot run, or weights that are not its.
        """
        buckets: Iterable[WeightBucket] | None = None if weights is None else [list(weights.items())]
        if isinstance(source, PretrainedConfig):
            config, eos_ids = source, eos_ids_of(source, tokenizer)
        else:
            source = Path(source)
            config, tokenizer = load_hf_config(source), tokenizer or load_tokenizer(source)
            eos_ids = frozenset(stop_token_ids(source, tokenizer))
            settings = replace(settings, fp8=is_fp8_checkpoint(source))
            if not waits_for_weights:
                buckets = buckets or read_folder(source, architecture_of(config))
        engine = cls(architecture_of(config), settings, eos_ids=eos_ids, tokenizer=tokenizer)
        with ExitStack() as failed:
            if engine._followers is not None:
                failed.callback(engine._followers.close)
            if buckets is not None:
                engine._weights.load(buckets)
            elif waits_for_weights:
                engine._weights.reserve()
            failed.pop_all()
        return engine

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """Return the tokenizer, if it has one."""
        return self._tokenizer

    @property
    def device(self) -> torch.device:
        """Return where the weights lie."""
        return torch.device(self._settings.device)

    @property
    def max_request_tokens(self) -> int:
        """Return how long prompt and response together can be; takes the KV memory if it is not held yet."""
        return min(self.architecture.max_positions, self._ensure_scheduler().pool.capacity_tokens)

    def __repr__(self) -> str:
        return "the engine of this process"

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        """See `Engine.generate`.

        Raises:
            EngineError: no weights, asleep, failed before, or a request that can never run.
        """
        running = self.start(request)
        try:
            return await running.future
        finally:
            self.drop(running)

    def start(self, request: GenerateRequest, *, progress: asyncio.Event | None = None) -> RunningRequest:
        """Queue a request, to await its `future`; the caller must `drop` it in the end.

        Args:
            progress: set whenever the request has new tokens, and at its end.
        """
        running = self._accept(request)
        if progress is not None:
            running.report_to(progress)
        self._ensure_scheduler().add(running)
        self._requests.add(running)
        self._start_stepping()
        return running

    def drop(self, running: RunningRequest) -> None:
        """Abort an unfinished request whose result is not needed."""
        self._requests.drop(running)

    async def abort(self, request_id: str | None = None, *, begins: bool = False) -> None:
        """See `Engine.abort`. An unknown id is no error: the request may have ended.

        Args:
            begins: end every request whose id begins with `request_id`.
        """
        self._requests.abort(request_id, begins=begins)
        async with self._between_steps:
            self._drop_aborted()

    async def pause(self, *, retract: bool = False) -> None:
        """See `Engine.pause`."""
        self._paused = True
        async with self._at_rest():
            if retract and self._scheduler is not None:
                self._scheduler.retract()

    async def resume(self) -> None:
        """See `Engine.resume`."""
        self._paused = False
        self._start_stepping()

    async def update_weights(self, buckets: Iterable[WeightBucket], *, version: int) -> WeightReceipt:
        """See `Engine.update_weights`; `buckets` is consumed between two steps."""
        receipt = await self._load(lambda: self._weights.load(buckets), version)
        assert receipt is not None, "all buckets were loaded"
        return receipt

    async def receive_bucket(self, read: Callable[[], WeightBucket], portion: Portion) -> WeightReceipt | None:
        """Take over one bucket of a publication; confirm all of them after the final one.

        From the first bucket to the final one nothing is generated: requests wait or are refused.

        Args:
            read: returns the bucket; called between two steps, where steps run. What it returns is copied.

        Raises:
            WeightSyncError: see `update_weights`; or a bucket before this one is missing.
        """
        return await self._load(lambda: self._weights.take(read(), portion), portion.version)

    async def set_version(self, version: int) -> None:
        """Give the weights in use another version: requests name an adapter that was loaded for it."""
        async with self._at_rest():
            self._version = version

    async def adopt_weights(self, weights: Mapping[str, Tensor], *, version: int) -> WeightReceipt:
        """Use the trainer's live tensors without a copy; call again after every change, with its version.

        Raises:
            WeightSyncError: names, shapes, dtype or device are not the engine's own; then copy instead.
        """
        async with self._at_rest():
            self._weights.adopt(weights)
            self._forget_old_weights()
            self._version = version
        self._start_stepping()
        return WeightReceipt(version=version)

    async def change_adapters(self, change: AdapterChange) -> None:
        """Load or unload adapters between two steps; an engine of several devices raises EngineError."""
        if self._followers is not None:
            raise EngineError("an engine of several GPUs takes no adapters; serve them by an engine of one GPU.")
        async with self._at_rest():
            in_use = {running.adapter.slot for running in self._requests}
            await self._worker.call(lambda: change(self.adapters, in_use))

    async def sleep(self, tags: Sequence[MemoryTag]) -> None:
        """See `Engine.sleep`. Torch may cache the memory of weights; see `release_cache`."""
        async with self._at_rest():
            self._drop_aborted()
            if self._requests:
                raise EngineError(
                    f"the engine cannot sleep: {len(self._requests)} requests are unfinished; abort them or wait for them."
                )
            if MemoryTag.KV_CACHE in tags:
                self._scheduler = None
                self._runner.sleep()
                self._kv_asleep = True
            if MemoryTag.WEIGHTS in tags:
                self._weights.drop()
                self._runner.forget_bindings()

    async def release_cache(self) -> None:
        """Give other processes what torch caches of the devices."""
        async with self._at_rest():
            self._runner.release_cached_memory()

    async def wake(self, tags: Sequence[MemoryTag]) -> None:
        """See `Engine.wake`; weights get their memory when they are published."""
        async with self._at_rest():
            if MemoryTag.KV_CACHE in tags:
                self._kv_asleep = False
                self._ensure_scheduler()

    async def flush_cache(self) -> None:
        """See `Engine.flush_cache`."""
        async with self._between_steps:
            if self._scheduler is not None:
                self._scheduler.pool.flush()

    async def health(self) -> bool:
        """See `Engine.health`."""
        return self._requests.failure is None and (self._weights.ready or self._weights.awaited)

    async def stats(self) -> EngineStats:
        """See `Engine.stats`."""
        if self._scheduler is None:
            return self._stats
        pool = self._scheduler.pool
        return replace(
            self._stats,
            num_running=self._scheduler.num_running,
            num_waiting=self._scheduler.num_waiting,
            num_free_pages=pool.num_free,
            num_pages=pool.num_pages - 1,
        )

    async def weight_version(self) -> int:
        """See `Engine.weight_version`."""
        return self._version

    async def close(self) -> None:
        """See `Engine.close`; unfinished requests end with an error."""
        async with self._between_steps:
            self._fail(EngineError("the engine was closed."))
            if self._followers is not None:
                self._followers.close()
            self._weights.drop()
            self._scheduler = None
            self._pipeline.close()

    def _start_stepping(self) -> None:
        if self._stepping is None and self._requests and not self._paused and self._weights.ready:
            self._stepping = asyncio.get_running_loop().create_task(self._step_until_idle())

    async def _step_until_idle(self) -> None:
        try:
            while True:
                await self._admission.let_requests_arrive(inline=self._settings.inline)
                async with self._between_steps:
                    self._drop_aborted()
                    if self._must_rest():
                        await self._pipeline.drain()
                    if self._must_rest():
                        break
                    await self._pipeline.step(self._ensure_scheduler())
        except Exception as cause:  # noqa: BLE001 - every caller must get the error, or it would wait without end
            self._fail(cause)
        finally:
            self._stepping = None

    def _must_rest(self) -> bool:
        return self._paused or not self._requests or not self._weights.ready

    @asynccontextmanager
    async def _at_rest(self) -> AsyncIterator[None]:
        """Hold the next step while the block runs; no step is in flight in it."""
        async with self._between_steps:
            try:
                await self._pipeline.drain()
            except Exception as cause:  # noqa: BLE001 - see _step_until_idle
                self._fail(cause)
            yield

    def _take(self, scheduler: Scheduler, step: InFlight, sampled: Sampled) -> None:
        # Weights change only when no step is in flight, so the version is that of the launch.
        ended, num_taken = take_step(step, sampled, version=self._version, tokenizer=self._tokenizer)
        self._stats = count_step(self._stats, step.plan, step.requests, num_sampled=num_taken)
        scheduler.finish([running for running in ended if running.failure is None])
        for running in ended:
            if running.failure is not None:
                scheduler.remove(running)
            self._requests.answer(running)

    def _accept(self, request: GenerateRequest) -> RunningRequest:
        """Check a request and make its state."""
        self._requests.check_new(request.request_id)
        if not self._weights.ready:
            raise EngineError(f"request {request.request_id!r} refused: the engine has no weights; publish them first.")
        if self._kv_asleep:
            raise EngineError(f"request {request.request_id!r} refused: the engine sleeps; wake it first.")
        adapter = self.adapters.choose(request.adapter)
        return self._admission.accept(request, max_request_tokens=self.max_request_tokens, adapter=adapter)

    def _drop_aborted(self) -> None:
        for running in self._requests.aborted():
            assert self._scheduler is not None
            self._scheduler.remove(running)
            self._requests.answer(running)

    def _fail(self, cause: Exception) -> None:
        """End all requests, now and later, with an error."""
        self._pipeline.drop()
        self._requests.fail(failure_of_step(cause))

    def _ensure_scheduler(self) -> Scheduler:
        if self._scheduler is None:
            num_pages = self._runner.choose_num_pages()
            self._runner.allocate_kv_cache(num_pages)
            pool = PagePool(num_pages, self._settings.sizes.embedded_page_size, prefix_cache=self._settings.prefix_cache)
            self._scheduler = Scheduler.of(self._settings.sizes, pool, max_positions=self.architecture.max_positions)
        return self._scheduler

    async def _load(self, load: Callable[[], dict[str, int] | None], version: int) -> WeightReceipt | None:
        async with self._at_rest():
            try:
                checksums = await self._worker.call(load)
            finally:
                self._forget_old_weights()
            if checksums is None:
                return None
            self._version = version
        self._start_stepping()
        return WeightReceipt(version=version, checksums=checksums)

    def _forget_old_weights(self) -> None:
        for running in self._requests:
            if running.request.adapter is None:
                running.adapter = self.adapters.choose(None)
        if self._scheduler is not None:
            self._scheduler.pool.flush()
