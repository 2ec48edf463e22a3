"""From our sample to slime's and miles' and back.

    pending:  tokens are empty there, the prompt's here
    reward:   a number, or the record of our verdict
    versions: one for each request there, one for each token here

Attributes that a function adds travel in our metadata under ATTRIBUTES, as far as they are JSON.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import count
from typing import Any

from transformers import PreTrainedTokenizerBase

from qwench.errors import QwenchError
from qwench.foreign.sample import FIELDS, Foreign, PrefixCacheInfo, SampleStatus, leaves
from qwench.foreign.sample import Sample as ForeignSample
from qwench.rewards.scores import read_answer
from qwench.samples import Group, Prompt, Sample, Status, Verdict

ATTRIBUTES = "foreign_attributes"
_OURS = {
    SampleStatus.PENDING: Status.PENDING,
    SampleStatus.COMPLETED: Status.COMPLETED,
    SampleStatus.TRUNCATED: Status.TRUNCATED,
    SampleStatus.ABORTED: Status.ABORTED,
    SampleStatus.FAILED: Status.COMPLETED,
}
_THEIRS = {ours: theirs for theirs, ours in _OURS.items() if theirs is not SampleStatus.FAILED}


def to_foreign(sample: Sample, *, as_text: bool = True) -> ForeignSample:
    """Return the sample as a function of slime and miles knows it.

    Args:
        as_text: the prompt is the rendered text (--apply-chat-template); else the raw row.
    """
    metadata = {name: value for name, value in sample.metadata.items() if name != ATTRIBUTES}
    if sample.prompt.tools is not None:
        metadata["tools"] = list(sample.prompt.tools)
    made = ForeignSample(
        group_index=sample.group_id,
        index=sample.sample_id,
        rollout_id=None if sample.execution_id == sample.sample_id else sample.execution_id,
        prompt=sample.prompt.text if as_text else sample.prompt.messages,  # type: ignore[arg-type]  # messages are lists here
        tokens=list(sample.tokens) if sample.response_length else [],
        response=sample.response,
        response_length=sample.response_length,
        label=sample.prompt.label,
        reward=_reward(sample),
        loss_mask=list(sample.loss_mask) if sample.response_length else None,
        weight_versions=_runs(sample.weight_versions),
        rollout_log_probs=list(sample.rollout_log_probs) if sample.response_length else None,
        teacher_log_probs=list(sample.teacher_log_probs) or None,
        status=_THEIRS[sample.status],
        metadata=metadata,
        prefix_cache_info=PrefixCacheInfo(sample.cached_tokens, sample.input_tokens),
    )
    made.__dict__.update(sample.metadata.get(ATTRIBUTES, {}))
    return made


def from_foreign(
    sample: ForeignSample, *, like: Sample | None, tokenizer: PreTrainedTokenizerBase, version: int = -1
) -> Sample:
    """Return the record of a sample that a function has made or changed.

    Args:
        like: the record it was made from. None: the function made the sample itself.
        version: weights that sampled tokens whose version the function does not say.

    Raises:
        QwenchError: its per-token lists do not fit its response.
    """
    if not isinstance(sample, ForeignSample):
        raise QwenchError(f"a function of slime's or miles' convention returned {sample!r:.200}, not a Sample.")
    try:
        sample.validate()
    except ValueError as error:
        raise QwenchError(f"sample {sample.index}: {error}.") from error
    length = sample.response_length
    mask = [1] * length if sample.loss_mask is None else [int(bool(one)) for one in sample.loss_mask]
    known = sample.rollout_log_probs or [0.0] * length
    verdict = _verdict(sample, like)
    ours = Sample(
        prompt=_prompt(sample, like, tokenizer),
        sample_id=like.sample_id if like is not None else sample.index or 0,
        group_id=like.group_id if like is not None else sample.group_index or 0,
        execution_id=sample.rollout_id,
        tokens=list(sample.tokens),
        response_length=length,
        loss_mask=mask,
        rollout_log_probs=[float(value) if on else 0.0 for value, on in zip(known, mask, strict=True)],
        weight_versions=_versions(sample, like, mask, version),
        support=like.support if like is not None and like.tokens == sample.tokens else [],
        teacher_log_probs=[] if sample.teacher_log_probs is None else [float(one) for one in sample.teacher_log_probs],
        response=sample.response,
        status=_OURS[sample.status],
        verdict=verdict,
        reward=None if verdict is None else verdict.score if verdict.graded else 0.0,
        cached_tokens=sample.prefix_cache_info.cached_tokens,
        input_tokens=sample.prefix_cache_info.total_prompt_tokens,
        metadata={**sample.metadata, **_attributes(sample)},
    )
    if sample.remove_sample:
        ours.mask_out()
    return ours


def to_groups(
    answer: Foreign, *, tokenizer: PreTrainedTokenizerBase, made_from: Mapping[int, Sample] | None = None
) -> list[Group]:
    """Return the groups that a rollout function made; an inner list is one execution.

    A group has the id of its first sample. Without one, or where another group has it, the group gets the next free id. A
    sample without an index gets the next free one.

    Args:
        made_from: id of a sample -> the record it was made from, where there is one.

    Raises:
        QwenchError: a group without a sample, or see `from_foreign`.
    """
    answered = [list(leaves(group)) for group in answer]
    if not all(answered):
        raise QwenchError(f"group {answered.index([])} that the rollout function returned has no sample.")
    given = [getattr(group[0], "group_index", None) for group in answered]
    free, groups = _free_ids(given), dict[int, Group]()
    unnumbered = [one for group in answered for one in group if getattr(one, "index", 0) is None]
    free_samples = _free_ids([getattr(one, "index", None) for group in answered for one in group])
    for one in unnumbered:  # each is a separate execution
        one.index = next(free_samples)
    for wanted, group in zip(given, answered, strict=True):
        samples = [from_foreign(one, like=(made_from or {}).get(id(one)), tokenizer=tokenizer) for one in group]
        group_id = next(free) if wanted is None or wanted in groups else wanted
        for sample in samples:
            sample.group_id = group_id
        groups[group_id] = Group(group_id=group_id, samples=samples)
    return list(groups.values())


def _free_ids(taken: Iterable[int | None]) -> Iterator[int]:
    return count(max((one for one in taken if one is not None), default=-1) + 1)


def _reward(sample: Sample) -> Foreign:
    if sample.verdict is None or not sample.verdict.extra:
        return sample.reward
    return dict(sample.verdict.extra)


def _score_key(reward: Foreign) -> str | None:
    """Choose some number of a record as its score, where it has no `score`; --reward-key picks later."""
    if not isinstance(reward, dict) or "score" in reward:
        return None
    return next((name for name, value in reward.items() if isinstance(value, int | float)), None)


def _verdict(sample: ForeignSample, like: Sample | None) -> Verdict | None:
    """Return the verdict as it was, or one with the reward that a function has set."""
    if like is not None and like.verdict is not None and sample.reward == _reward(like):
        return like.verdict
    return None if sample.reward is None else read_answer(sample.reward, key=_score_key(sample.reward), source="custom")


def _runs(versions: Sequence[int]) -> list[str]:
    runs: list[str] = []
    for version in versions:
        if version >= 0 and runs[-1:] != [str(version)]:
            runs.append(str(version))
    return runs


def _versions(sample: ForeignSample, like: Sample | None, mask: Sequence[int], fallback: int) -> list[int]:
    """Return a version for each token: as it was, or the oldest where several requests wrote a new response."""
    now = (sample.tokens, mask, sample.weight_versions)
    if like is not None and now == (like.tokens, like.loss_mask, _runs(like.weight_versions)):
        return like.weight_versions
    numbers = [int(text) for text in sample.weight_versions if str(text).lstrip("-").isdigit()]
    version = min(numbers) if numbers else max(fallback, 0)
    return [version if on else -1 for on in mask]


def _prompt(sample: ForeignSample, like: Sample | None, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    """Return the prompt with the tokens in front of the response; a function may have replaced it."""
    tokens = tuple(sample.tokens[: len(sample.tokens) - sample.response_length])
    if like is not None and (not tokens or tokens == like.prompt.token_ids):
        return like.prompt
    text = sample.prompt if isinstance(sample.prompt, str) else tokenizer.decode(list(tokens))
    assert isinstance(text, str), "one list of ids decodes to one text"
    if not tokens:
        tokens = tuple(tokenizer(text)["input_ids"])
    if like is not None:
        return replace(like.prompt, text=text, token_ids=tokens)
    return Prompt(text=text, token_ids=tokens, label=sample.label, messages=sample.prompt, metadata=dict(sample.metadata))


def _attributes(sample: ForeignSample) -> dict[str, Any]:
    """Return the attributes that are no fields, as far as a recording can hold them."""
    names = set(sample.__dict__) - FIELDS
    kept = {name: value for name in names if _is_json(value := sample.__dict__[name])}
    return {ATTRIBUTES: kept} if kept else {}


def _is_json(value: Foreign) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True
