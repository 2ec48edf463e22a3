"""What the contract suite of training backends feeds them: a global batch, a loss, and a plain Hugging Face loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from qwench.algorithms.columns import MicroBatch, RolloutBatch, TokenLoss
from qwench.config.sections.optimizer import OptimizerConfig
from qwench.training.batch import pack
from qwench.training.memory_probe import MemoryProbe

TEMPERATURE = 0.8
EPS_CLIP = 0.2
ENTROPY_COEF = 0.01
PEAK_LR = 1e-3
NUM_STEPS = 3
CLIP_GRAD = 0.05
WEIGHT_DECAY = 0.1
BETAS = (0.9, 0.98)
ADAM_EPS = 1e-8
VOCAB = 48
OPTIMIZER = OptimizerConfig(
    lr=PEAK_LR,
    lr_decay_style="constant",
    lr_warmup_iters=2,
    adam_beta1=BETAS[0],
    adam_beta2=BETAS[1],
    adam_eps=ADAM_EPS,
    weight_decay=WEIGHT_DECAY,
    clip_grad=CLIP_GRAD,
)

PROBE = MemoryProbe(
    lengths=(11, 11, 4),
    num_micro_batches=2,
    vocab_size=VOCAB,
    temperature=TEMPERATURE,
    with_entropy=True,
    flag="--max-tokens-per-gpu",
    state_bytes=1 << 30,
    activation_bytes=1 << 30,
)
_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}

# (prompt, response) lengths; the response of sample 2 has a hole (tool output), sample 5 is not trained on at all.
_SHAPES = ((3, 5), (2, 9), (4, 6), (1, 1), (6, 3), (2, 4), (3, 7), (2, 2))


@dataclass(frozen=True, kw_only=True, slots=True)
class StepsRecord:
    """What a backend, or the plain loop, made of the batch."""

    log_probs: list[Tensor]
    entropy: list[Tensor]
    """B x [L - 1] before the first step, 0 where not trained."""
    losses: list[float]
    grad_norms: list[float]
    learning_rates: list[float]
    trained_tokens: list[float]
    weights: dict[str, Tensor]


def learning_rate(step: int) -> float:
    """Warm up over two steps, then stay."""
    return PEAK_LR * min(step, 2) / 2


_WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 128}
_NARROW = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}


def write_model(
    folder: Path,
    *,
    tied: bool,
    dtype: torch.dtype = torch.float32,
    num_layers: int = 2,
    seed: int = 11,
    wide: bool = False,
) -> None:
    """Save a Qwen3 with random weights, not all of them small; an untied one rotates as YaRN does.

    Args:
        wide: two tensor-parallel ranks have whole blocks of 128 x 128 of each projection.
    """
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCAB,
        num_hidden_layers=num_layers,
        **(_WIDE if wide else _NARROW),
        tie_word_embeddings=tied,
        initializer_range=0.15,
        rope_parameters=None if tied else dict(_YARN),
    )
    Qwen3ForCausalLM(config).to(dtype).save_pretrained(folder)


TRUNCATED = "truncated"
"""Name of the model whose batch was drawn by truncated sampling."""


MUON = "muon"
"""Name of the model that is stepped by Muon."""
FROZEN = "frozen"
FREEZES = ("embed_tokens", r"layers\.0\.", r"1\.mlp")
"""Expressions of --freeze-params-name-list for the model of the folder above."""
STATELESS = "stateless"
"""Every step begins with moments of zero, and norms of queries and keys decay."""
STATELESS_OPTIMIZER = replace(OPTIMIZER, use_stateless_adam=True, apply_wd_to_qk_layernorm=True, adam_eps=1e-4)
MUON_OPTIMIZER = replace(OPTIMIZER, optimizer="muon", muon_momentum=0.9)


def make_batch(model: str = "") -> RolloutBatch:
    """Return a rollout batch with every column the loss reads; that of the model `TRUNCATED` has the tokens that were kept."""
    batch = _make_batch()
    if model != TRUNCATED:
        return batch
    kept = [
        [kept_tokens(token) if on else [] for token, on in zip(tokens[-len(mask) :].tolist(), mask.tolist(), strict=True)]
        for tokens, mask in zip(batch.tokens, batch.loss_mask, strict=True)
    ]
    return batch.with_columns(
        support_counts=[torch.tensor([len(ids) for ids in rows]) for rows in kept],
        support_ids=[torch.tensor([token for ids in rows for token in ids], dtype=torch.int32) for rows in kept],
    )


def kept_tokens(token: int) -> list[int]:
    """Return the tokens that a draw has kept beside a token: from one, itself, to a quarter of the vocabulary."""
    return sorted({token, *range(token % 5, VOCAB, 4)}) if token % 3 else [token]


def _make_batch() -> RolloutBatch:
    draw = torch.Generator().manual_seed(5)
    masks = [torch.ones(response, dtype=torch.bool) for _, response in _SHAPES]
    masks[2][2:4] = False
    masks[5][:] = False
    return RolloutBatch(
        tokens=[torch.randint(VOCAB, (prompt + response,), generator=draw) for prompt, response in _SHAPES],
        loss_mask=masks,
        rewards=torch.zeros(len(_SHAPES)),
        graded=torch.ones(len(_SHAPES), dtype=torch.bool),
        group_ids=torch.arange(len(_SHAPES)) // 2,
        execution_ids=torch.arange(len(_SHAPES)),
        old_log_probs=[-4 + torch.randn(response, generator=draw) * 0.3 for _, response in _SHAPES],
        advantages=[torch.randn(1, generator=draw).expand(response).contiguous() for _, response in _SHAPES],
        loss_weights=[mask / mask.sum().clamp(min=1) / len(_SHAPES) for mask in masks],
    )


def clipped_loss(log_probs: Tensor, entropy: Tensor | None, micro_batch: MicroBatch) -> TokenLoss:
    """PPO's clipped loss with an entropy bonus, as weighted sum over tokens."""
    assert micro_batch.old_log_probs is not None and micro_batch.advantages is not None
    assert micro_batch.loss_weights is not None and entropy is not None
    loss = _token_losses(log_probs, entropy, micro_batch.old_log_probs, micro_batch.advantages) * micro_batch.loss_weights
    trained = (micro_batch.loss_weights > 0).float().sum()
    return TokenLoss(loss=loss.sum(), metrics={"trained_tokens": trained, "abs_loss": loss.detach().abs().sum()})


