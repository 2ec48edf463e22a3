"""The host side of a step's batch; what the model makes of it is checked by the engine's contract tests."""

from __future__ import annotations

import numpy as np
import torch

from qwench.engines.embedded.compute.batch import BatchBuilder, PackedStep
from qwench.engines.embedded.scheduling.request import RunningRequest
from qwench.engines.embedded.scheduling.scheduler import StepPlan
from qwench.engines.protocol import GenerateRequest, SamplingParams


def decoding(row: int, num_computed: int) -> RunningRequest:
    tokens = [1] * (num_computed + 1)
    return RunningRequest(
        request=GenerateRequest(request_id=f"r{row}", input_ids=tokens, sampling=SamplingParams(max_new_tokens=4)),
        seed=0,
        max_new_tokens=4,
        stop_ids=frozenset(),
        future=None,
        tokens=tokens,
        num_prompt=len(tokens),
        num_computed=num_computed,
        row=row,
    )


def test_decodes_have_the_pages_of_the_longest_of_them_and_no_more():
    builder = BatchBuilder(page_size=4, max_sharing=1, device=torch.device("cpu"))
    page_table = np.array([[3, 5, 9, 0, 0], [2, 7, 8, 0, 0]], dtype=np.int32)
    plan = StepPlan(decodes=[decoding(1, 2), decoding(0, 4)])  # 3 and 5 tokens: 2 pages
    decodes = PackedStep.of(plan, page_table, page_size=4).decodes
    assert decodes.tables.tolist() == [[2, 7], [3, 5]]
    assert (decodes.lengths.tolist(), builder.slots_of(decodes).tolist()) == ([3, 5], [2 * 4 + 2, 5 * 4])
