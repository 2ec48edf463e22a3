"""The host side of a step's batch; what the model makes of it is checked by the engine's contract tests."""

from __future__ import annotations

import numpy as np
import torch

from qwench.engines.embedded.compute.batch import BatchBuilder, PackedStep
from qwench.engines.embedded.scheduling.request import RunningRequest
from qwench.engines.embedded.scheduling.scheduler import PrefillChunk, StepPlan
from qwench.engines.protocol import GenerateRequest, SamplingParams, Scoring


def request_of(row: int, tokens: list[int], num_computed: int, *, scoring: Scoring | None = None) -> RunningRequest:
    sampling = SamplingParams(max_new_tokens=0 if scoring else 4)
    return RunningRequest(
        request=GenerateRequest(request_id=f"r{row}", input_ids=tokens, sampling=sampling, scoring=scoring),
        seed=0,
        max_new_tokens=4,
        stop_ids=frozenset(),
        future=None,
        tokens=tokens,
        num_prompt=len(tokens),
        num_computed=num_computed,
        row=row,
    )


def decoding(row: int, num_computed: int) -> RunningRequest:
    return request_of(row, [1] * (num_computed + 1), num_computed)


def test_decodes_have_the_pages_of_the_longest_of_them_and_no_more():
    builder = BatchBuilder(page_size=4, max_sharing=1, device=torch.device("cpu"))
    page_table = np.array([[3, 5, 9, 0, 0], [2, 7, 8, 0, 0]], dtype=np.int32)
    plan = StepPlan(decodes=[decoding(1, 2), decoding(0, 4)])  # 3 and 5 tokens: 2 pages
    decodes = PackedStep.of(plan, page_table, page_size=4).decodes
    assert decodes.tables.tolist() == [[2, 7], [3, 5]]
    assert (decodes.lengths.tolist(), builder.slots_of(decodes).tolist()) == ([3, 5], [2 * 4 + 2, 5 * 4])


def test_a_step_of_decodes_prompts_and_scores_is_packed_token_by_token():
    """Pages of 4 tokens: one decode, the second chunk of a prompt with a sibling, an unfinished one, and one that scores."""
    page_table = np.array([[3, 5, 0], [2, 7, 0], [4, 6, 0], [8, 9, 0], [1, 1, 1]], dtype=np.int32)
    whole, scoring = request_of(1, [10, 11, 12, 13, 14, 15], 3), Scoring(start=2, top_k=0, token_ids=())
    begun, scores, fork = (
        request_of(2, [20, 21, 22, 23], 0),
        request_of(3, [30, 31, 32, 33], 1, scoring=scoring),
        decoding(4, 6),
    )
    chunks = [
        PrefillChunk(request=whole, start=3, count=3, is_last=True, forks=[fork]),
        PrefillChunk(request=begun, start=0, count=2, is_last=False),
        PrefillChunk(request=scores, start=1, count=3, is_last=True),
    ]
    plan = StepPlan(decodes=[decoding(0, 5)], prefills=chunks, page_copies=[(7, 6)])
    step = PackedStep.of(plan, page_table, page_size=4)
    assert (step.rows.tolist(), step.samples.tolist()) == ([0, 1, 2, 3], [True, True, False, False])
    assert (step.page_copies, step.scorings, step.is_decode_only) == ([(7, 6)], [scoring], False)
    assert step.logit_rows is not None and step.logit_rows.tolist() == [0, 1, 1]
    assert step.draws.rows.tolist() == [0, 1, 4]

    last_tokens = torch.tensor([70, 71, 72, 73, 74], dtype=torch.int32)
    batch = BatchBuilder(page_size=4, max_sharing=1, device=torch.device("cpu")).build(step, last_tokens, with_rows=True)
    assert batch.token_ids.tolist() == [70, 13, 14, 15, 20, 21, 31, 32, 33]
    assert batch.positions.tolist() == [5, 3, 4, 5, 0, 1, 1, 2, 3]
    assert batch.slots.tolist() == [5 * 4 + 1, 2 * 4 + 3, 7 * 4, 7 * 4 + 1, 4 * 4, 4 * 4 + 1, 8 * 4 + 1, 8 * 4 + 2, 8 * 4 + 3]
    assert batch.slots.dtype == torch.int64
    assert batch.logit_tokens.tolist() == [0, 3]
    assert [[part.tolist() for part in pair] for pair in batch.scored] == [[[6, 7], [32, 33]]]
    assert batch.rows.tolist() == [0, 1, 1, 1, 2, 2, 3, 3, 3]
    assert (batch.num_decodes, batch.work) == (1, None)
    assert (batch.prefills.starts.tolist(), batch.prefills.lengths.tolist()) == ([3, 0, 1], [6, 2, 4])

    alone = PackedStep.of(StepPlan(decodes=[decoding(0, 5)]), page_table, page_size=4)
    batch = BatchBuilder(page_size=4, max_sharing=1, device=torch.device("cpu")).build(alone, last_tokens, with_rows=False)
    assert (batch.token_ids.tolist(), batch.logit_tokens, batch.rows, alone.logit_rows) == ([70], None, None, None)
    assert alone.is_decode_only
