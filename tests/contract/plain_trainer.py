"""A trainer that is a plain Hugging Face loop: full logits of one sequence at a time, and torch's AdamW."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import Qwen3ForCausalLM

from qwench.algorithms.columns import MicroBatch
from qwench.config.sections.optimizer import OptimizerConfig
from qwench.training.trainer import StepResult, Sums
from tests.fakes.trainer import TableTrainer

_NOT_KEPT = -1e9


@dataclass(frozen=True, kw_only=True)
class _Copy:
    """Weights that wait while others compute."""

    model: nn.Module
    weights: dict[str, Tensor]

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        own = _clone(self.model)
        self.model.load_state_dict(self.weights)
        yield
        self.model.load_state_dict(own)


class PlainTrainer(TableTrainer):
    """See the module docstring. What a step adds up is the table trainer's business; scores and the update are its own."""

    def __init__(self, folder: Path, section: OptimizerConfig, *, gives: str = "log_probs") -> None:
        """Load a model; `gives` says what its losses get: log_probs, logits or values of a critic whose head is zero."""
        super().__init__(torch.zeros(1, 1))
        self.model = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self._gives, self._section = gives, section
        if gives == "values":
            self.model.lm_head = nn.Linear(self.model.config.hidden_size, 1, bias=False)
            nn.init.zeros_(self.model.lm_head.weight)
        self._start = _clone(self.model)
        self.restart()

    def restart(self) -> None:
        """Return to the first weights, with a fresh optimizer."""
        self.model.load_state_dict(self._start)
        decayed = [weight for weight in self.model.parameters() if weight.ndim > 1]
        kept = [weight for weight in self.model.parameters() if weight.ndim == 1]
        section = self._section
        groups = [{"params": decayed, "weight_decay": section.weight_decay}, {"params": kept, "weight_decay": 0.0}]
        betas = (section.adam_beta1, section.adam_beta2)
        self._adamw = torch.optim.AdamW(groups, lr=section.lr, betas=betas, eps=section.adam_eps, foreach=False)

    def optim_step(self, sums: Sums) -> StepResult:
        """Clip and update; see `Trainer`."""
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._section.clip_grad)
        self._adamw.step()
        self._adamw.zero_grad()
        return StepResult(loss=sums.loss, grad_norm=float(norm), learning_rates=[self._section.lr] * 2, metrics=sums.metrics)

    def copy_held_weights(self) -> _Copy:  # type: ignore[override]  # it swaps as the host's copy does
        """Copy the weights."""
        return _Copy(model=self.model, weights=_clone(self.model))

    def _forward(self, micro_batch: MicroBatch, temperature: float) -> tuple[Tensor, Tensor]:
        assert len(micro_batch.lengths) == 1, "one sequence at a time"
        tokens = micro_batch.tokens[None]
        if self._gives == "values":
            hidden = self.model.model(tokens).last_hidden_state[0]
            return self.model.lm_head(hidden)[:, 0], torch.zeros(len(hidden))
        logits_TV = self.model(tokens).logits[0]
        if self._gives == "logits" and torch.is_grad_enabled():
            return logits_TV, torch.zeros(len(logits_TV))
        scaled_TV = logits_TV / temperature
        if micro_batch.support_counts is not None and micro_batch.support_ids is not None:
            scaled_TV = _restricted(scaled_TV, micro_batch.support_counts.tolist(), micro_batch.support_ids.tolist())
        log_probs_TV = scaled_TV.log_softmax(-1)
        entropy = -(log_probs_TV.exp() * log_probs_TV).sum(-1)
        places = torch.arange(len(log_probs_TV))
        return log_probs_TV[places, micro_batch.labels].where(micro_batch.loss_mask, 0.0), entropy


def _restricted(logits_TV: Tensor, counts: list[int], ids: list[int]) -> Tensor:
    """Return the logits with those of tokens that were not kept far below; a position without kept tokens stays."""
    rows = list(logits_TV.unbind())
    for row, count in enumerate(counts):
        own, ids = ids[:count], ids[count:]
        if own:
            is_kept = torch.zeros(logits_TV.shape[1], dtype=torch.bool)
            is_kept[own] = True
            rows[row] = rows[row].masked_fill(~is_kept, _NOT_KEPT)
    return torch.stack(rows)


def _clone(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in model.state_dict().items()}
