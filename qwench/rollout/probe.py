"""A check of FP8 engines before rollouts start: their log-probs must agree with those of the trainer's BF16 weights.

    engines answer a few prompts greedily  ->  the trainer scores these answers  ->  both log-probs of each token are compared

Rounding to FP8 shifts log-probs by a few hundredths; scales that are wrong, transposed or of another layer by whole units.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from qwench.engines.fleet.pool import EnginePool
from qwench.engines.protocol import GenerateRequest, GenerateResult, SamplingParams
from qwench.errors import WeightSyncError
from qwench.samples import Prompt, Sample

TEMPERATURE = 1.0
"""Of the log-probs that engines report for greedy tokens."""
LARGEST_MEAN_DIFFERENCE = 0.5
"""In nats; ten times the effect of rounding."""
NUM_PROMPTS = 8
NUM_TOKENS = 32
_TIMEOUT_S = 600.0


class GreedyProbe:
    """Asks engines, and compares their log-probs with the trainer's."""

    def __init__(self, prompts: Sequence[Prompt]) -> None:
        """Take the first few of a run's prompts."""
        self._prompts = tuple(prompts[:NUM_PROMPTS])

    def ask(self, engines: EnginePool) -> list[Sample]:
        """Return one greedy answer to each prompt.

        Raises:
            EngineError: an engine failed.
        """
        sampling = SamplingParams(max_new_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)

        async def generate() -> list[GenerateResult]:
            requests = (
                GenerateRequest(request_id=f"probe-{index}", input_ids=prompt.token_ids, sampling=sampling)
                for index, prompt in enumerate(self._prompts)
            )
            return list(await asyncio.gather(*(engines.generate(request) for request in requests)))

        results = engines.run(generate(), label="ask engines for greedy answers", timeout_s=_TIMEOUT_S)
        samples = []
        for index, (prompt, result) in enumerate(zip(self._prompts, results, strict=True)):
            sample = Sample(prompt=prompt, sample_id=index, group_id=index, reward=0.0)
            sample.append(result.output_ids, log_probs=result.log_probs, version=result.weight_versions[-1])
            samples.append(sample)
        return samples

    def compare(self, samples: Sequence[Sample], log_probs: Sequence[Sequence[float]]) -> dict[str, float]:
        """Return how far engines and trainer are apart.

        Args:
            samples: of `ask`.
            log_probs: of the trainer, [R] for each sample, at `TEMPERATURE`.

        Raises:
            WeightSyncError: the difference is larger than rounding can explain.
        """
        differences = [
            abs(ours - theirs)
            for sample, scored in zip(samples, log_probs, strict=True)
            for ours, theirs in zip(sample.rollout_log_probs, scored, strict=True)
        ]
        mean, largest = sum(differences) / len(differences), max(differences)
        # Also false for a difference that is no number.
        if not mean <= LARGEST_MEAN_DIFFERENCE:
            raise WeightSyncError(
                f"FP8 engines and BF16 trainer give greedy tokens log-probs that differ by {mean:.3f} on average (at most "
                f"{LARGEST_MEAN_DIFFERENCE} is rounding); is --hf-checkpoint the FP8 form of the model that is trained?"
            )
        return {"probe/fp8_logprob_abs_diff": mean, "probe/fp8_logprob_abs_diff_max": largest}
