"""Generation of the end-to-end tests, named by import path."""

import math

from qwench.rollout.generate import GenerateContext, generate_single_turn
from qwench.samples import Sample, Status


async def sample_with_another_bit(sample: Sample, context: GenerateContext) -> Sample:
    """Change the last bit of the first log-prob."""
    sample = await generate_single_turn(sample, context)
    sample.rollout_log_probs[0] -= math.ulp(sample.rollout_log_probs[0]) * 2**29
    return sample


async def run_tool(name: str, arguments: object) -> str:
    """Answer every call alike."""
    return "4"


async def two_quarters(sample: Sample, context: GenerateContext) -> Sample:
    """Answer every question by a fraction that is not reduced."""
    sample.response, sample.status = "\\boxed{2/4}", Status.COMPLETED
    token_ids = context.tokenizer.encode(sample.response, add_special_tokens=False)
    sample.append(token_ids, log_probs=[-1.0] * len(token_ids), version=0)
    return sample
