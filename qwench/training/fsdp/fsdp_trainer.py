"""The `Trainer` of the Hugging Face module under FSDP2, on one rank or many, CPU or GPU.

One path for every number of ranks: a group of one is a mesh of one. What the forward computes with, and what is published, is
the rounding of float32 masters to `param_dtype`. Several ranks have those masters as shards on the device. One rank, and ranks
whose optimizer is offloaded to the host, have the rounded weights there, and the optimizer knows the masters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from transformers import PretrainedConfig, PreTrainedModel

from qwench.algorithms.columns import LossFunction, MicroBatch, TokenLoss
from qwench.config.sections.optimizer import OptimizerConfig
from qwench.config.sections.training import TrainingConfig
from qwench.models.architecture import Architecture
from qwench.models.hf import architecture_of, load_hf_config
from qwench.models.memory import WHOLE_GRADIENT_BYTES
from qwench.training.critic import NewHead
from qwench.training.fsdp import checkpoint
from qwench.training.fsdp.attention import install_attention
from qwench.training.fsdp.checkpoint import fill_shards, is_foreign, load_causal_lm, load_converted
from qwench.training.fsdp.direct import DirectPolicy, can_be_direct
from qwench.training.fsdp.gathered import GatheredPolicy
from qwench.training.fsdp.optimizer import MasterOptimizer, local_shard
from qwench.training.fsdp.parallelize import MASTER_DTYPE, build_mesh, parallelize
from qwench.training.fsdp.policy import LogitsPolicy, Policy, ValuePolicy, put_value_head
from qwench.training.offload import HostCopy
from qwench.training.resuming import load_rng, save_rng
from qwench.training.trainer import BackendTrainer, ParallelRank, Scores, Sums
from qwench.wire.portions import WeightBucket, bucketed


class FsdpTrainer(BackendTrainer):
    """See the module docstring. Life: build -> (forward | forward_backward, optim_step | ...)*; sleep -> wake in between."""

    _optimizer: MasterOptimizer

    def __init__(
        self,
        policy: Policy | DirectPolicy,
        optimizer: MasterOptimizer,
        architecture: Architecture,
        *,
        device: torch.device,
        mesh: DeviceMesh,
        param_dtype: torch.dtype,
        whole_gradient_bytes: int,
    ) -> None:
        """Take a policy that is placed on `mesh` already; use `build`."""
        rank, size = dist.get_rank(), dist.get_world_size()
        parallel = ParallelRank(dp_rank=rank, dp_size=size, num_ranks=size, is_main=rank == 0)
        super().__init__(optimizer, parallel=parallel, device=device, dp_group=dist.group.WORLD)
        self._policy = policy
        self._architecture = architecture
        self._param_dtype = param_dtype
        self._weights = policy.named_weights()
        whole_bytes = sum(weight.numel() for weight in self._weights.values()) * MASTER_DTYPE.itemsize
        self._reduces_every_micro_batch = mesh["dp_shard"].size() > 1 and whole_bytes > whole_gradient_bytes
        self._are_lent = False

    @classmethod
    def build(
        cls,
        model_folder: Path,
        *,
        training: TrainingConfig,
        optimizer: OptimizerConfig,
        total_steps: int,
        param_dtype: torch.dtype,
        device: torch.device,
        attention: str = "sdpa",
        dp_replicate: int = 1,
        hf_config: PretrainedConfig | None = None,
        whole_gradient_bytes: int = WHOLE_GRADIENT_BYTES,
        critic: bool = False,
        logits: bool = False,
    ) -> FsdpTrainer:
        """Load a checkpoint of any format and shard it over all ranks (after `init_process_group`); collective.

        Args:
            model_folder: A checkpoint that `checkpoints.formats.sources` knows.
            total_steps: Optimizer steps of the run, over which the learning rate decays.
            param_dtype: Dtype of the forward, the backward and the publication. hf_config: Of the model; None: config.json in
                `model_folder`.
            critic: Put a new value head in the place of the model's head. logits: Losses get logits, not log-probs.

        Raises:
            ConfigError: the attention or the layout does not fit the model, device or ranks.
            CheckpointError: the checkpoint is damaged.
        """
        if training.deterministic_mode:
            torch.use_deterministic_algorithms(True)
        mesh = build_mesh(device, dp_replicate=dp_replicate)
        # In the checkpoint's own dtype: it is cast as shards on the device.
        model, source = load_causal_lm(model_folder, hf_config or load_hf_config(model_folder))
        architecture = put_value_head(model) if critic else architecture_of(model.config)
        install_attention(model, attention, device=device, dtype=param_dtype)
        policy = _place(
            model,
            architecture,
            mesh,
            training,
            attention=attention,
            stored_dtype=param_dtype if optimizer.offloaded_share > 0 else MASTER_DTYPE,
            param_dtype=param_dtype,
            device=device,
            logits=logits,
        )
        weights = policy.named_weights()
        if source is not None:
            fill_shards(weights, NewHead(source, architecture) if critic else source)
        masters = MasterOptimizer(weights, policy.gradients, optimizer, total_steps=total_steps)
        return cls(
            policy,
            masters,
            architecture,
            device=device,
            mesh=mesh,
            param_dtype=param_dtype,
            whole_gradient_bytes=whole_gradient_bytes,
        )

    @torch.no_grad()
    def forward(self, micro_batches: Sequence[MicroBatch], *, temperature: float) -> Scores:
        """Return the log-probs of the labels. See `Trainer`."""
        self._assert_awake()
        self._policy.begin()
        scored = [self._policy(micro_batch, temperature=temperature)[0] for micro_batch in micro_batches]
        self._policy.end_scoring()
        return Scores(log_probs=[log_probs.cpu() for log_probs in scored])

    def forward_backward(
        self,
        micro_batches: Sequence[MicroBatch],
        loss: LossFunction,
        *,
        temperature: float,
        with_entropy: bool,
        after_each: Callable[[], None],
    ) -> Sums:
        """Add up the gradients of the micro-batches. See `Trainer`."""
        self._assert_awake()
        assert micro_batches, "every rank brings at least one micro-batch, of weight zero if it has no work"
        self._policy.begin()
        contributions: list[TokenLoss] = []
        for index, micro_batch in enumerate(micro_batches):
            is_last = index == len(micro_batches) - 1
            self._policy.reduce_in_next_backward(whole=is_last or self._reduces_every_micro_batch, is_last=is_last)
            log_probs, entropy = self._policy(micro_batch, temperature=temperature, with_entropy=with_entropy)
            contribution = loss(log_probs, entropy, micro_batch.to(self.device))
            contribution.loss.backward()
            contributions.append(replace(contribution, loss=contribution.loss.detach()))
            after_each()
        return self._sum_over_step(contributions)

    def weights(self, *, bucket_bytes: int) -> Iterator[WeightBucket]:
        """Return buckets of at most `bucket_bytes` (or one larger tensor), gathered as they are asked for; collective."""
        self._assert_awake()
        # Cast before the gather: the same values at half the traffic.
        whole = ((name, _full_tensor(weight.detach().to(self._param_dtype))) for name, weight in self._weights.items())
        return bucketed(whole, bucket_bytes=bucket_bytes)

    def shared_weights(self) -> Mapping[str, Tensor] | None:
        """Return the shards themselves when one rank holds them all and they are what would be published.

        They stay on the device from then on, also in `sleep`: an engine may compute with them.
        """
        if self.parallel.dp_size > 1 or any(weight.dtype != self._param_dtype for weight in self._weights.values()):
            return None
        self._are_lent = True
        return {name: local_shard(weight) for name, weight in self._weights.items()}

    def copy_held_weights(self) -> HostCopy:
        """Copy the shards to the host in `param_dtype`, the dtype of a forward."""
        self._assert_awake()
        return HostCopy(self._shards(), dtype=self._param_dtype)

    def save(self, folder: Path, *, with_optimizer: bool = True) -> None:
        """Write the layout described in `checkpoint`; collective."""
        self._assert_awake()
        checkpoint.save_masters(folder, self._optimizer.masters())
        if with_optimizer:
            checkpoint.save_optimizer(folder, self._optimizer)
        if self.parallel.is_main:
            save_rng(folder)
        dist.barrier(group=self._dp_group)  # no rank reports a saved checkpoint that the main rank is still writing

    def save_held_weights(self, folder: Path) -> None:
        """Write the shards as they are, not the masters on the host; collective."""
        self._assert_awake()
        checkpoint.save_masters(folder, self._weights)

    def load(self, folder: Path, *, weights_only: bool = False, with_rng: bool = True) -> None:
        """Read what `save` wrote, here with any number of ranks or in the Megatron backend; collective.

        Raises:
            CheckpointError: files are missing or belong to another model.
        """
        self._assert_awake()
        if is_foreign(folder):
            load_converted(folder, self._optimizer, self._architecture, weights_only=weights_only)
        else:
            checkpoint.load_masters(folder, self._optimizer)
            if not weights_only:
                checkpoint.load_optimizer(folder, self._optimizer)
        if with_rng and not weights_only:
            load_rng(folder)

    def sleep(self) -> None:
        """Move masters, moments and weights that no other object uses to the host; on a CPU do nothing."""
        self._assert_awake()
        self._optimizer.drop_gradients()
        self._policy.release()
        if self.device.type == "cpu":
            return
        weights = [] if self._are_lent else self._shards()
        self._asleep = HostCopy([*self._optimizer.device_state(), *weights])
        self._asleep.release()
        torch.cuda.empty_cache()

    def _shards(self) -> list[Tensor]:
        return [local_shard(weight) for weight in self._weights.values()]


def _place(
    model: PreTrainedModel,
    architecture: Architecture,
    mesh: DeviceMesh,
    training: TrainingConfig,
    *,
    attention: str,
    stored_dtype: torch.dtype,
    param_dtype: torch.dtype,
    device: torch.device,
    logits: bool,
) -> Policy | DirectPolicy:
    """Put the model on its ranks: a `DirectPolicy` where one rank has it alone and the decoder has every part, else FSDP2.

    A critic, and a policy whose losses get logits, are always under FSDP2. With --whole-weights, several ranks have a
    `GatheredPolicy`.
    """
    plain = not (architecture.value_head or logits)
    if mesh.size() > 1 and training.whole_weights and plain:
        return GatheredPolicy(
            model,
            architecture,
            mesh,
            device=device,
            param_dtype=param_dtype,
            stored_dtype=stored_dtype,
            attention=attention,
            head_chunk_tokens=training.head_chunk_tokens,
            recomputes_layers=training.recomputes_layers,
        )
    if mesh.size() == 1 and can_be_direct(architecture, attention) and plain:
        return DirectPolicy(
            model,
            architecture,
            mesh,
            device=device,
            param_dtype=param_dtype,
            attention=attention,
            head_chunk_tokens=training.head_chunk_tokens,
            recomputes_layers=training.recomputes_layers,
            invariant=training.batch_invariant and device.type == "cpu",
        )
    kind = ValuePolicy if architecture.value_head else LogitsPolicy if logits else Policy
    policy = kind(model, attention=attention, head_chunk_tokens=training.head_chunk_tokens)
    parallelize(
        policy,
        mesh,
        device=device,
        param_dtype=param_dtype,
        gradient_checkpointing=training.recomputes_layers,
        torch_compile=training.torch_compile,
        stored_dtype=stored_dtype,
    )
    return policy


def _full_tensor(tensor: Tensor) -> Tensor:
    assert isinstance(tensor, DTensor), "FSDP2 holds every weight as a DTensor outside of forward and backward"
    return tensor.full_tensor()
