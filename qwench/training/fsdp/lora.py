"""Adapters in the Hugging Face module: frozen projections, and the trained matrices A and B beside them.

    y = W x + scale * B (A drop(x))                        --lora-init kaiming: A random, B zero
    y = W x + scale * (B (A drop(x)) - B0 (A0 drop(x)))    --lora-init pissa: A, B begin as A0, B0, principal components of W

W is frozen in `param_dtype`: it has no master, no gradient and no moments. Switched off, a layer is the base layer bit for bit,
so that the reference needs no second copy. Engines get W + scale * B A.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional
from transformers import PreTrainedModel

from qwench.checkpoints.folders import starting_adapter
from qwench.checkpoints.formats.sources import TensorReader
from qwench.config.sections.lora import LoraConfig
from qwench.models.peft import SCALE, A, AdapterConfig, B, merged
from qwench.training.adapters import AdapterSwitch, random_a
from qwench.training.frozen import FrozenMatrix
from qwench.training.fsdp.optimizer import full_tensor, local_shard
from qwench.training.offload import to_host
from qwench.training.pissa import as_one, folder_name, merged_change, part_of, principal


class LoraLinear(nn.Module):
    """A frozen linear layer with an adapter. It keeps weight and bias under their names."""

    def __init__(self, base: nn.Linear, section: LoraConfig, switch: AdapterSwitch, *, layer: int) -> None:
        super().__init__()
        form = section.lora_base
        self.frozen = None if form == "auto" else FrozenMatrix(base.weight, form)
        self.weight: Tensor | None = base.weight if self.frozen is None else None
        self.bias = base.bias
        self.lora_A, self.lora_B = _matrices(base, section.rank)
        self.start_A: nn.Linear | None = None
        self.start_B: nn.Linear | None = None
        if section.lora_init == "pissa":
            self.start_A, self.start_B = (matrix.requires_grad_(False) for matrix in _matrices(base, section.rank))
        self._scale = section.scale
        self._switch = switch
        self._layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of the layer."""
        if self.frozen is not None:
            y: Tensor = self.frozen(x) if self.bias is None else self.frozen(x) + self.bias
        else:
            assert self.weight is not None, "a layer has one form of its weight"
            y = functional.linear(x, self.weight, self.bias)
        if not self._switch.is_on:
            return y
        x = self._switch.dropped(x, self._layer)
        delta: Tensor = self.lora_B(self.lora_A(x))
        if self.start_A is not None and self.start_B is not None:
            delta = delta - self.start_B(self.start_A(x))
        return y + self._scale * delta


