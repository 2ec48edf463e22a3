"""Improve the policy on one rollout: the algorithm from scored samples to optimizer steps.

SPMD: every rank holds a `Learner`, is given the whole rollout, plans alike, and computes on its own share of micro-batches.
Log-probs are gathered right after they are computed, so that everything between the backend's calls is the same on all ranks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qwench.algorithms.reduction import execution_mean_weights, token_mean_weights
from qwench.algorithms.registry import Ratio, find_estimator
from qwench.config.sections.algorithm import AlgorithmConfig
from qwench.config.sections.training import TrainingConfig
from qwench.data.balance import SequenceCost
from qwench.errors import RewardError, TrainingError
from qwench.observability.console import Console
from qwench.observability.timing import PhaseTimer
from qwench.samples import Rollout, Sample
from qwench.training.batch import RolloutBatch, unpack
from qwench.training.flop_meter import FORWARD, FORWARD_AND_BACKWARD, FlopMeter
from qwench.training.micro_batches import MicroBatching, StepPlan, plan_steps
from qwench.training.objectives import LossObserver, build_loss
from qwench.training.rollout_metrics import rollout_metrics
from qwench.training.targets import normalized_rewards, token_advantages
from qwench.training.trainer import StepResult, TrainBackend
from qwench.weights.broadcast import BroadcastLink
from qwench.weights.rank_publication import publish_from_rank
from qwench.weights.settings import PublicationSettings
from qwench.wire.addresses import EngineAddress
from qwench.wire.portions import WeightBucket

_REFERENCE_FOLDER = "reference"

RewardPostProcess = Callable[[Sequence[Sample]], Sequence[float]]
"""`--custom-reward-post-process-path`: samples of a rollout in, the reward that each one's advantages are made of out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Learned:
    """What was measured while learning from one rollout."""

    metrics: Mapping[str, float]
    """`rollout/...` and `perf/...`."""
    steps: Sequence[Mapping[str, float]]
    """`train/...` of each optimizer step."""


