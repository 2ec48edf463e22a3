"""A forward pass and the draw after it, bound to weights and KV memory: eager; decode-only steps as graphs or recordings."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from qwench.engines.embedded.compute import sampler_native
from qwench.engines.embedded.compute.adapters import RowAdapters
from qwench.engines.embedded.compute.attention import Attention, InvariantAttention, TorchAttention
from qwench.engines.embedded.compute.attention_native import NativeAttention
from qwench.engines.embedded.compute.batch import BatchBuilder, Chunks, StepBatch, to_device
from qwench.engines.embedded.compute.graphs import Bucket, DecodeGraphs, DecodeInputs, Drawn, Recorder
from qwench.engines.embedded.compute.kv_memory import KVCache
from qwench.engines.embedded.compute.model import DecoderModel, Hidden
from qwench.engines.embedded.compute.prefill_graphs import MAX_TOKENS, PrefillGraphs
from qwench.engines.embedded.compute.recorded import RecordedDecodes
from qwench.engines.embedded.compute.sampler import DrawInputs, Draws, draw_limited
from qwench.engines.embedded.settings import EmbeddedSettings
from qwench.engines.protocol import Scoring

TILE_ROWS = 16
"""Rows of the decode kernel's tile: queries of one kv head, of as many rows as fit."""


