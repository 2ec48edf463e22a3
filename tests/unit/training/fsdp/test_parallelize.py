"""What sharding does to the modules: recomputation, dtypes, and no attention mask."""

from types import SimpleNamespace

import pytest
import torch

from qwench.algorithms.columns import RolloutBatch
from qwench.training.batch import pack
from qwench.training.fsdp import optimizer
from qwench.training.fsdp.attention import install_attention
from qwench.training.fsdp.parallelize import build_mesh, parallelize
from qwench.training.fsdp.policy import Policy
from tests.fakes.sections import adamw
from tests.unit.training.fsdp.tiny import tiny_model

pytestmark = pytest.mark.usefixtures("process_group")

_CPU = torch.device("cpu")


def _policy(*, param_dtype: torch.dtype = torch.float32, gradient_checkpointing: bool = False) -> Policy:
    torch.manual_seed(0)
    model = tiny_model()
    install_attention(model, "sdpa", device=_CPU, dtype=param_dtype)
    policy = Policy(model, attention="sdpa", head_chunk_tokens=8)
    mesh = build_mesh(_CPU, dp_replicate=1)
    parallelize(
        policy,
        mesh,
        device=_CPU,
        param_dtype=param_dtype,
        gradient_checkpointing=gradient_checkpointing,
        torch_compile=False,
        stored_dtype=torch.float32,
    )
    return policy


def _micro_batch():
    batch = RolloutBatch(
        tokens=[torch.arange(5), torch.arange(3, 10)],
        loss_mask=[torch.ones(4, dtype=torch.bool), torch.ones(2, dtype=torch.bool)],
        rewards=torch.zeros(2),
        graded=torch.ones(2, dtype=torch.bool),
        group_ids=torch.zeros(2, dtype=torch.int64),
        execution_ids=torch.arange(2),
    )
    return pack(batch, [0, 1])


@pytest.mark.parametrize(("gradient_checkpointing", "forwards"), [(False, 1), (True, 2)])
def test_gradient_checkpointing_runs_each_layer_once_more(gradient_checkpointing: bool, forwards: int):
    policy = _policy(gradient_checkpointing=gradient_checkpointing)
    calls: list[int] = []
    for index, layer in enumerate(policy.layers):
        layer.mlp.register_forward_pre_hook(lambda *_, index=index: calls.append(index))
    policy(_micro_batch(), temperature=1.0, with_entropy=False)[0].sum().backward()
    assert sorted(calls) == sorted([0, 1] * forwards)


def test_masters_and_gradients_are_float32_around_a_bfloat16_forward():
    policy = _policy(param_dtype=torch.bfloat16)
    seen: list[torch.dtype] = []
    policy.layers[0].mlp.down_proj.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    log_probs, _ = policy(_micro_batch(), temperature=1.0, with_entropy=False)
    log_probs.sum().backward()
    assert seen == [torch.bfloat16]
    assert log_probs.dtype == torch.float32
    weights = policy.named_weights()
    assert "lm_head.weight" not in weights  # tied: one weight, one gradient
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert {weight.grad.dtype for weight in weights.values()} == {torch.float32}


def test_no_attention_mask_is_built():
    policy = _policy()
    masks: list[object] = []
    policy.layers[0].self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
    )
    policy(_micro_batch(), temperature=1.0, with_entropy=False)
    assert masks == [None]


def test_only_trained_positions_reach_the_head():
    log_probs, entropy = _policy()(_micro_batch(), temperature=1.0, with_entropy=True)
    # Responses of 4 after a prompt of 1, and of 2 after a prompt of 5; the last position of each predicts nothing.
    trained = [True] * 4 + [False] + [False] * 4 + [True] * 2 + [False]
    assert (log_probs != 0).tolist() == trained
    assert (entropy != 0).tolist() == trained


def test_ranks_are_laid_out_once_more_on_the_host_where_they_are_on_gpus(monkeypatch: pytest.MonkeyPatch):
    made, policy = [], _policy()
    monkeypatch.setattr(optimizer, "init_device_mesh", lambda *given, mesh_dim_names: made.append((*given, mesh_dim_names)))
    optimizer.MasterOptimizer(policy.named_weights(), policy.gradients, adamw(), total_steps=1)
    assert made == []
    optimizer._same_ranks_on_the_host(SimpleNamespace(shape=torch.Size([2, 3]), mesh_dim_names=("a", "b")))
    assert made == [("cpu", (2, 3), ("a", "b"))]
