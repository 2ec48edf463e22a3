"""Our megatron-core model against Hugging Face's in every layout: scores of the labels, and gradients of all weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from qwench.models.hf import architecture_of
from qwench.models.megatron_names import rules, to_hf, tp_join
from tests.contract import megatron_model_ranks as ranks
from tests.contract.megatron_model_ranks import CASES, TEMPERATURE, Case

_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.15,
}


def _write_models(folder: Path) -> None:
    """Save random models; norms and biases too are no ones and zeros, one vocabulary is odd, and one rotation is YaRN's."""
    torch.manual_seed(3)
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
    for name in ("tied", "untied"):
        rope = yarn if name == "untied" else None
        config = Qwen3Config(vocab_size=48, head_dim=8, tie_word_embeddings=name == "tied", rope_parameters=rope, **_SIZES)
        _save(Qwen3ForCausalLM(config), folder / name)
    _save(Qwen2ForCausalLM(Qwen2Config(vocab_size=49, tie_word_embeddings=False, **_SIZES)), folder / "qwen2")


def _save(model: torch.nn.Module, folder: Path) -> None:
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name or "bias" in name:
                weight.add_(torch.randn(weight.shape) * 0.2)
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run all cases once, and leave the records here."""
    folder = tmp_path_factory.mktemp("megatron_model")
    _write_models(folder)
    ranks.run_cases(folder)
    return folder


@pytest.fixture(scope="module")
def plain(folder: Path) -> dict[str, tuple[list, dict[str, torch.Tensor], PretrainedConfig]]:
    """Return scores, gradients and configuration of the Hugging Face models."""
    return {model: _plain(folder / model) for model in ("tied", "untied", "qwen2")}


def _plain(folder: Path) -> tuple[list, dict[str, torch.Tensor], PretrainedConfig]:
    """Score each sequence alone, with all logits."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    scores = []
    for micro_batch in ranks.micro_batches():
        log_probs, entropy = [], []
        for tokens, labels in zip(
            micro_batch.tokens.split(micro_batch.lengths), micro_batch.labels.split(micro_batch.lengths), strict=True
        ):
            everything = (model(tokens[None]).logits[0] / TEMPERATURE).log_softmax(-1)
            log_probs.append(everything.gather(-1, labels[:, None])[:, 0])
            entropy.append(-(everything.exp() * everything).sum(-1))
        scored = [torch.cat(column) * micro_batch.loss_mask for column in (log_probs, entropy)]
        scores.append([column.detach() for column in scored])
        sum(slope @ column for slope, column in zip(ranks.slopes(micro_batch), scored, strict=True)).backward()
    return scores, {name: weight.grad for name, weight in model.named_parameters()}, model.config


def _records(folder: Path, case: Case) -> list[dict]:
    return [torch.load(folder / f"{case.name}.{rank}.pt", weights_only=False) for rank in range(ranks.WORLD_SIZE)]


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_every_rank_of_the_last_stage_has_the_scores_of_full_logits(folder: Path, plain: dict, case: Case) -> None:
    expected, _, _ = plain[case.model]
    scored = [record["scores"] for record in _records(folder, case) if record["scores"]]
    assert len(scored) == ranks.WORLD_SIZE // case.layout.pp
    for scores in scored:
        for score, (log_probs, entropy) in zip(scores, expected, strict=True):
            torch.testing.assert_close(score.log_probs, log_probs, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(score.entropy, entropy, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_the_shares_of_the_ranks_add_up_to_the_gradients(folder: Path, plain: dict, case: Case) -> None:
    _, expected, config = plain[case.model]
    records = [record for record in _records(folder, case) if record["place"]["dp"] == 0]
    gradients: dict[str, torch.Tensor] = {}
    for rule in rules(architecture_of(config)):
        shards = [_sum_of_shares(records, rule.megatron_name, tp_rank) for tp_rank in range(case.layout.tp)]
        if rule.megatron_name == "embedding.word_embeddings.weight" and case.model == "tied" and case.layout.pp > 1:
            copies = [_sum_of_shares(records, "copied head", tp_rank) for tp_rank in range(case.layout.tp)]
            shards = [shard + copy for shard, copy in zip(shards, copies, strict=True)]
        whole = tp_join(rule, shards)
        if rule.tp_dim is None and (case.layout.sequence_parallel or "self_attention" in rule.megatron_name):
            # Each tensor-parallel rank saw its own tokens, or its own heads.
            whole = torch.stack(shards).sum(0)
        gradients |= to_hf(rule, whole, architecture_of(config))
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            gradient, expected[name], rtol=1e-4, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("case", CASES[-2:], ids=[case.name for case in CASES[-2:]])
def test_layers_recompute_the_parts_that_the_flag_names(folder: Path, case: Case) -> None:
    assert case.recompute == "selective"
    for record in _records(folder, case):
        assert record["recomputed"] == [set(case.modules)] * (4 // case.layout.pp)


@pytest.mark.parametrize("case", CASES[:1], ids=[case.name for case in CASES[:1]])
def test_a_model_is_built_without_a_warning_of_megatron(folder: Path, case: Case) -> None:
    assert [record["warnings"] for record in _records(folder, case)] == [[]] * ranks.WORLD_SIZE


def _sum_of_shares(records: list[dict], name: str, tp_rank: int) -> torch.Tensor:
    """Add the gradients of the context-parallel ranks; one stage has the parameter."""
    mine = [record for record in records if record["place"]["tp"] == tp_rank and name in record["gradients"]]
    assert len({record["place"]["pp"] for record in mine}) == 1, name
    return torch.stack([record["gradients"][name] for record in mine]).sum(0)


def test_ranks_know_their_place(folder: Path) -> None:
    two_by_two = next(case for case in CASES if case.name == "tied-tp2-cp2-sp")
    places = [record["place"] for record in _records(folder, two_by_two)]
    assert [(place["tp"], place["cp"]) for place in places] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    two = next(case for case in CASES if case.name == "tied-cp2")
    parallel = [record["parallel"] for record in _records(folder, two)]
    assert [(rank.dp_rank, rank.dp_size, rank.num_ranks) for rank in parallel] == [(0, 2, 4), (0, 2, 4), (1, 2, 4), (1, 2, 4)]
    assert [rank.is_main for rank in parallel] == [True, False, False, False]