def micro_batches(batch: RolloutBatch, bins: list[list[int]]) -> list[MicroBatch]:
    """Pack the samples of each bin; an empty bin becomes one sample of weight zero."""
    idle = batch.with_columns(loss_weights=[torch.zeros_like(weights) for weights in batch.loss_weights or []])
    return [pack(batch, indices) if indices else pack(idle, [0]) for indices in bins]


def _freeze(model: nn.Module) -> None:
    """Freeze what FREEZES names."""
    for name, weight in model.named_parameters():
        if "embed_tokens" in name or "layers.0." in name or "layers.1.mlp" in name:
            weight.requires_grad_(False)


def plain_loop(
    folder: Path, *, num_steps: int = NUM_STEPS, prepare: Callable[[nn.Module], nn.Module] = lambda model: model
) -> StepsRecord:
    """Do what a backend must do, one sample at a time, with full logits and nothing of ours but the batch.

    Args:
        prepare: changes the model, and freezes what is not trained.
    """
    model = prepare(Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32))
    if folder.name == FROZEN:
        _freeze(model)
    trained = [w for w in model.parameters() if w.requires_grad]
    batch = make_batch(folder.name)
    outputs = partial(_plain_outputs, truncated=folder.name == TRUNCATED)
    assert batch.old_log_probs is not None and batch.advantages is not None
    stateless = folder.name == STATELESS
    of_qk = {weight for name, weight in model.named_parameters() if stateless and "_norm" in name and "self_attn" in name}
    decayed = [w for w in trained if w.ndim > 1 or w in of_qk]
    kept = [w for w in trained if w.ndim == 1 and w not in of_qk]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": kept, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    muon = _PlainMuon(model, groups[0]["params"]) if folder.name == MUON else None
    eps = STATELESS_OPTIMIZER.adam_eps if stateless else ADAM_EPS
    optimizer = torch.optim.AdamW(groups, lr=PEAK_LR, betas=BETAS, eps=eps, fused=False, foreach=False)
    with torch.no_grad():
        first, entropies = map(list, zip(*(outputs(model, tokens) for tokens in batch.tokens), strict=True))
    record = StepsRecord(
        log_probs=first, entropy=entropies, losses=[], grad_norms=[], learning_rates=[], trained_tokens=[], weights={}
    )
    for i, mask in enumerate(batch.loss_mask):
        for column in (first[i], entropies[i]):
            column[: len(column) - len(mask)] = 0.0
            column[len(column) - len(mask) :][~mask] = 0.0
    for step in range(num_steps):
        loss = torch.zeros(())
        for i, tokens in enumerate(batch.tokens):
            log_probs, entropy = outputs(model, tokens)
            mask = batch.loss_mask[i]
            response = len(mask)
            token_losses = _token_losses(
                log_probs[-response:], entropy[-response:], batch.old_log_probs[i], batch.advantages[i]
            )
            if mask.any():
                loss = loss + token_losses[mask].mean() / len(batch.tokens)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, CLIP_GRAD)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        if muon is not None:
            muon.step(learning_rate(step))
        if stateless:
            optimizer.state.clear()
        optimizer.step()
        model.zero_grad()
        record.losses.append(loss.item())
        record.grad_norms.append(norm.item())
        record.learning_rates.append(learning_rate(step))
        record.trained_tokens.append(float(sum(mask.sum() for mask in batch.loss_mask)))
    record.weights.update({name: weight.detach().clone() for name, weight in model.named_parameters()})
    return record


