"""PEFT's folder of one LoRA adapter: what trainers write, and `peft`, engines and `qwench convert` read.

adapter_config.json          rank, alpha, projections
adapter_model.safetensors    base_model.model.<module>.lora_A.weight [r, in] and .lora_B.weight [out, r]
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeGuard

import torch
from torch import Tensor

from qwench.errors import CheckpointError, ConfigError
from qwench.models.architecture import PROJECTIONS, Architecture, adapter_scale
from qwench.models.hf_weights import check_is_regular, read_json
from qwench.models.safetensors_files import SafetensorsWriter, StoredTensor, TensorSpec, read_header, read_tensor
from qwench.samples import Json

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PICKLE = "adapter_model.bin"
A, B = "lora_A.weight", "lora_B.weight"
"""Names of an adapter's matrices, below that of its module."""
SCALE = "lora_scale"
"""Name of what a published adapter is multiplied by: one number, which its folder has in adapter_config.json."""
_PREFIX = "base_model.model."
_PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
"""PEFT's init_lora_weights that leave the base as it is; the others subtract the start of the adapter from the base."""
_VARIANTS = (
    "use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "layers_to_transform", "fan_in_fan_out",
    "layer_replication", "use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config", "kasa_config",
    "monteclora_config", "target_parameters", "trainable_token_indices",
)  # fmt: skip
_EXACT_SVD = 1024
"""Matrices with so few rows or columns are decomposed exactly; of larger ones the first components alone are computed."""
_ITERATIONS = 16