class Adapters:
    """All adapters of a model."""

    def __init__(self, model: PreTrainedModel, section: LoraConfig, *, seed: int, base: str) -> None:
        """Freeze `model`, and put a `LoraLinear` in the place of each target. Matrices are zero until they are filled.

        Args:
            seed: Of what is random: the start, and what passes drop.
            base: Folder of the model, which adapter folders name.
        """
        self.switch = AdapterSwitch(section.lora_dropout, seed=seed)
        """Decides what the adapters do in a pass."""
        self.start_folder = starting_adapter(section)
        """PEFT folder that a fresh run begins with. None: `start` says with what."""
        self.section = section
        """Flags of the adapters."""
        self._seed = seed
        self._base = base
        model.requires_grad_(False)
        self._layers: dict[str, LoraLinear] = {}
        found = [name for name, _ in model.named_modules() if name.rsplit(".", 1)[-1] in section.targets]
        for index, name in enumerate(found):
            frozen = model.get_submodule(name)
            assert isinstance(frozen, nn.Linear), f"{name} is a projection"
            self._layers[name] = LoraLinear(frozen, section, self.switch, layer=index)
            model.set_submodule(name, self._layers[name])

    @property
    def are_plain(self) -> bool:
        """Tell whether they are W + scale * B A in every pass: nothing is dropped or quantised, no start is subtracted."""
        section = self.section
        return section.lora_dropout == 0.0 and section.lora_init == "kaiming" and section.lora_base == "auto"

    def matrices(self) -> dict[str, nn.Parameter]:
        """Return every A and B by name, and the starts that are subtracted."""
        return {
            f"{name}.{leaf}": matrix
            for name, layer in self._layers.items()
            for leaf, matrix in layer.named_parameters()
            if leaf not in ("weight", "bias")
        }

    def config(self) -> AdapterConfig:
        """Return what an adapter folder of this run says."""
        return AdapterConfig.of_run(self.section, base=self._base)

    def published(self, name: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a whole weight of the model with its adapter merged, as rounded to `dtype` it computes; collective."""
        layer = self._layers.get(name.removesuffix(".weight"))
        if layer is None or not name.endswith(".weight"):
            return weight
        scale = self.section.scale
        a, b = (_whole(linear.weight, dtype) for linear in (layer.lora_A, layer.lora_B))
        if layer.start_A is None or layer.start_B is None:
            return merged(weight, a, b, scale=scale)
        a_0, b_0 = (_whole(linear.weight, dtype) for linear in (layer.start_A, layer.start_B))
        return merged_change(weight, a, b, a_0, b_0, scale=scale)

    def quantised(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Yield the weights that are held in fewer bits, as they are computed with in `dtype`; local."""
        for name, layer in self._layers.items():
            if layer.frozen is not None:
                yield f"{name}.weight", layer.frozen.whole(dtype)

    def on_host(self, source: TensorReader, dtype: torch.dtype, device: torch.device) -> dict[FrozenMatrix, Tensor]:
        """Read the weights of another model in `dtype` for the places of those that are held in fewer bits; local."""
        return {
            layer.frozen: to_host(source.read(f"{name}.weight"), dtype, for_device=device)
            for name, layer in self._layers.items()
            if layer.frozen is not None
        }

    def apart(self, whole: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield the matrices of the adapter, and its scale, from whole ones under the names of `matrices`."""
        yield from as_one(whole).items()
        yield SCALE, torch.tensor([self.config().scale], device=next(iter(whole.values())).device)

    def start(self, dtype: torch.dtype) -> AdapterStart:
        """Return the matrices that a fresh run begins with."""
        return AdapterStart(self._layers, self.section, seed=self._seed, dtype=dtype)

    def split(self, name: str, matrix: Tensor) -> Tensor:
        """Return the part of a folder's matrix that `name`, an adapter's or a start's, has; undoes `pissa.as_one`."""
        return part_of(name, matrix) if self.section.lora_init == "pissa" else matrix


class AdapterStart:
    """A `TensorReader` of the matrices that a fresh run begins with. Reading is collective, in one order."""

    def __init__(self, layers: Mapping[str, LoraLinear], section: LoraConfig, *, seed: int, dtype: torch.dtype) -> None:
        self._layers = layers
        self._section = section
        self._seed = seed
        self._dtype = dtype
        self._computed: tuple[str, Tensor, Tensor] | None = None

    def read(self, name: str) -> Tensor:
        """Return one whole matrix, rounded to the dtype of a forward: so a start and what is subtracted are equal."""
        module = folder_name(name).removesuffix("." + A).removesuffix("." + B)
        layer = self._layers[module]
        if self._section.lora_init == "pissa":
            a, b = self._principal(module, layer)
            return a if name.endswith("A.weight") else b
        if name.endswith(B):
            return torch.zeros(layer.lora_B.weight.shape)
        return random_a(name, layer.lora_A.weight.shape, seed=self._seed)

    def _principal(self, module: str, layer: LoraLinear) -> tuple[Tensor, Tensor]:
        """See `pissa.principal`; collective."""
        if self._computed is None or self._computed[0] != module:
            assert layer.weight is not None, "the section refuses principal components of quantised weights"
            whole = _whole(layer.weight, torch.float32)
            a, b = principal(whole, self._section, self._dtype)
            for matrix in (a, b):
                dist.broadcast(matrix, src=0)
            self._computed = module, a, b
        return self._computed[1:]


def _matrices(base: nn.Linear, rank: int) -> tuple[nn.Linear, nn.Linear]:
    """Return A and B, of zeros, in float32."""
    a, b = nn.Linear(base.in_features, rank, bias=False), nn.Linear(rank, base.out_features, bias=False)
    for linear in (a, b):
        nn.init.zeros_(linear.weight.data)
        linear.float()
    return a, b


def _whole(weight: Tensor, dtype: torch.dtype) -> Tensor:
    assert isinstance(weight, DTensor), "adapters are on their ranks"
    if weight.device_mesh.size() == 1:
        return local_shard(weight).detach().to(dtype)  # without a collective, which takes longer than the sum
    return full_tensor(weight.detach().to(dtype))