class Learner:
    """See the module docstring. All methods but `shared_weights` are collective.

    The backend must hold the weights of the reference when the learner is made; the policy may be loaded afterwards.
    """

    def __init__(
        self,
        backend: TrainBackend,
        *,
        algorithm: AlgorithmConfig,
        training: TrainingConfig,
        temperature: float,
        timer: PhaseTimer,
        console: Console,
        sequence_cost: SequenceCost | None = None,
        reward_post_process: RewardPostProcess | None = None,
    ) -> None:
        self._backend = backend
        self._algorithm = algorithm
        self._training = training
        self._temperature = temperature
        self._timer = timer
        self._meter = FlopMeter(timer, sequence_cost, num_ranks=backend.parallel.num_ranks)
        self._console = console
        self._reward_post_process = reward_post_process
        self._link = BroadcastLink()
        self._loss = build_loss(algorithm)
        self._micro_batching, self._log_prob_batching = (
            MicroBatching.from_config(training, backend.parallel, cost=sequence_cost, with_gradient=with_gradient)
            for with_gradient in (True, False)
        )
        if self._needs_reference:
            backend.snapshot_reference()

    def learn(self, rollout: Rollout) -> Learned:
        """Take the optimizer steps that one rollout is good for.

        Raises:
            TrainingError: the rollout does not fill a step, or a loss or gradient norm is not finite.
        """
        with self._timer.phase("train"):
            batch, plan = self._plan(rollout)
            if self._needs_reference:
                batch = self._with_ref_log_probs(batch)
            if self._needs_old_log_probs(plan):
                batch = self._with_old_log_probs(batch)
            if self._is_policy_loss:
                batch = batch.with_columns(advantages=token_advantages(batch, self._algorithm))
            steps, perf = self._take_steps(batch, plan)
            if self._reference_update_due(rollout.rollout_id):
                self._backend.snapshot_reference()
        kept = [rollout.samples[i] for i in plan.order]
        perf |= self._meter.take() | self._peak_memory()
        return Learned(metrics={**rollout_metrics(kept, batch), **perf}, steps=steps)

    def log_probs(self, samples: Sequence[Sample], temperature: float) -> list[list[float]]:
        """Return [R] of each sample under the held weights; 0 where its loss mask is."""
        batch = RolloutBatch.from_samples(samples)
        return [column.tolist() for column in self._log_probs(batch, temperature=temperature)]

    def save(self, folder: Path, *, with_optimizer: bool = True) -> None:
        """Write everything that a resumed run needs under the empty `folder`; a reference that moves under `reference`."""
        self._backend.save(folder, with_optimizer=with_optimizer)
        if self._reference_moves:
            (folder / _REFERENCE_FOLDER).mkdir(exist_ok=True)
            with self._backend.reference():
                self._backend.save(folder / _REFERENCE_FOLDER, with_optimizer=False)

    def load(self, folder: Path, *, weights_only: bool = False, with_rng: bool = True) -> None:
        """Read what `save` wrote; without a saved reference, the one from the start stays."""
        if self._reference_moves and (folder / _REFERENCE_FOLDER).is_dir():
            self._backend.load(folder / _REFERENCE_FOLDER, weights_only=True)
            self._backend.snapshot_reference()
        self._backend.load(folder, weights_only=weights_only, with_rng=with_rng)

    def weights(self, *, bucket_bytes: int) -> Iterator[WeightBucket]:
        """Yield all weights under Hugging Face names in buckets."""
        return self._backend.weights(bucket_bytes=bucket_bytes)

    def shared_weights(self) -> Mapping[str, Tensor] | None:
        """Return the live tensors when this process owns them whole in the publication dtype; else None."""
        return self._backend.shared_weights()

    def publish(self, addresses: Sequence[EngineAddress], version: int, settings: PublicationSettings) -> None:
        """Bring the held weights to engines in other processes under `version`; collective. See `publish_from_rank`."""
        publish_from_rank(self, addresses, version, settings, link=self._link)

    def close(self) -> None:
        """End what stands between publications."""
        self._link.close()

    def release_cache(self) -> None:
        """Give device memory back that holds nothing but is kept for later."""
        if self._backend.device.type == "cuda":
            torch.cuda.empty_cache()

    def sleep(self) -> None:
        """Move everything the next forward does not need at once from the device to the host."""
        self._backend.sleep()

    def wake(self) -> None:
        """Undo `sleep`."""
        self._backend.wake()

    @property
    def _is_policy_loss(self) -> bool:
        return self._algorithm.loss_type == "policy_loss"

    @property
    def _needs_reference(self) -> bool:
        return self._is_policy_loss and self._algorithm.needs_reference

    @property
    def _reference_moves(self) -> bool:
        return self._needs_reference and self._algorithm.ref_update_interval is not None

    def _plan(self, rollout: Rollout) -> tuple[RolloutBatch, StepPlan]:
        """Return the columns in order of the steps, with normalised rewards, and where each step's samples are."""
        batch = RolloutBatch.from_samples(rollout.samples)
        batch = batch.with_columns(rewards=self._rewards(rollout.samples, batch))
        assert self._training.global_batch_size is not None, "--global-batch-size is derived before a learner is made"
        plan = plan_steps(batch.execution_ids, global_batch_size=self._training.global_batch_size)
        if plan.num_dropped:
            self._console.say(
                f"rollout {rollout.rollout_id}: {plan.num_dropped} trailing executions do not fill a step of "
                f"--global-batch-size {self._training.global_batch_size} and are dropped"
            )
        self._check_rollout_log_probs(batch, rollout.rollout_id)
        return batch.select(plan.order), plan

    def _rewards(self, samples: Sequence[Sample], batch: RolloutBatch) -> Tensor:
        """Return [B] rewards, normalised over whole groups, also those that lose a member to a dropped step."""
        if not self._is_policy_loss:
            return batch.rewards
        if self._reward_post_process is None:
            return normalized_rewards(batch, self._algorithm)
        rewards = torch.tensor([float(reward) for reward in self._reward_post_process(samples)])
        if rewards.shape != batch.rewards.shape:
            raise RewardError(
                f"--custom-reward-post-process-path returned {len(rewards)} rewards for {len(samples)} samples; "
                "return one for each."
            )
        return rewards

    def _check_rollout_log_probs(self, batch: RolloutBatch, rollout_id: int) -> None:
        config = self._algorithm
        wanted = {
            "--use-tis": config.use_tis,
            "--use-rollout-logprobs": config.use_rollout_logprobs,
            "--get-mismatch-metrics": config.get_mismatch_metrics,
        }
        flags = [flag for flag, given in wanted.items() if given]
        if self._is_policy_loss and flags and batch.rollout_log_probs is None:
            raise TrainingError(f"{flags[0]} needs the engine's log-probs, rollout {rollout_id} has none; leave the flag out.")

    def _needs_old_log_probs(self, plan: StepPlan) -> bool:
        """Tell whether the policy's log-probs before the first step are worth a pass.

        With one step they are those of the update itself, which uses its own values without gradient.
        """
        config = self._algorithm
        if not self._is_policy_loss:
            return False
        if config.get_mismatch_metrics:
            return True
        if config.use_rollout_logprobs:
            return False
        sequence_ratio = find_estimator(config.advantage_estimator).ratio is Ratio.SEQUENCE
        return len(plan.steps) > 1 or config.kl_coef != 0 or sequence_ratio

    def _with_ref_log_probs(self, batch: RolloutBatch) -> RolloutBatch:
        measured = self._meter.phase("ref_log_probs", batch.lengths, num_scored=_num_scored(batch), passes=FORWARD)
        with measured, self._console.phase("reference log-probs"), self._backend.reference():
            return batch.with_columns(ref_log_probs=self._log_probs(batch, temperature=self._temperature))

    def _with_old_log_probs(self, batch: RolloutBatch) -> RolloutBatch:
        measured = self._meter.phase("log_probs", batch.lengths, num_scored=_num_scored(batch), passes=FORWARD)
        with measured, self._console.phase("log-probs"):
            return batch.with_columns(old_log_probs=self._log_probs(batch, temperature=self._temperature))

    def _log_probs(self, batch: RolloutBatch, *, temperature: float) -> list[Tensor]:
        """Compute this rank's share, and return B x [R] float32 of all ranks."""
        micro_batches = self._log_prob_batching.pack(batch)
        columns = [torch.zeros(len(mask)) for mask in batch.loss_mask]
        computed = self._backend.log_probs(micro_batches, temperature=temperature)
        for values, micro_batch in zip(computed, micro_batches, strict=True):
            if micro_batch.indices:
                responses = unpack(values, micro_batch, [len(columns[i]) for i in micro_batch.indices])
                for i, response in zip(micro_batch.indices, responses, strict=True):
                    columns[i] = response
        lengths = [len(column) for column in columns]
        # Every sample is computed on one rank and 0 on the others, so the sum is exact.
        gathered = self._backend.all_reduce_sum(torch.cat(columns).to(self._backend.device)).cpu()
        return list(gathered.split(lengths))

    def _take_steps(self, batch: RolloutBatch, plan: StepPlan) -> tuple[list[dict[str, float]], dict[str, float]]:
        """Return the `train/...` metrics of each step, and `perf/...`."""
        start = time.perf_counter()
        with self._meter.phase("actor_train", batch.lengths, num_scored=_num_scored(batch), passes=FORWARD_AND_BACKWARD):
            steps = [self._step(batch.select(step), f"train {k}/{len(plan.steps)}") for k, step in enumerate(plan.steps, 1)]
        if batch.old_log_probs is None:
            # Each step has compared the engine with its own weights; only the first one's were those that sampled.
            steps[1:] = [_without_gap_to_engine(step) for step in steps[1:]]
        seconds = time.perf_counter() - start
        return steps, {
            "rollout/dropped_executions": float(plan.num_dropped),
            "perf/actor_train_tok_per_s": sum(batch.lengths) / seconds,
        }

    def _step(self, batch: RolloutBatch, label: str) -> dict[str, float]:
        if self._algorithm.calculate_per_token_loss:
            weights = token_mean_weights(batch.loss_mask)
        else:
            weights = execution_mean_weights(batch.loss_mask, batch.execution_ids)
        micro_batches = self._micro_batching.pack(batch.with_columns(loss_weights=weights))
        with self._console.progress(label, total=len(micro_batches)) as progress:
            loss = LossObserver(self._loss, after_each=progress.advance, device=self._backend.device)
            with_entropy = self._algorithm.entropy_coef != 0 or self._algorithm.observe_training_entropy
            result = self._backend.update(micro_batches, loss, temperature=self._temperature, with_entropy=with_entropy)
        metrics = _step_metrics(result)
        if batch.rollout_log_probs is not None:
            metrics["train/train_rollout_logprob_abs_diff_max"] = self._backend.max_over_ranks(float(loss.largest_difference))
        return metrics

    def _peak_memory(self) -> dict[str, float]:
        """Return the most memory that any rank's tensors took on its GPU since the last call, engine included."""
        device = self._backend.device
        if device.type != "cuda":
            return {}
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return {"perf/peak_gpu_memory_gib": self._backend.max_over_ranks(peak / 2**30)}

    def _reference_update_due(self, rollout_id: int) -> bool:
        interval = self._algorithm.ref_update_interval
        return self._reference_moves and interval is not None and (rollout_id + 1) % interval == 0


def _num_scored(batch: RolloutBatch) -> int:
    return sum(int(mask.sum()) for mask in batch.loss_mask)


def _step_metrics(result: StepResult) -> dict[str, float]:
    rates = {f"train/lr-pg_{i}": rate for i, rate in enumerate(result.learning_rates)}
    losses = {f"train/{name}": value for name, value in result.metrics.items()}
    return {"train/loss": result.loss, "train/grad_norm": result.grad_norm, **rates, **losses}


def _without_gap_to_engine(step: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in step.items() if not name.startswith("train/train_rollout_")}
