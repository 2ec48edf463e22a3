"""The `Trainer` on megatron-core: tensor, pipeline, context and data parallel, over the model of `model.PolicyModel`.

    weights    param_dtype, in one contiguous buffer a rank; all data-parallel ranks hold the same
    gradients  float32, summed over micro-batches in a buffer and over ranks once a step
    masters    float32, sharded over the data- and context-parallel ranks

Forward and publication use the weights. With adapters (`lora`) the model is frozen: buffers, gradients, masters and checkpoints
are those of the adapters, and the publication has them merged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from qwench.algorithms.columns import LossFunction, MicroBatch, TokenLoss
from qwench.checkpoints.formats.sources import open_weights
from qwench.config.layout import ParallelLayout, check_layout
from qwench.config.sections.lora import LoraConfig
from qwench.config.sections.optimizer import OptimizerConfig
from qwench.config.sections.training import TrainingConfig
from qwench.models.architecture import Architecture
from qwench.models.hf import architecture_of, load_hf_config
from qwench.models.megatron_names import rules
from qwench.models.tensor_parts import HostMemory
from qwench.training.critic import NewHead
from qwench.training.frozen import FrozenMatrix, OtherModel
from qwench.training.megatron import adapter_checkpoint, checkpoint, pipeline
from qwench.training.megatron.groups import join_groups
from qwench.training.megatron.lora import Adapters
from qwench.training.megatron.model import (
    PolicyModel,
    TokenScores,
    build_model,
    load_weights,
    local_parameters,
    read_share,
    tensor_place,
    tied_head,
)
from qwench.training.megatron.optimizer import MasterOptimizer, wrap_in_ddp
from qwench.training.megatron.platform import check_platform, check_transformer_impl
from qwench.training.megatron.weights import WholeWeights
from qwench.training.offload import HostCopy
from qwench.training.optimizers.schedule import LrSchedule
from qwench.training.resuming import load_rng, open_saved_optimizer, save_rng
from qwench.training.trainer import BackendTrainer, ParallelRank, Scores, Sums
from qwench.wire.portions import WeightBucket, WeightPart, bucketed


class MegatronTrainer(BackendTrainer):
    """See the module docstring. Life: build -> (forward | forward_backward, optim_step | ...)*; sleep -> wake in between."""

    _optimizer: MasterOptimizer

    def __init__(
        self,
        model: PolicyModel,
        config: Architecture,
        *,
        layout: ParallelLayout,
        parallel: ParallelRank,
        device: torch.device,
        optimizer: OptimizerConfig,
        total_steps: int,
        adapters: Adapters | None = None,
    ) -> None:
        """Take a stage that has its weights; use `build`."""
        self._adapters = adapters
        self._place = tensor_place(config, layout)
        self._weights = local_parameters(model, config)
        self._ddp: DistributedDataParallel = wrap_in_ddp(model)
        super().__init__(
            MasterOptimizer(self._ddp, optimizer, total_steps=total_steps, weights=self._weights, place=self._place),
            parallel=parallel,
            device=device,
            dp_group=parallel_state.get_data_parallel_group(),
            adapters=None if adapters is None else adapters.switch,
        )
        self._config = config
        self._layout = layout
        self._model = model
        # With tied embeddings, the last of several stages computes with a copy of the first one's.
        self._loaded = [*self._weights, *tied_head(model, config)]
        quantised = [] if adapters is None else adapters.quantised
        self._whole = WholeWeights([*self._weights, *quantised], rules(config), config)
        if adapters is not None and adapters.start_folder is not None:
            adapter_checkpoint.load(adapters.start_folder, self._optimizer, adapters, weights_only=True)

    @classmethod
    def build(
        cls,
        model_folder: Path,
        *,
        training: TrainingConfig,
        optimizer: OptimizerConfig,
        total_steps: int,
        layout: ParallelLayout,
        param_dtype: torch.dtype,
        device: torch.device,
        architecture: Architecture | None = None,
        collective_timeout_s: float,
        critic: bool = False,
        logits: bool = False,
        lora: LoraConfig | None = None,
    ) -> MegatronTrainer:
        """Divide the ranks (after `init_process_group`) and load a checkpoint of any format; collective.

        Args:
            model_folder: A checkpoint that `checkpoints.formats.sources` knows.
            total_steps: Optimizer steps of the run, over which the learning rate decays.
            param_dtype: Dtype of weights, activations and the publication. architecture: Of the model; None: that of
                config.json in `model_folder`.
            critic: Put a new value head in the place of the model's head.
            logits: Losses get logits [T, V / tp] in the place of log-probs.
            lora: Train adapters, and freeze the model. None: train all weights.

        Raises:
            ConfigError: megatron-core is missing, or the layout does not fit the model or the ranks.
            CheckpointError: the checkpoint is damaged.
        """
        check_platform()
        check_transformer_impl(training.transformer_impl)
        if training.deterministic_mode:
            torch.use_deterministic_algorithms(True)
        config = architecture or architecture_of(load_hf_config(model_folder))
        check_layout(layout, config, world_size=dist.get_world_size())
        source = open_weights(model_folder, config)
        parallel = join_groups(layout, timeout_s=collective_timeout_s)
        built = config.as_critic() if critic else config
        model = build_model(built, layout, training, device, param_dtype=param_dtype)
        model.gives_logits = logits
        load_weights(model, NewHead(source, built) if critic else source, built, layout)
        place, seed, base = tensor_place(built, layout), training.seed, str(model_folder)
        adapters = None if lora is None else Adapters(model, place, lora, source=source, seed=seed, base=base)
        return cls(
            model,
            built,
            layout=layout,
            parallel=parallel,
            device=device,
            optimizer=optimizer,
            total_steps=total_steps,
            adapters=adapters,
        )

    @property
    def parts(self) -> tuple[DistributedDataParallel, DistributedOptimizer, LrSchedule]:
        """Return the wrapped model, megatron-core's optimizer and the schedule, for functions of the user."""
        return self._ddp, self._optimizer.sharded, self._optimizer.schedule

    @torch.no_grad()
    def forward(self, micro_batches: Sequence[MicroBatch], *, temperature: float, with_entropy: bool = False) -> Scores:
        """Return the log-probs of the labels, and their entropy on request. See `Trainer`."""
        self._assert_awake()
        log_probs, entropy = pipeline.score(self._ddp, micro_batches, temperature=temperature, with_entropy=with_entropy)
        return Scores(log_probs=log_probs, entropy=entropy)

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

        def loss_of(micro_batch: MicroBatch, scores: TokenScores) -> tuple[Tensor, Tensor, TokenLoss]:
            """Return three values: with them and calculate_per_token_loss, the schedules rescale nothing."""
            contribution = loss(scores.log_probs, scores.entropy, micro_batch.to(self.device))
            after_each()
            kept = replace(contribution, loss=contribution.loss.detach())
            return contribution.loss, torch.zeros((), dtype=torch.int, device=self.device), kept

        # On the last stage the contributions of this rank's micro-batches, on the others nothing.
        contributions = pipeline.run(
            self._ddp,
            micro_batches,
            loss_of,
            temperature=temperature,
            with_entropy=with_entropy,
            forward_only=False,
            before_each=self._drop_inputs,
        )
        if self._adapters is not None:
            self._adapters.switch.keep()
        return self._sum_over_step(contributions)

    def weights(self, *, bucket_bytes: int, part: WeightPart = "merged") -> Iterator[WeightBucket]:
        """Return buckets of at most `bucket_bytes` (or one larger tensor), gathered as they are asked for; collective."""
        self._assert_awake()
        whole = self._whole.gather()
        if self._adapters is None:
            return bucketed(whole, bucket_bytes=bucket_bytes)
        if part == "merged":
            return bucketed(self._adapters.merged_into(whole), bucket_bytes=bucket_bytes)
        adapter = self._adapters.apart()
        return bucketed(adapter if part == "adapter" else chain(whole, adapter), bucket_bytes=bucket_bytes)

    def shared_weights(self, part: WeightPart = "merged") -> Mapping[str, Tensor] | None:
        """Return None: Megatron's tensors have another layout than the published ones."""
        return None

    def copy_held_weights(self) -> HostCopy:
        """Copy the weight buffers to the host; with adapters, they hold these alone."""
        self._assert_awake()
        return HostCopy(self._weight_buffers())

    def copy_for_frozen(self, folder: Path) -> OtherModel:
        """Read another model into the places of the frozen weights, and exchange them for a copy. See `Trainer`."""
        self._assert_awake()
        assert self._adapters is not None, "weights are frozen beside adapters"
        source, copy = open_weights(folder, self._config), HostCopy([weight for _, weight in self._loaded])
        with copy.swapped_in(for_writing=True):
            load_weights(self._model, source, self._config, self._layout)
        matrices: dict[FrozenMatrix, Tensor] = {}
        for rule, layer in self._adapters.quantised:
            matrices |= layer.on_host(read_share(rule, source, self._place, like=layer, memory=HostMemory()))
        return OtherModel(copy, matrices)

    def save(self, folder: Path, *, with_optimizer: bool = True) -> None:
        """Write the layout described in `checkpoint`, or in `adapter_checkpoint`; collective."""
        self._assert_awake()
        if self._adapters is not None:
            masters = adapter_checkpoint.whole_masters(self._optimizer, self._adapters)
            adapter_checkpoint.save_adapters(folder, masters, self._adapters, is_main=self.parallel.is_main)
            if with_optimizer:
                adapter_checkpoint.save_state(folder, self._optimizer, self._adapters)
        else:
            optimizer = self._optimizer if with_optimizer else None
            checkpoint.save(folder, self._weights, optimizer, self._place, is_main=self.parallel.is_main)
        if self.parallel.is_main:
            save_rng(folder)
        dist.barrier()  # of all ranks: no rank reports a saved checkpoint that the main rank is still writing

    def save_held_weights(self, folder: Path) -> None:
        """Write the weights as they are; collective."""
        self._assert_awake()
        if self._adapters is not None:
            adapter_checkpoint.save_adapters(folder, self._adapters.held(), self._adapters, is_main=self.parallel.is_main)
        else:
            checkpoint.save(folder, self._weights, None, self._place, is_main=self.parallel.is_main)
        dist.barrier()

    def load(self, folder: Path, *, weights_only: bool = False, with_rng: bool = True) -> None:
        """Read a checkpoint of either backend, in any layout; collective.

        Raises:
            CheckpointError: files are missing or damaged.
            ConfigError: it is of another model.
        """
        self._assert_awake()
        if self._adapters is not None:
            adapter_checkpoint.load(folder, self._optimizer, self._adapters, weights_only=weights_only)
        else:
            self._load_whole(folder, weights_only=weights_only)
        if with_rng and not weights_only:
            load_rng(folder)

    def _load_whole(self, folder: Path, *, weights_only: bool) -> None:
        source = open_weights(folder, self._config)
        muons = self._optimizer.has_momentum
        state = None if weights_only or muons else open_saved_optimizer(folder, self._config)
        stored_alike = checkpoint.is_stored_alike(folder, self._loaded, self._place)
        num_steps = state.num_steps if state else 0
        if muons and not weights_only:
            num_steps = checkpoint.steps_of_muon(folder, is_stored_alike=stored_alike)
        if stored_alike:
            checkpoint.load_weights(folder, self._loaded, self._place)
        else:
            load_weights(self._model, source, self._config, self._layout)
        self._optimizer.reset(num_steps)
        if weights_only:
            return
        if state is None or stored_alike:
            checkpoint.load_state(folder, self._loaded, self._optimizer, self._place)
        else:
            checkpoint.convert_state(state, self._loaded, self._optimizer, self._place)

    def sleep(self) -> None:
        """Move weights, masters and moments to the host. On a CPU they stay."""
        self._assert_awake()
        if self.device.type == "cpu":
            return
        frozen = [weight for weight in self._model.parameters() if not weight.requires_grad]
        self._asleep = HostCopy([*self._weight_buffers(), *frozen, *self._optimizer.device_tensors()])
        self._asleep.release()
        for buffer in self._gradient_buffers():
            buffer.untyped_storage().resize_(0)

    def wake(self) -> None:
        """Undo `sleep`. An awake trainer stays as it is."""
        if self._asleep is None:
            return
        super().wake()
        for buffer in self._gradient_buffers():
            buffer.untyped_storage().resize_(buffer.numel() * buffer.itemsize)
        self._optimizer.drop_gradients()

    def _drop_inputs(self, micro_batch: int) -> None:
        """Drop inputs of adapters from the forward of a micro-batch on."""
        if self._adapters is not None:
            rank = parallel_state.get_data_parallel_rank(with_context_parallel=True)
            self._adapters.switch.drop(step=self._optimizer.num_steps, micro_batch=micro_batch, rank=rank)

    def _names_on_last_stage(self, names: list[str]) -> list[str]:
        return pipeline.broadcast_names_from_last_stage(names)

    def _values_on_last_stage(self, values: Tensor) -> Tensor:
        return pipeline.broadcast_from_last_stage(values)

    def _weight_buffers(self) -> list[Tensor]:
        return [buffer.param_data for buffer in self._ddp.buffers]

    def _gradient_buffers(self) -> list[Tensor]:
        return [buffer.grad_data for buffer in self._ddp.buffers]
