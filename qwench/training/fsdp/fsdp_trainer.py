"""The `Trainer` of the Hugging Face module under FSDP2, on one rank or many, CPU or GPU.

One path for every number of ranks: a group of one is a mesh of one. What the forward computes with, and what is published, is
the rounding of float32 masters to `param_dtype`. Several ranks have those masters as shards on the device. One rank, and ranks
whose optimizer is offloaded to the host, have the rounded weights there, and the optimizer knows the masters.

With adapters (`lora`) the model is frozen. Masters, gradients and checkpoints are those of the adapters, and the publication
has them merged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import chain
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import PretrainedConfig, PreTrainedModel

from qwench.algorithms.columns import LossFunction, MicroBatch, TokenLoss
from qwench.checkpoints.formats.sources import PartReader, TensorReader, open_weights
from qwench.config.sections.lora import LoraConfig
from qwench.config.sections.optimizer import OptimizerConfig
from qwench.config.sections.training import TrainingConfig
from qwench.errors import ConfigError
from qwench.models.architecture import Architecture
from qwench.models.hf import architecture_of, load_hf_config
from qwench.models.memory import WHOLE_GRADIENT_BYTES
from qwench.training.critic import NewHead
from qwench.training.frozen import OtherModel
from qwench.training.fsdp import checkpoint
from qwench.training.fsdp.attention import install_attention
from qwench.training.fsdp.checkpoint import fill_adapters, fill_shards, is_foreign, load_causal_lm, load_converted
from qwench.training.fsdp.direct import DirectPolicy, PolicyPlace
from qwench.training.fsdp.lora import Adapters
from qwench.training.fsdp.optimizer import MasterOptimizer, full_tensor, local_shard
from qwench.training.fsdp.parallelize import MASTER_DTYPE, build_mesh, place_policy
from qwench.training.fsdp.policy import Policy, put_value_head
from qwench.training.offload import HostCopy
from qwench.training.resuming import load_rng, save_rng
from qwench.training.trainer import BackendTrainer, ParallelRank, Scores, Sums
from qwench.wire.portions import WeightBucket, WeightPart, bucketed


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
        adapters: Adapters | None = None,
    ) -> None:
        """Take a policy that is placed on `mesh` already; use `build`."""
        rank, size = dist.get_rank(), dist.get_world_size()
        parallel = ParallelRank(dp_rank=rank, dp_size=size, num_ranks=size, is_main=rank == 0)
        switch = None if adapters is None else adapters.switch
        super().__init__(
            optimizer,
            parallel=parallel,
            device=device,
            dp_group=dist.group.WORLD,
            adapters=switch,
            activation_budget=policy.activation_budget,
        )
        self._policy = policy
        self._architecture = architecture
        self._param_dtype = param_dtype
        self._adapters = adapters
        self._matrices = adapters.matrices() if adapters is not None else {}
        self._own_matrices = {name: local_shard(matrix) for name, matrix in self._matrices.items()}
        self._weights = _model_weights(policy, adapters)
        self._frozen = {name: weight for name, weight in self._weights.items() if not weight.requires_grad}
        trained = sum(weight.numel() for weight in policy.named_weights().values() if weight.requires_grad)
        whole_bytes = trained * MASTER_DTYPE.itemsize
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
        lora: LoraConfig | None = None,
    ) -> FsdpTrainer:
        """Load a checkpoint that `sources` knows and shard it over all ranks (after `init_process_group`); collective.

        Args:
            total_steps: Optimizer steps of the run, over which the learning rate decays.
            param_dtype: Dtype of the forward, the backward and the publication.
            hf_config: Of the model. None: config.json in `model_folder`.
            critic: Put a new value head in the place of the model's head. logits: Losses get logits, not log-probs.
            lora: Train adapters, and freeze the model. None: train all weights.

        Raises:
            ConfigError, CheckpointError: attention or layout do not fit model, device or ranks; the checkpoint is damaged.
        """
        if training.deterministic_mode:
            torch.use_deterministic_algorithms(True)
        mesh = build_mesh(device, dp_replicate=dp_replicate)
        # In the checkpoint's own dtype: it is cast as shards on the device.
        model, source = load_causal_lm(model_folder, hf_config or load_hf_config(model_folder))
        architecture = put_value_head(model) if critic else architecture_of(model.config)
        install_attention(model, attention, device=device, dtype=param_dtype)
        for name, weight in model.named_parameters():
            weight.requires_grad_(training.trains(name))
        adapters = None if lora is None else _make_adapters(model, lora, source, training, model_folder)
        place = PolicyPlace(
            mesh=mesh,
            training=training,
            device=device,
            param_dtype=param_dtype,
            stored_dtype=param_dtype if optimizer.offloaded_share > 0 else MASTER_DTYPE,
            attention=attention,
        )
        policy = place_policy(model, architecture, place, logits=logits, adapters=adapters)
        masters = _start_training(policy, architecture, adapters, source, optimizer, total_steps, param_dtype)
        return cls(
            policy,
            masters,
            architecture,
            device=device,
            mesh=mesh,
            param_dtype=param_dtype,
            adapters=adapters,
            whole_gradient_bytes=whole_gradient_bytes,
        )

    @torch.no_grad()
    def forward(self, micro_batches: Sequence[MicroBatch], *, temperature: float, with_entropy: bool = False) -> Scores:
        """Return the log-probs of the labels, and their entropy on request. See `Trainer`."""
        self._assert_awake()
        self._policy.begin()
        scored = [self._policy(one, temperature=temperature, with_entropy=with_entropy) for one in micro_batches]
        self._policy.end_scoring()
        entropies = [entropy.cpu() for _, entropy in scored if entropy is not None]
        return Scores(log_probs=[log_probs.cpu() for log_probs, _ in scored], entropy=entropies if with_entropy else None)

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
            with self._dropping(index):
                log_probs, entropy = self._policy(micro_batch, temperature=temperature, with_entropy=with_entropy)
                contribution = loss(log_probs, entropy, micro_batch.to(self.device))
                contribution.loss.backward()
            contributions.append(replace(contribution, loss=contribution.loss.detach()))
            after_each()
        return self._sum_over_step(contributions)

    def weights(self, *, bucket_bytes: int, part: WeightPart = "merged") -> Iterator[WeightBucket]:
        """Return buckets of at most `bucket_bytes` (or one larger tensor), gathered as they are asked for; collective."""
        self._assert_awake()
        whole, adapters = self._whole_weights(), self._adapters
        if adapters is None:
            return bucketed(whole, bucket_bytes=bucket_bytes)
        if part == "merged":
            merged = ((name, adapters.published(name, weight, self._param_dtype)) for name, weight in whole)
            return bucketed(merged, bucket_bytes=bucket_bytes)
        adapter = adapters.apart(self._whole_matrices())
        return bucketed(adapter if part == "adapter" else chain(whole, adapter), bucket_bytes=bucket_bytes)

    def shared_weights(self, part: WeightPart = "merged") -> Mapping[str, Tensor] | None:
        """Return the shards themselves when one rank holds them all and they are what would be published.

        They stay on the device from then on, also in `sleep`: an engine may compute with them.
        """
        adapters = self._adapters
        differs = adapters is not None and (part == "merged" or adapters.section.lora_base != "auto")
        if differs or self.parallel.dp_size > 1 or any(weight.dtype != self._param_dtype for weight in self._weights.values()):
            return None
        self._are_lent = True
        return {name: local_shard(weight) for name, weight in self._weights.items()}

    def copy_held_weights(self) -> HostCopy:
        """Copy the shards to the host in `param_dtype`, the dtype of a forward; with adapters, of these alone."""
        self._assert_awake()
        shards = self._shards() if self._adapters is None else list(self._own_matrices.values())
        return HostCopy(shards, dtype=self._param_dtype)

    def copy_for_frozen(self, folder: Path) -> OtherModel:
        """Read another model into the places of the frozen weights, and exchange them for a copy. See `Trainer`."""
        self._assert_awake()
        assert self._adapters is not None, "weights are frozen beside adapters"
        source, copy = open_weights(folder, self._architecture), HostCopy([*map(local_shard, self._frozen.values())])
        with copy.swapped_in(for_writing=True):
            fill_shards(self._frozen, source)
        return OtherModel(copy, self._adapters.on_host(source, self._param_dtype, self.device))

    def save(self, folder: Path, *, with_optimizer: bool = True) -> None:
        """Write the layout described in `checkpoint`; collective."""
        self._assert_awake()
        if self._adapters is None:
            checkpoint.save_masters(folder, self._optimizer.masters() | checkpoint.in_float32(self._frozen))
        else:
            starts = {name: matrix for name, matrix in self._matrices.items() if not matrix.requires_grad}
            matrices = self._optimizer.masters() | starts
            checkpoint.save_adapters(folder, matrices, self._adapters, is_main=self.parallel.is_main)
        if with_optimizer:
            checkpoint.save_optimizer(folder, self._optimizer)
        if self.parallel.is_main:
            save_rng(folder)
        dist.barrier(group=self._dp_group)  # no rank reports a saved checkpoint that the main rank is still writing

    def save_held_weights(self, folder: Path) -> None:
        """Write the shards as they are, not the masters on the host; collective."""
        self._assert_awake()
        if self._adapters is None:
            checkpoint.save_masters(folder, self._weights)
        else:
            checkpoint.save_adapters(folder, self._matrices, self._adapters, is_main=self.parallel.is_main)

    def load(self, folder: Path, *, weights_only: bool = False, with_rng: bool = True) -> None:
        """Read what `save` wrote, here with any number of ranks or in the Megatron backend; collective.

        Raises:
            CheckpointError: files are missing or belong to another model.
        """
        self._assert_awake()
        if self._adapters is not None:
            checkpoint.load_adapters(folder, self._optimizer, self._adapters, self._architecture)
            if not weights_only:
                checkpoint.load_optimizer(folder, self._optimizer)
        elif is_foreign(folder):
            load_converted(folder, self._optimizer, self._architecture, weights_only=weights_only, frozen=self._frozen)
        else:
            checkpoint.load_masters(folder, self._optimizer, self._frozen)
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
        weights = self._shards(lent=not self._are_lent)
        self._asleep = HostCopy([*self._optimizer.device_state(), *weights])
        self._asleep.release()

    def _shards(self, *, lent: bool = True) -> list[Tensor]:
        """Return the shards of all weights, or of those that no engine computes with."""
        return [local_shard(weight) for weight in ((self._weights if lent else {}) | self._matrices).values()]

    def _whole_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the model's own weights in the publication dtype; collective."""
        for name, weight in self._weights.items():
            # Cast before the gather: the same values at half the traffic.
            yield name, full_tensor(weight.detach().to(self._param_dtype))
        if self._adapters is not None:
            yield from self._adapters.quantised(self._param_dtype)

    def _whole_matrices(self) -> dict[str, Tensor]:
        """Return the adapters' matrices in the dtype in which they compute; collective."""
        if self.parallel.num_ranks == 1:  # without DTensor, which takes longer than the copies
            return {name: matrix.to(self._param_dtype) for name, matrix in self._own_matrices.items()}
        return {name: full_tensor(matrix.detach().to(self._param_dtype)) for name, matrix in self._matrices.items()}

    def _dropping(self, micro_batch: int) -> AbstractContextManager[None]:
        """Drop inputs of adapters in the forward and backward of a micro-batch."""
        if self._adapters is None:
            return nullcontext()
        step, rank = self._optimizer.num_steps, self.parallel.dp_rank
        return self._adapters.switch.dropping(step=step, micro_batch=micro_batch, rank=rank)


