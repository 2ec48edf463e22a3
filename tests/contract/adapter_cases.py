"""Two adapters of the tiny model, the models that they make, and what an engine must answer with them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qwench.engines.protocol import GenerateRequest, GenerateResult
from qwench.models.hf import architecture_of
from qwench.models.peft import AdapterConfig
from tests.contract.engine_hosts import make_model, reference_log_probs

ADAPTERS = {
    "wide": AdapterConfig(rank=3, alpha=6.0, use_rslora=False, targets=("q_proj", "v_proj", "gate_proj", "down_proj")),
    "narrow": AdapterConfig(rank=2, alpha=1.0, use_rslora=True, targets=("k_proj", "o_proj", "up_proj")),
}


def adapter_matrices(model: PreTrainedModel, name: str, *, seed: int = 5) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed + len(name))
    shapes = ADAPTERS[name].shapes(architecture_of(model.config))
    return {matrix: torch.randn(shape, generator=draw) * 0.2 for matrix, shape in shapes.items()}


def merged_model(model: PreTrainedModel, name: str, matrices: Mapping[str, Tensor]) -> PreTrainedModel:
    """Return the model with W + scale * B A in the place of W."""
    other = make_model("qwen3")
    with torch.no_grad():
        for module_name, module in other.named_modules():
            if (a := matrices.get(f"{module_name}.lora_A.weight")) is not None:
                module.weight += ADAPTERS[name].scale * matrices[f"{module_name}.lora_B.weight"] @ a
    return other


def check_log_probs(models: Mapping[str | None, PreTrainedModel], request: GenerateRequest, result: GenerateResult) -> None:
    expected = reference_log_probs(models[request.adapter], request, result)
    torch.testing.assert_close(torch.tensor(result.log_probs), expected, rtol=0, atol=1e-5)
