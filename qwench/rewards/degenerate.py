"""Detect a broken reward: nearly all of its zeros have one cause, which is not the model's answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from qwench.samples import Verdict

_SHARE = 0.9
_ADVICE = {
    "no_think_marker": "the deepscaler reward reads only what follows </think>: for a model that does not think use "
    "--rm-type math; for one that does, raise {length_flag} until its thinking ends",
    "no_box": "no \\boxed{...} in the response: ask for one in the prompt (check --apply-chat-template), warm up with "
    "`qwench sft`, or raise {length_flag} until responses end",
    "no_answer_line": "the dapo reward reads only a line `Answer: ...`: ask for one in the prompt, or use --rm-type math "
    "for boxes",
    "no_choice": "the gpqa reward finds no letter in the response: ask for one in the prompt, or raise "
    "{length_flag} until responses end",
    "empty_label": "the labels are empty: check --label-key",
    "unparseable": "the answers cannot be read as expressions: look at some with `qwench reward check`",
    "timeout": "grading runs out of time: raise --reward-timeout-s or --reward-num-workers, for a judge --judge-timeout-s",
    "grader_error": "the grader fails: look at the errors with `qwench reward check`",
}


def degenerate_reason(verdicts: Sequence[Verdict], *, length_flag: str) -> str | None:
    """Return why a rollout's rewards are useless, with advice; None: they may be right.

    Rewards are useless when most responses got none and one reason explains more than 90 % of these. Wrong answers do not
    count: a hard data set is not a broken reward.

    Args:
        length_flag: the flag that bounds the length of these responses, for the advice.
    """
    failed = [verdict.reason for verdict in verdicts if verdict.score <= 0]
    if 2 * len(failed) <= len(verdicts):
        return None
    reason, count = Counter(failed).most_common(1)[0]
    if reason not in _ADVICE or count <= _SHARE * len(failed):
        return None
    errors = (verdict.extra["error"] for verdict in verdicts if verdict.reason == reason and "error" in verdict.extra)
    error = next((f" ({error})" for error in errors), "")
    advice = _ADVICE[reason].replace("{length_flag}", length_flag)
    return f"{count} of {len(verdicts)} responses got no reward for the same reason, {reason!r}{error}: {advice}"