def _make_adapters(
    model: PreTrainedModel, lora: LoraConfig, source: TensorReader | None, training: TrainingConfig, folder: Path
) -> Adapters:
    if source is not None and lora.lora_base != "auto":
        raise ConfigError(f"--lora-base {lora.lora_base} reads Hugging Face checkpoints; convert {folder} to one.")
    return Adapters(model, lora, seed=training.seed, base=str(folder))


def _model_weights(policy: Policy | DirectPolicy, adapters: Adapters | None) -> dict[str, nn.Parameter]:
    """Return the weights of the model itself, under their Hugging Face names."""
    matrices = adapters.matrices() if adapters is not None else {}
    return {name: weight for name, weight in policy.named_weights().items() if name not in matrices}


def _start_training(
    policy: Policy | DirectPolicy,
    architecture: Architecture,
    adapters: Adapters | None,
    source: PartReader | None,
    section: OptimizerConfig,
    total_steps: int,
    param_dtype: torch.dtype,
) -> MasterOptimizer:
    """Fill the weights from `source`, where one is given, and the adapters; return the optimizer of what is trained."""
    if source is not None:
        fill_shards(_model_weights(policy, adapters), NewHead(source, architecture) if architecture.value_head else source)
    if adapters is not None:
        fill_adapters(adapters.matrices(), adapters.start(param_dtype))
    trained = {name: weight for name, weight in policy.named_weights().items() if weight.requires_grad}
    masters = MasterOptimizer(trained, policy.gradients, section, total_steps=total_steps)
    if adapters is not None and adapters.start_folder is not None:
        checkpoint.load_adapters(adapters.start_folder, masters, adapters, architecture)
    return masters
