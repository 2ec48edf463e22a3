"""Functions of slime and miles in the policy loss, as functions of ours.

--custom-loss-function-path              fn(args, batch, logits, sum_of_sample_mean) -> loss, metrics
--custom-tis-function-path               fn(args=, pg_loss=, train_log_probs=, rollout_log_probs=, loss_masks=, total_lengths=,
                                            response_lengths=) -> pg_loss, masks, metrics
--custom-pg-loss-reducer-function-path   fn(total_lengths, response_lengths, loss_masks, calculate_per_token_loss)
                                            -> fn(flat loss) -> scalar

They see the responses of a micro-batch one after the other, whole also with context parallelism. A loss gets logits, which are
computed whole for it.
"""

from __future__ import annotations

import inspect
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from qwench.algorithms.columns import LossFunction, MicroBatch, TokenLoss
from qwench.algorithms.method import Correct, Corrected, Reduce
from qwench.errors import ConfigError, TrainingError
from qwench.foreign.loading import PluginApi, is_foreign, load
from qwench.plugins import Function, check_signature, guarded
from qwench.training.batch import unpack

LOSS_FLAG = "--custom-loss-function-path"
TIS_FLAG = "--custom-tis-function-path"
REDUCER_FLAG = "--custom-pg-loss-reducer-function-path"
_TIS_KEYWORDS = (
    *("args", "pg_loss", "train_log_probs", "rollout_log_probs"),
    *("loss_masks", "total_lengths", "response_lengths"),
)


_COLUMNS = {
    "log_probs": "old_log_probs",
    "entropy": "old_entropy",
    "rollout_log_probs": "rollout_log_probs",
    "ref_log_probs": "ref_log_probs",
    "advantages": "advantages",
    "returns": "advantages",
}
"""Key of a batch of slime and miles -> column of a micro-batch."""


def load_loss(path: str, api: PluginApi, args: Callable[[], Namespace]) -> tuple[LossFunction, bool]:
    """Load a loss of either convention, and tell whether it takes logits.

    Raises:
        ConfigError: it cannot be loaded, or has another signature.
    """
    function = load(path, flag=LOSS_FLAG)
    called = guarded(function, path=path, flag=LOSS_FLAG)
    if is_foreign(function, api):
        called_as = "fn(args, batch, logits, sum_of_sample_mean)"
        check_signature(function, path, flag=LOSS_FLAG, called_as=called_as, num_arguments=4)
        return foreign_loss(called, args), True
    called_as = "fn(log_probs, entropy, micro_batch)"
    check_signature(function, path, flag=LOSS_FLAG, called_as=called_as, num_arguments=3)
    return called, False


def load_correction(path: str, api: PluginApi, args: Callable[[], Namespace]) -> Correct:
    """Load a correction of either convention.

    Raises:
        ConfigError: it cannot be loaded, or has another signature.
    """
    function = load(path, flag=TIS_FLAG)
    called = guarded(function, path=path, flag=TIS_FLAG)
    if not is_foreign(function, api):
        called_as = "fn(loss, trainer_log_probs, rollout_log_probs, micro_batch)"
        check_signature(function, path, flag=TIS_FLAG, called_as=called_as, num_arguments=4)
        return called
    _check_keywords(function, path)
    return foreign_correction(called, args)


def load_reduction(path: str, api: PluginApi, *, per_token: bool) -> Reduce:
    """Load a reduction of either convention: ours takes a loss, theirs makes the function that does.

    Raises:
        ConfigError: it cannot be loaded, or has another signature.
    """
    function = load(path, flag=REDUCER_FLAG)
    called = guarded(function, path=path, flag=REDUCER_FLAG)
    if api == "qwench" or (api == "auto" and "loss_masks" not in inspect.signature(function).parameters):
        called_as = "fn(loss, kept, micro_batch)"
        check_signature(function, path, flag=REDUCER_FLAG, called_as=called_as, num_arguments=3)
        return called
    called_as = "fn(total_lengths, response_lengths, loss_masks, calculate_per_token_loss)"
    check_signature(function, path, flag=REDUCER_FLAG, called_as=called_as, num_arguments=4)
    return foreign_reduction(called, per_token=per_token)


def foreign_loss(function: Function, args: Callable[[], Namespace]) -> LossFunction:
    """Return a loss of logits that calls a function of slime and miles."""

    def loss(logits: Tensor, _entropy: Tensor | None, micro_batch: MicroBatch) -> TokenLoss:
        assert micro_batch.step_share is not None and micro_batch.loss_weights is not None, "the learner weighs a step"
        largest = micro_batch.step_share.max()
        share = largest.where(largest > 0, 1.0)  # 0 in an idle micro-batch
        weights = torch.cat(responses(micro_batch.loss_weights, micro_batch)) / share

        def sum_of_sample_mean(values: Tensor) -> Tensor:
            return (values * weights).sum()

        # An idle micro-batch has the share 0, and its loss must not count, even if a function returns one for no tokens.
        with nullcontext() if micro_batch.indices else torch.no_grad():
            answer = function(args(), _batch(micro_batch), logits[None], sum_of_sample_mean)
        if not isinstance(answer, tuple) or len(answer) != 2 or not isinstance(answer[0], Tensor) or answer[0].numel() != 1:
            raise TrainingError(f"{LOSS_FLAG} must return a scalar tensor and a dict of metrics, got {answer!r:.200}.")
        total, metrics = answer
        sums = {name: torch.as_tensor(value, device=logits.device).detach().float() for name, value in metrics.items()}
        if not micro_batch.indices:
            return TokenLoss(loss=0.0 * logits.sum(), metrics={name: torch.zeros_like(largest) for name in sums})
        return TokenLoss(
            loss=total.reshape(()) * largest, metrics={name: value.reshape(()) * largest for name, value in sums.items()}
        )

    return loss


