"""The policy as a megatron-core model: this rank's stage of it, from a Hugging Face configuration and checkpoint.

    first stage    embedding, layers ->
    in between                layers ->      hidden states [t, 1, D]
    last stage                layers, norm, head -> log-probs and entropy of the labels

t are the tokens of one rank: split over context-parallel ranks, and with sequence parallelism over tensor-parallel ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn
from torch.nn.functional import pad, silu

from qwench.algorithms.columns import MicroBatch, on_device
from qwench.algorithms.support import Support
from qwench.checkpoints.formats.sources import PartReader
from qwench.config.layout import ParallelLayout
from qwench.config.sections.training import TrainingConfig
from qwench.errors import ConfigError
from qwench.models.architecture import Architecture, refuse_output_biases
from qwench.models.megatron_names import WeightRule, rules, to_megatron
from qwench.models.tensor_parts import HostMemory
from qwench.training.megatron.context_parallel import SequenceSplit, gather_results, split_sequences
from qwench.training.megatron.groups import is_first_stage, is_last_stage
from qwench.training.megatron.layers import PackedTokens, block_spec, uses_varlen_kernel
from qwench.training.megatron.log_probs import VocabShard, parallel_log_probs
from qwench.training.megatron.tensor_place import TensorPlace
from qwench.training.megatron.weights import HeldWeight


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenScores:
    """Scores of a micro-batch on the last stage; the same on all tensor- and context-parallel ranks."""

    log_probs: Tensor
    """[T] float32, 0 where loss_mask is false; of a critic, values. Logits [T, V / tp] where the loss takes them."""
    entropy: Tensor | None
    """[T] float32, 0 where loss_mask is false; None unless asked for."""


class PolicyModel(GPTModel):
    """One stage of the policy: a GPTModel that is called with micro-batches and whose head never holds all logits."""

    def __init__(
        self,
        config: TransformerConfig,
        architecture: Architecture,
        layout: ParallelLayout,
        training: TrainingConfig,
        *,
        varlen: bool,
    ) -> None:
        """Allocate the stage's weights on the current device, without values; use `build_model`."""
        super().__init__(
            config=config,
            transformer_layer_spec=block_spec(config, transformer_impl=training.transformer_impl),
            vocab_size=architecture.vocab_size + -architecture.vocab_size % layout.tp,
            max_sequence_length=architecture.max_positions,
            pre_process=is_first_stage(),
            post_process=is_last_stage(),
            share_embeddings_and_output_weights=architecture.tied_head,
            position_embedding_type="none",  # CoreAttention rotates
        )
        if architecture.value_head and self.post_process:
            self.output_layer = nn.Linear(config.hidden_size, 1, bias=False, dtype=config.params_dtype)
        self._architecture = architecture
        self._layout = layout
        self._head_chunk_tokens = training.head_chunk_tokens
        self._varlen = varlen
        self.gives_logits = False
        """Passes with a gradient return this rank's logits in the place of log-probs."""

    def forward(self, micro_batch: MicroBatch, *, temperature: float, with_entropy: bool) -> Tensor | TokenScores:
        """Return hidden states [t, 1, D] for the next stage, or on the last stage the labels' scores.

        Args:
            micro_batch: On the host, the same on all ranks of a model; what is needed is moved from here.
        """
        split = split_sequences(
            micro_batch.lengths,
            cp_rank=parallel_state.get_context_parallel_rank(),
            cp_size=self._layout.cp,
            multiple_of=self._layout.token_multiple,
        )
        device = next(self.parameters()).device
        tokens = on_device(micro_batch.tokens[split.source], device)[None]
        embedded = self.embedding(input_ids=tokens, position_ids=None) if self.pre_process else None
        packed = PackedTokens.of(
            split,
            rope=self._architecture.rope,
            varlen=self._varlen,
            dtype=self.config.params_dtype,
            device=device,
            group=parallel_state.get_context_parallel_group(),
        )
        hidden: Tensor = self.decoder(hidden_states=embedded, attention_mask=None, packed_seq_params=packed)
        if not self.post_process:
            return hidden
        return self._score(hidden, micro_batch, split, temperature=temperature, with_entropy=with_entropy)

    def _score(
        self, hidden: Tensor, micro_batch: MicroBatch, split: SequenceSplit, *, temperature: float, with_entropy: bool
    ) -> TokenScores:
        """Score the trained positions among this rank's tokens, then collect all ranks' scores."""
        if self._architecture.value_head:
            return self._values(hidden, micro_batch, split)
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True)
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden)
        hidden = hidden.squeeze(1)
        if self.gives_logits and torch.is_grad_enabled():
            assert self._layout.cp == 1, "config.rules refuses context parallelism"
            merged = on_device(split.merged, hidden.device)
            return TokenScores(log_probs=(hidden.index_select(0, merged) @ self._head_weight().T).float(), entropy=None)
        trained = (split.real & micro_batch.loss_mask[split.source]).nonzero().squeeze(-1)
        labels = on_device(micro_batch.labels[split.source[trained]], hidden.device)
        support = Support.of(micro_batch, split.source[trained])
        trained = on_device(trained, hidden.device)
        weight = self._head_weight()
        log_probs, entropy = parallel_log_probs(
            hidden.index_select(0, trained),
            weight,
            labels,
            VocabShard.of(
                parallel_state.get_tensor_model_parallel_group(),
                num_rows=weight.shape[0],
                vocab_size=self._architecture.vocab_size,
            ),
            temperature=temperature,
            chunk_tokens=self._head_chunk_tokens,
            with_entropy=with_entropy,
            support=support,
        )
        merged = on_device(split.merged, hidden.device)
        return TokenScores(
            log_probs=_spread(log_probs, trained, len(hidden), merged),
            entropy=None if entropy is None else _spread(entropy, trained, len(hidden), merged),
        )

    def _values(self, hidden: Tensor, micro_batch: MicroBatch, split: SequenceSplit) -> TokenScores:
        """Return a critic's values; every tensor-parallel rank computes all of them, with the whole gradient."""
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        trained = on_device((split.real & micro_batch.loss_mask[split.source]).nonzero().squeeze(-1), hidden.device)
        values = hidden[:, 0].index_select(0, trained).float() @ self.output_layer.weight[0].float()
        merged = on_device(split.merged, hidden.device)
        return TokenScores(log_probs=_spread(values, trained, len(hidden), merged), entropy=None)

    def _head_weight(self) -> Tensor:
        """Return [V/tp, D]; of tied models that of the embedding, or on a later stage its copy."""
        tied = self.share_embeddings_and_output_weights
        weight: Tensor = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        return weight


