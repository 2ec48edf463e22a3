"""Functions of slime and miles between scores and steps: they read and change the training data as a dict of lists.

--custom-advantage-function-path    fn(args, rollout_data)                slime; sets advantages
--rollout-data-postprocess-path     fn(args, rollout_id, rollout_data)    slime; fn(args) of miles sees no data

Every rank calls them with the whole rollout, there with its own share. They must return the same on every rank.
"""

from __future__ import annotations

import inspect
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qwench.algorithms.columns import RolloutBatch
from qwench.errors import TrainingError
from qwench.foreign.loading import load
from qwench.plugins import Function, check_signature, guarded

ADVANTAGE_FLAG = "--custom-advantage-function-path"
AFTER_FLAG = "--rollout-data-postprocess-path"
RolloutData = dict[str, Any]  # lists of tensors and numbers, by slime's and miles' names


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetFunctions:
    """The user's functions; None: the flag is not given."""

    args: Callable[[], Namespace]
    set_advantages: Function | None = None
    after: Function | None = None

    def advantages(self, batch: RolloutBatch) -> list[Tensor]:
        """Return B x [R] advantages that the user's function sets.

        Raises:
            TrainingError: it sets none, or others than one for each token.
        """
        assert self.set_advantages is not None, "the caller asks"
        data = _view(batch)
        self.set_advantages(self.args(), data)
        return _read_advantages(data, batch, ADVANTAGE_FLAG)

    def process(self, batch: RolloutBatch, rollout_id: int) -> RolloutBatch:
        """Return the batch with what the user's function has changed.

        Raises:
            TrainingError: an advantage is missing or not finite.
        """
        if self.after is None:
            return batch
        if _takes_args_alone(self.after):
            self.after(self.args())
            return batch
        data = _view(batch)
        self.after(self.args(), rollout_id, data)
        return batch.with_columns(advantages=_read_advantages(data, batch, AFTER_FLAG))


def load_targets(advantage: str | None, after: str | None, args: Callable[[], Namespace]) -> TargetFunctions | None:
    """Load the functions that the flags name; None: they name none.

    Raises:
        ConfigError: one cannot be loaded, or has another signature.
    """
    if advantage is None and after is None:
        return None
    loaded = dict[str, Function]()
    if advantage is not None:
        function = load(advantage, flag=ADVANTAGE_FLAG)
        check_signature(function, advantage, flag=ADVANTAGE_FLAG, num_arguments=2, called_as="fn(args, rollout_data)")
        loaded["set_advantages"] = guarded(function, path=advantage, flag=ADVANTAGE_FLAG)
    if after is not None:
        function = load(after, flag=AFTER_FLAG)
        if not _takes_args_alone(function):
            called_as = "fn(args, rollout_id, rollout_data)"
            check_signature(function, after, flag=AFTER_FLAG, num_arguments=3, called_as=called_as)
        loaded["after"] = guarded(function, path=after, flag=AFTER_FLAG)
    return TargetFunctions(args=args, **loaded)


def _takes_args_alone(function: Function) -> bool:
    parameters = inspect.signature(function).parameters.values()
    return len(parameters) == 1 and all(one.kind is not inspect.Parameter.VAR_POSITIONAL for one in parameters)


def _view(batch: RolloutBatch) -> RolloutData:
    """Return the batch under slime's and miles' names; tensors are copies that a function may change."""
    data: RolloutData = {
        "tokens": [tokens.clone() for tokens in batch.tokens],
        "total_lengths": [len(tokens) for tokens in batch.tokens],
        "response_lengths": [len(mask) for mask in batch.loss_mask],
        "loss_masks": [mask.int() for mask in batch.loss_mask],
        "rewards": batch.rewards.tolist(),
    }
    columns = {
        "rollout_log_probs": batch.rollout_log_probs,
        "log_probs": batch.old_log_probs,
        "entropy": batch.old_entropy,
        "ref_log_probs": batch.ref_log_probs,
        "advantages": batch.advantages,
        "returns": batch.advantages,
    }
    data |= {name: [values.clone() for values in column] for name, column in columns.items() if column is not None}
    return data


def _read_advantages(data: RolloutData, batch: RolloutBatch, flag: str) -> list[Tensor]:
    given = data.get("advantages")
    if not isinstance(given, list | tuple) or len(given) != len(batch.loss_mask):
        raise TrainingError(f"{flag} must leave a list of {len(batch.loss_mask)} advantages, got {given!r:.100}.")
    advantages = list[Tensor]()
    for index, mask in enumerate(batch.loss_mask):
        values = torch.as_tensor(given[index], dtype=torch.float32)
        if values.shape != mask.shape or not bool(values[mask].isfinite().all()):
            raise TrainingError(
                f"{flag}: sample {index} needs {len(mask)} finite advantages, got the shape {list(values.shape)}."
            )
        advantages.append(values.where(mask, 0.0))
    return advantages
