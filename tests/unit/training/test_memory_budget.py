"""What a forward keeps for its backward, by how much memory is free."""

from __future__ import annotations

import pytest
import torch

from qwench.models.hf import architecture_of
from qwench.models.made.qwen3 import find_size
from qwench.models.memory import StateBytes, fsdp_bytes
from qwench.training import memory_budget
from qwench.training.memory_budget import ActivationBudget, kept_bytes
from qwench.training.packed_decoder import Keep

_TOKENS, _SCORED, _CHUNK = 8192, 6000, 4096
_ARCHITECTURE = architecture_of(find_size("4B").to_config(vocab_size=151936))
_MARGIN = 2 << 30
_LOGITS = 4 * 151936
"""Bytes of the logits of one position."""


def _choose(monkeypatch: pytest.MonkeyPatch, free: int, *, recomputes: bool = False) -> tuple[Keep, int]:
    monkeypatch.setattr(memory_budget, "free_bytes", lambda device: free)
    budget = ActivationBudget(_ARCHITECTURE, torch.device("cuda"), torch.bfloat16, head_chunk_tokens=_CHUNK)
    return budget.choose(_TOKENS, _SCORED, recomputes=recomputes)


def _needed(keep: Keep) -> int:
    return _MARGIN + kept_bytes(_ARCHITECTURE, _TOKENS, keep, torch.bfloat16)


def test_everything_is_kept_where_it_fits_with_all_logits(monkeypatch):
    enough = _needed(Keep.ALL) + _SCORED * _LOGITS
    assert _choose(monkeypatch, enough) == (Keep.ALL, _SCORED * _LOGITS)
    assert _choose(monkeypatch, enough - 1)[0] is Keep.PRODUCTS


def test_a_chunk_of_logits_has_room_beside_what_is_kept(monkeypatch):
    chunk = _CHUNK * _LOGITS
    assert _choose(monkeypatch, _needed(Keep.PRODUCTS) + chunk + 7) == (Keep.PRODUCTS, 7)
    assert _choose(monkeypatch, _needed(Keep.PRODUCTS) + chunk - 1)[0] is Keep.NOTHING
    assert _choose(monkeypatch, _needed(Keep.NOTHING) + chunk + 5, recomputes=True) == (Keep.NOTHING, 5)
    assert _choose(monkeypatch, 0) == (Keep.NOTHING, 0)


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
