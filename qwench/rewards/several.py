"""Several rewards of one response (`--rm-type math,judge --reward-weights 0.7,0.3`): their weighted sum, and each apart.

math 1 (exact), judge 0.5 (judged)    score 0.7 * 1 + 0.3 * 0.5 = 0.85    reason exact+judged    parts math: 1, judge: 0.5
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qwench.samples import Json, Verdict


def combine(verdicts: Mapping[str, Verdict], weights: Sequence[float]) -> Verdict:
    """Return the verdict of all rewards together; a reward that could not judge leaves the response ungraded."""
    extra = dict[str, Json]()
    for name, verdict in verdicts.items():
        if not verdict.graded:
            return Verdict(score=0.0, reason=verdict.reason, extra={**verdict.extra, "reward": name})
        extra |= verdict.extra
    parts = {name: verdict.score for name, verdict in verdicts.items()}
    return Verdict(
        score=sum(weight * score for weight, score in zip(weights, parts.values(), strict=True)),
        reason="+".join(verdict.reason for verdict in verdicts.values()),
        extra=extra | parts,
        parts=parts,
    )
