"""Executes step plans: owns the memory of the KV cache, and binds a decoder to it and to the weights.

A launched step is `InFlight` until its tokens are on the host.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from qwench.engines.embedded.compute.adapters import RowAdapters
from qwench.engines.embedded.compute.batch import PackedStep, to_device
from qwench.engines.embedded.compute.decode_work import IntArray
from qwench.engines.embedded.compute.decoder import Decoder
from qwench.engines.embedded.compute.graphs import Bucket
from qwench.engines.embedded.compute.kv_memory import KVCache, make_room, page_bytes
from qwench.engines.embedded.compute.model import DecoderModel
from qwench.engines.embedded.compute.ranks import RankGroup
from qwench.engines.embedded.compute.sampler import Draws, draw_limited
from qwench.engines.embedded.compute.weights import WeightStore
from qwench.engines.embedded.scheduling.request import RunningRequest
from qwench.engines.embedded.scheduling.scheduler import StepPlan
from qwench.engines.embedded.settings import EmbeddedSettings
from qwench.errors import EngineError
from qwench.models.architecture import Architecture

CPU_KV_CACHE_TOKENS = 65_536


Sampled = tuple[Sequence[int], Sequence[float]]
"""Tokens and their log-probs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InFlight:
    """A launched step."""

    plan: StepPlan
    requests: list[RunningRequest]
    """The requests that get a token: `plan.sampling` at launch."""
    drawn: Tensor
    """[2, S] int32 on the host, once `arrived`: tokens, and the bits of their float32 log-probs."""
    arrived: torch.cuda.Event | None
    support: Mapping[int, list[int]] = field(default_factory=dict)
    """Index of a request -> the tokens that were kept, where they are asked for."""
    scores: Sequence[Tensor] = ()
    """Of each chunk of `plan.scoring`, on the host like `drawn` (see `scheduling.scoring`)."""

    @classmethod
    def of(
        cls,
        plan: StepPlan,
        requests: list[RunningRequest],
        drawn: Tensor,
        support: Mapping[int, list[int]],
        scores: Sequence[Tensor],
    ) -> InFlight:
        """Start to copy what was drawn and scored to the host."""
        if not drawn.is_cuda:
            return cls(plan=plan, requests=requests, drawn=drawn, arrived=None, support=support, scores=scores)
        hosts = [_copied_to_host(one) for one in (drawn, *scores)]
        arrived = torch.cuda.Event()
        arrived.record()
        return cls(plan=plan, requests=requests, drawn=hosts[0], arrived=arrived, support=support, scores=hosts[1:])

    def wait(self) -> Sampled:
        """Return what was sampled for `requests`."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.drawn[0].tolist(), self.drawn[1].view(torch.float32).tolist()


class Runner:
    """Runs forward passes in the calling thread, one at a time."""

    def __init__(
        self,
        architecture: Architecture,
        settings: EmbeddedSettings,
        weights: WeightStore,
        *,
        ranks: RankGroup | None = None,
    ) -> None:
        """Compute the rank's part of a model.

        Args:
            architecture: of the part (see `Architecture.divided`).
            ranks: of the engine. None: it has one.
        """
        self._architecture = architecture
        self._settings = settings
        self._weights = weights
        self._adapters = weights.adapters
        self._device = torch.device(settings.device)
        self._ranks = ranks
        self._max_pages = 0
        """Of one request."""
        self._kv_cache: KVCache | None = None
        self._decoder: Decoder | None = None
        self._bound_layout = (-1, -1)
        self._warmed_buckets: set[Bucket] = set()
        self._last_tokens = torch.zeros(0, dtype=torch.int32)
        self._row_adapters = RowAdapters(self._adapters, 0, self._device)

    def choose_num_pages(self) -> int:
        """Return how many pages the pool shall have (scratch page included), from the settings or the free memory."""
        sizes = self._settings.sizes
        page_size = sizes.embedded_page_size
        most = sizes.embedded_max_running_requests * -(-self._architecture.max_positions // page_size)
        if sizes.embedded_kv_cache_tokens is not None:
            return 1 + min(most, -(-sizes.embedded_kv_cache_tokens // page_size))
        if self._device.type != "cuda":
            return 1 + min(most, CPU_KV_CACHE_TOKENS // page_size)
        free_bytes, total_bytes = torch.cuda.mem_get_info(self._device)
        reserve = int((1 - sizes.embedded_mem_fraction) * total_bytes)
        asleep = self._kv_cache
        if asleep is None or asleep.num_bytes > free_bytes - reserve // 2:
            self.release_cached_memory()  # what the trainer freed counts as free only then
            free_bytes, total_bytes = torch.cuda.mem_get_info(self._device)
        if asleep is not None and asleep.num_bytes <= free_bytes - reserve // 2:
            return asleep.num_pages  # the graphs, which were kept, may have taken half of the reserve
        pool_bytes = free_bytes - reserve
        num_pages = min(most, pool_bytes // page_bytes(self._architecture, page_size, self._settings.resolved_dtype))
        if num_pages < 2:
            raise EngineError(
                f"no room for a KV cache: {free_bytes / 2**30:.1f} of {total_bytes / 2**30:.1f} GiB are free on {self._device} "
                f"and --embedded-mem-fraction {sizes.embedded_mem_fraction:g} allows no more; free memory or raise it."
            )
        return 1 + num_pages

    def allocate_kv_cache(self, num_pages: int) -> None:
        """Take the KV memory: as many pages as before at their old place, so that the graphs stay valid."""
        if self._kv_cache is not None and self._kv_cache.num_pages == num_pages:
            if self._kv_cache.is_asleep:
                make_room(self._kv_cache.num_bytes, self._device)
                self._kv_cache.wake()
            return
        self._kv_cache = self._decoder = None
        self.release_cached_memory()
        self._kv_cache = KVCache(
            self._architecture,
            num_pages=num_pages,
            page_size=self._settings.sizes.embedded_page_size,
            dtype=self._settings.resolved_dtype,
            device=self._device,
        )
        self._max_pages = min(-(-self._architecture.max_positions // self._settings.sizes.embedded_page_size), num_pages - 1)
        # One row more, for padding.
        num_rows = self._settings.sizes.embedded_max_running_requests + 1
        self._last_tokens = torch.zeros(num_rows, dtype=torch.int32, device=self._device)
        self._row_adapters = RowAdapters(self._adapters, num_rows, self._device)

    def sleep(self) -> None:
        """Give the KV memory back, and what torch caches: a trainer that wakes would break that into pieces.

        Graphs stay, with the memory of their results.
        """
        if self._kv_cache is not None and not self._kv_cache.is_asleep:
            self._kv_cache.sleep()
        self.release_cached_memory()

    def close(self) -> None:
        """Give all memory back, graphs included; a step in flight ends first."""
        self.sleep()
        self._kv_cache = self._decoder = None
        self.release_cached_memory()

    def release_cached_memory(self) -> None:
        """Return the allocator's unused blocks to the device."""
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def forget_bindings(self) -> None:
        """Drop the decoder, whose weights are given back."""
        self._decoder = None

    def advance(self, plan: StepPlan | None, page_table: IntArray, before: InFlight | None) -> tuple[InFlight | None, Sampled]:
        """Launch the step, if there is one. Then wait for the tokens of the step before it, if there was one."""
        launched = None if plan is None else self.launch(plan, page_table)
        return launched, ((), ()) if before is None else before.wait()

    @torch.inference_mode()
    def launch(self, plan: StepPlan, page_table: IntArray) -> InFlight:
        """Start one forward pass and the sampling of a token for each request of `plan.sampling`.

        On a GPU this returns before the pass ends, so that the next step can be planned and launched.
        """
        requests = plan.sampling
        has_adapters = self._row_adapters.seat([*plan.decodes, *(chunk.request for chunk in plan.prefills)])
        step = PackedStep.of(plan, page_table, page_size=self._settings.sizes.embedded_page_size)
        logits, drawn, scores = self.compute(step, has_adapters=has_adapters)
        self._draw_limited(self._bind(), requests, logits, step.draws, drawn)
        self.share_tokens(step)
        return InFlight.of(plan, requests, drawn, step.draws.support, scores)

    def compute(self, step: PackedStep, *, has_adapters: bool) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
        """Run a forward pass, and draw for the requests whose support is not limited, in inference mode.

        Returns:
            logits [S, V] of the sampling requests; tokens and log-prob bits [2, S]; the scores of each of `step.scorings`.
        """
        decoder, draws = self._bind(), step.draws
        drawn = decoder.replay(step.decodes, draws, has_adapters=has_adapters) if step.is_decode_only else None
        if drawn is not None:
            return drawn.logits, drawn.drawn[:, : len(draws.rows)], ()
        batch = decoder.builder.build(step, decoder.last_tokens, with_rows=has_adapters)
        logits, scores = decoder.forward(batch, step.scorings)
        if step.page_copies:
            sources, targets = to_device([*np.array(step.page_copies).T], self._device)
            decoder.kv_cache.copy_pages(sources.long(), targets.long())
        if step.logit_rows is not None:
            logits = logits[to_device([step.logit_rows], self._device)[0]]
        return logits, decoder.draw(logits, draws), scores

    @torch.inference_mode()
    def follow(self, step: PackedStep) -> None:
        """Compute a step that rank 0 launches, and take over its tokens."""
        self.compute(step, has_adapters=False)
        self.share_tokens(step)

    def share_tokens(self, step: PackedStep) -> None:
        """Give all ranks the tokens that rank 0 alone drew; the others are drawn by each rank from the same logits."""
        decoder = self._bind()
        if self._ranks is not None and len(decoder.limited(step.draws)) > 0:
            self._ranks.broadcast(decoder.last_tokens)

    def _draw_limited(
        self, decoder: Decoder, requests: list[RunningRequest], logits: Tensor, draws: Draws, drawn: Tensor
    ) -> None:
        """Draw for all requests at once; where that fails, find those that cannot be drawn for, which get `failure`.

        What fails for every one of several requests belongs to the step, as does what a device reports.
        """
        try:
            decoder.draw_limited(logits, draws, drawn)
        except (MemoryError, torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except Exception:
            which = decoder.limited(draws)
            for index in which:
                try:
                    draw_limited(logits, draws, which[which == index], decoder.last_tokens, drawn)
                except Exception as cause:  # noqa: BLE001 - see above
                    requests[index].failure = cause
            if len(which) > 1 and all(requests[index].failure is not None for index in which):
                raise

    def _bind(self) -> Decoder:
        """Return the decoder over the current weights and KV memory; a new one when the weights moved."""
        layout = (self._weights.layout, self._adapters.layout)
        if self._decoder is None or self._bound_layout != layout:
            assert self._kv_cache is not None
            self._bound_layout = layout
            group = self._architecture.num_heads // self._architecture.num_kv_heads
            model = DecoderModel(
                self._architecture,
                self._weights.tensors,
                self._device,
                adapters=self._adapters,
                invariant=self._settings.batch_invariant,
                native=self._settings.resolved_native,
                ranks=self._ranks,
            )
            self._decoder = Decoder(
                model,
                self._kv_cache,
                self._settings,
                last_tokens=self._last_tokens,
                adapters=self._row_adapters,
                group=group,
                max_pages=self._max_pages,
                warmed=self._warmed_buckets,
            )
        return self._decoder


def _copied_to_host(tensor: Tensor) -> Tensor:
    """Begin to copy a tensor of a GPU into pinned memory."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
