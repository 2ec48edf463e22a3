"""How megatron-core is asked to divide the ranks."""

from __future__ import annotations

import pytest
from megatron.core import parallel_state

from qwench.config.layout import ParallelLayout
from qwench.training.megatron import groups

LAYOUT = ParallelLayout(tp=2, pp=3, cp=4)


@pytest.mark.parametrize("joined", [False, True])
def test_ranks_are_divided_once_by_the_layout(joined: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []
    monkeypatch.setattr(groups.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(groups.dist, "get_world_size", lambda: 48)
    monkeypatch.setattr(groups.dist, "get_rank", lambda: 5)
    for name, value in (
        ("model_parallel_is_initialized", joined),
        ("get_data_parallel_rank", 1),
        ("get_data_parallel_world_size", 2),
    ):
        monkeypatch.setattr(parallel_state, name, lambda value=value: value)
    monkeypatch.setattr(parallel_state, "initialize_model_parallel", lambda **options: made.append(options))
    monkeypatch.setattr(groups, "model_parallel_cuda_manual_seed", lambda seed, **options: made.append((seed, options)))
    rank = groups.join_groups(LAYOUT, timeout_s=61.0)
    assert (rank.dp_rank, rank.dp_size, rank.num_ranks, rank.is_main) == (1, 2, 48, False)
    sizes = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 3, "context_parallel_size": 4}
    options = {**sizes, "distributed_timeout_minutes": 2, "create_gloo_process_groups": False}
    assert made == ([] if joined else [options, (0, {"force_reset_rng": True})])