def transformer_config(
    architecture: Architecture, layout: ParallelLayout, training: TrainingConfig, *, param_dtype: torch.dtype
) -> TransformerConfig:
    """Return megatron-core's configuration of the model.

    Raises:
        ConfigError: a kind of model that megatron-core would not compute as transformers does.
    """
    refuse_output_biases(architecture)
    full = training.recomputes_layers
    return TransformerConfig(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.ffn_hidden_size,
        num_attention_heads=architecture.num_heads,
        num_query_groups=architecture.num_kv_heads,
        kv_channels=architecture.head_dim,
        qk_layernorm=architecture.qk_norm,
        add_bias_linear=False,
        add_qkv_bias=architecture.qkv_bias,
        normalization="RMSNorm",
        layernorm_epsilon=architecture.norm_eps,
        gated_linear_unit=True,
        activation_func=silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        # Weights come from a checkpoint. perform_initialization=False would leave out the marks of sharded weights, too.
        init_method=_leave_as_it_is,
        output_layer_init_method=_leave_as_it_is,
        embedding_init_method=_leave_as_it_is,
        params_dtype=param_dtype,
        bf16=param_dtype == torch.bfloat16,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        num_layers_in_first_pipeline_stage=layout.first_stage_layers,
        num_layers_in_last_pipeline_stage=layout.last_stage_layers,
        pipeline_dtype=param_dtype,
        context_parallel_size=layout.cp,
        sequence_parallel=layout.sequence_parallel and layout.tp > 1,
        # Micro-batches have different numbers of tokens; megatron-core allows that with this dispatcher only, experts or not.
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",
        # Losses are divided by the step's global counts already: gradients are summed, never averaged.
        calculate_per_token_loss=True,
        # The packed kernels always compute the softmax in float32.
        attention_softmax_in_fp32=True,
        recompute_granularity="full" if full else training.recompute_granularity,
        recompute_modules=list(training.recompute_modules),
        recompute_method=(training.recompute_method or "uniform") if full else None,
        recompute_num_layers=(training.recompute_num_layers or 1) if full else None,
        deterministic_mode=training.deterministic_mode,
    )


