"""Generation of the end-to-end tests, named by import path."""

import math

from qwench.rollout.generate import GenerateContext, generate_single_turn
from qwench.samples import Sample


async def sample_with_another_bit(sample: Sample, context: GenerateContext) -> Sample:
    """Change the last bit of the first log-prob."""
    sample = await generate_single_turn(sample, context)
    sample.rollout_log_probs[0] -= math.ulp(sample.rollout_log_probs[0]) * 2**29
    return sample