class Decoder:
    """Runs steps over weights and a KV cache that stay where they are; make a new one when they move."""

    def __init__(
        self,
        model: DecoderModel,
        kv_cache: KVCache,
        settings: EmbeddedSettings,
        *,
        last_tokens: Tensor,
        adapters: RowAdapters,
        group: int,
        max_pages: int,
        warmed: set[Bucket],
    ) -> None:
        """Bind them together.

        Args:
            last_tokens: int32, the latest token of each row of the scheduler's table, and of a last row for padding.
            adapters: what each row of that table computes with besides the weights.
            group: query heads of a kv head.
            max_pages: pages of a row of the table.
            warmed: see `DecodeGraphs`.
        """
        device = torch.device(settings.device)
        self.kv_cache = kv_cache
        self.last_tokens = last_tokens
        self._adapters = adapters
        self.builder = BatchBuilder(
            page_size=settings.sizes.embedded_page_size, max_sharing=max(TILE_ROWS // group, 1), device=device
        )
        self._graphs: DecodeGraphs | None = None
        self._prefill_graphs: PrefillGraphs | None = None
        self._model = model
        self._device = device
        self._scratch_row = len(last_tokens) - 1
        self._native = settings.resolved_native
        self._attention = _make_attention(settings, device)
        self._recorded: RecordedDecodes | None = None
        if self._native:
            self._recorded = RecordedDecodes(self.builder, model.parameters, kv_cache, last_tokens, max_pages=max_pages)
        if device.type == "cuda" and settings.cuda_graphs:
            record = Recorder(device)
            self._graphs = DecodeGraphs(
                self.builder, max_rows=self._scratch_row, max_pages=max_pages, warmed=warmed, record=record, device=device
            )
            self._prefill_graphs = PrefillGraphs(model, kv_cache, record, dtype=settings.resolved_dtype, device=device)

    def forward(self, batch: StepBatch, scorings: Sequence[Scoring] = ()) -> tuple[Tensor, list[Tensor]]:
        """Store keys and values of the batch's tokens.

        Args:
            scorings: what is wanted of each of `batch.scored`.

        Returns:
            logits [U, V] of `batch.logit_tokens`; the scores of each of `batch.scored`.
        """
        self._attention.prepare(batch)
        hidden = self._hidden(batch)
        scores = [
            self._model.scores(hidden, tokens, labels, scoring)
            for (tokens, labels), scoring in zip(batch.scored, scorings, strict=True)
        ]
        return self._model.logits(hidden, batch.logit_tokens), scores

    def _hidden(self, batch: StepBatch) -> Hidden:
        has_prefills, num_tokens = len(batch.prefills.counts) > 0, len(batch.token_ids)
        if self._prefill_graphs is not None and has_prefills and num_tokens <= MAX_TOKENS and batch.rows is None:
            return self._prefill_graphs(batch, self._attention)
        mix = None if batch.rows is None else self._adapters.mix(batch.rows)
        return self._model.forward(batch.token_ids, batch.positions, batch.slots, self.kv_cache, self._attention, mix)

    def replay(self, decodes: Chunks, draws: Draws, *, has_adapters: bool) -> Drawn | None:
        """Run a decode-only step as a graph or from a recording; None where there is none."""
        if self._graphs is not None:
            return self._graphs(self._decode, decodes, draws, has_adapters=has_adapters)
        if self._recorded is None or has_adapters:
            return None
        logits = self._recorded(lambda batch: self.forward(batch)[0], decodes, draws.rows)
        return None if logits is None else Drawn(logits=logits, drawn=self.draw(logits, draws))

    def draw(self, logits_SV: Tensor, draws: Draws) -> Tensor:
        """Return tokens and log-probs [2, S] of requests whose support is not limited, and write `last_tokens`."""
        drawn = torch.empty((2, len(draws.rows)), dtype=torch.int32, device=self._device)
        if self._native and len(draws.rows) > 0:
            sampler_native.draw(logits_SV, draws, self.last_tokens, drawn)
        elif self._device.type == "cuda" and len(draws.rows) > 0:
            packed = draws.packed(len(draws.rows), scratch_row=self._scratch_row)
            self._draw(logits_SV, DrawInputs.view(to_device([packed], self._device)[0], len(draws.rows)), drawn)
        return drawn

    def draw_limited(self, logits_SV: Tensor, draws: Draws, drawn: Tensor) -> None:
        """Draw for the requests that `draw` has left out: those with a limited support, or with plain PyTorch all."""
        draw_limited(logits_SV, draws, self.limited(draws), self.last_tokens, drawn)

    def limited(self, draws: Draws) -> np.ndarray:
        """Return the indices of the requests that `draw_limited` draws for."""
        return draws.limited if self._native or self._device.type == "cuda" else np.arange(len(draws.rows))

    def _draw(self, logits_SV: Tensor, inputs: DrawInputs, drawn: Tensor) -> None:
        import qwench.engines.embedded.compute.sampler_triton as kernels  # noqa: PLC0415  # Triton comes with CUDA only

        kernels.draw(logits_SV, inputs.temperature, inputs.uniforms, inputs.rows, self.last_tokens, drawn)

    def _decode(self, inputs: DecodeInputs, has_adapters: bool) -> Drawn:
        """The pass that graphs capture: one token of each row, drawn at once."""
        num_rows = len(inputs.slots)
        nothing = np.zeros(0, dtype=np.int32)
        batch = StepBatch(
            token_ids=self.last_tokens[inputs.draws.rows],
            positions=inputs.work.lengths - 1,
            slots=inputs.slots,
            logit_tokens=None,
            scored=(),
            decodes=Chunks(starts=nothing, counts=np.ones(num_rows, dtype=np.int32), tables=nothing),
            prefills=Chunks(starts=nothing, counts=nothing, tables=nothing),
            work=inputs.work,
            rows=inputs.draws.rows if has_adapters else None,
        )
        logits, _ = self.forward(batch)
        drawn = torch.empty((2, num_rows), dtype=torch.int32, device=self._device)
        self._draw(logits, inputs.draws, drawn)
        return Drawn(logits=logits, drawn=drawn)


def _make_attention(settings: EmbeddedSettings, device: torch.device) -> Attention:
    if settings.batch_invariant:
        return InvariantAttention(settings.sizes.embedded_page_size, device)
    if settings.resolved_native:
        return NativeAttention(settings.sizes.embedded_page_size, settings.resolved_dtype)
    if device.type != "cuda":
        return TorchAttention(settings.sizes.embedded_page_size, settings.resolved_dtype, device)
    import qwench.engines.embedded.compute.attention_cuda as cuda  # noqa: PLC0415  # Triton comes with CUDA only

    return cuda.CudaAttention(settings.sizes.embedded_page_size, settings.resolved_dtype, device)
