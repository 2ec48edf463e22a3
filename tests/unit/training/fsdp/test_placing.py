"""Which policy the layout and the flags mean, and how whole gradients become shards."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from qwench.config.sections.training import TrainingConfig
from qwench.errors import ConfigError
from qwench.training.fsdp import fsdp_trainer, parallelize
from qwench.training.fsdp.direct import PolicyPlace
from qwench.training.fsdp.gathered import ReducedGradients, check_gathered
from qwench.training.fsdp.parallelize import place_policy
from tests.unit.config.architectures import QWEN3_4B


class Mesh:
    """Ranks that share the weights, and as many replicas of them as `replicas` says."""

    def __init__(self, shards: int, replicas: int = 1) -> None:
        self._shards, self._replicas = shards, replicas
        self.ndim = 1 if replicas == 1 else 2

    def size(self) -> int:
        return self._shards * self._replicas

    def __getitem__(self, name: str) -> SimpleNamespace:
        assert name == "dp_shard"
        return SimpleNamespace(size=lambda: self._shards)

    def get_group(self, name: str) -> str:
        return f"group of {name}"


CRITIC = replace(QWEN3_4B, value_head=True)
BIASED = replace(QWEN3_4B, qkv_bias=True)
PLAIN, DROPS = SimpleNamespace(are_plain=True), SimpleNamespace(are_plain=False)
WHOLE, FROZEN = TrainingConfig(whole_weights=True), TrainingConfig(freeze_params_name_list=("embed",))


@pytest.mark.parametrize(
    ("mesh", "architecture", "training", "options", "expected"),
    [
        (Mesh(1), QWEN3_4B, TrainingConfig(), {}, "direct"),
        (Mesh(1), QWEN3_4B, WHOLE, {}, "direct"),
        (Mesh(1), BIASED, TrainingConfig(), {}, "plain"),
        (Mesh(1), CRITIC, TrainingConfig(), {}, "values"),
        (Mesh(1), CRITIC, TrainingConfig(), {"logits": True}, "values"),
        (Mesh(1), QWEN3_4B, TrainingConfig(), {"logits": True}, "logits"),
        (Mesh(1), QWEN3_4B, FROZEN, {}, "plain"),
        (Mesh(1), QWEN3_4B, TrainingConfig(), {"adapters": PLAIN}, "adapted"),
        (Mesh(1), QWEN3_4B, TrainingConfig(), {"adapters": DROPS}, "plain"),
        (Mesh(1), QWEN3_4B, TrainingConfig(), {"attention": "eager"}, "plain"),
        (Mesh(2), QWEN3_4B, TrainingConfig(), {}, "plain"),
        (Mesh(2), QWEN3_4B, WHOLE, {}, "gathered"),
        (Mesh(2), CRITIC, WHOLE, {}, "values"),
        (Mesh(2), QWEN3_4B, WHOLE, {"logits": True}, "logits"),
        (Mesh(1, 2), QWEN3_4B, TrainingConfig(), {}, "plain"),
        (Mesh(1, 2), QWEN3_4B, TrainingConfig(), {"adapters": PLAIN}, "adapted"),
        (Mesh(2), QWEN3_4B, TrainingConfig(), {"adapters": PLAIN}, "plain"),
    ],
)
def test_one_rank_computes_in_the_packed_decoder_and_several_under_fsdp2(
    mesh: Mesh, architecture: object, training: TrainingConfig, options: dict[str, object], expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    names = {"GatheredPolicy": "gathered", "DirectPolicy": "direct", "AdaptedPolicy": "adapted"}
    for name, shown in names.items():
        monkeypatch.setattr(parallelize, name, lambda *given, shown=shown, **more: (shown, *given, *more.values()))
    for name, shown in {"ValuePolicy": "values", "LogitsPolicy": "logits", "Policy": "plain"}.items():
        monkeypatch.setattr(parallelize, name, lambda *given, shown=shown, **more: (shown, *given, more))
    sharded: list[object] = []
    monkeypatch.setattr(parallelize, "parallelize", lambda *given, **more: sharded.append((given, more)))
    place = PolicyPlace(
        mesh=mesh, training=replace(training, log_probs_chunk_size=9, torch_compile=True, gradient_checkpointing=True),
        device="device", param_dtype="param", stored_dtype="stored", attention=options.get("attention", "sdpa"),
    )  # fmt: skip
    adapters = options.get("adapters")
    found = place_policy("model", architecture, place, logits=options.get("logits", False), adapters=adapters)
    if expected in names.values():
        assert found == (expected, "model", architecture, place, *([adapters] if expected == "adapted" else [])) and not sharded
        return
    assert found == (expected, "model", {"attention": place.attention, "head_chunk_tokens": 9})
    dtypes = {"device": "device", "param_dtype": "param", "stored_dtype": "stored"}
    assert sharded == [((found, mesh), {**dtypes, "gradient_checkpointing": True, "torch_compile": True})]


@pytest.mark.parametrize(("shards", "replicas"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_a_step_reduces_whole_gradients_to_shards_once(shards: int, replicas: int, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    def scatter(shard: Tensor, whole: Tensor, *, group: str) -> None:
        said.append(group)
        shard.copy_(whole[len(shard) :] * 10)

    def reduce(shard: Tensor, *, group: str) -> None:
        said.append(group)
        shard.mul_(3)

    monkeypatch.setattr(dist, "reduce_scatter_tensor", scatter)
    monkeypatch.setattr(dist, "all_reduce", reduce)
    memory = torch.arange(8.0)
    views = {"a": memory.view(4, 2)[:2], "b": memory.view(4, 2)[2:]}
    gradients = ReducedGradients(lambda: SimpleNamespace(by_name=views, bound="bound"), Mesh(shards, replicas))
    found = [one.tolist() for one in gradients.local()]
    rows = [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]
    factor = (10 if shards > 1 else 1) * (3 if replicas > 1 else 1)
    assert found == [[[factor * value for value in row] for row in whole[shards - 1 :]] for whole in rows]
    groups = ["group of dp_shard"] * (shards > 1) + ["group of dp_replicate"] * (replicas > 1)
    assert said == groups * 2
    assert gradients.local() is gradients.local() and said == groups * 2, "the first call alone is collective"
    assert memory.untyped_storage().nbytes() == (0 if shards > 1 else 32), "shards beside the sums are all that is kept"
    gradients.drop()
    assert memory.untyped_storage().nbytes() == 0
    assert [one.tolist() for one in gradients.local()] == [[[0.0, 0.0]] * (2 // shards)] * 2, "the next step begins at zero"


def test_layers_that_the_packed_decoder_lacks_and_rows_that_do_not_divide_are_refused() -> None:
    check_gathered(QWEN3_4B, "sdpa", num_shards=2)
    for architecture, attention in ((BIASED, "sdpa"), (QWEN3_4B, "eager")):
        with pytest.raises(ConfigError, match=r"^--whole-weights computes layers without biases, with --attn-implementation"):
            check_gathered(architecture, attention, num_shards=2)
    odd = replace(QWEN3_4B, vocab_size=151_935)
    with pytest.raises(ConfigError, match=r"shards model\.embed_tokens\.weight by its 151935 rows, which 2 ranks do not"):
        check_gathered(odd, "sdpa", num_shards=2)


@pytest.mark.parametrize(
    ("part", "base", "dp_size", "dtype", "is_shared"),
    [
        ("merged", None, 1, torch.bfloat16, True),
        ("merged", None, 2, torch.bfloat16, False),
        ("merged", None, 1, torch.float32, False),
        ("merged", "auto", 1, torch.bfloat16, False),
        ("adapter", "auto", 1, torch.bfloat16, True),
        ("apart", "auto", 1, torch.bfloat16, True),
        ("adapter", "nf4", 1, torch.bfloat16, False),
        ("adapter", "auto", 2, torch.bfloat16, False),
    ],
)
def test_weights_are_shared_where_they_are_what_would_be_published(
    part: str, base: str | None, dp_size: int, dtype: torch.dtype, is_shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fsdp_trainer, "local_shard", lambda weight: weight)
    trainer = object.__new__(fsdp_trainer.FsdpTrainer)
    trainer._adapters = None if base is None else SimpleNamespace(section=SimpleNamespace(lora_base=base))
    trainer.parallel, trainer._param_dtype = SimpleNamespace(dp_size=dp_size), torch.bfloat16
    trainer._weights = {"a": torch.zeros(1, dtype=torch.bfloat16), "b": torch.zeros(1, dtype=dtype)}
    trainer._are_lent = False
    assert trainer.shared_weights(part) == (trainer._weights if is_shared else None)
    assert trainer._are_lent is is_shared, "what an engine computes with stays on the device"
