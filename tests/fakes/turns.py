"""A token source that writes given turns with a real tokenizer, each ended by its end token."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from qwench.engines.protocol import FinishReason, GenerateRequest, GenerateResult, SamplingParams
from qwench.models.built_tokenizers import build_small_tokenizer
from qwench.rollout.generate import GenerateContext, Requests
from qwench.rollout.sampling import Sampling
from qwench.samples import Json, Prompt, Sample


class ScriptedTurns:
    """Writes one of `turns` for each request, in order."""

    def __init__(self, turns: Sequence[str]) -> None:
        self.tokenizer: PreTrainedTokenizerBase = build_small_tokenizer()
        self.prompts: list[str] = []
        self.requests: list[GenerateRequest] = []
        self._turns = iter(turns)

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        """Write the next turn."""
        self.prompts.append(str(self.tokenizer.decode(list(request.input_ids))))
        self.requests.append(request)
        ids = self.tokenizer.encode(next(self._turns) + "<|im_end|>", add_special_tokens=False)
        return GenerateResult(
            request_id=request.request_id, output_ids=ids, log_probs=[-1.0] * len(ids), finish_reason=FinishReason.STOP,
            weight_versions=[3] * len(ids),
        )  # fmt: skip

    async def abort(self, request_id: str | None = None) -> None:
        """Do nothing: a turn is written at once."""

    def skip_turn(self) -> None:
        """Leave out the next turn, which the test has written itself."""
        next(self._turns)

    def context(self, **sampling: Json) -> GenerateContext:
        """Return the context of a sample."""
        return GenerateContext(
            requests=Requests(self), tokenizer=self.tokenizer, rollout_id=0, position=0,
            sampling=Sampling(whole=SamplingParams(**{"max_new_tokens": 400, "seed": 0, **sampling})),
        )  # fmt: skip


def asked(question: str = "2+3?") -> Sample:
    """Return a pending sample of one question."""
    return Sample(
        prompt=Prompt(text=question, token_ids=(1,), messages=[{"role": "user", "content": question}]), sample_id=0, group_id=0
    )
