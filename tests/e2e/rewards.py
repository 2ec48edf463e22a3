"""Rewards of the end-to-end tests, named by import path. Two processes of every run import this file, so it loads little."""

from qwench.samples import Sample, Status


def digit_share(sample: Sample) -> float:
    """Return which share of the response's characters are digits."""
    return sum(character in "0123456789" for character in sample.response) / max(1, len(sample.response))


def nothing(sample: Sample) -> float:
    """Give every response the same reward."""
    return 0.0


def not_a_number(sample: Sample) -> float:
    """Return no reward."""
    return float("nan")


def two_arguments(sample: Sample, label: str) -> float:
    """Have a signature that nobody calls."""
    return 0.0


def large_label(sample: Sample) -> float:
    """Return 1 where the prompt asks for a number above 4, also after a wrong answer: a critic can know it."""
    return float(int(sample.prompt.label or "0") > 4)


async def two_quarters(sample: Sample, context: GenerateContext) -> Sample:
    """Answer every question by a fraction that is not reduced."""
    sample.response, sample.status = "\\boxed{2/4}", Status.COMPLETED
    token_ids = context.tokenizer.encode(sample.response, add_special_tokens=False)
    sample.append(token_ids, log_probs=[-1.0] * len(token_ids), version=0)
    return sample
