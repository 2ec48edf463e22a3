"""Generate functions of the campaigns."""

from qwench.rollout.generate import GenerateContext
from qwench.samples import Sample, Status


async def roots(sample: Sample, context: GenerateContext) -> Sample:
    """Answer every question by a root that is not in lowest terms."""
    text = f"\\boxed{{\\sqrt{{{8 * (sample.sample_id + 1) ** 2}}}}}"
    token_ids = context.tokenizer.encode(text, add_special_tokens=False)
    sample.append(token_ids, log_probs=[-1.0] * len(token_ids), version=0)
    sample.response, sample.status = text, Status.COMPLETED
    return sample
