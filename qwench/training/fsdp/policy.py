"""The policy as one module: a packed micro-batch in, log-probs and entropy of its labels out."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qwench.algorithms.columns import MicroBatch
from qwench.algorithms.log_probs import token_log_probs
from qwench.training.fsdp.attention import packed_inputs


class Policy(nn.Module):
    """A Hugging Face causal model whose head only sees the positions that are trained on.

    The whole computation is this module's forward, so that hooks of the root (FSDP2's) surround embedding and head too.
    """

    def __init__(self, causal_lm: PreTrainedModel, *, attention: str, head_chunk_tokens: int, compile_head: bool) -> None:
        super().__init__()
        self.causal_lm = causal_lm
        self._attention = attention
        self._head_chunk_tokens = head_chunk_tokens
        self._compile_head = compile_head
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
        """Return the parameters under their Hugging Face names, tied ones once."""
        return dict(self.causal_lm.named_parameters())

    def forward(
        self, micro_batch: MicroBatch, *, temperature: float, with_entropy: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Return log-probs [T] float32 of the labels and, on request, entropy [T] float32; 0 where loss_mask is false.

        Args:
            micro_batch: On the host; what is needed is moved from here, so that no index waits for the device.
        """
        weight = self.head.weight
        device = weight.device
        hidden = self.causal_lm.base_model(
            input_ids=micro_batch.tokens.to(device, non_blocking=True)[None],
            position_ids=micro_batch.positions.to(device, non_blocking=True)[None],
            use_cache=False,
            **packed_inputs(self._attention, micro_batch.cu_seqlens, device),
        ).last_hidden_state[0]
        trained = micro_batch.loss_mask.nonzero().squeeze(-1)
        labels = micro_batch.labels[trained].to(device, non_blocking=True)
        trained = trained.to(device, non_blocking=True)
        log_probs, entropy = token_log_probs(
            hidden.index_select(0, trained),
            weight,
            labels,
            temperature=temperature,
            chunk_tokens=self._head_chunk_tokens,
            with_entropy=with_entropy,
            compiled=self._compile_head,
        )
        nowhere = torch.zeros(micro_batch.num_tokens, dtype=torch.float32, device=device)
        entropy = nowhere.index_copy(0, trained, entropy) if entropy is not None else None
        return nowhere.index_copy(0, trained, log_probs), entropy
