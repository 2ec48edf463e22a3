"""The policy as one module: a packed micro-batch in, log-probs and entropy of its labels out."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from qwench.algorithms.columns import MicroBatch, on_device
from qwench.algorithms.log_probs import token_log_probs
from qwench.algorithms.support import Support
from qwench.models.architecture import Architecture
from qwench.models.hf import architecture_of
from qwench.training.fsdp.attention import packed_inputs
from qwench.training.fsdp.gradients import ShardedGradients
from qwench.training.memory_budget import ActivationBudget


class Policy(nn.Module):
    """A Hugging Face causal model whose head only sees the positions that are trained on.

    The whole computation is this module's forward, so that hooks of the root (FSDP2's) surround embedding and head too.
    """

    activation_budget: ActivationBudget | None = None
    """See `training.trainer.Trainer`."""

    def __init__(self, causal_lm: PreTrainedModel, *, attention: str, head_chunk_tokens: int) -> None:
        super().__init__()
        self.causal_lm = causal_lm
        self._attention = attention
        self._head_chunk_tokens = head_chunk_tokens
        self.eval()  # no dropout: scoring and training are the same function
        assert self.head.bias is None, "a head with a bias has no place in the chunked log-probs"

    @property
    def head(self) -> nn.Linear:
        """Return the output projection (which may share its weight with the embedding)."""
        head: nn.Linear = self.causal_lm.get_output_embeddings()
        return head

    @property
    def layers(self) -> nn.ModuleList:
        """Return the decoder layers."""
        layers = self.causal_lm.base_model.layers
        assert isinstance(layers, nn.ModuleList), f"{type(self.causal_lm).__name__} has no list of decoder layers"
        return layers

    def named_weights(self) -> dict[str, nn.Parameter]:
        """Return the parameters under their Hugging Face names, tied ones once, and adapters."""
        return dict(self.causal_lm.named_parameters())

    @cached_property
    def gradients(self) -> ShardedGradients:
        """Return the gradients of the sharded weights that are trained."""
        trained = {name: weight for name, weight in self.named_weights().items() if weight.requires_grad}
        return ShardedGradients(self, trained)

    def begin(self) -> None:
        """Prepare passes: FSDP2 rounds each group of weights when it is used."""

    def end_scoring(self) -> None:
        """Shard the root's weights again, which FSDP2 keeps whole after a forward for its backward."""
        self._as_fsdp.reshard()

    def reduce_in_next_backward(self, *, whole: bool, is_last: bool) -> None:
        """Sum gradients in float32 over the micro-batches, whole or in shards, and over replicas with the last one."""
        self._as_fsdp.set_requires_gradient_sync(whole)
        self._as_fsdp.set_requires_all_reduce(is_last)
        self._as_fsdp.set_is_last_backward(whole)

    def release(self) -> None:
        """Do nothing: no rounded weights are held between passes."""

    @property
    def _as_fsdp(self) -> FSDPModule:
        assert isinstance(self, FSDPModule), "parallelize comes first"
        return self

    def forward(self, micro_batch: MicroBatch, *, temperature: float, with_entropy: bool) -> tuple[Tensor, Tensor | None]:
        """Return log-probs [T] float32 of the labels and, on request, entropy [T] float32; 0 where loss_mask is false.

        Args:
            micro_batch: On the host; what is needed is moved from here, so that no index waits for the device.
        """
        device = self.head.weight.device
        hidden = self._hidden(micro_batch, device)
        trained = micro_batch.loss_mask.nonzero().squeeze(-1)
        labels = on_device(micro_batch.labels[trained], device)
        support = Support.of(micro_batch, trained)
        trained = on_device(trained, device)
        log_probs, entropy = self._score(hidden.index_select(0, trained), labels, temperature, with_entropy, support)
        nowhere = torch.zeros(micro_batch.num_tokens, dtype=torch.float32, device=device)
        entropy = nowhere.index_copy(0, trained, entropy) if entropy is not None else None
        return nowhere.index_copy(0, trained, log_probs), entropy

    def _hidden(self, micro_batch: MicroBatch, device: torch.device) -> Tensor:
        """Return the hidden states [T, D] before the head."""
        hidden: Tensor = self.causal_lm.base_model(
            input_ids=on_device(micro_batch.tokens, device)[None],
            position_ids=on_device(micro_batch.positions, device)[None],
            use_cache=False,
            **packed_inputs(self._attention, micro_batch.cu_seqlens, device),
        ).last_hidden_state[0]
        return hidden

    def _score(
        self, hidden: Tensor, labels: Tensor, temperature: float, with_entropy: bool, support: Support | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return log-probs [n] and, on request, entropy [n] of hidden states [n, D]."""
        return token_log_probs(
            hidden,
            self.head.weight,
            labels,
            temperature=temperature,
            chunk_tokens=self._head_chunk_tokens,
            with_entropy=with_entropy,
            support=support,
        )


class LogitsPolicy(Policy):
    """A policy whose passes with a gradient return the logits of all positions: for losses that the user computes from them."""

    def forward(self, micro_batch: MicroBatch, *, temperature: float, with_entropy: bool) -> tuple[Tensor, Tensor | None]:
        """Return logits [T, V] float32 before the temperature; without a gradient what `Policy` returns."""
        if not torch.is_grad_enabled():
            return super().forward(micro_batch, temperature=temperature, with_entropy=with_entropy)
        hidden = self._hidden(micro_batch, self.head.weight.device)
        return (hidden @ self.head.weight.T).float(), None


class ValuePolicy(Policy):
    """A critic: the decoder with a head of one row. Its forward returns values; temperature and labels do not matter."""

    def _score(
        self, hidden: Tensor, labels: Tensor, temperature: float, with_entropy: bool, support: Support | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the values [n] float32 of hidden states [n, D]."""
        return hidden.float() @ self.head.weight[0].float(), None


def put_value_head(causal_lm: PreTrainedModel) -> Architecture:
    """Replace the head of a language model by a value head of zeros, and return what it is then.

    The new head shares no weight with the embedding.
    """
    architecture = architecture_of(causal_lm.config).as_critic()
    head = nn.Linear(architecture.hidden_size, 1, bias=False, dtype=next(causal_lm.parameters()).dtype)
    nn.init.zeros_(head.weight)
    causal_lm.set_output_embeddings(head)
    return architecture