def build_model(
    architecture: Architecture,
    layout: ParallelLayout,
    training: TrainingConfig,
    device: torch.device,
    *,
    param_dtype: torch.dtype,
) -> PolicyModel:
    """Build this rank's stage (after `join_groups`), with weights that `load_weights` fills; collective.

    Args:
        device: The current device of megatron-core.

    Raises:
        ConfigError: the model is not supported here.
    """
    config = transformer_config(architecture, layout, training, param_dtype=param_dtype)
    varlen = uses_varlen_kernel(device=device, dtype=param_dtype)
    model: PolicyModel = PolicyModel(config, architecture, layout, training, varlen=varlen).to(device)
    return model


def local_parameters(model: PolicyModel, architecture: Architecture) -> list[tuple[WeightRule, nn.Parameter]]:
    """Return this stage's parameters with their rules, in the order of the model.

    The copy of a tied embedding on the last of several stages is left out; see `tied_head`.
    """
    by_name = dict(model.named_parameters())
    offset = model.decoder.layers[0].layer_number - 1
    found = []
    for rule in rules(architecture):
        parameter = next((by_name[name] for name in _local_names(rule, offset) if name in by_name), None)
        if parameter is not None:
            found.append((rule, parameter))
    return found


def tied_head(model: PolicyModel, architecture: Architecture) -> list[tuple[WeightRule, nn.Parameter]]:
    """Return the copy of a tied embedding on the last of several stages with the embedding's rule; else nothing."""
    if not (model.post_process and not model.pre_process and model.share_embeddings_and_output_weights):
        return []
    embedding = next(rule for rule in rules(architecture) if rule.kind == "vocab")
    weight = model.output_layer.weight
    assert isinstance(weight, nn.Parameter)
    return [(embedding, weight)]


@torch.no_grad()
def load_weights(model: PolicyModel, source: PartReader, architecture: Architecture, layout: ParallelLayout) -> None:
    """Copy this rank's share of a checkpoint into the stage, in its dtype; every rank reads its own, one weight at a time.

    Raises:
        ConfigError: a tensor has another shape than config.json implies.
    """
    place, memory = tensor_place(architecture, layout), HostMemory()
    for rule, parameter in [*local_parameters(model, architecture), *tied_head(model, architecture)]:
        memory.clear()
        parameter.copy_(read_share(rule, source, place, like=parameter, memory=memory))


def tensor_place(architecture: Architecture, layout: ParallelLayout) -> TensorPlace:
    """Return which share of the model this rank holds; after `join_groups`."""
    return TensorPlace(model=architecture, tp_rank=parallel_state.get_tensor_model_parallel_rank(), tp_size=layout.tp)


def read_share(rule: WeightRule, source: PartReader, place: TensorPlace, *, like: HeldWeight, memory: HostMemory) -> Tensor:
    """Return this tensor-parallel rank's share of a weight of a checkpoint, on the device and in the shape of `like`.

    On the host it may lie in `memory`.

    Raises:
        ConfigError: see `load_weights`.
    """
    parts = place.hf_parts(rule, like.shape)
    # Put together on the device: the host would take new memory.
    read = [source.read_part(name, part, memory).to(like.device) for name, part in zip(rule.hf_names, parts, strict=True)]
    share = to_megatron(rule, read, place.share_of_model)
    if rule.kind == "vocab":
        share = pad(share, (0, 0, 0, like.shape[0] - (parts[0].stop - parts[0].start)))
    if share.shape != like.shape:
        raise ConfigError(
            f"{', '.join(rule.hf_names)} of the checkpoint make {list(share.shape)} on one rank, but config.json implies "
            f"{list(like.shape)}; the files belong to another model."
        )
    return share


def _local_names(rule: WeightRule, offset: int) -> tuple[str, ...]:
    """Return the parameter's names in a stage whose first layer has the index `offset`: of the local spec, of the other one."""
    if rule.layer is None:
        return (rule.megatron_name,)
    prefix = f"decoder.layers.{rule.layer}."
    local_prefix = f"decoder.layers.{rule.layer - offset}."
    suffixes = (rule.megatron_name.removeprefix(prefix), rule.checkpoint_key.removeprefix("decoder.layers."))
    return tuple(local_prefix + suffix for suffix in suffixes)


def _spread(scores: Tensor, trained: Tensor, num_tokens: int, merged: Tensor) -> Tensor:
    """Return [T]: this rank's scores at its trained positions, joined with those of the other context-parallel ranks."""
    local = scores.new_zeros(num_tokens).index_copy(0, trained, scores)
    group = parallel_state.get_context_parallel_group()
    everywhere = gather_results(local, group) if group.size() > 1 else local
    return everywhere.index_select(0, merged)


def _leave_as_it_is(weight: Tensor) -> None:
    """Initialise nothing."""
