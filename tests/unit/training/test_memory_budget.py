"""What a forward keeps for its backward, by how much memory is free."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from qwench.models.hf import architecture_of
from qwench.models.memory import StateBytes, fsdp_bytes
from qwench.models.random_qwen3 import find_size
from qwench.training.memory_budget import ActivationBudget, free_bytes, kept_bytes
from qwench.training.packed_decoder import Keep

_TOKENS, _SCORED, _CHUNK = 8192, 6000, 4096
_ARCHITECTURE = architecture_of(find_size("4B").to_config(vocab_size=151936))
_MARGIN = 2 << 30
_LOGITS = 4 * 151936
"""Bytes of the logits of one position."""


def _budget(*, recomputes: bool = False) -> ActivationBudget:
    return ActivationBudget(
        architecture=_ARCHITECTURE, param_dtype=torch.bfloat16, head_chunk_tokens=_CHUNK, recomputes=recomputes
    )


def _choose(free: int | None, *, recomputes: bool = False) -> tuple[Keep, int]:
    return _budget(recomputes=recomputes).choose(_TOKENS, _SCORED, free=free)


def _needed(keep: Keep) -> int:
    return _MARGIN + kept_bytes(_ARCHITECTURE, _TOKENS, keep, torch.bfloat16)


def test_everything_is_kept_where_it_fits_with_all_logits():
    enough = _needed(Keep.ALL) + _SCORED * _LOGITS
    assert _choose(enough) == (Keep.ALL, _SCORED * _LOGITS)
    assert _choose(enough - 1)[0] is Keep.PRODUCTS


def test_a_chunk_of_logits_has_room_beside_what_is_kept():
    chunk = _CHUNK * _LOGITS
    assert _choose(_needed(Keep.PRODUCTS) + chunk + 7) == (Keep.PRODUCTS, 7)
    assert _choose(_needed(Keep.PRODUCTS) + chunk - 1)[0] is Keep.NOTHING
    assert _choose(_needed(Keep.NOTHING) + chunk + 5, recomputes=True) == (Keep.NOTHING, 5)
    assert _choose(0) == (Keep.NOTHING, 0)


def test_tiles_take_half_of_the_logits_unless_sampling_kept_some_tokens_only():
    budget = dataclasses.replace(_budget(), logit_bytes=2)
    enough = _needed(Keep.ALL) + _SCORED * _LOGITS // 2
    assert budget.choose(_TOKENS, _SCORED, free=enough) == (Keep.ALL, _SCORED * _LOGITS // 2)
    assert budget.choose(_TOKENS, _SCORED, free=enough, has_support=True) == _choose(enough)
    assert budget.predict(_TOKENS, _SCORED, free=enough) == enough - _MARGIN


def test_a_cpu_keeps_layers_and_no_logits():
    assert _choose(None) == (Keep.ALL, 0)
    assert _choose(None, recomputes=True) == (Keep.NOTHING, 0)


def test_the_prediction_counts_kept_logits_and_one_chunk_of_others():
    chunk, logits, margin = _CHUNK * _LOGITS, _SCORED * _LOGITS, _MARGIN
    enough = _needed(Keep.ALL) + logits
    assert _budget().predict(_TOKENS, _SCORED, free=enough) == enough - margin
    assert _budget().predict(_TOKENS, _SCORED, free=enough - 1) == _needed(Keep.PRODUCTS) - margin + logits
    short = _needed(Keep.PRODUCTS) + chunk + 7
    assert _budget().predict(_TOKENS, _SCORED, free=short) == short - margin
    assert _budget().predict(_TOKENS, _SCORED, free=None) == _needed(Keep.ALL) - margin + chunk


@pytest.mark.parametrize(
    ("size", "sequences", "offloaded", "ranks", "peak_gib"),
    [
        ("0.6B", 12, 0.0, 1, 37.5),
        ("1.7B", 12, 0.0, 1, 61.9),
        ("4B", 6, 0.0, 1, 92.3),
        ("8B", 6, 1.0, 1, 85.2),
        ("4B", 6, 0.0, 4, 65.4),
    ],
)
def test_the_bytes_predicted_for_a_step_are_those_measured_within_a_tenth(size, sequences, offloaded, ranks, peak_gib):
    """Peaks of steps on H200s (docs/performance.md): packs of sequences of 256 + 1,024 tokens, float32 moments."""
    architecture = architecture_of(find_size(size).to_config(vocab_size=151936))
    state = StateBytes(param=2, moments=8, offloaded=offloaded)
    held = fsdp_bytes(architecture, state, num_shards=ranks, holds_reference=True, computes_whole=ranks > 1)
    kept = kept_bytes(architecture, sequences * 1280, Keep.ALL, torch.bfloat16)
    assert held.device + kept + sequences * 1024 * _LOGITS == pytest.approx(peak_gib * 2**30, rel=0.1)


def test_what_torch_has_reserved_and_not_used_is_free_too(monkeypatch):
    device = torch.device("cuda", 1)
    for name, found in (("mem_get_info", (10, 100)), ("memory_reserved", 7), ("memory_allocated", 3)):
        monkeypatch.setattr(torch.cuda, name, {device: found}.__getitem__)
    assert free_bytes(device) == 14
    assert free_bytes(torch.device("cpu")) is None
