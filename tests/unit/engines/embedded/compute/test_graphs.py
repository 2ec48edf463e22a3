"""Shapes of captured graphs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwench.engines.embedded.compute.batch import BatchBuilder, Chunks
from qwench.engines.embedded.compute.decode_work import WorkSize, pack_decode_work
from qwench.engines.embedded.compute.graphs import DecodeGraphs, DecodeInputs, Drawn, bucket_of
from qwench.engines.embedded.compute.sampler import NO_DRAWS, Draws, SamplingRows


@given(st.integers(1, 512), st.integers(1, 512))
def test_bucket_holds_the_rows_and_wastes_little(rows, max_rows):
    rows = min(rows, max_rows)
    bucket = bucket_of(rows, max_rows)
    assert rows <= bucket <= max_rows
    assert bucket - rows < max(16, rows)


def test_buckets_by_hand():
    assert [bucket_of(rows, 40) for rows in (1, 2, 3, 8, 9, 17, 33, 40)] == [1, 2, 4, 8, 16, 32, 40, 40]


def test_a_step_of_no_adapter_replays_a_graph_without_their_products():
    events: list[str] = []

    def decode(_inputs: DecodeInputs, has_adapters: bool) -> Drawn:
        events.append(f"record {has_adapters}")
        return Drawn(logits=torch.zeros(1, 1), drawn=torch.tensor([[int(has_adapters)], [0]]))

    def record(work: Callable[[], Drawn]) -> tuple[Callable[[], None], Drawn]:
        drawn = work()
        return lambda: events.append(f"replay {bool(drawn.drawn[0])}"), drawn

    device = torch.device("cpu")
    smallest = WorkSize(items=32, slots=256)
    graphs = DecodeGraphs(
        BatchBuilder(page_size=4, max_sharing=1, device=device),
        max_rows=1,
        max_pages=2,
        warmed={(1, smallest, False), (1, smallest, True)},
        record=record,
        device=device,
    )
    step = Chunks(
        starts=np.array([2], dtype=np.int32), counts=np.array([1], dtype=np.int32), tables=np.array([[1]], dtype=np.int32)
    )
    for has_adapters in (False, True, False, True):
        assert graphs(decode, step, NO_DRAWS, has_adapters=has_adapters).drawn[0].item() == has_adapters
    assert events == ["record False", "replay False", "record True", "replay True", "replay False", "replay True"]


def test_inputs_are_seen_where_they_were_packed():
    params = SamplingRows(
        temperature=np.array([0.5, 0.7], dtype=np.float32),
        top_p=np.ones(2), top_k=np.zeros(2), min_p=np.zeros(2), keeps_support=np.zeros(2, dtype=bool),
        uniforms=np.array([0.25, 1 / 3]),
    )  # fmt: skip
    draws = Draws(params=params, rows=np.array([7, 9], dtype=np.int32)).packed(3, scratch_row=5)
    slots = np.array([11, 12, 13], dtype=np.int32)
    work, size = pack_decode_work(np.array([3, 4]), np.zeros((2, 4), dtype=np.int32), page_size=64, num_rows=3, max_sharing=8)
    buffer = torch.from_numpy(np.concatenate([draws, slots, work]))
    found = DecodeInputs.view(buffer, num_rows=3, size=size)
    assert found.draws.uniforms.tolist() == [0.25, 1 / 3, 0.0]
    assert found.draws.temperature.tolist() == [0.5, np.float32(0.7), 1.0], "what fills up is drawn at 1"
    assert found.draws.rows.tolist() == [7, 9, 5], "and for the scratch row"
    assert found.slots.tolist() == [11, 12, 13]
    assert found.work.lengths.tolist() == [3, 4, 1]
