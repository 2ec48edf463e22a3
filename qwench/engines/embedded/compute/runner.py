"""Executes step plans: owns the memory of the KV cache and puts model, attention, graphs and sampler together."""

from __future__ import annotations

import numpy as np
import torch

from qwench.engines.embedded.compute.attention import Attention, TorchAttention
from qwench.engines.embedded.compute.batch import IntArray, build_batch, logit_rows, to_device
from qwench.engines.embedded.compute.graphs import EagerForward, Forward, GraphForward
from qwench.engines.embedded.compute.model import DecoderModel
from qwench.engines.embedded.compute.sampler import sample, sampling_rows
from qwench.engines.embedded.compute.weights import WeightStore
from qwench.engines.embedded.scheduling.kv_cache import KVCache, page_bytes
from qwench.engines.embedded.scheduling.scheduler import StepPlan
from qwench.engines.embedded.settings import EmbeddedSettings
from qwench.errors import EngineError
from qwench.models.architecture import Architecture

CPU_KV_CACHE_TOKENS = 65_536


class Runner:
    """Runs forward passes in whatever thread calls it, one at a time."""

    def __init__(self, architecture: Architecture, settings: EmbeddedSettings, weights: WeightStore) -> None:
        self._architecture = architecture
        self._settings = settings
        self._weights = weights
        self._device = torch.device(settings.device)
        self._kv_cache: KVCache | None = None
        self._forward: Forward | None = None
        self._bound_layout = -1

    def choose_num_pages(self) -> int:
        """Return how many pages the pool shall have (scratch page included), from the settings or the free memory."""
        settings = self._settings
        most = settings.max_running_requests * -(-self._architecture.max_positions // settings.page_size)
        if settings.kv_cache_tokens is not None:
            return 1 + min(most, -(-settings.kv_cache_tokens // settings.page_size))
        if self._device.type != "cuda":
            return 1 + min(most, CPU_KV_CACHE_TOKENS // settings.page_size)
        free_bytes, total_bytes = torch.cuda.mem_get_info(self._device)
        pool_bytes = free_bytes - int((1 - settings.mem_fraction) * total_bytes)
        one_page = page_bytes(self._architecture, settings.page_size, settings.resolved_dtype)
        num_pages = min(most, pool_bytes // one_page)
        if num_pages < 2:
            raise EngineError(
                f"no room for a KV cache: {free_bytes / 2**30:.1f} of {total_bytes / 2**30:.1f} GiB are free on {self._device} "
                f"and --embedded-mem-fraction {settings.mem_fraction:g} allows no more; free memory or raise it."
            )
        return 1 + num_pages

    def allocate_kv_cache(self, num_pages: int) -> None:
        """Take the KV memory."""
        self._kv_cache = KVCache(
            self._architecture,
            num_pages=num_pages,
            page_size=self._settings.page_size,
            dtype=self._settings.resolved_dtype,
            device=self._device,
        )
        self.forget_bindings()

    def drop_kv_cache(self) -> None:
        """Give the KV memory back, graphs included."""
        self._kv_cache = self._forward = None
        self.release_cached_memory()

    def release_cached_memory(self) -> None:
        """Return the allocator's unused blocks to the device."""
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def forget_bindings(self) -> None:
        """Let go of what was built on weights or KV memory that are given back."""
        self._forward = None

    @torch.inference_mode()
    def execute(self, plan: StepPlan, page_table: IntArray) -> tuple[list[int], list[float]]:
        """Run one forward pass; return a token and its log-prob for each request of `plan.sampling`."""
        assert self._kv_cache is not None
        forward = self._bind(page_table)
        batch = build_batch(plan, page_table, self._settings.page_size, self._device)
        logits = forward(batch)
        if plan.page_copies:
            sources, targets = to_device([np.array(side) for side in zip(*plan.page_copies, strict=True)], self._device)
            self._kv_cache.copy_pages(sources.long(), targets.long())
        requests = plan.sampling
        if not requests:
            return [], []
        rows = logit_rows(plan)
        if rows is not None:
            logits = logits[to_device([rows], self._device)[0].long()]
        tokens, log_probs = sample(logits, sampling_rows(requests))
        # Token ids are exact in float64, so one transfer (the step's only wait for the device) brings both.
        drawn = torch.stack((tokens.double(), log_probs.double())).cpu()
        return drawn[0].long().tolist(), drawn[1].tolist()

    def _bind(self, page_table: IntArray) -> Forward:
        """Return the forward pass over the current weights and KV memory; a new one when the weights moved."""
        if self._forward is None or self._bound_layout != self._weights.layout:
            assert self._kv_cache is not None
            self._bound_layout = self._weights.layout
            max_rows, max_pages = page_table.shape
            model = DecoderModel(self._architecture, self._weights.tensors, self._device)
            eager = EagerForward(model, self._kv_cache, self._make_attention())
            self._forward = eager
            if self._device.type == "cuda" and self._settings.cuda_graphs:
                self._forward = GraphForward(
                    eager, max_rows=max_rows, max_pages=max_pages, page_size=self._settings.page_size, device=self._device
                )
        return self._forward

    def _make_attention(self) -> Attention:
        if self._device.type == "cuda":
            from qwench.engines.embedded.compute import attention_cuda  # noqa: PLC0415  # Triton exists only with CUDA or ROCm

            return attention_cuda.CudaAttention(self._settings.page_size, self._settings.resolved_dtype, self._device)
        return TorchAttention(self._settings.page_size, self._settings.resolved_dtype, self._device)
