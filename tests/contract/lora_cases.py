"""The adapters that the contract suites of LoRA begin with, and the records of a plain module and of PEFT's own from there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import peft
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import Qwen3ForCausalLM

from qwench.config.sections.lora import LoraConfig
from qwench.models.nf4 import FrozenForm
from qwench.models.peft import AdapterConfig, write_adapter
from qwench.training.frozen import FrozenMatrix
from tests.contract import train_backend_cases as cases

RANK, ALPHA = 3, 5.0


def write_start(folder: Path, model_folder: Path, lora: LoraConfig) -> None:
    """Write an adapter whose A and B are both far from zero."""
    folder.mkdir()
    model = Qwen3ForCausalLM.from_pretrained(model_folder)
    draw = torch.Generator().manual_seed(21)
    matrices = {}
    for name, module in model.named_modules():
        if name.rsplit(".", 1)[-1] in lora.targets:
            assert isinstance(module, nn.Linear)
            matrices[f"{name}.lora_A.weight"] = torch.randn(RANK, module.in_features, generator=draw) * 0.1
            matrices[f"{name}.lora_B.weight"] = torch.randn(module.out_features, RANK, generator=draw) * 0.1
    write_adapter(folder, AdapterConfig.of_run(lora, base=str(model_folder)), matrices)


@dataclass(frozen=True, kw_only=True, slots=True)
class PeftRecord:
    """What PEFT's module made of the batch."""

    steps: cases.StepsRecord
    matrices: dict[str, Tensor]
    """A and B after the steps, by their names in an adapter folder."""
    first_moments: dict[str, Tensor]
    """Running averages of their clipped gradients, by the same names without PEFT's prefix."""


def peft_loop(model_folder: Path, start: Path, *, num_steps: int = cases.NUM_STEPS) -> PeftRecord:
    """Train PEFT's module from the adapter in `start` by the plain loop."""
    models: list[peft.PeftModel] = []
    optimizers: list[torch.optim.Optimizer] = []

    def prepare(model: nn.Module) -> nn.Module:
        models.append(peft.PeftModel.from_pretrained(model, str(start), is_trainable=True))
        return models[0]

    hook = register_optimizer_step_post_hook(lambda optimizer, *_: optimizers.append(optimizer))
    try:
        steps = cases.plain_loop(model_folder, num_steps=num_steps, prepare=prepare)
    finally:
        hook.remove()
    moments = {
        name.removeprefix("base_model.model.").replace(".default.", "."): optimizers[-1].state[weight]["exp_avg"]
        for name, weight in models[0].named_parameters()
        if weight.requires_grad
    }
    return PeftRecord(steps=steps, matrices=peft.get_peft_model_state_dict(models[0]), first_moments=moments)


def assert_apart_is_merged(record: Mapping[str, dict[str, Tensor]]) -> None:
    """Check that the weights and the adapter that are published apart make those that are published merged."""
    apart, weights = dict(record["apart"]), record["weights"]
    scale = float(apart.pop("lora_scale"))
    assert {name for name in apart if ".lora_" not in name} == weights.keys()
    for name, weight in weights.items():
        a, b = (apart.get(f"{name.removesuffix('.weight')}.lora_{leaf}.weight") for leaf in "AB")
        whole = apart[name] if a is None or b is None else apart[name] + scale * (b @ a)
        torch.testing.assert_close(whole, weight, rtol=1e-6, atol=1e-6)


def write_rounded(folder: Path, model_folder: Path, form: FrozenForm, targets: Sequence[str]) -> None:
    """Write a model whose projections are rounded as --lora-base rounds them."""
    model = Qwen3ForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.removesuffix(".weight").rsplit(".", 1)[-1] in targets:
                weight.copy_(FrozenMatrix(weight, form).whole(torch.float32))
    model.save_pretrained(folder)


class _PlainAdapter(nn.Module):
    """W x + scale * B A x by whole products, with W frozen."""

    def __init__(self, weight: Tensor, a: Tensor, b: Tensor, scale: float, minus: Tensor | float = 0.0) -> None:
        super().__init__()
        self.frozen, self.scale, self.minus = weight.detach(), scale, minus
        self.a, self.b = nn.Parameter(a.clone()), nn.Parameter(b.clone())

    def whole(self) -> Tensor:
        """Return the matrix that this is."""
        return self.frozen + self.scale * (self.b @ self.a - self.minus)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.whole().T


def _with_plain_adapters(model: nn.Module, start: Path | None, scale: float) -> nn.Module:
    model.requires_grad_(False)
    stored = {} if start is None else load_file(start / "adapter_model.safetensors")
    targets = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and "layers" in name]
    for name in targets:
        weight = model.get_submodule(name).weight
        if start is None:
            u, s, v_h = torch.linalg.svd(weight.detach(), full_matrices=False)
            root = (s[:RANK] / scale).sqrt()
            a, b = root[:, None] * v_h[:RANK], u[:, :RANK] * root
            model.set_submodule(name, _PlainAdapter(weight, a, b, scale, minus=b @ a))
        elif f"base_model.model.{name}.lora_A.weight" in stored:
            a, b = (stored[f"base_model.model.{name}.lora_{leaf}.weight"] for leaf in "AB")
            model.set_submodule(name, _PlainAdapter(weight, a, b, scale))
    return model


def plain_record(
    model_folder: Path, start: Path | None, *, scale: float, num_steps: int = cases.NUM_STEPS
) -> tuple[cases.StepsRecord, dict[str, Tensor]]:
    """Train a plain module from the adapter in `start`; None: from the principal components, with them subtracted.

    Returns:
        the record, with merged weights; the matrices by their names in an adapter folder, without PEFT's prefix.
    """
    models: list[nn.Module] = []

    def prepare(model: nn.Module) -> nn.Module:
        models.append(_with_plain_adapters(model, start, scale))
        return models[0]

    record = cases.plain_loop(model_folder, num_steps=num_steps, prepare=prepare)
    matrices = {}
    for name, module in models[0].named_modules():
        if isinstance(module, _PlainAdapter):
            del record.weights[f"{name}.a"], record.weights[f"{name}.b"]
            record.weights[f"{name}.weight"] = module.whole().detach()
            matrices |= {f"{name}.lora_A.weight": module.a.detach(), f"{name}.lora_B.weight": module.b.detach()}
    return record, matrices
