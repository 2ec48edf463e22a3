"""Sampling values of a training rollout, or of one evaluation set."""

from __future__ import annotations

from dataclasses import dataclass, replace
from hashlib import blake2b

from qwench.engines.protocol import SamplingParams
from qwench.samples import Sample


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """The values of whole responses, turned into the parameters of each request."""

    whole: SamplingParams
    """Of a response over all its turns, tool output included. `seed` is the run's; each request's seed is derived from it."""
    max_context_len: int | None = None
    """Prompt and response tokens together. None: no other limit."""
    seed_by_position: bool = False
    """Use seed + position in the group, the same for every prompt, as SGLang's deterministic inference does in slime."""

    def budget_tokens(self, sample: Sample) -> int:
        """Return how many tokens may still be appended to the response."""
        budget = self.whole.max_new_tokens - sample.response_length
        if self.max_context_len is not None:
            budget = min(budget, self.max_context_len - len(sample.tokens))
        return max(budget, 0)

    def params(
        self,
        sample: Sample,
        *,
        position: int,
        scope: str,
        max_new_tokens: int | None = None,
        stop: tuple[str, ...] = (),
        stop_token_ids: tuple[int, ...] = (),
    ) -> SamplingParams:
        """Return the parameters of the sample's next request.

        Args:
            position: of the sample in its group.
            scope: tells sample ids of different data sets apart in the seed.
            max_new_tokens: further bound for this request alone; stop words are added to the configured ones.
        """
        budget = self.budget_tokens(sample)
        if max_new_tokens is not None:
            budget = min(budget, max_new_tokens)
        whole = self.whole
        assert whole.seed is not None, "a run has a seed"
        # A later turn must not see the random numbers of an earlier one again, hence the length in the seed.
        seed = sample_seed(whole.seed, scope, sample.sample_id, sample.response_length)
        return replace(
            whole,
            max_new_tokens=budget,
            min_new_tokens=min(max(whole.min_new_tokens - sample.response_length, 0), budget),
            stop=(*whole.stop, *stop),
            stop_token_ids=(*whole.stop_token_ids, *stop_token_ids),
            seed=whole.seed + position if self.seed_by_position else seed,
        )


def sample_seed(*parts: int | str) -> int:
    """Hash the parts to 31 bits (servers keep seeds as int32), the same on every machine and in every run."""
    digest = blake2b("/".join(str(part) for part in parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 33