def _batch(micro_batch: MicroBatch) -> dict[str, object]:
    """Return a micro-batch under the names that slime and miles give its parts."""
    sequences = [int(length) for length in micro_batch.lengths]
    masks = [mask.int() for mask in responses(micro_batch.loss_mask, micro_batch)]
    batch: dict[str, object] = {
        "tokens": micro_batch.tokens[None],
        "unconcat_tokens": list(micro_batch.tokens.split(sequences)),
        "total_lengths": sequences,
        "response_lengths": list(micro_batch.response_lengths),
        "loss_masks": masks,
        "rollout_mask_sums": [mask.sum() for mask in masks],
    }
    for name, column in _COLUMNS.items():
        values = getattr(micro_batch, column)
        batch[name] = None if values is None else responses(values, micro_batch)
    return batch


def foreign_correction(function: Function, args: Callable[[], Namespace]) -> Correct:
    """Return a correction that calls a function of slime and miles."""

    def correct(loss: Tensor, trainer_log_probs: Tensor, rollout_log_probs: Tensor, micro_batch: MicroBatch) -> Corrected:
        answer = function(
            args=args(),
            pg_loss=torch.cat(responses(loss, micro_batch)),
            train_log_probs=responses(trainer_log_probs, micro_batch),
            rollout_log_probs=responses(rollout_log_probs, micro_batch),
            loss_masks=[mask.to(loss.dtype) for mask in responses(micro_batch.loss_mask, micro_batch)],
            total_lengths=micro_batch.lengths,
            response_lengths=list(micro_batch.response_lengths),
        )
        if not isinstance(answer, tuple) or len(answer) != 3:
            raise TrainingError(f"{TIS_FLAG} must return the loss, the masks and a dict of metrics, got {answer!r:.200}.")
        corrected, masks, metrics = answer
        if len(masks) != len(micro_batch.response_lengths):
            raise TrainingError(f"{TIS_FLAG} returned {len(masks)} masks for {len(micro_batch.response_lengths)} samples.")
        return Corrected(
            loss=_packed(corrected, micro_batch, loss),
            kept=_packed(torch.cat([mask.to(loss.dtype) for mask in masks]), micro_batch, loss) > 0,
            metrics={name: _packed(values.detach().float(), micro_batch, loss) for name, values in metrics.items()},
        )

    return correct


def foreign_reduction(function: Function, *, per_token: bool) -> Reduce:
    """Return a reduction that calls the function which a function of slime and miles makes for a micro-batch."""

    def reduce(loss: Tensor, kept: Tensor, micro_batch: MicroBatch) -> Tensor:
        masks = [mask.to(loss.dtype) for mask in responses(kept, micro_batch)]
        made = function(micro_batch.lengths, list(micro_batch.response_lengths), masks, per_token)
        total = made(torch.cat(responses(loss, micro_batch)))
        if not isinstance(total, Tensor) or total.numel() != 1:
            raise TrainingError(f"{REDUCER_FLAG} must make a function that returns a scalar tensor, got {total!r:.200}.")
        return total.reshape(())

    return reduce


def responses(values: Tensor, micro_batch: MicroBatch) -> list[Tensor]:
    """Cut a packed [T] column into the [R] values of each response; gradients flow back."""
    return unpack(values, micro_batch, micro_batch.response_lengths)


def _packed(values: Tensor, micro_batch: MicroBatch, like: Tensor) -> Tensor:
    """Return the inverse of `responses` for their concatenation: [T], 0 outside of the responses.

    Raises:
        TrainingError: there is not one value for each token of the responses.
    """
    if values.shape != (sum(micro_batch.response_lengths),):
        expected = sum(micro_batch.response_lengths)
        raise TrainingError(
            f"{TIS_FLAG} returned a tensor of shape {list(values.shape)}; the responses have {expected} tokens."
        )
    places = torch.cat(responses(torch.arange(micro_batch.num_tokens), micro_batch)).to(like.device)
    return torch.zeros_like(like).index_copy(0, places, values.to(like.dtype))


def _check_keywords(function: Function, path: str) -> None:
    try:
        inspect.signature(function).bind(**dict.fromkeys(_TIS_KEYWORDS))
    except TypeError as error:
        keywords: Sequence[str] = [f"{name}=" for name in _TIS_KEYWORDS]
        raise ConfigError(f"{TIS_FLAG} {path!r} cannot be called as fn({', '.join(keywords)}): {error}") from error
