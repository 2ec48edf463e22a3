"""Training data as a function of slime or miles makes it of a rollout's samples.

    --custom-convert-samples-to-train-data-path   fn(args, samples) -> {"tokens": [...], "response_lengths": [...], ...}

It replaces normalisation of rewards and the conversion. Its `rewards` are learned from as they are, its `raw_reward` logged.
Every trainer rank calls it with the whole rollout, there with its own share; it must return the same on every rank.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from qwench.errors import TrainingError
from qwench.foreign.loading import load
from qwench.foreign.translate import to_foreign
from qwench.plugins import Function, check_signature, guarded
from qwench.samples import Rollout, Sample

FLAG = "--custom-convert-samples-to-train-data-path"
_NEEDED = ("tokens", "response_lengths", "rewards", "loss_masks")
_READ = (*_NEEDED, "raw_reward", "rollout_ids", "rollout_mask_sums", "sample_indices", "rollout_log_probs", "teacher_log_probs")
_OF_LOGS = ("truncated", "total_lengths", "metadata", "round_number", "source_names", "prompt")
"""Keys that no number of the training follows from."""
_REWARD = "converted_reward"
TrainData = Mapping[str, Sequence[Any]]  # lists of what the key says


def load_conversion(path: str | None, args: Callable[[], Namespace], *, as_text: bool) -> Callable[[Rollout], Rollout] | None:
    """Load what converts a rollout. None: the flag is not given.

    Args:
        as_text: see `to_foreign`.

    Raises:
        ConfigError: it cannot be loaded, or has another signature.
    """
    if path is None:
        return None
    function = load(path, flag=FLAG)
    check_signature(function, path, flag=FLAG, called_as="fn(args, samples)", num_arguments=2)
    return conversion(guarded(function, path=path, flag=FLAG), args, as_text=as_text)


def conversion(function: Function, args: Callable[[], Namespace], *, as_text: bool) -> Callable[[Rollout], Rollout]:
    """Return what replaces the samples of a rollout by those of the user's training data, each a group of its own."""

    def convert(rollout: Rollout) -> Rollout:
        samples = rollout.samples
        data = function(args(), [to_foreign(sample, as_text=as_text) for sample in samples])
        _check(data)
        origins = _origins(data, samples)
        made = [_sample(data, position, origin) for position, origin in enumerate(origins)]
        _check_mask_sums(data, made)
        groups = [replace(rollout.groups[0], group_id=one.group_id, samples=[one]) for one in made]
        return replace(rollout, groups=groups)

    return convert


def read_rewards(samples: Sequence[Sample]) -> list[float]:
    """Return the normalised rewards of converted samples."""
    return [float(sample.metadata[_REWARD]) for sample in samples]


def _check(data: object) -> None:
    """Check the keys and that every list has one entry for each sample.

    Raises:
        TrainingError: something is missing, unknown or of another length.
    """
    if not isinstance(data, Mapping):
        raise TrainingError(f"{FLAG} must return a dict of lists, got {data!r:.200}.")
    if missing := [name for name in _NEEDED if not data.get(name)]:
        raise TrainingError(f"{FLAG} returned no {missing[0]}; it must return {', '.join(_NEEDED)}.")
    if unknown := [name for name in data if name not in _READ + _OF_LOGS]:
        raise TrainingError(f"{FLAG} returned {unknown[0]}, which nothing here reads; known: {', '.join(_READ + _OF_LOGS)}.")
    count = len(data["tokens"])
    for name in _READ:
        if data.get(name) is not None and len(data[name]) != count:
            raise TrainingError(f"{FLAG} returned {len(data[name])} {name} for {count} samples.")


def _origins(data: TrainData, samples: Sequence[Sample]) -> list[Sample]:
    """Return the sample that each row of the data comes from: by sample_indices, else by position."""
    indices = data.get("sample_indices")
    if indices is None:
        if len(data["tokens"]) != len(samples):
            raise TrainingError(
                f"{FLAG} returned {len(data['tokens'])} samples of {len(samples)}; sample_indices must say which they are."
            )
        return list(samples)
    known = {sample.sample_id: sample for sample in samples}
    if strange := [index for index in indices if index not in known]:
        raise TrainingError(f"{FLAG} returned sample_indices with {strange[0]!r}, which is the index of no sample.")
    return [known[index] for index in indices]


def _sample(data: TrainData, position: int, origin: Sample) -> Sample:
    tokens, length = [int(token) for token in data["tokens"][position]], int(data["response_lengths"][position])
    mask = [int(bool(one)) for one in data["loss_masks"][position]]
    if len(mask) != length or len(tokens) <= length:
        raise TrainingError(
            f"{FLAG}: row {position} has {len(tokens)} tokens, a response of {length} and a loss mask of {len(mask)}."
        )
    raw, execution = data.get("raw_reward") or data["rewards"], data.get("rollout_ids")
    oldest = min((version for version in origin.weight_versions if version >= 0), default=0)
    same = len(mask) == origin.response_length
    return replace(
        origin,
        sample_id=position,
        group_id=position,
        execution_id=position if execution is None else int(execution[position]),
        tokens=tokens,
        response_length=length,
        loss_mask=mask,
        rollout_log_probs=_column(data, "rollout_log_probs", position, length),
        weight_versions=[
            -1 if not on else old if old >= 0 else oldest
            for on, old in zip(mask, origin.weight_versions if same else [oldest] * length, strict=True)
        ],
        support=origin.support if same else [],
        teacher_log_probs=_column(data, "teacher_log_probs", position, length),
        verdict=None,
        reward=_finite(raw[position], "raw_reward", position),
        metadata={**origin.metadata, _REWARD: _finite(data["rewards"][position], "rewards", position)},
    )


def _column(data: TrainData, name: str, position: int, length: int) -> list[float]:
    """Return a per-token list of a row; without the key all log-probs of the engine are 0, and none of a teacher."""
    if data.get(name) is None:
        return [0.0] * length if name == "rollout_log_probs" else []
    values = [_finite(value, name, position) for value in data[name][position]]
    if len(values) != length:
        raise TrainingError(f"{FLAG}: row {position} has {len(values)} {name} for a response of {length}.")
    return values


def _finite(value: Any, name: str, position: int) -> float:  # Any: a number of Python, NumPy or PyTorch
    number = float(value)
    if not math.isfinite(number):
        raise TrainingError(f"{FLAG}: row {position} has {number} among its {name}; it must be finite.")
    return number


def _check_mask_sums(data: TrainData, samples: Sequence[Sample]) -> None:
    """Check that the loss is divided by what the function expects: the trained tokens of each execution."""
    if data.get("rollout_mask_sums") is None:
        return
    sums: dict[int | None, int] = {}
    for sample in samples:
        sums[sample.execution_id] = sums.get(sample.execution_id, 0) + sum(sample.loss_mask)
    for sample in samples:
        given = data["rollout_mask_sums"][sample.sample_id]
        if int(given) != sums[sample.execution_id]:
            raise TrainingError(
                f"{FLAG}: rollout_mask_sums of row {sample.sample_id} is {int(given)}, and its rollout_id has "
                f"{sums[sample.execution_id]} trained tokens; --custom-pg-loss-reducer-function-path sets other denominators."
            )