class _PlainMuon:
    """Muon of the matrices of the layers, which it takes from the parameters of AdamW."""

    def __init__(self, model: nn.Module, of_adam: list[nn.Parameter]) -> None:
        self.matrices = [weight for name, weight in model.named_parameters() if ".layers." in name and weight.ndim == 2]
        taken = set(self.matrices)
        of_adam[:] = [weight for weight in of_adam if weight not in taken]
        self.momenta = [torch.zeros_like(weight) for weight in self.matrices]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Step by the polynomial of the singular values, which Newton-Schulz applies five times."""
        for weight, momentum in zip(self.matrices, self.momenta, strict=True):
            assert weight.grad is not None
            momentum.mul_(0.9).add_(weight.grad)
            left, values, right = torch.linalg.svd((weight.grad + 0.9 * momentum).double(), full_matrices=False)
            values = values / (values.norm() + 1e-7)
            for _ in range(5):
                values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
            scale = 0.2 * max(weight.shape) ** 0.5
            weight.mul_(1 - lr * WEIGHT_DECAY).sub_(lr * scale * ((left * values) @ right).float())


def _plain_outputs(model: nn.Module, tokens: Tensor, *, truncated: bool) -> tuple[Tensor, Tensor]:
    """Return log-probs [L - 1] of the next tokens and entropies [L - 1]."""
    logits = model(tokens[None]).logits[0, :-1] / TEMPERATURE
    if truncated:
        is_kept = torch.zeros(logits.shape, dtype=torch.bool)
        for row, token in enumerate(tokens[1:].tolist()):
            is_kept[row, kept_tokens(token)] = True
        logits = logits.masked_fill(~is_kept, -1e9)
    log_probs = torch.log_softmax(logits, dim=-1)
    chosen = log_probs[torch.arange(len(tokens) - 1), tokens[1:]]
    return chosen, -(log_probs.exp() * log_probs).sum(-1)


def _token_losses(log_probs: Tensor, entropy: Tensor, old_log_probs: Tensor, advantages: Tensor) -> Tensor:
    ratio = (log_probs - old_log_probs).exp()
    clipped = ratio.clamp(1 - EPS_CLIP, 1 + EPS_CLIP)
    return -torch.minimum(ratio * advantages, clipped * advantages) - ENTROPY_COEF * entropy