class AdapterFlags(Protocol):
    """What the flags of a run say of its adapters (`config.sections.lora`)."""

    @property
    def rank(self) -> int: ...  # noqa: D102
    @property
    def alpha(self) -> float: ...  # noqa: D102
    @property
    def scale(self) -> float: ...  # noqa: D102
    @property
    def targets(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def use_rslora(self) -> bool: ...  # noqa: D102
    @property
    def lora_init(self) -> str: ...  # noqa: D102
    @property
    def lora_dropout(self) -> float: ...  # noqa: D102
    @property
    def exclude_modules(self) -> str | None: ...  # noqa: D102


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterConfig:
    """What adapter_config.json says."""

    rank: int
    alpha: float
    use_rslora: bool
    targets: tuple[str, ...]
    """Projections, in the order of a layer."""
    dropout: float = 0.0
    base: str = ""
    """Folder or name of the base model, for readers; nothing here depends on it."""

    @property
    def scale(self) -> float:
        """Return what B A is multiplied by."""
        return adapter_scale(self.rank, self.alpha, use_rslora=self.use_rslora)

    @classmethod
    def of_run(cls, section: AdapterFlags, *, base: str) -> AdapterConfig:
        """Return what a run with these flags writes.

        With --lora-init pissa an adapter and its start, subtracted, are one adapter of twice the rank and the same scale.
        """
        doubled = 2 if section.lora_init == "pissa" else 1
        return cls(
            rank=section.rank * doubled,
            alpha=section.alpha * (doubled**0.5 if section.use_rslora else doubled),
            use_rslora=section.use_rslora,
            targets=section.targets,
            dropout=section.lora_dropout,
            base=base,
        )

    @classmethod
    def read(cls, folder: Path) -> AdapterConfig:
        """Read the file of a folder.

        Raises:
            ConfigError: it is missing, broken, or of another kind of adapter.
        """
        if not is_adapter(folder):
            raise ConfigError(
                f"there is no {CONFIG} in {folder}; give a PEFT folder, for example an iter_N of a run with adapters."
            )
        raw = read_json(folder / CONFIG)
        _refuse_variants(raw, folder)
        rank, alpha, named = raw.get("r"), raw.get("lora_alpha"), raw.get("target_modules")
        if type(rank) is not int or rank < 1 or not _is_finite(alpha):
            raise ConfigError(f"{folder / CONFIG} has no rank r and lora_alpha; is it of a LoRA adapter?")
        leaves = {str(name).rsplit(".", 1)[-1] for name in named} if isinstance(named, list) else _stored_projections(folder)
        return cls(
            rank=rank,
            alpha=float(alpha),
            use_rslora=raw.get("use_rslora") is True,
            targets=tuple(name for name in PROJECTIONS if name in leaves),
            base=str(raw.get("base_model_name_or_path") or ""),
        )

    def shapes(self, model: Architecture) -> dict[str, tuple[int, ...]]:
        """Return the name and shape of every matrix of an adapter of `model`."""
        found: dict[str, tuple[int, ...]] = {}
        for name, shape in model.parameter_shapes().items():
            module, _, leaf = name.rpartition(".")
            if leaf == "weight" and module.rsplit(".", 1)[-1] in self.targets:
                found |= {f"{module}.{A}": (self.rank, shape[1]), f"{module}.{B}": (shape[0], self.rank)}
        return found

    def write(self, folder: Path) -> None:
        """Write the file."""
        content: dict[str, Json] = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self.base,
            "r": self.rank,
            "lora_alpha": int(self.alpha) if self.alpha.is_integer() else self.alpha,
            "lora_dropout": self.dropout,
            "use_rslora": self.use_rslora,
            "target_modules": list(self.targets),
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
        }
        (folder / CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


class AdapterFolder:
    """The matrices of a folder by `<module>.lora_A.weight` and `<module>.lora_B.weight`, read one by one."""

    def __init__(self, folder: Path) -> None:
        """Read the headers.

        Raises:
            ConfigError: see `AdapterConfig.read`; or tensors that are no matrices of projections.
            CheckpointError: the weights are missing or damaged.
        """
        self.folder = folder
        for file in (folder / CONFIG, folder / WEIGHTS):
            check_is_regular(file)
        self.config = AdapterConfig.read(folder)
        if not (folder / WEIGHTS).exists() and (folder / _PICKLE).exists():
            raise ConfigError(
                f"{folder} holds {_PICKLE}, a pickle, which can run code and is not read; write {WEIGHTS} by PEFT's "
                "save_pretrained(safe_serialization=True)."
            )
        self._stored: dict[str, StoredTensor] = {}
        for name, stored in read_header(folder / WEIGHTS).items():
            module, _, leaf = name.removeprefix(_PREFIX).partition(".lora_")
            if f"lora_{leaf}" not in (A, B) or module.rsplit(".", 1)[-1] not in PROJECTIONS:
                raise ConfigError(f"{folder / WEIGHTS} holds {name}; only adapters of the layers' projections are read.")
            self._stored[f"{module}.lora_{leaf}"] = stored

    @classmethod
    def of_run(cls, folder: Path, section: AdapterFlags, model: Architecture) -> AdapterFolder:
        """Open the adapter that a run of `model` goes on with.

        Raises:
            ConfigError: it is of another rank, scale, model or other projections.
            CheckpointError: the folder holds no adapter, or is damaged.
        """
        if not folder.is_dir():
            raise CheckpointError(f"there is no folder {folder}.")
        if not is_adapter(folder):
            raise CheckpointError(
                f"{folder} has no {CONFIG} and holds no adapter; give whole weights as --ref-load or --hf-checkpoint, the base "
                "of the adapters."
            )
        stored = cls(folder)
        stored.check_is(section, model)
        return stored

    def check_is(self, section: AdapterFlags, model: Architecture) -> None:
        """Check that a run of `model` can go on with this adapter; see `of_run`."""
        has, wants = self.config, AdapterConfig.of_run(section, base="")
        if has.rank != wants.rank:
            flags = f"--lora-rank {has.rank}" + " --lora-init kaiming" * (section.lora_init != "kaiming")
            raise self._differs("rank", has.rank, wants.rank, flags)
        if not math.isclose(has.scale, wants.scale):
            alpha = has.scale * section.alpha / section.scale
            raise self._differs("the scale", f"{has.scale:g}", f"{wants.scale:g}", f"--lora-alpha {alpha:.12g}")
        if has.targets != wants.targets:
            stored = ",".join(has.targets)
            flags = f"--target-modules {stored}" + " without --exclude-modules" * (section.exclude_modules is not None)
            raise self._differs("the projections", stored, ",".join(wants.targets), flags)
        self.check_fits(model)

    def _differs(self, what: str, stored: object, wanted: object, flags: str) -> ConfigError:
        return ConfigError(f"the adapter {self.folder} has {what} {stored}, this run {wanted}; give {flags}.")

    def check_fits(self, model: Architecture) -> None:
        """Check that it has every matrix of an adapter of `model`, and no other.

        Raises:
            ConfigError: it is of another model.
        """
        found = {name: stored.spec.shape for name, stored in self._stored.items()}
        if differing := found.items() ^ self.config.shapes(model).items():
            raise ConfigError(f"the adapter {self.folder} is of another model: {min(differing)[0]} differs or is missing.")

    def read(self, name: str) -> Tensor:
        """Read one matrix in float32."""
        return read_tensor(self._stored[name]).float()


def write_adapter(folder: Path, config: AdapterConfig, matrices: Mapping[str, Tensor]) -> None:
    """Write both files; `matrices` are on the host, in any floating dtype, by the names that `AdapterFolder` has."""
    specs = {_PREFIX + name: TensorSpec(shape=tuple(m.shape), dtype=torch.float32) for name, m in matrices.items()}
    with SafetensorsWriter(folder / WEIGHTS, specs) as writer:
        for name, matrix in matrices.items():
            writer.write(_PREFIX + name, matrix.float().contiguous())
    config.write(folder)


def _stored_projections(folder: Path) -> set[str]:
    """Return the projections of the weights of a folder, whose config may name them by an expression; of no weights, all."""
    if not (folder / WEIGHTS).is_file():
        return set(PROJECTIONS)
    return {name.partition(".lora_")[0].rsplit(".", 1)[-1] for name in read_header(folder / WEIGHTS)}


def _is_finite(value: Json) -> TypeGuard[int | float]:
    """Tell whether a value of a JSON file is a number that a float can hold; NaN would make every weight NaN."""
    try:
        return type(value) in (int, float) and math.isfinite(value)
    except OverflowError:
        return False


def is_adapter(folder: Path) -> bool:
    """Tell whether a folder holds an adapter."""
    return (folder / CONFIG).is_file()


def merged(weight: Tensor, a: Tensor, b: Tensor, *, scale: float) -> Tensor:
    """Return weight + scale * B A, computed in float32 and rounded once to the dtype of `weight`."""
    return torch.addmm(weight.float(), b.float(), a.float(), alpha=scale).to(weight.dtype)


def factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return A [r, in] and B [out, r], whose product is the best approximation of `matrix` (float32) of that rank."""
    if min(matrix.shape) <= _EXACT_SVD:
        u, s, v_h = torch.linalg.svd(matrix, full_matrices=False)
        u, s, v = u[:, :rank], s[:rank], v_h[:rank].T
    else:
        with torch.random.fork_rng(devices=[matrix.device] if matrix.is_cuda else []):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(matrix, q=rank, niter=_ITERATIONS)
    root = s.sqrt()
    return (v * root).T.contiguous(), (u * root).contiguous()


def _refuse_variants(raw: Mapping[str, Json], folder: Path) -> None:
    """Refuse what other numbers than W + scale * B A would follow from."""
    if raw.get("peft_type") != "LORA":
        raise ConfigError(f"{folder / CONFIG} has peft_type {raw.get('peft_type')!r}; only LORA is read.")
    for key in _VARIANTS:
        if raw.get(key):
            raise ConfigError(f"{folder / CONFIG} has {key}, which is not supported; only plain LoRA of one rank is read.")
    if raw.get("bias", "none") != "none" or raw.get("lora_bias"):
        raise ConfigError(f"{folder / CONFIG} trains biases, which is not supported.")
    if (start := raw.get("init_lora_weights")) not in _PLAIN_STARTS:
        raise ConfigError(
            f"{folder / CONFIG} has init_lora_weights {start!r}: its base is not the model itself; write it with "
            "path_initial_model_for_weight_conversion of PEFT's save_pretrained."
        )
